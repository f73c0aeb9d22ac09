"""Two hosts, as far as one machine has them: network namespaces with addresses and host names of their own."""

import json
import os
import shlex
import time

import pytest
from hosts import TwoHosts, no_hosts
from launchers import CLASSIFIER, ON_GLOO, SMALL, TORCHRUN, accelerate_launch, distance, run, small_batch, weights
from test_deaths import LATEST, LOOP, NEW_STORE, ended, same_bits

pytestmark = [pytest.mark.hosts, pytest.mark.timeout(600)]
PORT = 29400
CLASSIFY = [*CLASSIFIER, *SMALL, *small_batch(2), "--num_train_epochs", "1"]
ON_CPU = ["--use_cpu", "true"]


@pytest.fixture
def hosts():
    reason = no_hosts()
    if reason:
        pytest.skip(reason)
    with TwoHosts() as two:
        yield two


@pytest.fixture(scope="module")
def one_host(tmp_path_factory):
    """The same two processes on one host."""
    folder = tmp_path_factory.mktemp("one-host") / "run"
    run([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *CLASSIFY, *ON_CPU, "--output_dir", folder])
    return folder


def torchrun(hosts, *options):
    endpoint = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts.names[0]}:{PORT}"]
    return [*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *endpoint, *options]


def on_both(hosts, commands, tmp_path, timeout=240, **values):
    """Runs a command on each host to its good end; returns what they print."""
    logs = [tmp_path / f"host-{host}.log" for host in (0, 1)]
    jobs = [hosts.start(host, commands[host], logs[host], **values) for host in (0, 1)]
    for job, log in zip(jobs, logs, strict=True):
        assert job.wait(timeout) == 0, log.read_text()[-6000:]
    return [log.read_text() for log in logs]


def check_two_joined_processes(folder, reference):
    results = json.loads((folder / "results.json").read_text())
    assert results["processes"] == 2
    assert results["epochs"][-1]["step"] == 8
    assert distance(weights(folder), weights(reference)) == 0


def test_the_hosts_are_two(hosts, tmp_path):
    names = on_both(hosts, [["hostname"], ["hostname"]], tmp_path)
    assert [name.strip() for name in names] == list(hosts.names)
    on_both(hosts, [["getent", "hosts", hosts.names[1]], ["getent", "hosts", hosts.names[0]]], tmp_path)


def test_torchrun_on_two_hosts_gives_the_weights_of_one(hosts, tmp_path, one_host):
    command = [*torchrun(hosts), *CLASSIFY, *ON_CPU, "--output_dir", tmp_path / "run"]
    on_both(hosts, [command, command], tmp_path)
    check_two_joined_processes(tmp_path / "run", one_host)


def accelerate_commands(hosts, configuration, command, *options):
    machines = ["--num_machines", "2", "--num_processes", "2"]
    machines += ["--main_process_ip", hosts.names[0], "--main_process_port", PORT]
    return [
        [*accelerate_launch(configuration, *machines, "--machine_rank", rank, *options), *command] for rank in (0, 1)
    ]


def test_accelerate_launch_on_two_hosts_gives_the_weights_of_one(hosts, tmp_path, one_host):
    commands = accelerate_commands(hosts, "ddp_hosts", [*CLASSIFY, *ON_CPU, "--output_dir", tmp_path / "run"])
    on_both(hosts, commands, tmp_path)
    check_two_joined_processes(tmp_path / "run", one_host)


def test_fsdp2_over_two_hosts(hosts, tmp_path, one_host):
    command = [*ON_GLOO, *CLASSIFY, "--output_dir", tmp_path / "run"]
    options = ["--rdzv_backend", "c10d", "--fsdp_transformer_layer_cls_to_wrap", "Block"]
    on_both(hosts, accelerate_commands(hosts, "fsdp2", command, *options), tmp_path)
    one, two = weights(one_host), weights(tmp_path / "run")
    moved = sum(float(value.square().sum()) for name, value in one.items() if value.ndim > 1) ** 0.5
    assert distance(one, two) < 1e-5 * moved


def test_a_cable_pulled_in_a_step_costs_time_and_not_a_bit(hosts, tmp_path):
    epochs = ["--num_train_epochs", "20"]  # 160 steps
    run([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *LOOP, *epochs, "--output_dir", tmp_path / "one"])
    command = [*torchrun(hosts), *LOOP, *epochs, "--output_dir", tmp_path / "two"]
    logs = [tmp_path / f"host-{host}.log" for host in (0, 1)]
    jobs = [hosts.start(host, command, logs[host], STEP_SECONDS="0.02", **NEW_STORE) for host in (0, 1)]
    wait_for_training(jobs, logs, starts=1)
    hosts.pull_cable()
    time.sleep(5)
    assert [job.poll() for job in jobs] == [None, None]
    hosts.plug_in_cable()
    for job, log in zip(jobs, logs, strict=True):
        assert job.wait(240) == 0, log.read_text()[-6000:]
    assert same_bits(ended(tmp_path / "one"), ended(tmp_path / "two"))


def test_a_cable_out_for_longer_than_the_time_out_starts_the_job_again_from_its_checkpoint(hosts, tmp_path):
    epochs = ["--num_train_epochs", "20"]
    run([*TORCHRUN, "--standalone", "--nproc-per-node", "2", *LOOP, *epochs, "--output_dir", tmp_path / "one"])
    command = [*torchrun(hosts, "--max-restarts", "3"), *LOOP, *epochs, *LATEST, "--ddp_timeout", "8"]
    command += ["--output_dir", tmp_path / "two"]
    logs = [tmp_path / f"host-{host}.log" for host in (0, 1)]
    jobs = [hosts.start(host, command, logs[host], STEP_SECONDS="0.02", **NEW_STORE) for host in (0, 1)]
    wait_for_training(jobs, logs, starts=1)
    time.sleep(2)
    hosts.pull_cable()
    time.sleep(20)
    hosts.plug_in_cable()
    for job, log in zip(jobs, logs, strict=True):
        assert job.wait(240) == 0, log.read_text()[-6000:]
    printed = "".join(log.read_text() for log in logs)
    assert "Timed out waiting 8000ms" in printed
    assert printed.count("first step\n") == 4  # two ranks, started twice
    assert same_bits(ended(tmp_path / "one"), ended(tmp_path / "two"))


def test_a_host_that_is_gone_leaves_the_other_to_go_on_alone(hosts, tmp_path):
    """torchrun --nnodes 1:2. What is left of the epoch is taken in batches of half the size."""
    elastic = [
        "--nnodes",
        "1:2",
        "--max-restarts",
        "3",
        "--rdzv-conf",
        "keep_alive_interval=1,keep_alive_max_attempt=5",
    ]
    command = [*torchrun(hosts, *elastic), *LOOP, "--num_train_epochs", "20", *LATEST, "--ddp_timeout", "20"]
    command += ["--output_dir", tmp_path / "run"]
    logs = [tmp_path / f"host-{host}.log" for host in (0, 1)]
    jobs = [hosts.start(host, command, logs[host], STEP_SECONDS="0.05", **NEW_STORE) for host in (0, 1)]
    wait_for_training(jobs, logs, starts=1)
    time.sleep(2)
    hosts.kill_processes(1)
    assert jobs[0].wait(240) == 0, logs[0].read_text()[-6000:]
    assert logs[0].read_text().count("first step\n") == 2
    ended(tmp_path / "run")


def wait_for_training(jobs, logs, starts):
    deadline = time.monotonic() + 120
    while any(log.read_text().count("first step\n") < starts for log in logs):
        assert [job.poll() for job in jobs] == [None, None], "".join(log.read_text()[-3000:] for log in logs)
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_slurm_script_starts_one_job_on_two_hosts(hosts, tmp_path, one_host):
    """With stand-ins for SLURM's two commands, of which srun starts a task on each host."""
    commands = [shlex.join(hosts.command(host, [])) for host in (0, 1)]
    tools = {
        "scontrol": f"printf '%s\\n' {shlex.join(hosts.names)}",
        "srun": f'{commands[0]} "$@" & {commands[1]} "$@"; second=$?; wait $! && exit $second',
        "torchrun": f'exec {shlex.join(TORCHRUN)} "$@"',
    }
    for name, line in tools.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "agr[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "12345"}
    command = ["bash", "training_scripts/slurm.sbatch", *CLASSIFY, *ON_CPU, "--output_dir", tmp_path / "run"]
    run(command, PATH=f"{tmp_path}:{os.environ['PATH']}", **job)
    check_two_joined_processes(tmp_path / "run", one_host)

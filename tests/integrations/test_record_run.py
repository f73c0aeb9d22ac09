"""RecordRun: the record of a user's own run, and what the commands make of it."""

import json
import logging
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import Accelerator
from launching import run_module
from safetensors.torch import load_file
from small import arguments, small_data, small_model, trainer_of
from transformers import Trainer, TrainerCallback

import agr_hf
from agr_hf import AGRAdan, attach_agr
from agr_hf.cli import main
from agr_hf.hub.cards import draw_curves, model_card
from agr_hf.integrations.accelerate import record_run
from agr_hf.integrations.callbacks import RecordRun
from agr_hf.integrations.resume import train
from agr_hf.tasks.own_run import describe_own_dataset, optimizer_name, script_arguments
from agr_hf.tasks.record import read_record

# A user's script: it names neither the package nor a folder to resume from.
SCRIPT = """
import sys
from small import arguments, small_data, small_model
from transformers import Trainer
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
args = arguments("unused", output_dir=options["--output_dir"], optim=options.get("--optim", "agr_adamw"), max_steps=-1,
                 num_train_epochs=int(options.get("--epochs", 2)), save_strategy="epoch", eval_strategy="epoch",
                 seed=int(options.get("--seed", 0)))
trainer = Trainer(small_model(), args, train_dataset=small_data(64), eval_dataset=small_data(32))
trainer.train(resume_from_checkpoint=options.get("--resume"))
trainer.save_model()
"""


def accuracy(predictions):
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def trained(folder, *, optimizer=None, callbacks=(), evaluated=True, **options):
    agr_hf.register()
    data = small_data(64)
    options = {"num_train_epochs": 2, "max_steps": -1, **({"eval_strategy": "epoch"} if evaluated else {}), **options}
    trainer = trainer_of(
        small_model(), arguments(folder, **options), train_dataset=data, eval_dataset=small_data(32) if evaluated else None,
        compute_metrics=accuracy, callbacks=[RecordRun(dataset="some digits"), *callbacks],
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "it.py"
    path.write_text(f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n{SCRIPT}")
    return path


def command(*words, cwd=None):
    found = subprocess.run(
        [sys.executable, "-m", "agr_hf", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=200
    )
    return found.returncode, found.stdout + found.stderr


def test_the_record_says_what_the_trainer_did(tmp_path):
    trainer = trained(tmp_path, optim="agr_adamw", seed=7)
    run = read_record(tmp_path)
    last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert run.own_script
    assert (run.optimizer, run.seed, run.task) == ("agr_adamw", 7, "image-classification")
    assert run.metrics == {"loss": last["eval_loss"], "accuracy": last["eval_accuracy"]}
    assert run.dataset["name"] == "some digits"
    assert (run.dataset["examples"], run.dataset["evaluated"]) == (64, 32)
    assert [epoch["epoch"] for epoch in run.epochs] == [1, 2]
    assert run.config["learning_rate"] == 3e-3
    assert run.config["parameters"] == sum(p.numel() for p in trainer.model.parameters())
    assert run.seconds > 0
    again = trainer.evaluate(small_data(16))
    assert read_record(tmp_path).metrics["loss"] == again["eval_loss"]
    test = trainer.predict(small_data(48)).metrics
    assert read_record(tmp_path).metrics["test_accuracy"] == test["test_accuracy"]
    assert not any("runtime" in key or "per_second" in key for key in read_record(tmp_path).metrics)


def test_an_optimizer_of_the_scripts_own_is_named_and_not_the_argument(tmp_path):
    trained(tmp_path / "adan", optim="agr_adan", optim_args="beta1=0.97,beta2=0.9,beta3=0.95")
    assert read_record(tmp_path / "adan").config["betas"] == [0.97, 0.9, 0.95]
    for name, build, attached in (
        ("SGD", lambda params: torch.optim.SGD(params, lr=0.5), False),
        ("SGD", lambda params: torch.optim.SGD(params, lr=0.5), True),
        ("agr_adan", lambda params: AGRAdan(params, lr=0.5), False),
    ):
        model = small_model()
        optimizer = build(model.parameters())
        if attached:
            attach_agr(optimizer)
        folder = tmp_path / f"{name}{attached}"
        trainer = trainer_of(
            model, arguments(folder, max_steps=2), optimizers=(optimizer, None), callbacks=[RecordRun()]
        )
        trainer.train()
        run = read_record(folder)
        assert (run.optimizer, run.config["optim"], run.config["learning_rate"]) == (name, name, 0.5)
        assert run.config.get("agr_attached", False) is attached


def test_an_optimizer_is_named_through_every_wrapper():
    inner = AGRAdan(small_model().parameters())
    assert optimizer_name(SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))) == "agr_adan"
    params = list(small_model().parameters())
    for optimizer, name in (
        (torch.optim.Adam(params, amsgrad=True), "amsgrad"), (torch.optim.Adam(params), "adam"),
        (torch.optim.SGD(params, momentum=0.9), "sgd"), (torch.optim.SGD(params), "SGD"),
    ):  # fmt: skip
        assert optimizer_name(optimizer) == name


def test_a_hyperparameter_search_is_not_recorded(tmp_path):
    pytest.importorskip("optuna", reason="optuna is missing: pip install 'agr-hf[train]'")
    agr_hf.register()
    args = arguments(tmp_path, optim="agr_adamw", max_steps=2)
    trainer = Trainer(
        args=args,
        train_dataset=small_data(32),
        eval_dataset=small_data(16),
        model_init=lambda: small_model(),
        callbacks=[RecordRun()],
    )
    space = {"hp_space": lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)}}
    trainer.hyperparameter_search(n_trials=1, backend="optuna", **space)
    assert not list(tmp_path.rglob("results.json"))
    trainer.train()
    assert read_record(tmp_path).optimizer == "agr_adamw"


def test_with_the_best_checkpoint_loaded_its_metrics_are_recorded(tmp_path):
    trainer = trained(
        tmp_path, optim="adamw_torch", num_train_epochs=3, save_strategy="epoch", load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    values = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = trainer.state.best_global_step
    assert values[best] > values[max(values)]  # the first epoch, as training lowers the loss
    assert read_record(tmp_path).metrics["loss"] == values[best]


def test_without_an_evaluation_the_training_loss_is_recorded_and_drawn(tmp_path):
    trainer = trained(tmp_path, evaluated=False, optim="agr_adamw", max_steps=20)
    run = read_record(tmp_path)
    assert run.metrics == {"train_loss": trainer.state.log_history[-1]["train_loss"]}
    assert run.dataset["split"] is None
    assert draw_curves(run, tmp_path / "curves.png")
    card = model_card(run, "tester/run", curves=True)
    assert "| Training loss |" in card
    assert "model-index" not in card  # a training loss evaluates nothing
    assert main(["leaderboard", str(tmp_path)]) == 0


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise ZeroDivisionError("of the run")


def test_a_run_that_fails_leaves_no_record_not_even_that_of_an_earlier_one(tmp_path):
    trained(tmp_path, optim="agr_adamw")
    assert (tmp_path / "results.json").exists()
    with pytest.raises(ZeroDivisionError):
        trained(tmp_path, optim="agr_adamw", callbacks=[Stop()])
    assert not (tmp_path / "results.json").exists()


def test_another_results_json_is_left_alone(tmp_path, caplog):
    (tmp_path / "results.json").write_text('{"mine": 1}')
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, optim="agr_adamw")
    assert json.loads((tmp_path / "results.json").read_text()) == {"mine": 1}
    assert "results.json is another file than RecordRun writes" in caplog.text


def test_a_record_that_cannot_be_written_does_not_fail_the_training(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("agr_hf.tasks.record.write_text", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with caplog.at_level(logging.WARNING):
        trained(tmp_path, optim="agr_adamw")
    assert "the run is not recorded: disk full" in caplog.text


def test_metrics_in_tables_and_of_numpy_are_recorded(tmp_path):
    import numpy as np

    def entities(predictions):
        return {"PER": {"f1": np.float32(0.5), "number": 3}, "confusion": [[1, 2]], "ok": np.float64(0.25)}

    agr_hf.register()
    trainer = trainer_of(
        small_model(), arguments(tmp_path, max_steps=1, optim="adal"), compute_metrics=entities,
        callbacks=[RecordRun()], eval_dataset=small_data(16),
    )  # fmt: skip
    trainer.train()
    trainer.evaluate()
    metrics = read_record(tmp_path).metrics
    assert metrics.keys() == {"loss", "PER_f1", "PER_number", "ok"}
    assert (metrics["PER_f1"], metrics["PER_number"], metrics["ok"]) == (0.5, 3, 0.25)


def test_arguments_keep_no_secret(tmp_path, monkeypatch):
    data = str(tmp_path / "data.csv")
    argv = ["conf.yaml", "--lr", "1e-3", "--flag", "--layers", "1", "2", "--wandb_api_key", "abc",
            "--hub-token=x", "-c", "3", "--offset", "-1", "--password", "p q", "logger.api_key=abc",
            "--data", data]  # fmt: skip
    main_module = sys.modules["__main__"]
    monkeypatch.setattr(main_module, "__file__", str(tmp_path / "it.py"), raising=False)
    monkeypatch.setattr(main_module, "__spec__", None)
    script, found = script_arguments(argv)
    assert script == "it.py"
    assert found == {
        "": "conf.yaml", "lr": "1e-3", "flag": [], "layers": ["1", "2"], "-c": "3", "offset": "-1",
        "data": data,
    }  # fmt: skip
    monkeypatch.setattr(main_module, "__spec__", SimpleNamespace(name="trl.scripts.sft"))
    assert script_arguments(argv)[0] == "-m trl.scripts.sft"
    monkeypatch.delattr(main_module, "__file__")
    assert script_arguments(argv) == ("notebook", {})


def test_the_written_file_has_no_secret_and_no_path(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sesame-open-up")
    argv = ["it.py", "--auth_token", "tokentoken", "--note", "sesame-open-up", "--data", str(tmp_path / "data.csv")]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "it.py", raising=False)
    trained(tmp_path / "run", optim="agr_adamw", hub_token="hf_abcdefghijklmnopqrst", run_name=str(tmp_path / "named"))
    text = (tmp_path / "run/results.json").read_text()
    assert '"data": "data.csv"' in text
    for hidden in ("tokentoken", "sesame", "hf_abcdef", str(tmp_path)):
        assert hidden not in text


def test_the_command_of_a_card_repeats_the_words(tmp_path):
    trained(tmp_path, optim="agr_adamw")
    run = read_record(tmp_path)
    run.script, run.arguments = "it.py", {"": "conf.yaml", "flag": [], "layers": ["1", "2"], "offset": "-1", "-c": "3"}
    assert run.command == "agr-hf run it.py conf.yaml --flag --layers 1 2 --offset=-1 -c 3"
    assert "```\nagr-hf run it.py conf.yaml" in model_card(run, "tester/run")
    run.script = "notebook"
    assert "The notebook is the author's own" in model_card(run, "tester/run")
    assert "agr-hf run" not in model_card(run, "tester/run")
    run.script, run.processes = "-m trl.scripts.sft", 2
    assert run.command.startswith("torchrun --nproc_per_node 2 -m agr_hf run -m trl.scripts.sft conf.yaml")


def test_data_of_the_hub_are_known_by_id_and_revision():
    datasets = pytest.importorskip("datasets", reason="datasets is missing: pip install 'agr-hf[train]'")
    url = f"hf://datasets/nyu-mll/glue@{'a' * 40}/cola/train-00000.parquet"
    info = datasets.DatasetInfo(dataset_name="glue", config_name="cola", download_checksums={url: {"num_bytes": 1}})
    data = datasets.Dataset.from_dict({"x": [1, 2]}, info=info, split="train")
    found = describe_own_dataset(data, datasets.Dataset.from_dict({"x": [1]}, split="validation"))
    assert found == {
        "name": "nyu-mll/glue", "hub_id": "nyu-mll/glue", "revision": "a" * 40, "config": "cola", "examples": 2,
        "split": "validation", "evaluated": 1,
    }  # fmt: skip
    assert describe_own_dataset(datasets.Dataset.from_dict({"x": [1]}))["name"] is None
    assert describe_own_dataset(x for x in ())["examples"] is None


RANKS = """
import os
from agr_hf.tasks import own_run
if os.environ["RANK"] == "1":
    own_run.write_own_record = own_run.remove_own_record = None  # a call is an error
"""


def test_only_the_main_process_writes(script, tmp_path, capsys):
    script.write_text(RANKS + script.read_text())
    run_module(
        "torch.distributed.run",
        ["--standalone", "--nproc_per_node", "2", "-m", "agr_hf", "run", script, "--output_dir", tmp_path / "run"],
        str(tmp_path / "log"),
    )
    run = read_record(tmp_path / "run")
    assert run.processes == 2
    assert run.command == "torchrun --nproc_per_node 2 -m agr_hf run it.py"
    assert main(["resume", str(tmp_path / "run"), "--script", str(script)]) == 1
    assert "made with 2 processes, and --script runs in one" in capsys.readouterr().err


def test_agr_hf_run_records_and_the_commands_read_it(script, tmp_path):
    code, out = command("run", script, "--output_dir", tmp_path / "runs/one")
    assert code == 0, out
    run = read_record(tmp_path / "runs/one")
    assert (run.script, run.arguments, run.optimizer) == ("it.py", {}, "agr_adamw")
    assert run.dataset["name"] == "the data of it.py"
    assert main(["card", str(tmp_path / "runs/one"), "--repo-id", "tester/own"]) == 0
    card = (tmp_path / "runs/one/README.md").read_text()
    assert "agr-hf run it.py" in card
    assert "agr-hf reproduce" not in card
    assert main(["leaderboard", str(tmp_path / "runs")]) == 0
    assert main(["report", str(tmp_path / "runs/one")]) == 1


def test_a_run_of_a_users_script_is_resumed_to_the_weights_of_one_never_stopped(script, tmp_path, capsys):
    for name, epochs in (("whole", 4), ("part", 2)):
        code, out = command("run", script, "--output_dir", tmp_path / name, "--epochs", epochs)
        assert code == 0, out
    code, out = command(
        "resume", tmp_path / "part", "--output-dir", tmp_path / "more", "--script", script, "--",
        "--output_dir", tmp_path / "elsewhere", "--epochs", 4,
    )  # fmt: skip
    assert code == 0, out
    assert not (tmp_path / "elsewhere/model.safetensors").exists()
    assert "but there is already one" not in out  # of callbacks that are added twice
    whole, more = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "more"))
    assert all(torch.equal(whole[key], more[key]) for key in whole)
    assert len(read_record(tmp_path / "more").epochs) == 4
    assert main(["resume", str(tmp_path / "part"), "--script", str(script), "--output-dir", str(tmp_path / "x")]) == 1
    words = capsys.readouterr().err
    assert (
        f"the script gets none but those behind --; repeat what still holds:\n    agr-hf resume {tmp_path / 'part'}"
        in words
    )
    assert words.endswith(f"--script {script} -- --epochs 2\n")
    assert not (tmp_path / "x").exists()
    assert main(["resume", str(tmp_path / "part"), "--output-dir", str(tmp_path / "x")]) == 1
    assert "--script" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "part"), "--script", "no.py", "--output-dir", str(tmp_path / "part")]) == 1
    assert "there is no script 'no.py'" in capsys.readouterr().err


def test_a_script_under_agr_hf_run_resumes_from_what_is_complete_and_hears_of_a_forgotten_optimizer(script, tmp_path):
    for name, epochs in (("whole", 4), ("part", 3)):
        code, out = command("run", script, "--output_dir", tmp_path / name, "--epochs", epochs)
        assert code == 0, out
    newest = max((tmp_path / "part").glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    (newest / "optimizer.pt").unlink()  # as a kill in the save may leave it
    again = ("run", script, "--output_dir", tmp_path / "part", "--epochs", 4, "--resume", "latest")
    code, out = command(*again)
    assert code == 0, out
    assert f"agr-hf: {tmp_path / 'part'}/results.json is the record of the run" in out
    assert f"{newest.name} is passed over" in out
    assert "goes on without" not in out
    whole, more = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(whole[key], more[key]) for key in whole)
    code, out = command(*again[:-3], 5, *again[-2:], "--optim", "adamw_torch")
    assert code == 0, out
    assert out.count("was trained with AGR, and goes on without: this run's optimizer is AdamW") == 1
    # Its groups have the keys of the state that it took over; AGR is not attached to it all the same.
    assert (record := read_record(tmp_path / "part")).optimizer == "adamw"
    assert "agr_attached" not in record.config


def test_a_run_that_resumes_with_agr_gets_a_warning(tmp_path, caplog):
    trained(tmp_path, optim="adamw_torch", num_train_epochs=1, save_strategy="epoch")
    agr_hf.register()
    options = {"optim": "agr_adamw", "num_train_epochs": 2, "max_steps": -1}
    trainer = trainer_of(small_model(), arguments(tmp_path, **options), train_dataset=small_data(64))
    with caplog.at_level(logging.WARNING):
        train(trainer, "latest")
    assert "was trained without AGR, and goes on with: this run's optimizer is AGRAdamW" in caplog.text


def test_a_finished_run_that_is_resumed_keeps_its_record(tmp_path, caplog):
    """Nothing is left to do: whoever names another optimizer now has not trained with it."""
    options = {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "epoch"}
    trained(tmp_path, optim="agr_adamw", **options)
    before = (tmp_path / "results.json").read_text()
    trainer = trainer_of(small_model(), arguments(tmp_path, optim="adamw_torch", **options), train_dataset=small_data(64),
                         eval_dataset=small_data(32), callbacks=[RecordRun()])  # fmt: skip
    with caplog.at_level(logging.WARNING):
        train(trainer, "latest")
    trainer.evaluate()
    assert "goes on" not in caplog.text
    assert (tmp_path / "results.json").read_text() == before
    # A record that a kill has prevented is written.
    (tmp_path / "results.json").unlink()
    train(trainer, "latest")
    assert read_record(tmp_path).metrics


def test_card_of_a_folder_without_a_record_says_what_to_do(tmp_path, capsys):
    assert main(["card", str(tmp_path)]) == 1
    words = capsys.readouterr().err
    assert (
        "no results.json: add RecordRun to your Trainer, train under agr-hf run, or with one of agr_hf's scripts"
        in words
    )


def test_an_accelerate_loop_leaves_the_same_record(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = small_model()
    optimizer = AGRAdan(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    record_run(
        accelerator, tmp_path, model, optimizer, {"accuracy": torch.tensor(0.5)}, dataset="digits",
        arguments={"seed": 3, "lr": 0.1, "hf_token": "secret-secret"},
        epochs=[{"epoch": 1, "accuracy": 0.25}, {"epoch": 2, "accuracy": 0.5}],
    )  # fmt: skip
    run = read_record(tmp_path)
    assert (run.optimizer, run.seed, run.metrics, run.dataset["name"]) == ("agr_adan", 3, {"accuracy": 0.5}, "digits")
    assert "secret-secret" not in (tmp_path / "results.json").read_text()
    assert draw_curves(run, tmp_path / "curves.png")
    assert "ViTForImageClassification.from_pretrained" in model_card(run, "tester/run")


@pytest.mark.parametrize("arguments", [{"seed": numpy.int64(3), 5: 6}, Namespace(seed=3, odd={1, 2})])
def test_arguments_of_any_kind_are_recorded(arguments, tmp_path):
    model = small_model()
    optimizer = AGRAdan(model.parameters(), lr=0.1)
    record_run(Accelerator(cpu=True), tmp_path, model, optimizer, {"accuracy": 0.5}, arguments=arguments)
    assert read_record(tmp_path).seed == 3


def test_trainers_own_card_names_the_optimizer_with_three_betas(tmp_path):
    trainer = trained(tmp_path, optim="agr_adan", optim_args="beta1=0.97,beta2=0.9,beta3=0.95")
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "- optimizer: agr_adan: Adan(AGR), AGRAdan(lr=0.003, betas=(0.97, 0.9, 0.95)" in card
    stock = trained(tmp_path / "stock", optim="adamw_torch")
    stock.create_model_card()
    assert "ADAMW_TORCH with betas=(0.8,0.999)" in (tmp_path / "stock/README.md").read_text()

"""AdaL's synthetic experiment."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from agr_hf import list_optimizers
from agr_hf.tasks.functions import FUNCTIONS, moved, rastrigin, rosenbrock, squared_distance, trajectory
from agr_hf.tasks.record import read_record

SCRIPT = Path(__file__).parents[2] / "training_scripts/minimize_functions.py"


def test_values_are_those_of_the_definitions():
    assert rastrigin(torch.zeros(2)) == 0
    assert rastrigin(torch.tensor([1.0, 2.0])) == pytest.approx(5.0)  # cosines are 1 at whole numbers: x^2 + y^2
    assert rastrigin(torch.tensor([0.5, 0.0])).item() == pytest.approx(0.25 + 20)
    assert rosenbrock(torch.tensor([1.0, 1.0])) == 0
    assert rosenbrock(torch.tensor([-2.0, 2.0])) == 9 + 100 * 4


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=lambda f: f.name)
def test_minimum_and_start_are_where_they_are_said(function):
    minimum = torch.tensor(function.minimum, dtype=torch.float64, requires_grad=True)
    function.value(minimum).backward()
    assert minimum.grad.abs().max() < 1e-12
    assert torch.equal(trajectory(function, "adam", 0.1, 3)[0], torch.tensor(function.start, dtype=torch.float64))


def test_a_clipped_step_of_sgd_is_a_step_along_the_gradient_of_length_lr():
    points = trajectory(FUNCTIONS["rosenbrock"], "sgd", 0.25, 1)
    assert (points[1] - points[0]).norm().item() == pytest.approx(0.25, rel=1e-5)


def test_agr_acts_on_the_point_though_it_is_a_vector():
    ways = [trajectory(FUNCTIONS["rastrigin"], name, 0.05, 20) for name in ("adam", "agr_adam")]
    assert not torch.allclose(*ways)


def test_a_run_that_leaves_the_numbers_is_infinitely_far():
    assert squared_distance(FUNCTIONS["rosenbrock"], torch.tensor([[float("nan"), 0.0]])) == float("inf")


def test_the_script_searches_draws_and_tables_every_optimizer(tmp_path, capsys):
    main = runpy.run_path(str(SCRIPT))["main"]
    main(["--output_dir", str(tmp_path), "--trials", "8", "--search_steps", "25", "--steps", "30"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert {(r["function"], r["optimizer"]) for r in results["details"]} == {
        (f, o) for f in FUNCTIONS for o in list_optimizers()
    }
    nearer = 0
    for run in results["details"]:
        function = FUNCTIONS[run["function"]]
        start = squared_distance(function, torch.tensor([function.start], dtype=torch.float64)) ** 0.5
        nearer += run["distance_searched"] < start
        again = trajectory(function, run["optimizer"], run["lr"], 25)
        assert squared_distance(function, again) ** 0.5 == pytest.approx(run["distance_searched"])
    assert nearer >= 20  # of 24: eight trials are few, and Rosenbrock's valley leads away at first
    for name in FUNCTIONS:
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| rosenbrock | agr_adamw |" in (tmp_path / "table.md").read_text()
    assert "| rastrigin | adal |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--trials", "0"], "--trials 0 is not allowed; it must be at least 1"),
        (["--lowest_lr", "1", "--highest_lr", "0.1"], "--lowest_lr 1 must be above 0 and below --highest_lr 0.1"),
    ],
)
def test_bad_flags_get_sentences(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT))["main"](["--output_dir", str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_the_search_finds_a_better_rate_with_more_trials(tmp_path):
    main = runpy.run_path(str(SCRIPT))["main"]
    distances = []
    for trials in (1, 40):
        options = ["--optim", "adam", "--functions", "rosenbrock", "--trials", trials, "--steps", 100]
        main(["--output_dir", str(tmp_path / str(trials)), *map(str, options)])
        runs = json.loads((tmp_path / str(trials) / "results.json").read_text())["details"]
        distances.append(runs[0]["distance_searched"])
    assert distances[1] < distances[0]


def test_one_optimizer_has_metrics_and_a_seed_moves_its_start(tmp_path):
    main = runpy.run_path(str(SCRIPT))["main"]
    found = []
    for seed in (0, 3):
        folder = tmp_path / str(seed)
        main(
            [
                *"--optim adal --trials 5 --search_steps 20 --steps 30 --seed".split(),
                str(seed),
                "--output_dir",
                str(folder),
            ]
        )
        found.append(read_record(folder))
    for run in found:
        each = [run.metrics[f"{name}_distance"] for name in FUNCTIONS]
        assert run.metrics == {"distance": pytest.approx((each[0] * each[1]) ** 0.5),
                               "rastrigin_distance": each[0], "rosenbrock_distance": each[1]}  # fmt: skip
        assert run.optimizer == "adal"
        for row in run.details:  # of the moved start for the second seed alone
            function = moved(FUNCTIONS[row["function"]], 3) if run.seed else FUNCTIONS[row["function"]]
            again = trajectory(function, "adal", row["lr"], 30)
            assert squared_distance(function, again) ** 0.5 == pytest.approx(row["distance"])
    assert found[1].arguments == {"optim": ["adal"], "trials": 5, "search_steps": 20, "steps": 30, "seed": 3}


def test_several_optimizers_have_no_metrics_of_a_run(tmp_path):
    options = "--optim sgd adam --trials 1 --search_steps 2 --steps 2 --functions rosenbrock".split()
    runpy.run_path(str(SCRIPT))["main"]([*options, "--output_dir", str(tmp_path)])
    assert read_record(tmp_path).metrics == {}
    assert read_record(tmp_path).optimizer == "sgd, adam"


def test_a_start_is_moved_by_its_seed_and_by_a_tenth():
    function = FUNCTIONS["rosenbrock"]
    starts = torch.tensor([moved(function, seed).start for seed in range(400)])
    assert moved(function, 7).start == moved(function, 7).start != function.start
    assert moved(function, 7).minimum == function.minimum
    assert torch.allclose(starts.std(0), torch.tensor(0.1), atol=0.015)  # four deviations of a deviation of 400
    assert torch.allclose(starts.mean(0), torch.tensor(function.start), atol=0.02)

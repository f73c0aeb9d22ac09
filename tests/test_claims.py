"""The claims: each can be measured, each verdict follows from what was measured, and docs/claims.md says the same."""

import json
import math
import statistics
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from agr_hf.cli import main
from agr_hf.errors import UserError
from agr_hf.experiments.claims import CLAIMS, SIZES, VERDICTS, claims_table, criteria, read_claims, run_claim, training
from agr_hf.experiments.claims.gradients import tail_index
from agr_hf.experiments.claims.theory import psi_jacobian, reddi_regret, slope
from agr_hf.experiments.comparison import Cell, plan_comparison
from agr_hf.experiments.scope import ScopedAGRAdamW, scoped_psi
from agr_hf.optim import AGRAdamW, agr

DOCS = Path(__file__).parents[1] / "docs"
MEASURED = read_claims(DOCS / "claims")


@pytest.mark.parametrize("name", MEASURED)
def test_the_verdict_of_a_measurement_follows_from_its_values(name):
    found = MEASURED[name]
    finding = CLAIMS[name].judge(found["measured"])
    assert (finding.verdict, finding.effect, finding.n) == (found["verdict"], found["effect"], found["n"])
    assert found["verdict"] in VERDICTS
    assert found["command"].startswith(f"agr-hf claim run {name} --size {found['size']}")
    assert found["device"]


@pytest.mark.parametrize("name", [name for name, found in MEASURED.items() if found["measured"].get("search")])
def test_rates_are_searched_by_the_metric_of_the_claim(name):
    """By another one, a rate may be chosen that the claim's metric is bad at."""
    (metric,) = {row["metric"] for row in MEASURED[name]["measured"]["rows"]}
    searched_by = MEASURED[name]["measured"]["search"].get(
        "tuned_by", "accuracy"
    )  # of images, where nothing else is said
    assert searched_by == metric
    options = CLAIMS[name].sizes["small"].options
    plan = plan_comparison("images", ["adal", "sgd"], 1, [], 0.2, None, [], options["search"], options["trials"],
                           options.get("tuned_by"))  # fmt: skip
    assert plan.objective == metric


def test_at_least_twelve_claims_are_measured():
    assert len(MEASURED) >= 12


def test_the_table_of_the_documents_is_that_of_the_measurements():
    page = (DOCS / "claims.md").read_text(encoding="utf-8")
    assert claims_table(MEASURED, "claims") in page
    assert criteria() in page


def test_the_means_of_the_documents_are_those_of_the_measurements():
    page = (DOCS / "claims.md").read_text(encoding="utf-8")
    table = page.partition("## What was trained")[2].partition("\n## ")[0]
    lines = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    assert len(lines) == 10
    for name, line in lines.items():
        for row in MEASURED[name]["measured"]["rows"]:
            for values in (row["values"], row["baseline_values"]):
                mean = statistics.fmean(values)
                shown = f"{mean:.2f}%" if row["metric"] == "accuracy" else f"{mean:.4f}"
                assert shown in line or row["metric"] == "roughness_error", (name, row["optimizer"])


def test_every_claim_says_what_would_confirm_and_contradict_it(capsys):
    for name, claim in CLAIMS.items():
        assert claim.name == name
        assert claim.paper in ("AGR", "AdaL", "agr_hf")
        assert claim.where
        assert claim.says
        assert claim.confirmed_by != claim.contradicted_by
        assert claim.sizes
        assert set(claim.sizes) <= set(SIZES)
    assert main(["claim", "list"]) == 0
    out = capsys.readouterr().out
    assert all(f"| `{name}` |" in out for name in CLAIMS)
    assert "not measured" in out
    assert "- `agr-norm`: confirmed by: no gradient drawn from four distributions" in out


def test_a_claim_is_measured_by_the_command(tmp_path, capsys):
    assert main(["claim", "run", "agr-jacobian", "--output", str(tmp_path)]) == 0
    assert "agr-jacobian: contradicted." in capsys.readouterr().out
    found = json.loads((tmp_path / "agr-jacobian.json").read_text())
    assert found["measured"]["rows"][2]["elements"] == 64
    assert main(["claim", "list", "--results", str(tmp_path)]) == 0
    assert "**contradicted**" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", '{"measured": {}}'])
def test_a_file_that_is_no_measurement_is_named(text, tmp_path, capsys):
    (tmp_path / "agr-norm.json").write_text(text)
    assert main(["claim", "list", "--results", str(tmp_path)]) == 1
    assert "agr-norm.json is no measurement of a claim" in capsys.readouterr().err


def test_unknown_claims_and_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no claim 'nothing'; the names are agr-norm"):
        run_claim("nothing", "small", tmp_path)
    with pytest.raises(ValueError, match="not measured at the size 'gpu'; it is at small"):
        run_claim("agr-norm", "gpu", tmp_path)


# ------------------------------------------------------------------------------------------------ what is measured


def test_the_jacobian_is_that_of_psi():
    grad = torch.randn(12, dtype=torch.float64)
    by_autograd = torch.autograd.functional.jacobian(lambda g: g * (1 - g.abs() / g.abs().sum()), grad)
    torch.testing.assert_close(psi_jacobian(grad), by_autograd)


def test_three_linear_losses_lead_adal_to_the_worst_point():
    horizons = [300, 600, 1200, 2400]
    regret = reddi_regret(horizons, 3.0)
    assert slope(horizons, regret) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("alpha", [1.2, 1.6, 2.0])
def test_the_tail_index_of_stable_laws_is_found(alpha):
    from scipy import stats

    draws = torch.tensor(stats.levy_stable.rvs(alpha, 0, size=40_000, random_state=0))
    assert tail_index(draws) == pytest.approx(alpha, abs=0.1)


def test_psi_of_a_whole_tensor_as_one_block_is_psi():
    grad = torch.randn(6, 7)
    torch.testing.assert_close(scoped_psi(grad, "42"), agr(grad))
    torch.testing.assert_close(scoped_psi(grad, "channel"), torch.stack([agr(row[None])[0] for row in grad]))


def test_scoped_psi_leaves_zeros_and_what_is_over_at_the_end():
    grad = torch.randn(3, 5)
    grad[1] = 0
    found = scoped_psi(grad, "channel")
    assert found.isfinite().all()
    assert (found[1] == 0).all()
    # 15 elements in blocks of 7: the last one alone has no share.
    assert scoped_psi(grad, "7").flatten()[-1] == grad.flatten()[-1]


def test_a_scope_as_large_as_the_tensor_trains_as_agr_adamw():
    weights = torch.randn(4, 8)
    own, ours = (torch.nn.Parameter(weights.clone()) for _ in range(2))
    scoped, whole = ScopedAGRAdamW([own], lr=0.01, scope="32"), AGRAdamW([ours], lr=0.01)
    for step in range(20):
        gradient = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        own.grad, ours.grad = gradient.clone(), gradient.clone()
        scoped.step()
        whole.step()
    torch.testing.assert_close(own, ours, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="scope='0' is not allowed"):
        ScopedAGRAdamW([own], scope="0")


# ------------------------------------------------------------------------------------------------ how it is judged


def rows(*differences, metric="accuracy"):
    """A measurement with the given paired differences of each row around a level of 90."""
    return {"margin": 0.2, "rows": [
        {"optimizer": "agr_adamw", "baseline": "adamw", "metric": metric, "settings": {}, "seeds": list(range(len(of))),
         "values": [90 + seed + d for seed, d in enumerate(of)], "baseline_values": [90.0 + s for s in range(len(of))]}
        for of in differences
    ]}  # fmt: skip


BETTER, WORSE = [1.0, 1.1, 0.9, 1.0], [-1.0, -1.1, -0.9, -1.0]
SAME, UNKNOWN = [0.01, -0.01, 0.02, -0.02], [3.0, -3.0, 2.0, -1.5]


@pytest.mark.parametrize(
    ("differences", "equal", "verdict"),
    [
        ([BETTER], False, "confirmed"),
        ([BETTER, BETTER], False, "confirmed"),
        ([WORSE], False, "contradicted"),
        ([SAME], False, "contradicted"),
        ([UNKNOWN], False, "cannot tell"),
        ([BETTER, WORSE], False, "in part"),
        ([BETTER, UNKNOWN], False, "in part"),
        ([WORSE, UNKNOWN], False, "contradicted"),
        ([SAME], True, "confirmed"),
        ([BETTER], True, "contradicted"),
        ([UNKNOWN], True, "cannot tell"),
    ],
)
def test_a_comparison_is_judged_by_its_rows(differences, equal, verdict):
    found = training.judge(rows(*differences), equal=equal)
    assert found.verdict == verdict
    assert found.n == 4


def test_a_loss_is_told_as_it_is():
    found = training.judge(rows(BETTER, metric="loss"))
    assert found.verdict == "contradicted"
    assert "AdamW(AGR) minus AdamW, test loss: +1 (" in found.effect


def test_no_difference_is_no_minus_zero():
    assert "test loss: +0 (" in training.judge(rows([0.0, 0.0], metric="loss")).effect


@pytest.mark.parametrize(("last", "passes"), [(283, False), (284, True), (68, False)])
def test_a_suspension_that_never_comes_is_no_measurement(last, passes, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"epochs": [{"step": 17}, {"step": last}]}))
    training._check_suspension(tmp_path, Cell("agr_adamw"))
    with nullcontext() if passes else pytest.raises(UserError, match=f"after 283 steps, and its runs end after {last}"):
        training._check_suspension(tmp_path, Cell(training.SUSPENDED))


def test_metrics_of_the_epochs():
    epochs = [
        {"epoch": e, "train_loss": 4.0 / e, "accuracy": a}
        for e, a in ((1, 0.1), (2, 0.5), (3, 0.6), (4, 0.7), (5, 0.7))
    ]
    assert training.train_mean(epochs) == pytest.approx(4 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)
    assert training.roughness(epochs) == pytest.approx(math.sqrt(0.1**2 / 2))  # of +0.1 and 0

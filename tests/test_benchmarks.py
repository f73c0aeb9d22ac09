"""Benchmarks run, small; their times are nobody's test."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_step_benchmark(*options):
    command = [sys.executable, ROOT / "benchmarks/step.py", "--threads", "1", "--rounds", "2", *options]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


def test_step_benchmark_prints_a_table_and_writes_rows_conditions_and_a_picture(tmp_path):
    out = tmp_path / "step.json"
    names = ["AGRAdamW", "AGRAdamW max_grad_norm"]
    table = run_step_benchmark("--models", "300x64x64", "1e5", "--contestants", *names, "--out", out)
    results = json.loads(out.read_text())
    assert (tmp_path / "step.png").stat().st_size > 0
    assert results["versions"]["torch"]
    assert results["torch_threads"] == 1
    rows = {(row["model"], row["contestant"]): row for row in results["rows"]}
    for model, numel in (("300x64x64", 300 * 64 * 64), ("1e5", 10**5)):
        for name in ("torch AdamW fused", "clip + torch AdamW fused", *names):
            row = rows[model, name]
            assert row["status"] == "measured"
            assert row["parameters"] == numel
            assert row["rounds"] >= 2
            assert all(row[key] > 0 for key in ("milliseconds", "ratio", "bandwidth_share", "call_milliseconds"))
            assert name in table
        clipped = rows[model, "AGRAdamW max_grad_norm"]
        assert clipped["against"] == "clip + torch AdamW fused"
        assert clipped["ratio_against"] > 0
        assert clipped["within_budget"] == (clipped["ratio_against"] <= clipped["budget"])
    assert rows["300x64x64", "AGRAdamW"]["budget"] == 0.45
    assert ("0.45 ok" if rows["300x64x64", "AGRAdamW"]["within_budget"] else "0.45 missed") in table


def test_a_contestant_that_is_not_installed_has_a_row_that_says_so(tmp_path):
    with pytest.raises(PackageNotFoundError):
        version("no-such-optimizer")
    script = """
import contestants, step
from dataclasses import replace
contestants.CONTESTANTS["timm NAdamW"] = replace(contestants.CONTESTANTS["timm NAdamW"], package="no-such-optimizer")
step.main()
"""
    out = tmp_path / "step.json"
    options = ["--models", "1e5", "--contestants", "timm NAdamW", "--rounds", "2", "--threads", "1", "--out", str(out)]
    run = subprocess.run(
        [sys.executable, "-c", script, *options], capture_output=True, text=True, check=True, cwd=ROOT / "benchmarks"
    )
    assert "not installed: timm NAdamW" in run.stdout
    status = {row["contestant"]: row["status"] for row in json.loads(out.read_text())["rows"]}
    assert status == {"torch AdamW fused": "measured", "timm NAdamW": "not installed"}

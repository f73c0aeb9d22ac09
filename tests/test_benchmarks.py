"""Benchmarks run, small; their times are nobody's test."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_step_benchmark_prints_a_table_and_writes_its_conditions(tmp_path):
    out = tmp_path / "step.json"
    command = [sys.executable, ROOT / "benchmarks/step.py", "--millions", "10", "--rounds", "2", "--out", out]
    run = subprocess.run(
        [*map(str, command), "--variants", "AGRAdamW", "AGRAdan"], capture_output=True, text=True, check=True
    )
    assert "AGRAdamW" in run.stdout
    results = json.loads(out.read_text())
    assert [row["variant"] for row in results["rows"]] == ["torch AdamW fused", "AGRAdamW", "AGRAdan"]
    assert all(row["milliseconds"] > 0 and row["ratio"] > 0 for row in results["rows"])
    assert [(row["variant"], row["against"]) for row in results["budgets"]] == [
        ("AGRAdamW", "torch AdamW fused"), ("AGRAdan", "timm Adan"),
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in results["budgets"])
    assert results["versions"]["torch"]
    assert results["torch_threads"] >= 1

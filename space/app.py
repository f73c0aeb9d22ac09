"""The app of `agr-hf app` as a Space: it reads what lies below comparisons/, and nothing else."""

from pathlib import Path

from agr_hf.experiments.app import run_app

COMPARISONS = Path(__file__).parent / "comparisons"

if __name__ == "__main__":
    COMPARISONS.mkdir(exist_ok=True)
    run_app(COMPARISONS)

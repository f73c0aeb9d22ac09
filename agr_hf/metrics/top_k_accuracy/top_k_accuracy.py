"""Top-k accuracy of scores."""

from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """\
Share of examples whose class is among the k largest scores. Ties go to the lower class index.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: scores, a list with one number for each class, for each example.
    references: class of each example, from 0.
    k: how many scores count, 1 <= k <= number of classes. Default 5.

Returns:
    top_{k}_accuracy: a float in 0..1.

Raises:
    ValueError: there is no example, k is out of range, or a class is.

Examples:
    >>> metric.compute(predictions=[[0.1, 0.5, 0.4], [0.9, 0.05, 0.05]], references=[2, 1], k=2)
    {'top_2_accuracy': 1.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TopKAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: Any, references: Any, k: int = 5) -> dict[str, float]:
        scores, references = np.asarray(predictions, dtype=np.float64), np.asarray(references)
        if references.size == 0:
            raise ValueError("top_k_accuracy: there are no examples; give at least one prediction and reference")
        classes = scores.shape[1]
        if not 1 <= k <= classes:
            raise ValueError(f"top_k_accuracy: k={k} is not allowed; it must be from 1 to the {classes} classes")
        if references.min() < 0 or references.max() >= classes:
            raise ValueError(
                f"top_k_accuracy: references go from {references.min()} to {references.max()}, but there are scores for "
                f"{classes} classes, counted from 0"
            )
        return {f"top_{k}_accuracy": share_in_top_k(scores, references, k)}


def share_in_top_k(scores: np.ndarray, references: np.ndarray, k: int) -> float:
    """Share of rows of scores (n, classes) with the reference (n,) among the k largest."""
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return float((best == references[:, None]).any(axis=1).mean())

"""Accuracy of sentence-order prediction, overall and for each order."""

from typing import Any

import datasets
import evaluate
import numpy as np

_CITATION = """\
@inproceedings{lan2020albert,
  title={ALBERT: A Lite BERT for Self-supervised Learning of Language Representations},
  author={Lan, Zhenzhong and Chen, Mingda and Goodman, Sebastian and Gimpel, Kevin and Sharma, Piyush and Soricut, Radu},
  booktitle={International Conference on Learning Representations},
  year={2020}
}
"""

_DESCRIPTION = """\
Sentence-order prediction: of two consecutive segments, were they swapped (1) or not (0)? The share of right answers, and
the share for each of the two orders, which tells a model that always gives one answer from one that knows.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: 0 or 1 for each pair.
    references: 0 (original order) or 1 (swapped) for each pair.

Returns:
    sop_accuracy: share of right answers, a float in 0..1.
    sop_accuracy_ordered, sop_accuracy_swapped: the same over pairs of one order; nan where there is none.

Raises:
    ValueError: there is no pair, or a value is neither 0 nor 1.

Examples:
    >>> sop_accuracy.compute(predictions=[0, 1, 1, 0], references=[0, 1, 0, 0])
    {'sop_accuracy': 0.75, 'sop_accuracy_ordered': 0.6666666666666666, 'sop_accuracy_swapped': 1.0}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class SopAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        if references.size == 0:
            raise ValueError("sop_accuracy: there are no pairs; give at least one prediction and reference")
        for name, values in (("predictions", predictions), ("references", references)):
            wrong = values[(values != 0) & (values != 1)]
            if wrong.size:
                raise ValueError(f"sop_accuracy: {name} has {wrong[0]}; orders are 0 (original) and 1 (swapped)")
        right = predictions == references
        swapped = references == 1
        return {
            "sop_accuracy": float(right.mean()),
            "sop_accuracy_ordered": float(right[~swapped].mean()) if (~swapped).any() else float("nan"),
            "sop_accuracy_swapped": float(right[swapped].mean()) if swapped.any() else float("nan"),
        }

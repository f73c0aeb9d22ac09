"""Accuracy, loss and perplexity of masked language modelling."""

from typing import Any

import datasets
import evaluate
import numpy as np

_CITATION = """\
@inproceedings{devlin2019bert,
  title={BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding},
  author={Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova, Kristina},
  booktitle={Proceedings of NAACL-HLT},
  year={2019}
}
"""

_DESCRIPTION = """\
Masked language modelling: the share of masked tokens that were predicted, and, from the log-probabilities that the model
gave them, the mean loss and the perplexity, its exponential. Every token counts the same, whatever its batch.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: predicted token ids, one for each position (flatten batches first).
    references: the true ids; positions with `ignore_index` were not masked and do not count.
    log_probabilities: natural logarithm of the probability given to each true id, one for each position. Without them
        there is accuracy only.
    ignore_index: default -100.

Returns:
    masked_accuracy: share of masked tokens that were predicted, a float in 0..1.
    mlm_loss: mean negative log-probability, in nats, and perplexity: exp(mlm_loss); with `log_probabilities` only.

Raises:
    ValueError: no position is masked, or there are more or fewer log-probabilities than positions.

Examples:
    >>> masked_accuracy.compute(predictions=[5, 7, 9], references=[5, -100, 8])
    {'masked_accuracy': 0.5}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MaskedAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(
        self, predictions: Any, references: Any, log_probabilities: Any = None, ignore_index: int = -100
    ) -> dict[str, float]:
        predictions, references = np.asarray(predictions), np.asarray(references)
        masked = references != ignore_index
        if not masked.any():
            raise ValueError(
                f"masked_accuracy: no position is masked; all references are {ignore_index}, or there are none"
            )
        result = {"masked_accuracy": float((predictions == references)[masked].mean())}
        if log_probabilities is not None:
            log_probabilities = np.asarray(log_probabilities, dtype=np.float64)
            if log_probabilities.shape != references.shape:
                raise ValueError(
                    f"masked_accuracy: there are {log_probabilities.size} log_probabilities for {references.size} "
                    "references; give one for each"
                )
            loss = -log_probabilities[masked].mean()
            # exp overflows beyond 709 nats; infinity is what it then is.
            with np.errstate(over="ignore"):
                result |= {"mlm_loss": float(loss), "perplexity": float(np.exp(loss))}
        return result

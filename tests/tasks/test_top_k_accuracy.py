"""The `evaluate` module of top-k accuracy, loaded offline."""

import evaluate
import pytest
from sklearn.metrics import top_k_accuracy_score
from transformers import EvalPrediction

from agr_hf.metrics import metric_path
from agr_hf.tasks.images import classification_metrics


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(metric_path("top_k_accuracy"))


SCORES = [[0.1, 0.5, 0.4], [0.9, 0.06, 0.04], [0.2, 0.3, 0.5]]


@pytest.mark.parametrize(("k", "want"), [(1, 1 / 3), (2, 2 / 3), (3, 1.0)])
def test_values_computed_by_hand(metric, k, want):
    found = metric.compute(predictions=SCORES, references=[1, 1, 0], k=k)
    if k == 2:
        assert found == {"top_2_accuracy": pytest.approx(2 / 3)}
    assert found[f"top_{k}_accuracy"] == pytest.approx(want)


def test_it_agrees_with_scikit_learn_and_with_the_script(metric):
    import numpy

    scores = numpy.random.default_rng(0).normal(size=(200, 10))
    labels = numpy.random.default_rng(1).integers(10, size=200)
    prediction = EvalPrediction(predictions=scores, label_ids=labels)
    in_script = classification_metrics(prediction)
    assert in_script["accuracy"] == metric.compute(predictions=scores, references=labels, k=1)["top_1_accuracy"]
    assert in_script["top5_accuracy"] == metric.compute(predictions=scores, references=labels, k=5)["top_5_accuracy"]
    for k in (1, 3, 5):
        found = metric.compute(predictions=scores, references=labels, k=k)[f"top_{k}_accuracy"]
        assert found == pytest.approx(top_k_accuracy_score(labels, scores, k=k))


@pytest.mark.parametrize(
    ("scores", "labels", "k", "message"),
    [
        (SCORES, [0, 1, 2], 0, "k=0 is not allowed; it must be from 1 to the 3 classes"),
        (SCORES, [0, 1, 2], 4, "k=4 is not allowed"),
        (SCORES, [0, 1, 3], 1, "references go from 0 to 3, but there are scores for 3 classes"),
    ],
)
def test_bad_input_gets_a_sentence(metric, scores, labels, k, message):
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=scores, references=labels, k=k)


def test_unknown_metrics_are_refused():
    with pytest.raises(ValueError, match="there is no metric 'bleu'; there are "):
        metric_path("bleu")

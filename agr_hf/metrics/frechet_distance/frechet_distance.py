"""Frechet distance between two sets of features: a local `evaluate` module, which needs nothing of agr_hf."""

from typing import Any

import datasets
import evaluate
import numpy
from numpy.typing import ArrayLike, NDArray

Array = NDArray[numpy.float64]

_DESCRIPTION = """
Frechet distance between two sets of feature vectors, each taken as a Gaussian (Dowson and Landau 1982):
|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), with the unbiased covariances. It is FID (Heusel et al. 2017) if and only if the
features are the 2048 of the Inception network of the FID paper; with any other features it must have another name.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: features of the generated images, (n, d), n >= 2.
    references: features of the real images, (n, d). Where the numbers of images differ, pass `mean` and `covariance` of
        the references, and the predictions once more in their place.
    mean: (d,), in the place of the references' own. Default: None.
    covariance: (d, d), likewise. Default: None.

Returns:
    frechet_distance: a float >= 0.

Example:
    >>> metric = evaluate.load("agr_hf/metrics/frechet_distance")
    >>> metric.compute(predictions=[[0.0], [2.0]], references=[[3.0], [5.0]])
    {'frechet_distance': 9.0}
"""

_CITATION = """
@inproceedings{heusel2017gans,
  title={GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium},
  author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}
"""


def mean_and_covariance(features: ArrayLike) -> tuple[Array, Array]:
    """Mean (d,) and unbiased covariance (d, d) of features (n, d), in float64; a ValueError where there are none."""
    rows = numpy.asarray(features, dtype=numpy.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"features have the shape {rows.shape}; it must be (n, d) with n of at least 2")
    if not numpy.isfinite(rows).all():
        raise ValueError("the features hold NaN or inf: the network or its images are broken")
    mean = rows.mean(axis=0)
    centred = rows - mean
    return mean, centred.T @ centred / (len(rows) - 1)


def gaussian_distance(mean1: Array, covariance1: Array, mean2: Array, covariance2: Array) -> float:
    """The distance of two Gaussians with means (d,) and covariances (d, d); a float >= 0.

    tr((C1 C2)^(1/2)) is the sum of the singular values of C1^(1/2) C2^(1/2). Both roots are of symmetric matrices, which
    keeps the digits that a root of the product C1 C2 loses where covariances are singular (fewer images than features).
    """
    if mean1.shape != mean2.shape:
        raise ValueError(f"{len(mean1)} features cannot be compared with {len(mean2)}: take both from one network")
    product = _root(covariance1) @ _root(covariance2)
    overlap = numpy.linalg.svd(product, compute_uv=False).sum()
    distance = ((mean1 - mean2) ** 2).sum() + numpy.trace(covariance1) + numpy.trace(covariance2) - 2 * overlap
    return max(0.0, float(distance))  # rounding makes equal sets -1e-13


def _root(covariance: Array) -> Array:
    values, vectors = numpy.linalg.eigh(covariance)
    root: Array = (vectors * numpy.sqrt(values.clip(min=0))) @ vectors.T
    return root


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class FrechetDistance(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions": features, "references": features}),
        )

    def _compute(
        self,
        predictions: ArrayLike,
        references: ArrayLike,
        mean: ArrayLike | None = None,
        covariance: ArrayLike | None = None,
    ) -> dict[str, Any]:
        if (mean is None) != (covariance is None):
            raise ValueError("mean and covariance go together: one of them was given")
        if mean is None or covariance is None:
            reference = mean_and_covariance(references)
        else:
            reference = numpy.asarray(mean, numpy.float64), numpy.asarray(covariance, numpy.float64)
        return {"frechet_distance": gaussian_distance(*mean_and_covariance(predictions), *reference)}

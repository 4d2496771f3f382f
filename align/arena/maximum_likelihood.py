"""Maximum likelihood of choices among a few outcomes, with a covariance that is valid for correlated votes.

A choice is a softmax over outcomes whose logits are linear in the parameters. Bradley and Terry (1952) is that with
two outcomes, and Davidson (1970) with three.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_MAX_STEPS, _STEP_TOLERANCE = 100, 1e-10
_DIVERGING_LOG_ODDS = 12.0
"""larger log-odds are taken as diverging: one choice in a hundred thousand would go the other way"""
_NULL_SHARE = 1e-9
"""eigenvalues below this share of the largest belong to directions that no choice determines"""


class ChoiceFit(NamedTuple):
    """Parameters (P,), their covariance (P, P), and whether Newton's method converged."""

    parameters: Array
    covariance: Array
    converged: bool


def fit_choices(features: Array, shares: Array, clusters: NDArray[np.int64]) -> ChoiceFit:
    """Return the maximum-likelihood parameters by Newton's method.

    `features` (N, C, P) are those of every outcome of every choice, `shares` (N, C) how much of the choice each
    outcome got, and `clusters` (N,) which choices are correlated. Directions that no choice depends on stay at 0.

    The covariance is the clustered sandwich (Liang and Zeger 1986, eq. 4) times G / (G - 1) for G clusters, and never
    less, in any parameter, than the inverse of the information: from few clusters the sandwich alone claims too much.
    """
    parameters = np.zeros(features.shape[2])
    converged = False
    for _ in range(_MAX_STEPS):
        gradient, information = _slopes(parameters, features, shares)
        step = _inverse(information) @ gradient.sum(0)
        length = float(np.abs(step).max(initial=0.0))
        parameters = parameters + step * min(1.0, 2.0 / length if length else 1.0)
        if length < _STEP_TOLERANCE:
            converged = bool(np.ptp(features @ parameters, axis=1).max(initial=0.0) < _DIVERGING_LOG_ODDS)
            break
    gradient, information = _slopes(parameters, features, shares)
    inverse = _inverse(information)
    sums = np.zeros((int(clusters.max(initial=-1)) + 1, len(parameters)))
    np.add.at(sums, clusters, gradient)
    groups = max(len(sums), 2)
    covariance = inverse @ (sums.T @ sums) @ inverse * groups / (groups - 1)
    scale = np.sqrt(np.maximum(1.0, np.diag(inverse) / np.maximum(np.diag(covariance), 1e-300)))
    return ChoiceFit(parameters, covariance * np.outer(scale, scale), converged)


def _slopes(parameters: Array, features: Array, shares: Array) -> tuple[Array, Array]:
    """Return the gradient of the log-likelihood by choice (N, P) and the information of all (P, P)."""
    logits = features @ parameters
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    gradient = np.einsum("nc,ncp->np", shares - chances, features)
    centred = features - np.einsum("nc,ncp->np", chances, features)[:, None, :]
    weighted = centred * chances[:, :, None]
    return gradient, np.einsum("ncp,ncq->pq", weighted, centred)


def _inverse(information: Array) -> Array:
    """Return the pseudo-inverse, 0 along directions without information."""
    return np.linalg.pinv(information, rcond=_NULL_SHARE, hermitian=True).astype(np.float64)

"""Maximum likelihood of choices among a few outcomes, with a covariance that holds for votes that hang together.

A choice is a softmax over outcomes whose logits are linear in the parameters. Bradley and Terry (1952) is that with
two outcomes, and Davidson (1970) with three.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_STEPS, _CLOSE = 100, 1e-10
_FAR = 12.0
"""Log-odds as large as this are on their way to infinity: one choice in a hundred thousand would go the other way."""
_NULL = 1e-9
"""Eigenvalues below this share of the largest belong to directions that no choice says anything about."""


class ChoiceFit(NamedTuple):
    """Parameters (P,), their covariance (P, P), and whether Newton's steps came to rest."""

    parameters: Array
    covariance: Array
    settled: bool


def fit_choices(features: Array, shares: Array, clusters: NDArray[np.int64]) -> ChoiceFit:
    """The parameters under which the choices are likeliest, by Newton's method.

    `features` (N, C, P) are those of every outcome of every choice, `shares` (N, C) how much of the choice each
    outcome got, and `clusters` (N,) which choices hang together. Directions that no choice depends on stay at 0.

    The covariance is the clustered sandwich (Liang and Zeger 1986, eq. 4) times G / (G - 1) for G clusters, and never
    less, in any parameter, than the inverse of the information: from few clusters the sandwich alone claims too much.
    """
    parameters = np.zeros(features.shape[2])
    settled = False
    for _ in range(_STEPS):
        gradient, information = _slopes(parameters, features, shares)
        step = _inverse(information) @ gradient.sum(0)
        length = float(np.abs(step).max(initial=0.0))
        parameters = parameters + step * min(1.0, 2.0 / length if length else 1.0)
        if length < _CLOSE:
            settled = bool(np.ptp(features @ parameters, axis=1).max(initial=0.0) < _FAR)
            break
    gradient, information = _slopes(parameters, features, shares)
    inverse = _inverse(information)
    sums = np.zeros((int(clusters.max(initial=-1)) + 1, len(parameters)))
    np.add.at(sums, clusters, gradient)
    groups = max(len(sums), 2)
    covariance = inverse @ (sums.T @ sums) @ inverse * groups / (groups - 1)
    scale = np.sqrt(np.maximum(1.0, np.diag(inverse) / np.maximum(np.diag(covariance), 1e-300)))
    return ChoiceFit(parameters, covariance * np.outer(scale, scale), settled)


def _slopes(parameters: Array, features: Array, shares: Array) -> tuple[Array, Array]:
    """Gradient of the log-likelihood by choice (N, P), and the information of all (P, P)."""
    logits = features @ parameters
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    gradient = np.einsum("nc,ncp->np", shares - chances, features)
    centred = features - np.einsum("nc,ncp->np", chances, features)[:, None, :]
    weighted = centred * chances[:, :, None]
    return gradient, np.einsum("ncp,ncq->pq", weighted, centred)


def _inverse(information: Array) -> Array:
    """The pseudo-inverse: nothing is said along directions without information."""
    return np.linalg.pinv(information, rcond=_NULL, hermitian=True).astype(np.float64)

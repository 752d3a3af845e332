"""The last position of a problem in plain NumPy, sharing nothing with the library: the truth for several checks."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from theory_checks.strategies import Case

Array = NDArray[np.float64]


def _heads(case: Case, u: Array) -> Iterator[tuple[Array, Array, Array]]:
    """For each head the weights (m, s) of the past at u (m, d), its values (s, d), and its logit gradients (s, d)."""
    past = case.embeddings[:-1].astype(np.float64)
    for head, interaction in enumerate(case.interaction.astype(np.float64)):
        slopes = past @ interaction
        logits = u @ slopes.T
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        values = past if case.value is None else past @ case.value[head].T.astype(np.float64)
        yield weights / weights.sum(axis=1, keepdims=True), values, slopes


def residuals(case: Case, u: Array) -> Array:
    """e(u) (m, d) of the last position for embeddings u (m, d) of it."""
    total = np.zeros_like(u)
    for weights, values, _ in _heads(case, u):
        total += weights @ values
    return u - total


def jacobians(case: Case, u: Array) -> Array:
    """J(u) (m, d, d) of the last position for embeddings u (m, d) of it."""
    blocks = np.broadcast_to(np.eye(u.shape[1]), (len(u), u.shape[1], u.shape[1])).copy()
    for weights, values, slopes in _heads(case, u):
        centred = values - (weights @ values)[:, None]
        blocks -= np.einsum("ms,msa,msb->mab", weights, centred, slopes - (weights @ slopes)[:, None])
    return blocks


def determinants(case: Case, u: Array) -> Array:
    """det J(u) (m,) of the last position for embeddings u (m, d) of it."""
    return np.linalg.det(jacobians(case, u))


def log_density(case: Case, noise_scale: float, first_scale: float) -> float:
    """log p(u_1..n) in nats of all embeddings of the case, each position given those before it."""
    total = norm.logpdf(case.embeddings[0], 0, first_scale).sum()
    for end in range(2, len(case.embeddings) + 1):
        shorter = replace(case, embeddings=case.embeddings[:end])
        last = shorter.embeddings[-1:]
        total += norm.logpdf(residuals(shorter, last), 0, noise_scale).sum()
        total += np.log(np.abs(determinants(shorter, last))).item()
    return float(total)

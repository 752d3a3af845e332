"""The last position of a problem in plain NumPy, sharing nothing with the library: the truth for several checks.

And how much rounding a log-determinant amplifies, so that an error can be judged against what it could at best be:

    kappa = max_i |J_i^-1| (1 + |I - J_i|) (1 + l_i),      l_i = max_{h, s<i} |q^h_i| |k^h_s| / sqrt(p)

To first order a relative error of eps in every stored number moves log|det J_i| by about d kappa eps: l_i is the size
of the products whose sum is a logit, and log det has the derivative J_i^-1. Spectral norms throughout.
"""

from collections.abc import Iterator

import numpy as np

from theory_checks.drawn_cases import Array, Case

# The largest kappa at which the raw error of a log-determinant is held to a tolerance; beyond, the error times this
# over kappa is. Where kappa eps is above UNDECIDABLE, rounding may move J_i across the boundary and no digit is left.
LARGEST_KAPPA = {"float64": 1e6, "float32": 5e2}
UNDECIDABLE = 0.05


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


def amplification(case: Case, blocks: Array) -> float:
    """kappa of the case, given its Jacobian blocks (n, d, d); inf if one of them is singular."""
    smallest = np.linalg.svd(blocks, compute_uv=False)[:, -1]
    if smallest.min() == 0:
        return np.inf
    attended = np.linalg.norm(np.eye(case.shape.width) - blocks, ord=2, axis=(1, 2))
    queries = np.linalg.norm(np.einsum("hpd,nd->hnp", case.query, case.embeddings), axis=-1)
    keys = np.linalg.norm(np.einsum("hpd,nd->hnp", case.key, case.embeddings), axis=-1)
    largest_key = np.maximum.accumulate(keys, axis=1)
    logits = (queries[:, 1:] * largest_key[:, :-1]).max(axis=0) / np.sqrt(case.shape.head_size)
    return float(np.max((1 + attended) / smallest * np.concatenate([[1.0], 1 + logits])))


def is_undecidable(kappa: float, precision: str = "float64") -> bool:
    """Whether rounding leaves no digit of a log-determinant of this kappa."""
    return bool(kappa * np.finfo(precision).eps > UNDECIDABLE)


def log_det_tolerance(case: Case, blocks: Array) -> float:
    """The error in nats that rounding may leave in a float64 log-determinant of the case; inf where J is singular."""
    kappa = amplification(case, blocks)
    return np.inf if is_undecidable(kappa) else 1e-9 * max(1.0, kappa / LARGEST_KAPPA["float64"])

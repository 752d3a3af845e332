"""How much rounding a log-determinant amplifies, so that an error can be judged against what it could at best be.

    kappa = max_i |J_i^-1| (1 + |I - J_i|) (1 + l_i),      l_i = max_{h, s<i} |q^h_i| |k^h_s| / sqrt(p)

To first order a relative error of eps in every stored number moves log|det J_i| by about d kappa eps: l_i is the size
of the products whose sum is a logit, and log det has the derivative J_i^-1. Spectral norms throughout.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory_checks.strategies import Case

# kappa up to which a float64 log-determinant is right to 1e-9 nats, and kappa eps above which it may have any value.
_EXACT, _UNDECIDABLE = 1e6, 0.05


def log_det_tolerance(case: Case, blocks: NDArray[Any]) -> float:
    """The error in nats that rounding may leave in a float64 log-determinant of the case; inf where J is singular."""
    kappa = amplification(case, blocks)
    return 1e-9 * max(1.0, kappa / _EXACT) if kappa * np.finfo(np.float64).eps <= _UNDECIDABLE else np.inf


def amplification(case: Case, blocks: NDArray[Any]) -> float:
    """kappa of the case, given its Jacobian blocks (n, d, d); inf if one of them is singular."""
    smallest = np.linalg.svd(blocks, compute_uv=False)[:, -1]
    if smallest.min() == 0:
        return float("inf")
    attended = np.linalg.norm(np.eye(case.shape.width) - blocks, ord=2, axis=(1, 2))
    queries = np.linalg.norm(np.einsum("hpd,nd->hnp", case.query, case.embeddings), axis=-1)
    keys = np.linalg.norm(np.einsum("hpd,nd->hnp", case.key, case.embeddings), axis=-1)
    largest_key = np.maximum.accumulate(keys, axis=1)
    logits = (queries[:, 1:] * largest_key[:, :-1]).max(axis=0) / np.sqrt(case.shape.head_size)
    return float(np.max((1 + attended) / smallest * np.concatenate([[1.0], 1 + logits])))

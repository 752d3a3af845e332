"""Pairs of sites that the joint density only depends on up to a rotation of both: W_Q and W_K of an attention.

    W_Q -> G W_Q,  W_K -> G W_K  with G orthogonal, (p, p),  leaves A = W_K^T W_Q / sqrt(p) as it is

and with it the likelihood; a normal prior that is the same for every row is left as it is too. So p (p - 1) / 2
directions a head are flat, the posterior is constant along them, and W_Q and W_K are not identified, while A is. Such
pairs are recognised by the density itself, not by their names: two sites of one shape (..., p, d) whose potential is
the same after random rotations of both, one for every head.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_ROTATIONS = 2


class Gauge(NamedTuple):
    """Two sites that rotate together, and how many directions at the point looked at are flat because of it."""

    sites: tuple[str, str]
    directions: int

    def __str__(self) -> str:
        return f"{self.sites[0]!r} and {self.sites[1]!r} ({self.directions} flat directions)"


REMEDY = (
    "the density is the same after any rotation of the rows of both, so they are not identified, and their interaction "
    "W_K^T W_Q / sqrt(p) is: record it with numpyro.deterministic('interaction', attention.interaction), as "
    "sampled_attention does, or give the interaction A itself a prior, with "
    "Attention(sqrt(d) * A[None], jnp.eye(d)[None])"
)


def _rotations(shape: tuple[int, ...], seed: int) -> Float[np.ndarray, "... p p"]:
    """A random orthogonal matrix for every head: a reflection where p is 1."""
    *leading, size = shape[:-1]
    heads = int(np.prod(leading, dtype=int))
    if size == 1:
        return -np.ones((*leading, 1, 1))
    drawn = np.random.default_rng(seed).normal(size=(heads, size, size))
    return np.linalg.qr(drawn).Q.reshape(*leading, size, size)


def _directions(query: Float[np.ndarray, "... p d"], key: Float[np.ndarray, "... p d"]) -> int:
    """The dimension of the orbit of (W_Q, W_K): over heads, the rank of G -> (G W_Q, G W_K), G antisymmetric."""
    stacked = np.concatenate([query, key], -1).astype(float)
    size, found = stacked.shape[-2], 0
    for head in stacked.reshape(-1, *stacked.shape[-2:]):
        rows = []
        for i, k in combinations(range(size), 2):
            turned = np.zeros_like(head)
            turned[i], turned[k] = head[k], -head[i]
            rows.append(turned.ravel())
        if rows:
            # Single precision at most is what an optimiser's zeros are worth.
            found += int(np.linalg.matrix_rank(np.array(rows), tol=1e-4 * max(1e-30, np.abs(head).max())))
    return found


def gauges(
    potential: Callable[[Mapping[str, Float[Array, "..."]]], Float[Array, ""]],
    point: Mapping[str, Float[Array, "..."]],
    sites: tuple[str, ...],
) -> tuple[Gauge, ...]:
    """Pairs out of `sites` that rotate together, judged by the potential in nats at the unconstrained `point`."""
    found: list[Gauge] = []
    candidates = [name for name in sites if jnp.ndim(point[name]) >= 2]
    pairs = [pair for pair in combinations(candidates, 2) if point[pair[0]].shape == point[pair[1]].shape]
    if not pairs:
        return ()
    here = float(potential(point))
    for pair in pairs:
        values = [np.asarray(point[name]) for name in pair]

        def changed(seed: int, pair: tuple[str, str] = pair, values: list[np.ndarray] = values) -> float:
            turn = _rotations(values[0].shape, seed)
            turned = {name: jnp.asarray(turn @ value, value.dtype) for name, value in zip(pair, values, strict=True)}
            return abs(float(potential({**point, **turned})) - here)

        allowed = float(jnp.finfo(values[0].dtype).eps) ** 0.75 * (1 + abs(here))
        if all(changed(seed) <= allowed for seed in range(_ROTATIONS)):
            names = tuple(sorted(pair))
            found.append(Gauge((names[0], names[1]), _directions(*values)))
    return tuple(found)

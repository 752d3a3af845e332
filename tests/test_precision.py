"""Values and gradients over thirty orders of magnitude, in float32 and float64, of both implementations.

The truth is the reference in float64. What is allowed follows from the inputs themselves: perturbing each of them by
one unit of float32 changes the truth by some amount, and the error in float32 is at most fifty times that amount.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer import Attention, residual_and_log_det
from prob_transformer.kernels import blocked
from prob_transformer.kernels.tiling import Tiling

LENGTH, COUNT = 12, 10_000
IMPLEMENTATIONS = {
    "reference": residual_and_log_det,
    "blocked": partial(blocked.residual_and_log_det, tiling=Tiling(8, 8)),
}
UNIT = float(np.finfo(np.float32).eps)


def drawn(heads, size, width, spread, seed=0):
    """Arrays (COUNT, ...) in float32, each scaled by a power of ten; a quarter far off, a quarter with repeats."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=(COUNT, *shape)) * 10 ** rng.uniform(-spread, spread, size=(COUNT, *(1,) * len(shape)))

    query, key, embeddings = normal(heads, size, width), normal(heads, size, width), normal(LENGTH, width)
    value = rng.normal(size=(COUNT, heads, width, width)) / np.sqrt(width) if heads > 1 else None
    far, repeated = np.arange(COUNT) % 4 == 1, np.arange(COUNT) % 4 == 2
    offset = rng.normal(size=(COUNT, 1, width)) * np.abs(embeddings).max((1, 2), keepdims=True)
    embeddings = embeddings + np.where(far[:, None, None], 1e3 * offset, 0)
    embeddings[repeated, 5:7] = embeddings[repeated, 3:4]
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (query, key, value, embeddings))


@partial(jax.jit, static_argnums=(0,))
def outcome(density, arrays, weights):
    """log|det J_i|, and the gradient of its weighted sum in every array, of each case."""

    def of_case(arrays):
        def total(arrays):
            query, key, value, embeddings = arrays
            log_det = density(Attention(query, key, value), embeddings).log_det
            return (weights.astype(log_det.dtype) * log_det).sum(), log_det

        gradient, log_det = jax.grad(total, has_aux=True)(arrays)
        return [log_det, *jax.tree.leaves(gradient)]

    return jax.vmap(of_case)(arrays)


def largest(x):
    return np.abs(np.asarray(x, np.float64)).reshape(COUNT, -1).max(1)


def wide(arrays):
    return jax.tree.map(lambda x: x.astype(jnp.float64), arrays)


@pytest.fixture(
    scope="module",
    params=[(1, 4, 4, 5), pytest.param((2, 2, 3, 5), marks=pytest.mark.slow)],
    ids=["one head", "two heads with values"],
)
def cases(request):
    arrays = drawn(*request.param)
    rng = np.random.default_rng(1)
    weights = jnp.asarray(rng.normal(size=LENGTH))
    truth = outcome(residual_and_log_det, wide(arrays), weights)

    def change():
        moved = jax.tree.map(lambda x: x * (1 + UNIT * rng.choice([-1, 1], size=x.shape)), wide(arrays))
        return [largest(a - b) for a, b in zip(outcome(residual_and_log_det, moved, weights), truth, strict=True)]

    allowed = [50 * np.max(changes, axis=0) for changes in zip(*(change() for _ in range(8)), strict=True)]
    return arrays, weights, truth, allowed


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_errors_in_float32_are_those_of_inputs_rounded_to_float32(cases, name):
    arrays, weights, truth, allowed = cases
    found = outcome(IMPLEMENTATIONS[name], arrays, weights)
    # Rounding may put a determinant on the boundary itself, which is said by its sign and its logarithm.
    on_boundary = np.isneginf(found[0]).any(1)
    exceeded = on_boundary.copy()
    for index, (got, true, most) in enumerate(zip(found, truth, allowed, strict=True)):
        assert got.dtype == jnp.float32
        infinite = ~np.isfinite(got).reshape(COUNT, -1).all(1)
        assert on_boundary[infinite].all()
        # The determinant is rounded to a unit; a gradient may be lost below what float32 can hold, or be a sum of
        # parts of the size of 1 / its argument that cancel exactly.
        floor = LENGTH * UNIT if index == 0 else 1e-28 + 1e-10 * (1 + 1 / largest(jax.tree.leaves(arrays)[index - 1]))
        exceeded |= ~(largest(np.where(infinite.reshape(-1, *(1,) * (got.ndim - 1)), 0, got) - true) <= most + floor)
    # Eight perturbations do not always show the largest change: logits that are equal in float32 alone, for one.
    assert exceeded.sum() <= COUNT // 1000, np.flatnonzero(exceeded)


@pytest.mark.usefixtures("optimised")
def test_the_blocked_path_in_float64_is_the_reference(cases):
    arrays, weights, truth, allowed = cases
    found = outcome(IMPLEMENTATIONS["blocked"], wide(arrays), weights)
    for got, true, most in zip(found, truth, allowed, strict=True):
        assert np.isfinite(got).all()
        assert (largest(got - true) <= most + 1e-12 * (1 + largest(true))).all()

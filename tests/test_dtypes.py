"""Settings of the caller: half precision, processes made inside vmap, ranks not promoted, second derivatives."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer import (
    Attention,
    EmbeddingProcess,
    RMSNorm,
    Rotary,
    barrier,
    certified_radius,
    residual_and_log_det,
    stability_margin,
    support_tokens,
)

IMPLEMENTATIONS = {name: partial(residual_and_log_det, implementation=name) for name in ("reference", "blocked")}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_gives_the_numbers_of_float32_in_its_own_type(name, dtype):
    # Query = -1.2 key with identity values: det J >= 1 everywhere.
    rng = np.random.default_rng(0)
    eye = jnp.eye(4)[None]
    narrow = jax.tree.map(
        lambda x: x.astype(dtype), (Attention(-1.2 * eye, eye), jnp.asarray(rng.normal(size=(512, 4))))
    )
    found = IMPLEMENTATIONS[name](*narrow)
    expected = IMPLEMENTATIONS[name](*jax.tree.map(lambda x: x.astype(jnp.float32), narrow))
    assert (found.sign == 1).all()
    for got, wide in zip(found, expected, strict=True):
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, wide.astype(dtype))


@pytest.mark.parametrize(
    "function",
    [
        barrier,
        stability_margin,
        partial(stability_margin, kind="conditioning"),
        certified_radius,
        lambda attention, u: support_tokens(attention, u, 2).margins,
        lambda attention, u: EmbeddingProcess(
            attention, 6, jnp.asarray(0.5, u.dtype), jnp.asarray(1, u.dtype)
        ).log_prob(u),
        partial(barrier, implementation="blocked"),
        partial(stability_margin, implementation="blocked"),
    ],
)
def test_public_functions_take_bfloat16_and_give_it_back(function):
    rng = np.random.default_rng(1)
    arrays = jnp.asarray(rng.normal(size=(2, 1, 3, 3))), jnp.asarray(rng.normal(size=(6, 3)))
    (query, key), embeddings = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
    found = function(Attention(query, key), embeddings)
    assert found.dtype == jnp.bfloat16
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (Attention(query, key), embeddings))
    np.testing.assert_array_equal(found, function(*wide).astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("wide", ["rotary", "norm", "weights", "embeddings"])
def test_one_array_in_float32_leaves_no_other_in_half_precision(name, wide, size):
    rng = np.random.default_rng(3)
    weights = jnp.asarray(rng.normal(size=(2, 1, size, size)), jnp.bfloat16)
    rotary = Rotary(jnp.asarray(0.1 ** np.arange(size // 2), jnp.bfloat16))
    arrays = {
        "weights": weights,
        "norm": jnp.ones(size, jnp.bfloat16),
        "rotary": rotary,
        # Beyond position 256 bfloat16 does not count.
        "embeddings": jnp.asarray(rng.normal(size=(300, size)), jnp.bfloat16),
    }

    def numbers(arrays):
        norm = RMSNorm(arrays["norm"], 1e-6)
        layer = Attention(*arrays["weights"], query_norm=norm, key_norm=norm, rotary=arrays["rotary"])
        return IMPLEMENTATIONS[name](layer, arrays["embeddings"])

    in_float32 = partial(jax.tree.map, lambda x: x.astype(jnp.float32))
    found = numbers(arrays | {wide: in_float32(arrays[wide])})
    for got, expected in zip(found, numbers(in_float32(arrays)), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, expected)


def test_a_blocked_product_of_weights_has_the_digits_of_the_inputs():
    rng = np.random.default_rng(4)
    attention = Attention(*rng.normal(size=(3, 1, 4, 4)).astype(np.float32))
    embeddings = rng.normal(size=(8, 4))
    narrow, wide = (function(attention, embeddings).log_det for function in IMPLEMENTATIONS.values())
    np.testing.assert_allclose(narrow, wide, rtol=1e-12, atol=1e-12)


def test_a_process_in_bfloat16_is_extended_in_float32():
    rng = np.random.default_rng(5)
    weights = jnp.asarray(rng.normal(size=(2, 1, 4, 4)), jnp.bfloat16)
    embeddings = jnp.asarray(rng.normal(size=(5, 4)), jnp.bfloat16)
    process = EmbeddingProcess(Attention(*weights), 5, jnp.asarray(0.5, jnp.bfloat16), jnp.asarray(1, jnp.bfloat16))
    past, total = process.empty_past(), 0.0
    for embedding in embeddings:
        found, past = process.extend(past, embedding)
        total += found
    wide = EmbeddingProcess(
        Attention(*weights.astype(jnp.float32)), 5, jnp.asarray(0.5, jnp.float32), jnp.asarray(1, jnp.float32)
    )
    np.testing.assert_allclose(total, wide.log_prob(embeddings.astype(jnp.float32)), rtol=1e-6)


def test_a_process_made_inside_vmap_is_used_outside_as_numpyros_normal_is():
    rng = np.random.default_rng(2)
    attention = Attention(*0.3 * rng.normal(size=(2, 1, 2, 2)))
    scales, values = jnp.array([0.5, 1.0, 2.0]), jnp.asarray(rng.normal(size=(4, 2)))
    process = jax.vmap(lambda scale: EmbeddingProcess(attention, 4, scale))(scales)
    alone = [EmbeddingProcess(attention, 4, scale) for scale in scales]
    expected = jnp.stack([one.log_prob(values) for one in alone])
    np.testing.assert_allclose(process.log_prob(values), expected, rtol=1e-12)
    # Values with leading axes align with the process as they would with a batch.
    several = jnp.asarray(rng.normal(size=(5, 3, 4, 2)))
    expected = jnp.stack([one.log_prob(several[:, i]) for i, one in enumerate(alone)], 1)
    np.testing.assert_allclose(process.log_prob(several), expected, rtol=1e-12)
    draws = process.sample(jax.random.key(0), (7,))
    assert draws.shape == (7, 3, 4, 2)
    np.testing.assert_allclose(draws[:, 1], alone[1].sample(jax.random.key(0), (7,)), atol=1e-9)


PROGRAM = """
import jax
import jax.numpy as jnp
from prob_transformer import *
rotary = Rotary(jnp.array([1.0, 0.1]))
norm = RMSNorm(jnp.ones(4), 1e-6)
plain = Attention(-0.3 * jnp.eye(4)[None], jnp.eye(4)[None])
for attention in (plain, Attention(plain.query, plain.key, rotary=rotary, query_norm=norm, key_norm=norm, window=3)):
    process = EmbeddingProcess(attention, 5, 0.5)
    u = process.sample(jax.random.key(0))
    jax.grad(process.log_prob)(u)
    stability_margin(attention, u, "conditioning")
    support_tokens(attention, u, 2)
    jax.grad(lambda u: residual_and_log_det(attention, u, implementation="blocked").log_det.sum())(u)
certified_radius(plain, u)
own = Attention(jnp.ones((2, 2, 4)), jnp.ones((2, 2, 4)), jnp.ones((2, 4, 4)), jnp.ones((2, 4, 4)))
for values, inclusive in (("identity", False), ("own", True)):
    layer_margins(own, u, values=values, self_inclusive=inclusive, kinds=("determinant", "conditioning"), k=2)
"""


def test_everything_runs_where_ranks_are_not_promoted():
    environment = os.environ | {"JAX_NUMPY_RANK_PROMOTION": "raise", "PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_blocked_path_has_a_second_derivative():
    rng = np.random.default_rng(3)
    attention = Attention(*rng.normal(size=(2, 1, 2, 2)))
    u = jnp.asarray(rng.normal(size=(6, 2)))
    blocked, expected = (
        jax.hessian(lambda u, density=density: density(attention, u).log_det.sum())(u)
        for density in IMPLEMENTATIONS.values()
    )
    np.testing.assert_allclose(blocked, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("far", [0.0, 1e7], ids=["plain", "computed again alone"])
def test_a_weight_of_zero_has_a_derivative_on_the_blocked_path(far):
    rng = np.random.default_rng(3)
    attention = Attention(*rng.normal(size=(2, 1, 2, 2)))
    u = rng.normal(size=(6, 2))
    # Two tokens that nearly coincide, far from the others: their covariance cancels in the products of a block.
    u[1:3] = far + 1e-3 * u[1:3] if far else u[1:3]
    attention = Attention(attention.query / (1 + far), attention.key) if far else attention

    def slope(density, weight):
        def gradient(weight):
            return jax.grad(lambda u: weight * density(attention, u).log_det[3:].sum())(jnp.asarray(u))

        return jax.jacfwd(gradient)(weight)

    for weight in (0.0, 1.0):
        blocked, expected = (slope(density, weight) for density in IMPLEMENTATIONS.values())
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(blocked, expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max())


@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize("heads", [1, 2])
def test_cells_swept_together_have_the_gradients_of_each_alone(heads):
    # Code that XLA optimises, as users run it: one form of the sweep was compiled to wrong numbers for two cells.
    rng = np.random.default_rng(4)
    attention = Attention(*rng.normal(size=(2, heads, 2, 3)), None if heads == 1 else rng.normal(size=(heads, 3, 3)))
    u = jnp.asarray(rng.normal(size=(4, 12, 3)))

    @jax.jit
    def gradient(attention, u):
        return jax.grad(lambda attention, u: IMPLEMENTATIONS["blocked"](attention, u).log_det.sum(), (0, 1))(
            attention, u
        )

    together, slopes = gradient(attention, u)
    parts = [gradient(attention, one) for one in u]
    np.testing.assert_allclose(slopes, jnp.stack([slope for _, slope in parts]), rtol=1e-9, atol=1e-11)
    total = jax.tree.map(lambda *x: sum(x), *[part for part, _ in parts])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), together, total)

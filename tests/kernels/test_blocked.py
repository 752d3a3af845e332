from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prob_transformer as reference
from prob_transformer import Attention, RMSNorm
from prob_transformer.kernels import blocked
from prob_transformer.kernels.log_det import log_det
from prob_transformer.kernels.projections import Projections
from prob_transformer.kernels.tiling import DEFAULT_TILING, Tiling
from tests.helpers.long import SHAPES, TILINGS, draw
from tests.helpers.shrinking_cases import attention_cases
from theory_checks.drawn_cases import SHAPES as SMALL_SHAPES
from theory_checks.truth.numpy_attention import amplification


def pullback(function, attention, embeddings, seed=0):
    """Gradients of a random linear functional of residual and log-determinants, in all arguments."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=embeddings.shape[:-1]), rng.normal(size=embeddings.shape)

    def total(attention, embeddings):
        found = function(attention, embeddings)
        return (weights[0] * found.log_det).sum() + (weights[1] * found.residual).sum()

    return jax.jit(jax.grad(total, argnums=(0, 1)))(attention, jnp.asarray(embeddings))


CASES = [(shape, tiling, 3, np.float64) for shape, tiling in zip(SHAPES, TILINGS * 2, strict=False)]
# The default tiling over several blocks.
CASES += [((2, 4, 8, 300, True), DEFAULT_TILING, 2, dtype) for dtype in (np.float32, np.float64)]


@pytest.mark.parametrize(("shape", "tiling", "batch", "dtype"), CASES)
def test_value_and_gradient_equal_the_reference(shape, tiling, batch, dtype):
    attention, embeddings = draw(0, shape, dtype, batch=(batch,))
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (attention, embeddings))
    fast = partial(blocked.residual_and_log_det, tiling=tiling)
    tolerance, of_residual = (1e-5, 1e-5) if dtype == np.float32 else (1e-12, 1e-13)
    got, expected = fast(attention, embeddings), reference.residual_and_log_det(*wide)
    assert {array.dtype for array in got} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(got.sign, expected.sign)
    np.testing.assert_allclose(got.residual, expected.residual, rtol=of_residual, atol=of_residual)
    np.testing.assert_allclose(got.log_det, expected.log_det, rtol=tolerance, atol=tolerance)
    mean = blocked.attention_mean(attention, embeddings, tiling)
    np.testing.assert_allclose(mean, reference.attention_mean(*wide), rtol=of_residual, atol=of_residual)

    def compare(slope, true):
        assert slope.dtype == dtype
        np.testing.assert_allclose(slope, true, atol=10 * tolerance * np.abs(true).max())

    slopes = pullback(fast, attention, embeddings), pullback(reference.residual_and_log_det, *wide)
    jax.tree.map(compare, *slopes)


def test_the_drawn_cases_can_tell_a_wrong_sign_a_transposition_and_a_wrong_mask():
    for shape in SHAPES:
        attention, embeddings = draw(0, shape, batch=(3,))
        log_det = np.asarray(reference.residual_and_log_det(attention, embeddings).log_det)
        assert np.abs(log_det).max() > 0.05
        reversed_order = reference.residual_and_log_det(attention, embeddings[:, ::-1]).log_det[:, ::-1]
        assert np.abs(log_det - reversed_order).max() > 0.05
        if shape[2] > 1:
            assert np.abs(attention.interaction - attention.interaction.swapaxes(1, 2)).max() > 0.05


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_adversarial_geometry_stays_within_rounding_of_the_reference(dtype, data):
    case = data.draw(attention_cases(dtype, shapes=SMALL_SHAPES[1::4]))
    attention = Attention(case.query, case.key, case.value)
    wide = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (attention, case.embeddings))
    expected = reference.residual_and_log_det(*wide)
    got = blocked.residual_and_log_det(attention, case.embeddings)
    kappa = amplification(case, np.asarray(reference.jacobian_block(*wide)))
    error = np.abs(np.asarray(got.log_det) - np.asarray(expected.log_det)).max()
    assert error <= 200 * np.finfo(dtype).eps * kappa


def test_far_off_keys_and_values_keep_the_digits_of_their_covariance():
    # A shift of all keys or all features changes nothing. Without the block's centre, E[xk] - E[x]E[k] would lose all
    # digits to it: 300^2 times the rounding of float32 is 0.01.
    queries, keys, features = np.random.default_rng(0).normal(size=(3, 1, 1, 3, 24)).astype(np.float32)
    attended = jnp.concatenate([features, keys], -2)
    plain, far = (
        log_det(Projections(queries, attended + shift), Tiling(8, 8)).log_det for shift in np.float32([0, 300])
    )
    assert np.abs(plain).max() > 0.4
    np.testing.assert_allclose(far, plain, atol=1e-3)


def test_one_head_does_not_hide_that_another_has_lost_its_digits():
    # Head 0 has a covariance of hundreds, of tokens about the centre; that of head 1 is left of two far clusters.
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(64, 2))
    side = np.where(np.arange(64) % 2 == 0, 1.0, -1.0)
    embeddings = np.stack([30 * normal[:, 0], 30 * side + 0.5 * normal[:, 1], side * 20 / 30, 0 * side], 1)
    query, key, value = (np.zeros(shape) for shape in ((2, 1, 4), (2, 1, 4), (2, 4, 4)))
    query[0, 0, 3] = query[1, 0, 2] = key[0, 0, 0] = key[1, 0, 1] = 1
    value[0, 3, 0], value[1, 2, 1] = -1, 3.9
    arrays = [x.astype(np.float32) for x in (query, key, value, embeddings)]

    def log_dets(arrays, implementation):
        attention = Attention(*arrays[:3], scale=1.0)
        return reference.residual_and_log_det(attention, arrays[3], implementation=implementation).log_det

    expected = log_dets([x.astype(np.float64) for x in arrays], "reference")
    np.testing.assert_allclose(log_dets(arrays, "blocked"), expected, atol=2e-4)


def test_a_window_that_leaves_no_past_has_zero_gradients():
    attention, embeddings = draw(0, (1, 2, 2, 20, False))
    attention = Attention(attention.query, attention.key, window=1)
    barriers, gradient = jax.value_and_grad(lambda u: reference.barrier(attention, u, implementation="blocked").sum())(
        embeddings
    )
    assert barriers == 0
    np.testing.assert_array_equal(gradient, 0)


def test_vmap_and_jit_equal_one_call_with_a_batch():
    attention, embeddings = draw(1, SHAPES[3], batch=(2, 3))

    def fast(u):
        return blocked.residual_and_log_det(attention, u, TILINGS[1])

    together = fast(embeddings)
    for other in (jax.jit(fast)(embeddings), jax.vmap(fast)(embeddings), jax.vmap(jax.vmap(fast))(embeddings)):
        for one, two in zip(together, other, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-12)
    queries = jnp.stack([attention.query, 0.5 * attention.query])
    many = jax.vmap(
        lambda query: blocked.residual_and_log_det(
            Attention(query, attention.key, attention.value), embeddings, TILINGS[1]
        )
    )(queries)
    halved = reference.residual_and_log_det(
        Attention(0.5 * attention.query, attention.key, attention.value), embeddings
    )
    np.testing.assert_allclose(many.log_det[1], halved.log_det, atol=1e-11)


def test_bfloat16_products_keep_float32_determinants():
    attention, embeddings = draw(0, (1, 4, 8, 64, False), np.float32, batch=(2,))
    exact = blocked.residual_and_log_det(attention, embeddings).log_det
    narrow = blocked.residual_and_log_det(attention, embeddings, Tiling(product_dtype="bfloat16")).log_det
    assert narrow.dtype == jnp.float32
    # Eight bits of mantissa in a sum of weighted products: visible, and small.
    assert 0 < np.abs(narrow - exact).max() < 0.05


def test_one_compilation_for_one_shape_and_tiling():
    attention, embeddings = draw(0, (1, 2, 3, 19, False))
    before = blocked.residual_and_log_det._cache_size()
    for factor in (1.0, 2.0, 3.0):
        blocked.residual_and_log_det(attention, factor * embeddings)
    assert blocked.residual_and_log_det._cache_size() == before + 1


def temporary_bytes(length, heads=2, size=8):
    embeddings = jax.ShapeDtypeStruct((1, length, heads * size), jnp.float32)
    weight = jax.ShapeDtypeStruct((heads, size, heads * size), jnp.float32)

    def total(query, key, embeddings):
        value = jnp.broadcast_to(jnp.eye(heads * size, dtype=jnp.float32), (heads, heads * size, heads * size))
        return blocked.residual_and_log_det(Attention(query, key, value), embeddings).log_det.sum()

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(weight, weight, embeddings).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_linearly_with_the_length():
    # Quadratic growth, (n, n) for a head or more, would make the second difference as large as the first.
    short, middle, long = (temporary_bytes(length) for length in (1024, 2048, 4096))
    assert (long - middle) < 2.2 * (middle - short)
    assert long < 4 * 4096**2


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(block=4), "block: got 4; pass an integer of at least 8"),
        (Tiling(block=16, chunk=24), "chunk: got 24; pass a multiple of block, 16"),
    ],
)
def test_a_tiling_that_does_not_fit_is_refused_by_name(tiling, message):
    attention, embeddings = draw(0, SHAPES[0])
    with pytest.raises(ValueError, match=message):
        blocked.residual_and_log_det(attention, embeddings, tiling)


@pytest.mark.parametrize("size", [1.0, 1e-4, 1e-6])
def test_a_query_norm_undoes_the_size_of_its_weights(size):
    # Two clusters far apart, tokens nearly coinciding in each: the norm multiplies what is left by 1 / size.
    rng = np.random.default_rng(0)
    side = np.where(np.arange(24) % 2 == 0, 1.0, -1.0)
    u = np.stack([side, 0.85 - 0.05 * side], 1) + 1e-5 * rng.normal(size=(24, 2))
    eye = np.eye(2)[None]

    def found(density, dtype):
        weights = (np.asarray(x, dtype) for x in (size * eye, 1e5 * eye))
        attention = Attention(*weights, query_norm=RMSNorm(jnp.ones(2, dtype), 1e-30))
        return density(attention, jnp.asarray(u, dtype)).log_det

    # The truth in float64 of the float32 numbers, for their rounding moves the clusters.
    u = np.asarray(u, np.float32)
    expected = found(reference.residual_and_log_det, np.float64)
    np.testing.assert_allclose(found(blocked.residual_and_log_det, np.float32), expected, atol=3e-5)

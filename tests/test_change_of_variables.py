from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer import (
    Attention,
    attention_mean,
    barrier,
    jacobian_block,
    one_sided_barrier,
    residual_and_log_det,
)
from prob_transformer import change_of_variables as module
from prob_transformer.change_of_variables import over_positions
from tests.helpers.dense import SHAPES, dense_truth, draw
from tests.helpers.long import SHAPES as LONG_SHAPES


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_and_log_det_match_the_autodiff_jacobian_of_the_whole_map(shape):
    for seed in range(20):
        *parameters, embeddings = draw(seed, shape)
        attention = Attention(*parameters)
        residual, blocks, (whole_sign, whole_log_det) = dense_truth(*parameters, embeddings)
        got = residual_and_log_det(attention, embeddings)
        np.testing.assert_allclose(got.residual, residual, atol=1e-13)
        np.testing.assert_allclose(attention_mean(attention, embeddings), embeddings - residual, atol=1e-13)
        np.testing.assert_allclose(jacobian_block(attention, embeddings), blocks, atol=1e-12)
        assert abs(got.log_det.sum() - whole_log_det) < 1e-13 * max(np.linalg.cond(blocks).max(), 100)
        assert got.sign.prod() == whole_sign


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_agrees_with_the_float64_jacobian(shape):
    for seed in range(10):
        *parameters, embeddings = draw(seed, shape, np.float32)
        got = residual_and_log_det(Attention(*parameters), embeddings)
        assert {array.dtype for array in got} == {jnp.dtype("float32")}
        wide = [None if array is None else array.astype(np.float64) for array in (*parameters, embeddings)]
        residual, blocks, _ = dense_truth(*wide)
        assert np.abs(got.residual - residual).max() < 1e-5
        error = np.abs(got.log_det - np.linalg.slogdet(blocks)[1])
        assert (error < 1e-6 * np.maximum(np.linalg.cond(blocks), 100)).all()


def test_the_drawn_cases_can_tell_a_wrong_sign_and_a_transposed_interaction():
    # A log-determinant near 0 or a symmetric A would hide them, so the cases above must have neither.
    for shape in SHAPES:
        if shape[3] > 2:
            *parameters, embeddings = draw(0, shape)
            assert abs(residual_and_log_det(Attention(*parameters), embeddings).log_det.sum()) > 1e-3
        if shape[2] > 1:
            interaction = Attention(*draw(0, shape)[:3]).interaction
            assert np.abs(interaction - interaction.swapaxes(1, 2)).max() > 1e-2


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
@pytest.mark.parametrize("shape", [*SHAPES, *LONG_SHAPES])
def test_the_first_two_positions_have_exactly_zero_log_det(shape, implementation):
    *parameters, embeddings = draw(3, shape, scale=30.0)
    got = residual_and_log_det(Attention(*parameters), embeddings, implementation=implementation)
    assert got.log_det[:2].tolist() == [0.0, 0.0]
    assert got.sign[:2].tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(got.residual[0], embeddings[0])


def test_rescaling_embeddings_and_interaction_together_changes_no_determinant():
    query, key, _, embeddings = draw(5, (1, 2, 3, 5, False))
    plain = residual_and_log_det(Attention(query, key), embeddings)
    scaled = residual_and_log_det(Attention(query / 9.0, key), 3.0 * embeddings)
    np.testing.assert_allclose(scaled.log_det, plain.log_det, atol=1e-13)
    np.testing.assert_allclose(scaled.residual, 3.0 * plain.residual, atol=1e-13)


def test_shifting_every_embedding_far_away_changes_neither_residual_nor_determinant():
    # Identity values: mu(u + c) = mu(u) + c if the logits stay, as they do for c in the null space of W_K and W_Q.
    query, key = (np.random.default_rng(0).normal(size=(1, 2, 3)) for _ in range(2))
    query[..., 2] = key[..., 2] = 0.0
    embeddings = np.random.default_rng(1).normal(size=(5, 3))
    shifted = embeddings + np.array([0.0, 0.0, 2.0**20])
    plain = residual_and_log_det(Attention(query, key), embeddings)
    far = residual_and_log_det(Attention(query, key), shifted)
    np.testing.assert_allclose(far.log_det, plain.log_det, atol=1e-12)
    np.testing.assert_allclose(far.residual[1:], plain.residual[1:], atol=1e-9)


def test_batches_and_jit_equal_one_sequence_at_a_time():
    *parameters, _ = draw(0, (2, 3, 2, 5, True))
    attention = Attention(*parameters)
    batch = np.random.default_rng(0).normal(size=(2, 3, 5, 2))
    got = jax.jit(residual_and_log_det)(attention, batch)
    assert (got.residual.shape, got.sign.shape, got.log_det.shape) == ((2, 3, 5, 2), (2, 3, 5), (2, 3, 5))
    for a in range(2):
        for b in range(3):
            one = residual_and_log_det(attention, batch[a, b])
            np.testing.assert_allclose(got.log_det[a, b], one.log_det, atol=1e-13)
            np.testing.assert_allclose(got.residual[a, b], one.residual, atol=1e-13)


def test_gradients_match_finite_differences_and_stay_finite_when_weights_underflow():
    *parameters, embeddings = draw(1, (2, 1, 3, 4, True))
    attention = Attention(*parameters)

    def total(u):
        residual, _, log_det = residual_and_log_det(attention, u)
        return log_det.sum() - jnp.square(residual).sum()

    slope = jax.grad(total)(jnp.asarray(embeddings))
    for index in np.ndindex(*embeddings.shape):
        step = np.zeros_like(embeddings)
        step[index] = 1e-6
        assert abs((total(embeddings + step) - total(embeddings - step)) / 2e-6 - slope[index]) < 1e-7
    sharp = Attention(1e3 * parameters[0], parameters[1], parameters[2])
    assert np.isfinite(jax.grad(lambda a: residual_and_log_det(a, embeddings).log_det.sum())(sharp).query).all()


@pytest.mark.parametrize("implementation", ["reference", "blocked"])
def test_on_the_boundary_the_sign_is_zero_and_the_log_det_minus_infinity(implementation):
    # Past (-1, 1), query 0: uniform weights, variance exactly 1, so J = 1 - a vanishes at a = 1.
    attention, embeddings = Attention(jnp.ones((1, 1, 1)), jnp.ones((1, 1, 1))), jnp.array([[-1.0], [1.0], [0.0]])
    got = residual_and_log_det(attention, embeddings, implementation=implementation)
    assert got.sign[2] == 0
    assert got.log_det[2] == -jnp.inf


@pytest.mark.parametrize(
    "function",
    [
        residual_and_log_det,
        attention_mean,
        jacobian_block,
        partial(residual_and_log_det, implementation="blocked"),
        partial(attention_mean, implementation="blocked"),
    ],
)
@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (np.ones((4, 3)), r"embeddings: has shape \(4, 3\); pass \(\.\.\., n, d\) with d = 2"),
        (np.ones(2), r"embeddings: has shape \(2,\)"),
        (np.ones((0, 2)), "embeddings: has n = 0 positions; pass at least 2"),
        (np.ones((1, 2)), "embeddings: has n = 1 positions; pass at least 2"),
        (np.full((3, 2), np.nan), "embeddings: contains NaN or inf"),
        (np.full((3, 2), np.inf), "embeddings: contains NaN or inf"),
    ],
)
def test_bad_embeddings_are_refused_by_name(function, embeddings, message):
    with pytest.raises(ValueError, match=message):
        function(Attention(np.ones((1, 2, 2)), np.ones((1, 2, 2))), embeddings)


@pytest.mark.parametrize("function", [residual_and_log_det, attention_mean, jacobian_block])
def test_called_twice_alone_it_is_traced_once_and_in_a_compiled_function_it_adds_no_call(function, monkeypatch):
    traced = []

    def counted(*arguments):
        traced.append(arguments)
        return over_positions(*arguments)

    monkeypatch.setattr(module, "over_positions", counted)
    # A length that nothing else here has, so that nothing is traced before.
    query, key, _, embeddings = draw(0, (1, 2, 3, 11, False))
    attention = Attention(query, key)
    for _ in range(2):
        function(attention, embeddings)
    assert len(traced) == 1
    lowered = jax.jit(function).lower(attention, embeddings).as_text()
    main = lowered.partition("func.func public @main")[2].partition("func.func private")[0]
    assert "stablehlo.dot_general" in main


@pytest.mark.parametrize("function", [residual_and_log_det, attention_mean, jacobian_block, barrier, one_sided_barrier])
def test_arguments_have_names_and_half_precision_is_rounded_once(function):
    """bfloat16 gives the float64 result of the same inputs to the rounding of bfloat16, 2^-8, and no more."""
    query, key, _, embeddings = draw(3, (1, 2, 3, 9, False))
    half = [jnp.asarray(array, jnp.bfloat16) for array in (query, key, embeddings)]
    wide = [np.asarray(array, np.float64) for array in half]
    found = function(attention=Attention(*half[:2]), embeddings=half[2])
    expected = function(Attention(*wide[:2]), wide[2])
    for array, truth in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert array.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(array, np.float64), truth, rtol=1.01 * 2**-8, atol=1e-5)

"""The central equation: closed-form log-determinants against the autodiff Jacobian of the whole map."""

from dataclasses import replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prob_transformer import Attention, jacobian_block, residual_and_log_det
from prob_transformer.attention import Past, attention_weights
from tests.helpers.dense import dense_truth
from tests.helpers.shrinking_cases import (
    LINE_SHAPES,
    ON_THE_BOUNDARY,
    ONE,
    PAST_THE_BOUNDARY,
    SECOND_POSITION,
    WIDE_SHAPES,
    shrinking_cases,
)
from theory_checks.check import quick_jit
from theory_checks.drawn_cases import Case
from theory_checks.truth.numpy_attention import log_det_tolerance

WEIGHTS_UNDERFLOW = Case.given([[[1000.0]]], ONE, None, [[-1.0], [1.0], [0.5]])
LOGITS_FAR_BELOW_ZERO = Case.given([[[-100.0]]], ONE, None, [[1.0], [2.0], [3.0]])
FAR_FROM_THE_ORIGIN = Case.given([[[1.0, 0.0]]], [[[1.0, 0.0]]], None, [[0.0, 1e6], [1.0, 1e6], [0.5, 1e6]])
TWO_HEADS = Case.given(
    [[[1.0, 0.0]], [[0.0, 1.0]]],
    [[[1.0, 1.0]], [[2.0, -1.0]]],
    [[[1.0, 0.5], [0.0, 1.0]], [[0.0, 1.0], [-1.0, 0.0]]],
    [[1.0, 0.0], [-1.0, 0.5], [0.25, 1.0]],
)


@quick_jit
def library(query, key, value, embeddings):
    attention = Attention(query, key, value)
    weights = attention_weights(attention, Past.of(attention, embeddings[:-1]), embeddings[-1])
    return residual_and_log_det(attention, embeddings), jacobian_block(attention, embeddings), weights


def assert_is_the_log_det_of_the_whole_autodiff_jacobian(case):
    expected, blocks, (sign, log_det) = dense_truth(*case.arrays)
    got, _, _ = library(*case.arrays)
    np.testing.assert_allclose(got.residual, expected, rtol=0, atol=1e-9 * np.abs(case.embeddings).max())
    # The first position has no past, and one past token has no covariance.
    assert got.log_det[:2].tolist() == [0.0, 0.0]
    assert not np.isnan(got.log_det).any()
    tolerance = log_det_tolerance(case, blocks)
    if np.isfinite(tolerance):
        assert got.sign.prod() == sign
        assert abs(got.log_det.sum() - log_det) <= tolerance


@settings(max_examples=400)
@given(case=shrinking_cases(LINE_SHAPES))
@example(case=SECOND_POSITION)
@example(case=ON_THE_BOUNDARY)
@example(case=PAST_THE_BOUNDARY)
@example(case=WEIGHTS_UNDERFLOW)
@example(case=LOGITS_FAR_BELOW_ZERO)
def test_log_det_is_that_of_the_whole_autodiff_jacobian_on_the_line(case):
    assert_is_the_log_det_of_the_whole_autodiff_jacobian(case)


@given(case=shrinking_cases(WIDE_SHAPES))
@example(case=FAR_FROM_THE_ORIGIN)
@example(case=TWO_HEADS)
def test_log_det_is_that_of_the_whole_autodiff_jacobian_with_width_and_heads(case):
    assert_is_the_log_det_of_the_whole_autodiff_jacobian(case)


@given(case=shrinking_cases())
@example(case=SECOND_POSITION)
@example(case=ON_THE_BOUNDARY)
@example(case=PAST_THE_BOUNDARY)
@example(case=WEIGHTS_UNDERFLOW)
@example(case=TWO_HEADS)
def test_the_low_rank_determinant_is_that_of_the_block_at_every_position(case):
    _, blocks, _ = dense_truth(*case.arrays)
    got, closed_form, _ = library(*case.arrays)
    attended = np.linalg.norm(np.eye(case.shape.width) - blocks, ord=2, axis=(1, 2))
    np.testing.assert_allclose(closed_form, blocks, rtol=0, atol=1e-9 * (1 + attended.max()))
    tolerance = log_det_tolerance(case, blocks)
    if np.isfinite(tolerance):
        sign, log_det = np.linalg.slogdet(blocks)
        assert got.sign.tolist() == sign.tolist()
        np.testing.assert_allclose(got.log_det, log_det, rtol=0, atol=tolerance)


@given(case=shrinking_cases(), factor=st.sampled_from((2.0, 0.5, -1.0, 3.0, 1000.0)))
@example(case=ON_THE_BOUNDARY, factor=3.0)
@example(case=PAST_THE_BOUNDARY, factor=3.0)
@example(case=TWO_HEADS, factor=3.0)
def test_scaling_embeddings_by_c_and_the_interaction_by_its_inverse_square_changes_no_weight_and_no_block(case, factor):
    plain, blocks, weights = library(*case.arrays)
    scaled_case = replace(case, query=case.query / factor**2, embeddings=factor * case.embeddings)
    scaled, scaled_blocks, scaled_weights = library(*scaled_case.arrays)
    attended = np.linalg.norm(np.eye(case.shape.width) - blocks, ord=2, axis=(1, 2))
    np.testing.assert_allclose(scaled_weights, weights, rtol=0, atol=1e-9)
    np.testing.assert_allclose(scaled_blocks, blocks, rtol=0, atol=1e-9 * (1 + attended.max()))
    np.testing.assert_allclose(
        scaled.residual / factor, plain.residual, rtol=0, atol=1e-9 * np.abs(case.embeddings).max()
    )
    tolerance = log_det_tolerance(case, blocks)
    if np.isfinite(tolerance):
        assert scaled.sign.tolist() == plain.sign.tolist()
        np.testing.assert_allclose(scaled.log_det, plain.log_det, rtol=0, atol=2 * tolerance)

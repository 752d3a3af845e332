"""Stability margins and the certified radius, against autodiff blocks, NumPy and a search for roots of det J."""

from dataclasses import replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prob_transformer import Attention, certified_radius, stability_margin
from tests.helpers.dense import dense_truth
from tests.helpers.shrinking_cases import (
    LINE_SHAPES,
    ON_THE_BOUNDARY,
    ONE,
    PAST_THE_BOUNDARY,
    SECOND_POSITION,
    SIMPLE_NUMBERS,
    WIDE_SHAPES,
    safe_cases,
    shrinking_cases,
)
from theory_checks.check import quick_jit
from theory_checks.claims.certified_radius import distance_found
from theory_checks.drawn_cases import Case, Shape
from theory_checks.truth.numpy_attention import log_det_tolerance

# det J = 1 and sigma_min = 1/10: the determinant says nothing of the conditioning.
DETERMINANT_ONE = Case.given(
    [[[1.8, 0.0], [0.0, -18.0]]],
    [[[2**0.5, 0.0], [0.0, 2**0.5]]],
    None,
    [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0]],
)
UNDERFLOWING_WEIGHT = Case.given([[[50.0]]], ONE, None, [[1.0], [0.0], [100.0]])
EQUAL_TOKENS = Case.given([[[50.0]]], ONE, None, [[1.0], [1.0], [1.0]])
NEGATIVE_VALUES = Case.given([[[-9.0]]], ONE, [[[-1.0]]], [[1.0], [-1.0], [0.25]])

# From three positions on there is a covariance. Multiples of 1/4 make no A + A^T that is indefinite by less than
# rounding, for which the radius is infinite today though the boundary can be reached.
RADIUS_SHAPES = tuple(shape for shape in LINE_SHAPES + WIDE_SHAPES if shape.length > 2)


@quick_jit
def margins(query, key, value, embeddings):
    attention = Attention(query, key, value)
    return stability_margin(attention, embeddings), stability_margin(attention, embeddings, "conditioning")


@quick_jit
def last_radius(query, key, value, embeddings):
    return certified_radius(Attention(query, key, value), embeddings)[-1]


def attended(blocks):
    """|M_i| = |I - J_i|, the size of what rounding is relative to; the largest over positions."""
    return np.linalg.norm(np.eye(blocks.shape[-1]) - blocks, ord=2, axis=(1, 2)).max()


def assert_margins_are_determinant_and_smallest_singular_value_of_the_autodiff_block(case):
    blocks = np.asarray(dense_truth(*case.arrays)[1])
    by_determinant, by_conditioning = margins(*case.arrays)
    size = 1 + attended(blocks)
    expected = np.linalg.det(blocks)
    error = 1e-9 * size**case.shape.width
    np.testing.assert_allclose(by_determinant, expected, rtol=0, atol=error)
    clear = np.abs(expected) > error
    assert np.sign(by_determinant)[clear].tolist() == np.sign(expected)[clear].tolist()
    smallest = np.linalg.svd(blocks, compute_uv=False)[:, -1]
    np.testing.assert_allclose(by_conditioning, smallest, rtol=0, atol=1e-9 * size)


@settings(max_examples=400)
@given(case=shrinking_cases(LINE_SHAPES))
@example(case=SECOND_POSITION)
@example(case=ON_THE_BOUNDARY)
@example(case=PAST_THE_BOUNDARY)
def test_margins_on_the_line_are_the_signed_determinant_of_the_autodiff_block_and_its_size(case):
    assert_margins_are_determinant_and_smallest_singular_value_of_the_autodiff_block(case)


@given(case=shrinking_cases(WIDE_SHAPES))
@example(case=DETERMINANT_ONE)
def test_margins_are_the_signed_determinant_and_the_smallest_singular_value_of_the_autodiff_block(case):
    assert_margins_are_determinant_and_smallest_singular_value_of_the_autodiff_block(case)


@given(case=safe_cases((Shape(1, 1, 1, 3, False), Shape(1, 1, 2, 3, False), Shape(1, 1, 3, 4, False))))
def test_a_negative_semidefinite_interaction_keeps_the_determinant_at_least_one(case):
    by_determinant, _ = margins(*case.arrays)
    assert (by_determinant >= 1 - 1e-9).all()


@given(case=shrinking_cases(), data=st.data())
def test_margins_ignore_scale_rotation_order_of_the_past_and_later_positions(case, data):
    length, width = case.embeddings.shape
    blocks = np.asarray(dense_truth(*case.arrays)[1])
    expected = np.stack(margins(*case.arrays))
    error = 1e-9 * (1 + attended(blocks)) ** case.shape.width

    factor = data.draw(st.sampled_from((2.0, 0.5, 3.0)), "factor")
    scaled = replace(case, key=case.key / factor**2, embeddings=factor * case.embeddings)
    np.testing.assert_allclose(np.stack(margins(*scaled.arrays)), expected, rtol=0, atol=error)

    axes, signs = data.draw(st.permutations(range(width))), data.draw(st.tuples(*[st.sampled_from((1, -1))] * width))
    rotation = np.diag(np.array(signs, float))[list(axes)]
    value = None if case.value is None else rotation @ case.value @ rotation.T
    rotated = replace(
        case,
        query=case.query @ rotation.T,
        key=case.key @ rotation.T,
        value=value,
        embeddings=case.embeddings @ rotation.T,
    )
    np.testing.assert_allclose(np.stack(margins(*rotated.arrays)), expected, rtol=0, atol=error)

    order = [*data.draw(st.permutations(range(length - 1)), "order of the past"), length - 1]
    shuffled = replace(case, embeddings=case.embeddings[order])
    np.testing.assert_allclose(np.stack(margins(*shuffled.arrays))[:, -1], expected[:, -1], rtol=0, atol=error)

    later = np.array([data.draw(SIMPLE_NUMBERS) for _ in range(width)])
    changed = replace(case, embeddings=np.concatenate([case.embeddings[:-1], later[None]]))
    np.testing.assert_array_equal(np.stack(margins(*changed.arrays))[:, :-1], expected[:, :-1])


@settings(max_examples=40)
@given(case=shrinking_cases(RADIUS_SHAPES))
@example(case=ON_THE_BOUNDARY)
@example(case=PAST_THE_BOUNDARY)
@example(case=UNDERFLOWING_WEIGHT)
@example(case=EQUAL_TOKENS)
@example(case=NEGATIVE_VALUES)
def test_no_root_of_the_determinant_is_found_within_the_certified_radius(case):
    radius = float(last_radius(*case.arrays))
    assert radius >= 0
    distance = distance_found(case, np.random.default_rng(0))
    if np.isfinite(distance):
        assert radius <= distance * (1 + 1e-9)


@given(half_width=st.sampled_from((1.0, 2.0, 0.5)), embedding=SIMPLE_NUMBERS)
@example(half_width=1.0, embedding=0.0)
def test_the_radius_ends_before_a_boundary_that_is_touched_and_not_crossed(half_width, embedding):
    # D_v D_g / 4 = 1 exactly: det J = 1 - a Var >= 0, and 0 at u = 0 alone, where no search for signs would find it.
    case = Case.given([[[half_width**-2]]], ONE, None, [[-half_width], [half_width], [embedding]])
    assert float(last_radius(*case.arrays)) <= abs(embedding)


@given(case=shrinking_cases(RADIUS_SHAPES[:2]), factor=st.sampled_from((2.0, 0.5, 3.0)))
def test_the_radius_has_the_unit_of_the_embeddings(case, factor):
    radius = float(last_radius(*case.arrays))
    scaled = replace(case, query=case.query / factor**2, embeddings=factor * case.embeddings)
    tolerance = log_det_tolerance(case, np.asarray(dense_truth(*case.arrays)[1]))
    if np.isfinite(tolerance):
        np.testing.assert_allclose(float(last_radius(*scaled.arrays)), factor * radius, rtol=1e-6)

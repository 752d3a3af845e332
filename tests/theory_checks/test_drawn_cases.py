"""What the drawn cases promise: finite arrays, special values, and the geometry that each kind names."""

from typing import Any

import numpy as np
import pytest
from hypothesis import find
from scipy import stats

from tests.helpers.shrinking_cases import LINE_SHAPES, shrinking_cases
from theory_checks.drawn_cases import HUGE_LOGITS, KINDS, SHAPES, Case, Shape, draw_case, draw_number, drawn, make_case
from theory_checks.truth import numpy_attention

SHAPE = Shape(2, 2, 3, 6, True)


def test_shapes_cover_what_they_promise():
    assert {shape.length for shape in SHAPES} == {2, 3, 4, 5, 6}
    assert {shape.heads for shape in SHAPES} == {1, 2, 3}
    assert any(shape.width == 1 for shape in SHAPES)
    for relation in (np.less, np.equal, np.greater):
        assert any(relation(shape.heads * shape.head_size, shape.width) for shape in SHAPES)
    assert len(set(SHAPES)) == len(SHAPES)
    for shape in SHAPES:
        assert shape.with_values or shape.heads == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_drawn_cases_are_finite_of_the_asked_dtype_and_the_same_every_time(dtype):
    first, second = (list(drawn(draw_case, 60, 0, dtype=dtype)) for _ in range(2))
    assert len(first) == 60
    assert [repr(case) for case in first] == [repr(case) for case in second]
    for case, again in zip(first, second, strict=True):
        for name in ("query", "key", "value", "embeddings"):
            array = getattr(case, name)
            if array is not None:
                assert array.dtype == dtype
                assert np.isfinite(array).all()
                np.testing.assert_array_equal(array, getattr(again, name))


def test_repr_rebuilds_the_case():
    case = make_case(SHAPE, "offset", 7, 0.7, 0.2)
    again = eval(repr(case), {"make_case": make_case, "Shape": Shape, "np": np})
    np.testing.assert_array_equal(case.embeddings, again.embeddings)
    np.testing.assert_array_equal(case.query, again.query)


def test_a_case_of_draw_numbers_shows_them_and_rebuilds_itself():
    case = find(shrinking_cases(), lambda case: case.value is not None and case.shape.heads == 2)
    assert repr(case).startswith("Case.given(query=[[[0.0, 0.0]], [[0.0, 0.0]]], key=")
    again = eval(repr(case), {"Case": Case})
    for array, other in zip(case.arrays, again.arrays, strict=True):
        np.testing.assert_array_equal(array, other)


def test_cases_shrink_to_the_first_shape_and_to_as_few_numbers_as_show_a_fault():
    assert repr(find(shrinking_cases(), lambda case: True)) == (
        "Case.given(query=[[[0.0]]], key=[[[0.0]]], value=None, embeddings=[[0.0], [0.0]])"
    )
    # det J < 0 needs an interaction and two tokens that differ, which may lie at 0 and at another number.
    on_the_line = shrinking_cases(LINE_SHAPES[1:2])
    crossed = find(on_the_line, lambda case: numpy_attention.determinants(case, case.embeddings[-1:])[0] < 0)
    assert sum(np.count_nonzero(array) for array in (crossed.query, crossed.key, crossed.embeddings)) == 3


def test_only_asked_kinds_and_shapes_are_drawn():
    found = drawn(draw_case, 20, 0, kinds=("ties",), shapes=(SHAPE,))
    assert {(case.kind, case.shape) for case in found} == {("ties", SHAPE)}


def test_every_shape_and_kind_and_the_ends_of_both_ranges_are_among_the_cases_of_a_check():
    cases = list(drawn(draw_case, 600, 0))
    assert {case.shape for case in cases} == set(SHAPES)
    assert {case.kind for case in cases} == set(KINDS)
    for numbers, low, high in (
        ([case.strength for case in cases], 0.1, 3.0),
        ([case.extremity for case in cases], 0.0, 1.0),
    ):
        assert (min(numbers), max(numbers)) == (low, high)


def test_a_draw_number_is_mostly_uniform_and_otherwise_an_end_or_an_integer():
    generator = np.random.default_rng(0)
    numbers = np.array([draw_number(generator, -1.5, 2.0) for _ in range(4000)])
    special = np.isin(numbers, [-1.5, -1.0, 0.0, 1.0, 2.0])
    # 5 standard deviations of a share of one in five.
    assert abs(special.mean() - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 4000)
    assert set(numbers[special]) == {-1.5, -1.0, 0.0, 1.0, 2.0}
    assert stats.kstest(numbers[~special], stats.uniform(-1.5, 3.5).cdf).pvalue > 1e-6


def test_kinds_have_the_geometry_they_name():
    cases = {kind: make_case(SHAPE, kind, 0, extremity=1.0) for kind in KINDS}
    assert len(np.unique(cases["ties"].embeddings, axis=0)) <= 2
    gaps = np.linalg.norm(cases["near-duplicates"].embeddings[:, None] - cases["near-duplicates"].embeddings, axis=-1)
    assert ((gaps > 0) & (gaps < 1e-6)).any()
    assert np.linalg.matrix_rank(cases["collinear"].embeddings) == 1
    assert np.abs(cases["offset"].embeddings.mean(axis=0)).max() > 100
    assert np.abs(cases["large"].embeddings).max() > 1e5
    assert np.abs(cases["small"].embeddings).max() < 1e-5

    def logits(case: Case) -> Any:
        return np.einsum("sa,hab,ib->his", case.embeddings, case.interaction, case.embeddings)

    sharp = logits(cases["sharp"])
    assert np.exp(sharp - sharp.max(axis=-1, keepdims=True)).min() == 0
    assert np.abs(logits(make_case(SHAPE, HUGE_LOGITS, 0, extremity=1.0))).max() > 1e18


def test_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="kind: got 'flat'; pass one of gaussian"):
        make_case(SHAPE, "flat", 0)

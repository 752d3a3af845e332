"""Attention problems as Hypothesis strategies.

A property stops at a failure and shrinks it, so `shrinking_cases` lets Hypothesis draw each number, and a failure
becomes a short sequence of simple numbers; `attention_cases` lets it draw what a check draws. All are built by the code
of theory_checks/drawn_cases.py.
"""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from theory_checks.drawn_cases import (
    EXTREMITIES,
    KINDS,
    SHAPES,
    STRENGTHS,
    Case,
    Shape,
    build_case,
    make_case,
    semidefinite_interaction,
)
from theory_checks.drawn_transformers import draw_weights

# What shrinks, smallest first: the shortest sequence, the shortest with a covariance, then values, width and heads. The
# values of these shapes are scaled by 1 or 1/2, so that their numbers stay short when printed. Hypothesis does not
# always find its way from a wide case to one on the line, so the main properties are tested on each by itself.
LINE_SHAPES: tuple[Shape, ...] = (Shape(1, 1, 1, 2, False), Shape(1, 1, 1, 3, False), Shape(1, 1, 1, 3, True))
WIDE_SHAPES: tuple[Shape, ...] = (
    Shape(1, 1, 2, 3, False),
    Shape(2, 1, 2, 3, True),
    Shape(2, 2, 2, 3, True),
    Shape(1, 2, 3, 4, False),
)

# Examples on the line that properties share: no covariance yet, det J = 0, and det J < 0.
ONE = [[[1.0]]]
SECOND_POSITION = Case.given(ONE, ONE, None, [[1.0], [2.0]])
ON_THE_BOUNDARY = Case.given(ONE, ONE, None, [[-1.0], [1.0], [0.0]])
PAST_THE_BOUNDARY = Case.given([[[4.0]]], ONE, None, [[-1.0], [1.0], [0.3], [0.0]])

# Multiples of 1/4 are exact in float32 and float64 and short when printed; 0 is the simplest of them.
SIMPLE_NUMBERS = st.integers(-12, 12).map(lambda quarters: quarters / 4)


@dataclass(frozen=True)
class _SimpleNumbers:
    """Simple numbers in the place of normal ones, drawn one by one by Hypothesis, so that each shrinks."""

    draw: st.DrawFn
    elements: st.SearchStrategy[float] = SIMPLE_NUMBERS

    def normal(self, *, size):
        return self.draw(arrays(np.float64, size, elements=self.elements, fill=st.nothing()))

    def integers(self, low, high, *, size):
        return self.draw(arrays(np.int64, size, elements=st.integers(low, high - 1), fill=st.nothing()))


@st.composite
def shrinking_cases(draw, shapes=LINE_SHAPES + WIDE_SHAPES, kinds=KINDS):
    """Cases in float64 that shrink to the first of the shapes and kinds, and to numbers near 0."""
    shape, kind = draw(st.sampled_from(shapes)), draw(st.sampled_from(kinds))
    return build_case(_SimpleNumbers(draw), shape, kind, None, 1.0, 0.5, np.float64)


@st.composite
def safe_cases(draw, shapes, attended=SIMPLE_NUMBERS):
    """Cases with det J > 0 at every embedding: A + A^T negative semidefinite, or with values d = 1 and a_h v_h <= 0.

    `attended` gives the numbers of embeddings and values.
    """
    shape, numbers = draw(st.sampled_from(shapes)), _SimpleNumbers(draw)
    tokens = _SimpleNumbers(draw, attended)
    embeddings = tokens.normal(size=(shape.length, shape.width))
    if not shape.with_values:
        interaction = semidefinite_interaction(numbers, shape.width)
        query = np.sqrt(shape.width) * interaction
        return Case.given(query[None], np.eye(shape.width)[None], None, embeddings)
    query, size = numbers.normal(size=(2, shape.heads, 1, 1))
    value = tokens.normal(size=(shape.heads, 1, 1))
    return Case.given(query, -np.sign(query * value) * np.abs(size), value, embeddings)


@st.composite
def shrinking_weights(draw, config):
    """Weights of a transformer of these sizes, by site, made of simple numbers."""
    return draw_weights(_SimpleNumbers(draw), config, 1.0)


def attention_cases(dtype=np.float64, kinds=KINDS, shapes=SHAPES):
    """Cases of the given dtype, geometry kinds and shapes, all drawn independently."""
    return st.builds(
        make_case,
        shape=st.sampled_from(shapes),
        kind=st.sampled_from(kinds),
        seed=st.integers(0, 2**32 - 1),
        strength=st.floats(*STRENGTHS),
        extremity=st.floats(*EXTREMITIES),
        dtype=st.just(dtype),
    )

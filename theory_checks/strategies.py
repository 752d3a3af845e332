"""Attention problems with friendly and adversarial geometry, as the checks draw them and as Hypothesis strategies.

Shapes come from a short fixed list, so that a comparison compiled once a shape serves every case of that shape.

A check draws thousands of cases and keeps the worst. Its draws are a function of its seed alone, so `drawn_cases` and
`drawn_problems` take them from a NumPy generator. A property stops at a failure and shrinks it, so `shrinking_cases`
lets Hypothesis draw each number, and a failure becomes a short sequence of simple numbers; `attention_cases` lets it
draw what `drawn_cases` draws. All build their cases by the same code, and the repr of a case rebuilds it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import ArrayLike, NDArray

from prob_transformer import Attention

Option = TypeVar("Option")


class Shape(NamedTuple):
    """H heads of size p on n embeddings of width d, with value maps or with identity values."""

    heads: int
    head_size: int
    width: int
    length: int
    with_values: bool


# d = 1, the shortest sequence, and Hp below, at and above d, each with and without values where H allows it.
SHAPES: tuple[Shape, ...] = (
    Shape(1, 1, 1, 4, False),
    Shape(2, 1, 1, 3, True),
    Shape(1, 2, 2, 2, False),
    Shape(1, 1, 2, 3, False),
    Shape(1, 2, 2, 5, False),
    Shape(1, 2, 2, 4, True),
    Shape(2, 1, 2, 3, True),
    Shape(2, 2, 2, 4, True),
    Shape(3, 1, 2, 5, True),
    Shape(3, 2, 2, 3, True),
    Shape(1, 1, 3, 6, False),
    Shape(1, 2, 3, 4, False),
    Shape(1, 3, 3, 5, True),
    Shape(1, 4, 3, 3, False),
    Shape(2, 1, 3, 4, True),
    Shape(2, 2, 3, 6, True),
    Shape(3, 2, 3, 4, True),
    Shape(1, 2, 4, 5, False),
    Shape(2, 1, 4, 6, True),
    Shape(3, 1, 4, 3, True),
)

# Two of them for quick plans: identity values, and several heads with values, both long enough for a covariance.
FEW_SHAPES: tuple[Shape, ...] = (Shape(1, 2, 2, 5, False), Shape(2, 2, 3, 6, True))

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

# Multiples of 1/4 are exact in float32 and float64 and short when printed; 0 is the simplest of them.
SIMPLE_NUMBERS = st.integers(-12, 12).map(lambda quarters: quarters / 4)

KINDS: tuple[str, ...] = (
    "gaussian",
    "ties",
    "near-duplicates",
    "collinear",
    "offset",
    "large",
    "small",
    "sharp",
)
# Logits of up to 1e18, of which one takes all the weight: their own rounding is far above any tolerance on numbers.
HUGE_LOGITS = "huge-logits"

# Ranges of the strength and extremity of a case.
_STRENGTHS, _EXTREMITIES = (0.1, 3.0), (0.0, 1.0)
# How often a number drawn from a range is one of its special values.
_SPECIAL_SHARE = 0.2


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """One attention problem as NumPy arrays of one dtype: query and key (H, p, d), value (H, d, d) or None, (n, d).

    `seed` is None where the numbers came from no generator; the repr then shows the arrays themselves.
    """

    shape: Shape
    kind: str
    seed: int | None
    strength: float
    extremity: float
    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any] | None
    embeddings: NDArray[Any]

    @classmethod
    def given(cls, query: ArrayLike, key: ArrayLike, value: ArrayLike | None, embeddings: ArrayLike) -> "Case":
        """The case with these arrays, in float64."""
        query, key, embeddings = (np.asarray(array, np.float64) for array in (query, key, embeddings))
        heads, head_size, width = query.shape
        shape = Shape(heads, head_size, width, len(embeddings), value is not None)
        value = None if value is None else np.asarray(value, np.float64)
        return cls(shape, "given", None, 1.0, 0.5, query, key, value, embeddings)

    @property
    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None, NDArray[Any]]:
        """Query, key, value and embeddings, the arguments of a compiled comparison."""
        return self.query, self.key, self.value, self.embeddings

    @property
    def attention(self) -> Attention:
        """The library's attention with these arrays."""
        value = None if self.value is None else jnp.asarray(self.value)
        return Attention(jnp.asarray(self.query), jnp.asarray(self.key), value)

    @property
    def interaction(self) -> NDArray[Any]:
        """A_h = W_K^T W_Q / sqrt(p), shape (H, d, d)."""
        return np.einsum("hpa,hpb->hab", self.key, self.query) / np.sqrt(self.shape.head_size)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        # What Hypothesis prints; without it every field would be shown.
        printer.text(repr(self))

    def __repr__(self) -> str:
        if self.seed is None:
            query, key, value, embeddings = (None if array is None else array.tolist() for array in self.arrays)
            return f"Case.given(query={query}, key={key}, value={value}, embeddings={embeddings})"
        return (
            f"make_case({self.shape!r}, {self.kind!r}, seed={self.seed}, strength={self.strength!r}, "
            f"extremity={self.extremity!r}, dtype=np.{self.query.dtype})"
        )


class _Numbers(Protocol):
    """Where the numbers of a case come from: a NumPy generator, or Hypothesis."""

    def normal(self, *, size: Any) -> NDArray[np.float64]: ...

    def integers(self, low: int, high: int, *, size: Any) -> NDArray[np.int64]: ...


@dataclass(frozen=True)
class _SimpleNumbers:
    """Simple numbers in the place of normal ones, drawn one by one by Hypothesis, so that each shrinks."""

    draw: st.DrawFn
    elements: st.SearchStrategy[float] = SIMPLE_NUMBERS

    def normal(self, *, size: Any) -> NDArray[np.float64]:
        return self.draw(arrays(np.float64, size, elements=self.elements, fill=st.nothing()))

    def integers(self, low: int, high: int, *, size: Any) -> NDArray[np.int64]:
        return self.draw(arrays(np.int64, size, elements=st.integers(low, high - 1), fill=st.nothing()))


def _geometry(
    numbers: _Numbers, kind: str, shape: Shape, extremity: float, single: bool
) -> tuple[NDArray[np.float64], float]:
    """Embeddings (n, d), and the factor on A that keeps their attention neither uniform nor one-hot."""
    points = numbers.normal(size=(shape.length, shape.width))
    if kind == "ties":
        return points[numbers.integers(0, 2, size=shape.length)], 1.0
    if kind == "near-duplicates":
        copies = points[numbers.integers(0, 2, size=shape.length)]
        return copies + 10.0 ** (-2 - 6 * extremity) * points, 1.0
    if kind == "collinear":
        return np.outer(points[:, 0], numbers.normal(size=shape.width)), 1.0
    if kind == "offset":
        distance = 10.0 ** (1 + extremity * (0.5 if single else 2))
        return points + distance * numbers.normal(size=shape.width) / np.sqrt(shape.width), distance**-0.5
    if kind in ("large", "small"):
        scale = 10.0 ** ((2 + 4 * extremity) * (1 if kind == "large" else -1))
        return scale * points, scale**-2.0
    if kind == "sharp":
        # Logits of hundreds: most weights underflow to zero, and ties share what is left.
        return points[numbers.integers(0, shape.length, size=shape.length)], 10.0 ** (1 + 2 * extremity)
    return points, 10.0 ** (6 + 12 * extremity) if kind == HUGE_LOGITS else 1.0


def _build(
    numbers: _Numbers, shape: Shape, kind: str, seed: int | None, strength: float, extremity: float, dtype: Any
) -> Case:
    single = np.dtype(dtype) == np.float32
    embeddings, factor = _geometry(numbers, kind, shape, extremity, single)
    heads, head_size, width = shape.heads, shape.head_size, shape.width
    scale = np.sqrt(strength * factor)
    query = scale * numbers.normal(size=(heads, head_size, width))
    key = scale * numbers.normal(size=(heads, head_size, width))
    value = numbers.normal(size=(heads, width, width)) / np.sqrt(width * heads) if shape.with_values else None
    return Case(
        shape,
        kind,
        seed,
        strength,
        extremity,
        query.astype(dtype),
        key.astype(dtype),
        None if value is None else value.astype(dtype),
        embeddings.astype(dtype),
    )


def make_case(
    shape: Shape, kind: str, seed: int, strength: float = 1.0, extremity: float = 0.5, dtype: Any = np.float64
) -> Case:
    """The case with these drawn numbers; `strength` scales A, `extremity` in [0, 1] how far the geometry goes."""
    kinds = (*KINDS, HUGE_LOGITS)
    if kind not in kinds:
        raise ValueError(f"kind: got {kind!r}; pass one of {', '.join(kinds)}.")
    return _build(np.random.default_rng(seed), shape, kind, seed, strength, extremity, dtype)


@st.composite
def shrinking_cases(
    draw: st.DrawFn, shapes: tuple[Shape, ...] = LINE_SHAPES + WIDE_SHAPES, kinds: tuple[str, ...] = KINDS
) -> Case:
    """Cases in float64 that shrink to the first of the shapes and kinds, and to numbers near 0."""
    shape, kind = draw(st.sampled_from(shapes)), draw(st.sampled_from(kinds))
    return _build(_SimpleNumbers(draw), shape, kind, None, 1.0, 0.5, np.float64)


def semidefinite_interaction(numbers: _Numbers, width: int) -> NDArray[np.float64]:
    """A (d, d), an antisymmetric matrix minus a positive semidefinite one: A + A^T is negative semidefinite."""
    factor, turn = numbers.normal(size=(2, width, width))
    factor = factor[:, : numbers.integers(1, width + 1, size=())]
    return turn - turn.T - factor @ factor.T


@st.composite
def safe_cases(draw: st.DrawFn, shapes: tuple[Shape, ...], attended: st.SearchStrategy[float] = SIMPLE_NUMBERS) -> Case:
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


def attention_cases(
    dtype: Any = np.float64, kinds: tuple[str, ...] = KINDS, shapes: tuple[Shape, ...] = SHAPES
) -> st.SearchStrategy[Case]:
    """Cases of the given dtype, geometry kinds and shapes, all drawn independently."""
    return st.builds(
        make_case,
        shape=st.sampled_from(shapes),
        kind=st.sampled_from(kinds),
        seed=st.integers(0, 2**32 - 1),
        strength=st.floats(*_STRENGTHS),
        extremity=st.floats(*_EXTREMITIES),
        dtype=st.just(dtype),
    )


def drawn_option(generator: np.random.Generator, options: Sequence[Option]) -> Option:
    """One of the options, each as likely as the others."""
    return options[int(generator.integers(len(options)))]


def drawn_number(generator: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high]: mostly uniform, and in one draw of five an end or an integer between the ends."""
    if generator.random() < _SPECIAL_SHARE:
        return float(drawn_option(generator, (low, high, *range(math.ceil(low), math.floor(high) + 1))))
    return float(generator.uniform(low, high))


def drawn_seed(generator: np.random.Generator) -> int:
    """The seed of the numbers of one case."""
    return int(generator.integers(2**31))


def drawn_cases(
    dtype: Any = np.float64, kinds: tuple[str, ...] = KINDS, shapes: tuple[Shape, ...] = SHAPES
) -> Callable[[np.random.Generator], Case]:
    """What draws a case of the given dtype, geometry kinds and shapes, all independently."""

    def draw(generator: np.random.Generator) -> Case:
        return make_case(
            *_problem(generator, shapes, kinds),
            strength=drawn_number(generator, *_STRENGTHS),
            extremity=drawn_number(generator, *_EXTREMITIES),
            dtype=dtype,
        )

    return draw


def drawn_problems(
    shapes: tuple[Shape, ...], kinds: tuple[str, ...], low: float, high: float
) -> Callable[[np.random.Generator], tuple[Shape, str, int, float]]:
    """What draws a shape, a kind, a seed and a number in [low, high]."""

    def draw(generator: np.random.Generator) -> tuple[Shape, str, int, float]:
        return *_problem(generator, shapes, kinds), drawn_number(generator, low, high)

    return draw


def _problem(
    generator: np.random.Generator, shapes: tuple[Shape, ...], kinds: tuple[str, ...]
) -> tuple[Shape, str, int]:
    return drawn_option(generator, shapes), drawn_option(generator, kinds), drawn_seed(generator)

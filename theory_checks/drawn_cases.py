"""Attention problems with friendly and adversarial geometry, as the checks draw them.

Shapes come from a short fixed list, so that a comparison compiled once a shape serves every case of that shape.

A check draws thousands of cases and keeps the worst. Its draws are a function of its seed alone, so `draw_case` and
`draw_problem` take them from a NumPy generator. The repr of a case rebuilds it. `numbers` in `build_case` is such a
generator, or what draws simpler numbers in its place (tests/helpers/shrinking_cases.py).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from prob_transformer import Attention

Array = NDArray[np.float64]
Option = TypeVar("Option")
Drawn = TypeVar("Drawn")


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
# Those with embeddings and logits of order one.
MODERATE_KINDS = KINDS[:4]
# Logits of up to 1e18, of which one takes all the weight: their own rounding is far above any tolerance on numbers.
HUGE_LOGITS = "huge-logits"

# Ranges of the strength and extremity of a case.
STRENGTHS, EXTREMITIES = (0.1, 3.0), (0.0, 1.0)
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


def _geometry(
    numbers: Any, kind: str, shape: Shape, extremity: float, single: bool
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


def build_case(
    numbers: Any, shape: Shape, kind: str, seed: int | None, strength: float, extremity: float, dtype: Any
) -> Case:
    """The case whose normal numbers and integers are drawn from `numbers`; `seed` is None unless one made them."""
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
    # Not by `require_choice`: where types are checked at run time, it reads a random element of what is allowed, which
    # Hypothesis forbids inside a strategy.
    if kind not in kinds:
        raise ValueError(f"kind: got {kind!r}; pass one of {', '.join(kinds)}.")
    return build_case(np.random.default_rng(seed), shape, kind, seed, strength, extremity, dtype)


def semidefinite_interaction(numbers: Any, width: int) -> NDArray[np.float64]:
    """A (d, d), an antisymmetric matrix minus a positive semidefinite one: A + A^T is negative semidefinite."""
    factor, turn = numbers.normal(size=(2, width, width))
    factor = factor[:, : numbers.integers(1, width + 1, size=())]
    return turn - turn.T - factor @ factor.T


def draw_option(generator: np.random.Generator, options: Sequence[Option]) -> Option:
    """One of the options, each as likely as the others."""
    return options[int(generator.integers(len(options)))]


def draw_number(generator: np.random.Generator, low: float, high: float) -> float:
    """A number in [low, high]: mostly uniform, and in one draw of five an end or an integer between the ends."""
    if generator.random() < _SPECIAL_SHARE:
        return float(draw_option(generator, (low, high, *range(math.ceil(low), math.floor(high) + 1))))
    return float(generator.uniform(low, high))


def draw_seed(generator: np.random.Generator) -> int:
    """The seed of the numbers of one case."""
    return int(generator.integers(2**31))


def draw_problem(
    generator: np.random.Generator, shapes: Sequence[Shape], kinds: Sequence[str], low: float, high: float
) -> tuple[Shape, str, int, float]:
    """A shape, a kind, a seed and a number in [low, high], all independently."""
    shape, kind, seed = draw_option(generator, shapes), draw_option(generator, kinds), draw_seed(generator)
    return shape, kind, seed, draw_number(generator, low, high)


def draw_case(
    generator: np.random.Generator,
    dtype: Any = np.float64,
    kinds: Sequence[str] = KINDS,
    shapes: Sequence[Shape] = SHAPES,
) -> Case:
    """A case of the given dtype, one of the geometry kinds and one of the shapes, all independently."""
    shape, kind, seed, strength = draw_problem(generator, shapes, kinds, *STRENGTHS)
    return make_case(shape, kind, seed, strength, draw_number(generator, *EXTREMITIES), dtype)


def drawn(draw: Callable[..., Drawn], count: int, seed: int, **options: Any) -> Iterator[Drawn]:
    """The first `count` cases that `draw(generator, **options)` takes from the generator of this seed.

    Hypothesis would also try constants of the modules that are loaded, so the cases would depend on them. Nothing is
    shrunk: a check records its worst case and is judged by it, rather than stopping at the first failure.
    """
    generator = np.random.default_rng(seed)
    return (draw(generator, **options) for _ in range(count))

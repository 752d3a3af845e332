"""Hypothesis strategies for attention problems with friendly and adversarial geometry, shared with the tests.

Shapes come from a short fixed list, so that a comparison compiled once a shape serves every case of that shape.
Numbers come from a NumPy generator with a drawn seed: a case is reproduced by `make_case` from what its repr shows.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from prob_transformer import Attention


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


@dataclass(frozen=True, eq=False, repr=False)
class Case:
    """One attention problem as NumPy arrays of one dtype: query and key (H, p, d), value (H, d, d) or None, (n, d)."""

    shape: Shape
    kind: str
    seed: int
    strength: float
    extremity: float
    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any] | None
    embeddings: NDArray[Any]

    @property
    def attention(self) -> Attention:
        """The library's attention with these arrays."""
        value = None if self.value is None else jnp.asarray(self.value)
        return Attention(jnp.asarray(self.query), jnp.asarray(self.key), value)

    @property
    def interaction(self) -> NDArray[Any]:
        """A_h = W_K^T W_Q / sqrt(p), shape (H, d, d)."""
        return np.einsum("hpa,hpb->hab", self.key, self.query) / np.sqrt(self.shape.head_size)

    def __repr__(self) -> str:
        return (
            f"make_case({self.shape!r}, {self.kind!r}, seed={self.seed}, strength={self.strength!r}, "
            f"extremity={self.extremity!r}, dtype=np.{self.query.dtype})"
        )


def _geometry(
    rng: np.random.Generator, kind: str, shape: Shape, extremity: float, single: bool
) -> tuple[NDArray[np.float64], float]:
    """Embeddings (n, d), and the factor on A that keeps their attention neither uniform nor one-hot."""
    points = rng.normal(size=(shape.length, shape.width))
    if kind == "ties":
        return points[rng.integers(0, 2, size=shape.length)], 1.0
    if kind == "near-duplicates":
        copies = points[rng.integers(0, 2, size=shape.length)]
        return copies + 10.0 ** (-2 - 6 * extremity) * points, 1.0
    if kind == "collinear":
        return np.outer(points[:, 0], rng.normal(size=shape.width)), 1.0
    if kind == "offset":
        distance = 10.0 ** (1 + extremity * (0.5 if single else 2))
        return points + distance * rng.normal(size=shape.width) / np.sqrt(shape.width), distance**-0.5
    if kind in ("large", "small"):
        scale = 10.0 ** ((2 + 4 * extremity) * (1 if kind == "large" else -1))
        return scale * points, scale**-2.0
    if kind == "sharp":
        # Logits of hundreds: most weights underflow to zero, and ties share what is left.
        return points[rng.integers(0, shape.length, size=shape.length)], 10.0 ** (1 + 2 * extremity)
    return points, 1.0


def make_case(
    shape: Shape, kind: str, seed: int, strength: float = 1.0, extremity: float = 0.5, dtype: Any = np.float64
) -> Case:
    """The case with these drawn numbers; `strength` scales A, `extremity` in [0, 1] how far the geometry goes."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}; pass one of {', '.join(KINDS)}.")
    rng = np.random.default_rng(seed)
    single = np.dtype(dtype) == np.float32
    embeddings, factor = _geometry(rng, kind, shape, extremity, single)
    heads, head_size, width = shape.heads, shape.head_size, shape.width
    scale = np.sqrt(strength * factor)
    query = scale * rng.normal(size=(heads, head_size, width))
    key = scale * rng.normal(size=(heads, head_size, width))
    value = rng.normal(size=(heads, width, width)) / np.sqrt(width * heads) if shape.with_values else None
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


def attention_cases(
    dtype: Any = np.float64, kinds: tuple[str, ...] = KINDS, shapes: tuple[Shape, ...] = SHAPES
) -> st.SearchStrategy[Case]:
    """Cases of the given dtype, geometry kinds and shapes, all drawn independently."""
    return st.builds(
        make_case,
        shape=st.sampled_from(shapes),
        kind=st.sampled_from(kinds),
        seed=st.integers(0, 2**32 - 1),
        strength=st.floats(0.1, 3.0),
        extremity=st.floats(0.0, 1.0),
        dtype=st.just(dtype),
    )

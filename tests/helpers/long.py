"""Attention problems long enough to be cut into several blocks and chunks, for the tests of the kernels."""

import numpy as np

from prob_transformer import Attention
from prob_transformer.kernels.tiling import Tiling

# heads, head size, width, length, own values; the lengths fall between, on and beyond the ends of blocks and chunks
SHAPES = [
    (1, 1, 1, 33, False),
    (1, 3, 2, 40, False),
    (1, 4, 5, 16, True),
    (2, 3, 4, 37, True),
    (3, 2, 7, 25, True),
]

TILINGS = [Tiling(8, 8), Tiling(8, 16), Tiling(16, 32)]


def draw(seed, shape, dtype=np.float64, scale=1.0, batch=()):
    """An attention and embeddings (*batch, n, d) whose log-determinants are neither near zero nor ill conditioned."""
    heads, size, width, length, own_values = shape
    rng = np.random.default_rng([seed, *shape])
    query, key = (rng.normal(size=(heads, size, width)) * scale / np.sqrt(width) for _ in range(2))
    value = rng.normal(size=(heads, width, width)) * 0.5 / np.sqrt(width) if own_values else None
    arrays = [None if x is None else x.astype(dtype) for x in (query, key, value)]
    return Attention(*arrays), rng.normal(size=(*batch, length, width)).astype(dtype)

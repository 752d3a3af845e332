"""What is measured: the sizes of all sections, full and quick, and the queries and keys drawn for them."""

import math
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

SMALLEST_ROUNDS = 7


class Sizes(NamedTuple):
    """Sizes of a whole run; a result is a function of these, the code and the machine.

    `_asdict()` is ready for JSON, and `Sizes(**...)` of it gives them back.
    """

    seed: int = 0
    rounds: int = SMALLEST_ROUNDS
    # One kernel call: sequences x heads, each head alone; the queries and keys of a model of width heads * head_size.
    sequences: int = 8
    heads: int = 4
    head_size: int = 32
    length: int = 256
    # The training step: a character model of the same heads.
    batch: int = 8
    layers: int = 4
    vocabulary: int = 96
    # Time and memory against the length, one sequence of `heads` heads; agreement there at some positions.
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    positions: int = 64
    # A subsampled barrier, and how many of its estimates are compared with the exact mean.
    share: float = 1 / 8
    draws: int = 16
    memory_steps: int = 2
    matmul: int = 2048

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @property
    def cells(self) -> int:
        return self.sequences * self.heads


QUICK = Sizes(
    sequences=2,
    heads=2,
    head_size=4,
    length=16,
    batch=2,
    layers=1,
    lengths=(16, 32, 64, 128),
    positions=8,
    share=1 / 2,
    draws=4,
    memory_steps=1,
    matmul=64,
)


def sizes_for(quick: bool, seed: int, rounds: int) -> Sizes:
    """The sizes of a run on this machine: a GPU needs a larger product of matrices to show its speed."""
    whole = Sizes() if jax.default_backend() == "cpu" else Sizes(matmul=8192)
    return (QUICK if quick else whole)._replace(seed=seed, rounds=rounds)


def draw_cells(
    sizes: Sizes, sequences: int, length: int, scale: float = 1.0
) -> tuple[Float[np.ndarray, "c p n"], Float[np.ndarray, "c p n"]]:
    """Queries and keys, float32, of all heads of a model on normal inputs (sequences, n, d).

    The weights of a head are normal with deviation scale / sqrt(d), as at the start of training for scale = 1.
    """
    rng = np.random.default_rng([sizes.seed, sequences, length])
    inputs = rng.normal(size=(sequences, length, sizes.width))
    shape = (sizes.heads, sizes.head_size, sizes.width)
    query, key = (scale / math.sqrt(sizes.width) * rng.normal(size=shape) for _ in range(2))

    def projected(weights: Float[np.ndarray, "H p d"]) -> Float[np.ndarray, "c p n"]:
        heads = np.einsum("hpd,snd->shpn", weights, inputs)
        return heads.reshape(-1, sizes.head_size, length).astype(np.float32)

    return projected(query), projected(key)

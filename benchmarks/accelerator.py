"""The blocked kernels on an accelerator: `python -m benchmarks.accelerator --out FILE [--seconds S] [--tiny]`.

Agreement with the float64 reference, time and rate of the mean barrier with its gradient over head sizes, lengths and
types of products, the training step of the character GPT with and without it, and peak memory. It needs JAX, NumPyro,
Equinox, optax and jaxtyping, and nothing else of this project's packages.

FILE is written anew after every row, to a temporary name that is then renamed: whatever stops the command, it holds
what was measured until then. Rows that no time is left for are named in "left_out".
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from tqdm import tqdm

from benchmarks.machine import machine, versions
from models.char_gpt.config import Config
from models.char_gpt.loss import loss_terms
from models.char_gpt.model import CharGPT
from prob_transformer import Attention, residual_and_log_det
from prob_transformer.files import provenance, write_json
from prob_transformer.kernels.barrier import mean_barrier
from prob_transformer.kernels.cells import DEFAULT_TILING, Cells

SECONDS = 450.0
SEED = 0


class Sizes(NamedTuple):
    """What is measured; `positions` bounds cells times length of one call."""

    head_sizes: tuple[int, ...] = (16, 32, 64, 128)
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    positions: int = 32768
    matmul: int = 8192
    repeats: int = 5
    model: tuple[tuple[str, int], ...] = (("layers", 6), ("width", 384), ("heads", 6), ("context", 256), ("batch", 64))


TINY = Sizes((8,), (16, 32), 64, 64, 2, (("layers", 1), ("width", 16), ("heads", 2), ("context", 16), ("batch", 2)))


def seconds_of(function: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of every call after one that compiles."""
    jax.block_until_ready(function())
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function())
        found.append(time.perf_counter() - started)
    return found


def peak_bytes() -> int | None:
    """The most that the device has held since it started, where it says so."""
    statistics_of_memory = jax.devices()[0].memory_stats()
    return None if statistics_of_memory is None else statistics_of_memory.get("peak_bytes_in_use")


def cells_of(count: int, size: int, length: int) -> Cells:
    """Heads with identity values and logits of order one."""
    queries, keys = jax.random.normal(jax.random.key(SEED), (2, count, 1, size, length), jnp.float32)
    scaled = queries / math.sqrt(size)
    return Cells(scaled, keys, scaled)


@jax.jit
def _reference(cells: Cells) -> tuple[Float[Array, "c n"], Cells]:
    """log|det J_i| by the reference, and the gradient of its sum, through embeddings that hold queries and keys."""
    _, _, size, _ = cells.keys.shape
    eye, nothing = jnp.eye(size, dtype=cells.keys.dtype), jnp.zeros((size, size), cells.keys.dtype)
    attention = Attention(jnp.concatenate([eye, nothing], 1)[None], jnp.concatenate([nothing, eye], 1)[None], scale=1.0)

    def total(cells: Cells) -> tuple[Float[Array, ""], Float[Array, "c n"]]:
        embeddings = jnp.concatenate([cells.queries, cells.keys], 2)[:, 0]
        found = residual_and_log_det(attention, jnp.swapaxes(embeddings, 1, 2)).log_det
        return found.sum(), found

    gradient, log_det = jax.grad(total, has_aux=True)(cells)
    return log_det, gradient


def agreement(size: int, length: int, narrow: str | None) -> dict[str, Any]:
    """Errors of mean barrier and gradient in float32, relative to the float64 reference on the same device."""
    cells = cells_of(2, size, length)
    tiling = DEFAULT_TILING._replace(product_dtype=narrow)
    value, gradient = jax.jit(jax.value_and_grad(lambda cells: mean_barrier(cells, tiling).mean))(cells)
    with jax.enable_x64(True):
        log_det, exact = _reference(jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), cells))
    count = log_det.size
    # The reference sees a query and its feature as one.
    parts = ((gradient.queries + gradient.features, exact.queries), (gradient.keys, exact.keys))
    errors = [np.abs(np.asarray(a) + np.asarray(b) / count).max() / np.abs(b / count).max() for a, b in parts]
    return {"value": abs(float(value) / -float(log_det.mean()) - 1), "gradient": float(max(errors))}


def kernel(size: int, length: int, narrow: str | None, sizes: Sizes, peak: float) -> dict[str, Any]:
    """Time of the mean barrier with its gradient, and the rate of its three large products."""
    count = max(1, sizes.positions // length)
    cells = cells_of(count, size, length)
    tiling = DEFAULT_TILING._replace(product_dtype=narrow)
    step = jax.jit(jax.value_and_grad(lambda cells: mean_barrier(cells, tiling).mean))
    seconds = seconds_of(lambda: step(cells), sizes.repeats)
    operations = 3 * count * length**2 * size**2
    rate = operations / statistics.median(seconds)
    return {"cells": count, "seconds": seconds, "operations_a_second": rate, "share_of_matmul": rate / peak}


def matmul_rate(size: int, dtype: str, repeats: int) -> float:
    """Operations a second of one product of two size x size matrices."""
    left, right = jax.random.normal(jax.random.key(SEED), (2, size, size), dtype)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return 2 * size**3 / statistics.median(seconds_of(lambda: product(left, right), repeats))


def training_step(barrier: bool, narrow: bool, sizes: Sizes) -> dict[str, Any]:
    """Seconds of a step of Adam on drawn characters, with or without the barrier on every layer and head."""
    asked: dict[str, Any] = dict(sizes.model)
    if barrier:
        asked |= {"objective": "margin", "implementation": "blocked", "barrier_site": "layers"}
    config = Config(**asked, product_dtype="bfloat16" if barrier and narrow else "float32")
    model = CharGPT(jax.random.key(SEED), config, 96)
    optimiser = optax.adam(1e-3)
    state = optimiser.init(model)
    shape = (config.batch, config.context + 1)
    windows = jax.random.randint(jax.random.key(1), shape, 0, 96)

    @jax.jit
    def step(model: CharGPT, state: optax.OptState) -> tuple[CharGPT, optax.OptState]:
        gradient = jax.grad(lambda model: loss_terms(model, windows, config, 10**6, jax.random.key(2)).loss)(model)
        change, state = optimiser.update(gradient, state)
        return optax.apply_updates(model, change), state

    return {"seconds": seconds_of(lambda: step(model, state), sizes.repeats)}


Row = tuple[dict[str, Any], Callable[[], dict[str, Any]]]


def rows(sizes: Sizes) -> Iterator[Row]:
    """What is measured, in the order of its worth, and how: products in float32 before bfloat16."""
    products: dict[str, str | None] = {"float32": None, "bfloat16": "bfloat16"}
    shortest = sizes.lengths[0]
    for name, narrow in products.items():
        for size in sizes.head_sizes:
            of_row = {"row": "agreement", "head_size": size, "length": shortest, "products": name}
            yield of_row, partial(agreement, size, shortest, narrow)
    peaks: dict[str, float] = {}

    def peak(name: str) -> dict[str, Any]:
        peaks[name] = matmul_rate(sizes.matmul, name, sizes.repeats)
        return {"operations_a_second": peaks[name]}

    def share(size: int, length: int, name: str) -> dict[str, Any]:
        return kernel(size, length, products[name], sizes, peaks[name])

    for name in products:
        yield {"row": "matmul", "products": name}, partial(peak, name)
    for barrier, name in ((False, "float32"), (True, "float32"), (True, "bfloat16")):
        of_row = {"row": "training-step", "barrier": barrier, "products": name}
        yield of_row, partial(training_step, barrier, name == "bfloat16", sizes)
    for length in sizes.lengths:
        for name in products:
            for size in sizes.head_sizes:
                of_row = {"row": "kernel", "head_size": size, "length": length, "products": name}
                yield of_row, partial(share, size, length, name)


def run(out: Path, seconds: float, sizes: Sizes) -> dict[str, Any]:
    """Measure row after row until the time is over, writing the result after each."""
    started = time.perf_counter()
    result: dict[str, Any] = {
        "provenance": provenance(SEED, {"seconds": seconds, "sizes": sizes._asdict()}),
        "machine": machine(),
        "versions": versions(),
        "rows": [],
        "left_out": [],
    }
    plan = list(rows(sizes))
    for of_row, measure in tqdm(plan, desc="accelerator", unit="row", mininterval=1):
        if time.perf_counter() - started > seconds:
            result["left_out"].append(of_row)
            continue
        try:
            found = measure()
        except jax.errors.JaxRuntimeError as error:
            found = {"error": str(error).splitlines()[0]}
        result["rows"].append(of_row | found | {"peak_bytes": peak_bytes()})
        write_json(out, result)
    write_json(out, result)
    return result


def main(arguments: list[str] | None = None) -> int:
    """Exit status of a run with these command-line arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description="The kernels on a GPU.")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="begin no row after them (default: %(default)g)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that everything runs, and no more")
    options = parser.parse_args(arguments)
    if not options.seconds > 0:
        parser.error(f"argument --seconds: got {options.seconds}; pass a number greater than 0")
    result = run(options.out, options.seconds, TINY if options.tiny else Sizes())
    print(f"{len(result['rows'])} rows in {options.out}; {len(result['left_out'])} left out for want of time")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

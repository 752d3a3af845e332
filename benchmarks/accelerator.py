"""The blocked kernels on an accelerator: `python -m benchmarks.accelerator --out FILE [--seconds S] [--tiny]`.

Agreement with the float64 reference, time and rate of the mean barrier with its gradient over head sizes, lengths and
types of products, the training step of the character GPT with and without it, and peak memory. It needs JAX, NumPyro,
Equinox, optax and jaxtyping, and nothing else of this project's packages.

FILE is written anew after every row, to a temporary name that is then renamed: whatever stops the command, it holds
what was measured until then. Rows that no time is left for are named in "left_out".
"""

import argparse
import statistics
import time
import timeit
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

from benchmarks.agreement import gradient_error, reference
from benchmarks.contestants import fast_mean
from benchmarks.kernel_time import operations
from benchmarks.result_file import device_peak, machine, versions
from benchmarks.timing import matmul
from models.char_gpt.config import Config
from models.char_gpt.loss import loss_terms
from prob_transformer.files import provenance, write_json
from prob_transformer.kernels.tiling import DEFAULT_TILING
from prob_transformer.transformer.network import Transformer

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
    return timeit.repeat(lambda: jax.block_until_ready(function()), number=1, repeat=repeats)


def heads(count: int, size: int, length: int) -> Float[Array, "2 c p n"]:
    """Queries and keys of heads with identity values and logits of order one."""
    return jax.random.normal(jax.random.key(SEED), (2, count, size, length), jnp.float32)


def _mean_and_gradient(narrow: str | None) -> Callable[..., Any]:
    tiling = DEFAULT_TILING._replace(product_dtype=narrow)
    return jax.jit(jax.value_and_grad(partial(fast_mean, tiling=tiling), (0, 1)))


def agreement(size: int, length: int, narrow: str | None) -> dict[str, Any]:
    """Errors of mean barrier and gradient in float32, relative to the float64 reference on the same device."""
    queries, keys = heads(2, size, length)
    value, gradient = _mean_and_gradient(narrow)(queries, keys)
    _, (exact, exact_gradient) = reference(np.asarray(queries), np.asarray(keys))
    errors = [gradient_error([found], [true]) for found, true in zip(gradient, exact_gradient, strict=True)]
    return {"value": abs(float(value) / float(exact) - 1), "gradient": max(errors)}


def kernel(size: int, length: int, narrow: str | None, sizes: Sizes, peak: float) -> dict[str, Any]:
    """Time of the mean barrier with its gradient, and the rate of its three large products."""
    count = max(1, sizes.positions // length)
    step = partial(_mean_and_gradient(narrow), *heads(count, size, length))
    seconds = seconds_of(step, sizes.repeats)
    rate = operations(count, length, size) / statistics.median(seconds)
    return {"cells": count, "seconds": seconds, "operations_a_second": rate, "share_of_matmul": rate / peak}


def training_step(barrier: bool, narrow: bool, sizes: Sizes) -> dict[str, Any]:
    """Seconds of a step of Adam on drawn characters, with or without the barrier on every layer and head."""
    asked = dict[str, Any](sizes.model)
    if barrier:
        asked |= {"objective": "margin", "implementation": "blocked", "barrier_site": "layers"}
    config = Config(**asked, product_dtype="bfloat16" if barrier and narrow else "float32")
    model, optimiser = Transformer(jax.random.key(SEED), config.transformer(96)), optax.adam(1e-3)
    state = optimiser.init(model)
    windows = jax.random.randint(jax.random.key(1), (config.batch, config.context + 1), 0, 96)

    @jax.jit
    def step(model: Transformer, state: optax.OptState) -> tuple[Transformer, optax.OptState]:
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
        seconds = seconds_of(matmul(sizes.matmul, name), sizes.repeats)
        peaks[name] = 2 * sizes.matmul**3 / statistics.median(seconds)
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
        result["rows"].append(of_row | found | {"peak_bytes": device_peak()})
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

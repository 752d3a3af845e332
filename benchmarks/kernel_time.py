"""Sections "kernel" and "scaling": the time of the mean barrier with its gradient, and how it grows with the length."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.agreement import TOLERANCE, gradient_error, log_det_error, reference_at
from benchmarks.contestants import (
    AUTODIFF,
    BFLOAT16,
    CLOSED_FORM,
    FAST,
    NARROW,
    TORCH,
    Contestant,
    autodiff,
    by_torch,
    closed_form,
    fast,
    side_by_side,
    subsampled,
)
from benchmarks.problem_sizes import Sizes, draw_cells
from benchmarks.result_file import cores
from benchmarks.result_tables import Column, Section, at_least, at_most
from benchmarks.timing import matmul, paired_rounds, ratio, spread
from prob_transformer.kernels import blocked

MATMUL, NARROW_MATMUL = "the machine's product of matrices", "the machine's product of bfloat16 matrices"
# The rate that a contestant is held against: that of its own large products.
RATE_OF = {FAST: MATMUL, BFLOAT16: NARROW_MATMUL}
# A Jacobian by autodiff needs about 0.2 GB a cell at n = 256 and p = 32: one sequence is enough for a time a cell.
JACOBIAN_SEQUENCES = 1
# Largest deviation from time proportional to n^2.
MOST_DEVIATION = 0.25


def operations(cells: int, length: int, size: int) -> float:
    """Three products of n^2 / 2 weights (the causal half) with p^2 outer products or as many numbers, for each cell."""
    return 3.0 * cells * (length**2 / 2) * size**2 * 2


def _median(rows: list[dict[str, Any]], name: str, key: str) -> float | None:
    row = next(row for row in rows if row["name"] == name)
    return row[key]["median"] if key in row else None


def run_kernel(sizes: Sizes) -> dict[str, Any]:
    """Times, ratios to the fast path cell by cell, and shares of the rate of the machine's product of matrices."""
    everyone: list[Contestant] = [
        fast(),
        fast(NARROW, BFLOAT16),
        subsampled(sizes.share, sizes.seed),
        closed_form(),
        autodiff(),
        by_torch(cores()),
    ]
    sequences = {AUTODIFF: min(JACOBIAN_SEQUENCES, sizes.sequences)}
    cells = {one.name: sequences.get(one.name, sizes.sequences) * sizes.heads for one in everyone}
    runs = {MATMUL: matmul(sizes.matmul), NARROW_MATMUL: matmul(sizes.matmul, "bfloat16")}
    for one in everyone:
        if one.prepare is not None:
            runs[one.name] = one.prepare(*draw_cells(sizes, cells[one.name] // sizes.heads, sizes.length))
    seconds = paired_rounds(runs, sizes.rounds, "kernel")

    rows: list[dict[str, Any]] = []
    for one in everyone:
        if one.missing is not None:
            rows.append({"name": one.name, "missing": one.missing})
            continue
        time = spread(seconds[one.name])
        row = {
            "name": one.name,
            "cells": cells[one.name],
            "seconds": seconds[one.name],
            "time": time,
            "time_a_cell": time["median"] / cells[one.name],
            "fast_over_this": ratio(seconds[FAST], seconds[one.name], cells[one.name] / cells[FAST]),
        }
        if one.name in RATE_OF:
            work = operations(cells[one.name], sizes.length, sizes.head_size) / (2.0 * sizes.matmul**3)
            row["share_of_matmul"] = ratio(seconds[RATE_OF[one.name]], seconds[one.name], work)
        rows.append(row)
    for name in (MATMUL, NARROW_MATMUL):
        time = spread(seconds[name])
        rate = (2.0 * sizes.matmul**3) / time["median"]
        rows.append({"name": name, "seconds": seconds[name], "time": time, "operations_a_second": rate})

    return {
        "setting": f"{sizes.cells} cells ({sizes.sequences} sequences x {sizes.heads} heads, each head alone), "
        f"n = {sizes.length}, p = {sizes.head_size}, identity values, float32; value and gradient of the mean barrier; "
        f"subsampled: share {sizes.share:g}; product of matrices: {sizes.matmul} x {sizes.matmul}",
        "rows": rows,
        "targets": [
            at_most("fast exact / straightforward JAX", _median(rows, CLOSED_FORM, "fast_over_this"), 0.25),
            at_most("fast exact / straightforward PyTorch", _median(rows, TORCH, "fast_over_this"), 0.22),
            at_least("fast exact, share of the machine's rate", _median(rows, FAST, "share_of_matmul"), 0.25),
        ],
        "notes": [
            f"{AUTODIFF} ran on {cells[AUTODIFF]} cells, the others on {sizes.cells}; its ratio compares times a cell."
        ],
    }


SECTION = Section(
    "kernel",
    "Kernel: value and gradient",
    "One call on cells drawn as at the start of training. The share of the machine's rate counts "
    "3 x cells x n^2/2 x p^2 x 2 operations, the causal half of the three large products and nothing else, against the "
    "rate of a product of large matrices of the same type, timed in the same rounds. The Jacobian by autodiff is that "
    "of embeddings of width 2p. The subsampled call returns an estimate, from a share of the cells.",
    (
        Column("name", "", "text"),
        Column("cells", "cells", "count"),
        Column("time", "time", "seconds"),
        Column("time_a_cell", "time a cell", "seconds"),
        Column("fast_over_this", "fast exact / this, a cell", "ratio"),
        Column("share_of_matmul", "share of the machine's rate", "share"),
        Column("operations_a_second", "10^9 operations/s", "billions"),
    ),
    run_kernel,
)


def _fast_at(queries: Any, keys: Any, positions: Int[np.ndarray, " k"]) -> tuple[Float[Array, "c k"], Any]:
    """log|det J_i| at some positions and the gradient of their sum, by the kernels in float32."""

    def total(
        queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]
    ) -> tuple[Float[Array, ""], Float[Array, "c k"]]:
        values = blocked.residual_and_log_det(*side_by_side(queries, keys)).log_det[:, positions]
        return values.sum(), values

    (_, values), gradient = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(
        jnp.asarray(queries), jnp.asarray(keys)
    )
    return values, gradient


def errors(queries: Float[np.ndarray, "c p n"], keys: Float[np.ndarray, "c p n"], count: int) -> dict[str, float]:
    """Errors of the fast path at `count` positions spread over the sequence, the last among them."""
    length = queries.shape[-1]
    positions = np.unique(np.linspace(1, length - 1, min(count, length - 1)).round().astype(int))
    true_values, true_gradient = reference_at(queries, keys, positions)
    values, gradient = _fast_at(queries, keys, positions)
    return {
        "log_det_error": log_det_error(values, true_values),
        "gradient_error": gradient_error(gradient, true_gradient),
    }


def run_scaling(sizes: Sizes) -> dict[str, Any]:
    """Time / n^2 relative to the shortest sequence, round by round; and errors at every length."""
    drawn = {length: draw_cells(sizes, 1, length) for length in sizes.lengths}
    prepare = fast().prepare
    assert prepare is not None
    runs = {str(length): prepare(*cells) for length, cells in drawn.items()}
    seconds = paired_rounds({MATMUL: matmul(sizes.matmul), **runs}, sizes.rounds, "scaling")
    shortest = sizes.lengths[0]
    rows: list[dict[str, Any]] = []
    for length, cells in drawn.items():
        of_rounds = seconds[str(length)]
        work = operations(sizes.heads, length, sizes.head_size) / (2.0 * sizes.matmul**3)
        rows.append(
            {
                "length": length,
                "seconds": of_rounds,
                "time": spread(of_rounds),
                "relative": ratio(of_rounds, seconds[str(shortest)], (shortest / length) ** 2),
                "share_of_matmul": ratio(seconds[MATMUL], of_rounds, work),
                **errors(*cells, sizes.positions),
            }
        )
    deviation = max(abs(row["relative"]["median"] - 1) for row in rows)
    return {
        "setting": f"{sizes.heads} cells (one sequence, {sizes.heads} heads), p = {sizes.head_size}, float32; value "
        f"and gradient of the mean barrier; errors at {sizes.positions} positions spread over the sequence",
        "rows": rows,
        "targets": [
            at_most(f"time / n^2 against n = {shortest}, largest deviation", deviation, MOST_DEVIATION),
            at_most(
                "error at every length, log-dets and gradients",
                max(max(row["log_det_error"], row["gradient_error"]) for row in rows),
                TOLERANCE,
            ),
        ],
        "notes": [],
    }


SCALING_SECTION = Section(
    "scaling",
    "Time against the length",
    "Time / n^2 relative to the shortest sequence, taken round by round. Errors as under agreement, against the "
    "reference in float64 at some positions, and the gradient of the sum of their log-determinants.",
    (
        Column("length", "n", "count"),
        Column("time", "time", "seconds"),
        Column("relative", "time / n^2, relative", "ratio"),
        Column("share_of_matmul", "share of the machine's rate", "share"),
        Column("log_det_error", "error of log-dets", "error"),
        Column("gradient_error", "error of gradients", "error"),
    ),
    run_scaling,
)

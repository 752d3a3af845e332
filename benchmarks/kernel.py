"""Section "kernel": the mean barrier of a batch of heads with its gradient, in one call."""

from typing import Any

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
    subsampled,
)
from benchmarks.machine import cores, matmul, matmul_operations
from benchmarks.section import Column, Section, at_least, at_most
from benchmarks.sizes import Sizes, draw_cells
from benchmarks.timing import paired_rounds, ratio, spread

MATMUL, NARROW_MATMUL = "the machine's product of matrices", "the machine's product of bfloat16 matrices"
# The rate that a contestant is held against: that of its own large products.
RATE_OF = {FAST: MATMUL, BFLOAT16: NARROW_MATMUL}
# A Jacobian by autodiff needs about 0.2 GB a cell at n = 256 and p = 32: one sequence is enough for a time a cell.
JACOBIAN_SEQUENCES = 1


def operations(cells: int, length: int, size: int) -> float:
    """Three products of n^2 / 2 weights (the causal half) with p^2 outer products or as many numbers, for each cell."""
    return 3.0 * cells * (length**2 / 2) * size**2 * 2


def _row(name: str, cells: int, seconds: list[float], fast_seconds: list[float], fast_cells: int) -> dict[str, Any]:
    return {
        "name": name,
        "cells": cells,
        "seconds": seconds,
        "time": spread(seconds),
        "time_a_cell": spread(seconds)["median"] / cells,
        "fast_over_this": ratio(fast_seconds, seconds, cells / fast_cells),
    }


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
        row = _row(one.name, cells[one.name], seconds[one.name], seconds[FAST], cells[FAST])
        if one.name in RATE_OF:
            work = operations(cells[one.name], sizes.length, sizes.head_size) / matmul_operations(sizes.matmul)
            row["share_of_matmul"] = ratio(seconds[RATE_OF[one.name]], seconds[one.name], work)
        rows.append(row)
    for name in (MATMUL, NARROW_MATMUL):
        time = spread(seconds[name])
        rate = matmul_operations(sizes.matmul) / time["median"]
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

"""Section "scaling": the time of the kernel against the length of the sequence, with its agreement."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from benchmarks.agreement import TOLERANCE, gradient_error, log_det_error, reference_at
from benchmarks.contestants import fast, side_by_side
from benchmarks.kernel import MATMUL, operations
from benchmarks.machine import matmul, matmul_operations
from benchmarks.section import Column, Section, at_most
from benchmarks.sizes import Sizes, draw_cells
from benchmarks.timing import paired_rounds, ratio, spread
from prob_transformer.kernels import blocked

MOST_DEVIATION = 0.25


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
        work = operations(sizes.heads, length, sizes.head_size) / matmul_operations(sizes.matmul)
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


SECTION = Section(
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

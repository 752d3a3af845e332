"""Section "agreement": every contestant in float32 against the library's reference in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from benchmarks.contestants import FAST, Contestant, Gradient, side_by_side, to_numpy, with_log_det
from benchmarks.problem_sizes import Sizes, draw_cells
from benchmarks.result_file import cores
from benchmarks.result_tables import Column, Section, at_most
from prob_transformer import Attention, residual_and_log_det, stability_margin
from prob_transformer.attention import Past
from prob_transformer.change_of_variables import residual_and_log_det_at

TOLERANCE = 1e-5
# Weights as at the start of training, by which the target is judged, and twice as large: there some positions lie close
# to the boundary det J = 0, where float32 loses digits by any formula.
SCALES = (1.0, 2.0)


def log_det_error(found: Any, truth: Float[np.ndarray, "..."]) -> float:
    """Largest difference in nats, relative to max(1, |log|det J||)."""
    return float((np.abs(np.asarray(found, float) - truth) / np.maximum(1, np.abs(truth))).max())


def gradient_error(found: Any, truth: Any) -> float:
    """Largest difference of any entry, relative to the largest entry of the true gradient."""
    difference = max(np.abs(np.asarray(a, float) - b).max() for a, b in zip(found, truth, strict=True))
    return float(difference / max(np.abs(x).max() for x in truth))


def _in_float64(function: Callable[..., Any], *arrays: Any) -> Any:
    with jax.enable_x64(True):
        found = function(*(jnp.asarray(np.asarray(x, np.float64)) for x in arrays))
        return jax.tree.map(np.asarray, found)


def reference(queries: Float[np.ndarray, "c p n"], keys: Float[np.ndarray, "c p n"]) -> tuple[Any, Gradient]:
    """log|det J_i| (c, n), and value and gradient of the mean barrier, by prob_transformer in float64."""

    def log_det(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Float[Array, "c n"]:
        attention, embeddings = side_by_side(queries, keys)
        return residual_and_log_det(attention, embeddings).log_det

    def both(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> tuple[Float[Array, "c n"], Any]:
        values = jax.jit(log_det)(queries, keys)
        return values, jax.jit(jax.value_and_grad(lambda q, k: -log_det(q, k).mean(), (0, 1)))(queries, keys)

    return _in_float64(both, queries, keys)


def reference_at(
    queries: Float[np.ndarray, "c p n"], keys: Float[np.ndarray, "c p n"], positions: Int[np.ndarray, " k"]
) -> tuple[Float[np.ndarray, "c k"], tuple[Float[np.ndarray, "c p n"], Float[np.ndarray, "c p n"]]]:
    """log|det J_i| in float64 at some positions, and the gradient of their sum: for sequences too long for the rest."""

    def one_cell(attention: Attention, embeddings: Float[Array, "n d"]) -> Float[Array, " k"]:
        past = Past.of(attention, embeddings)

        # One position at a time, and again in the backward pass: an (n, n, p) array would not fit.
        @jax.checkpoint
        def at(position: Int[Array, ""]) -> Float[Array, ""]:
            seen = past.before(attention, position)
            return residual_and_log_det_at(attention, seen, embeddings[position]).log_det

        return jax.lax.map(at, jnp.asarray(positions))

    def total(
        queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]
    ) -> tuple[Float[Array, ""], Float[Array, "c k"]]:
        attention, embeddings = side_by_side(queries, keys)
        values = jax.lax.map(lambda cell: one_cell(attention, cell), embeddings)
        return values.sum(), values

    (_, values), gradient = _in_float64(jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True)), queries, keys)
    return values, gradient


def smallest_margin(queries: Float[np.ndarray, "c p n"], keys: Float[np.ndarray, "c p n"]) -> float:
    """The smallest sigma_min(J_i), in float64, of the cells as embeddings (q_s, k_s)."""

    def margin(queries: Float[Array, "c p n"], keys: Float[Array, "c p n"]) -> Float[Array, ""]:
        return stability_margin(*side_by_side(queries, keys), kind="conditioning").min()

    return float(_in_float64(margin, queries, keys))


def compared(contestant: Contestant, queries: Any, keys: Any, truth: tuple[Any, Gradient]) -> dict[str, float]:
    """The errors of one contestant."""
    assert contestant.prepare is not None
    assert contestant.log_det is not None
    _, gradient = to_numpy(contestant.prepare(queries, keys)())
    return {
        "log_det_error": log_det_error(contestant.log_det(queries, keys), truth[0]),
        "gradient_error": gradient_error(gradient, truth[1][1]),
    }


def run_agreement(sizes: Sizes) -> dict[str, Any]:
    """Errors of all contestants on one sequence of every head, for weights of two sizes."""
    rows: list[dict[str, Any]] = []
    everyone = with_log_det(cores())
    with tqdm(total=len(SCALES) * len(everyone), desc="agreement", unit="run", leave=False) as bar:
        for scale in SCALES:
            cells = draw_cells(sizes, 1, sizes.length, scale)
            truth = reference(*cells)
            of_scale = {"scale": scale, "largest": float(np.abs(truth[0]).max()), "margin": smallest_margin(*cells)}
            for one in everyone:
                found = {"missing": one.missing} if one.missing else compared(one, *cells, truth)
                rows.append({"name": one.name, **of_scale, **found})
                bar.update()
    judged = next(row for row in rows if (row["name"], row["scale"]) == (FAST, SCALES[0]))
    return {
        "setting": f"{sizes.heads} cells, n = {sizes.length}, p = {sizes.head_size}",
        "rows": rows,
        "targets": [
            at_most("fast exact, relative error of log-dets", judged["log_det_error"], TOLERANCE),
            at_most("fast exact, relative error of gradients", judged["gradient_error"], TOLERANCE),
        ],
        "notes": [],
    }


SECTION = Section(
    "agreement",
    "Agreement with the reference",
    "Against `prob_transformer.residual_and_log_det` in float64 on the same numbers. Log-determinants: largest "
    "difference relative to max(1, |log-det|). Gradient of the mean barrier in queries and keys: largest difference "
    "relative to its largest entry. Weights of the heads are given as multiples of those at the start of training; the "
    "target is judged at 1.",
    (
        Column("name", "", "text"),
        Column("scale", "weights", "number"),
        Column("margin", "smallest sigma_min(J)", "number"),
        Column("largest", "largest log-det, nats", "number"),
        Column("log_det_error", "error of log-dets", "error"),
        Column("gradient_error", "error of gradients", "error"),
    ),
    run_agreement,
)

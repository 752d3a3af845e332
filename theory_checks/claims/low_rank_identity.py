"""Claim: the d x d determinant of a Jacobian block is an Hp x Hp determinant, and heads do not decouple in it."""

from typing import Any

import jax
import numpy as np

from prob_transformer import Attention, jacobian_block, residual_and_log_det
from prob_transformer.change_of_variables import ResidualAndLogDet
from theory_checks.check import Check, Outcome, Plan, Worst, quick_jit
from theory_checks.drawn_cases import FEW_SHAPES, SHAPES, Array, Case, draw_case, drawn
from theory_checks.truth.numpy_attention import LARGEST_KAPPA, amplification, is_undecidable
from theory_checks.truth.transformer import attention_weights

TOLERANCE = 1e-9
# For the entries of J itself against I - L R, over kappa: rounding of a few products.
ENTRIES_TOLERANCE = 1e-14
REGIME = LARGEST_KAPPA["float64"]


def factors(case: Case, position: int) -> tuple[Array, Array]:
    """L (d, Hp) and R (Hp, d) of one position with J = I_d - L R, from their definition in plain NumPy."""
    heads, head_size, width = case.query.shape
    past = case.embeddings[:position]
    left = np.zeros((width, heads * head_size))
    for head in range(heads):
        keys = past @ case.key[head].T
        values = past if case.value is None else past @ case.value[head].T
        weights = attention_weights(case.query[head], case.key[head], past, case.embeddings[position])
        covariance = (weights[:, None] * (values - weights @ values)).T @ (keys - weights @ keys)
        left[:, head * head_size : (head + 1) * head_size] = covariance / np.sqrt(head_size)
    return left, case.query.reshape(heads * head_size, width)


@quick_jit
def _library(attention: Attention, embeddings: Any) -> tuple[jax.Array, ResidualAndLogDet]:
    return jacobian_block(attention, embeddings), residual_and_log_det(attention, embeddings)


def run(plan: Plan) -> Outcome:
    """Compare four determinants of every block of drawn problems in float64."""
    cases = plan.count(600, 60)
    worst, scaled, entries, decoupled = Worst(), Worst(), Worst(), []
    seen = {"compared_positions": 0, "outside_regime": 0, "undecidable": 0, "wider_than_d": 0, "narrower_than_d": 0}

    for case in drawn(draw_case, cases, plan.seed, shapes=plan.pick(SHAPES, FEW_SHAPES)):
        blocks, (_, sign, log_det) = jax.device_get(_library(case.attention, case.embeddings))
        _, head_size, width = case.query.shape
        kappa = amplification(case, blocks)
        if is_undecidable(kappa):
            seen["undecidable"] += 1
            continue
        seen["outside_regime"] += kappa > REGIME
        rank = case.shape.heads * head_size
        seen["wider_than_d"] += rank > width
        seen["narrower_than_d"] += rank < width
        for position in range(1, case.shape.length):
            left, right = factors(case, position)
            product = left @ right
            entries.see(np.abs(np.eye(width) - product - blocks[position]).max() / kappa, case)
            wide = np.linalg.slogdet(np.eye(width) - product)
            narrow = np.linalg.slogdet(np.eye(rank) - right @ left)
            dense = np.linalg.slogdet(blocks[position])
            signs_agree = sign[position] == dense.sign == wide.sign == narrow.sign
            values = (log_det[position], dense.logabsdet, wide.logabsdet, narrow.logabsdet)
            error = max(values) - min(values) if signs_agree else np.inf
            seen["compared_positions"] += 1
            if kappa <= REGIME:
                worst.see(error, case)
            else:
                scaled.see(error / kappa * REGIME, case)
            if case.shape.heads > 1 and position > 1 and case.kind == "gaussian":
                split = range(0, rank, head_size)
                single = [
                    np.linalg.slogdet(np.eye(width) - left[:, s : s + head_size] @ right[s : s + head_size])
                    for s in split
                ]
                decoupled.append(abs(sum(det.logabsdet for det in single) - dense.logabsdet))
    apart = float(np.median(decoupled)) if decoupled else 0.0
    return Outcome(
        cases=cases,
        figure=worst.figure,
        holds=bool(
            seen["compared_positions"] > 0
            and max(worst.figure, scaled.figure) <= TOLERANCE
            and entries.figure <= ENTRIES_TOLERANCE
        ),
        counterexample_figure=apart,
        counterexample_fails=apart > 1e3 * TOLERANCE,
        details={
            **{name: int(count) for name, count in seen.items()},
            "log_det_error": worst.to_json(),
            "entries_of_blocks_error_over_kappa": entries.to_json(),
            "entries_of_blocks_tolerance": ENTRIES_TOLERANCE,
            "log_det_error_outside_times_regime_over_kappa": scaled.to_json(),
            "product_over_heads_positions": len(decoupled),
            "product_over_heads_median_error_nats": apart,
        },
    )


CHECK = Check(
    id="low-rank-identity",
    claim="the d x d and Hp x Hp determinants agree",
    statement="det(I_d - L R) = det(I_Hp - R L), L = [Cov(v^h, k^h) / sqrt(p)]_h, R = [W_Q^h]_h, sign included.",
    mark="derived",
    regime=(
        "Every attention, Hp below, at and above d, at every position with a past. The raw error is held to the "
        "tolerance where kappa (theory_checks/truth/numpy_attention.py) is at most 1e6; beyond, the error times 1e6 "
        "over kappa is, until kappa eps > 0.05."
    ),
    counterexample=(
        "Ours: the product over heads of det(I - M^h), which drops the blocks between heads, is not the determinant"
        " for H > 1: the median error over gaussian cases."
    ),
    tolerance=TOLERANCE,
    tolerance_reason="Float64 rounding (2e-16) times kappa of at most 1e6, and a factor of 5 for the matrix size.",
    figure_name="largest error in nats",
    run=run,
)

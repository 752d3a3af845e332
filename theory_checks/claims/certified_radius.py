"""Claim: the certified radius never exceeds the distance from an embedding to the degeneracy boundary."""

from typing import Any

import jax
import numpy as np

from prob_transformer import Attention, certified_radius
from theory_checks.check import Check, Outcome, Plan, Worst, quick_jit
from theory_checks.drawn_cases import MODERATE_KINDS, Array, Case, Shape, draw_problem, drawn, make_case
from theory_checks.truth.numpy_attention import determinants

# The radius is a bound in exact arithmetic; this is room for that of float64, and more of float32.
TOLERANCE = 1.0 + 1e-9
FLOAT32_TOLERANCE = 1.0 + 1e-3
_SHAPES = (Shape(1, 1, 1, 4, False), Shape(1, 2, 2, 4, False), Shape(2, 1, 2, 4, True), Shape(2, 2, 3, 5, True))
_DIRECTIONS, _DISTANCES, _ROUNDS, _BISECTIONS = 48, 240, 6, 40


def distance_found(case: Case, rng: np.random.Generator) -> float:
    """An upper bound of the distance from the last embedding to the boundary: the nearest crossing a search finds.

    Along each of many directions the first change of sign on a grid of distances is refined by bisection; the best
    directions are then turned a little, in rounds. inf where no direction crosses.
    """
    start = case.embeddings[-1].astype(np.float64)
    width = start.size
    past = case.embeddings[:-1].astype(np.float64)
    steepest = np.linalg.norm(past @ case.interaction, axis=-1).max()
    # Logits differ by one at about this distance: the weights go from uniform to one-hot around it.
    unit = 1.0 / (steepest + 1e-300)
    distances = unit * np.concatenate([[0.0], np.geomspace(1e-4, 1e3, _DISTANCES)])

    def first_crossings(directions: Array) -> Array:
        points = start + distances[:, None, None] * directions
        signs = np.sign(determinants(case, points.reshape(-1, width))).reshape(len(distances), -1)
        changed = signs[1:] != signs[:-1]
        step = np.where(changed.any(axis=0), changed.argmax(axis=0), -1)
        low, high = distances[step], distances[step + 1]
        sign_below = np.take_along_axis(signs, step[None], axis=0)[0]
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            below = np.sign(determinants(case, start + middle[:, None] * directions)) == sign_below
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.where(step >= 0, high, np.inf)

    directions = rng.normal(size=(_DIRECTIONS, width))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    found = first_crossings(directions)
    for turn in 0.5 ** np.arange(_ROUNDS if width > 1 else 0):
        best = directions[np.argsort(found)[:4]].repeat(4, axis=0)
        trials = best + turn * rng.normal(size=best.shape)
        trials /= np.linalg.norm(trials, axis=1, keepdims=True)
        directions = np.concatenate([directions, trials])
        found = np.concatenate([found, first_crossings(trials)])
    return float(found.min())


def linearised(case: Case) -> float:
    """|det J| / |gradient of det J| at the last embedding by central differences: an estimate, which is no bound."""
    start = case.embeddings[-1]
    step = 1e-6 * (1 + np.abs(start).max()) * np.eye(start.size)
    slope = determinants(case, start + step) - determinants(case, start - step)
    length = np.linalg.norm(slope) / (2 * step[0, 0])
    return float(abs(determinants(case, start[None])[0]) / length) if length > 0 else np.inf


@quick_jit
def _radius(attention: Attention, embeddings: Any) -> jax.Array:
    """The certified radius of the last position."""
    return certified_radius(attention, embeddings)[-1]


def run(plan: Plan) -> Outcome:
    """Compare the radius with the nearest crossing found by search, for the last embedding of drawn problems."""
    # A radius with a third of the steepness is too large in about one case of a hundred: fewer draws may miss it.
    cases = plan.count(1200, 600)
    worst, worst32 = Worst(), Worst()
    estimates: list[float] = []
    tightness: dict[int, list[float]] = {}
    points: list[list[float]] = []
    seen = {"crossing_found": 0, "certified_everywhere": 0, "no_crossing_found": 0}

    shapes, kinds = plan.pick(_SHAPES, _SHAPES[:2]), (*MODERATE_KINDS, "sharp")
    for problem in drawn(draw_problem, cases, plan.seed, shapes=shapes, kinds=kinds, low=-0.5, high=1.5):
        shape, kind, seed, exponent = problem
        case = make_case(shape, kind, seed, strength=10.0**exponent)
        radius = float(_radius(case.attention, case.embeddings))
        single = make_case(shape, kind, seed, strength=10.0**exponent, dtype=np.float32)
        radius32 = float(_radius(single.attention, single.embeddings))
        distance = distance_found(case, np.random.default_rng(seed))
        if not np.isfinite(distance):
            seen["certified_everywhere" if np.isinf(radius) else "no_crossing_found"] += 1
            # Nothing to compare with, but a NaN is still a failure.
            worst.see(np.nan if np.isnan(radius) else 0.0, problem)
            continue
        seen["crossing_found"] += 1
        worst.see(radius / distance, problem)
        # Distances below float32's resolution of the embedding itself mean nothing there.
        if distance > 1e-4 * np.abs(case.embeddings).max():
            worst32.see(radius32 / distance, problem)
        estimates.append(linearised(case) / distance)
        tightness.setdefault(shape.width, []).append(radius / distance)
        points.append([distance, radius])
    ratios = [ratio for found in tightness.values() for ratio in found]
    too_far = float(np.mean(np.array(estimates) > 1.01)) if estimates else 0.0
    return Outcome(
        cases=cases,
        figure=worst.figure,
        holds=bool(worst.figure <= TOLERANCE and worst32.figure <= FLOAT32_TOLERANCE and seen["crossing_found"] > 0),
        counterexample_figure=too_far,
        counterexample_fails=too_far > 0,
        details={
            **seen,
            "radius_over_distance_found": worst.to_json(),
            "float32_radius_over_distance_found": worst32.to_json(),
            "float32_tolerance": FLOAT32_TOLERANCE,
            "median_tightness": float(np.median(ratios)) if ratios else None,
            "tightness_by_width": {
                width: {"cases": len(found), "median": float(np.median(found)), "largest": max(found)}
                for width, found in sorted(tightness.items())
            },
            "linearised_distance_too_large_share": too_far,
            "distance_found_and_radius": points,
        },
    )


CHECK = Check(
    id="certified-radius",
    claim="a proven lower bound of the distance to the boundary",
    statement=(
        "det J_i(u) has the sign of det J_i(u_i) for |u - u_i| < r, with r the larger supremum of all t with sum_h "
        "min(D_v D_g / 4, c exp(t D_g)) < 1 and of those with sum_h int_0^t min(D_v D_g^2 / 8, c D_g exp(s D_g)) ds "
        "< sigma_min(J_i), c = sqrt(|Cov(v)| |Cov(g)|)."
    ),
    mark="ours",
    regime=(
        "Every past, parameters and u_i: strengths 0.3 to 30, d = 1 to 3, one and two heads, with ties, "
        "near-duplicates, collinear tokens and one-hot weights, float64 and float32."
    ),
    counterexample=(
        "The linearised distance |det J| / |gradient of det J| is an estimate and no bound: the share of cases "
        "where it exceeds the distance found by more than 1 %."
    ),
    tolerance=TOLERANCE,
    tolerance_reason=(
        "A proven inequality: 1, and 1e-9 for rounding (1e-3 in float32). A search only finds too large a distance."
    ),
    figure_name="largest radius over distance found",
    run=run,
)

"""`python -m paper_figures.figures.claim_pictures`: one picture a claim, from the figures that the checks saved.

The picture of the central path of the support tokens is a figure of the report too.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from models import cli
from paper_figures.figures import style
from paper_figures.figures.style import BLACK, BLUE, ORANGE
from paper_figures.saved_results import load_checks

# An exact 0 has no place on a logarithmic axis.
SMALLEST = 1e-17
DASHED: dict[str, Any] = {"color": BLACK, "linestyle": "--", "linewidth": 1.0}
CENTRAL_PATH_CAPTION = (
    "Along the central path of the barrier problem, as lambda falls, the multipliers lambda / m_i settle on the support tokens, "
    "as dual variables do on support vectors: the share of them that the positions of smallest margin carry, over small "
    "problems with a known solution. At the barrier weights of training, on the left, they are far from settled."
)


def _boundedness(figure: Figure, check: dict[str, Any]) -> None:
    """The margin-only objective along rays to infinity, and the bound that the weight prior gives."""
    details = check["details"]
    left, right = figure.subplots(1, 2, sharey=True)
    left.semilogx(details["strengths"], details["without_prior_A_growing"], "o-", color=BLUE, label="no weight prior")
    left.set(xlabel="factor t on A", ylabel="margin-only objective (nats)")
    sizes, free = details["sizes_of_free_embeddings"], details["with_prior_free_embeddings_growing"]
    right.semilogx(sizes, free, "s--", color=ORANGE, label="weight prior, free embeddings")
    right.set_xlabel("factor c on the embeddings")
    for panel in (left, right):
        bound = details["lower_bound_with_prior"]
        panel.axhline(bound, **style.DOTTED, label="bound with prior, embeddings fixed")
        panel.legend(frameon=False, loc="lower left")


def _certified_radius(figure: Figure, check: dict[str, Any]) -> None:
    """The certified radius against the nearest crossing that a search found."""
    details, panel = check["details"], figure.subplots()
    distances, radii = zip(*(point for point in details["distance_found_and_radius"] if point[1] > 0), strict=True)
    label = f"drawn problems, median ratio {details['median_tightness']:.2f}"
    panel.loglog(distances, radii, "o", color=BLUE, fillstyle="none", label=label)
    ends = [min(distances), max(distances)]
    panel.loglog(ends, ends, **DASHED, label="radius = distance: never above")
    panel.set(xlabel="distance to the nearest crossing found (units of u)", ylabel="certified radius (units of u)")
    panel.legend(frameon=False)


def _conditioning(figure: Figure, check: dict[str, Any]) -> None:
    """Measured amplification of noise against 1 / sigma_min on the way to the boundary."""
    rows, panel = check["details"]["approach_to_the_boundary"], figure.subplots()
    margins = [row["margin"] for row in rows]
    panel.loglog(margins, [row["amplification"] for row in rows], "o", color=BLUE, label="measured by solving")
    panel.loglog(margins, [1 / margin for margin in margins], **DASHED, label="1 / sigma_min")
    panel.set(xlabel="conditioning margin sigma_min(J)", ylabel="amplification of noise")
    panel.legend(frameon=False)


def _errors(figure: Figure, check: dict[str, Any]) -> None:
    """Figure and counterexample of a claim against its tolerance, for claims that are one number."""
    panel, tolerance = figure.subplots(), check["tolerance"]
    for place, (key, colour, marker) in enumerate((("figure", BLUE, "o"), ("counterexample_figure", ORANGE, "s"))):
        value = abs(float(check[key]))
        point = (max(value, SMALLEST), place)
        panel.plot(*point, marker, color=colour, markersize=7)
        panel.annotate(f"{value:.2g}", point, textcoords="offset points", xytext=(0, 7), ha="center")
    panel.axvline(max(tolerance, SMALLEST), **DASHED)
    text, place_of_text = f"tolerance {tolerance:.0e}" if tolerance else "tolerance 0", (max(tolerance, SMALLEST), 0.5)
    panel.annotate(text, place_of_text, textcoords="offset points", xytext=(4, 0), va="center", fontsize=8)
    panel.set(xscale="log", ylim=(-0.6, 1.7))
    panel.margins(x=0.12)
    panel.set_yticks([0, 1], ["claim", "counterexample"])
    panel.set_xlabel(f"size of the figure (0 is drawn at {SMALLEST:.0e})", fontsize=8)


def _gaussian_limit(figure: Figure, check: dict[str, Any]) -> None:
    """How embeddings tend to deterministic attention as the noise vanishes."""
    limit, panel = check["details"]["vanishing_noise"], figure.subplots()
    for name, rate, colour, line in (
        ("distance_to_deterministic_attention", limit["rate_of_distance"], BLUE, "o-"),
        ("remainder_of_linear_law", limit["rate_of_remainder"], ORANGE, "s--"),
    ):
        label = f"{name.replace('_', ' ')}, fitted power {rate:.2f}"
        panel.loglog(limit["sigma"], limit[name], line, color=colour, label=label)
    panel.set(xlabel="noise scale sigma (units of u)", ylabel="largest entry (units of u)")
    figure.legend(loc="outside upper left", frameon=False)


def _kolmogorov(figure: Figure, check: dict[str, Any]) -> None:
    """How far each marginal is from the shorter density, next to the estimated error of its integral."""
    rows, panel = check["details"]["embeddings"], figure.subplots()
    differences = [max(abs(row["marginal_over_shorter_density"] - 1), 1e-16) for row in rows]
    panel.plot(differences, range(len(rows)), "o", color=BLUE, label="|marginal / shorter density - 1|")
    errors = [row["quadrature_error"] for row in rows]
    panel.plot(errors, range(len(rows)), "s", color=ORANGE, fillstyle="none", label="error estimate")
    panel.axvline(check["tolerance"], **DASHED, label="tolerance")
    panel.set(xscale="log", xlabel="relative difference (values below 1e-16 drawn there)")
    names = [f"{row['problem']}: {row['kept']} kept, {row['integrated_out']} out" for row in rows]
    panel.set_yticks(range(len(rows)), names, fontsize=7)
    style.legend_below(figure, panel, 3)


def _normalisation(figure: Figure, check: dict[str, Any]) -> None:
    """Mass of the density and expected number of roots, against the strength of attention."""
    panel = figure.subplots()
    for noise_scale, colour, marker in ((0.5, BLUE, "o"), (0.2, ORANGE, "s")):
        asked = {"past": [-1.0, 1.0, 0.3], "noise_scale": noise_scale}
        rows = [row for row in check["details"]["one_dimension"] if asked.items() <= row.items()]
        a, mass, roots, signed = (
            [row[key] for row in rows] for key in ("strength", "mass", "expected_roots", "signed_mass")
        )
        panel.plot(a, mass, marker, color=colour, fillstyle="none", label=f"mass, sigma = {noise_scale:g}")
        panel.plot(a, roots, "-", color=colour, linewidth=1.0, label="roots")
    panel.plot(a, signed, **DASHED, label="signed mass")
    panel.set(xlabel="attention strength a, past (-1, 1, 0.3)", ylabel="mass; expected number of roots")
    panel.legend(frameon=False)


def _sampler_law(figure: Figure, check: dict[str, Any]) -> None:
    """Kolmogorov-Smirnov statistics over their critical value: right density, wrong densities, past the boundary."""
    details, panel, beyond = check["details"], figure.subplots(), check["details"]["past_the_boundary"]
    right = {f"right; {name}": value for name, value in details["ratio_to_critical_value"]["right"].items()}
    wrong = details["rejection_of_wrong_densities"] | {
        "past the boundary, a = 4": beyond["ratio"],
        "the same, det J > 0 throughout": beyond["ratio_of_converged_alone"],
    }
    for found, start, colour, marker in ((right, 0, BLUE, "o"), (wrong, len(right), ORANGE, "s")):
        panel.plot(list(found.values()), range(start, start + len(found)), marker, color=colour)
    panel.set_yticks(range(len(right) + len(wrong)), [*right, *wrong], fontsize=7)
    panel.axvline(1.0, **DASHED)
    panel.set(xscale="log", xlabel="statistic over critical value (above 1: rejected)")


def _support_tokens(figure: Figure, check: dict[str, Any]) -> None:
    """Share of the multipliers that the support tokens carry along the central path."""
    details, panel = check["details"], figure.subplots()
    weights, smallest = details["lambda"], details["smallest_share_of_support_tokens"]
    panel.semilogx(weights, details["mean_share_of_support_tokens"], "o-", color=BLUE, label="mean over problems")
    panel.semilogx(weights, smallest, "s:", color=ORANGE, fillstyle="none", label="smallest")
    panel.axhline(details["random_positions_share"], **DASHED, label="random positions")
    panel.invert_xaxis()
    panel.set(xlabel="barrier weight lambda, falling along the path", ylabel="share on the support tokens")
    panel.legend(frameon=False)


# Of claims that have a picture of their own: what draws it, and its size in inches.
PICTURES: dict[str, tuple[Callable[[Figure, dict[str, Any]], None], tuple[float, float]]] = {
    "normalisation": (_normalisation, (4.6, 3.0)),
    "kolmogorov": (_kolmogorov, (6.0, 3.6)),
    "sampler-law": (_sampler_law, (6.0, 4.2)),
    "gaussian-limit": (_gaussian_limit, (4.6, 3.0)),
    "conditioning": (_conditioning, (4.6, 3.0)),
    "certified-radius": (_certified_radius, (4.6, 3.2)),
    "support-tokens": (_support_tokens, (4.6, 3.0)),
    "boundedness": (_boundedness, (6.6, 3.0)),
}


def picture(check: dict[str, Any]) -> Figure:
    """The picture of a claim, from what its check saved."""
    fill, size = PICTURES.get(check["id"], (_errors, (5.4, 1.7)))
    figure = plt.figure(figsize=size)
    fill(figure, check)
    return figure


def draw_central_path(checks: dict[str, Any]) -> Figure:
    """The central path from the saved checks; ValueError if they lack this claim."""
    for check in checks["checks"]:
        if check["id"] == "support-tokens":
            return picture(check)
    raise ValueError("--checks: support-tokens is not among them; run python -m theory_checks --json FILE.")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m paper_figures.figures.claim_pictures", description="Draw the claims."
    )
    parser.add_argument("--json", type=Path, default=Path("results/theory_checks.json"), help="of the checks")
    parser.add_argument(
        "--out", type=Path, default=Path("results/figures/claims"), help="folder (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    report = load_checks(options.json, "--json")
    if report["provenance"]["configuration"].get("quick"):
        raise ValueError(
            f"--json: {options.json} is of quick checks, which have no pictures; run them without --quick."
        )
    with mpl.rc_context(style.RC):
        for check in report["checks"]:
            drawn = picture(check)
            style.save_png(drawn, options.out / f"{check['id']}.png")
            plt.close(drawn)
    print(f"{len(report['checks'])} pictures in {options.out}")


if __name__ == "__main__":
    cli.run(main)

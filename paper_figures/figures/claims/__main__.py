"""`python -m paper_figures.figures.claims`: the picture of every claim, from the saved results of the checks."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from models import cli
from paper_figures.figures import style
from paper_figures.figures.claims import (
    boundedness,
    certified_radius,
    conditioning,
    errors,
    gaussian_limit,
    kolmogorov,
    normalisation,
    sampler_law,
    support_tokens,
)
from paper_figures.saved_results import load_checks

PICTURES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "normalisation": normalisation.draw,
    "kolmogorov": kolmogorov.draw,
    "sampler-law": sampler_law.draw,
    "gaussian-limit": gaussian_limit.draw,
    "conditioning": conditioning.draw,
    "certified-radius": certified_radius.draw,
    "support-tokens": support_tokens.draw,
    "boundedness": boundedness.draw,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m paper_figures.figures.claims", description="Draw the claims.")
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
            drawn = PICTURES.get(check["id"], errors.draw)(check)
            style.save_png(drawn, options.out / f"{check['id']}.png")
            plt.close(drawn)
    print(f"{len(report['checks'])} pictures in {options.out}")


if __name__ == "__main__":
    cli.run(main)

"""`python -m paper_figures`: every figure as PNG and PDF, from saved results, without training."""

import argparse
from pathlib import Path
from types import ModuleType

import jax
import matplotlib as mpl
from matplotlib import pyplot as plt
from tqdm import tqdm

from models import cli
from paper_figures import boundary_plane, calibration_ranks, density, laplace_nuts, margin_histograms, noise_loss, style
from paper_figures.inference_result import INFERENCE

FIGURES: tuple[ModuleType, ...] = (
    boundary_plane,
    density,
    margin_histograms,
    noise_loss,
    laplace_nuts,
    calibration_ranks,
)
# Those drawn from the inference benchmark instead of a sweep.
FROM_INFERENCE = (laplace_nuts, calibration_ranks)


def main(argv: list[str] | None = None) -> None:
    names = [figure.NAME for figure in FIGURES]
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description="Draw the figures.")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"draw one of {', '.join(names)}; repeatable")
    parser.add_argument("--runs", type=Path, default=Path("results/runs/quick"), help="sweep (default: %(default)s)")
    parser.add_argument("--inference", type=Path, default=INFERENCE, help="result of benchmarks.inference")
    parser.add_argument("--out", type=Path, default=Path("results/figures"), help="folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.only or ()) - set(names)
    if unknown:
        raise ValueError(f"--only: got {', '.join(sorted(unknown))}; pass one of {', '.join(names)}.")
    jax.config.update("jax_enable_x64", True)
    chosen = [figure for figure in FIGURES if not arguments.only or figure.NAME in arguments.only]
    with mpl.rc_context(style.RC):
        for figure in tqdm(chosen, desc="figures", unit="figure"):
            drawn = figure.draw(arguments.inference if figure in FROM_INFERENCE else arguments.runs)
            style.save(drawn, figure.NAME, arguments.out)
            plt.close(drawn)
    print(f"{len(chosen)} figures in {arguments.out}")


if __name__ == "__main__":
    cli.run(main)

"""`python -m paper_figures`: every figure as PNG and PDF, from saved results, without training."""

import argparse
from pathlib import Path
from types import ModuleType

import jax
import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tqdm import tqdm

from models import cli
from paper_figures.figures import (
    boundary_plane,
    calibration_ranks,
    central_path,
    clean_strength,
    density,
    effects,
    laplace_nuts,
    margin_levels,
    noise_loss,
    scaling,
    style,
    support_passage,
    trade_off,
    training_barrier,
    training_margins,
)
from paper_figures.inference_result import INFERENCE

# In the order of the report. Each has NAME, CAPTION and SOURCE: which saved result its `draw` takes, None for none.
FIGURES: tuple[ModuleType, ...] = (
    trade_off,
    effects,
    noise_loss,
    clean_strength,
    margin_levels,
    training_margins,
    training_barrier,
    support_passage,
    density,
    boundary_plane,
    central_path,
    laplace_nuts,
    calibration_ranks,
    scaling,
)


def draw(figure: ModuleType, sources: dict[str, Path]) -> Figure:
    """One figure in the one style, from the saved result that it names."""
    with mpl.rc_context(style.RC):
        return figure.draw() if figure.SOURCE is None else figure.draw(sources[figure.SOURCE])


def main(argv: list[str] | None = None) -> None:
    names = [figure.NAME for figure in FIGURES]
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description="Draw the figures.")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"draw one of {', '.join(names)}; repeatable")
    parser.add_argument("--runs", type=Path, default=Path("results/runs/quick"), help="sweep (default: %(default)s)")
    parser.add_argument("--checks", type=Path, default=Path("results/theory_checks.json"), help="of theory_checks")
    parser.add_argument("--inference", type=Path, default=INFERENCE, help="result of theory_checks.inference")
    parser.add_argument("--benchmark", type=Path, default=scaling.BENCHMARK, help="result of benchmarks")
    parser.add_argument("--out", type=Path, default=Path("results/figures"), help="folder (default: %(default)s)")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.only or ()) - set(names)
    if unknown:
        raise ValueError(f"--only: got {', '.join(sorted(unknown))}; pass one of {', '.join(names)}.")
    jax.config.update("jax_enable_x64", True)
    chosen = [figure for figure in FIGURES if not arguments.only or figure.NAME in arguments.only]
    sources = {name: getattr(arguments, name) for name in ("runs", "checks", "inference", "benchmark")}
    for figure in tqdm(chosen, desc="figures", unit="figure"):
        drawn = draw(figure, sources)
        with mpl.rc_context(style.RC):
            style.save(drawn, figure.NAME, arguments.out)
        plt.close(drawn)
    print(f"{len(chosen)} figures in {arguments.out}")


if __name__ == "__main__":
    cli.run(main)

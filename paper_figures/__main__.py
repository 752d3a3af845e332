"""`python -m paper_figures`: every figure as PNG and PDF, from saved results, without training."""

import argparse
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from tqdm import tqdm

from models import cli
from paper_figures.figures import (
    boundary_plane,
    claim_pictures,
    clean_strength,
    density,
    effects,
    margin_levels,
    noise_loss,
    posterior_checks,
    scaling,
    style,
    support_passage,
    trade_off,
    training_margins,
)
from paper_figures.saved_results import load_checks, load_record
from paper_figures.study.runs import load_runs

# In the order of the report: the caption, what draws it, and which saved result that takes, None for none.
FIGURES: dict[str, tuple[str, Callable[..., Figure], str | None]] = {
    "trade_off": (trade_off.CAPTION, trade_off.draw, "runs"),
    "effects": (effects.CAPTION, effects.draw, "runs"),
    "noise_loss": (noise_loss.CAPTION, noise_loss.draw, "runs"),
    "clean_strength": (clean_strength.CAPTION, clean_strength.draw, "runs"),
    "margin_levels": (margin_levels.CAPTION, margin_levels.draw, "runs"),
    "training_margins": (training_margins.CAPTION, training_margins.draw, "runs"),
    "training_barrier": (training_margins.BARRIER_CAPTION, training_margins.draw_barrier, "runs"),
    "support_passage": (support_passage.CAPTION, support_passage.draw, "runs"),
    "density": (density.CAPTION, density.draw, None),
    "boundary_plane": (boundary_plane.CAPTION, boundary_plane.draw, None),
    "central_path": (claim_pictures.CENTRAL_PATH_CAPTION, claim_pictures.draw_central_path, "checks"),
    "laplace_nuts": (posterior_checks.LAPLACE_NUTS_CAPTION, posterior_checks.draw_laplace_nuts, "inference"),
    "calibration_ranks": (posterior_checks.CALIBRATION_CAPTION, posterior_checks.draw_calibration, "inference"),
    "transformer_posterior": (posterior_checks.TRANSFORMER_CAPTION, posterior_checks.draw_transformer, "transformer"),
    "scaling": (scaling.CAPTION, scaling.draw, "benchmark"),
}
_ROOT = Path(__file__).resolve().parent.parent
_REFERENCE = _ROOT / "results" / "reference"
INFERENCE, TRANSFORMER = _REFERENCE / "inference.json", _REFERENCE / "transformer_posterior.json"
BENCHMARK = _ROOT / "benchmarks" / "results" / "cpu.json"


def load_sections(path: Path, option: str, command: str) -> dict[str, Any]:
    """The sections of a benchmark by name. Raises ValueError naming the command to run if there is no result."""
    return load_record(path, ("sections",), f"{option}: no result", f"python -m {command} --out")["sections"]


# Several figures take the same result, which is read once.
_LOADERS: dict[str, Callable[[Path], Any]] = {
    "runs": cache(load_runs),
    "checks": cache(load_checks),
    "inference": cache(partial(load_sections, option="--inference", command="theory_checks.inference")),
    "transformer": cache(
        partial(load_sections, option="--transformer", command="theory_checks.inference.transformer_posterior")
    ),
    "benchmark": cache(partial(load_sections, option="--benchmark", command="benchmarks")),
}


def draw(name: str, sources: Mapping[str, Path]) -> Figure:
    """One figure in the one style, from the saved result that it takes."""
    _, drawn, source = FIGURES[name]
    with mpl.rc_context(style.RC):
        return drawn() if source is None else drawn(_LOADERS[source](sources[source]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description="Draw the figures.")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"one of {', '.join(FIGURES)}; repeatable")
    for option, default, meaning in (
        ("--runs", Path("results/runs/quick"), "sweep (default: %(default)s)"),
        ("--checks", Path("results/theory_checks.json"), "result of theory_checks (default: %(default)s)"),
        ("--inference", INFERENCE, "result of theory_checks.inference"),
        ("--transformer", TRANSFORMER, "result of theory_checks.inference.transformer_posterior"),
        ("--benchmark", BENCHMARK, "result of benchmarks"),
        ("--out", Path("results/figures"), "folder (default: %(default)s)"),
    ):
        parser.add_argument(option, type=Path, default=default, help=meaning)
    arguments = parser.parse_args(argv)
    chosen = [name for name in FIGURES if name in (arguments.only or FIGURES)]
    unknown = set(arguments.only or ()) - set(chosen)
    if unknown:
        raise ValueError(f"--only: got {', '.join(sorted(unknown))}; pass one of {', '.join(FIGURES)}.")
    jax.config.update("jax_enable_x64", True)
    for name in tqdm(chosen, desc="figures", unit="figure"):
        drawn = draw(name, vars(arguments))
        with mpl.rc_context(style.RC):
            style.save(drawn, name, arguments.out)
        plt.close(drawn)
    print(f"{len(chosen)} figures in {arguments.out}")


if __name__ == "__main__":
    cli.run(main)

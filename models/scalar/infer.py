"""`python -m models.scalar infer`: what a dataset was drawn with, found back by each method of inference.

map, laplace and nuts find a and noise_scale given the embeddings of all sequences (`dataset.parameter_model`);
particles finds the embeddings of the first sequence given its tokens, with the parameters at the truth. The result
goes to a file as the DataTree that every method gives, with the truth in its attributes, and is shown next to it.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
import xarray as xr
from jax.scipy.special import logsumexp
from jaxtyping import Float, PRNGKeyArray
from rich.console import Console
from rich.table import Table

from models.scalar.dataset import Dataset, decoder, generate, parameter_model
from prob_transformer._validation import require_count, require_seed
from prob_transformer.files import require_ending
from prob_transformer.inference import find_map, nuts, particle_filter, save
from prob_transformer.inference.joint import Space
from prob_transformer.inference.laplace import laplace
from prob_transformer.inference.map import MapResult
from prob_transformer.inference.result_tree import ENGINES

INTERVAL = (0.025, 0.975)

# Default, smallest value, why it is the smallest, and help. Other bounds are checked where the numbers are used.
_COUNTS: dict[str, tuple[int, int, str, str]] = {
    "max_steps": (500, 1, "the steps allowed", "map, laplace: steps allowed"),
    "warmup": (500, 1, "the steps of adaptation", "nuts: steps of adaptation a chain"),
    "chains": (2, 1, "the number of chains", "nuts: chains"),
    "draws": (
        1000,
        4,
        "their spread and, for nuts, halves of chains are compared",
        "laplace, particles: draws from the result; nuts: draws a chain",
    ),
    "particles": (1000, 2, "one particle has no weights to compare", "particles: how many"),
    "repeats": (
        20,
        2,
        "the standard error is taken from them",
        "particles: runs, for the error of the evidence",
    ),
}
_OTHERS: dict[str, tuple[float, str]] = {
    "seed": (0, "seed of data and method"),
    "sequences": (40, "sequences in the dataset"),
    "positions": (8, "embeddings in a sequence"),
    "a": (-1.0, "true interaction, below 0"),
    "noise_scale": (0.5, "true noise scale"),
}


def _mode(data: Dataset, key: PRNGKeyArray, options: argparse.Namespace, space: Space) -> tuple[MapResult, xr.DataTree]:
    found = find_map(parameter_model, model_args=(data.embeddings,), space=space, key=key, max_steps=options.max_steps)
    # Making the tree refuses, with status and remedy, a search that did not converge.
    return found, found.to_datatree()


def _map(data: Dataset, key: PRNGKeyArray, options: argparse.Namespace) -> tuple[xr.DataTree, str]:
    found, tree = _mode(data, key, options, options.space)
    return tree, (
        f"converged in {found.space} coordinates: objective {found.objective:.4f} nats, gradient norm "
        f"{found.gradient_norm:.1e}, {found.steps} steps; a < 0 has no wall to cross{found.note and '; '}{found.note}"
    )


def _laplace(data: Dataset, key: PRNGKeyArray, options: argparse.Namespace) -> tuple[xr.DataTree, str]:
    start_key, draw_key = jax.random.split(key)
    mode, _ = _mode(data, start_key, options, "unconstrained")
    found = laplace(mode, key=draw_key, draws=options.draws)
    note = f"around the maximum in unconstrained coordinates; log-evidence {float(found.log_evidence):.4f} nats"
    return found.to_datatree(), note


def _nuts(data: Dataset, key: PRNGKeyArray, options: argparse.Namespace) -> tuple[xr.DataTree, str]:
    sizes = {"warmup": options.warmup, "draws": options.draws, "chains": options.chains}
    print(f"nuts: compiling, then {options.warmup + options.draws} transitions a chain", file=sys.stderr, flush=True)
    # New data for every draw would need as many solutions of the implicit equation, and nothing here looks at them.
    found = nuts(key, parameter_model, model_args=(data.embeddings,), predictive=False, **sizes)
    diagnostics = ", ".join(
        f"{name} {r_hat:.3f} and {found.ess[name]:.0f}" for name, r_hat in sorted(found.r_hat.items())
    )
    return found.to_datatree(), (
        f"{options.chains} chains of {options.draws} draws after {options.warmup} of warm-up; R-hat and effective "
        f"sample size: {diagnostics}; {int(found.sample_stats['diverging'].sum())} divergences"
    )


def _particles(data: Dataset, key: PRNGKeyArray, options: argparse.Namespace) -> tuple[xr.DataTree, str]:
    sizes = {"particles": options.particles, "noise_scale": data.noise_scale}
    keys = jax.random.split(key, options.repeats)
    runs = [particle_filter(each, data.attention, decoder(), data.tokens[0], **sizes) for each in keys]
    tree = max(runs, key=lambda run: int(run.status)).to_datatree(draws=options.draws)
    evidence, error = combined_evidence(np.array([run.log_evidence for run in runs]))
    tree.attrs["log_evidence"] = json.dumps({"estimate": evidence, "standard_error": error, "runs": options.repeats})
    return tree, (
        f"log-evidence {evidence:.4f} nats, standard error {error:.4f} over {options.repeats} independent runs of "
        f"{options.particles} particles"
    )


_METHODS = {"map": _map, "laplace": _laplace, "nuts": _nuts, "particles": _particles}


def combined_evidence(log_evidences: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """Logarithm of the mean of R independent estimates Z, and its standard error by the delta method, in nats."""
    log_mean = float(logsumexp(log_evidences)) - np.log(len(log_evidences))
    relative = np.exp(log_evidences - log_mean)
    return float(log_mean), float(relative.std(ddof=1) / np.sqrt(len(relative)))


def row(name: str, truth: float, draws: Float[np.ndarray, "..."]) -> list[str]:
    """One unknown as the table shows it: a single draw has neither a standard deviation nor an interval."""
    low, high = np.quantile(draws, INTERVAL)
    inside = "yes" if low <= truth <= high else "no"
    spread = [f"{draws.std(ddof=1):.4f}", f"{low:.4f}, {high:.4f}", inside] if draws.size > 1 else ["-"] * 3
    return [name, f"{truth:.4f}", f"{draws.mean():.4f}", *spread]


def _table(title: str, posterior: xr.Dataset, data: Dataset) -> Table:
    """a and noise_scale, or the embeddings of the first sequence where those are what was inferred."""
    shown = Table("name", title=title)
    for column in ("truth", "estimate", "sd", "95 % interval", "truth inside"):
        shown.add_column(column, justify="right", no_wrap=True)
    if "embeddings" in posterior:
        truths, draws = np.asarray(data.embeddings[0, :, 0]), posterior["embeddings"].values[..., 0]
        unknown = {f"embedding {i + 1}": (float(u), draws[..., i]) for i, u in enumerate(truths)}
    else:
        unknown = {
            "a": (data.a, -posterior["b"].values),
            "noise_scale": (data.noise_scale, posterior["noise_scale"].values),
        }
    for name, (truth, values) in unknown.items():
        shown.add_row(*row(name, truth, values))
    return shown


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m models.scalar infer",
        description="Find back what a dataset was drawn with.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    spaces = ("constrained", "unconstrained")
    explanation = "particles: embeddings; others: parameters"
    parser.add_argument("--method", choices=_METHODS, required=True, default=argparse.SUPPRESS, help=explanation)
    parser.add_argument("--out", type=Path, help=".nc or .zarr to write; None is results/scalar-METHOD.nc")
    parser.add_argument("--space", choices=spaces, default=spaces[0], help="map: coordinates of the density")
    defaults = _OTHERS | {name: (default, explanation) for name, (default, _, _, explanation) in _COUNTS.items()}
    for name, (default, explanation) in defaults.items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default, help=explanation)
    options = parser.parse_args(argv)
    for name, (_, smallest, why, _) in _COUNTS.items():
        require_count("--" + name.replace("_", "-"), getattr(options, name), smallest, why)
    require_seed("--seed", options.seed, "data and method")
    options.out = options.out or Path(f"results/scalar-{options.method}.nc")
    require_ending(f"--out: {options.out}", options.out, ENGINES)
    return options


def main(argv: list[str]) -> int:
    """Draw the data, infer, print the table and write the file; 1 with status and remedy if the method failed."""
    options = _parse(argv)
    data_key, method_key = jax.random.split(jax.random.key(options.seed))
    data = generate(data_key, options.sequences, options.positions, options.a, options.noise_scale)
    try:
        tree, note = _METHODS[options.method](data, method_key, options)
    except ValueError as error:
        # Arguments were checked before; what is refused now is a result, for its status.
        print(f"{options.method}: {error}", file=sys.stderr)
        return 1
    sizes = {"sequences": options.sequences, "positions": options.positions}
    tree.attrs["seed"] = str(options.seed)
    tree.attrs["dataset"] = json.dumps({"a": data.a, "noise_scale": data.noise_scale} | sizes)
    sequences = f"{options.sequences} sequences of {options.positions} embeddings"
    given = f"{options.positions} tokens" if options.method == "particles" else sequences
    console = Console()
    console.print(_table(f"{options.method} given {given}", tree["posterior"].to_dataset(), data))
    save(tree, options.out)
    for line in (note, tree.attrs["law"], f"written to {options.out}"):
        console.print(line, highlight=False)
    return 0

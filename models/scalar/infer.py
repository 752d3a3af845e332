"""`python -m models.scalar infer`: what a dataset was drawn with, found back by each method of inference.

map, laplace and nuts find a and noise_scale given the embeddings of all sequences (`dataset.parameter_model`);
particles finds the embeddings of the first sequence given its tokens, with the parameters at the truth. The result
goes to a file as the DataTree that every method gives, with the truth in its attributes.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import xarray as xr
from jax.scipy.special import logsumexp
from jaxtyping import Float, PRNGKeyArray
from rich.console import Console

from models.scalar.dataset import Dataset, decoder, generate, parameter_model
from models.scalar.table import rows_of, table
from prob_transformer._validation import require_count, require_seed
from prob_transformer.inference import find_map, particle_filter, save
from prob_transformer.inference.laplace import laplace
from prob_transformer.inference.nuts import nuts

METHODS = ("map", "laplace", "nuts", "particles")


class InferenceFailedError(Exception):
    """A method ended without a usable result; the message names its status and a remedy."""


@contextlib.contextmanager
def _refusals_are_failures() -> Iterator[None]:
    # Arguments were checked before; what is refused now is a result, for its status.
    try:
        yield
    except ValueError as error:
        raise InferenceFailedError(str(error)) from error


def _map(data: Dataset, key: PRNGKeyArray, options: argparse.Namespace) -> tuple[xr.DataTree, str]:
    found = find_map(
        parameter_model, model_args=(data.embeddings,), space=options.space, key=key, max_steps=options.max_steps
    )
    with _refusals_are_failures():
        tree = found.to_datatree()
    note = (
        f"converged in {found.space} coordinates: objective {found.objective:.4f} nats, gradient norm "
        f"{found.gradient_norm:.1e}, {found.steps} steps; a < 0 has no wall to cross{found.note and '; '}{found.note}"
    )
    return tree, note


def _laplace(data: Dataset, key: PRNGKeyArray, options: argparse.Namespace) -> tuple[xr.DataTree, str]:
    start_key, draw_key = jax.random.split(key)
    mode = find_map(
        parameter_model,
        model_args=(data.embeddings,),
        space="unconstrained",
        key=start_key,
        max_steps=options.max_steps,
    )
    with _refusals_are_failures():
        mode.to_datatree()
        found = laplace(mode)
        tree = found.to_datatree(draw_key, draws=options.draws)
    return tree, f"around the maximum in unconstrained coordinates; log-evidence {float(found.log_evidence):.4f} nats"


def _nuts(data: Dataset, key: PRNGKeyArray, options: argparse.Namespace) -> tuple[xr.DataTree, str]:
    sizes = {"warmup": options.warmup, "draws": options.draws, "chains": options.chains}
    # New data for every draw would need as many solutions of the implicit equation, and nothing here looks at them.
    print(f"nuts: compiling, then {options.warmup + options.draws} transitions a chain", file=sys.stderr, flush=True)
    found = nuts(key, parameter_model, model_args=(data.embeddings,), predictive=False, **sizes)
    with _refusals_are_failures():
        tree = found.to_datatree()
    diagnostics = ", ".join(
        f"{name} {r_hat:.3f} and {found.ess[name]:.0f}" for name, r_hat in sorted(found.r_hat.items())
    )
    note = (
        f"{options.chains} chains of {options.draws} draws after {options.warmup} of warm-up; R-hat and effective "
        f"sample size: {diagnostics}; {int(found.sample_stats['diverging'].sum())} divergences"
    )
    return tree, note


def _particles(data: Dataset, key: PRNGKeyArray, options: argparse.Namespace) -> tuple[xr.DataTree, str]:
    keys = jax.random.split(key, options.repeats)
    sizes = {"particles": options.particles, "noise_scale": data.noise_scale}
    runs = [particle_filter(data.attention, decoder(), data.tokens[0], each, **sizes) for each in keys]
    worst = max(runs, key=lambda run: int(run.status))
    with _refusals_are_failures():
        tree = worst.to_datatree(draws=options.draws)
    evidence, error = combined_evidence(np.array([run.log_evidence for run in runs]))
    note = f"log-evidence {evidence:.4f} nats, standard error {error:.4f} over {options.repeats} independent runs"
    tree.attrs["log_evidence"] = json.dumps({"estimate": evidence, "standard_error": error, "runs": options.repeats})
    return tree, f"{note} of {options.particles} particles"


def combined_evidence(log_evidences: Float[np.ndarray, " R"]) -> tuple[float, float]:
    """Logarithm of the mean of R independent estimates Z, and its standard error by the delta method, in nats."""
    log_mean = float(logsumexp(log_evidences)) - np.log(len(log_evidences))
    relative = np.exp(log_evidences - log_mean)
    return float(log_mean), float(relative.std(ddof=1) / np.sqrt(len(relative)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.scalar infer",
        description="Find back what a dataset was drawn with.",
    )

    def option(name: str, default: float | None, explanation: str) -> None:
        parser.add_argument(name, type=type(default), default=default, help=f"{explanation} (default: %(default)s)")

    parser.add_argument("--method", choices=METHODS, required=True, help="particles: embeddings; others: parameters")
    parser.add_argument("--out", type=Path, help=".nc or .zarr to write (default: results/scalar-METHOD.nc)")
    option("--seed", 0, "seed of data and method")
    option("--sequences", 40, "sequences in the dataset")
    option("--positions", 8, "embeddings in a sequence")
    option("--a", -1.0, "true interaction, below 0")
    option("--noise-scale", 0.5, "true noise scale")
    parser.add_argument(
        "--space",
        choices=("constrained", "unconstrained"),
        default="constrained",
        help="map: coordinates of the density that is maximised (default: %(default)s)",
    )
    option("--max-steps", 500, "map, laplace: steps allowed")
    option("--warmup", 500, "nuts: steps of adaptation a chain")
    option("--chains", 2, "nuts: chains")
    option("--draws", 1000, "laplace, particles: draws from the result; nuts: draws a chain")
    option("--particles", 1000, "particles: how many")
    option("--repeats", 20, "particles: independent runs, for the error of the evidence")
    return parser


_SMALLEST = {
    "max_steps": (1, "the steps allowed"),
    "warmup": (1, "the steps of adaptation"),
    "chains": (1, "the number of chains"),
    "draws": (4, "their spread and, for nuts, halves of chains are compared"),
    "particles": (2, "one particle has no weights to compare"),
    "repeats": (2, "the standard error is taken from them"),
}


def main(argv: list[str]) -> int:
    """Draw the data, infer, print the table and write the file; 1 with status and remedy if the method failed."""
    options = _parser().parse_args(argv)
    for name, (smallest, why) in _SMALLEST.items():
        require_count("--" + name.replace("_", "-"), getattr(options, name), smallest, why)
    require_seed("--seed", options.seed, "data and method")
    out = options.out or Path(f"results/scalar-{options.method}.nc")
    if out.suffix not in (".nc", ".zarr"):
        raise ValueError(f"--out: {out} ends in {out.suffix!r}; pass a path ending in .nc or .zarr.")
    data_key, method_key = jax.random.split(jax.random.key(options.seed))
    data = generate(data_key, options.sequences, options.positions, options.a, options.noise_scale)
    method = {"map": _map, "laplace": _laplace, "nuts": _nuts, "particles": _particles}[options.method]
    try:
        tree, note = method(data, method_key, options)
    except InferenceFailedError as error:
        print(f"{options.method}: {error}", file=sys.stderr)
        return 1
    tree.attrs["seed"] = str(options.seed)
    sizes = {"sequences": options.sequences, "positions": options.positions}
    tree.attrs["dataset"] = json.dumps({"a": data.a, "noise_scale": data.noise_scale} | sizes)
    given = f"{options.sequences} sequences of {options.positions} embeddings"
    if options.method == "particles":
        given = f"{options.positions} tokens"
    console = Console()
    console.print(table(f"{options.method} given {given}", rows_of(tree, data)))
    console.print(note, highlight=False)
    console.print(tree.attrs["law"], highlight=False)
    save(tree, out)
    console.print(f"written to {out}", highlight=False)
    return 0

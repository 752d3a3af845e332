"""`python -m models.char_gpt laplace`: uncertainty of the weights of a trained run, and what it does to predictions.

The data are N characters of training text in windows spread evenly over it, not all that the run was trained on: they
are what the evidence is of, and the posterior is that of N characters.

    last-layer    the head, with its whole Gauss-Newton matrix                       (last_layer.py)
    kronecker     every linear map, with Kronecker factors of its Gauss-Newton block (linear_maps.py)
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich.console import Console
from rich.table import Table

from models import corpus
from models.char_gpt import checkpoint, last_layer, linear_maps
from models.char_gpt.config import Config
from models.char_gpt.evaluation import evaluation_windows
from models.char_gpt.evidence import Evidence, tuned_prior_precision
from models.char_gpt.model import CharGPT
from models.char_gpt.penalty import cross_entropy
from models.char_gpt.predictive import Score, probit, sampled, score
from models.char_gpt.run import configuration_of
from models.char_gpt.training import initial_state
from prob_transformer.inference.laplace.kfac import Positions, combinations, kronecker_factors
from prob_transformer.inference.laplace.kronecker import KroneckerPrecision, kronecker_precision
from prob_transformer.inference.results import datatree, save
from prob_transformer.provenance import provenance

Structure = Literal["last-layer", "kronecker"]
Precision = last_layer.DensePrecision | KroneckerPrecision
DRAWS, CHARACTERS = 32, 32_768


class Curvature(NamedTuple):
    """Of the log-likelihood: P at a prior precision tau, log det P - k log tau in nats, and the latter roughly."""

    at: Callable[[float], Precision]
    log_det_ratio: Callable[[float], float]
    rough_log_det_ratio: Callable[[float], float]


def curvature(
    model: CharGPT, windows: Int[Array, "W n+1"], structure: Structure, positions: Positions = "signs", seed: int = 0
) -> Curvature:
    """The curvature at the weights of a model over windows of training text.

    `positions` and `seed` are those of the Kronecker factors (kfac.py). Raises ValueError for another structure.
    """
    if structure not in get_args(Structure):
        raise ValueError(f"--structure: got {structure!r}; pass one of {', '.join(get_args(Structure))}.")
    characters = windows[:, :-1]
    if structure == "last-layer":
        inputs, logits = last_layer.head_inputs(model, characters)
        matrix = last_layer.gauss_newton(inputs, logits)
        # Every tau costs a Cholesky factor of several hundred megabytes: the last one is kept, and where to look is
        # first found with Kronecker factors.
        at = functools.lru_cache(maxsize=1)(lambda tau: last_layer.DensePrecision(matrix, tau))
        rough = _ratio(kronecker_precision([last_layer.kronecker_factors_of_head(inputs, logits)], 1.0))
        return Curvature(at, lambda tau: at(tau).log_det() - len(matrix) * float(np.log(tau)), rough)
    rows = combinations(positions, jax.random.key(seed), *characters.shape)
    factors = kronecker_factors(linear_maps.network, model, characters, rows)
    precision = kronecker_precision([factors[name] for name in linear_maps.names(model)], 1.0)
    ratio = _ratio(precision)
    return Curvature(precision.with_prior_precision, ratio, ratio)


def _ratio(precision: KroneckerPrecision) -> Callable[[float], float]:
    values = np.asarray(precision.curvature_eigenvalues(), np.float64)
    return lambda tau: float(np.log1p(values / tau).sum())


def covered(model: CharGPT, structure: Structure) -> linear_maps.Matrices:
    """The matrices that a structure takes as uncertain."""
    return linear_maps.matrices(model, ("head",) if structure == "last-layer" else linear_maps.names(model))


@jax.jit
def _losses(model: CharGPT, windows: Int[Array, "W n+1"]) -> Float[Array, " W"]:
    return jax.lax.map(lambda window: cross_entropy(model(window[:-1]), window[1:]).sum(), windows, batch_size=64)


def evidence_of(
    model: CharGPT,
    windows: Int[Array, "W n+1"],
    at: linear_maps.Matrices,
    log_det_ratio: Callable[[float], float],
) -> Callable[[float], Evidence]:
    """The parts of the evidence of the windows as a function of the prior precision."""
    log_likelihood = -float(np.asarray(_losses(model, windows), np.float64).sum())
    square = float(np.square(np.asarray(linear_maps.flat(at), np.float64)).sum())
    return lambda tau: Evidence(log_likelihood, log_det_ratio(tau), tau * square)


def tuned(
    model: CharGPT, windows: Int[Array, "W n+1"], at: linear_maps.Matrices, found: Curvature
) -> float:
    """The prior precision of the largest evidence. Raises ValueError if there is none in the range of evidence.py."""
    rough = evidence_of(model, windows, at, found.rough_log_det_ratio)
    near = tuned_prior_precision(lambda tau: rough(tau).total)
    if found.rough_log_det_ratio is found.log_det_ratio:
        return near
    whole = evidence_of(model, windows, at, found.log_det_ratio)
    return tuned_prior_precision(lambda tau: whole(tau).total, near)


def training_windows(text: corpus.Corpus, config: Config, characters: int) -> Int[np.ndarray, "W n+1"]:
    """Windows of training text with about so many characters to predict. Raises ValueError for too few or too many."""
    available = len(text.train) // (config.context + 1) * config.context
    if not config.context <= characters <= available:
        raise ValueError(
            f"--characters: got {characters}; pass at least {config.context}, one window, and at most {available}."
        )
    chosen = dataclasses.replace(config, evaluation_windows=characters // config.context)
    return evaluation_windows(text.train, chosen)


def load_run(run: Path, text_path: Path | None) -> tuple[CharGPT, Config, corpus.Corpus]:
    """The trained model of a run, its configuration and its text. Raises ValueError naming --run."""
    path = run / checkpoint.NAME
    if not path.is_file():
        raise ValueError(f"--run: no checkpoint at {path}; make one with train, or pass another folder.")
    try:
        config = configuration_of(run)
        text = corpus.load(text_path, config.context + 1)
        state, _, _ = checkpoint.load(path, config, text.sha256, initial_state(config, len(text.vocabulary)))
    except ValueError as error:
        raise ValueError(str(error).replace("--out:", "--run:", 1)) from None
    return state.model, config, text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained run")
    parser.add_argument("--structure", choices=get_args(Structure), required=True)
    parser.add_argument("--prior-precision", type=float, help="tau (default: the one of the largest evidence)")
    parser.add_argument("--characters", type=int, default=CHARACTERS, help="of training text (default: %(default)s)")
    parser.add_argument(
        "--positions",
        choices=get_args(Positions),
        default="signs",
        help="how Kronecker factors combine the positions of a window: apart is exact and slow, signs exact in "
        "expectation, together what laplace-torch computes (default: %(default)s)",
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the predictive (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of signs and draws (default: %(default)s)")
    parser.add_argument("--corpus", type=Path, help="the text of the run (default: the Wikipedia sample)")
    parser.add_argument("--out", type=Path, required=True, help="the result, a netCDF file (.nc)")


def main(options: argparse.Namespace, console: Console) -> None:
    """Do what the options ask for: print the table and write the DataTree. Raises ValueError for bad options."""
    for name, smallest in (("draws", 1), ("seed", 0)):
        if getattr(options, name) < smallest:
            raise ValueError(f"--{name}: got {getattr(options, name)}; pass an integer of at least {smallest}.")
    tau = options.prior_precision
    if tau is not None and not (np.isfinite(tau) and tau > 0):
        raise ValueError(f"--prior-precision: got {tau}; pass a finite number greater than 0.")
    if options.out.suffix != ".nc":
        raise ValueError(f"--out: got {options.out}; pass the path of a netCDF file, ending in .nc.")
    model, config, text = load_run(options.run, options.corpus)
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    origin = provenance(options.seed, {**asked, "run_configuration": config.as_dict()})
    windows = jnp.asarray(training_windows(text, config, options.characters))

    started = time.perf_counter()
    found = curvature(model, windows, options.structure, options.positions, options.seed)
    at = covered(model, options.structure)
    tau = tuned(model, windows, at, found) if tau is None else tau
    precision, parts = found.at(tau), evidence_of(model, windows, at, found.log_det_ratio)(tau)
    curvature_seconds = time.perf_counter() - started

    started = time.perf_counter()
    validation = evaluation_windows(text.validation, config)
    draws = jnp.asarray(precision.sample(jax.random.key(options.seed), options.draws), jnp.float32)
    deviations = linear_maps.unflat(draws, at)
    probabilities, log_p = sampled(model, at, deviations, jnp.asarray(validation))
    inputs, logits = last_layer.head_inputs(model, jnp.asarray(validation[:, :-1]))
    shape = probabilities.shape
    scores = {"MAP": score(probit(logits, np.zeros_like(logits)).reshape(shape), validation[:, 1:])}
    if isinstance(precision, last_layer.DensePrecision):
        variances = last_layer.logit_variance(precision, inputs)
        scores["linearised, probit"] = score(probit(logits, variances).reshape(shape), validation[:, 1:])
    scores[f"linearised, {options.draws} draws"] = score(probabilities, validation[:, 1:])
    predictive_seconds = time.perf_counter() - started

    summary = {
        "structure": options.structure,
        "covered": {name: list(matrix.shape) for name, matrix in at.items()},
        "parameters": precision.size,
        "training_characters": int(windows[:, 1:].size),
        "validation_characters": int(validation[:, 1:].size),
        "prior_precision": tau,
        "prior_precision_tuned": options.prior_precision is None,
        "log_evidence": parts.total,
        **parts._asdict(),
        "scores": {name: value._asdict() for name, value in scores.items()},
        "seconds": {"curvature_and_evidence": curvature_seconds, "predictive": predictive_seconds},
    }
    means = {name: np.asarray(at[name]) for name in at}
    groups = {
        "posterior": {name: (means[name] + np.asarray(deviations[name]))[None] for name in at},
        "log_likelihood": {"tokens": np.asarray(log_p)[None]},
        "observed_data": {"tokens": validation[:, 1:]},
    }
    dims = {name: (f"{name}_output", f"{name}_input") for name in at}
    attrs = {**origin, "objective": f"{options.structure} Laplace of {config.method}", "laplace": summary}
    save(datatree(groups, dims, attrs), options.out)
    _report(console, summary, scores, options.out)


def _report(console: Console, summary: dict[str, Any], scores: dict[str, Score], out: Path) -> None:
    maps = summary["covered"]
    console.print(
        f"{summary['structure']}: {summary['parameters']:,} parameters in {', '.join(maps)}; embeddings and norms are "
        f"taken as known. Prior precision {summary['prior_precision']:.4g}"
        f"{' (tuned)' if summary['prior_precision_tuned'] else ''}, log-evidence {summary['log_evidence']:.2f} nats of "
        f"{summary['training_characters']:,} training characters."
    )
    table = Table("prediction", "nats per character", "standard error", "calibration error")
    for name, value in scores.items():
        table.add_row(name, *(f"{x:.4f}" for x in value))
    console.print(table)
    seconds = summary["seconds"]
    console.print(
        f"{summary['validation_characters']:,} validation characters; curvature and evidence "
        f"{seconds['curvature_and_evidence']:.1f} s, predictive {seconds['predictive']:.1f} s, compilation included; {out}"
    )

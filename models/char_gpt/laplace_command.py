"""`python -m models.char_gpt laplace`: uncertainty of the weights of a trained run, and what it does to predictions."""

import argparse
import time
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from models.char_gpt import last_layer, linear_maps
from models.char_gpt.evaluation import evaluation_windows
from models.char_gpt.laplace import Structure, covered, curvature, evidence_of, load_run, training_windows, tuned
from models.char_gpt.predictive import Score, probit, sampled, score
from prob_transformer.files import provenance
from prob_transformer.inference.laplace.kfac import Positions
from prob_transformer.inference.result_tree import datatree, save

DRAWS, CHARACTERS = 32, 32_768


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


def _check(options: argparse.Namespace) -> None:
    for name, smallest in (("draws", 1), ("seed", 0)):
        if getattr(options, name) < smallest:
            raise ValueError(f"--{name}: got {getattr(options, name)}; pass an integer of at least {smallest}.")
    tau = options.prior_precision
    if tau is not None and not (np.isfinite(tau) and tau > 0):
        raise ValueError(f"--prior-precision: got {tau}; pass a finite number greater than 0.")
    if options.out.suffix != ".nc":
        raise ValueError(f"--out: got {options.out}; pass the path of a netCDF file, ending in .nc.")


def main(options: argparse.Namespace, console: Console) -> None:
    """Do what the options ask for: print the table and write the DataTree. Raises ValueError for bad options."""
    _check(options)
    model, config, text = load_run(options.run, options.corpus)
    asked = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    origin = provenance(options.seed, {**asked, "run_configuration": config.as_dict()})
    windows = jnp.asarray(training_windows(text, config, options.characters))

    started = time.perf_counter()
    found = curvature(model, windows, options.structure, options.positions, options.seed)
    at = covered(model, options.structure)
    tau = tuned(model, windows, at, found) if options.prior_precision is None else options.prior_precision
    precision, parts = found.at(tau), evidence_of(model, windows, at, found.log_det_ratio)(tau)
    after_evidence = time.perf_counter()

    validation = evaluation_windows(text.validation, config)
    targets = validation[:, 1:]
    # Apart from the key of the signs in the Kronecker factors.
    key = jax.random.fold_in(jax.random.key(options.seed), 1)
    draws = jnp.asarray(precision.sample(key, options.draws), jnp.float32)
    deviations = linear_maps.unflat(draws, at)
    averaged, log_p = sampled(model, at, deviations, jnp.asarray(validation))
    inputs, logits = last_layer.head_inputs(model, jnp.asarray(validation[:, :-1]))
    predicted: dict[str, Any] = {"MAP": jax.nn.softmax(logits).reshape(averaged.shape)}
    if isinstance(precision, last_layer.HeadPrecision):
        variances = last_layer.logit_variance(precision, inputs)
        predicted["linearised, probit"] = probit(logits, variances).reshape(averaged.shape)
    predicted[f"linearised, {options.draws} draws"] = averaged
    scores = {name: score(probabilities, targets) for name, probabilities in predicted.items()}
    after_predictive = time.perf_counter()

    summary = {
        "structure": options.structure,
        "covered": {name: list(matrix.shape) for name, matrix in at.items()},
        "parameters": precision.size,
        "training_characters": int(windows[:, 1:].size),
        "validation_characters": int(targets.size),
        "prior_precision": tau,
        "prior_precision_tuned": options.prior_precision is None,
        "log_evidence": parts.total,
        **parts._asdict(),
        "scores": {name: value._asdict() for name, value in scores.items()},
        "seconds": {
            "curvature_and_evidence": after_evidence - started,
            "predictive": after_predictive - after_evidence,
        },
    }
    groups = {
        "posterior": {name: np.asarray(at[name] + deviations[name])[None] for name in at},
        "log_likelihood": {"tokens": np.asarray(log_p)[None]},
        "observed_data": {"tokens": targets},
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
        table.add_row(name, *("undefined" if x is None else f"{x:.4f}" for x in value))
    console.print(table)
    seconds = summary["seconds"]
    console.print(
        f"{summary['validation_characters']:,} validation characters; curvature and evidence "
        f"{seconds['curvature_and_evidence']:.1f} s, predictive {seconds['predictive']:.1f} s, compilation included; "
        f"{out}"
    )

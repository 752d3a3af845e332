"""`python -m benchmarks.laplace_torch --run DIR --torch-python PATH --out FILE.json`.

PATH is the Python of an environment made from benchmarks/laplace_torch/requirements.txt. Exit status 0 when evidence
and predictive loss agree to 1e-3, 1 when they do not, 2 for bad input.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.laplace_torch.compare import comparison, require_same_logits
from benchmarks.laplace_torch.ours import answer, log_evidence_with
from benchmarks.laplace_torch.problem import STRUCTURES, problem
from benchmarks.machine import machine, versions
from models import cli
from models.char_gpt.laplace import load_run
from prob_transformer.files import provenance, write_json

_SIZES = {
    "training_windows": (16, "windows of training text that the curvature is of"),
    "validation_windows": (8, "windows of validation text that are predicted"),
    "validation_length": (16, "characters to predict in each of them"),
    "batch": (4, "windows a batch of laplace-torch, which keeps whole Jacobians"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.laplace_torch", description="Next to laplace-torch.")
    parser.add_argument("--run", type=Path, required=True, help="folder of a trained character GPT")
    parser.add_argument("--torch-python", type=Path, required=True, metavar="PATH", help="a Python with laplace-torch")
    parser.add_argument("--corpus", type=Path, help="the text of the run (default: the Wikipedia sample)")
    parser.add_argument("--prior-precision", type=float, default=10.0, help="default: %(default)s")
    for name, (size, text) in _SIZES.items():
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, default=size, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    return parser


def _theirs(python: Path, given: dict[str, Any]) -> dict[str, Any]:
    """What torch_side.py makes of the problem. Raises ValueError naming --torch-python if it fails."""
    script = Path(__file__).with_name("torch_side.py")
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "problem.npz", Path(folder) / "result.npz"
        np.savez(paths[0], **given)
        try:
            done = subprocess.run([python, "-W", "ignore", script, *paths], capture_output=True, text=True, check=False)
        except OSError as error:
            raise ValueError(f"--torch-python: {python} cannot be run ({error.strerror}); pass a Python.") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise ValueError(f"--torch-python: {python} failed: {last}; install laplace_torch/requirements.txt there.")
        with np.load(paths[1]) as stored:
            return dict(stored)


def main(arguments: list[str] | None = None) -> int:
    """Exit status of the comparison with these command-line arguments; ValueError for bad ones."""
    options = _parser().parse_args(arguments)
    tau = options.prior_precision
    if not (np.isfinite(tau) and tau > 0):
        raise ValueError(f"--prior-precision: got {tau}; pass a finite number greater than 0.")
    sizes = {name: getattr(options, name) for name in _SIZES}
    model, config, text = load_run(options.run, options.corpus)
    origin = provenance(config.seed, {**sizes, "prior_precision": tau, "run_configuration": config.as_dict()})
    given = problem(model, config, text, tau, sizes)
    theirs = _theirs(options.torch_python, given)
    compared, targets = {}, given["validation"][:, 1:]
    for structure in STRUCTURES:
        ours = answer(model, given, structure)
        difference = require_same_logits(ours["logits"], theirs["logits"])
        own = {name.partition("/")[2]: x for name, x in theirs.items() if name.startswith(f"{structure}/")}
        compared[structure] = comparison(ours, own, targets)
    result = {
        "provenance": origin,
        "machine": machine(),
        "versions": {"ours": versions(), "theirs": json.loads(str(theirs["versions"]))},
        "training_characters": int(given["training"][:, 1:].size),
        "validation_characters": int(targets.size),
        "logits_largest_relative_difference": difference,
        "structures": compared,
        "positions": {
            # Two positions, f_1 = h_1 and f_2 = h_1 + h_2, H = [[1, -1], [-1, 1]] / 4 at both: 3 H = 0.75, not 5 H.
            "hand_case": {"gauss_newton": 0.75, "laplace_torch": float(theirs["hand_case"][0, 0])},
            "kronecker_log_evidence": {
                name: log_evidence_with(model, given, name) for name in ("apart", "signs", "together")
            },
        },
    }
    write_json(options.out, result)
    _report(Console(highlight=False), result, options.out)
    return 0 if all(found["agree"] for found in compared.values()) else 1


def _report(console: Console, result: dict[str, Any], out: Path) -> None:
    table = Table("", *result["structures"])
    rows = {
        "log-evidence, ours": lambda x: f"{x['log_evidence']['ours']['total']:.3f}",
        "log-evidence, laplace-torch": lambda x: f"{x['log_evidence']['theirs']['total']:.3f}",
        "relative difference": lambda x: f"{x['differences']['log_evidence_relative']:.1e}",
        "largest part, nats": lambda x: f"{x['differences']['parts_largest_nats']:.1e}",
        "predictive loss, ours": lambda x: f"{x['predictive_loss']['ours']:.5f}",
        "predictive loss, laplace-torch": lambda x: f"{x['predictive_loss']['theirs']:.5f}",
        "relative difference of loss": lambda x: f"{x['differences']['predictive_loss_relative']:.1e}",
        "seconds, ours (with compilation)": lambda x: (
            f"{x['seconds']['ours_steady']:.2f} ({x['seconds']['ours_first']:.2f})"
        ),
        "seconds, laplace-torch": lambda x: f"{x['seconds']['theirs']:.2f}",
        "their time over ours (with compilation)": lambda x: (
            f"{x['seconds']['ratio_steady']:.1f} ({x['seconds']['ratio_first']:.1f})"
        ),
    }
    for label, shown in rows.items():
        table.add_row(label, *(shown(found) for found in result["structures"].values()))
    console.print(table)
    positions = result["positions"]["kronecker_log_evidence"]
    console.print("Kronecker log-evidence by positions: " + ", ".join(f"{k} {v:.2f}" for k, v in positions.items()))
    console.print(f"result: {out}", markup=False)


if __name__ == "__main__":
    cli.run(main)

"""The comparison with laplace-torch as Markdown, from its result alone."""

import json
from pathlib import Path
from typing import Any

from benchmarks.laplace_torch.compare import TOLERANCE
from benchmarks.result import ROOT
from benchmarks.table import markdown_table

RESULT = ROOT / "benchmarks" / "laplace_torch" / "result.json"
# Seconds allowed on two cores, compilation included.
_SECONDS = {"last-layer": 30.0, "kronecker": 120.0}


def load(path: Path) -> dict[str, Any]:
    """The result of the comparison. Raises ValueError naming the file and the command for one that is not."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        missing = _SECONDS.keys() - result["structures"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        missing = set(_SECONDS)
    if missing:
        raise ValueError(f"RESULT: {path} is not a result; write one with python -m benchmarks.laplace_torch.")
    return result


def markdown(result: dict[str, Any]) -> str:
    """What both sides found for the same weights and data, in how much time, and against what was asked for."""
    structures = result["structures"]
    rows, verdicts = [], []
    for name, found in structures.items():
        evidence, loss, apart, time = (
            found[key] for key in ("log_evidence", "predictive_loss", "differences", "seconds")
        )
        rows.append(
            [
                name,
                f"{evidence['ours']['total']:.2f}",
                f"{evidence['theirs']['total']:.2f}",
                f"{apart['log_evidence_relative']:.1e}",
                f"{loss['ours']:.5f}",
                f"{loss['theirs']:.5f}",
                f"{apart['predictive_loss_relative']:.1e}",
                f"{time['ours_first']:.2f} s",
                f"{time['ours_steady']:.2f} s",
                f"{time['theirs']:.2f} s",
                f"{time['ratio_first']:.3g}",
                f"{time['ratio_steady']:.3g}",
            ]
        )
        for what, figure, bound in (
            ("log-evidence, relative difference", apart["log_evidence_relative"], TOLERANCE),
            ("predictive loss, relative difference", apart["predictive_loss_relative"], TOLERANCE),
            ("seconds, compilation included", time["ours_first"], _SECONDS[name]),
        ):
            met = "met" if figure <= bound else "not met"
            verdicts.append([f"{name}: {what}", f"at most {bound:g}", f"{figure:.3g}", met])
    record, theirs = result["provenance"], result["versions"]["theirs"]
    configuration = record["configuration"]["run_configuration"]
    hand, positions = result["positions"]["hand_case"], result["positions"]["kronecker_log_evidence"]
    headings = ["structure", "log-evidence", "laplace-torch", "apart", "predictive loss", "laplace-torch", "apart"]
    headings += ["time, with compilation", "time", "laplace-torch", "theirs / ours, with compilation", "theirs / ours"]
    lines = [
        "## The character GPT, next to laplace-torch",
        "",
        f"The same weights (character GPT, {configuration['layers']} layers, width {configuration['width']}, "
        f"{configuration['steps']} steps of plain cross-entropy), the same {result['training_characters']:,} training "
        f"and {result['validation_characters']:,} validation characters, the same prior precision, a process each. "
        "last-layer: the whole Gauss-Newton matrix of the head; kronecker: factors for every linear map. Evidence in "
        "nats; the predictive is the linearised one with the probit approximation, in nats a character. Time is that "
        "of curvature and factorisation.",
        "",
        f"- {', '.join(f'{name} {version}' for name, version in theirs.items())}; "
        f"{', '.join(f'{name} {version}' for name, version in result['versions']['ours'].items() if version)}",
        f"- `{record['command']}`, commit {record['commit'] or 'unknown'}, {record['machine']}",
        "",
        *markdown_table(["figure", "must be", "measured", "verdict"], verdicts),
        "",
        *markdown_table(headings, rows),
        "",
        "Positions of a window share their weights, and laplace-torch adds up what their outputs send back before it "
        "multiplies: its factors are those of the sum, not the sum of the factors. In a case of two positions computed "
        f"by hand the Gauss-Newton entry is {hand['gauss_newton']:.2f}; laplace-torch gives "
        f"{hand['laplace_torch']:.2f}. The table uses its convention on both sides; by how positions are combined "
        f"([inference.md](inference.md)) the Kronecker log-evidence is "
        f"{', '.join(f'{value:.2f} ({name})' for name, value in positions.items())}.",
    ]
    return "\n".join(lines)

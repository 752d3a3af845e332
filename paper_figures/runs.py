"""Saved runs of a sweep, as the analysis, the figures and the report read them: DIR/runs.jsonl or DIR/runs.jsonl.bz2, one run a line.

Only seeds for which every method and strength of the profile is there are used, so that every comparison can be paired.
"""

from pathlib import Path
from typing import Any, NamedTuple

from models.char_gpt import lines as saved_lines
from models.char_gpt import study
from models.char_gpt.study import BASELINE

# Neither barriers nor competitors, with questions of their own.
CONTROLS = FIRST_ORDER, SMALL_MOMENTS = tuple(study.CONTROLS)
BARRIERS, COMPETITORS = tuple(study.BARRIERS), tuple(study.COMPETITORS)
METHODS = (study.BASELINE, *BARRIERS, *CONTROLS, *COMPETITORS)
Run = dict[str, Any]


class Runs(NamedTuple):
    """The lines of a sweep, and the seeds that every method and strength in it has been run for."""

    lines: list[Run]
    seeds: tuple[int, ...]

    @property
    def profile(self) -> str:
        return str(self.lines[0]["profile"])

    @property
    def methods(self) -> tuple[str, ...]:
        """Those in the sweep, in the order of figures and tables."""
        present = {line["method"] for line in self.lines}
        return tuple(method for method in METHODS if method in present)

    def strengths(self, method: str) -> tuple[float, ...]:
        """Strengths tried of a method, from weak to strong."""
        return tuple(sorted({float(line["strength"]) for line in self.lines if line["method"] == method}))

    def of(self, method: str, strength: float) -> list[Run]:
        """The runs of a method and strength, in the order of `seeds`; a diverged one is among them."""
        by_seed = {
            line["seed"]: line for line in self.lines if (line["method"], line["strength"]) == (method, strength)
        }
        return [by_seed[seed] for seed in self.seeds]

    def finished(self, method: str, strength: float) -> list[Run]:
        """The same, or [] if a run of them diverged: a strength that fails on one seed is not one to compare."""
        members = self.of(method, strength)
        return members if all(run["status"] == "finished" for run in members) else []

    @property
    def baseline(self) -> list[Run]:
        """Plain cross-entropy, one run a seed."""
        return self.finished(BASELINE, self.strengths(BASELINE)[0])


def load_runs(folder: Path) -> Runs:
    """The sweep under `folder`. Raises ValueError with the command that makes it if there is none to compare."""
    path = saved_lines.stored_at(folder / saved_lines.NAME)
    again = f"python -m models.char_gpt sweep --out {folder}"
    if not path.exists():
        raise ValueError(f"--runs: no readable sweep at {path}; make one with {again}.")
    lines = saved_lines.read(path, "--runs")
    for number, line in enumerate(lines, start=1):
        _require_complete(path, number, line)
    unknown = {line["method"] for line in lines} - set(METHODS)
    if unknown:
        raise ValueError(f"--runs: {path} has the method {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}.")
    if len({line["profile"] for line in lines}) > 1:
        raise ValueError(f"--runs: {path} mixes profiles; give every sweep its own folder.")
    seeds = _complete_seeds(lines)
    runs = Runs(lines, seeds)
    if not seeds or BASELINE not in runs.methods:
        raise ValueError(f"--runs: {path} has no seed with all its runs and {BASELINE}; finish it with {again}.")
    if not runs.baseline:
        raise ValueError(
            f"--runs: {path} has a diverged run of {BASELINE}, so nothing to compare with; see its message."
        )
    return runs


def _require_complete(path: Path, number: int, line: Run) -> None:
    missing = {"profile", "method", "strength", "seed", "status"} - line.keys()
    if line.get("status") == "finished":
        missing |= {"splits", "margins", "watch", "embedding_rms"} - line.keys()
    if missing:
        raise ValueError(f"--runs: line {number} of {path} lacks {', '.join(sorted(missing))}; run the sweep again.")


def _complete_seeds(lines: list[Run]) -> tuple[int, ...]:
    profile = study.PROFILES.get(lines[0]["profile"]) if lines else None
    wanted = {(line["method"], line["strength"]) for line in lines}
    if profile is not None:
        wanted |= {(config.method, config.strength) for config in study.configurations(profile)}
    by_seed: dict[int, set[tuple[str, float]]] = {}
    for line in lines:
        by_seed.setdefault(line["seed"], set()).add((line["method"], line["strength"]))
    return tuple(sorted(seed for seed, have in by_seed.items() if have == wanted))


def clean_loss(run: Run, split: str) -> float:
    """Nats per character without a perturbation."""
    return float(run["splits"][split]["clean"]["nats_per_character"])


def perturbed(run: Run, split: str, kind: str) -> list[dict[str, Any]]:
    """The rows of a kind of perturbation, by level."""
    rows = [row for row in run["splits"][split]["perturbed"] if row["kind"] == kind]
    return sorted(rows, key=lambda row: row["level"])


def increase(run: Run, split: str, kind: str, level: float) -> float:
    """By how many nats per character a perturbation raises the loss. Raises ValueError if it was not measured."""
    for row in perturbed(run, split, kind):
        if row["level"] == level:
            return float(row["increase"])
    raise ValueError(f"--runs: {run['run']} has no {kind} of {level:g} on {split}; run the sweep again.")

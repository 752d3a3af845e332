"""The runs of a sweep as they are saved and read: DIR/runs.jsonl, one JSON object a line, one line a finished run.

A kill costs at most the last line. A finished file may be kept compressed: `bzip2 runs.jsonl` leaves runs.jsonl.bz2,
which is read in its place. Only seeds for which every method and strength of the profile is there are analysed, so that
every comparison can be paired.
"""

import bz2
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from paper_figures.study.design import BASELINE, METHODS, PROFILES, designs
from prob_transformer.files import write_text

NAME = "runs.jsonl"
Run = dict[str, Any]


def stored_at(path: Path) -> Path:
    """The file that holds the lines of `path`: `path` itself, or its compressed form where that form alone exists."""
    compressed = path.with_name(f"{path.name}.bz2")
    return compressed if compressed.exists() and not path.exists() else path


def _whole_lines(path: Path) -> bytes:
    """What a file holds without a line that was being written when the sweep was killed."""
    content = path.read_bytes()
    content = bz2.decompress(content) if path.suffix == ".bz2" else content
    return content[: content.rfind(b"\n") + 1]


def read(path: Path, option: str = "--out") -> list[Run]:
    """Lines written whole, in order; [] if there is no file. Raises ValueError naming the option if one is no run."""
    path = stored_at(path)
    try:
        text = _whole_lines(path).decode("utf-8")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}: {path} cannot be read ({error}); pass another folder.") from None
    found = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            run = json.loads(line)
            run["run"], run["provenance"]
            found.append(run)
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{option}: line {number} of {path} is not of a run; delete that line.") from None
    return found


def make_whole(path: Path) -> None:
    """Leave a plain file of whole lines, if there is a file: compressed ones are unpacked, a torn line is cut off."""
    stored = stored_at(path)
    if stored.exists():
        write_text(path, _whole_lines(stored).decode("utf-8"))


def append(path: Path, run: Run) -> None:
    """Add a line to the file and have it on disk before going on. NaN and infinities are refused, for they are not JSON."""
    line = json.dumps(run, allow_nan=False) + "\n"
    if stored_at(path) != path:
        make_whole(path)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def shortened(value: Any) -> Any:
    """Floats to the seven significant digits that float32 carries, all through a tree ready for JSON."""
    return json.loads(json.dumps(value), parse_float=lambda number: float(f"{float(number):.7g}"))


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
        asked = (method, strength)
        by_seed = {line["seed"]: line for line in self.lines if (line["method"], line["strength"]) == asked}
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
    path = stored_at(folder / NAME)
    again = f"python -m paper_figures.study sweep --out {folder}"
    if not path.exists():
        raise ValueError(f"--runs: no readable sweep at {path}; make one with {again}.")
    lines = read(path, "--runs")
    for number, line in enumerate(lines, start=1):
        missing = {"profile", "method", "strength", "seed", "status"} - line.keys()
        if line.get("status") == "finished":
            missing |= {"splits", "margins", "watch", "embedding_rms"} - line.keys()
        if missing:
            raise ValueError(
                f"--runs: line {number} of {path} lacks {', '.join(sorted(missing))}; run the sweep again."
            )
    wanted = {(line["method"], line["strength"]) for line in lines}
    if lines and lines[0]["profile"] in PROFILES:
        wanted |= {(design.method, design.strength) for design in designs(PROFILES[lines[0]["profile"]])}
    had = {(line["seed"], line["method"], line["strength"]) for line in lines}
    seeds = sorted({line["seed"] for line in lines})
    runs = Runs(lines, tuple(seed for seed in seeds if {(seed, *one) for one in wanted} <= had))
    unknown = {line["method"] for line in lines} - METHODS.keys()
    has_baseline = bool(runs.seeds) and BASELINE in runs.methods
    for is_wrong, message in (
        (unknown, f"has the method {', '.join(sorted(unknown))}; known are {', '.join(METHODS)}"),
        (len({line["profile"] for line in lines}) > 1, "mixes profiles; give every sweep its own folder"),
        (not has_baseline, f"has no seed with all its runs and {BASELINE}; finish it with {again}"),
        (
            has_baseline and not runs.baseline,
            f"has a diverged run of {BASELINE}, so nothing to compare with; see its message",
        ),
    ):
        if is_wrong:
            raise ValueError(f"--runs: {path} {message}.")
    return runs


def clean_loss(run: Run, split: str) -> float:
    """Nats per character without a perturbation."""
    return float(run["splits"][split]["clean"]["nats_per_character"])


def perturbed(run: Run, split: str, kind: str) -> list[Run]:
    """The rows of a kind of perturbation, by level."""
    rows = [row for row in run["splits"][split]["perturbed"] if row["kind"] == kind]
    return sorted(rows, key=lambda row: row["level"])


def increase(run: Run, split: str, kind: str, level: float) -> float:
    """By how many nats per character a perturbation raises the loss. Raises ValueError if it was not measured."""
    for row in perturbed(run, split, kind):
        if row["level"] == level:
            return float(row["increase"])
    raise ValueError(f"--runs: {run['run']} has no {kind} of {level:g} on {split}; run the sweep again.")

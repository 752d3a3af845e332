"""The file of a result, and how a killed run goes on.

Until all its sections are there a run lives in FILE.partial, written anew after every section. A later run takes over
from it the sections measured by the same sources (a digest of this package, the models and the library), with the same
sizes, versions and machine; otherwise it starts over. FILE itself, whole or not at all, is only replaced at the end.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions
from benchmarks.section import Plan, Section
from prob_transformer.files import provenance, write_json

ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("benchmarks", "models", "prob_transformer")


def digest_of_sources(root: Path = ROOT) -> str:
    """sha256 over the names and texts of all Python files that a figure depends on."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in _SOURCES for path in (root / folder).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def options(command: str, description: str) -> argparse.ArgumentParser:
    """The options of a command that measures sections."""
    parser = argparse.ArgumentParser(prog=command, description=description)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the result, as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that everything runs, and no more")
    parser.add_argument(
        "--only", nargs="+", action="extend", default=[], metavar="NAME", help="only these sections; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all that is drawn (default: %(default)s)")
    return parser


def tell(message: str) -> None:
    print(message, file=sys.stderr)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_result(sizes: Plan, quick: bool) -> dict[str, Any]:
    """A result without sections yet: what was run, where, and by what."""
    return {
        "provenance": provenance(sizes.seed, {"quick": quick, **sizes.as_dict()}),
        "date": _now(),
        "sources": digest_of_sources(),
        "machine": machine(),
        "versions": versions(),
        "sections": {},
    }


def _identity(result: dict[str, Any]) -> Any:
    return result["provenance"]["configuration"], result["sources"], result["machine"], result["versions"]


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def taken_over(path: Path, result: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The partial result of the same run if there is one, else the given result; and what to tell the user."""
    partial = partial_path(path)
    if not partial.is_file():
        return result, None
    try:
        found = json.loads(partial.read_text(encoding="utf-8"))
        same = _identity(found) == _identity(result)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--out: {partial} is not a partial result; delete it, or pass another path.") from None
    if not same:
        return result, f"{partial} is of other sizes, sources, versions or another machine; all sections are run."
    return found, f"going on from {partial}; kept: {', '.join(found['sections']) or 'nothing'}."


def measure(
    path: Path, sections: Sequence[Section], sizes: Plan, quick: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Run what is not yet in FILE.partial, save after every section, and write FILE at the end.

    Raises ValueError for a partial result that cannot be read, or a path that cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"--out: {path} is a folder; pass the path of a file.")
    result, message = taken_over(path, new_result(sizes, quick))
    if message is not None:
        tell(message)
    # Also finds out now, rather than after minutes, whether the path can be written.
    write_json(partial_path(path), result)
    for section in sections:
        if section.name in result["sections"]:
            continue
        started = datetime.now(UTC)
        found = section.run(sizes)
        seconds = (datetime.now(UTC) - started).total_seconds()
        result["sections"][section.name] = {**found, "finished": _now(), "wall_seconds": seconds}
        write_json(partial_path(path), result)
        tell(f"{section.name}: {seconds:.0f} s")
    kept = {section.name: result["sections"][section.name] for section in sections}
    whole = {**result, "sections": kept}
    write_json(path, whole)
    # Sections that were not asked for this time stay there for the run that asks for them.
    if kept.keys() == result["sections"].keys():
        partial_path(path).unlink()
    return whole

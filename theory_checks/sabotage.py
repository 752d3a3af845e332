"""Sabotage: every mistake of `mistakes.py` is put into a copy of the library, and the quick checks are run on it.

A check that can fail does; a mistake that every check lets pass shows what none of them looks at.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from prob_transformer.files import provenance, write_json
from theory_checks.mistakes import MISTAKES, Mistake
from theory_checks.registry import select

ROOT = Path(__file__).resolve().parent.parent
_COPIED = ("prob_transformer", "theory_checks", "models")
# The unharmed library, run like every mistake: what it fails would be no catch.
CONTROL = Mistake("(none)", ())


@dataclass(frozen=True)
class Verdicts:
    """The ids of the checks that did not come out as stated under a mistake, and of all that were run."""

    mistake: Mistake
    caught_by: tuple[str, ...]
    checks: tuple[str, ...]

    @property
    def as_wanted(self) -> bool:
        return bool(self.caught_by) == bool(self.mistake.replacements)


def select_mistakes(names: Sequence[str]) -> tuple[Mistake, ...]:
    """The mistakes with these names, all of them for no names; ValueError for an unknown name."""
    known = [mistake.name for mistake in MISTAKES]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--mistake: unknown {', '.join(map(repr, unknown))}; known: {'; '.join(known)}.")
    return tuple(mistake for mistake in MISTAKES if not names or mistake.name in names)


def sabotaged(mistake: Mistake, file: str, source: str) -> str:
    """The source of a file of the library with the mistake in it; ValueError unless each old text occurs once."""
    for name, old, new in mistake.replacements:
        if name == file:
            if source.count(old) != 1:
                raise ValueError(
                    f"mistake {mistake.name!r}: {old!r} occurs {source.count(old)} times in {file}, not once."
                )
            source = source.replace(old, new)
    return source


def run_mistake(mistake: Mistake, only: Sequence[str], seed: int, cache: Path) -> Verdicts:
    """Run the quick checks on a copy of the library with this mistake in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for package in _COPIED:
            shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
        for file in {file for file, _, _ in mistake.replacements}:
            path = copy / "prob_transformer" / file
            path.write_text(sabotaged(mistake, file, path.read_text(encoding="utf-8")), encoding="utf-8")
        results = copy / "checks.json"
        command = [sys.executable, "-m", "theory_checks", "--quick", "--jobs", "1", "--json", str(results)]
        command += ["--seed", str(seed), *(part for name in only for part in ("--only", name))]
        # What a mistake leaves as it was is compiled once for all of them.
        compiled = {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        environment = {**os.environ, **compiled, "PYTHONPATH": str(copy)}
        finished = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if not results.exists():
            last = (finished.stderr.strip().splitlines() or ["no message"])[-1]
            raise RuntimeError(f"{mistake.name}: the checks did not run (exit status {finished.returncode}): {last}")
        rows = json.loads(results.read_text(encoding="utf-8"))["checks"]
    return Verdicts(
        mistake,
        tuple(row["id"] for row in rows if not row["as_stated"]),
        tuple(row["id"] for row in rows),
    )


def run_mistakes(mistakes: Sequence[Mistake], only: Sequence[str], seed: int, jobs: int) -> Iterator[Verdicts]:
    """Verdicts in the order in which they come."""
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run_mistake, mistake, only, seed, Path(cache)) for mistake in mistakes]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def fingerprint() -> str:
    """Hash of everything that a verdict depends on here: the sources that are copied."""
    digest = hashlib.sha256()
    for package in _COPIED:
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def _finished(path: Path | None, mistakes: Sequence[Mistake], checks: tuple[str, ...], key: str) -> dict[str, Verdicts]:
    """What an interrupted run of the same sources, checks and seed has left in `path`."""
    if path is None or not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        same = report["key"] == key and tuple(report["checks"]) == checks
        rows = {row["mistake"]: tuple(row["caught_by"]) for row in report["mistakes"]} if same else {}
    except (ValueError, KeyError, TypeError):
        return {}
    return {m.name: Verdicts(m, rows[m.name], checks) for m in mistakes if m.name in rows}


def _to_json(found: Sequence[Verdicts]) -> list[dict[str, Any]]:
    return [
        {
            "mistake": verdicts.mistake.name,
            "replacements": [
                {"file": f"prob_transformer/{file}", "old": old, "new": new}
                for file, old, new in verdicts.mistake.replacements
            ],
            "caught_by": list(verdicts.caught_by),
            "as_wanted": verdicts.as_wanted,
        }
        for verdicts in found
    ]


def _table(found: Sequence[Verdicts]) -> Table:
    table = Table("mistake", "in", "caught by")
    for verdicts in found:
        colour = "green" if verdicts.as_wanted else "red"
        files = ", ".join(sorted({file for file, _, _ in verdicts.mistake.replacements}))
        table.add_row(verdicts.mistake.name, files, f"[{colour}]{', '.join(verdicts.caught_by) or 'nothing'}[/]")
    return table


def main(options: Namespace) -> int:
    """Exit status: 0 if the library passes and every mistake is caught, 1 otherwise. ValueError for unknown names."""
    from theory_checks.__main__ import STDOUT, print_table, progress_bar

    checks = tuple(check.id for check in select(options.only))
    mistakes = (CONTROL, *select_mistakes(options.mistake))
    configuration = {"only": options.only, "mistake": options.mistake, "jobs": options.jobs}
    record = provenance(options.seed, configuration)
    path = None if options.json in (None, STDOUT) else options.json
    # A mistake takes the better part of a minute: what an interrupted run found is not found again.
    key = f"{fingerprint()} seed {options.seed}"
    found = _finished(path, mistakes, checks, key)

    def report() -> dict[str, Any]:
        ordered = [found[mistake.name] for mistake in mistakes if mistake.name in found]
        complete = len(ordered) == len(mistakes)
        return {
            "provenance": record,
            "key": key,
            "checks": list(checks),
            "mistakes": _to_json(ordered),
            "complete": complete,
            "all_caught": complete and all(verdicts.as_wanted for verdicts in ordered),
        }

    with progress_bar() as progress:
        task = progress.add_task(f"mistakes, {options.jobs} at a time", total=len(mistakes), completed=len(found))
        missing = [mistake for mistake in mistakes if mistake.name not in found]
        for verdicts in run_mistakes(missing, options.only, options.seed, options.jobs):
            found[verdicts.mistake.name] = verdicts
            progress.advance(task)
            # Written after every mistake: an interrupted run keeps what it has found.
            if path is not None:
                write_json(path, report())
    final = report()
    if options.json == STDOUT:
        print(json.dumps(final, indent=1))
        return 0 if final["all_caught"] else 1
    print_table(_table([found[mistake.name] for mistake in mistakes]))
    caught = sum(bool(found[mistake.name].caught_by) for mistake in mistakes[1:])
    if not found[CONTROL.name].as_wanted:
        print(f"The library itself fails {', '.join(found[CONTROL.name].caught_by)}: no catch below means anything.")
    print(f"{caught} of {len(mistakes) - 1} mistakes were caught.")
    return 0 if final["all_caught"] else 1

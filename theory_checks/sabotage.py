"""Sabotage: every mistake of `mistakes.py` is put into a copy of the library, and the quick checks are run on it.

A check that can fail does; a mistake that every check lets pass shows what none of them looks at.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tabulate import tabulate
from tqdm import tqdm

from benchmarks.result_file import ROOT, SOURCES, digest_of_sources, resumed
from benchmarks.result_tables import chosen
from prob_transformer.files import provenance
from theory_checks.claims import select
from theory_checks.mistakes import MISTAKES, Mistake

# Stands for standard output where the path of a result is asked for.
STDOUT = Path("-")
# The unharmed library, run like every mistake: what it fails would be no catch.
CONTROL = Mistake("(none)", ())


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


def run_mistake(mistake: Mistake, only: Sequence[str], seed: int, cache: Path) -> dict[str, Any]:
    """The quick checks that do not come out as stated on a copy of the library with this mistake in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for package in SOURCES:
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
    caught_by = [row["id"] for row in rows if not row["as_stated"]]
    return {
        "mistake": mistake.name,
        "replacements": [
            {"file": f"prob_transformer/{file}", "old": old, "new": new} for file, old, new in mistake.replacements
        ],
        "caught_by": caught_by,
        "as_wanted": bool(caught_by) == bool(mistake.replacements),
    }


def run_mistakes(mistakes: Sequence[Mistake], only: Sequence[str], seed: int, jobs: int) -> Iterator[dict[str, Any]]:
    """What became of the mistakes, in the order in which they come."""
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run_mistake, mistake, only, seed, Path(cache)) for mistake in mistakes]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def main(options: Namespace) -> int:
    """Exit status: 0 if the library passes and every mistake is caught, 1 otherwise. ValueError for unknown names."""
    checks = [check.id for check in select(options.only)]
    mistakes = (CONTROL, *chosen("--mistake", options.mistake, {mistake.name: mistake for mistake in MISTAKES}))
    configuration = {"only": options.only, "mistake": options.mistake, "jobs": options.jobs}
    key = f"{digest_of_sources()} seed {options.seed}"

    def run(missing: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        asked = [mistake for mistake in mistakes if mistake.name in missing]
        rows = run_mistakes(asked, options.only, options.seed, options.jobs)
        for row in tqdm(rows, "mistakes", len(asked), leave=False, unit="mistake"):
            yield row["mistake"], row

    def whole(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return {
            "provenance": provenance(options.seed, configuration),
            "key": key,
            "checks": checks,
            "mistakes": list(rows.values()),
            "complete": True,
            "all_caught": all(row["as_wanted"] for row in rows.values()),
        }

    # A mistake takes the better part of a minute: what an interrupted run found is not found again.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sabotage.json" if options.json in (None, STDOUT) else options.json
        report = resumed(path, [mistake.name for mistake in mistakes], [key, checks], run, whole, "--json")
    if options.json == STDOUT:
        print(json.dumps(report, indent=1))
        return 0 if report["all_caught"] else 1
    table = [
        [
            row["mistake"],
            ", ".join(sorted({change["file"] for change in row["replacements"]})),
            ", ".join(row["caught_by"]),
        ]
        for row in report["mistakes"]
    ]
    print(tabulate(table, ["mistake", "in", "caught by"], maxcolwidths=[50, None, 70]))
    control, *harmed = report["mistakes"]
    if not control["as_wanted"]:
        print(f"The library itself fails {', '.join(control['caught_by'])}: no catch below means anything.")
    print(f"{sum(bool(row['caught_by']) for row in harmed)} of {len(harmed)} mistakes were caught.")
    return 0 if report["all_caught"] else 1

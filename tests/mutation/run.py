"""Mutation testing of the core files: `python tests/mutation/run.py [--module NAME] [--own-tests-only] --out FILE`.

Needs cosmic-ray (`pip install cosmic-ray`), which is not in the lock file: it finds the mutants and applies them, in a
temporary copy of the checkout. Each mutant first meets the tests of its own file, cheapest first, and if it survives
those, the tests of the other core files. The tests run in a fork of this process, in which JAX is imported but not
started, so that a mutant costs seconds. Exit status 1 if less than 90 % of a file's mutants are killed, 2 for bad
input.
"""

import argparse
import ast
import difflib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = Path(__file__).with_name("cosmic_ray.toml")
TESTED_BY = ("barrier", "attention", "margin", "change_of_variables", "process", "transform", "token_model")
SHARE = 0.9
# Imported before forking; none of them starts a JAX backend, whose threads a fork would not survive.
SHARED_IMPORTS = ("hypothesis", "jax", "numpyro.infer", "optimistix", "pytest", "scipy.integrate", "scipy.stats")

sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Mutant:
    """One mutant as cosmic-ray numbers it, and what became of it."""

    line: int
    operator: str
    occurrence: int
    outcome: str
    detail: str

    @property
    def name(self) -> tuple[str, int]:
        return self.operator, self.occurrence


class _CheapestFirst:
    """A pytest plugin: cheapest tests first, by the durations of the unchanged code; notes the first failure."""

    def __init__(self, durations: dict[str, float]):
        self.durations, self.measured, self.failed = durations, dict[str, float](), ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.durations.get(item.nodeid, 0.0))

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failed = self.failed or f"{report.nodeid} (import)"

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.measured[report.nodeid] = self.measured.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid


def run_tests(clone: Path, files: list[str], durations: dict[str, float], timeout: float) -> tuple[str, dict[str, Any]]:
    """("passed", "failed" or "timeout", what the tests reported) of test files run in a fork, inside the copy."""
    with tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") as report:
        with warnings.catch_warnings():
            # JAX warns of every fork; it has not started a thread yet.
            warnings.simplefilter("ignore", RuntimeWarning)
            child = os.fork()
        if child == 0:
            status = 3
            try:
                os.setsid()
                null = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(null, stream)
                os.chdir(clone)
                sys.path[:] = [str(clone), *(entry for entry in sys.path if entry not in (str(ROOT), ""))]
                sys.dont_write_bytecode = True
                import pytest

                order = _CheapestFirst(durations)
                # pytest warns that plugins imported before the fork cannot have their assertions rewritten.
                options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
                status = pytest.main([*options, *files], plugins=[order])
                mutated = Path(getattr(sys.modules.get("prob_transformer"), "__file__", None) or clone)
                if clone not in (mutated, *mutated.parents):
                    status, order.failed = 3, f"imported {mutated} and not the copy"
                Path(report.name).write_text(json.dumps([order.failed, order.measured]), encoding="utf-8")
            finally:
                os._exit(int(status))
        deadline = time.monotonic() + timeout
        while True:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                break
            if time.monotonic() > deadline:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "timeout", {"failed": "", "measured": {}}
            time.sleep(0.02)
        text = report.read()
    failed, measured = json.loads(text) if text else (f"tests ended with status {code}", {})
    return "passed" if code == 0 else "failed", {"failed": failed, "measured": measured}


def annotation_spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file begin and end, as (line, column) pairs like cosmic-ray's."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
                assert part.end_lineno is not None
                assert part.end_col_offset is not None
                found.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    return found


def _compiles(code: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compile(code, "mutant", "exec")
        except SyntaxError:
            return False
    return True


def _changed_lines(before: str, after: str) -> str:
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))
    return "\n".join(line[0] + line[1:].strip() for line in lines if re.match(r"[+-](?![+-])\s*\S", line))


def run_module(
    module: Path, clone: Path, timeout: float, earlier: dict[tuple[str, int], Mutant], own_only: bool
) -> Iterator[Mutant]:
    """Every mutant of one file with its outcome: excluded, killed, timeout or survived."""
    from cosmic_ray.commands import init
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator
    from cosmic_ray.work_db import WorkDB

    source = (clone / module).read_text(encoding="utf-8")
    annotations = annotation_spans(source)
    session = WorkDB(clone.parent / f"{module.stem}.sqlite", WorkDB.Mode.create)
    init([clone / module], session, {})
    specifications = [mutation for item in session.work_items for mutation in item.mutations]
    session.close()

    def stage(names: list[str]) -> Any:
        files = [f"tests/test_{name}.py" for name in names]
        outcome, report = run_tests(clone, files, {}, 3 * timeout)
        if outcome != "passed":
            raise ValueError(f"{module}: the unchanged code fails {report['failed'] or outcome}; mend that first.")
        return lambda: run_tests(clone, files, report["measured"], timeout)

    stages: list[Any] = [None] if own_only else [None, None]
    plan = [[module.stem], [name for name in TESTED_BY if name != module.stem]]
    for mutation in sorted(specifications, key=lambda m: (m.start_pos, m.operator_name, m.occurrence)):
        line, operator = mutation.start_pos[0], mutation.operator_name.removeprefix("core/")

        def judged(outcome: str, detail: str = "", line=line, operator=operator, mutation=mutation) -> Mutant:
            return Mutant(line, operator, mutation.occurrence, outcome, detail)

        code = mutate_code(source, get_operator(mutation.operator_name)(), mutation.occurrence)
        before = earlier.get((operator, mutation.occurrence))
        if any(begin <= mutation.start_pos and mutation.end_pos <= end for begin, end in annotations):
            yield judged("excluded", "annotation")
        elif not _compiles(code):
            yield judged("excluded", "syntax error")
        elif before is not None and before.outcome == "killed":
            yield before
        else:
            for index in range(len(stages)):
                stages[index] = stages[index] or stage(plan[index])
                (clone / module).write_text(code, encoding="utf-8")
                try:
                    outcome, report = stages[index]()
                finally:
                    (clone / module).write_text(source, encoding="utf-8")
                if outcome != "passed":
                    break
            if outcome == "passed":
                yield judged("survived", _changed_lines(source, code))
            elif outcome == "timeout":
                yield judged("timeout", _changed_lines(source, code))
            else:
                yield judged("killed", report["failed"])


def table(found: dict[str, list[Mutant]]) -> str:
    """The counts of each file as a Markdown table."""
    rows = ["| file | mutants | excluded | run | killed | survived | timed out | killed of those run |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    total = [mutant for mutants in found.values() for mutant in mutants]
    for name, mutants in [*found.items(), ("together", total)]:
        count = {
            kind: sum(m.outcome == kind for m in mutants) for kind in ("excluded", "killed", "survived", "timeout")
        }
        run = len(mutants) - count["excluded"]
        cells = [len(mutants), count["excluded"], run, count["killed"], count["survived"], count["timeout"]]
        rows.append(f"| {name} | {' | '.join(map(str, cells))} | {count['killed'] / max(run, 1):.1%} |")
    return "\n".join(rows)


def _share(mutants: list[Mutant]) -> float:
    run = [mutant for mutant in mutants if mutant.outcome != "excluded"]
    return sum(mutant.outcome == "killed" for mutant in run) / max(len(run), 1)


def _earlier(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"mutants": record["mutants"], "sha256": record["sha256"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not the JSON of an earlier run ({error!r}).") from None


def main(arguments: list[str] | None = None) -> int:
    configuration = tomllib.loads(CONFIGURATION.read_text(encoding="utf-8"))["cosmic-ray"]
    modules = {Path(path).stem: Path(path) for path in configuration["module-path"]}
    parser = argparse.ArgumentParser(prog="python tests/mutation/run.py", description="Mutation testing of the core.")
    parser.add_argument("--module", action="append", choices=modules, help="only this file; may be repeated")
    parser.add_argument("--own-tests-only", action="store_true", help="leave out the tests of the other core files")
    parser.add_argument("--survivors-of", type=Path, help="JSON of an earlier run; only its survivors are run again")
    parser.add_argument("--out", type=Path, required=True, help="JSON of counts and survivors")
    options = parser.parse_args(arguments)
    try:
        version = metadata.version("cosmic-ray")
    except metadata.PackageNotFoundError:
        raise ValueError("cosmic-ray: not installed; pip install cosmic-ray.") from None
    earlier = _earlier(options.survivors_of) if options.survivors_of else {"mutants": {}, "sha256": {}}
    found: dict[str, list[Mutant]] = {}
    digests: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder).resolve() / "clone"
        cache = {"DIR": str(clone.parent / "compiled"), "MIN_COMPILE_TIME_SECS": "0", "MIN_ENTRY_SIZE_BYTES": "-1"}
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", cache["DIR"])
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", cache["MIN_COMPILE_TIME_SECS"])
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", cache["MIN_ENTRY_SIZE_BYTES"])
        for package in SHARED_IMPORTS:
            import_module(package)
        assert "prob_transformer" not in sys.modules
        for part in ("prob_transformer", "models", "tests"):
            shutil.copytree(ROOT / part, clone / part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copy(ROOT / "pyproject.toml", clone)
        for name in options.module or modules:
            digests[name] = hashlib.sha256((clone / modules[name]).read_bytes()).hexdigest()
            if earlier["sha256"].get(name, digests[name]) != digests[name]:
                raise ValueError(f"{options.survivors_of}: {name}.py has changed since; run it without --survivors-of.")
            before = {mutant.name: mutant for mutant in (Mutant(**entry) for entry in earlier["mutants"].get(name, []))}
            found[name] = []
            for mutant in run_module(modules[name], clone, configuration["timeout"], before, options.own_tests_only):
                found[name].append(mutant)
                if mutant.outcome in ("survived", "timeout"):
                    print(f"{name}.py:{mutant.line} {mutant.outcome} {mutant.operator}\n{mutant.detail}", flush=True)
            print(f"{name}: {_share(found[name]):.1%} killed", flush=True)
    from prob_transformer.provenance import provenance, write_json

    record = provenance(None, {"own_tests_only": options.own_tests_only})
    record["packages"]["cosmic-ray"] = version
    mutants = {name: [asdict(mutant) for mutant in entries] for name, entries in found.items()}
    write_json(options.out, {"provenance": record, "sha256": digests, "mutants": mutants})
    print(table(found))
    return 0 if all(_share(entries) >= SHARE for entries in found.values()) else 1


if __name__ == "__main__":
    from models import cli

    cli.run(main)

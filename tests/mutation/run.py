"""Mutation testing of the core files: `make mutation`, or `python tests/mutation/run.py [options] --out FILE`.

Needs cosmic-ray, which `make mutation` installs: it finds the mutants and applies them, in a temporary copy of the
checkout for each of several workers. Each mutant first meets the tests of its own file, cheapest first; if it survives
those, the properties; and if it survives these as well, the tests of the other core files. All of them are tests that
`make test` runs. The tests run in a fork of the worker, in which JAX is imported but not started, so that a mutant
costs seconds. Exit status 1 if less than 90 % of a file's mutants are killed, 2 for bad input.
"""

import argparse
import ast
import contextlib
import difflib
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib import import_module, metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("softmax", "attention", "change_of_variables", "barrier", "margins", "embedding_process")
TESTED_BY = (
    "barrier", "attention", "margins", "change_of_variables", "embedding_process", "sampling", "token_model", "softmax",
    "layers", "layer_margins",
)  # fmt: skip
# Files whose own tests stand in more than one file.
OWN_TESTS = {"attention": ("attention", "layers", "layer_margins"), "margins": ("margins", "layer_margins")}
SHARE = 0.9
# Seconds that the tests of one mutant may take before it counts as timed out.
TIMEOUT = 600.0
# Imported before forking; none of them starts a JAX backend, whose threads a fork would not survive.
SHARED_IMPORTS = ("hypothesis", "jax", "numpyro.infer", "pytest", "scipy.integrate", "scipy.stats")

# What a worker copies, and what must come from its copy when the tests run.
COPIED = ("prob_transformer", "models", "theory_checks", "tests")

# Workers have what is imported before they are forked; JAX is started in forks of theirs alone.
FORK = multiprocessing.get_context("fork")

sys.path.insert(0, str(ROOT))


class Mutant(NamedTuple):
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


def foreign_module(clone: Path) -> str:
    """A module of the checkout that was imported from elsewhere than the copy; empty if there is none."""
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if name.partition(".")[0] in COPIED and path is not None and clone not in Path(path).parents:
            return f"imported {path} and not the copy"
    return ""


def _run_pytest(report: Connection, clone: Path, files: tuple[str, ...], durations: dict[str, float]) -> None:
    """Sends exit status, first failure and durations of test files, run in this process inside the copy."""
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.chdir(clone)
    sys.path[:] = [str(clone), *(entry for entry in sys.path if entry not in (str(ROOT), ""))]
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.partition(".")[0] in COPIED]:
        del sys.modules[name]
    import pytest

    order = _CheapestFirst(durations)
    # pytest warns that plugins imported before the fork cannot have their assertions rewritten.
    options = ["-q", "-x", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    status = pytest.main([*options, "-m", "not slow", *files], plugins=[order])
    report.send((int(status), foreign_module(clone) or order.failed, order.measured))


def run_tests(
    clone: Path, files: tuple[str, ...], durations: dict[str, float], timeout: float
) -> tuple[str, str, dict[str, float]]:
    """("passed", "failed" or "timeout", the first failure, durations) of tests run in a fork, inside the copy."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_run_pytest, args=(sender, clone, files, durations))
    with warnings.catch_warnings():
        # JAX warns of every fork; it has not started a thread yet.
        warnings.simplefilter("ignore", RuntimeWarning)
        child.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return "timeout", "", {}
        status, failed, measured = receiver.recv()
    except EOFError:
        return "failed", "the tests ended before their report", {}
    finally:
        # The processes of its tests too; they are gone already unless the time ran out.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.join()
    if failed.startswith("imported "):
        raise ValueError(f"{failed}; nothing can be said of the mutant.")
    return "passed" if status == 0 else "failed", failed, measured


def annotation_spans(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations of a file begin and end, as (line, column) pairs like cosmic-ray's."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if isinstance(part, ast.expr):
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


class Worker:
    """A copy of the checkout with compiled code of its own, and the durations of the unchanged code's tests in it."""

    def __init__(self, folder: Path):
        home = folder / str(os.getpid())
        self.clone = home / "clone"
        self.durations: dict[tuple[str, ...], dict[str, float]] = {}
        for part in COPIED:
            shutil.copytree(ROOT / part, self.clone / part, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        shutil.copy(ROOT / "pyproject.toml", self.clone)
        # JAX does not write its cache atomically: two workers sharing one would fail tests now and then.
        settings = {"DIR": home / "compiled", "MIN_COMPILE_TIME_SECS": 0, "MIN_ENTRY_SIZE_BYTES": -1}
        import jax

        jax.config.update("jax_compilation_cache_dir", str(settings.pop("DIR")))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = jax.config.jax_compilation_cache_dir
        for name, value in settings.items():
            jax.config.update(f"jax_persistent_cache_{name.lower()}", value)
            os.environ[f"JAX_PERSISTENT_CACHE_{name}"] = str(value)

    def judge(self, module: Path, code: str, stages: list[tuple[str, ...]]) -> tuple[str, str]:
        """Outcome of a mutant, and the first test that failed: stage after stage until one fails.

        Raises ValueError if the unchanged code, whose tests are timed once, fails a stage.
        """
        source = (self.clone / module).read_text(encoding="utf-8")
        for files in stages:
            if files not in self.durations:
                outcome, failed, measured = run_tests(self.clone, files, {}, 3 * TIMEOUT)
                if outcome != "passed":
                    raise ValueError(f"{module}: the unchanged code fails {failed or outcome}; mend that first.")
                self.durations[files] = measured
            (self.clone / module).write_text(code, encoding="utf-8")
            try:
                outcome, failed, _ = run_tests(self.clone, files, self.durations[files], TIMEOUT)
            finally:
                (self.clone / module).write_text(source, encoding="utf-8")
            if outcome != "passed":
                return "killed" if outcome == "failed" else outcome, failed
        return "survived", ""


# One a process, made when its first mutant comes.
_worker = cache(Worker)


def _judge(folder: Path, task: tuple[Path, str, list[tuple[str, ...]]]) -> tuple[str, str]:
    return _worker(folder).judge(*task)


def stages_of(module: Path, own_only: bool) -> list[tuple[str, ...]]:
    """The test files that a mutant of the module meets, in this order until one of them kills it."""
    names = OWN_TESTS.get(module.stem, (module.stem,))
    own, others = (
        tuple(f"tests/test_{name}.py" for name in some)
        for some in (names, [name for name in TESTED_BY if name not in names])
    )
    return [own] if own_only else [own, ("tests/properties",), others]


def run_module(
    module: Path,
    judge: Callable[[list[Any]], Iterator[tuple[str, str]]],
    earlier: dict[tuple[str, int], Mutant],
    own_only: bool,
) -> Iterator[Mutant]:
    """Every mutant of one file with its outcome: excluded, killed, timeout or survived; `judge` runs their tests."""
    from cosmic_ray.commands import init
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator
    from cosmic_ray.work_db import WorkDB

    source = (ROOT / module).read_text(encoding="utf-8")
    annotations = annotation_spans(source)
    with tempfile.TemporaryDirectory() as folder:
        session = WorkDB(Path(folder) / "session.sqlite", WorkDB.Mode.create)
        init([ROOT / module], session, {})
        specifications = [mutation for item in session.work_items for mutation in item.mutations]
        session.close()

    known: list[Mutant | None] = []
    mutants, codes = [], []
    for mutation in sorted(specifications, key=lambda m: (m.start_pos, m.operator_name, m.occurrence)):
        code = mutate_code(source, get_operator(mutation.operator_name)(), mutation.occurrence)
        mutant = Mutant(
            mutation.start_pos[0], mutation.operator_name.removeprefix("core/"), mutation.occurrence, "", ""
        )
        before = earlier.get(mutant.name)
        if any(begin <= mutation.start_pos and mutation.end_pos <= end for begin, end in annotations):
            known.append(mutant._replace(outcome="excluded", detail="annotation"))
        elif not _compiles(code):
            known.append(mutant._replace(outcome="excluded", detail="syntax error"))
        elif before is not None and before.outcome == "killed":
            known.append(before)
        else:
            known.append(None)
            mutants.append(mutant)
            codes.append(code)
    stages = stages_of(module, own_only)
    judged = zip(mutants, codes, judge([(module, code, stages) for code in codes]), strict=True)
    for mutant_known in known:
        if mutant_known is not None:
            yield mutant_known
            continue
        mutant, code, (outcome, failed) = next(judged)
        yield mutant._replace(outcome=outcome, detail=failed if outcome == "killed" else _changed_lines(source, code))


def table(found: dict[str, list[Mutant]]) -> str:
    """The counts of each file as a Markdown table."""
    from tabulate import tabulate

    headings = ["file", "mutants", "excluded", "run", "killed", "survived", "timed out", "killed of those run"]
    rows = []
    for name, mutants in {**found, "together": [mutant for each in found.values() for mutant in each]}.items():
        count = Counter(mutant.outcome for mutant in mutants)
        run = len(mutants) - count["excluded"]
        counts = [count[kind] for kind in ("killed", "survived", "timeout")]
        rows.append([name, len(mutants), count["excluded"], run, *counts, f"{_share(mutants):.1%}"])
    return tabulate(rows, headings, tablefmt="github")


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
    modules = {name: Path("prob_transformer") / f"{name}.py" for name in MODULES}
    parser = argparse.ArgumentParser(prog="python tests/mutation/run.py", description="Mutation testing of the core.")
    parser.add_argument("--module", action="append", choices=modules, help="only this file; may be repeated")
    parser.add_argument("--own-tests-only", action="store_true", help="leave out the tests of the other core files")
    parser.add_argument("--jobs", type=int, default=2, help="workers, one a core (default 2)")
    parser.add_argument("--survivors-of", type=Path, help="JSON of an earlier run; only its survivors are run again")
    parser.add_argument("--out", type=Path, required=True, help="JSON of counts and survivors")
    options = parser.parse_args(arguments)
    try:
        version = metadata.version("cosmic-ray")
    except metadata.PackageNotFoundError:
        raise ValueError("cosmic-ray: is not installed; run `make mutation`, which installs it.") from None
    if options.jobs < 1:
        raise ValueError(f"--jobs: got {options.jobs}; pass 1 or more.")
    earlier = _earlier(options.survivors_of) if options.survivors_of else {"mutants": {}, "sha256": {}}
    found: dict[str, list[Mutant]] = {}
    digests: dict[str, str] = {}
    for package in SHARED_IMPORTS:
        import_module(package)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.jobs, FORK) as pool:
        judge = partial(pool.map, partial(_judge, Path(folder).resolve()))
        for name in options.module or modules:
            start = time.monotonic()
            digests[name] = hashlib.sha256((ROOT / modules[name]).read_bytes()).hexdigest()
            if earlier["sha256"].get(name, digests[name]) != digests[name]:
                raise ValueError(f"{options.survivors_of}: {name}.py has changed since; run it without --survivors-of.")
            before = {mutant.name: mutant for mutant in (Mutant(**entry) for entry in earlier["mutants"].get(name, []))}
            found[name] = []
            for mutant in run_module(modules[name], judge, before, options.own_tests_only):
                found[name].append(mutant)
                if mutant.outcome in ("survived", "timeout"):
                    print(f"{name}.py:{mutant.line} {mutant.outcome} {mutant.operator}\n{mutant.detail}", flush=True)
            print(f"{name}: {_share(found[name]):.1%} killed, {time.monotonic() - start:.0f} s", flush=True)
    from prob_transformer.files import provenance, write_json

    record = provenance(None, {"own_tests_only": options.own_tests_only})
    record["packages"]["cosmic-ray"] = version
    mutants = {name: [mutant._asdict() for mutant in entries] for name, entries in found.items()}
    write_json(options.out, {"provenance": record, "sha256": digests, "mutants": mutants})
    print(table(found))
    return 0 if all(_share(entries) >= SHARE for entries in found.values()) else 1


if __name__ == "__main__":
    from models import cli

    cli.run(main)

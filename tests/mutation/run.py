"""Mutation testing of the core files: `python tests/mutation/run.py [--module NAME] [--survivors-of FILE] --out FILE`.

Needs cosmic-ray (`pip install cosmic-ray`), which is not in the lock file. Works on a temporary clone of the working tree, since
cosmic-ray rewrites files in place. Each mutant first meets the tests of its own file, then those of the other core
files. Exit status 1 if fewer than 90 % of the mutants of a file are killed, 2 for bad input.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from models import cli
from prob_transformer.provenance import provenance, write_json

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("attention", "change_of_variables", "barrier", "margin", "process")
TESTED_BY = ("attention", "change_of_variables", "barrier", "margin", "process", "transform", "token_model")
SHARE = 0.9
TIMEOUT_SECONDS = 300
# Left out, for they say nothing about the tests: the "|" of annotations is never evaluated as an operator, bit operators
# on floating-point arrays raise at once, and "is" equals "==" for the small integers compared here.
EXCLUDED = (
    "core/ReplaceBinaryOperator_BitOr_.*",
    "core/ReplaceBinaryOperator_.*_(RShift|LShift|BitXor|BitOr|BitAnd)",
    "core/ReplaceComparisonOperator_.*_Is(Not)?",
)


def _configuration(module: str) -> str:
    own = f"{sys.executable} -m pytest -q -x -p no:cacheprovider tests/test_{module}.py"
    others = " ".join(f"tests/test_{name}.py" for name in TESTED_BY if name != module)
    test = f"sh -c '{own} && {sys.executable} -m pytest -q -x -p no:cacheprovider {others}'"
    excluded = ", ".join(f'"{pattern}"' for pattern in EXCLUDED)
    return (
        f'[cosmic-ray]\nmodule-path = "prob_transformer/{module}.py"\ntimeout = {TIMEOUT_SECONDS}.0\n'
        f'excluded-modules = []\ntest-command = "{test}"\n[cosmic-ray.distributor]\nname = "local"\n'
        f"[cosmic-ray.filters.operators-filter]\nexclude-operators = [{excluded}]\n"
    )


def _tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise ValueError(f"{name}: not found; install it with pip install cosmic-ray.")
    return found


def _clone(folder: Path) -> Path:
    clone = folder / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv*", "results", "data", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, clone, ignore=ignored)
    return clone


def run_module(module: str, clone: Path) -> dict[str, Any]:
    """Counts of the mutants of one file, and those that survived, each as a diff."""
    configuration, session = clone / f"{module}.toml", clone / f"{module}.sqlite"
    configuration.write_text(_configuration(module), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(clone),
        "JAX_COMPILATION_CACHE_DIR": str(clone.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def call(tool: str, *arguments: Any) -> str:
        command = [_tool(tool), *map(str, arguments)]
        finished = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode != 0:
            raise RuntimeError(f"{tool} failed: {finished.stderr.strip()[-500:]}")
        return finished.stdout

    call("cosmic-ray", "init", configuration, session)
    call("cr-filter-operators", session, configuration)
    call("cosmic-ray", "exec", configuration, session)
    outcomes: dict[str, int] = {}
    survivors = []
    for line in call("cosmic-ray", "dump", session).splitlines():
        item, result = json.loads(line)
        (mutation,) = item["mutations"]
        worker = result["worker_outcome"] if result else "not run"
        outcome = result["test_outcome"] if worker == "normal" else worker
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        if outcome not in ("killed", "skipped"):
            where = {"operator": mutation["operator_name"], "line": mutation["start_pos"][0], "outcome": outcome}
            survivors.append(where | {"diff": (result or {}).get("diff")})
    excluded = outcomes.pop("skipped", 0)
    total = sum(outcomes.values())
    return {
        "module": module,
        "mutants": total,
        "excluded": excluded,
        "killed": outcomes.get("killed", 0),
        "share": outcomes.get("killed", 0) / max(total, 1),
        "survivors": survivors,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/mutation/run.py", description="Mutation testing of the core.")
    parser.add_argument("--module", action="append", choices=MODULES, help="only this file; may be repeated")
    parser.add_argument(
        "--out", type=Path, required=True, help="JSON of counts and survivors, rewritten after each file"
    )
    options = parser.parse_args(arguments)
    _tool("cosmic-ray")
    record = provenance(None, {"excluded": EXCLUDED, "timeout_seconds": TIMEOUT_SECONDS})
    record["packages"]["cosmic-ray"] = metadata.version("cosmic-ray")
    found = []
    with tempfile.TemporaryDirectory() as folder:
        clone = _clone(Path(folder))
        for module in options.module or MODULES:
            found.append(run_module(module, clone))
            row = found[-1]
            print(
                f"{module}: {row['killed']} of {row['mutants']} killed ({row['share']:.1%}), {row['excluded']} excluded"
            )
            write_json(options.out, {"provenance": record, "modules": found})
    return 0 if all(row["share"] >= SHARE for row in found) else 1


if __name__ == "__main__":
    cli.run(main)

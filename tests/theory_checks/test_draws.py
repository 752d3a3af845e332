"""What a check draws is a function of its seed, whatever else the process has imported."""

import json
import os
import subprocess
import sys

import pytest

from theory_checks import pages

# kolmogorov, which integrates before it draws, calls the same functions.
DRAWING = (
    "boundedness",
    "certified_radius",
    "change_of_variables",
    "conditioning",
    "finite",
    "gaussian_limit",
    "invariance",
    "low_rank_identity",
    "map_equivalence",
    "safe_region",
)

# Every test starts processes that import the library anew.
pytestmark = pytest.mark.slow

# Prints the first cases of every check, drawn by its own `run`, which is left once it has drawn.
PROGRAM = """
import importlib, json, pkgutil, sys

names, seed, packages = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
for package in packages:
    for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)

from theory_checks.check import Plan
from theory_checks.drawn_cases import drawn

class Drawn(Exception):
    pass

found = {}
for name in names:
    module = importlib.import_module(f"theory_checks.claims.{name}")

    def record(*given, name=name, **options):
        found[name] = [repr(case) for case in drawn(*given, **options)]
        raise Drawn

    module.drawn = record
    try:
        module.run(Plan(cases=100, seed=seed))
    except Drawn:
        pass
print(json.dumps(found))
"""


def drawn_in_a_process(seed: int, *packages: str) -> dict[str, list[str]]:
    """The reprs of the cases by check, drawn in a process that first imports every module of these packages."""
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(DRAWING), str(seed), *packages],
        cwd=pages.ROOT,
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[str]]:
    return drawn_in_a_process(0)


def test_the_cases_of_a_seed_do_not_depend_on_what_is_imported(alone):
    assert drawn_in_a_process(0, "models", "paper_figures", "tests.helpers") == alone


def test_every_check_runs_as_many_cases_as_asked_and_other_ones_for_another_seed(alone):
    other = drawn_in_a_process(1)
    assert set(alone) == set(other) == set(DRAWING)
    for name, cases in alone.items():
        assert len(set(cases)) == len(cases) == len(other[name]) == (50 if name == "finite" else 100)
        assert not set(cases) & set(other[name])

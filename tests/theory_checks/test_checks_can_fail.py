"""Each quick check holds on the library and comes out differently on a deliberately wrong one."""

import importlib
import sys
import types
from itertools import chain, repeat
from pathlib import Path

import jax
import numpy as np
import pytest

from theory_checks.check import Plan, Result, evaluate
from theory_checks.claims import (
    CHECKS,
    certified_radius,
    change_of_variables,
    kolmogorov,
    map_equivalence,
    token_consistency,
)
from theory_checks.drawn_cases import SHAPES
from theory_checks.mistakes import FINE_MISTAKES, MISTAKES, Mistake
from theory_checks.sabotage import sabotaged

IDS = [check.id for check in CHECKS]


def result(identifier: str, seed: int = 0) -> Result:
    found = evaluate(next(check for check in CHECKS if check.id == identifier), Plan(quick=True, seed=seed))
    assert found.error is None
    return found


# Their quadratures and samples run longer than their functions take to compile.
LONG_RUNNING = {"normalisation", "sampler-law"}
# A whole check of these is long by nature, on the library as on a mistake.
SLOW = {"normalisation", "kolmogorov", "sampler-law", "certified-radius"}


@pytest.fixture
def optimised_if_long(request):
    if request.getfixturevalue("identifier") in LONG_RUNNING:
        request.getfixturevalue("optimised")


@pytest.fixture
def applied(monkeypatch):
    """Puts a mistake of the list into the library as it is loaded, until the end of the test."""

    def apply(mistake: Mistake) -> None:
        for file in dict.fromkeys(file for file, _, _ in mistake.replacements):
            right = importlib.import_module(".".join(("prob_transformer", *Path(file).with_suffix("").parts)))
            source = Path(right.__file__).read_text(encoding="utf-8")
            wrong = types.ModuleType(right.__name__)
            exec(compile(sabotaged(mistake, file, source), file, "exec"), vars(wrong))
            own = [name for name, old in vars(right).items() if getattr(old, "__module__", None) == right.__name__]
            packages = ("prob_transformer", "theory_checks")
            for user in [used for name, used in sys.modules.items() if name.startswith(packages) and used is not right]:
                for alias, old in list(vars(user).items()):
                    for name in own:
                        if old is vars(right)[name]:
                            monkeypatch.setattr(user, alias, vars(wrong)[name])
        # What is compiled already knows the library as it was.
        jax.clear_caches()

    yield apply
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.usefixtures("optimised_if_long")
@pytest.mark.parametrize(
    "identifier", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in IDS]
)
def test_library_comes_out_as_stated(identifier):
    assert result(identifier, seed=1).as_stated


@pytest.mark.parametrize("identifier", ["low-rank-identity", "conditioning", "support-tokens", "boundedness"])
def test_another_run_of_the_same_shapes_compiles_nothing(identifier, caplog):
    result(identifier, seed=1)
    with jax.log_compiles():
        result(identifier, seed=2)
    assert [record.message for record in caplog.records if record.message.startswith("Compiling ")] == []


# One of the list for every check, which `make test` runs; the fine ones are long by nature, like a whole check again.
# For the certified radius it has the test of few cases instead; that of the sampler draws ten thousand samples and has
# none.
CAUGHT = {
    "change-of-variables": "sign of the log-determinant",
    "low-rank-identity": "Jacobian block transposed",
    "invariance": "normalising constant of one dimension",
    "finite": "softmax without its largest logit",
    "normalisation": "sign of the determinant lost",
    "kolmogorov": "density without its log-determinant",
    "token-consistency": "next token read from the position before",
    "sampler-law": "noise of unit size sampled",
    "gaussian-limit": "variance taken for a standard deviation",
    "safe-region": "J = I + M",
    "conditioning": "largest instead of smallest singular value",
    "certified-radius": "radius with a third of the steepness",
    "support-tokens": "support tokens farthest first",
    "map-equivalence": "barrier weight times the mean",
    "boundedness": "derivative of the weights dropped",
}
NAMED = {mistake.name: mistake for mistake in (*MISTAKES, *(mistake for _, mistake in FINE_MISTAKES))}
QUICK = [(one, NAMED[name]) for one, name in CAUGHT.items() if one not in ("certified-radius", "sampler-law")]
LONG = [(one, NAMED[CAUGHT[one]]) for one in ("certified-radius", "sampler-law")] + list(FINE_MISTAKES)


@pytest.mark.parametrize(
    ("identifier", "mistake"),
    [*QUICK, *(pytest.param(*long, marks=pytest.mark.slow) for long in LONG)],
    ids=lambda one: getattr(one, "name", one),
)
@pytest.mark.usefixtures("optimised_if_long")
def test_mistake_is_caught(applied, identifier, mistake):
    applied(mistake)
    assert not result(identifier).as_stated


def test_every_check_has_a_mistake_that_it_catches():
    assert CAUGHT.keys() == set(IDS)


def test_few_cases_tell_a_certified_radius_from_twice_of_it(applied):
    few = Plan(quick=True, cases=30)
    assert certified_radius.run(few).holds
    applied(NAMED["radius twice too large"])
    assert not certified_radius.run(few).holds


def test_nothing_counted_is_not_as_stated(monkeypatch):
    """Sequences of two have log-determinant 0: no case counts, and nothing shows that a missing gradient is wrong."""
    monkeypatch.setattr(change_of_variables, "FEW_SHAPES", SHAPES[2:3])
    found = result("change-of-variables")
    assert (found.verdict, found.counterexample_verdict) == ("fails", "holds")


@pytest.mark.slow
def test_token_probabilities_notice_a_wrong_embedding_density(applied, monkeypatch):
    # Two tokens show it as well as three do, in half the time.
    monkeypatch.setattr(kolmogorov, "VOCABULARY", 2)
    applied(NAMED["density without its log-determinant"])
    assert kolmogorov._tokens(Plan())["worst"] > kolmogorov.TOLERANCE


@pytest.mark.slow
def test_optimum_notices_a_wrong_barrier_scaling(applied):
    assert map_equivalence.optimum()["relative_difference"] < map_equivalence.OPTIMUM_TOLERANCE
    applied(NAMED["barrier weight times the mean"])
    assert map_equivalence.optimum()["relative_difference"] > map_equivalence.OPTIMUM_TOLERANCE


@pytest.mark.parametrize("name", ["prefixes", "truth", "mass", "quadrature_error", "cached_extension"])
def test_token_consistency_does_not_hold_where_a_figure_is_nan(name, monkeypatch):
    fine = dict.fromkeys(("mass", "prefixes", "splits", "cached_extension", "truth", "quadrature_error"), 0.0)
    fine |= {"sees_ahead_prefixes": 1.0, "sees_ahead_mass": 0.0}
    monkeypatch.setattr(token_consistency, "from_table", lambda *_: fine)
    for first, holds in ((fine, True), (fine | {name: np.nan}, False)):
        rows = chain([first], repeat(fine))
        monkeypatch.setattr(token_consistency, "from_process", lambda *_, rows=rows: next(rows))
        assert bool(token_consistency.run(Plan(quick=False)).holds) == holds

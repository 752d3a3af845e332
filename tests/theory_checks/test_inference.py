"""The inference benchmark: its truths against other ways to compute them, its page against its result."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chi2, chisquare, multivariate_normal, ncx2

from benchmarks.result_tables import is_met, load_published
from prob_transformer import jacobian_block
from prob_transformer.inference.calibration import ranks, uniformity
from theory_checks.check import Check, Plan
from theory_checks.inference import CHECKS, SECTIONS, calibration, laplace_against_nuts, particle_evidence
from theory_checks.inference import __main__ as command
from theory_checks.inference.inferred_models import (
    OBSERVATION_SCALE,
    QUICK,
    TRUE_NOISE_SCALE,
    Problem,
    judged,
    plane_attention,
    plane_model,
)
from theory_checks.truth.token_models import gaussian_posterior

RESULT = load_published(command.RESULT, SECTIONS, "")["sections"]
PAGES = command.ROOT / "docs"


def test_the_conjugate_truth_is_that_of_the_joint_gaussian_of_embeddings_and_data():
    # Embeddings by running the process forwards on unit noises, instead of inverting its triangular matrix.
    seen = np.array([[0.3, -1.0], [1.5, 0.2], [-0.7, 0.4]])
    columns = []
    for i in range(3):
        u = []
        for s in range(3):
            scale = 1.0 if s == 0 else TRUE_NOISE_SCALE
            u.append((np.mean(u) if u else 0.0) + scale * (s == i))
        columns.append(u)
    prior = np.array(columns).T @ np.array(columns)
    precision = np.linalg.inv(prior) + np.eye(3) / OBSERVATION_SCALE**2
    truth = gaussian_posterior(seen, np.array([1.0, TRUE_NOISE_SCALE, TRUE_NOISE_SCALE]), OBSERVATION_SCALE)
    np.testing.assert_allclose(truth.covariance, np.linalg.inv(precision), atol=1e-14)
    np.testing.assert_allclose(truth.mean, np.linalg.solve(precision, seen / OBSERVATION_SCALE**2), atol=1e-14)
    # Bayes at any point: p(y) = p(y | u) p(u) / p(u | y).
    u = np.array([0.1, 0.5, -0.2])
    parts = [
        multivariate_normal(u, OBSERVATION_SCALE**2 * np.eye(3)).logpdf(y)
        + multivariate_normal(np.zeros(3), prior).logpdf(u)
        - multivariate_normal(mean, truth.covariance).logpdf(u)
        for y, mean in zip(seen.T, truth.mean.T, strict=True)
    ]
    np.testing.assert_allclose(truth.log_evidence, sum(parts), rtol=1e-12)


def test_the_plane_lies_inside_the_safe_region():
    u = jnp.asarray(np.random.default_rng(0).normal(size=(50, 6, 2)) * 3)
    determinants = np.linalg.det(np.asarray(jacobian_block(plane_attention(jnp.array([2.0, 0.5])), u)))
    assert determinants.min() >= 1
    assert determinants.max() > 1.5


def test_draws_are_compared_in_the_order_of_the_parameters_of_laplace():
    draws = {"strengths": np.array([[[2.0, 3.0], [5.0, 7.0]]]), "noise_scale": np.array([[11.0, 13.0]])}
    problem = Problem("plane", plane_model, (jnp.zeros((1, 3, 2)),))
    found = laplace_against_nuts._flat(problem, {name: jnp.asarray(values) for name, values in draws.items()})
    np.testing.assert_allclose(np.exp(found), [[[11.0, 2.0, 3.0], [13.0, 5.0, 7.0]]], rtol=1e-12)


def test_a_gaussian_is_no_distance_from_itself_and_a_shifted_one_is():
    draws = np.random.default_rng(0).normal(2.0, 3.0, size=(2, 20000))
    same = laplace_against_nuts.marginal("model", "x", (2.0, 3.0), draws)
    assert same["mean_difference"] < 0.03
    assert same["sd_difference"] < 0.03
    assert same["distance"] < 0.02
    assert laplace_against_nuts._beyond([same]) == []
    shifted = laplace_against_nuts.marginal("model", "x", (2.6, 3.0), draws)
    np.testing.assert_allclose(shifted["mean_difference"], 0.2, atol=0.03)
    # sup |Phi(x) - Phi(x - 0.2)| = 2 Phi(0.1) - 1
    np.testing.assert_allclose(shifted["distance"], 0.0797, atol=0.02)
    assert "model, x (skewness" in laplace_against_nuts._beyond([shifted])[0]
    narrow = laplace_against_nuts.marginal("model", "x", (2.0, 2.4), draws)
    np.testing.assert_allclose(narrow["sd_difference"], 0.2, atol=0.03)
    assert len(laplace_against_nuts._beyond([narrow])) == 1


@pytest.mark.parametrize("width", [0.85, 1.0])
def test_the_law_of_ranks_is_that_of_drawn_posteriors(width):
    rng = np.random.default_rng(3)
    truths, draws = rng.normal(size=40_000), width * rng.normal(size=(40_000, 99))
    seen = uniformity(ranks(truths, draws), 99, calibration.BINS).counts
    assert chisquare(seen, 40_000 * calibration.rank_law(width, 99)).pvalue > 0.01


@pytest.mark.parametrize(("replicates", "width"), [(200, 0.9), (1000, 0.9), (1000, 0.85)])
def test_the_power_is_near_that_of_the_noncentral_chi_square_law(replicates, width):
    distance = replicates * ((calibration.rank_law(width, 99) - 0.05) ** 2 / 0.05).sum()
    expected = ncx2.sf(chi2.isf(0.0125, 19), 19, distance)
    np.testing.assert_allclose(calibration.power(width, replicates, 99, 0.0125), expected, atol=0.02)
    np.testing.assert_allclose(calibration.power(1.0, replicates, 99, 0.0125), 0.0125, atol=0.004)


def test_the_power_of_the_calibration_on_the_page_is_that_of_its_test():
    text = " ".join((PAGES / "findings.md").read_text(encoding="utf-8").split())
    datasets = RESULT["calibration"]["rows"][0]["replicates"]
    assert f"In {datasets:,} simulated datasets" in text
    for too_small, shown in re.findall(r"that is (\d+) % too small with a power of (\d\.\d+)", text):
        found = calibration.power(1 - int(too_small) / 100, datasets, 99, 0.05)
        np.testing.assert_allclose(float(shown), found, atol=0.006)


def test_no_two_rows_of_the_evidence_share_a_key(monkeypatch):
    keys = []

    def row(case, proposal, key, sizes):
        keys.append(tuple(np.asarray(jax.random.key_data(key))))
        return {"model": case, "proposal": proposal, "deviation": 0.0}

    monkeypatch.setattr(particle_evidence, "_row", row)
    monkeypatch.setattr(particle_evidence, "cases", lambda: list("abcd"))
    monkeypatch.setattr(particle_evidence, "scalar_case", str)
    particle_evidence.run_evidence(QUICK)
    # The last is that of the counterexample.
    assert len(set(keys[:-1])) == len(keys[:-1]) == 8


def test_the_page_is_that_of_the_committed_result(tmp_path):
    command.main(["--page", str(tmp_path / "page.md")])
    assert (tmp_path / "page.md").read_text() == (PAGES / "inference_benchmark.md").read_text(encoding="utf-8")


def test_the_committed_result_judges_every_method_and_names_every_coordinate_beyond_the_bounds():
    assert RESULT["laplace-nuts"]["notes"] == laplace_against_nuts._beyond(RESULT["laplace-nuts"]["rows"])
    targets = [target for found in RESULT.values() for target in found["targets"]]
    assert all(is_met(target) is not None for target in targets)
    for method in ("MAP", "Laplace", "NUTS", "particles"):
        assert any(method in target["what"] for target in targets)


def test_a_comparison_is_judged_in_units_of_its_bounds_without_what_belongs_to_the_counterexample():
    targets = [
        {"what": "low", "figure": 0.2, "at_most": 0.25},
        {"what": "high", "figure": 0.5, "at_least": 0.25},
        {"what": "latent", "figure": 9.0, "at_most": 0.1},
    ]
    found = {"rows": [1, 2], "targets": targets, "counterexample": 1.5}
    outcome = judged(Plan(quick=True), lambda sizes: found, unless="latent")
    assert (outcome.cases, outcome.figure, outcome.holds, outcome.counterexample_fails) == (2, 0.8, True, True)
    assert not judged(Plan(quick=True), lambda sizes: found).holds


@pytest.mark.slow
# The others take minutes: `python -m theory_checks --only evidence`.
@pytest.mark.parametrize("check", CHECKS[:1], ids=lambda check: check.id)
def test_the_check_of_a_comparison_comes_out_as_stated(check: Check):
    outcome = check.run(Plan(quick=True))
    assert outcome.holds
    assert outcome.counterexample_fails

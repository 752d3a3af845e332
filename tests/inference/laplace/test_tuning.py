import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import multivariate_normal

from prob_transformer.inference.laplace import (
    IndefiniteCurvatureError,
    TuningStatus,
    laplace,
    tune_prior_precision,
)
from tests.helpers.modes import mode_at

RNG = np.random.default_rng(7)
X = RNG.normal(size=(8, 3))
Y = X @ np.array([0.6, -0.4, 0.2]) + 0.5 * RNG.normal(size=8)
CURVATURE = X.T @ X / 0.5**2


def linear(x, y, scales):
    """One scale for all coefficients, or one for each."""
    w = numpyro.sample("w", dist.Normal(jnp.zeros(3), scales).to_event(1))
    with numpyro.plate("cases", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def fitted(tau, **options):
    prior = np.broadcast_to(tau, 3)
    mode = np.linalg.solve(CURVATURE + np.diag(prior), X.T @ Y / 0.5**2)
    scale = np.asarray(tau, float) ** -0.5
    return laplace(mode_at({"w": mode}, linear, X, Y, scale), **options), mode


def exact_evidence(tau):
    return multivariate_normal.logpdf(Y, np.zeros(8), X @ X.T / tau + 0.5**2 * np.eye(8))


def by_hand(tau, mode, curvature=CURVATURE):
    """Laplace's evidence at a mode and curvature held fixed, with the prior N(0, 1 / tau)."""
    joint = multivariate_normal.logpdf(Y, X @ mode, 0.25 * np.eye(8))
    joint += multivariate_normal.logpdf(mode, np.zeros(3), np.eye(3) / tau)
    return joint + 1.5 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(curvature + tau * np.eye(3))[1]


@pytest.mark.parametrize(
    ("structure", "rank"), [("full", None), ("kronecker", None), ("low-rank", 3), ("low-rank", 2), ("diagonal", None)]
)
def test_the_maximum_is_that_of_a_grid_written_by_hand(structure, rank):
    result, mode = fitted(0.25, structure=structure, rank=rank)
    values, vectors = np.linalg.eigh(CURVATURE)
    curvature = {
        "diagonal": np.diag(np.diag(CURVATURE)),
        "low-rank": (vectors[:, 3 - (rank or 0) :] * values[3 - (rank or 0) :]) @ vectors[:, 3 - (rank or 0) :].T,
    }.get(structure, CURVATURE)
    found = tune_prior_precision(result, (1e-4, 1e4))
    grid = np.exp(np.linspace(np.log(1e-2), np.log(1e2), 201))
    evidence = np.array([by_hand(tau, mode, curvature) for tau in grid])
    best = grid[evidence.argmax()]
    assert found.status == TuningStatus.INSIDE
    np.testing.assert_allclose(np.log(found.prior_precision), np.log(best), atol=np.log(grid[1] / grid[0]))
    np.testing.assert_allclose(found.log_evidence, by_hand(found.prior_precision, mode, curvature), atol=1e-7)
    assert found.log_evidence >= evidence.max() - 1e-7
    # MacKay's equation for the maximum.
    np.testing.assert_allclose(found.prior_precision * (mode @ mode), found.effective_parameters, rtol=1e-5)


def test_the_maximum_of_the_exact_evidence_stays_where_it_is_and_refitting_leads_to_it():
    options = {"bounds": (-4, 6), "method": "bounded", "options": {"xatol": 1e-10}}
    best = minimize_scalar(lambda t: -exact_evidence(np.exp(t)), **options).x
    found = tune_prior_precision(fitted(np.exp(best))[0])
    np.testing.assert_allclose(found.prior_precision, np.exp(best), rtol=1e-5)
    np.testing.assert_allclose(found.log_evidence, exact_evidence(np.exp(best)), atol=1e-9)
    tau = 0.05
    for _ in range(25):
        tau = tune_prior_precision(fitted(tau)[0]).prior_precision
    np.testing.assert_allclose(np.log(tau), best, atol=1e-4)


def test_different_scales_are_replaced_by_one():
    prior = np.array([0.2, 1.0, 3.0])
    result, mode = fitted(prior)
    found = tune_prior_precision(result)
    np.testing.assert_allclose(found.log_evidence, by_hand(found.prior_precision, mode), atol=1e-9)
    np.testing.assert_allclose(found.prior_precision * (mode @ mode), found.effective_parameters, rtol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "status", "edge"),
    [((1e2, 1e4), TuningStatus.AT_LOWER_BOUND, 1e2), ((1e-4, 1e-2), TuningStatus.AT_UPPER_BOUND, 1e-2)],
)
def test_a_maximum_at_an_edge_of_the_range_is_named(bounds, status, edge):
    result, mode = fitted(1.0)
    found = tune_prior_precision(result, bounds)
    assert found.status == status
    np.testing.assert_allclose(found.prior_precision, edge, rtol=1e-12)
    np.testing.assert_allclose(found.log_evidence, by_hand(edge, mode), atol=1e-9)


def concave(y):
    w = numpyro.sample("w", dist.Normal(0, 1.0).expand([2]).to_event(1))
    numpyro.factor("well", 0.25 * (w**2).sum())
    numpyro.sample("y", dist.Normal(w[0], 1.0), obs=y)


def hierarchical(y):
    t = numpyro.sample("t", dist.Normal(0, 1.0))
    w = numpyro.sample("w", dist.Normal(0, jnp.exp(t)).expand([2]).to_event(1))
    v = numpyro.sample("v", dist.Normal(1.0, 1.0))
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(w.sum() + v + jnp.log(s), 1.0), obs=y)


def hierarchical_fit(sites):
    mode = {"t": 0.0, "w": np.array([0.9, 0.9]), "v": 0.5, "s": 0.0}
    return laplace(mode_at(mode, hierarchical, np.ones(())), sites=sites)


def test_a_scale_that_is_held_can_be_tuned():
    found = tune_prior_precision(hierarchical_fit(("w",)))
    np.testing.assert_allclose(found.prior_precision * 2 * 0.9**2, found.effective_parameters, rtol=1e-6)


@pytest.mark.parametrize(
    ("fit", "error", "message"),
    [
        (
            lambda: hierarchical_fit(("t", "w")),
            ValueError,
            "the scale of a prior depends on another of its sites",
        ),
        (lambda: hierarchical_fit(("v", "w")), ValueError, "a normal prior with a mean other than 0"),
        (
            lambda: hierarchical_fit(("s",)),
            ValueError,
            "the prior of site 's' is HalfNormal, not Normal; leave the site out",
        ),
        (
            lambda: fitted(np.array([0.2, 1.0, 3.0]), structure="kronecker")[0],
            ValueError,
            "its priors have different scales, which structure 'kronecker'",
        ),
        # Only the prior makes this curvature positive.
        (
            lambda: laplace(mode_at({"w": np.array([2 / 3, 0.0])}, concave, np.ones(()))),
            IndefiniteCurvatureError,
            r"the smallest eigenvalue without the prior is -0\.5;",
        ),
    ],
    ids=["scale depends on a site", "mean not 0", "not normal", "different scales", "indefinite without the prior"],
)
def test_what_cannot_be_tuned_is_refused(fit, error, message):
    with pytest.raises(error, match=message):
        tune_prior_precision(fit())


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((1.0, 1.0), r"bounds: got \(1.0, 1.0\); pass \(low, high\)"),
        ((0.0, 1.0), "bounds: got"),
        ((1.0, 2.0, 3.0), r"bounds: got \(1.0, 2.0, 3.0\); pass \(low, high\)"),
    ],
)
def test_bad_bounds_are_refused_by_name(bounds, message):
    with pytest.raises(ValueError, match=message):
        tune_prior_precision(fitted(1.0)[0], bounds)

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy.special import expit, logsumexp, softmax
from scipy.stats import norm

from prob_transformer.inference import find_map
from prob_transformer.inference.laplace import laplace
from tests.helpers.modes import mode_at

RNG = np.random.default_rng(6)
X, Y, NEW = RNG.normal(size=(5, 3)), RNG.normal(size=5), RNG.normal(size=(4, 3))
LABELS, CLASSES = np.array([0, 1, 1, 0, 1]), np.array([0, 2, 1, 1, 0])
WEIGHTS = RNG.normal(size=(3, 3))
DRAWS = 20_000


def linear(x, y=None):
    w = numpyro.sample("w", dist.Normal(0, 2.0).expand([3]).to_event(1))
    numpyro.deterministic("norm", jnp.square(w).sum())
    numpyro.factor("nothing", 0.0)
    with numpyro.plate("cases", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)


def softmax_regression(x, y=None):
    w = numpyro.sample("w", dist.Normal(0, 2.0).expand([3, 3]).to_event(2))
    with numpyro.plate("cases", x.shape[0]):
        numpyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


def logistic(x, y=None):
    w = numpyro.sample("w", dist.Normal(0, 2.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ w).to_event(1), obs=y)


def awkward(rng_key, seed, key, model, mode):
    """Arguments that are called as those of NumPyro's functions and of ours are."""
    w = numpyro.sample("w", dist.Normal(rng_key, 2.0))
    numpyro.sample("y", dist.Normal(w + seed + key + model, 0.5), obs=mode)


@pytest.fixture(scope="module")
def result():
    mode = np.linalg.solve(X.T @ X / 0.25 + np.eye(3) / 4, X.T @ Y / 0.25)
    return laplace(mode_at({"w": mode}, linear, X, Y))


@pytest.fixture(scope="module")
def classes():
    return laplace(mode_at({"w": WEIGHTS}, softmax_regression, X, CLASSES))


@pytest.fixture(scope="module")
def truth():
    """Mean and covariance of new values of the linear Gaussian model, by conditioning the joint normal law."""
    joint = 4.0 * np.vstack([X, NEW]) @ np.vstack([X, NEW]).T + 0.25 * np.eye(9)
    gain = joint[5:, :5] @ np.linalg.inv(joint[:5, :5])
    return gain @ Y, joint[5:, 5:] - gain @ joint[:5, 5:]


@pytest.fixture(scope="module")
def new_data(truth):
    return truth[0] + 0.3


def test_linearised_predictions_of_a_linear_gaussian_model_are_exact(result, truth):
    found = result.linearised("y", model_args=(NEW,))
    assert (found.parameter, found.distribution) == ("loc", "Normal")
    np.testing.assert_allclose(found.mean, truth[0], atol=1e-12)
    np.testing.assert_allclose(found.predictive_covariance(), truth[1], atol=1e-12)
    np.testing.assert_allclose(found.variance, np.diag(truth[1]) - 0.25, atol=1e-12)


def test_sampled_predictions_have_the_exact_mean_and_covariance(result, new_data, truth):
    found, draws = result.predictive(jax.random.key(2), DRAWS, model_args=(NEW, new_data)), DRAWS
    assert set(found.posterior_predictive) == {"y"}
    # Data given to the call are drawn anew all the same.
    y, variances = np.asarray(found.posterior_predictive["y"]), np.diag(truth[1])
    np.testing.assert_array_less(np.abs(y.mean(0) - truth[0]), 4 * np.sqrt(variances / draws))
    spread = np.sqrt((np.outer(variances, variances) + truth[1] ** 2) / draws)
    np.testing.assert_array_less(np.abs(np.cov(y.T) - truth[1]), 4 * spread)


def test_the_log_density_of_new_data_is_that_of_the_mixture_of_draws(result, new_data, truth):
    found = result.predictive(jax.random.key(2), DRAWS, model_args=(NEW, new_data))
    fit = norm.logpdf(new_data, np.asarray(found.posterior["w"]) @ NEW.T, 0.5)
    np.testing.assert_allclose(found.log_likelihood["y"], fit, rtol=1e-9)
    np.testing.assert_allclose(found.log_density["y"], logsumexp(fit, axis=0) - np.log(DRAWS), rtol=1e-9)
    exact = norm.logpdf(new_data, truth[0], np.sqrt(np.diag(truth[1])))
    standard_error = np.exp(fit).std(0) / np.exp(exact) / np.sqrt(DRAWS)
    np.testing.assert_array_less(np.abs(found.log_density["y"] - exact), 4 * standard_error)
    # The same key has the same parameters.
    np.testing.assert_array_equal(found.posterior["w"], result.sample(jax.random.key(2), DRAWS)["w"])


def test_linearised_logits_of_classes(classes):
    found = classes.linearised("y", model_args=(NEW,))
    # Case n, class c is x_n . w[:, c]; the parameters go row by row through w.
    jacobian = np.einsum("ni,cd->ncid", NEW, np.eye(3)).reshape(12, 9)
    covariance = jacobian @ np.asarray(classes.covariance()) @ jacobian.T
    assert found.parameter == "logits"
    np.testing.assert_allclose(found.mean, NEW @ WEIGHTS, atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-10)
    scaled = NEW @ WEIGHTS / np.sqrt(1 + np.pi / 8 * np.diag(covariance).reshape(4, 3))
    np.testing.assert_allclose(found.probit_probabilities(), softmax(scaled, axis=-1), atol=1e-10)


def test_sampled_classes_have_the_frequencies_of_the_draws(classes):
    found = classes.predictive(jax.random.key(1), DRAWS, model_args=(NEW,))
    assert found.log_likelihood == found.log_density == {}
    probability = softmax(np.einsum("ni,sic->snc", NEW, found.posterior["w"]), axis=-1).mean(0)
    frequency = (np.asarray(found.posterior_predictive["y"])[..., None] == np.arange(3)).mean(0)
    np.testing.assert_array_less(np.abs(frequency - probability), 4 * np.sqrt(0.25 / DRAWS))


def test_linearised_logits_of_two_classes():
    mode = np.array([0.3, -0.2, 0.5])
    found = laplace(mode_at({"w": mode}, logistic, X, LABELS)).linearised("y")
    p = expit(X @ mode)
    variance = np.diag(X @ np.linalg.inv((X.T * p * (1 - p)) @ X + np.eye(3) / 4) @ X.T)
    np.testing.assert_allclose(found.variance, variance, atol=1e-12)
    np.testing.assert_allclose(
        found.probit_probabilities(), expit(X @ mode / np.sqrt(1 + np.pi / 8 * variance)), atol=1e-12
    )


def one_weight(y):
    numpyro.sample("y", dist.Normal(numpyro.sample("w", dist.Normal()), 1), obs=y)


def test_a_seed_inside_the_model_leaves_the_noise_of_new_data_random():
    fit = laplace(mode_at({"w": np.array(0.0)}, numpyro.handlers.seed(one_weight, 0), np.array(0.0)))
    found = fit.predictive(jax.random.key(0), 1000)
    noise = np.asarray(found.posterior_predictive["y"] - found.posterior["w"])
    # Standard normal: the standard error of the variance of 1,000 draws is 0.045.
    np.testing.assert_allclose(noise.var(), 1, atol=0.3)


def counts(y):
    t = numpyro.sample("t", dist.Normal(0, 1.0))
    numpyro.sample("y", dist.Poisson(jnp.exp(t)), obs=y)


def huge(y):
    s = numpyro.sample("s", dist.LogNormal(0.0, 1e4))
    numpyro.sample("y", dist.Normal(0.0 * jnp.log(s), 1.0), obs=y)


def test_arguments_of_a_model_may_be_called_as_those_of_numpyro_and_ours_are():
    """The prior N(2, 4) and the datum 3.7 ~ N(w + 1.5, 1/4): w has the precision 4.25, and a new datum is normal."""
    given = {"rng_key": 2.0, "seed": 1.0, "key": 0.0, "model": 0.5, "mode": np.array(3.7)}
    fit = laplace(find_map(awkward, model_kwargs=given, space="unconstrained", key=0), key=1)
    drawn = fit.predictive(jax.random.key(0), DRAWS).posterior_predictive["y"]
    mean, sd = (2 / 4 + (3.7 - 1.5) * 4) / 4.25 + 1.5, np.sqrt(1 / 4.25 + 1 / 4)
    # Six standard errors.
    np.testing.assert_allclose(drawn.mean(), mean, atol=6 * sd / np.sqrt(DRAWS))
    np.testing.assert_allclose(drawn.std(), sd, rtol=6 / np.sqrt(2 * DRAWS))
    assert fit.to_datatree()["posterior_predictive/y"].shape == (1, 1000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda *_: laplace(mode_at({"t": np.array(0.4)}, counts, np.array(2))).linearised("y"),
            r"site: 'y' is Poisson, not one of Normal, .*; use predictive\(\)",
        ),
        (lambda result, _: result.linearised("w"), "site: got 'w'; pass one of the model's sites of data, y"),
        (lambda result, _: result.predictive(jax.random.key(0), -1), "draws: got -1"),
        (lambda result, _: result.predictive(None, 1), "key: got None; pass one JAX random key"),
        (
            lambda result, _: result.linearised("y", model_args=(NEW,)).probit_probabilities(),
            "'y' is Normal and has no logits",
        ),
        (
            lambda _, classes: classes.linearised("y", model_args=(NEW,)).predictive_covariance(),
            "'y' is CategoricalLogits, not Normal",
        ),
        (
            lambda *_: laplace(mode_at({"s": np.array(0.0)}, huge, np.zeros(()))).sample(jax.random.key(0), 100),
            "draws: some of site 's' are inf or NaN",
        ),
    ],
    ids=["no linearised Poisson", "no site of data", "no draws", "no key", "no logits", "not normal", "draws overflow"],
)
def test_what_cannot_be_predicted_is_refused_by_name(result, classes, call, message):
    with pytest.raises(ValueError, match=message):
        call(result, classes)

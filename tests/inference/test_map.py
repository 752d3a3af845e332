import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta
from scipy import stats
from scipy.optimize import minimize, minimize_scalar

from prob_transformer import (
    Attention,
    EmbeddingProcess,
    LinearDecoder,
    map_objective,
    residual_and_log_det,
    token_model,
)
from prob_transformer.inference import MapStatus, find_map, load, save

ZERO = Attention(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)))
COINS = np.array([1, 1, 0, 1, 1, 1, 0, 1])
PAST = jnp.array([[-1.0], [1.0], [0.0]])


def observed_process(attention, y, scale=0.5):
    u = numpyro.sample("embeddings", EmbeddingProcess(attention, y.shape[0], 0.4, 1.7))
    numpyro.sample("y", dist.Normal(u, scale).to_event(2), obs=y)


def coin(x, a=2.0, b=3.0):
    p = numpyro.sample("p", dist.Beta(a, b))
    with numpyro.plate("cases", x.shape[0]):
        numpyro.sample("x", dist.Bernoulli(p), obs=x)


def coin_of(x):
    """The same without a plate, which would refuse empty data itself."""
    numpyro.sample("x", dist.Bernoulli(numpyro.sample("p", dist.Beta(2.0, 3.0))).expand(x.shape), obs=x)


def spread(y):
    scale = numpyro.sample("scale", dist.HalfNormal(2.0))
    with numpyro.plate("cases", y.shape[0]):
        numpyro.sample("y", dist.Normal(0.0, scale), obs=y)


def walled(numbers):
    """One parameter a and three fixed embeddings, det J_3 = 1 - a: the wall is at a = 1."""
    centre, width, weight = numbers
    a = numpyro.sample("a", dist.Normal(centre, width))
    log_det = residual_and_log_det(Attention(a[None, None, None], jnp.ones((1, 1, 1))), PAST).log_det
    numpyro.factor("barrier", weight * log_det.sum())


def wall_signs(parameters):
    return residual_and_log_det(Attention(parameters["a"][None, None, None], jnp.ones((1, 1, 1))), PAST).sign


def posterior_mean(y, scale=0.5):
    """u = L^-1 noise without interaction: a linear Gaussian model, solved with NumPy."""
    n = y.shape[0]
    lower = np.eye(n)
    for i in range(1, n):
        lower[i, :i] = -1.0 / i
    noise_precision = np.diag(1 / np.array([1.7] + [0.4] * (n - 1)) ** 2)
    return np.linalg.solve(lower.T @ noise_precision @ lower + np.eye(n) / scale**2, y / scale**2)


WATCHED, NEAR, ON_WALL = {"signs": wall_signs}, {"init": {"a": 0.3}}, {"init": {"a": 1.0}}


@pytest.mark.parametrize(("dtype", "tolerance", "error"), [(np.float64, 1e-9, 1e-10), (np.float32, 1e-4, 1e-5)])
def test_without_interaction_the_mode_is_the_posterior_mean_of_the_linear_gaussian_model(dtype, tolerance, error):
    y = np.random.default_rng(0).normal(size=(3, 2)).astype(dtype)
    attention = Attention(jnp.zeros((1, 1, 2), dtype), jnp.zeros((1, 1, 2), dtype))
    options = {"init": {"embeddings": np.zeros_like(y)}, "tolerance": tolerance}
    found = find_map(observed_process, model_args=(attention, y), space="constrained", **options)
    assert found.converged
    assert found.gradient_norm <= tolerance
    assert found.parameters["embeddings"].dtype == dtype
    np.testing.assert_allclose(found.parameters["embeddings"], posterior_mean(y), atol=error)


@pytest.mark.parametrize("space", ["constrained", "unconstrained"])
def test_the_mode_of_a_coin_depends_on_the_space_as_its_closed_forms_do(space):
    found = find_map(coin, model_args=(COINS,), space=space, key=0)
    heads, n, a, b = 6, 8, 2.0, 3.0
    mode = {"constrained": (heads + a - 1) / (n + a + b - 2), "unconstrained": (heads + a) / (n + a + b)}[space]
    assert found.converged
    np.testing.assert_allclose(found.parameters["p"], mode, atol=1e-7)
    np.testing.assert_allclose(jax.nn.sigmoid(found.unconstrained["p"]), mode, atol=1e-7)
    joint = stats.beta.logpdf(mode, a, b) + stats.bernoulli.logpmf(COINS, mode).sum()
    jacobian = np.log(mode * (1 - mode)) if space == "unconstrained" else 0.0
    np.testing.assert_allclose(found.objective, -joint - jacobian, atol=1e-10)
    np.testing.assert_allclose(found.log_likelihood["x"], stats.bernoulli.logpmf(COINS, mode), atol=1e-6)


@pytest.mark.parametrize("space", ["constrained", "unconstrained"])
def test_the_optimum_is_scipys_on_an_objective_written_by_hand(space):
    y = np.array([0.3, -1.2, 2.0])

    def by_hand(log_scale):
        joint = stats.halfnorm.logpdf(np.exp(log_scale), scale=2.0) + stats.norm.logpdf(y, 0, np.exp(log_scale)).sum()
        return -joint - (log_scale if space == "unconstrained" else 0.0)

    truth = minimize_scalar(by_hand, bracket=(-1, 0, 1), options={"xtol": 1e-12})
    found = find_map(spread, model_args=(y,), space=space, key=1, tolerance=1e-8)
    assert found.converged
    np.testing.assert_allclose(found.unconstrained["scale"], truth.x, atol=1e-7)
    np.testing.assert_allclose(found.objective, truth.fun, atol=1e-12)


def test_the_optimum_of_the_token_model_is_scipys_on_the_objective():
    # A = -I with identity values: det J >= 1 everywhere. Two sequences, searched as a whole.
    attention = Attention(-np.eye(2)[None], np.eye(2)[None])
    decoder = LinearDecoder(np.random.default_rng(2).normal(size=(3, 2)), np.zeros(3))
    tokens, given = np.array([[0, 2, 1], [1, 1, 0]]), {"noise_scale": 0.6, "barrier_weight": 0.3}
    start = np.random.default_rng(3).normal(size=(2, 3, 2))

    @jax.jit
    @jax.value_and_grad
    def objective(flat):
        return map_objective(attention, decoder, flat.reshape(2, 3, 2), tokens, **given)

    truth = minimize(objective, start.ravel(), jac=True, method="BFGS", options={"gtol": 1e-9})
    options = {"init": {"embeddings": start}, "tolerance": 1e-8}
    arguments = {"model_args": (attention, decoder, tokens), "model_kwargs": given}
    found = find_map(token_model, **arguments, space="constrained", **options)
    assert found.converged
    np.testing.assert_allclose(found.objective, truth.fun, atol=1e-10)
    np.testing.assert_allclose(found.parameters["embeddings"], truth.x.reshape(2, 3, 2), atol=1e-6)
    assert found.crossings == 0
    np.testing.assert_array_equal(found.signs, 1.0)
    np.testing.assert_array_equal(found.observed_data["tokens"], tokens)
    assert found.to_datatree()["log_likelihood/tokens"].dims == ("chain", "draw", "sequence")


def test_autodelta_reaches_the_constrained_mode():
    svi = SVI(coin, AutoDelta(coin), optax.adam(optax.exponential_decay(0.1, 100, 0.5)), Trace_ELBO())
    params = svi.run(jax.random.key(0), 1500, COINS, progress_bar=False).params
    found = find_map(coin, model_args=(COINS,), space="constrained", key=0)
    np.testing.assert_allclose(params["p_auto_loc"], found.parameters["p"], atol=1e-6)


@pytest.mark.parametrize("width", [0.3, 1.0])
def test_a_step_across_the_wall_is_cut_short(width):
    # (a - 5) / s^2 = -1 / (1 - a) has the roots 3 -+ sqrt(4 + s^2), one on each side of the wall.
    near, far = 3 - np.sqrt(4 + width**2), 3 + np.sqrt(4 + width**2)
    options = {"space": "constrained", "tolerance": 1e-9, **NEAR}
    found = find_map(walled, model_args=(np.array([5.0, width, 1.0]),), **options, **WATCHED)
    assert found.converged
    assert found.crossings > 0
    np.testing.assert_allclose(found.parameters["a"], near, atol=1e-8)
    np.testing.assert_array_equal(found.signs, np.ones(3))
    # The first step is of length 1, from 0.3 to 1.3, where the objective is lower.
    across = find_map(walled, model_args=(np.array([5.0, width, 1.0]),), **options)
    assert across.signs.size == across.crossings == 0
    np.testing.assert_allclose(across.parameters["a"], far, atol=1e-8)


def test_a_start_past_the_wall_stays_there_and_says_so():
    found = find_map(walled, model_args=(np.array([-4.0, 1.0, 1.0]),), space="constrained", init={"a": 1.5}, **WATCHED)
    # (a + 4) = 1 / (a - 1)
    np.testing.assert_allclose(found.parameters["a"], (-3 + np.sqrt(29)) / 2, atol=1e-6)
    assert found.converged
    assert found.crossings > 0
    np.testing.assert_array_equal(found.to_datatree()["sample_stats/negative_signs"], [[1]])


def test_embeddings_drawn_to_the_wall_by_data_stay_before_it():
    attention, y = Attention(np.ones((1, 1, 1)), np.ones((1, 1, 1))), np.array([[-2.0], [2.0], [0.1]])
    options = {"space": "unconstrained", "init": {"embeddings": np.array([[-0.5], [0.5], [0.0]])}}
    found = find_map(observed_process, model_args=(attention, y, 0.3), **options)
    assert found.converged
    assert found.crossings > 0
    np.testing.assert_array_equal(found.signs, np.ones(3))

    def objective(flat):
        residual, sign, log_det = residual_and_log_det(attention, flat.reshape(3, 1))
        prior = stats.norm.logpdf(np.asarray(residual)[:, 0], 0, [1.7, 0.4, 0.4]).sum() + np.asarray(log_det).sum()
        value = -prior - stats.norm.logpdf(flat, y[:, 0], 0.3).sum()
        return value if (np.asarray(sign) > 0).all() else np.inf

    start = np.asarray(found.parameters["embeddings"]).ravel()
    simplex = {"initial_simplex": start + 0.1 * np.eye(4, 3), "xatol": 1e-9, "fatol": 1e-13}
    truth = minimize(objective, start, method="Nelder-Mead", options=simplex)
    np.testing.assert_allclose(found.objective, truth.fun, atol=1e-9)
    np.testing.assert_allclose(start, truth.x, atol=1e-5)


def test_one_compilation_for_a_model_and_shape(caplog):
    def model(x):
        coin(x)

    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        for x, options in (
            (COINS, {"key": 1}),
            (1 - COINS, {"key": 2, "tolerance": 1e-7, "max_steps": 80}),
            (COINS, {"init": {"p": 0.3}, "tolerance": np.float64(1e-7)}),
        ):
            found = find_map(model, model_args=(x,), space="constrained", **options)
            np.testing.assert_allclose(found.parameters["p"], (x.sum() + 1) / 11, atol=1e-6)
    compiled = [record for record in caplog.records if record.getMessage().startswith("Compiling jit(_search)")]
    assert len(compiled) == 1


@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 1.0])
def test_a_seed_that_another_one_would_stand_for_is_refused(seed):
    with pytest.raises(ValueError, match=f"key: got {seed}"):
        find_map(coin, model_args=(COINS,), space="constrained", key=seed)


def test_a_seed_is_its_key_and_every_start_ends_at_the_mode():
    one = find_map(coin, model_args=(COINS,), space="constrained", key=4)
    same = find_map(coin, model_args=(COINS,), space="constrained", key=jax.random.key(4))
    assert (one.parameters["p"], one.steps) == (same.parameters["p"], same.steps)
    assert (one.seed, same.seed) == (4, None)
    other = find_map(coin, model_args=(COINS,), space="constrained", key=5)
    assert other.unconstrained["p"] != one.unconstrained["p"]
    np.testing.assert_allclose(other.parameters["p"], one.parameters["p"], atol=1e-6)


def test_a_start_at_the_mode_stays_there():
    found = find_map(coin, model_args=(COINS,), space="constrained", init={"p": 7 / 11})
    assert found.converged
    np.testing.assert_allclose(found.parameters["p"], 7 / 11, atol=1e-12)


def lone_scale():
    numpyro.sample("scale", dist.HalfNormal(1.0))


def scale_and_location(y):
    numpyro.sample("scale", dist.HalfNormal(1.0))
    location = numpyro.sample("location", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(location, 1.0).expand(y.shape).to_event(1), obs=y)


def not_a_number(y):
    location = numpyro.sample("location", dist.Normal(0.0, 1.0))
    numpyro.factor("nan", jnp.where(location == y, 0.0, jnp.nan))


@pytest.mark.parametrize(
    ("model", "data", "options", "status", "remedy"),
    [
        (coin, (COINS,), {"key": 0, "max_steps": 1}, MapStatus.MAX_STEPS, "raise max_steps"),
        # The density is largest at scale 0, the edge of the support: log(scale) runs off and the gradient vanishes.
        (lone_scale, (), {"key": 0}, MapStatus.MAX_STEPS, "on its edge"),
        # With steps enough the gradient underflows, in float32 sooner; far out it is next to nothing from the start.
        (lone_scale, (), {"key": 0, "max_steps": 5000}, MapStatus.FLAT, "on the edge"),
        (lone_scale, (), {"init": {"scale": np.float32(0.5)}}, MapStatus.FLAT, "on the edge"),
        (lone_scale, (), {"init": {"scale": 1e-100}}, MapStatus.FLAT, "on the edge"),
        # The other site has its maximum, and the rounding of its derivative hides the scale's.
        (scale_and_location, (COINS,), {"key": 0, "max_steps": 5000}, MapStatus.FLAT, "on the edge"),
        (walled, (np.array([5.0, 0.3, 1.0]),), ON_WALL | WATCHED, MapStatus.INFEASIBLE_START, "away from the wall"),
        (walled, (np.array([5.0, 0.3, 1.0]),), ON_WALL, MapStatus.NOT_FINITE, "change init"),
        # Nothing but the signs stops this search at the wall.
        (walled, (np.array([5.0, 0.3, 0.0]),), NEAR | WATCHED, MapStatus.LINE_SEARCH_FAILED, "add a barrier"),
        (not_a_number, (0.5,), {"init": {"location": 0.5}}, MapStatus.NOT_FINITE, "change init"),
    ],
)
def test_a_search_that_fails_names_how_and_is_not_written_silently(model, data, options, status, remedy):
    found = find_map(model, model_args=data, space="constrained", **options)
    assert not found.converged
    assert found.status is status
    with pytest.raises(ValueError, match=f"status: {status.name.lower()} after {found.steps} steps.*{remedy}"):
        found.to_datatree()
    kept = found.to_datatree(allow=[status])
    assert kept.attrs["status"] == status.name.lower()
    assert not kept["sample_stats/converged"].item()
    assert kept["sample_stats/status"].item() == int(status)


def test_without_a_barrier_the_watched_wall_is_reached_but_not_crossed():
    found = find_map(walled, model_args=(np.array([5.0, 0.3, 0.0]),), space="constrained", **NEAR, **WATCHED)
    assert 0.99 < found.parameters["a"] < 1
    assert found.crossings > 0
    np.testing.assert_array_equal(found.signs, 1.0)


def test_the_datatree_holds_the_mode_the_fit_and_the_data(tmp_path):
    y = np.random.default_rng(0).normal(size=(3, 2))
    found = find_map(observed_process, model_args=(ZERO, y), space="constrained", key=11)
    save(found.to_datatree({"y": ("position", "embedding_dim")}), tmp_path / "map.nc")
    tree = load(tmp_path / "map.nc")
    assert tree["posterior/embeddings"].dims == ("chain", "draw", "position", "embedding_dim")
    np.testing.assert_allclose(tree["posterior/embeddings"].values[0, 0], posterior_mean(y), atol=1e-6)
    assert tree["log_likelihood/y"].dims == ("chain", "draw")
    expected = stats.norm.logpdf(y, found.parameters["embeddings"], 0.5).sum()
    np.testing.assert_allclose(tree["log_likelihood/y"].item(), expected, rtol=1e-12)
    np.testing.assert_array_equal(tree["observed_data/y"], y)
    assert tree["sample_stats/objective"].item() == found.objective
    assert tree["sample_stats/converged"].item()
    assert (tree["sample_stats/negative_signs"].item(), tree.attrs["seed"]) == (0, "11")
    assert "constrained coordinates" in tree.attrs["objective"]
    assert tree.attrs["version"]


def test_a_mode_keeps_its_data_when_the_array_that_was_given_is_written_to():
    data = np.array([0.3, -1.2, 2.0])
    found = find_map(spread, model_args=(data,), space="unconstrained", key=1)
    data[:] = 9.0
    np.testing.assert_array_equal(found.model_args[0], [0.3, -1.2, 2.0])
    np.testing.assert_array_equal(found.observed_data["y"], [0.3, -1.2, 2.0])


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (coin, (COINS,), {"space": "both"}, "space: got 'both'; pass one of constrained, unconstrained"),
        (coin, COINS, {"key": 0}, r"model_args: got ndarray; pass a tuple of the model's arguments, such as \(y,\)"),
        (None, (COINS,), {"key": 0}, "model: got NoneType; pass a function that is a NumPyro model"),
        (coin, (COINS,), {"init": ["p"]}, "init: got list; pass a dict by name"),
        (coin, (COINS,), {"key": 0, "model_kwargs": [1]}, "model_kwargs: got list; pass a dict by name"),
        (coin, (COINS,), {}, "init: has no value for 'p'; pass one, or a key"),
        (coin, (COINS,), {"init": {"q": 0.5}, "key": 0}, "init: names q; the model's latent sites are p"),
        (coin, (COINS,), {"init": {"p": 1.5}}, r"init\['p'\]: lies outside"),
        (coin, (COINS,), {"init": {"p": 1.0}}, r"init\['p'\]: lies on the edge"),
        (coin, (COINS,), {"init": {"p": np.nan}}, r"init\['p'\]: contains NaN or inf"),
        (coin, (COINS,), {"init": {"p": np.full(2, 0.5)}}, r"init\['p'\]: has shape \(2,\); pass \(\)"),
        (coin, (COINS,), {"init": {"p": "half"}}, r"init\['p'\]: got str"),
        (coin, (np.zeros(0, int),), {"key": 0}, r"model: an argument has shape \(0,\); pass at least one"),
        (
            lambda: coin_of(np.zeros(0)),
            (),
            {"key": 0},
            r"model: observed site 'x' has shape \(0,\); pass at least one",
        ),
        (coin, (COINS,), {"key": 0, "max_steps": 0}, "max_steps: got 0"),
        (coin, (COINS,), {"key": 0, "tolerance": 0.0}, "tolerance: got 0.0"),
        (coin, (COINS,), {"key": -1}, "key: got -1"),
        (
            lambda: numpyro.sample("k", dist.Poisson(1.0)),
            (),
            {"key": 0},
            "site 'k' is discrete and not observed",
        ),
        (lambda: numpyro.sample("y", dist.Normal(), obs=0.0), (), {"key": 0}, "model: has no latent site"),
    ],
)
def test_bad_input_is_refused_by_name(model, data, options, message):
    with pytest.raises(ValueError, match=message):
        find_map(model, model_args=data, **{"space": "constrained", **options})

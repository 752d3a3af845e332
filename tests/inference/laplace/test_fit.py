import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation
from optax import adam
from scipy.stats import multivariate_normal, norm

from prob_transformer import Attention, EmbeddingProcess, LinearDecoder, map_objective, token_model
from prob_transformer.inference import MapStatus, find_map, load, save
from prob_transformer.inference.laplace import IndefiniteCurvatureError, laplace
from tests.helpers.modes import mode_at

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(6, 3)), RNG.normal(size=6)
LABELS = np.array([0, 1, 1, 0, 1, 0])
ZERO = Attention(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)))


RUNS = []


def linear(x, y, scale=2.0, noise=0.5):
    RUNS.append(x.shape)
    w = numpyro.sample("w", dist.Normal(0, scale).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("cases", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ w, noise), obs=y)


def two_sites(x, y):
    a = numpyro.sample("a", dist.Normal(0, 1.5).expand([2]).to_event(1))
    b = numpyro.sample("b", dist.Normal(0, 0.7))
    with numpyro.plate("cases", x.shape[0]):
        numpyro.sample("y", dist.Normal(x[:, :2] @ a + x[:, 2] * b, 0.5), obs=y)


def logistic(x, labels):
    """The logits are not linear in the parameters, and one of these is positive."""
    w = numpyro.sample("w", dist.Normal(0, 2.0).expand([x.shape[1]]).to_event(1))
    s = numpyro.sample("s", dist.HalfNormal(1.5))
    with numpyro.plate("cases", x.shape[0]):
        numpyro.sample("y", dist.Bernoulli(logits=s * (x @ w)), obs=labels)


def logistic_potential(z, x, labels):
    """By hand, at (log s, w): the order of the sites' names."""
    log_s, w = z[0], z[1:]
    logits = jnp.exp(log_s) * (x @ w)
    prior = 0.5 * (w @ w) / 4.0 + len(w) * jnp.log(2.0 * jnp.sqrt(2 * jnp.pi))
    prior += 0.5 * jnp.exp(2 * log_s) / 1.5**2 + 0.5 * jnp.log(jnp.pi / 2) + jnp.log(1.5) - log_s
    return prior + (jnp.logaddexp(0, logits) - labels * logits).sum()


def matrix_regression(x, y, cholesky):
    w = numpyro.sample("w", dist.Normal(0, 1.3).expand([x.shape[1], y.shape[1]]).to_event(2))
    with numpyro.plate("cases", x.shape[0]):
        numpyro.sample("y", dist.MultivariateNormal(x @ w, scale_tril=cholesky), obs=y)


def observed_process(attention, y, scale=0.5, implementation=None):
    u = numpyro.sample("embeddings", EmbeddingProcess(attention, y.shape[0], 0.4, 1.7, implementation=implementation))
    numpyro.sample("y", dist.Normal(u, scale).to_event(2), obs=y)


def two_wells(y):
    """A saddle at 0: the density has a minimum along x and a maximum along y."""
    x = numpyro.sample("x", dist.Normal(0, 10.0))
    w = numpyro.sample("w", dist.Normal(0, 1.0))
    numpyro.factor("wells", -jnp.square(x**2 - 1))
    numpyro.sample("y", dist.Normal(w, 1.0), obs=y)


def linear_mode_at(x, y, scale=2.0, noise=0.5):
    precision = x.T @ x / noise**2 + np.eye(x.shape[1]) / scale**2
    mode = np.linalg.solve(precision, x.T @ y / noise**2).astype(x.dtype)
    return mode_at({"w": mode}, linear, x, y, scale, noise)


@pytest.fixture(scope="module")
def linear_mode():
    return linear_mode_at(X, Y)


@pytest.fixture(scope="module")
def logistic_mode():
    return find_map(logistic, model_args=(X, LABELS), space="unconstrained", key=0, tolerance=1e-9)


# Two cases and eight parameters: a curvature of rank 2.
WIDE = RNG.normal(size=(2, 8)), RNG.normal(size=2)


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
@pytest.mark.parametrize(
    ("data", "structure", "rank", "error"),
    [
        ((X, Y), "full", None, 1e-12),
        ((X, Y), "kronecker", None, 1e-12),
        ((X, Y), "low-rank", 3, 1e-12),
        (WIDE, "low-rank", 2, 1e-9),
    ],
)
def test_a_linear_gaussian_model_has_its_closed_form(data, structure, rank, error, curvature):
    x, y = data
    result = laplace(linear_mode_at(x, y), structure=structure, rank=rank, curvature=curvature)
    precision = x.T @ x / 0.5**2 + np.eye(x.shape[1]) / 2.0**2
    evidence = multivariate_normal.logpdf(y, np.zeros(len(y)), 2.0**2 * x @ x.T + 0.5**2 * np.eye(len(y)))
    np.testing.assert_allclose(result.covariance(), np.linalg.inv(precision), atol=error)
    np.testing.assert_allclose(result.log_evidence, evidence, atol=max(error, 1e-10))
    assert (result.structure, result.curvature, result.sites) == (structure, curvature, ("w",))


def test_the_diagonal_is_that_of_the_precision(linear_mode):
    result = laplace(linear_mode, structure="diagonal")
    entries = np.diag(X.T @ X / 0.5**2 + np.eye(3) / 2.0**2)
    np.testing.assert_allclose(result.covariance(), np.diag(1 / entries), atol=1e-12)
    joint = multivariate_normal.logpdf(Y, X @ linear_mode.parameters["w"], 0.5**2 * np.eye(6))
    joint += norm.logpdf(linear_mode.parameters["w"], 0, 2.0).sum()
    np.testing.assert_allclose(result.log_evidence, joint + 0.5 * np.log(2 * np.pi / entries).sum(), atol=1e-10)


def test_a_low_rank_keeps_the_largest_directions_of_the_likelihood_and_the_prior_elsewhere(linear_mode):
    result = laplace(linear_mode, structure="low-rank", rank=2)
    values, vectors = np.linalg.eigh(X.T @ X / 0.5**2)
    kept = (vectors[:, 1:] * values[1:]) @ vectors[:, 1:].T + np.eye(3) / 2.0**2
    np.testing.assert_allclose(result.covariance(), np.linalg.inv(kept), atol=1e-9)
    full = laplace(linear_mode)
    left_out = 0.5 * np.log1p(values[0] * 2.0**2)
    np.testing.assert_allclose(result.log_evidence, full.log_evidence + left_out, atol=1e-9)


def test_without_interaction_covariance_and_evidence_of_the_process_have_their_closed_form():
    y = np.random.default_rng(1).normal(size=(4, 2))
    lower = np.eye(4)
    for i in range(1, 4):
        lower[i, :i] = -1.0 / i
    prior = lower.T @ np.diag(1 / np.array([1.7, 0.4, 0.4, 0.4]) ** 2) @ lower
    covariance = np.kron(np.linalg.inv(prior + np.eye(4) / 0.5**2), np.eye(2))
    evidence = multivariate_normal(np.zeros(4), np.linalg.inv(prior) + 0.5**2 * np.eye(4)).logpdf(y.T).sum()
    mean = (covariance @ y.ravel() / 0.5**2).reshape(4, 2)
    result = laplace(mode_at({"embeddings": mean}, observed_process, ZERO, y))
    np.testing.assert_allclose(result.covariance(), covariance, atol=1e-12)
    np.testing.assert_allclose(result.log_evidence, evidence, atol=1e-10)


def test_a_kronecker_product_is_exact_for_a_curvature_that_is_one():
    cholesky = np.array([[0.5, 0.0], [0.3, 0.8]])
    x, y = RNG.normal(size=(5, 3)), RNG.normal(size=(5, 2))
    noise = cholesky @ cholesky.T
    precision = np.kron(x.T @ x, np.linalg.inv(noise)) + np.eye(6) / 1.3**2
    mode = np.linalg.solve(precision, (x.T @ y @ np.linalg.inv(noise)).ravel()).reshape(3, 2)
    found = mode_at({"w": mode}, matrix_regression, x, y, cholesky)
    result = laplace(found, structure="kronecker")
    evidence = multivariate_normal.logpdf(
        y.ravel(), np.zeros(10), 1.3**2 * np.kron(x @ x.T, np.eye(2)) + np.kron(np.eye(5), noise)
    )
    np.testing.assert_allclose(result.covariance(), np.linalg.inv(precision), atol=1e-12)
    np.testing.assert_allclose(result.log_evidence, evidence, atol=1e-10)


def test_covariance_and_evidence_are_those_of_a_potential_written_by_hand(logistic_mode):
    result = laplace(logistic_mode)
    z = jnp.concatenate([jnp.log(logistic_mode.parameters["s"])[None], logistic_mode.parameters["w"]])
    precision = np.asarray(jax.jit(jax.hessian(logistic_potential))(z, X, LABELS))
    evidence = -logistic_potential(z, X, LABELS) + 2 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    np.testing.assert_allclose(result.covariance(), np.linalg.inv(precision), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(result.log_evidence, evidence, rtol=1e-12)


def test_numpyros_own_approximation_agrees(logistic_mode):
    guide = AutoLaplaceApproximation(logistic)
    SVI(logistic, guide, adam(0.1), Trace_ELBO()).init(jax.random.key(0), X, LABELS)
    # NumPyro orders the parameters as it meets the sites, here they go by name.
    loc = jnp.concatenate([logistic_mode.unconstrained["w"], logistic_mode.unconstrained["s"][None]])
    posterior = jax.jit(lambda loc: guide.get_posterior({"auto_loc": loc}).covariance_matrix)(loc)
    covariance = np.roll(laplace(logistic_mode).covariance(), -1, axis=(0, 1))
    np.testing.assert_allclose(posterior, covariance, rtol=1e-8)


def test_draws_lie_in_the_supports_and_have_mean_and_covariance(logistic_mode):
    result, draws = laplace(logistic_mode), 20_000
    drawn = result.sample(jax.random.key(3), draws)
    assert set(drawn) == {"s", "w"}
    assert (np.asarray(drawn["s"]) > 0).all()
    z = np.concatenate([np.log(drawn["s"])[:, None], drawn["w"]], axis=1)
    mean = np.concatenate([result.mean["s"][None], result.mean["w"]])
    covariance = np.asarray(result.covariance())
    variances = np.diag(covariance)
    np.testing.assert_array_less(np.abs(z.mean(0) - mean), 4 * np.sqrt(variances / draws))
    spread = np.sqrt((np.outer(variances, variances) + covariance**2) / draws)
    np.testing.assert_array_less(np.abs(np.cov(z.T) - covariance), 4 * spread)


def test_some_sites_alone_have_the_conditional_gaussian_and_evidence():
    prior = np.diag([1 / 1.5**2, 1 / 1.5**2, 1 / 0.7**2])
    mode = np.linalg.solve(X.T @ X / 0.25 + prior, X.T @ Y / 0.25)
    found = mode_at({"a": mode[:2], "b": mode[2]}, two_sites, X, Y)
    result = laplace(found, sites=("a",))
    a, b = X[:, :2], X[:, 2]
    held = float(found.parameters["b"])
    np.testing.assert_allclose(result.covariance(), np.linalg.inv(a.T @ a / 0.25 + np.eye(2) / 1.5**2), atol=1e-12)
    evidence = multivariate_normal.logpdf(Y, b * held, 1.5**2 * a @ a.T + 0.25 * np.eye(6))
    np.testing.assert_allclose(result.log_evidence, evidence + norm.logpdf(held, 0, 0.7), atol=1e-10)
    assert set(result.sample(jax.random.key(0), 2)) == set(result.mean) == {"a"}
    assert set(result.mode.unconstrained) == {"a", "b"}


def test_the_token_models_precision_is_the_hessian_of_the_hand_written_objective():
    attention = Attention(-np.eye(2)[None], np.eye(2)[None])
    decoder = LinearDecoder(RNG.normal(size=(3, 2)), np.zeros(3))
    tokens, options = np.array([0, 2, 1]), {"noise_scale": 0.6, "barrier_weight": 0.3}
    # Near 0 the objective is convex; that its gradient is not 0 there does not matter to the Hessian.
    point = {"embeddings": 0.1 * RNG.normal(size=(3, 2))}
    found = mode_at(point, token_model, attention, decoder, tokens, **options)
    result = laplace(found)

    def objective(flat):
        return map_objective(attention, decoder, flat.reshape(3, 2), tokens, **options)

    precision = np.asarray(jax.jit(jax.hessian(objective))(found.parameters["embeddings"].ravel()))
    np.testing.assert_allclose(result.covariance(), np.linalg.inv(precision), rtol=1e-8, atol=1e-11)
    evidence = -found.objective + 3 * np.log(2 * np.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    np.testing.assert_allclose(result.log_evidence, evidence, rtol=1e-12)


@pytest.mark.parametrize(("structure", "rank"), [("full", None), ("low-rank", 2)])
def test_float32_stays_float32(structure, rank):
    x, y = X.astype(np.float32), Y.astype(np.float32)
    result = laplace(linear_mode_at(x, y), structure=structure, rank=rank)
    values, vectors = np.linalg.eigh(X.T @ X / 0.25)
    values[: 1 if rank else 0] = 0.0
    assert result.covariance().dtype == np.float32
    assert result.sample(jax.random.key(0), 2)["w"].dtype == np.float32
    truth = np.linalg.inv((vectors * values) @ vectors.T + np.eye(3) / 4.0)
    np.testing.assert_allclose(result.covariance(), truth, atol=1e-5)
    joint = norm.logpdf(Y, X @ result.mean["w"], 0.5).sum() + norm.logpdf(result.mean["w"], 0, 2.0).sum()
    evidence = joint + 1.5 * np.log(2 * np.pi) - 0.5 * np.log(values + 0.25).sum()
    np.testing.assert_allclose(result.log_evidence, evidence, rtol=1e-5)


@pytest.mark.parametrize(
    ("structure", "rank", "curvature"),
    [
        ("full", None, "hessian"),
        ("full", None, "ggn"),
        ("low-rank", 1, "hessian"),
        ("kronecker", None, "hessian"),
        ("diagonal", None, "hessian"),
    ],
)
def test_a_saddle_is_refused_with_its_eigenvalue_and_a_remedy(structure, rank, curvature):
    y = np.zeros(())
    found = mode_at({"x": 0.0, "w": 0.0}, two_wells, y)
    with pytest.raises(IndefiniteCurvatureError) as refusal:
        laplace(found, structure=structure, rank=rank, curvature=curvature)
    assert "-3.99" in str(refusal.value)
    assert "ggn" in str(refusal.value)


def test_one_compilation_for_each_structure_and_shape():
    def runs_of_the_model(seed, cases, structure, rank):
        rng = np.random.default_rng(seed)
        x, y = rng.normal(size=(cases, 3)), rng.normal(size=cases)
        found = linear_mode_at(x, y)
        before = len(RUNS)
        result = laplace(found, structure=structure, rank=rank)
        result.sample(jax.random.key(seed), 3)
        return len(RUNS) - before

    for structure, rank in [("full", None), ("low-rank", 2), ("kronecker", None), ("diagonal", None)]:
        runs_of_the_model(1, 6, structure, rank)
        assert runs_of_the_model(2, 6, structure, rank) == 0
    assert runs_of_the_model(3, 7, "full", None) > 0


def test_the_datatree_holds_draws_fit_and_data_with_other_sites_held_at_the_mode(tmp_path):
    held = 0.7
    result = laplace(mode_at({"a": np.zeros(2), "b": np.array(held)}, two_sites, X, Y), sites=["a"], key=5, draws=40)
    save(result.to_datatree({"a": ("feature",)}), tmp_path / "laplace.nc")
    tree = load(tmp_path / "laplace.nc")
    drawn = np.asarray(result.sample(jax.random.key(5), 40)["a"])
    assert tree["posterior/a"].dims == ("chain", "draw", "feature")
    assert list(tree["posterior"].data_vars) == ["a"]
    np.testing.assert_array_equal(tree["posterior/a"][0], drawn)
    np.testing.assert_array_equal(result.posterior["a"][0], drawn)
    assert tree["posterior_predictive/y"].shape == (1, 40, 6)
    fit = norm.logpdf(Y, drawn @ X[:, :2].T + X[:, 2] * held, 0.5)
    np.testing.assert_allclose(tree["log_likelihood/y"][0], fit, rtol=1e-10)
    joint = fit.sum(-1) + norm.logpdf(drawn, 0, 1.5).sum(-1) + norm.logpdf(held, 0, 0.7)
    np.testing.assert_allclose(tree["sample_stats/log_joint"][0], joint, rtol=1e-10)
    np.testing.assert_array_equal(tree["observed_data/y"], Y)
    assert (tree.attrs["seed"], float(tree.attrs["log_evidence"])) == ("5", result.log_evidence)
    assert '"structure": "full"' in tree.attrs["configuration"]
    assert tree.attrs["version"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"sites": ("v",)}, r"sites: got \('v',\); pass different names out of the latent sites \['w'\]"),
        ({}, {"sites": ()}, r"sites: got \(\)"),
        ({}, {"sites": ("w", "w")}, "sites: got"),
        ({}, {"sites": 3}, "sites: got 3"),
        ({}, {"sites": [["w"]]}, "sites: got"),
        ({}, {"key": "x"}, "key: got 'x'"),
        ({}, {"draws": -1}, "draws: got -1"),
        ({}, {"structure": "dense"}, "structure: got 'dense'; pass one of full"),
        ({}, {"curvature": "fisher"}, "curvature: got 'fisher'; pass one of hessian"),
        ({}, {"rank": 2}, "rank: got 2 for structure 'full'"),
        ({}, {"structure": "low-rank"}, "rank: got None"),
        ({}, {"structure": "low-rank", "rank": 4}, "rank: got 4 for 3 parameters"),
        ({"status": MapStatus.MAX_STEPS}, {}, "mode: the search ended as max_steps"),
        ({"space": "constrained"}, {}, "mode: is one of the density in constrained coordinates"),
        ({}, {"prior_precision": 1.0}, "prior_precision: is no option for a MapResult"),
    ],
)
def test_bad_input_is_refused_by_name(linear_mode, change, options, message):
    with pytest.raises(ValueError, match=message):
        laplace(linear_mode._replace(**change), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mode: laplace(mode.parameters), "mode: got dict; pass the result of find_map"),
        (lambda mode: laplace(mode).sample(jax.random.key(0), 0), "draws: got 0"),
        (lambda mode: laplace(mode).to_datatree(), "key: got None"),
        (
            lambda _: laplace(
                mode_at(
                    {"embeddings": np.zeros((2, 2))}, observed_process, ZERO, np.zeros((2, 2)), implementation="blocked"
                )
            ),
            r"site .embeddings. has implementation=.blocked., .* pass implementation",
        ),
    ],
)
def test_what_is_no_mode_and_what_cannot_be_drawn_are_refused(linear_mode, call, message):
    with pytest.raises(ValueError, match=message):
        call(linear_mode)


def test_a_dense_matrix_too_large_to_hold_is_refused():
    def wide(y):
        w = numpyro.sample("w", dist.Normal(0, 1).expand([10_001]).to_event(1))
        numpyro.sample("y", dist.Normal(w[:2].sum(), 1.0), obs=y)

    found = mode_at({"w": np.array([1 / 3, 1 / 3] + [0.0] * 9_999)}, wide, np.ones(()))
    with pytest.raises(ValueError, match="structure: needs a dense matrix of 10001 rows"):
        laplace(found)
    # Two parameters with curvature [[1, 1], [1, 1]], all others with that of the prior alone.
    result = laplace(found, structure="low-rank", rank=1)
    np.testing.assert_allclose(result.log_evidence, norm.logpdf(1.0, 0, np.sqrt(3.0)), atol=1e-8)
    np.testing.assert_allclose(result.precision.variance()[:3], [2 / 3, 2 / 3, 1.0], atol=1e-9)
    with pytest.raises(ValueError, match="covariance: needs a dense matrix"):
        result.covariance()

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats
from scipy.integrate import quad
from small_models import BUMPS, FIRST_SCALE, NOISE_SCALE, TOKENS, bump, conjugate_truth

from prob_transformer import Attention, EmbeddingProcess, token_model
from prob_transformer.inference import NutsStatus, load, nuts, save

Y = np.array([[0.5], [-0.4], [1.1]])
WALK = np.array([[0.3], [1.0], [0.1], [-0.6]])


def within_three_standard_errors(result, values, truth):
    """Monte Carlo standard error of the mean of `values` (chain, draw) from its own effective sample size."""
    size = numpyro.diagnostics.effective_sample_size(values)
    assert abs(values.mean() - truth) < 3 * values.std(ddof=1) / np.sqrt(size)


def interacting(a, dtype=float):
    return Attention(jnp.asarray(a, dtype).reshape(1, 1, 1), jnp.ones((1, 1, 1), dtype))


def observed_process(attention, y, scale=0.5):
    u = numpyro.sample("embeddings", EmbeddingProcess(attention, y.shape[0], NOISE_SCALE, FIRST_SCALE))
    numpyro.sample("y", dist.Normal(u, scale).to_event(2), obs=y)


def strength(walk):
    """One parameter a = -b < 0, so that det J >= 1, given the embeddings."""
    b = numpyro.sample("b", dist.HalfNormal(2.0))
    numpyro.sample("embeddings", EmbeddingProcess(interacting_of(-b), walk.shape[0], NOISE_SCALE), obs=walk)


def interacting_of(a):
    return Attention(a[None, None, None], jnp.ones((1, 1, 1)))


def coin(x):
    p = numpyro.sample("p", dist.Beta(2.0, 3.0))
    with numpyro.plate("cases", x.shape[0]):
        numpyro.sample("x", dist.Bernoulli(p), obs=x)


def lone_coins(x):
    numpyro.sample("x", dist.Bernoulli(numpyro.sample("p", dist.Beta(2.0, 3.0))).expand(x.shape), obs=x)


def funnel():
    log_scale = numpyro.sample("log_scale", dist.Normal(0.0, 3.0))
    with numpyro.plate("many", 9):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(log_scale / 2)))


@pytest.mark.parametrize("embeddings", ["direct", "noise"])
def test_without_interaction_the_posterior_is_that_of_the_conjugate_gaussian(embeddings):
    _, mean, variance = conjugate_truth()
    attention = Attention(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)))
    scales = {"noise_scale": NOISE_SCALE, "first_scale": FIRST_SCALE}
    result = nuts(token_model, attention, BUMPS, TOKENS, seed=1, warmup=400, embeddings=embeddings, **scales)
    assert result.status is NutsStatus.OK
    u = result.draws["embeddings"]
    assert u.shape == (2, 1000, 3, 2)
    for i in range(3):
        for k in range(2):
            within_three_standard_errors(result, u[..., i, k], mean[i, k])
            within_three_standard_errors(result, (u[..., i, k] - mean[i, k]) ** 2, variance[i])
    by_hand = sum(np.log(bump(u[..., i, :], TOKENS[i])) for i in range(3))
    np.testing.assert_allclose(result.log_likelihood["tokens"], by_hand, atol=1e-9)
    seen = result.posterior_predictive["tokens"] == TOKENS
    expected = np.mean([bump(u[..., i, :], TOKENS[i]) for i in range(3)], (1, 2))
    assert (np.abs(seen.mean((0, 1)) - expected) < 4.5 * np.sqrt(0.25 / 2000)).all()


def test_in_the_safe_region_both_ways_to_sample_embeddings_have_the_posterior_of_quadrature():
    # Negative a: det J >= 1 everywhere.
    a, scale = -2.0, 0.5
    grid = np.linspace(-6.0, 6.0, 161)
    u1, u2, u3 = np.meshgrid(grid, grid, grid, indexing="ij", sparse=True)
    share = 1 / (1 + np.exp(-a * u3 * (u1 - u2)))
    determinant = 1 - a * share * (1 - share) * (u1 - u2) ** 2
    joint = stats.norm.pdf(u1, 0, FIRST_SCALE) * stats.norm.pdf(u2 - u1, 0, NOISE_SCALE) * determinant
    joint = joint * stats.norm.pdf(u3 - share * u1 - (1 - share) * u2, 0, NOISE_SCALE)
    for u, y in zip((u1, u2, u3), Y[:, 0], strict=True):
        joint = joint * stats.norm.pdf(y, u, scale)
    joint /= joint.sum()
    for embeddings in ("direct", "noise"):
        result = nuts(observed_process, interacting(a), Y, scale, seed=2, warmup=400, embeddings=embeddings)
        assert result.status is NutsStatus.OK
        u = result.draws["embeddings"][..., 0]
        for f in (lambda u1, u2, u3: u1, lambda u1, u2, u3: u3, lambda u1, u2, u3: u1 * u3, lambda u1, u2, u3: u2**2):
            within_three_standard_errors(result, f(*np.moveaxis(u, -1, 0)), (joint * f(u1, u2, u3)).sum())


def test_the_posterior_of_a_parameter_is_that_of_quadrature():
    def density(b):
        squared, log_det = [], 0.0
        for i in range(1, 4):
            past = WALK[:i, 0]
            weights = np.exp(-b * past * WALK[i, 0])
            weights /= weights.sum()
            mean = weights @ past
            log_det += np.log1p(b * weights @ (past - mean) ** 2)
            squared.append((WALK[i, 0] - mean) ** 2)
        return np.exp(-0.5 * np.sum(squared) / NOISE_SCALE**2 + log_det) * stats.halfnorm.pdf(b, scale=2.0)

    mass, first, second = (quad(lambda b, k=k: b**k * density(b), 0, 30)[0] for k in range(3))
    result = nuts(strength, WALK, seed=3, warmup=400)
    assert result.status is NutsStatus.OK
    within_three_standard_errors(result, result.draws["b"], first / mass)
    within_three_standard_errors(result, result.draws["b"] ** 2, second / mass)


def test_other_data_of_the_same_shape_compile_nothing_and_every_run_reports_to_its_own_listener():
    runs, told = [], ([], [])

    def model(x, a):
        runs.append(isinstance(x, jax.core.Tracer))
        location = numpyro.sample("location", dist.Normal(a, 1.0))
        numpyro.sample("x", dist.Normal(location, 1.0), obs=x)

    def run(x, a, seed, **options):
        result = nuts(model, x, a, warmup=200, draws=300, seed=seed, **options)
        within_three_standard_errors(result, result.draws["location"], (x + a) / 2)
        return result

    first = run(np.array(0.3), np.array(1.0), 0, progress=told[0].append)
    assert any(runs)
    runs.clear()
    run(np.array(2.0), np.array(-1.0), 1, target_accept=0.9, progress=told[1].append)
    assert not any(runs)
    assert sorted(told[0]) == sorted(told[1]) == list(range(5, 501, 5))
    again = run(np.array(0.3), np.array(1.0), 0, progress=told[1].append)
    np.testing.assert_array_equal(again.draws["location"], first.draws["location"])
    other = run(np.array(0.3), np.array(1.0), 7, progress=told[1].append)
    assert (other.draws["location"] != first.draws["location"]).any()
    assert (first.draws["location"][0] != first.draws["location"][1]).any()


def test_a_funnel_diverges_and_is_not_written_silently():
    result = nuts(funnel, seed=0, warmup=200, draws=400)
    assert NutsStatus.DIVERGED in result.problems
    assert result.status is NutsStatus.DIVERGED
    assert 0 < result.sample_stats["diverging"].sum() < 800
    with pytest.raises(ValueError, match=r"status: diverged \(\d+ of 800 draws\): raise target_accept"):
        result.to_datatree()
    tree = result.to_datatree(allow=result.problems)
    assert tree.attrs["status"].startswith("diverged")
    assert "observed_data" not in tree


def two_hills():
    numpyro.sample("x", dist.Mixture(dist.Categorical(jnp.array([0.5, 0.5])), [dist.Normal(-30.0), dist.Normal(30.0)]))


def test_chains_on_two_hills_have_not_mixed():
    # Random starts lie on either side of 0, and no chain finds its way across.
    result = nuts(two_hills, seed=0, warmup=100, draws=200, chains=4)
    assert set(np.sign(result.draws["x"].mean(1))) == {-1.0, 1.0}
    assert result.status is NutsStatus.NOT_MIXED
    assert result.r_hat["x"] > 2
    with pytest.raises(ValueError, match=r"status: not_mixed \(largest R-hat .*allow=\[NutsStatus.NOT_MIXED\]"):
        result.to_datatree()
    with pytest.raises(ValueError, match="not_mixed"):
        result.to_datatree(allow=[NutsStatus.DIVERGED])


def test_data_that_are_not_a_number_are_named_and_never_written():
    result = nuts(coin_with_nan, np.array([1.0, np.nan]), seed=0, warmup=10, draws=20)
    assert result.status is NutsStatus.NOT_FINITE
    with pytest.raises(ValueError, match=r"status: not_finite.*pass an init"):
        result.to_datatree(allow=list(NutsStatus))


def coin_with_nan(x):
    location = numpyro.sample("location", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(location, 1.0).expand([2]).to_event(1), obs=x)


@pytest.mark.parametrize(("embeddings", "status"), [("direct", "past_boundary"), ("noise", "root_lost")])
def test_past_the_boundary_the_status_says_so(embeddings, status):
    # a = 6 and observations far apart: u_3 has several roots.
    y = np.array([[-1.5], [1.5], [0.2]])
    result = nuts(
        observed_process,
        interacting(6.0),
        y,
        0.5,
        seed=5,
        warmup=200,
        draws=300,
        embeddings=embeddings,
        max_tree_depth=5,
    )
    u = result.draws["embeddings"]
    assert np.isfinite(u).all()
    assert NutsStatus.PAST_BOUNDARY in result.problems
    with pytest.raises(ValueError, match="past_boundary"):
        result.to_datatree(allow=[p for p in result.problems if p != NutsStatus.PAST_BOUNDARY])
    if embeddings == "direct":
        share = 1 / (1 + np.exp(-6 * u[..., 2, 0] * (u[..., 0, 0] - u[..., 1, 0])))
        determinant = 1 - 6 * share * (1 - share) * (u[..., 0, 0] - u[..., 1, 0]) ** 2
        np.testing.assert_array_equal(result.sample_stats["past_boundary"], determinant <= 0)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
def test_the_tree_holds_all_groups_and_comes_back_from_a_file(tmp_path, suffix):
    attention = Attention(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)))
    scales = {"noise_scale": NOISE_SCALE, "first_scale": FIRST_SCALE}
    result = nuts(token_model, attention, BUMPS, TOKENS, seed=1, warmup=400, embeddings="noise", **scales)
    save(result.to_datatree(), tmp_path / f"nuts{suffix}")
    tree = load(tmp_path / f"nuts{suffix}")
    for name in ("embeddings", "embeddings_noise"):
        assert tree[f"posterior/{name}"].dims == ("chain", "draw", "position", "embedding_dim")
        np.testing.assert_array_equal(tree[f"posterior/{name}"], result.draws[name])
    assert tree["posterior_predictive/tokens"].dims == ("chain", "draw", "position")
    assert tree["log_likelihood/tokens"].dims == ("chain", "draw")
    assert {"diverging", "n_steps", "acceptance_rate", "energy", "lp", "step_size"} <= set(tree["sample_stats"])
    np.testing.assert_array_equal(tree["sample_stats/lp"], -result.sample_stats["potential_energy"])
    np.testing.assert_array_equal(tree["observed_data/tokens"], TOKENS)
    assert (tree.attrs["seed"], tree.attrs["status"]) == ("1", "ok")
    assert '"embeddings": "noise"' in tree.attrs["configuration"]


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (coin, (np.ones(3, int),), {"init": {"q": 0.5}}, "init: names q; the model's latent sites are p"),
        (coin, (np.ones(3, int),), {"init": {"p": 1.5}}, r"init\['p'\]: lies outside"),
        (lone_coins, (np.zeros(0, int),), {}, r"model: observed site 'x' has shape \(0,\)"),
        (coin, (np.ones(3, int),), {"seed": None}, "key: got None; pass a JAX random key, or a seed"),
        (coin, (np.ones(3, int),), {"seed": -1}, "seed: got -1"),
        (coin, (np.ones(3, int),), {"draws": 3}, "draws: got 3; pass an integer of at least 4"),
        (coin, (np.ones(3, int),), {"warmup": -1}, "warmup: got -1"),
        (coin, (np.ones(3, int),), {"chains": 0}, "chains: got 0"),
        (coin, (np.ones(3, int),), {"max_tree_depth": 0}, "max_tree_depth: got 0"),
        (coin, (np.ones(3, int),), {"target_accept": 1.0}, "target_accept: got 1.0"),
        (coin, (np.ones(3, int),), {"embeddings": "both"}, "embeddings: got 'both'; pass one of direct, noise"),
        (coin, (np.ones(3, int),), {"embeddings": "noise"}, "embeddings: is 'noise', but no latent site"),
        (lambda: numpyro.sample("k", dist.Poisson(1.0)), (), {}, "site 'k' is discrete and not observed"),
    ],
)
def test_bad_input_is_refused_by_name(model, data, options, message):
    with pytest.raises(ValueError, match=message):
        nuts(model, *data, **{"seed": 0, **options})

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats
from scipy.integrate import quad

from prob_transformer import Attention, EmbeddingProcess, token_model
from prob_transformer.inference import NutsStatus, load, nuts, save
from prob_transformer.inference.nuts_sampler import NutsResult, diagnose
from tests.helpers.small_models import BUMPS, FIRST_SCALE, NOISE_SCALE, TOKENS, bump, conjugate_truth, scalar_density

Y = np.array([[0.5], [-0.4], [1.1]])
SPREAD = 0.5
# One compilation of each parametrisation serves every test of observed_process.
OPTIONS = {"warmup": 400, "draws": 1000, "max_tree_depth": 6}


def assert_mean(values, truth):
    """Within 3 Monte Carlo standard errors, from the effective sample size of `values` (chain, draw) themselves."""
    size = numpyro.diagnostics.effective_sample_size(values)
    assert abs(values.mean() - truth) < 3 * values.std(ddof=1) / np.sqrt(size)


def interacting(a):
    return Attention(jnp.asarray(a, float).reshape(1, 1, 1), jnp.ones((1, 1, 1)))


def observed_process(attention, y):
    u = numpyro.sample("embeddings", EmbeddingProcess(attention, y.shape[0], NOISE_SCALE, FIRST_SCALE))
    numpyro.sample("y", dist.Normal(u, SPREAD).to_event(2), obs=y)


def lone_coins(x):
    numpyro.sample("x", dist.Bernoulli(numpyro.sample("p", dist.Beta(2.0, 3.0))).expand(x.shape), obs=x)


def funnel():
    log_scale = numpyro.sample("log_scale", dist.Normal(0.0, 3.0))
    with numpyro.plate("many", 9):
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(log_scale / 2)))


@pytest.mark.parametrize("embeddings", ["direct", pytest.param("noise", marks=pytest.mark.slow)])
def test_without_interaction_the_posterior_is_that_of_the_linear_gaussian_model(embeddings):
    inverse = np.linalg.inv(np.array([[1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-0.5, -0.5, 1.0]]))
    prior = inverse @ np.diag(np.array([FIRST_SCALE, NOISE_SCALE, NOISE_SCALE]) ** 2) @ inverse.T
    gain = prior @ np.linalg.inv(prior + SPREAD**2 * np.eye(3))
    mean, covariance = gain @ Y[:, 0], prior - gain @ prior
    result = nuts(1, observed_process, model_args=(interacting(0.0), Y), embeddings=embeddings, **OPTIONS)
    assert result.status is NutsStatus.OK
    centred = result.posterior["embeddings"][..., 0] - mean
    for i in range(3):
        assert_mean(centred[..., i], 0.0)
        for k in range(i + 1):
            assert_mean(centred[..., i] * centred[..., k], covariance[i, k])


@pytest.mark.parametrize("embeddings", ["direct", pytest.param("noise", marks=pytest.mark.slow)])
def test_in_the_safe_region_both_ways_to_sample_embeddings_have_the_posterior_of_quadrature(embeddings):
    # Negative a: det J >= 1 everywhere.
    grid = np.linspace(-6.0, 6.0, 161)
    u1, u2, u3 = np.meshgrid(grid, grid, grid, indexing="ij", sparse=True)
    joint = np.prod(np.broadcast_arrays(*scalar_density(-2.0, u1, u2, u3)), axis=0)
    for u, y in zip((u1, u2, u3), Y[:, 0], strict=True):
        joint = joint * stats.norm.pdf(y, u, SPREAD)
    joint /= joint.sum()
    result = nuts(2, observed_process, model_args=(interacting(-2.0), Y), embeddings=embeddings, **OPTIONS)
    assert result.status is NutsStatus.OK
    u = np.moveaxis(result.posterior["embeddings"][..., 0], -1, 0)
    for f in (lambda u1, u2, u3: u1, lambda u1, u2, u3: u3, lambda u1, u2, u3: u1 * u3, lambda u1, u2, u3: u2**2):
        assert_mean(f(*u), (joint * f(u1, u2, u3)).sum())


@pytest.mark.slow
def test_tokens_as_gaussian_observations_in_two_dimensions():
    _, mean, variance = conjugate_truth()
    result = token_run()
    assert result.status is NutsStatus.OK
    u = result.posterior["embeddings"]
    assert u.shape == (2, 1000, 3, 2)
    for i in range(3):
        for k in range(2):
            assert_mean(u[..., i, k], mean[i, k])
            assert_mean((u[..., i, k] - mean[i, k]) ** 2, variance[i])
    by_hand = sum(np.log(bump(u[..., i, :], TOKENS[i])) for i in range(3))
    np.testing.assert_allclose(result.log_likelihood["tokens"], by_hand, atol=1e-9)
    seen = result.posterior_predictive["tokens"] == TOKENS
    expected = np.mean([bump(u[..., i, :], TOKENS[i]) for i in range(3)], (1, 2))
    assert (np.abs(seen.mean((0, 1)) - expected) < 4.5 * np.sqrt(0.25 / 2000)).all()


def token_run():
    attention = Attention(np.zeros((1, 1, 2)), np.zeros((1, 1, 2)))
    scales = {"noise_scale": NOISE_SCALE, "first_scale": FIRST_SCALE}
    return nuts(1, token_model, model_args=(attention, BUMPS, TOKENS), model_kwargs=scales, **OPTIONS)


@pytest.mark.slow
def test_a_parameter_by_quadrature_with_one_compilation_for_data_of_one_shape_and_progress_for_each_run():
    traced, told = [], ([], [])

    def strength(walk):
        """One parameter a = -b < 0, so that det J >= 1, given the embeddings."""
        b = numpyro.sample("b", dist.LogNormal(0.0, 0.7))
        traced.append(isinstance(b, jax.core.Tracer))
        attention = Attention(-b[None, None, None], jnp.ones((1, 1, 1)))
        numpyro.sample("embeddings", EmbeddingProcess(attention, walk.shape[0], NOISE_SCALE), obs=walk)

    def moments(walk):
        def density(b):
            total = 0.0
            for i in range(1, 4):
                past = walk[:i, 0]
                weights = np.exp(-b * past * walk[i, 0])
                weights /= weights.sum()
                mean = weights @ past
                total += np.log1p(b * weights @ (past - mean) ** 2) - 0.5 * ((walk[i, 0] - mean) / NOISE_SCALE) ** 2
            return np.exp(total) * stats.lognorm.pdf(b, 0.7)

        mass, first, second = (quad(lambda b, k=k: b**k * density(b), 0, 30)[0] for k in range(3))
        return first / mass, second / mass

    def run(walk, seed, **options):
        result = nuts(seed, strength, model_args=(walk,), warmup=400, draws=2000, **options)
        assert result.status is NutsStatus.OK
        b = result.posterior["b"]
        for power, truth in enumerate(moments(walk), start=1):
            assert_mean(b**power, truth)
        return b

    walk = np.array([[0.3], [1.0], [0.1], [-0.6]])
    first = run(walk, 3, progress=told[0].append)
    assert any(traced)
    traced.clear()
    run(walk[::-1] + 0.5, 4, target_accept=0.9, progress=told[1].append)
    again, other = (run(walk, seed, progress=told[1].append) for seed in (3, 5))
    assert traced
    assert not any(traced)
    assert (sorted(told[0]), sorted(told[1])) == (list(range(24, 2401, 24)), sorted(3 * told[0]))
    np.testing.assert_array_equal(again, first)
    assert (other != first).any()
    assert (first[0] != first[1]).any()


def test_a_funnel_diverges_and_is_not_written_silently():
    result = nuts(0, funnel, warmup=200, draws=400)
    assert NutsStatus.DIVERGED in result.problems
    assert result.status is NutsStatus.DIVERGED
    assert 0 < result.sample_stats["diverging"].sum() < 800
    with pytest.raises(ValueError, match=r"status: diverged \(\d+ of 800 draws\): raise target_accept"):
        result.to_datatree()
    tree = result.to_datatree(allow=result.problems)
    assert tree.attrs["status"].startswith("diverged")
    assert "observed_data" not in tree


def test_data_that_are_not_a_number_are_named_and_never_written():
    result = nuts(0, observed_process, model_args=(interacting(0.0), np.array([[0.5], [np.nan], [1.1]])), **OPTIONS)
    assert result.status is NutsStatus.NOT_FINITE
    with pytest.raises(ValueError, match=r"status: not_finite.*pass an init"):
        result.to_datatree(allow=list(NutsStatus))


@pytest.mark.parametrize("embeddings", ["direct", pytest.param("noise", marks=pytest.mark.slow)])
def test_past_the_boundary_the_status_says_so(embeddings):
    # a = 6 and observations far apart: u_3 has several roots.
    y = np.array([[-1.5], [1.5], [0.2]])
    result = nuts(5, observed_process, model_args=(interacting(6.0), y), embeddings=embeddings, **OPTIONS)
    u1, u2, u3 = np.moveaxis(result.posterior["embeddings"][..., 0], -1, 0)
    assert np.isfinite(u3).all()
    share = 1 / (1 + np.exp(-6 * u3 * (u1 - u2)))
    crossed = 6 * share * (1 - share) * (u1 - u2) ** 2 >= 1
    past, lost = result.sample_stats["past_boundary"], result.sample_stats["root_lost"]
    assert past.any()
    if embeddings == "direct":
        np.testing.assert_array_equal(past, crossed)
        assert not lost.any()
    else:
        # A root may also have been reached by a path that met the wall, or be missing.
        assert (past + lost)[crossed].all()
        missing = np.abs(
            u3 - share * u1 - (1 - share) * u2 - NOISE_SCALE * result.posterior["embeddings_noise"][..., 2, 0]
        )
        assert (missing[lost == 0] < 1e-6).all()
        assert (NutsStatus.ROOT_LOST in result.problems) == lost.any()
    with pytest.raises(ValueError, match="past_boundary"):
        result.to_datatree(allow=[p for p in result.problems if p != NutsStatus.PAST_BOUNDARY])


@pytest.mark.parametrize(("run", "suffix"), [(token_run, ".nc"), (None, ".zarr")])
def test_the_tree_holds_all_groups_and_comes_back_from_a_file(tmp_path, run, suffix):
    result = (
        run() if run else nuts(2, observed_process, model_args=(interacting(-2.0), Y), embeddings="noise", **OPTIONS)
    )
    dims = None if run else {"y": ("position", "embedding_dim")}
    save(result.to_datatree(dims), tmp_path / f"nuts{suffix}")
    tree = load(tmp_path / f"nuts{suffix}")
    for name in ["embeddings"] if run else ["embeddings", "embeddings_noise"]:
        assert tree[f"posterior/{name}"].dims == ("chain", "draw", "position", "embedding_dim")
        np.testing.assert_array_equal(tree[f"posterior/{name}"], result.posterior[name])
    data = "tokens" if run else "y"
    assert tree[f"posterior_predictive/{data}"].dims[:3] == ("chain", "draw", "position")
    assert tree[f"log_likelihood/{data}"].dims == ("chain", "draw")
    assert {"diverging", "n_steps", "acceptance_rate", "energy", "lp", "step_size"} <= set(tree["sample_stats"])
    np.testing.assert_array_equal(tree["sample_stats/lp"], -result.sample_stats["potential_energy"])
    np.testing.assert_array_equal(tree[f"observed_data/{data}"], TOKENS if run else Y)
    assert (tree.attrs["status"], tree.attrs["seed"]) == ("ok", "1" if run else "2")
    assert f'"embeddings": "{"direct" if run else "noise"}"' in tree.attrs["configuration"]


def made_of(draws, **changes):
    """A result with the given draws of one site x and nothing else wrong."""
    nothing = np.zeros(draws.shape[:2], int)
    stats = {"diverging": nothing, "past_boundary": nothing, "root_lost": nothing, "potential_energy": 0.0 * nothing}
    r_hat, ess = diagnose({"x": draws})
    fields = {"posterior": {"x": draws}, "sample_stats": stats, "r_hat": r_hat, "ess": ess, "log_likelihood": {}}
    fields |= {"posterior_predictive": {}, "observed_data": {}, "finite": True, "configuration": {}, "seed": None}
    return NutsResult(**fields | changes)


def test_chains_that_disagree_or_crawl_or_stand_still_have_not_mixed():
    rng = np.random.default_rng(0)
    good = rng.normal(size=(2, 1000))
    assert made_of(good).status is NutsStatus.OK
    apart = good + np.array([[0.0], [0.3]])
    # An autocorrelation of 0.98: about 2 x 1000 x 0.02 / 1.98 = 20 effective draws.
    crawling = np.zeros((2, 1000))
    for i in range(1, 1000):
        crawling[:, i] = 0.98 * crawling[:, i - 1] + rng.normal(size=2)
    for bad in (apart, crawling, np.ones((2, 1000)), good[:, :40]):
        result = made_of(bad)
        assert result.problems == (NutsStatus.NOT_MIXED,)
        with pytest.raises(ValueError, match=r"status: not_mixed \(largest R-hat .*allow=\[NutsStatus.NOT_MIXED\]"):
            result.to_datatree()
        with pytest.raises(ValueError, match="not_mixed"):
            result.to_datatree(allow=[NutsStatus.DIVERGED])
        assert result.to_datatree(allow=[NutsStatus.NOT_MIXED]).attrs["status"] == "not_mixed"
    assert made_of(apart).r_hat["x"] > 1.01
    assert made_of(crawling).ess["x"] < 100


COINS = np.ones(3, int)


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (lone_coins, (COINS,), {"init": {"q": 0.5}}, "init: names q; the model's latent sites are p"),
        (lone_coins, (COINS,), {"init": {"p": 1.5}}, r"init\['p'\]: lies outside"),
        (lone_coins, (COINS[:0],), {}, r"model: an argument has shape \(0,\)"),
        (lone_coins, (COINS,), {"key": None}, "key: got None; pass a JAX random key or an integer of at least 0"),
        (lone_coins, (COINS,), {"key": -1}, "key: got -1"),
        (lone_coins, (COINS,), {"draws": 3}, "draws: got 3; pass an integer of at least 4"),
        (lone_coins, (COINS,), {"warmup": -1}, "warmup: got -1"),
        (lone_coins, (COINS,), {"chains": 0}, "chains: got 0"),
        (lone_coins, (COINS,), {"max_tree_depth": 0}, "max_tree_depth: got 0"),
        (lone_coins, (COINS,), {"target_accept": 1.0}, "target_accept: got 1.0"),
        (lone_coins, (COINS,), {"target_accept": "x"}, "target_accept: got str"),
        (lone_coins, (COINS,), {"target_accept": [0.8, 0.7]}, r"target_accept: got \[0.8, 0.7\]"),
        (lone_coins, (COINS,), {"embeddings": "both"}, "embeddings: got 'both'; pass one of direct, noise"),
        (lone_coins, (COINS,), {"embeddings": "noise"}, "embeddings: is 'noise', but no latent site"),
        (lambda: numpyro.sample("k", dist.Poisson(1.0)), (), {}, "site 'k' is discrete and not observed"),
    ],
)
def test_bad_input_is_refused_by_name(model, data, options, message):
    with pytest.raises(ValueError, match=message):
        nuts(**{"key": 0, "model": model, "model_args": data, **options})

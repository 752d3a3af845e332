import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer.inference import ParticleStatus, load, save, smooth
from tests.helpers.small_models import (
    TOKENS,
    assert_within_three_standard_errors,
    filters,
    scalar,
    scalar_density,
    scalar_truth,
    token_probability,
)


def runs(a=-2.0, threshold=0.5):
    return filters(scalar(a), jax.random.split(jax.random.key(6), 400), 8, "direct", threshold)


def one_run(a=-2.0, status=ParticleStatus.OK, threshold=0.5):
    many = runs(a, threshold)
    chosen = int(np.argmax(np.asarray(many.status) == status))
    assert many.status[chosen] == status
    return jax.tree.map(lambda leaf: leaf[chosen], many)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_smoothing_draws_paths_with_the_backward_probabilities_written_by_hand(threshold):
    result = one_run(threshold=threshold)
    weights, u = np.exp(np.asarray(result.filtered_log_weights)), np.asarray(result.filtered)[..., 0]
    mothers = np.asarray(result.ancestors)[1]
    # All paths (k_1, k_2, k_3), axes in this order; u_2 is judged with the past of its own particle.
    first, middle, last = (u[i].reshape(np.roll((8, 1, 1), i)) for i in range(3))
    law_of_middle = weights[1][:, None] * scalar_density(-2.0, u[0, mothers][:, None], u[1][:, None], u[2])[2]
    law_of_first = weights[0].reshape(8, 1, 1) * np.prod(
        np.broadcast_arrays(*scalar_density(-2.0, first, middle, last)[1:]), axis=0
    )
    expected = weights[2] * (law_of_middle / law_of_middle.sum(0)) * (law_of_first / law_of_first.sum(0))
    np.testing.assert_allclose(expected.sum(), 1.0, atol=1e-12)

    draws = np.asarray(smooth(jax.random.key(7), result, 20_000))[..., 0]
    found = [np.abs(draws[:, i, None] - u[i]).argmin(1) for i in range(3)]
    for i in range(3):
        np.testing.assert_array_equal(draws[:, i], u[i, found[i]])
    shares = np.zeros((8, 8, 8))
    np.add.at(shares, tuple(found), 1 / 20_000)
    error = np.sqrt(expected * (1 - expected) / 20_000)
    # 512 paths, many of them with no draw expected.
    assert (np.abs(shares - expected) < 4.5 * error + 2 / 20_000).all()


@pytest.mark.slow
def test_smoothed_paths_have_the_posterior_mean_and_more_ancestors_than_the_genealogy():
    _, evidence, first, last, both = scalar_truth(-2.0)
    result = filters(scalar(-2.0), jax.random.split(jax.random.key(8), 16), 1000, "direct", 1.0)
    keys = jax.random.split(jax.random.key(9), 16)
    u = np.asarray(jax.jit(jax.vmap(lambda result, key: smooth(key, result, 60)))(result, keys))[..., 0]
    for f, truth in ((u[..., 0], first), (u[..., 2], last), (u[..., 0] * u[..., 2], both)):
        assert_within_three_standard_errors(f.mean(-1), truth / evidence)
    # Draws of u_1 that share a value, as those of the genealogy do more often the older they are.
    distinct = np.array([np.unique(row).size for row in u[..., 0]])
    by_genealogy = 60 * np.asarray(result.distinct)[:, 0] / 1000
    assert (distinct > by_genealogy).mean() > 0.9


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("paths", ["smoothed", "ancestral"])
def test_the_tree_holds_draws_and_the_run_and_comes_back_from_a_file(tmp_path, suffix, paths):
    result = one_run()._replace(seed=6)
    save(result.to_datatree(draws=50, paths=paths), tmp_path / f"particles{suffix}")
    tree = load(tmp_path / f"particles{suffix}")
    u = tree["posterior/embeddings"]
    assert (u.dims, u.shape) == (("chain", "draw", "position", "embedding_dim"), (1, 50, 3, 1))
    for i in range(3):
        assert set(u.values[0, :, i, 0]) <= set(np.asarray(result.filtered)[i, :, 0])
        by_hand = np.log(token_probability(u.values[0, :, i, 0], TOKENS[i]))
        np.testing.assert_allclose(tree["log_likelihood/tokens"].values[0, :, i], by_hand, atol=1e-12)
    assert tree["log_likelihood/tokens"].dims == ("chain", "draw", "position")
    stats = tree["sample_stats"]
    assert stats["log_evidence"].item() == result.log_evidence
    np.testing.assert_array_equal(stats["log_weights"].values[0, 0], result.log_weights)
    for name in ("ess", "resampled", "unsolved", "distinct"):
        assert stats[name].dims == ("chain", "draw", "position")
        np.testing.assert_array_equal(stats[name].values[0, 0], getattr(result, name))
    np.testing.assert_array_equal(tree["observed_data/tokens"], TOKENS)
    assert (tree.attrs["seed"], tree.attrs["status"]) == ("6", "ok")
    assert tree.attrs["version"]
    assert "log p(embeddings, tokens)" in tree.attrs["objective"]


def test_ancestral_draws_take_paths_of_the_particles_by_their_weights():
    result = one_run()
    draws = result.to_datatree(draws=20_000, paths="ancestral")["posterior/embeddings"].values[0]
    paths = np.asarray(result.embeddings)
    taken = np.abs(draws[:, None] - paths).sum((-1, -2)).argmin(1)
    np.testing.assert_array_equal(draws, paths[taken])
    weights = np.exp(np.asarray(result.log_weights))
    # Paths that are equal throughout cannot be told apart, so their weights are added.
    same = (np.abs(paths[:, None] - paths).sum((-1, -2)) == 0) @ weights
    shares = np.bincount(taken, minlength=8) / 20_000
    for k in np.unique(taken):
        assert abs(shares[k] - same[k]) < 4.5 * np.sqrt(same[k] / 20_000)


def test_the_same_result_gives_the_same_draws_and_another_key_others():
    result = one_run()
    one, again, other = (
        result.to_datatree(draws=50, key=key)["posterior/embeddings"].values for key in (None, None, jax.random.key(1))
    )
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_past_the_boundary_draws_are_given_only_to_those_who_ask():
    status = ParticleStatus.PAST_BOUNDARY
    result = one_run(4.0, status)
    with pytest.raises(
        ValueError, match=r"status: past_boundary \(unsolved by position .*allow=\[ParticleStatus.PAST_BOUNDARY\]"
    ):
        result.to_datatree()
    tree = result.to_datatree(draws=50, allow=[status])
    assert tree.attrs["status"] == "past_boundary"
    assert tree["sample_stats/unsolved"].values.sum() == result.unsolved.sum() > 0


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (ParticleStatus.NOT_CONVERGED, r"status: not_converged.*use float64 or proposal='direct'"),
        (ParticleStatus.ALL_DIED, r"status: all_died.*use more particles"),
    ],
)
def test_particles_lost_or_dead_are_never_written(status, message):
    result = one_run()._replace(status=jnp.asarray(status))
    with pytest.raises(ValueError, match=message):
        result.to_datatree(allow=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: runs().to_datatree(), r"result: holds several runs, log_evidence has shape \(400,\)"),
        (lambda: runs().posterior, "result: holds several runs"),
        (lambda: runs().law, "result: holds several runs"),
        (lambda: smooth(jax.random.key(0), runs(), 3), "result: holds several runs"),
        (lambda: one_run().to_datatree(key=0, paths="ancestral"), "key: got 0; pass one JAX random key"),
        (lambda: smooth(jax.random.key(0), None, 3), "result: got NoneType; pass what particle_filter returned"),
        (lambda: one_run().to_datatree(paths="filtered"), "paths: got 'filtered'; pass one of smoothed, ancestral"),
        (lambda: one_run().to_datatree(draws=0), "draws: got 0"),
        (lambda: smooth(jax.random.key(0), one_run(), 0), "draws: got 0; pass an integer of at least 1"),
        (lambda: smooth(None, one_run(), 1), "key: got None"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()

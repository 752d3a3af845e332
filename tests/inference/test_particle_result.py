import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer.inference import ParticleStatus, load, save
from tests.support.small_models import TOKENS, filters, scalar, token_probability


def runs(a=-2.0, particles=8, proposal="direct"):
    return filters(scalar(a), jax.random.split(jax.random.key(6), 400), particles, proposal, 0.5)


def one_run(a=-2.0, status=ParticleStatus.OK):
    many = runs(a)
    chosen = int(np.argmax(np.asarray(many.status) == status))
    assert many.status[chosen] == status
    return jax.tree.map(lambda leaf: leaf[chosen], many)


@pytest.mark.parametrize("suffix", [".nc", ".zarr"])
@pytest.mark.parametrize("paths", ["smoothed", "ancestral"])
def test_the_tree_holds_draws_and_the_run_and_comes_back_from_a_file(tmp_path, suffix, paths):
    result = one_run()
    save(result.to_datatree(draws=50, paths=paths, seed=6), tmp_path / f"particles{suffix}")
    tree = load(tmp_path / f"particles{suffix}")
    u = tree["posterior/embeddings"]
    assert u.dims == ("chain", "draw", "position", "embedding_dim")
    assert u.shape == (1, 50, 3, 1)
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
    assert tree.attrs["seed"] == "6"
    assert tree.attrs["status"] == "ok"
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
    result = one_run(4.0, ParticleStatus.PAST_BOUNDARY)
    with pytest.raises(ValueError, match=r"status: past_boundary, unsolved by position .*allow_past_boundary=True"):
        result.to_datatree()
    tree = result.to_datatree(draws=50, allow_past_boundary=True)
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
        result.to_datatree(allow_past_boundary=True)


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match=r"result: holds several runs, log_evidence has shape \(400,\)"):
        runs().to_datatree()
    with pytest.raises(ValueError, match="paths: got 'filtered'; pass one of smoothed, ancestral"):
        one_run().to_datatree(paths="filtered")
    with pytest.raises(ValueError, match="draws: got 0"):
        one_run().to_datatree(draws=0)

import jax
import numpy as np
import pytest

from prob_transformer.inference import smooth
from tests.support.small_models import (
    assert_within_three_standard_errors,
    filters,
    scalar,
    scalar_density,
    scalar_truth,
)


def one_run(threshold=1.0):
    many = filters(scalar(-2.0), jax.random.split(jax.random.key(6), 400), 8, "direct", threshold)
    return jax.tree.map(lambda leaf: leaf[0], many)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_smoothing_draws_paths_with_the_backward_probabilities_written_by_hand(threshold):
    result = one_run(threshold)
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

    draws = np.asarray(smooth(result, jax.random.key(7), 20_000))[..., 0]
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
    u = np.asarray(jax.jit(jax.vmap(lambda result, key: smooth(result, key, 60)))(result, keys))[..., 0]
    for f, truth in ((u[..., 0], first), (u[..., 2], last), (u[..., 0] * u[..., 2], both)):
        assert_within_three_standard_errors(f.mean(-1), truth / evidence)
    # Draws of u_1 that share a value, as those of the genealogy do more often the older they are.
    distinct = np.array([np.unique(row).size for row in u[..., 0]])
    by_genealogy = 60 * np.asarray(result.distinct)[:, 0] / 1000
    assert (distinct > by_genealogy).mean() > 0.9


def test_bad_arguments_are_refused_by_name():
    result = one_run()
    with pytest.raises(ValueError, match="draws: got 0; pass an integer of at least 1"):
        smooth(result, jax.random.key(0), 0)
    with pytest.raises(ValueError, match="key: got None"):
        smooth(result, None, 1)

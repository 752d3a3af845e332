import numpy as np
import pytest
from scipy.stats import kstest

from prob_transformer.inference.calibration import ranks, uniformity

DRAWS, REPLICATES = 99, 2000


def normal_ranks(seed, shift=0.0, width=1.0):
    """theta ~ N(0, 1), y ~ N(theta, 1): the posterior is N(y / 2, 1 / 2), here moved and stretched."""
    rng = np.random.default_rng(seed)
    theta = rng.normal(size=REPLICATES)
    y = theta + rng.normal(size=REPLICATES)
    draws = (y / 2)[:, None] + np.sqrt(0.5) * (shift + width * rng.normal(size=(REPLICATES, DRAWS)))
    return ranks(theta, draws)


def test_the_exact_posterior_gives_uniform_ranks():
    p_values = [uniformity(normal_ranks(seed), DRAWS).p_value for seed in range(40)]
    assert kstest(p_values, "uniform").pvalue > 0.01
    found = uniformity(normal_ranks(0), DRAWS)
    assert (found.counts.sum(), len(found.counts)) == (REPLICATES, 20)
    many = [uniformity(normal_ranks(seed), DRAWS) for seed in range(40)]
    for values in ([one.shift for one in many], [one.width for one in many]):
        assert kstest(values, "norm").pvalue > 0.01


@pytest.mark.parametrize(
    ("wrong", "shift", "width"),
    [({"shift": 0.3}, -1, 0), ({"shift": -0.3}, 1, 0), ({"width": 0.8}, 0, 1), ({"width": 1.25}, 0, -1)],
)
def test_a_wrong_posterior_is_told_apart_and_how_it_is_wrong_is_named(wrong, shift, width):
    found = uniformity(normal_ranks(1, **wrong), DRAWS)
    assert found.p_value < 1e-4
    if shift:
        assert shift * found.shift > 5
    if width:
        assert width * found.width > 5
        assert abs(found.shift) < 4


def test_a_rank_is_the_number_of_draws_below_the_truth_for_every_coordinate():
    truths = np.array([[0.0, 1.0], [5.0, -5.0]])
    draws = np.array([[[-1.0, 0.0], [1.0, 0.5], [-2.0, 3.0]], [[1.0, 2.0], [3.0, 4.0], [6.0, 0.0]]])
    np.testing.assert_array_equal(ranks(truths, draws), [[2, 2], [2, 0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranks(np.zeros(3), np.zeros((2, 5))), r"draws: has shape \(2, 5\) for truths \(3,\)"),
        (lambda: ranks(np.zeros(3), np.zeros((3, 0))), r"draws: has shape \(3, 0\)"),
        (lambda: ranks(np.array([1 + 2j]), np.ones((1, 3))), "draws: truths or draws are complex"),
        (lambda: uniformity(np.zeros(200), 99), "found: has dtype float64; pass integers"),
        (lambda: ranks(np.zeros(1), np.full((1, 5), np.nan)), "draws: truths or draws hold NaN"),
        (lambda: uniformity(np.zeros(200, int), 99, 7), "bins: got 7 for 100 possible ranks"),
        (lambda: uniformity(np.zeros(99, int), 99), "at least 100 of them"),
        (lambda: uniformity(np.full(200, 100), 99), r"found: holds ranks outside 0\.\.99"),
        (lambda: uniformity(np.zeros(200, int), 0), "draws: got 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()

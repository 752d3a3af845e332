"""Integrals against closed forms, and the root counter against counting roots one by one."""

import numpy as np
import pytest
from scipy.stats import norm

from models.scalar import scalar_attention
from theory_checks.claims.normalisation import masses, next_residual
from theory_checks.truth.quadrature import expected_roots, expected_roots_plane, integrate


@pytest.mark.parametrize("dimension", [1, 2, 3])
def test_gaussian_integral_in_each_dimension(dimension):
    def density_and_moment(x):
        density = norm.pdf(x, 0.3, 0.7).prod(axis=1)
        return np.stack([density, x[:, 0] ** 2 * density], axis=1)

    mass, error, points = integrate(
        density_and_moment, [-7.0] * dimension, [7.0] * dimension, tolerance=1e-9, confirm=dimension < 3
    )
    np.testing.assert_allclose(mass, [1.0, 0.3**2 + 0.7**2], atol=1e-9)
    assert error.max() < 1e-9
    assert points > 0


def test_estimated_error_covers_the_true_one_where_the_integrand_has_a_kink():
    value, error, _ = integrate(lambda x: np.abs(x - 0.123)[:, 0], -1.0, 1.0, tolerance=1e-11)
    exact = (1.123**2 + 0.877**2) / 2
    assert abs(value[0] - exact) <= error[0] + 1e-15
    assert error[0] <= 1e-11


@pytest.mark.parametrize(("kink", "unconfirmed_misses_it"), [(0.2505, True), (-0.2365, False)])
def test_kink_that_the_rules_miss_at_one_of_the_two_cuts_shows_in_the_error(kink, unconfirmed_misses_it):
    def kinked(x):
        return np.abs(x - kink)[:, 0]

    exact = ((1 + kink) ** 2 + (1 - kink) ** 2) / 2
    unconfirmed, confirmed = (integrate(kinked, -1.0, 1.0, tolerance=1e-11, confirm=flag) for flag in (False, True))
    assert (abs(unconfirmed.value[0] - exact) > unconfirmed.error[0]) == unconfirmed_misses_it
    assert abs(confirmed.value[0] - exact) <= confirmed.error[0]


def test_budget_too_small_shows_in_the_error_rather_than_silently():
    value, error, points = integrate(
        lambda x: np.sign(x - 0.123).prod(axis=1), [-1.0, -1.0], [1.0, 1.0], tolerance=1e-8, max_subdivisions=60
    )
    assert points < 300_000
    assert error[0] > 1e-8
    assert abs(value[0] - 0.246**2) <= error[0]


def test_every_call_has_the_same_number_of_points():
    sizes = set()

    def counted(x):
        sizes.add(x.shape)
        return np.abs(x[:, 0] - 0.2)

    integrate(counted, -1.0, 1.0)
    assert len(sizes) == 1


@pytest.mark.parametrize(("lower", "upper"), [(1.0, 1.0), (1.0, 0.0), (0.0, np.inf), (np.nan, 1.0), ([0.0, 0.0], 1.0)])
def test_empty_or_infinite_box_is_refused(lower, upper):
    with pytest.raises(ValueError, match="finite box"):
        integrate(lambda x: x, lower, upper)


def test_mass_without_attention_is_one():
    (mass, signed), _, _ = masses(scalar_attention(0.0), [[-1.0], [1.0], [0.3]], 0.5)
    assert mass == pytest.approx(1.0, abs=1e-10)
    assert signed == pytest.approx(1.0, abs=1e-10)


# u^3 - 3 u turns at (-1, 2) and (1, -2): three roots for |eps| < 2, one beyond.
ROOTS_OF_THE_CUBIC = 1 + 2 * (norm.cdf(2.0) - norm.cdf(-2.0))


@pytest.mark.parametrize(
    ("residual", "expected", "tolerance"),
    [(lambda u: u + 0.3 * np.tanh(u), 1.0, 1e-12), (lambda u: u**3 - 3 * u, ROOTS_OF_THE_CUBIC, 1e-9)],
)
def test_monotone_and_cubic_residuals_have_the_roots_of_their_closed_forms(residual, expected, tolerance):
    assert expected_roots(residual, 1.0, -10.0, 10.0) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("strength", [1.5, 4.0])
def test_expected_roots_against_counting_sign_changes(strength):
    scale = 0.5

    def residual(u):
        return next_residual(scalar_attention(strength), np.array([[-1.0], [1.0], [0.3]]), u[:, None])[:, 0]

    values = residual(np.linspace(-6.0, 6.0, 40_001))
    noise = norm.ppf((np.arange(2000) + 0.5) / 2000, scale=scale)
    brute_force = np.mean([np.count_nonzero(np.diff(np.sign(values - eps))) for eps in noise])
    counted = expected_roots(residual, scale, -6.0, 6.0)
    assert counted == pytest.approx(brute_force, abs=2e-3)


# The second is the first after a quarter turn: the count does not depend on the frame.
@pytest.mark.parametrize(("across", "sign"), [(0, 1), (1, -1)])
def test_roots_in_the_plane_of_a_folded_product_which_may_be_turned(across, sign):
    # (u^3 - 3 u, v): three roots wherever the first coordinate of the noise is within 2, as on the line.
    def folded(u):
        parts = [u[:, 0] ** 3 - 3 * u[:, 0], sign * u[:, 1]]
        return np.stack([parts[across], parts[1 - across]], axis=1)

    value, error, degree = expected_roots_plane(folded, 1.0, [-4.0, -8.0], [4.0, 8.0])
    assert value == pytest.approx(ROOTS_OF_THE_CUBIC, abs=1e-5)
    assert abs(value - ROOTS_OF_THE_CUBIC) <= error
    assert degree == pytest.approx(1.0, abs=1e-8)

"""Examples against sentences that said more than the theory proves; docs/changes.md lists the sentences."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm
from scipy.optimize import minimize_scalar
from scipy.stats import special_ortho_group

from prob_transformer import (
    Attention,
    CausalAttentionTransform,
    LinearDecoder,
    attention_mean,
    barrier,
    jacobian_block,
    map_objective,
    residual_and_log_det,
    stability_margin,
    weight_prior,
)
from theory_checks.claims.change_of_variables import dense_residual
from theory_checks.claims.normalisation import interaction_attention, scalar_attention

PAST = np.array([-1.0, 1.0, 0.3])


def last_block(attention, past, u):
    return np.asarray(jacobian_block(attention, np.concatenate([past, np.atleast_2d(u)]))[-1])


def singular_values(block):
    return np.linalg.svd(block, compute_uv=False)


def without_interaction(gain):
    """Attention with A = 0 and the value map `gain`, d = 1: every mu_i is `gain` times the plain mean of the past."""
    return Attention(*(jnp.full((1, 1, 1), entry) for entry in (0.0, 1.0, gain)))


# 1. Direction


@pytest.mark.parametrize("gap", [1e-2, 1e-5, 1e-8])
def test_noise_is_amplified_without_limit_at_the_boundary_and_the_attended_mean_is_not(gap):
    block = last_block(scalar_attention(1 - gap), np.array([[-1.0], [1.0]]), [0.0])
    np.testing.assert_allclose(1 / singular_values(block)[-1], 1 / gap, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(np.eye(1) - block, 2), 1 - gap, rtol=1e-6)


def test_a_large_determinant_needs_a_large_sensitivity_to_the_query():
    # log|det(I - M)| <= d log(1 + |M|): the +19 nats of a two-sided barrier take |M| >= exp(19 / d) - 1.
    past = np.concatenate([np.eye(4), -np.eye(4)])
    block = last_block(interaction_attention(-4 * np.expm1(19 / 4) * np.eye(4)), past, np.zeros(4))
    np.testing.assert_allclose(np.linalg.slogdet(block)[1], 19, rtol=1e-12)
    np.testing.assert_allclose(np.linalg.norm(np.eye(4) - block, 2), np.expm1(19 / 4), rtol=1e-12)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        block = last_block(interaction_attention(10 * rng.normal(size=(3, 3))), rng.normal(size=(4, 3)), np.zeros(3))
        assert np.linalg.slogdet(block)[1] <= 3 * np.log1p(np.linalg.norm(np.eye(3) - block, 2)) + 1e-12


def test_the_rank_bounds_the_determinant_closer_than_the_width():
    # One head of size 1 in d = 4: J = I - M has one singular value of M at most, so |det J| <= 1 + |M|.
    past = np.concatenate([np.eye(4), -np.eye(4)])
    x = np.array([0.5, 0.5, 0.5, 0.5])
    block = last_block(interaction_attention(-4 * np.expm1(19.0) * np.outer(x, x)), past, np.zeros(4))
    np.testing.assert_allclose(np.linalg.slogdet(block)[1], 19, rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(np.eye(4) - block, 2), np.expm1(19.0), rtol=1e-9)
    np.testing.assert_allclose(np.expm1(19 / 16), 2.28, atol=5e-3)


@pytest.mark.parametrize("t", [10.0, 1000.0])
def test_a_barrier_on_both_sides_bounds_no_sensitivity(t):
    past = np.concatenate([np.eye(2), -np.eye(2)])
    step = np.array([[0.0, 1.0], [0.0, 0.0]])
    for interaction, barriers in ((2 * t * step, 0.0), (2 * t * (step - step.T), -2 * np.log1p(t**2))):
        block = last_block(interaction_attention(interaction), past, np.zeros(2))
        means = np.eye(2) - block
        both = -np.linalg.slogdet(block)[1] - np.linalg.slogdet(np.eye(2) + means)[1]
        np.testing.assert_allclose(both, barriers, atol=1e-9)
        np.testing.assert_allclose(np.linalg.norm(means, 2), t, rtol=1e-9)
        assert singular_values(block)[-1] < 1.1 * max(1 / t, t * (barriers < 0))


# 2. Positions and the sequence


def test_every_position_is_perfectly_conditioned_and_the_sequence_is_not():
    attention, embeddings = without_interaction(3.0), np.linspace(-1, 1, 64)[:, None]
    np.testing.assert_array_equal(stability_margin(attention, embeddings, "conditioning"), 1)
    np.testing.assert_array_equal(stability_margin(attention, embeddings), 1)
    # What a change of all noise does to all embeddings, and a change of all inputs to input plus attended mean.
    means = np.asarray(jax.jacobian(lambda u: attention_mean(attention, u)[:, 0])(jnp.asarray(embeddings)))[..., 0]
    np.testing.assert_allclose(np.linalg.norm(np.linalg.inv(np.eye(64) - means), 2), 7900.918, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(np.eye(64) + means, 2), 5.5655, rtol=1e-4)


# 3. Determinant and conditioning


@pytest.mark.parametrize("k", [10.0, 1000.0])
def test_a_determinant_of_one_with_a_conditioning_margin_of_one_over_k(k):
    past = np.concatenate([np.eye(2), -np.eye(2)])
    embeddings = np.concatenate([past, np.zeros((1, 2))])
    attention = interaction_attention(2 * np.diag([1 - 1 / k, 1 - k]))
    np.testing.assert_allclose(stability_margin(attention, embeddings)[-1], 1, rtol=1e-9)
    np.testing.assert_allclose(stability_margin(attention, embeddings, "conditioning")[-1], 1 / k, rtol=1e-9)


@pytest.mark.parametrize("t", [10.0, 1000.0])
def test_inside_the_safe_region_the_conditioning_margin_has_no_bound(t):
    # A + A^T = 0, so det J >= 1 for every u: here J = [[1, -t], [0, 1]].
    attention = interaction_attention(t * np.array([[0.0, 1.0], [-1.0, 0.0]]))
    embeddings = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(stability_margin(attention, embeddings)[-1], 1, rtol=1e-12)
    assert stability_margin(attention, embeddings, "conditioning")[-1] < 1 / t


# 4. Certificates


@pytest.mark.parametrize("seed", range(5))
def test_some_processes_with_value_maps_are_laws(seed):
    # V = -A^T: J = I + A^T Sigma A, whatever the past and u.
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, 1, 3, 3))
    attention = Attention(query, key, -(query.mT @ key) / np.sqrt(3))
    for scale in (0.1, 1.0, 10.0):
        past, u = scale * rng.normal(size=(6, 3)), scale * rng.normal(size=3)
        block = last_block(attention, past, u)
        np.testing.assert_allclose(block, block.T, atol=1e-9 * np.abs(block).max())
        assert np.linalg.eigvalsh(block)[0] >= 1 - 1e-9 * np.abs(block).max()


# 5. Self-inclusion


def self_inclusive_masses(a, reach):
    """Mass and signed mass of position 4 after PAST, itself included, and its smallest de/du, by autodiff."""

    def residual(u):
        embeddings = jnp.append(jnp.asarray(PAST), u)[:, None]
        return dense_residual(jnp.reshape(a, (1, 1, 1)), jnp.ones((1, 1, 1)), None, embeddings, offset=0)[-1, 0]

    grid = jnp.linspace(-reach, reach, 400_001)
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(residual)))(grid)
    density = norm.pdf(values, 0, 0.5)
    return np.trapezoid(density * jnp.abs(slopes), grid), np.trapezoid(density * slopes, grid), slopes.min()


@pytest.mark.parametrize("a", [-3.0, -1.0, -0.2])
def test_the_position_itself_included_a_repelling_interaction_is_a_law(a):
    mass, signed, smallest = self_inclusive_masses(a, 12.0)
    np.testing.assert_allclose([mass, signed], 1, atol=1e-9)
    assert smallest > 0.85


@pytest.mark.parametrize("a", [0.5, 2.0])
def test_the_position_itself_included_an_attracting_interaction_has_signed_mass_zero(a):
    # e(u) tends to 0 in both directions: the map is not proper, and the degree argument does not apply.
    mass, signed, smallest = self_inclusive_masses(a, 40.0)
    np.testing.assert_allclose(signed, 0, atol=1e-6)
    assert mass > 0.5
    assert smallest < 0


# 6. Boundedness


def test_the_margin_objective_is_unbounded_although_no_embedding_is_zero():
    rng = np.random.default_rng(0)
    embeddings, tokens = rng.normal(size=(6, 2)), rng.integers(0, 4, 6)
    across, x = np.array([-embeddings[-1, 1], embeddings[-1, 0]]), rng.normal(size=2)
    decoder = LinearDecoder(jnp.asarray(rng.normal(size=(4, 2))), jnp.zeros(4))
    strengths = np.array([1e6, 1e9, 1e12])

    def objective(t):
        attention = interaction_attention(t * np.outer(x, across))
        return float(map_objective(attention, decoder, embeddings, tokens, objective="margin", barrier_weight=1.0))

    slopes = np.diff([objective(t) for t in strengths]) / np.diff(np.log(strengths))
    # Weights at the last position stay uniform; A has rank 1.
    np.testing.assert_allclose(slopes, -1, atol=1e-5)


def test_the_margin_objective_is_bounded_where_no_query_can_vanish():
    # d = 1 and u = 0.5 after (-1, 1): weights leave the uniform ones as |a| grows, so |a Var| has a largest value.
    past, u, strengths = np.array([-1.0, 1.0]), 0.5, np.linspace(-200, 200, 400_001)
    weights = 1 / (1 + np.exp(np.clip(2 * strengths * u, -700, 700)))
    moved = np.abs(strengths * 4 * weights * (1 - weights))
    assert moved.max() < 0.9
    assert moved[[0, -1]].max() < 1e-30
    block = last_block(scalar_attention(2.0), past[:, None], [u])
    np.testing.assert_allclose(1 - block[0, 0], 2 * 4 / (1 + np.exp(2.0)) / (1 + np.exp(-2.0)), rtol=1e-12)


def full_objective_bound(squared_norms, length, width, *, prior_scale, noise_scale):
    """Lower bound of the full objective without its constants at |W_Q|^2 + |W_K|^2 = x and sum |e_i|^2 = r, [x, r].

    |u_i| <= sum_j |e_j| <= sqrt(n r), so the past has diameter at most 2 sqrt(n r), and |M_i| <= x n r / (2 sqrt(p)).
    """
    x, r = squared_norms
    barriers = (length - 2) * width * np.log1p(x * length * r / (2 * np.sqrt(width)))
    return x / (2 * prior_scale**2) + r / (2 * noise_scale**2) - barriers


@pytest.mark.parametrize("seed", range(20))
def test_the_full_objective_with_a_weight_prior_is_bounded_below_embeddings_free(seed):
    rng = np.random.default_rng(seed)
    length, width = 6, 2
    embeddings = 10 ** rng.uniform(-2, 4) * rng.normal(size=(length, width))
    query, key = 10 ** rng.uniform(-2, 3) * rng.normal(size=(2, 1, width, width))
    attention = Attention(jnp.asarray(query), jnp.asarray(key))
    noise = np.linalg.norm(residual_and_log_det(attention, embeddings).residual, axis=-1)
    assert (np.linalg.norm(embeddings, axis=-1) <= np.cumsum(noise) * (1 + 1e-12)).all()
    silent = LinearDecoder(jnp.zeros((4, width)), jnp.zeros(4))
    zero = Attention(0 * attention.query, 0 * attention.key)
    value, at_zero = (
        map_objective(each, silent, points, np.zeros(length, int), objective="full") + weight_prior(each, 1.5)
        for each, points in ((attention, embeddings), (zero, np.zeros((length, width))))
    )
    sizes = np.array([np.square(query).sum() + np.square(key).sum(), np.square(noise).sum()])
    bound = full_objective_bound(sizes, length, width, prior_scale=1.5, noise_scale=1.0)
    assert value - at_zero >= bound - 1e-9 * abs(bound)


def test_that_bound_is_finite():
    grid = np.meshgrid(np.logspace(-6, 9, 400), np.logspace(-6, 9, 400))
    bound = full_objective_bound(grid, 6, 2, prior_scale=1.5, noise_scale=1.0)
    least = np.unravel_index(bound.argmin(), bound.shape)
    assert all(0 < index < 399 for index in least)


# 7. What fails past the boundary is the formula


def test_a_chosen_root_defines_a_law_where_the_formula_has_mass_above_one():
    # a = 4 after PAST: the smallest root of e(u) = eps is a function of eps, so its law has mass 1.
    grid = jnp.linspace(-6, 6, 240_001)
    embeddings = jax.vmap(lambda u: jnp.append(jnp.asarray(PAST), u)[:, None])(grid)
    residual, _, log_det = (x[:, -1] for x in residual_and_log_det(scalar_attention(4.0), embeddings))
    density = np.asarray(norm.pdf(residual[:, 0], 0, 0.5) * jnp.exp(log_det))
    np.testing.assert_allclose(np.trapezoid(density, grid), 2.1239, atol=1e-4)
    # The smallest root is where e is above all its values to the left.
    first = np.asarray(residual[:, 0]) >= np.maximum.accumulate(np.asarray(residual[:, 0]))
    np.testing.assert_allclose(np.trapezoid(density * first, grid), 1, atol=1e-4)


# 8. Coordinates


@pytest.mark.slow
def test_in_noise_coordinates_the_joint_density_of_embeddings_has_no_barrier():
    rng = np.random.default_rng(0)
    basis = special_ortho_group.rvs(2, random_state=0)
    transform = CausalAttentionTransform(interaction_attention(-basis @ np.diag([0.5, 2.0]) @ basis.T))
    noise = jnp.asarray(rng.normal(size=(5, 2)))
    embeddings = transform(noise)
    log_prob = norm.logpdf(noise).sum() + residual_and_log_det(transform.attention, embeddings).log_det.sum()
    assert abs(residual_and_log_det(transform.attention, embeddings).log_det.sum()) > 0.1
    # The density of the noise is p(u) |du/deps|, whose factor cancels the determinants.
    in_noise = log_prob + np.linalg.slogdet(np.asarray(jax.jacfwd(transform)(noise)).reshape(10, 10))[1]
    np.testing.assert_allclose(in_noise, norm.logpdf(noise).sum(), rtol=1e-9)


# 10. Missing hypotheses, and the barrier as a factor (section 11 of the mathematics)


def test_without_strict_complementarity_a_support_token_has_multiplier_zero():
    # min (a - 1)^2 / 2 with the wall exactly at a = 1: m = sqrt(lambda), and lambda / m = sqrt(lambda) tends to 0.
    embeddings = jnp.array([[-1.0], [1.0], [0.0]])
    weights = np.array([1e-2, 1e-4, 1e-6])
    multipliers = []
    for weight in weights:
        objective = jax.jit(lambda a, w=weight: 0.5 * (a - 1) ** 2 + w * barrier(scalar_attention(a), embeddings).sum())
        found = minimize_scalar(objective, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-10})
        multipliers.append(weight / float(stability_margin(scalar_attention(found.x), embeddings)[-1]))
    np.testing.assert_allclose(multipliers, np.sqrt(weights), rtol=1e-3)


def test_tokens_tilted_by_the_barrier_do_not_sum_to_one():
    # Embeddings in a table, tokens uniform: sum over x of p(x) prod_i |det J_i(x)| is not 1, and depends on the length.
    table = jnp.array([[-1.0], [1.0], [0.3]])

    def total(length):
        sequences = np.array(list(itertools.product(range(3), repeat=length)))
        log_det = residual_and_log_det(scalar_attention(-1.5), table[sequences]).log_det.sum(-1)
        return float(jnp.exp(log_det).mean())

    np.testing.assert_allclose(total(2), 1, rtol=1e-12)
    assert total(3) > 1.1
    assert total(4) > 1.1 * total(3)

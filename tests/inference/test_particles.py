from functools import partial
from itertools import product

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import dense_map, dense_truth, draw
from scipy.integrate import quad
from scipy.special import softmax
from scipy.stats import norm

from prob_transformer import Attention, LinearDecoder
from prob_transformer.inference import ParticleStatus, particle_filter, smooth
from prob_transformer.inference.resampling import effective_sample_size, systematic_resampling

TOKENS = np.array([0, 1, 0])
WEIGHT, BIAS = np.array([[1.5], [-1.0], [0.3]]), np.array([0.2, 0.0, -0.4])
NOISE_SCALE, FIRST_SCALE = 0.7, 1.2
SCALES = {"noise_scale": NOISE_SCALE, "first_scale": FIRST_SCALE}
PROPOSALS = ["process", "direct"]


def scalar(a, value=1.0):
    """d = 1, one head; the value map is an array always, so that all cases share one compilation."""
    return Attention(jnp.asarray(a, float).reshape(1, 1, 1), jnp.ones((1, 1, 1)), jnp.full((1, 1, 1), value))


@partial(jax.jit, static_argnums=(2, 3))
def filters(attention, keys, particles, proposal, threshold=0.5):
    decoder = LinearDecoder(WEIGHT, BIAS)
    options = {"threshold": threshold, "proposal": proposal, **SCALES}
    return jax.vmap(lambda key: particle_filter(attention, decoder, TOKENS, key, particles, **options))(keys)


def token_probability(u, token):
    return softmax(u[..., None] * WEIGHT[:, 0] + BIAS, axis=-1)[..., token]


def scalar_truth(a):
    """Mass, evidence, and the integrals of u_1, u_3 and u_1 u_3 times p(u, x), by the trapezoidal rule in closed form.

    The integrand vanishes at both ends, where that rule converges geometrically.
    """
    grid = np.linspace(-9.0, 9.0, 121)
    u1, u2, u3 = np.meshgrid(grid, grid, grid, indexing="ij", sparse=True)
    share = 1 / (1 + np.exp(-a * u3 * (u1 - u2)))
    determinant = 1 - a * share * (1 - share) * (u1 - u2) ** 2
    density = norm.pdf(u1, 0, FIRST_SCALE) * norm.pdf(u2 - u1, 0, NOISE_SCALE) * np.abs(determinant)
    density = density * norm.pdf(u3 - share * u1 - (1 - share) * u2, 0, NOISE_SCALE)
    joint = density * np.prod(np.broadcast_arrays(*map(token_probability, (u1, u2, u3), TOKENS)), axis=0)
    cell = (grid[1] - grid[0]) ** 3
    return density.sum() * cell, *((joint * f).sum() * cell for f in (1.0, u1, u3, u1 * u3))


def assert_within_three_standard_errors(samples, truth):
    assert abs(samples.mean() - truth) < 3 * samples.std(ddof=1) / np.sqrt(samples.size)


def assert_unnormalised_moments(result, evidence, first, last, both):
    """Z and Z sum_k W^k f(u^k) are unbiased for any number of particles, so a mean over keys has no bias to hide."""
    evidences = np.exp(np.asarray(result.log_evidence))
    weights, u = np.exp(np.asarray(result.log_weights)), np.asarray(result.embeddings)[..., 0]
    assert_within_three_standard_errors(evidences, evidence)
    for f, truth in ((u[..., 0], first), (u[..., 2], last), (u[..., 0] * u[..., 2], both)):
        assert_within_three_standard_errors(evidences * (weights * f).sum(-1), truth)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize(("a", "threshold"), [(-2.0, 0.5), (-2.0, 1.0), (0.1, 0.0)])
def test_evidence_and_moments_are_unbiased_with_eight_particles(proposal, a, threshold):
    mass, evidence, *moments = scalar_truth(a)
    assert abs(mass - 1) < 1e-7
    result = filters(scalar(a), jax.random.split(jax.random.key(1), 400), 8, proposal, threshold)
    assert (result.status == ParticleStatus.OK).all()
    assert not result.unsolved.any()
    assert_unnormalised_moments(result, evidence, *moments)
    # The log is biased downwards (Jensen), visibly with so few particles: what is unbiased is the evidence.
    log_ratio = np.asarray(result.log_evidence) - np.log(evidence)
    assert log_ratio.mean() < -3 * log_ratio.std(ddof=1) / np.sqrt(400)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_independent_gaussians_give_the_product_of_one_dimensional_integrals(proposal):
    def moment(position, power):
        scale = FIRST_SCALE if position == 0 else NOISE_SCALE

        def integrand(u):
            return u**power * norm.pdf(u, 0, scale) * token_probability(np.asarray(u), TOKENS[position])

        return quad(integrand, -12, 12, epsabs=1e-12)[0]

    evidences = [moment(i, 0) for i in range(3)]
    result = filters(scalar(0.0, value=0.0), jax.random.split(jax.random.key(2), 16), 1000, proposal)
    assert_within_three_standard_errors(np.asarray(result.log_evidence), np.log(evidences).sum())
    weights = np.exp(np.asarray(result.log_weights))[..., None]
    means = (weights * np.asarray(result.embeddings)[..., 0]).sum(1)
    for i in range(3):
        assert_within_three_standard_errors(means[:, i], moment(i, 1) / evidences[i])


def test_past_the_boundary_the_direct_proposal_targets_the_density_and_the_status_says_so():
    mass, evidence, *moments = scalar_truth(4.0)
    assert mass > 1.02
    keys = jax.random.split(jax.random.key(3), 400)
    assert_unnormalised_moments(filters(scalar(4.0), keys, 8, "direct"), evidence, *moments)
    # What is reported is the number of particles whose det J, written by hand, is not positive.
    unresampled = filters(scalar(4.0), keys, 8, "direct", 0.0)
    u1, u2, u3 = np.moveaxis(np.asarray(unresampled.embeddings)[..., 0], -1, 0)
    share = 1 / (1 + np.exp(-4 * u3 * (u1 - u2)))
    crossed = (4 * share * (1 - share) * (u1 - u2) ** 2 >= 1).sum(-1)
    np.testing.assert_array_equal(unresampled.unsolved, np.stack([0 * crossed, 0 * crossed, crossed], -1))
    np.testing.assert_array_equal(
        unresampled.status, np.where(crossed > 0, ParticleStatus.PAST_BOUNDARY, ParticleStatus.OK)
    )
    assert 0 < (crossed > 0).mean() < 1


def test_past_the_boundary_the_process_proposal_reports_it_and_drops_lost_particles():
    result = filters(scalar(4.0), jax.random.split(jax.random.key(3), 400), 8, "process", 0.0)
    status, unsolved = np.asarray(result.status), np.asarray(result.unsolved)
    dead = np.isneginf(np.asarray(result.log_weights)).sum(-1)
    assert set(status) == {ParticleStatus.OK, ParticleStatus.PAST_BOUNDARY, ParticleStatus.NOT_CONVERGED}
    np.testing.assert_array_equal(unsolved[:, :2], 0)
    np.testing.assert_array_equal(status == ParticleStatus.OK, unsolved[:, 2] == 0)
    np.testing.assert_array_equal(status == ParticleStatus.NOT_CONVERGED, dead > 0)
    assert (dead <= unsolved[:, 2]).all()
    # Its law is not the density: the evidence is off by more than chance.
    ratio = np.exp(np.asarray(result.log_evidence)) / scalar_truth(4.0)[1]
    assert ratio.mean() + 3 * ratio.std(ddof=1) / 20 < 1
    assert np.isfinite(np.asarray(result.embeddings)).all()


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_in_two_dimensions_against_gauss_hermite(proposal):
    # n = 2: u_2 = sum_h V_h u_1 + noise, four Gaussian dimensions.
    query, key, value, _ = draw(0, (2, 2, 2, 2, True))
    rng = np.random.default_rng(1)
    decoder = LinearDecoder(rng.normal(size=(3, 2)), rng.normal(size=3))
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    plane, mass = np.array(list(product(nodes, nodes))), np.outer(weights, weights).ravel() / (2 * np.pi)
    first = FIRST_SCALE * plane
    second = (first @ value.sum(0).T)[:, None] + NOISE_SCALE * plane
    probability = [softmax(u @ decoder.weight.T + decoder.bias, axis=-1) for u in (first, second)]
    evidence = (mass * probability[0][:, 2]) @ probability[1][:, :, 0] @ mass

    attention, tokens = Attention(query, key, value), np.array([2, 0])
    run = jax.jit(
        jax.vmap(lambda key: particle_filter(attention, decoder, tokens, key, 100, proposal=proposal, **SCALES))
    )
    result = run(jax.random.split(jax.random.key(4), 64))
    assert_within_three_standard_errors(np.exp(np.asarray(result.log_evidence)), evidence)


def test_resampling_moves_caches_and_paths_together():
    # With hardly any noise every path must satisfy u_i = mu_i(u_i; its own past).
    query, key, value, _ = draw(3, (2, 2, 3, 5, True), scale=0.3)
    decoder = LinearDecoder(2.0 * np.random.default_rng(0).normal(size=(4, 3)), np.zeros(4))
    options = {"noise_scale": 1e-7, "threshold": 1.0}
    result = particle_filter(
        Attention(query, key, value), decoder, np.array([0, 1, 2, 3, 0]), jax.random.key(0), 40, **options
    )
    residual = jax.vmap(lambda u: dense_map(query, key, value, u))(result.embeddings)
    assert np.abs(residual[:, 1:]).max() < 1e-6
    # And the genealogy is theirs: tracing the ancestors back through the particles as they were gives the paths.
    indices = np.arange(40)
    alive_through = []
    for i in range(4, -1, -1):
        np.testing.assert_array_equal(result.embeddings[:, i], result.filtered[i, indices])
        alive_through.append(np.unique(indices).size)
        indices = np.asarray(result.ancestors)[i, indices]
    np.testing.assert_array_equal(result.distinct, alive_through[::-1])
    assert result.distinct[0] < result.distinct[-1] == 40


@pytest.mark.parametrize("threshold", [0.0, 0.55, 1.0])
def test_resampling_is_triggered_by_the_effective_sample_size(threshold):
    result = filters(scalar(-2.0), jax.random.split(jax.random.key(5), 400), 8, "direct", threshold)
    weights = np.exp(np.asarray(result.filtered_log_weights))
    np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-12)
    np.testing.assert_allclose(result.ess, 1 / (weights**2).sum(-1), rtol=1e-10)
    resampled = np.asarray(result.resampled)
    assert not resampled[:, 0].any()
    np.testing.assert_array_equal(resampled[:, 1:], np.asarray(result.ess)[:, :-1] <= threshold * 8)
    assert resampled[:, 1:].mean() in (0.0, 1.0) or threshold == 0.55
    if threshold == 0.55:
        assert 0 < resampled[:, 1:].mean() < 1
    kept = ~resampled
    assert (np.asarray(result.ancestors)[kept] == np.arange(8)).all()


def test_systematic_resampling_rounds_the_expected_count_up_or_down_and_is_unbiased():
    weights = np.array([0.0, 0.31, 0.02, 0.17, 0.0, 0.4, 0.1, 0.0])
    indices = jax.vmap(lambda key: systematic_resampling(key, jnp.asarray(weights)))(
        jax.random.split(jax.random.key(0), 4000)
    )
    counts = (np.asarray(indices)[:, :, None] == np.arange(8)).sum(1)
    assert (counts >= np.floor(8 * weights)).all()
    assert (counts <= np.ceil(8 * weights)).all()
    # A count takes two neighbouring values, so its standard deviation is at most 1/2.
    np.testing.assert_allclose(counts.mean(0), 8 * weights, atol=4 * 0.5 / np.sqrt(4000))


@pytest.mark.parametrize(
    ("weights", "size"), [([0.25] * 4, 4.0), ([0, 1, 0, 0], 1.0), ([0, 0, 0, 0], 0.0), ([0.5, 0.5, 0, 0], 2.0)]
)
def test_effective_sample_size_of_known_weights(weights, size):
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(effective_sample_size(jnp.asarray(np.log(weights))), size, rtol=1e-12)


def test_an_impossible_token_kills_all_and_an_improbable_one_does_not():
    attention = scalar(-2.0)
    tokens = np.array([0, 1, 0])

    def forbids(embeddings):
        logits = embeddings @ WEIGHT.T + BIAS
        return logits.at[:, 1].set(-jnp.inf)

    result = particle_filter(attention, forbids, tokens, jax.random.key(0), 8, proposal="direct")
    assert result.status == ParticleStatus.ALL_DIED
    assert result.log_evidence == -np.inf
    assert np.isneginf(np.asarray(result.log_weights)).all()
    np.testing.assert_array_equal(np.asarray(result.ess) > 0, [True, False, False])
    np.testing.assert_array_equal(result.distinct, 0)
    np.testing.assert_array_equal(result.unsolved, 0)
    with pytest.raises(ValueError, match="result: has status ALL_DIED"):
        smooth(result, jax.random.key(0), 2)

    # exp(-5000) is 0 in any floating-point format; its logarithm is as good a weight as any.
    improbable = LinearDecoder(np.zeros((2, 1)), np.array([0.0, -5000.0]))
    result = particle_filter(attention, improbable, tokens, jax.random.key(0), 8, proposal="direct", threshold=0.0)
    assert result.status == ParticleStatus.OK
    certain = particle_filter(
        attention, LinearDecoder(np.zeros((1, 1)), np.zeros(1)), 0 * tokens, jax.random.key(0), 8,
        proposal="direct", threshold=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(result.log_evidence, certain.log_evidence - 5000.0, rtol=1e-12)


def test_a_decoder_that_gives_nan_is_reported_and_its_particles_are_not_counted():
    def breaks(embeddings):
        return jnp.where(embeddings > 0, jnp.nan, jnp.zeros((1, 2)))

    tokens = np.array([0, 1])
    result = particle_filter(scalar(-2.0), breaks, tokens, jax.random.key(0), 16, proposal="direct", threshold=0.0)
    assert result.status == ParticleStatus.NOT_CONVERGED
    first, second = np.asarray(result.embeddings)[:, 0, 0] > 0, np.asarray(result.embeddings)[:, 1, 0] > 0
    np.testing.assert_array_equal(result.unsolved, [first.sum(), (second & ~first).sum()])
    np.testing.assert_array_equal(np.isneginf(np.asarray(result.log_weights)), first | second)
    assert np.isfinite(result.log_evidence)


def test_smoothing_draws_paths_with_the_backward_probabilities_written_by_hand():
    query, key, value, _ = draw(0, (2, 2, 2, 3, True))
    decoder = LinearDecoder(np.random.default_rng(0).normal(size=(3, 2)), np.zeros(3))
    attention = Attention(query, key, value)
    result = particle_filter(
        attention, decoder, TOKENS, jax.random.key(6), 3, proposal="direct", threshold=1.0, **SCALES
    )
    weights, particles = np.exp(np.asarray(result.filtered_log_weights)), np.asarray(result.filtered)
    ancestors = np.asarray(result.ancestors)

    def future_density(position, k, future):
        """p(future | path of particle k up to position), by autodiff and SciPy."""
        past = []
        for i in range(position, -1, -1):
            past.insert(0, particles[i, k])
            k = ancestors[i, k]
        residual, blocks, _ = dense_truth(query, key, value, jnp.asarray(np.array(past + future)))
        density = norm.pdf(residual[position + 1 :], 0, NOISE_SCALE).prod()
        return density * np.abs(np.linalg.det(blocks[position + 1 :])).prod()

    expected = {}
    for last in range(3):
        future = [particles[2, last]]
        middle_law = np.array([weights[1, k] * future_density(1, k, future) for k in range(3)])
        for middle in range(3):
            longer = [particles[1, middle], *future]
            first_law = np.array([weights[0, k] * future_density(0, k, longer) for k in range(3)])
            for first in range(3):
                law = (weights[2], middle_law, first_law)
                expected[first, middle, last] = np.prod(
                    [p[k] / p.sum() for p, k in zip(law, (last, middle, first), strict=True)]
                )

    draws = np.asarray(smooth(result, jax.random.key(7), 4000))
    found = [np.abs(draws[:, i, None] - particles[i]).sum(-1).argmin(1) for i in range(3)]
    for i in range(3):
        np.testing.assert_array_equal(draws[:, i], particles[i, found[i]])
    for path, probability in expected.items():
        share = np.mean([f == k for f, k in zip(found, path, strict=True)], axis=0) == 1
        error = np.sqrt(probability * (1 - probability) / 4000)
        assert abs(share.mean() - probability) < 4 * error + 1e-3, path


def test_smoothed_paths_have_the_posterior_mean_and_more_ancestors_than_the_genealogy():
    _, evidence, first, last, both = scalar_truth(-2.0)
    result = filters(scalar(-2.0), jax.random.split(jax.random.key(8), 16), 1000, "direct", 1.0)
    keys = jax.random.split(jax.random.key(9), 16)
    u = np.asarray(jax.jit(jax.vmap(lambda result, key: smooth(result, key, 60)))(result, keys))[..., 0]
    for f, truth in ((u[..., 0], first), (u[..., 2], last), (u[..., 0] * u[..., 2], both)):
        assert_within_three_standard_errors(f.mean(-1), truth / evidence)


def test_float32_stays_float32_and_agrees():
    keys = jax.random.split(jax.random.key(1), 400)
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), scalar(-2.0))
    result = filters(single, keys, 8, "direct")
    assert {leaf.dtype for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.floating)} == {
        jnp.dtype("float32")
    }
    assert_unnormalised_moments(result, *scalar_truth(-2.0)[1:])
    solved = particle_filter(single, LinearDecoder(WEIGHT, BIAS), TOKENS, keys[0], 8)
    assert solved.embeddings.dtype == solved.log_evidence.dtype == jnp.float32
    assert solved.status == ParticleStatus.OK


class Tally:
    """How often something happened; hashed by identity, so that it may be part of what is compiled for."""

    def __init__(self):
        self.count = 0


class Counting(eqx.Module):
    """A decoder that notes how often it is traced."""

    decoder: LinearDecoder
    traced: Tally = eqx.field(static=True)

    def __call__(self, embeddings):
        self.traced.count += isinstance(embeddings, jax.core.Tracer)
        return self.decoder(embeddings)


def test_one_compilation_serves_other_keys_tokens_parameters_scales_and_thresholds():
    traced = Tally()

    def run(seed, a, tokens, noise_scale, threshold, particles=5):
        decoder = Counting(LinearDecoder((1 + a) * WEIGHT, BIAS), traced)
        options = {"noise_scale": noise_scale, "threshold": threshold, "proposal": "direct"}
        particle_filter(scalar(a), decoder, np.array(tokens), jax.random.key(seed), particles, **options)
        return traced.count

    once = run(0, -2.0, [0, 1, 0], 1.0, 0.5)
    assert once > 0
    assert run(1, 0.1, [2, 1, 1], 0.5, 0.0) == once
    assert run(2, -1.0, [1, 1, 1], 2.0, 1) == once
    assert run(2, -1.0, [1, 1, 1], 2.0, 1, particles=6) > once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"particles": 1}, "particles: got 1; pass an integer of at least 2"),
        ({"particles": 2.5}, "particles: got 2.5"),
        ({"tokens": np.zeros(0, int)}, "tokens: has n = 0 positions; pass at least 2"),
        ({"tokens": np.zeros(1, int)}, "tokens: has n = 1 positions; pass at least 2"),
        ({"tokens": np.zeros((2, 3), int)}, r"tokens: has shape \(2, 3\); pass one sequence"),
        ({"tokens": np.zeros(3)}, "tokens: has shape .* and dtype float64; pass integers"),
        ({"tokens": np.array([0, 3])}, r"tokens: hold values outside 0\.\.2"),
        ({"tokens": np.array([0, -1])}, r"tokens: hold values outside 0\.\.2"),
        ({"proposal": "optimal"}, "proposal: got 'optimal'; pass one of process, direct"),
        ({"threshold": 1.5}, "threshold: got 1.5; pass a share of the particles from 0"),
        ({"threshold": -0.1}, "threshold: got -0.1"),
        ({"threshold": np.nan}, "threshold: got nan"),
        ({"noise_scale": 0.0}, "noise_scale: got 0.0; pass a value greater than 0"),
        ({"first_scale": np.inf}, "first_scale: contains NaN or inf"),
        ({"noise_scale": np.ones(2)}, r"noise_scale: has shape \(2,\)"),
        ({"key": None}, "key: got None; pass a JAX random key"),
        ({"attention": "attention"}, "attention: got str; pass an Attention"),
        ({"decoder": "decoder"}, "decoder: got str; pass a callable"),
        ({"decoder": lambda u: u.sum()}, r"decoder: maps \(2, 1\) to \(\)"),
        ({"decoder": lambda u: jnp.cumsum(u, axis=0) @ WEIGHT.T}, "decoder: its logits for a row depend on the rows"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {
        "attention": scalar(-2.0),
        "decoder": LinearDecoder(WEIGHT, BIAS),
        "tokens": TOKENS,
        "key": jax.random.key(0),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        particle_filter(**arguments)


def test_smoothing_refuses_bad_arguments_by_name():
    result = particle_filter(scalar(-2.0), LinearDecoder(WEIGHT, BIAS), TOKENS, jax.random.key(0), 5, proposal="direct")
    with pytest.raises(ValueError, match="draws: got 0; pass an integer of at least 1"):
        smooth(result, jax.random.key(0), 0)
    with pytest.raises(ValueError, match="key: got None"):
        smooth(result, None, 1)

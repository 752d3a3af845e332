import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from prob_transformer import Attention, LinearDecoder
from prob_transformer.inference import ParticleStatus, particle_filter, smooth
from tests.helpers.dense import dense_map, draw
from tests.helpers.small_models import (
    BIAS,
    FIRST_SCALE,
    NOISE_SCALE,
    TOKENS,
    WEIGHT,
    assert_within_three_standard_errors,
    conjugate_truth,
    filters,
    planar,
    planar_filters,
    planar_truth,
    scalar,
    scalar_truth,
    token_probability,
)

PROPOSALS = ["process", "direct"]
# With 128 runs of 100 particles, each of which solves for its embedding.
SLOW_PROCESS = [pytest.param("process", marks=pytest.mark.slow), "direct"]


def assert_unnormalised_moments(result, evidence, first, last, both):
    """Z and Z sum_k W^k f(u^k) are unbiased for any number of particles, so a mean over keys has no bias to hide."""
    evidences = np.exp(np.asarray(result.log_evidence))
    weights, u = np.exp(np.asarray(result.log_weights)), np.asarray(result.embeddings)[..., 0]
    assert_within_three_standard_errors(evidences, evidence)
    for f, truth in ((u[..., 0], first), (u[..., 2], last), (u[..., 0] * u[..., 2], both)):
        assert_within_three_standard_errors(evidences * (weights * f).sum(-1), truth)


@pytest.mark.parametrize("proposal", SLOW_PROCESS)
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

    integral, mean = np.array([[moment(i, power) for i in range(3)] for power in range(2)])
    mean, evidence = mean / integral, integral.prod()
    result = filters(scalar(0.0, value=0.0), jax.random.split(jax.random.key(2), 400), 8, proposal, 0.5)
    truth = evidence, evidence * mean[0], evidence * mean[2], evidence * mean[0] * mean[2]
    assert_unnormalised_moments(result, *truth)


@pytest.mark.parametrize("proposal", SLOW_PROCESS)
def test_without_interaction_evidence_and_posterior_are_those_of_the_conjugate_gaussian(proposal):
    evidence, mean, variance = conjugate_truth()
    keys = jax.random.split(jax.random.key(4), 128)
    result = planar_filters(planar(np.zeros((2, 2))), keys, proposal, NOISE_SCALE, 0.5)
    assert (result.status == ParticleStatus.OK).all()
    evidences, weights = np.exp(np.asarray(result.log_evidence)), np.exp(np.asarray(result.log_weights))
    assert_within_three_standard_errors(evidences, evidence)
    u = np.asarray(result.embeddings)
    centred_square = np.square(u - mean).mean(-1)
    for i in range(3):
        for k in range(2):
            assert_within_three_standard_errors(evidences * (weights * u[..., i, k]).sum(-1), evidence * mean[i, k])
        second = evidences * (weights * centred_square[..., i]).sum(-1)
        assert_within_three_standard_errors(second, evidence * variance[i])


@pytest.mark.parametrize("proposal", SLOW_PROCESS)
def test_in_two_dimensions_the_evidence_is_that_of_quadrature(proposal):
    # The symmetric part of A is negative definite: det J >= 1.
    interaction = np.array([[-3.0, 3.0], [-1.0, -2.0]])
    mass, evidence = planar_truth(interaction)
    assert abs(mass - 1) < 1e-4
    result = planar_filters(planar(interaction), jax.random.split(jax.random.key(5), 128), proposal, NOISE_SCALE, 0.5)
    assert not result.unsolved.any()
    evidences = np.exp(np.asarray(result.log_evidence))
    assert_within_three_standard_errors(evidences, evidence)
    # No attention at all would be told apart.
    assert abs(evidence - conjugate_truth()[0]) > 3 * evidences.std(ddof=1) / np.sqrt(128)


def test_past_the_boundary_the_direct_proposal_targets_the_density_and_the_status_says_so():
    mass, evidence, *moments = scalar_truth(4.0)
    assert mass > 1.02
    keys = jax.random.split(jax.random.key(3), 400)
    assert_unnormalised_moments(filters(scalar(4.0), keys, 8, "direct", 0.5), evidence, *moments)
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_resampling_moves_caches_and_paths_together():
    # With hardly any noise every path must satisfy u_i = mu_i(u_i; its own past).
    query, key, value, _ = draw(3, (1, 2, 2, 3, True), scale=0.3)
    keys = jax.random.split(jax.random.key(0), 1)
    one = planar_filters(Attention(query, key, value), keys, "process", 1e-7, 1.0)
    result = jax.tree.map(lambda leaf: leaf[0], one)
    residual = jax.vmap(lambda u: dense_map(query, key, value, u))(result.embeddings)
    assert np.abs(residual[:, 1:]).max() < 1e-6
    # And the genealogy is theirs: tracing the ancestors back through the particles as they were gives the paths.
    indices = np.arange(100)
    alive_through = []
    for i in range(2, -1, -1):
        np.testing.assert_array_equal(result.embeddings[:, i], result.filtered[i, indices])
        alive_through.append(np.unique(indices).size)
        indices = np.asarray(result.ancestors)[i, indices]
    np.testing.assert_array_equal(result.distinct, alive_through[::-1])
    assert result.distinct[0] < result.distinct[-1] == 100


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


class Signs(eqx.Module):
    """Logits that depend on the sign of a scalar embedding only; -inf, NaN and any other number will do."""

    below: np.ndarray
    above: np.ndarray

    def __call__(self, embeddings):
        return jnp.where(embeddings < 0, self.below, self.above)


def signed(below, above, tokens=(0, 1, 0), threshold=0.0, count=16):
    decoder = Signs(np.array(below, float), np.array(above, float))
    options = {"proposal": "direct", "threshold": threshold}
    return particle_filter(jax.random.key(0), scalar(-2.0), decoder, np.array(tokens), count, **options)


def test_an_impossible_token_kills_all_and_an_improbable_one_does_not():
    result = signed([0.0, -np.inf], [0.0, -np.inf], threshold=0.5)
    assert (result.status, result.log_evidence) == (ParticleStatus.ALL_DIED, -np.inf)
    assert np.isneginf(np.asarray(result.log_weights)).all()
    np.testing.assert_array_equal(np.asarray(result.ess) > 0, [True, False, False])
    np.testing.assert_array_equal(result.distinct, 0)
    np.testing.assert_array_equal(result.unsolved, 0)
    with pytest.raises(ValueError, match="result: has status ALL_DIED"):
        smooth(jax.random.key(0), result, 2)

    # exp(-5000) is 0 in any floating-point format; its logarithm is as good a weight as any.
    improbable = signed([0.0, -5000.0], [0.0, -5000.0])
    assert improbable.status == ParticleStatus.OK
    certain = signed([0.0, -5000.0], [0.0, -5000.0], (0, 0, 0))
    np.testing.assert_allclose(improbable.log_evidence, certain.log_evidence - 5000.0, rtol=1e-12)


def test_a_decoder_that_gives_nan_is_reported_and_its_particles_are_not_counted():
    result = signed([0.0, 0.0], [np.nan, np.nan])
    assert result.status == ParticleStatus.NOT_CONVERGED
    above = np.asarray(result.embeddings)[..., 0] > 0
    alive_before = np.cumprod(~np.pad(above, ((0, 0), (1, 0)))[:, :3], axis=1) == 1
    np.testing.assert_array_equal(result.unsolved, (above & alive_before).sum(0))
    np.testing.assert_array_equal(np.isneginf(np.asarray(result.log_weights)), above.any(1))
    assert np.isfinite(result.log_evidence)


def test_particles_of_weight_zero_leave_no_descendants():
    result = signed([0.0, -np.inf], [-np.inf, 0.0], threshold=1.0)
    assert result.status == ParticleStatus.OK
    weights = np.asarray(result.filtered_log_weights)
    assert np.isneginf(weights[:-1]).any(1).all()
    parents = np.take_along_axis(weights[:-1], np.asarray(result.ancestors)[1:], 1)
    assert np.isfinite(parents).all()
    # Of a path that lives every embedding has the sign its token asks for.
    alive = np.isfinite(weights[-1])
    np.testing.assert_array_equal(np.sign(np.asarray(result.embeddings)[alive, :, 0]), [[-1, 1, -1]] * alive.sum())


def test_a_particle_of_weight_zero_drawn_by_rounding_stays_dead(monkeypatch):
    # In float32 the sum of the weights may fall short of 1, and then the last particle is drawn whatever its weight.
    def short(key, weights, count):
        return jnp.full(count, jnp.argmax(weights)).at[-1].set(jnp.argmin(weights))

    monkeypatch.setattr("blackjax.smc.resampling.systematic", short)
    # A number of particles of its own, or compiled code from before would be used.
    result = signed([0.0, -np.inf], [-np.inf, 0.0], tokens=(0, 0, 0), threshold=1.0, count=17)
    weights = np.asarray(result.filtered_log_weights)
    assert np.isneginf(weights[0]).any()
    assert np.isneginf(weights[1:, -1]).all()
    assert result.status == ParticleStatus.OK


def test_float32_stays_float32_and_agrees():
    single, decoder = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float32), (scalar(-2.0), LinearDecoder(WEIGHT, BIAS))
    )
    result = filters(single, jax.random.split(jax.random.key(2), 2000), 8, "direct", 0.5)
    floating = [leaf.dtype for leaf in jax.tree.leaves(result) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert set(floating) == {jnp.dtype("float32")}
    assert_unnormalised_moments(result, *scalar_truth(-2.0)[1:])
    solved = jax.eval_shape(lambda key: particle_filter(key, single, decoder, TOKENS, 8), jax.random.key(0))
    assert solved.embeddings.dtype == solved.log_evidence.dtype == jnp.float32


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

    def run(seed, a, tokens, noise_scale, threshold):
        decoder = Counting(LinearDecoder((1 + a) * WEIGHT, BIAS), traced)
        options = {"noise_scale": noise_scale, "threshold": threshold, "proposal": "direct"}
        particle_filter(seed, scalar(a), decoder, np.array(tokens), 5, **options)
        return traced.count

    once = run(0, -2.0, [0, 1, 0], 1.0, 0.5)
    assert once > 0
    assert (run(1, 0.1, [2, 1, 1], 0.5, 0.0), run(2, -1.0, [1, 1, 1], 2.0, 1)) == (once, once)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"particles": 1}, "particles: got 1; pass an integer of at least 2"),
        ({"particles": 2.5}, "particles: got 2.5"),
        ({"tokens": np.zeros(0, int)}, "tokens: has n = 0 positions; pass at least 2"),
        ({"tokens": np.zeros(1, int)}, "tokens: has n = 1 positions; pass at least 2"),
        ({"tokens": np.zeros((2, 3), int)}, r"tokens: has shape \(2, 3\); pass one sequence"),
        ({"tokens": np.zeros(3)}, "tokens: has shape .* and dtype float64; pass integers"),
        ({"tokens": np.array([0, 3])}, r"tokens: contains tokens outside 0\.\.2"),
        ({"tokens": np.array([0, -1])}, r"tokens: contains tokens outside 0\.\.2"),
        ({"proposal": "optimal"}, "proposal: got 'optimal'; pass one of process, direct"),
        ({"threshold": 1.5}, "threshold: got 1.5; pass a share of the particles from 0"),
        ({"threshold": -0.1}, "threshold: got -0.1"),
        ({"threshold": "half"}, "threshold: got str; pass a numeric array"),
        ({"threshold": np.array([0.5])}, r"threshold: got \[0\.5\]; pass a share"),
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

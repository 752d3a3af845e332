from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import Predictive
from scipy.integrate import quad
from scipy.stats import multivariate_normal, norm

from prob_transformer import Attention, EmbeddingProcess, ImplicitSolveError
from tests.helpers.dense import dense_truth, draw

ZERO = Attention(np.zeros((1, 2, 3)), np.zeros((1, 2, 3)))


def mild_process(seed=0, length=5, **scales):
    query, key, value, _ = draw(seed, (2, 2, 3, 5, True), scale=0.2)
    return EmbeddingProcess(Attention(query, key, value), length, **scales)


@pytest.mark.usefixtures("optimised")
def test_without_interaction_the_law_is_scipys_multivariate_normal():
    # A = 0: uniform weights, u_i = mean of the past + noise, a linear map of the noise.
    length, noise_scale, first_scale = 5, 0.4, 1.7
    lower = np.eye(length)
    for i in range(1, length):
        lower[i, :i] = -1.0 / i
    to_embeddings = np.kron(np.linalg.inv(lower), np.eye(3))
    scales = np.repeat([first_scale] + [noise_scale] * (length - 1), 3)
    truth = multivariate_normal(np.zeros(15), (to_embeddings * scales**2) @ to_embeddings.T)
    process = EmbeddingProcess(ZERO, length, noise_scale, first_scale)
    values = np.random.default_rng(0).normal(size=(7, length, 3))
    np.testing.assert_allclose(process.log_prob(values), truth.logpdf(values.reshape(7, 15)), atol=1e-10)
    draws = process.sample(jax.random.key(0), (5_000,)).reshape(-1, 15)
    # Whitened by the true law; the covariances of 5,000 draws have standard errors of at most sqrt(2 / 5,000).
    white = np.linalg.solve(np.linalg.cholesky(truth.cov), draws.T)
    np.testing.assert_allclose(np.cov(white), np.eye(15), atol=5 * np.sqrt(2 / 5_000))


def test_the_default_scales_are_one():
    value = np.random.default_rng(5).normal(size=(3, 3))
    noise = np.stack([value[0], value[1] - value[0], value[2] - value[:2].mean(0)])
    log_prob = EmbeddingProcess(ZERO, 3).position_log_prob(value)
    np.testing.assert_allclose(log_prob, norm.logpdf(noise).sum(1), rtol=1e-12)


@pytest.mark.parametrize("noise_scale", [1e-15, 1e-19, 1e-30])
def test_a_noise_scale_whose_square_underflows_has_the_density_of_float64(noise_scale):
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 2, 2), jnp.float32)
    # Without interaction between far-off scales: the residuals of all but the first are of the size of the noise.
    small = EmbeddingProcess(Attention(0 * query, key), 3, jnp.asarray(noise_scale, jnp.float32))
    embeddings = jnp.array([[0.0, 0.0], [1.0, -2.0], [2.0, 0.5]], jnp.float32) * np.float32(noise_scale)
    expected = norm.logpdf([0.0, 0.0], 0, 1).sum() + 4 * -np.log(np.float64(np.float32(noise_scale)))
    expected += norm.logpdf([1.0, -2.0, 1.5, 1.5], 0, 1).sum()
    np.testing.assert_allclose(small.log_prob(embeddings), expected, rtol=1e-5)
    value, slope = jax.value_and_grad(lambda u: small.log_prob(u))(embeddings)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_draws_have_the_wider_dtype_of_scales_and_attention():
    head = np.eye(2)[None]
    for narrow, wide in ((np.float32, np.float64), (np.float64, np.float32)):
        process = EmbeddingProcess(Attention(-head.astype(narrow), head.astype(narrow)), 3, wide(1.0), wide(1.0))
        assert process.sample(jax.random.key(0)).dtype == np.float64


@pytest.mark.parametrize(("a", "mass"), [(-2.0, 1.0), (0.5, 1.0), (1.5, 1.0313), (4.0, 2.1239)])
def test_one_dimensional_conditional_mass(a, mass):
    past = np.array([-1.0, 1.0, 0.3])
    process = EmbeddingProcess(Attention(np.array([[[a]]]), np.ones((1, 1, 1))), 4, noise_scale=0.5)
    conditional = jax.jit(lambda u: process.position_log_prob(jnp.concatenate([past, u])[:, None])[-1])

    def by_hand(u, absolute=True):
        weights = np.exp(a * u * past)
        weights /= weights.sum()
        mean = weights @ past
        jacobian = 1 - a * (weights @ (past - mean) ** 2)
        return norm.pdf(u, mean, 0.5) * (abs(jacobian) if absolute else jacobian)

    for u in (-1.3, -0.2, 0.1, 0.7, 2.0):
        np.testing.assert_allclose(np.exp(conditional(jnp.array([u]))), by_hand(u), rtol=1e-12)
    edges = np.linspace(-8, 8, 65)
    absolute = sum(quad(by_hand, lo, hi, epsabs=1e-12)[0] for lo, hi in pairwise(edges))
    assert abs(absolute - mass) < 5e-5
    signed = sum(quad(by_hand, lo, hi, args=(False,))[0] for lo, hi in pairwise(edges))
    assert abs(signed - 1) < 1e-6


def test_a_prefix_of_a_longer_process_has_the_density_of_the_shorter():
    value = np.random.default_rng(2).normal(size=(5, 3))
    longer, shorter = mild_process(), mild_process(length=3)
    np.testing.assert_allclose(longer.position_log_prob(value)[:3].sum(), shorter.log_prob(value[:3]), atol=1e-12)


def test_batch_shapes_come_from_the_scales():
    noise_scale = jnp.array([0.3, 0.6])
    process = mild_process(noise_scale=noise_scale, first_scale=1.2)
    assert (process.batch_shape, process.event_shape) == ((2,), (5, 3))
    draws = process.sample(jax.random.key(0), (4,))
    assert draws.shape == (4, 2, 5, 3)
    log_prob = process.log_prob(draws)
    assert log_prob.shape == (4, 2)
    for b in range(2):
        alone = mild_process(noise_scale=float(noise_scale[b]), first_scale=1.2)
        np.testing.assert_allclose(log_prob[:, b], alone.log_prob(draws[:, b]), atol=1e-11)


def test_inside_vmap_jit_and_as_a_pytree():
    process = mild_process(noise_scale=0.5)
    value = np.random.default_rng(3).normal(size=(4, 5, 3))
    plain = process.log_prob(value)
    np.testing.assert_allclose(jax.jit(process.log_prob)(value), plain, atol=1e-11)
    np.testing.assert_allclose(jax.vmap(process.log_prob)(value), plain, atol=1e-11)
    passed_through = jax.jit(lambda p, v: p.log_prob(v))(process, value)
    np.testing.assert_allclose(passed_through, plain, atol=1e-11)
    over_scales = jax.vmap(lambda s: mild_process(noise_scale=s).log_prob(value[0]))(jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(over_scales[0], plain[0], atol=1e-11)
    keys = jax.random.split(jax.random.key(1), 3)
    np.testing.assert_allclose(jax.jit(jax.vmap(process.sample))(keys)[1], process.sample(keys[1]), atol=1e-9)


@pytest.mark.parametrize(
    ("mapped", "leading"), [((2,), ()), ((2,), (2,)), ((2,), (3, 2)), ((2, 4), ()), ((2, 4), (3, 2, 1)), ((1,), (3, 1))]
)
def test_a_process_made_inside_vmap_is_many_processes_outside(mapped, leading):
    """As in NumPyro's plates and Predictive: parameters have leading axes; values have or get them."""
    scales = 0.1 + 0.3 * np.random.default_rng(4).random(mapped)

    def made(scale):
        return mild_process(noise_scale=scale, first_scale=2 * scale)

    several = made
    for _ in mapped:
        several = jax.vmap(several)
    process = several(scales)
    value = np.random.default_rng(5).normal(size=(*leading, 5, 3))
    found = process.log_prob(value)
    whole = np.broadcast_to(value, (*np.broadcast_shapes(leading, mapped), 5, 3))
    assert found.shape == whole.shape[:-2]
    for place in np.ndindex(*found.shape):
        alone = made(scales[place[-len(mapped) :]]).log_prob(whole[place])
        np.testing.assert_allclose(found[place], alone, atol=1e-11)
    key = jax.random.key(0)
    draws = process.sample(key, (3,))
    assert draws.shape == (3, *mapped, 5, 3)
    for place in np.ndindex(*mapped):
        np.testing.assert_allclose(draws[:, *place], made(scales[place]).sample(key, (3,)), atol=1e-9)


def test_half_precision_is_worked_on_in_float32():
    process, value = mild_process(), np.random.default_rng(6).normal(size=(5, 3))
    half = EmbeddingProcess(jax.tree.map(lambda x: x.astype(jnp.bfloat16), process.attention), 5, jnp.bfloat16(1.0))
    found = half.log_prob(jnp.asarray(value, jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    wide = EmbeddingProcess(jax.tree.map(lambda x: x.astype(jnp.float32), half.attention), 5, jnp.float32(1.0))
    expected = wide.log_prob(jnp.asarray(value, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(float(found), float(expected), rtol=2**-7)
    drawn = half.sample(jax.random.key(0))
    assert drawn.dtype == jnp.bfloat16
    np.testing.assert_array_equal(drawn, wide.sample(jax.random.key(0)).astype(jnp.bfloat16))
    # The cache of the earlier positions is in float32, and so is what follows from it.
    for process in (half, wide):
        past, found = process.empty_past(), []
        for row in drawn:
            log_prob, past = process.extend(past, row)
            found.append(log_prob)
        np.testing.assert_allclose(found, wide.position_log_prob(drawn.astype(jnp.float32)), rtol=1e-6)


def test_inside_numpyro_sample_plate_and_predictive():
    process = mild_process(noise_scale=0.5)

    def model():
        with numpyro.plate("sequences", 3):
            return numpyro.sample("u", process)

    draws = Predictive(model, num_samples=2)(jax.random.key(0))["u"]
    assert draws.shape == (2, 3, 5, 3)
    residual, _, _ = dense_truth(process.attention.query, process.attention.key, process.attention.value, draws[1, 2])
    assert 0.05 < np.std(residual[1:]) < 2.0


def test_samples_follow_the_first_and_noise_scales():
    # A = -2 I with identity values: det J >= 1 however large the embeddings are.
    attention = Attention(-2.0 * np.eye(2)[None], np.eye(2)[None])
    draws = EmbeddingProcess(attention, 4, noise_scale=0.1, first_scale=3.0).sample(jax.random.key(2), (3_000,))
    noise = jax.vmap(lambda u: dense_truth(attention.query, attention.key, None, u)[0])(draws)
    # 6,000 and 18,000 independent normals: 5 standard errors of the standard deviation.
    assert abs(noise[:, 0].std() / 3.0 - 1) < 5 / np.sqrt(2 * 6_000)
    assert abs(noise[:, 1:].std() / 0.1 - 1) < 5 / np.sqrt(2 * 18_000)


def test_different_keys_give_different_draws_and_one_key_the_same():
    process = mild_process()
    one, again, other = (process.sample(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 0.1


def test_sampling_past_the_boundary_raises_with_a_named_status():
    process = EmbeddingProcess(Attention(np.full((1, 1, 1), 6.0), np.ones((1, 1, 1))), 6, 0.5)
    with pytest.raises(ImplicitSolveError, match=r"past_boundary|not_converged"):
        process.sample(jax.random.key(0), (200,))
    _, status = process.solve_sample(jax.random.key(0), (200,))
    assert 0 < (np.asarray(status) > 0).mean() < 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EmbeddingProcess("attention", 3), "attention: got str"),
        (lambda: EmbeddingProcess(ZERO, 0), "length: got 0; pass an integer of at least 2"),
        (lambda: EmbeddingProcess(ZERO, 1), "length: got 1; pass an integer of at least 2"),
        (lambda: EmbeddingProcess(ZERO, 2.5), "length: got 2.5"),
        (lambda: EmbeddingProcess(ZERO, 3, noise_scale=0.0), "noise_scale: got 0.0; pass a value greater than 0"),
        (lambda: EmbeddingProcess(ZERO, 3, noise_scale=-1.0), "noise_scale: got -1.0"),
        (
            lambda: EmbeddingProcess(ZERO, 3, implementation="fast"),
            "implementation: got 'fast'; pass None or one of reference, blocked",
        ),
        (lambda: EmbeddingProcess(ZERO, 3, first_scale=np.nan), "first_scale: contains NaN or inf"),
        (lambda: EmbeddingProcess(ZERO, 3).log_prob(np.ones((3, 2))), r"value: has shape \(3, 2\)"),
        (lambda: EmbeddingProcess(ZERO, 3).log_prob(np.ones((4, 3))), r"value: has shape \(4, 3\)"),
        (lambda: EmbeddingProcess(ZERO, 3).log_prob(np.full((3, 3), np.nan)), "value: contains NaN or inf"),
        (lambda: EmbeddingProcess(ZERO, 3).sample(None), "key: got None"),
        *[
            (
                lambda n=n: EmbeddingProcess(ZERO, 3).extend(EmbeddingProcess(ZERO, n).empty_past(), np.ones(3)),
                rf"past: holds \({n},\) positions",
            )
            for n in (2, 4)
        ],
        *[
            (
                lambda d=d: EmbeddingProcess(ZERO, 3).extend(EmbeddingProcess(ZERO, 3).empty_past(), np.ones(d)),
                rf"embedding: has shape \({d},\)",
            )
            for d in (2, 4)
        ],
    ],
)
def test_bad_input_is_refused_by_name(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_inside_jit_numpyros_validation_gives_values_outside_the_support_no_density():
    # Eagerly such values are refused by name; a traced value cannot be looked at.
    process = EmbeddingProcess(ZERO, 3, validate_args=True)
    values = np.zeros((2, 3, 3))
    values[1, 2, 0] = np.inf
    log_prob = jax.jit(process.log_prob)(values)
    np.testing.assert_allclose(log_prob, [9 * norm.logpdf(0.0), -np.inf], rtol=1e-12)


def test_an_expanded_process_broadcasts():
    expanded = mild_process().expand((4,))
    assert expanded.sample(jax.random.key(0)).shape == (4, 5, 3)
    assert isinstance(mild_process().to_event(0), dist.Distribution)


def test_both_paths_give_the_same_draws_and_densities():
    query, key, value, _ = draw(0, (2, 3, 2, 5, True), scale=0.3)
    slow, fast = (
        EmbeddingProcess(Attention(query, key, value), 7, jnp.array([0.5, 1.0]), implementation=name)
        for name in ("reference", "blocked")
    )
    drawn = slow.sample(jax.random.key(0), (3,))
    np.testing.assert_allclose(fast.sample(jax.random.key(0), (3,)), drawn, atol=1e-8)
    np.testing.assert_allclose(fast.log_prob(drawn), slow.log_prob(drawn), atol=1e-11)
    assert jax.tree.structure(fast) != jax.tree.structure(slow)


def test_extending_position_by_position_in_a_scan_gives_the_density_of_the_whole():
    process = mild_process(noise_scale=0.6, first_scale=1.4)
    value = np.random.default_rng(1).normal(size=(5, 3))

    def scan(u):
        return jax.lax.scan(lambda past, row: process.extend(past, row)[::-1], process.empty_past(), u)[1]

    np.testing.assert_allclose(jax.jit(scan)(value), process.position_log_prob(value), atol=1e-12)


# 300 is beyond the integers that Python caches.
@pytest.mark.parametrize("length", [2, 300])
def test_a_full_cache_is_refused_eagerly_and_inside_jit(length):
    process = EmbeddingProcess(ZERO, length)
    past = process.empty_past().before(process.attention, length)
    for extend in (process.extend, jax.jit(process.extend)):
        with pytest.raises(Exception, match="past: is full"):
            jax.block_until_ready(extend(past, np.ones(3)))

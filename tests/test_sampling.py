import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from prob_transformer import Attention, CausalAttentionTransform, EmbeddingProcess, ImplicitSolveError, SolveStatus
from prob_transformer.root_finder import solve_sequences
from tests.helpers.dense import dense_truth, draw


def mild_attention(seed):
    """Two heads with values, weak enough that standard normal noise stays far inside the safe region."""
    return Attention(*draw(seed, (2, 2, 3, 5, True), scale=0.2)[:3])


def noise_of(seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(5, 3)))


def test_float32_without_x64_comes_back_as_the_noise():
    noise = np.random.default_rng(0).normal(size=(20, 5, 3)).astype(np.float32)
    with jax.enable_x64(False):
        transform = CausalAttentionTransform(jax.tree.map(lambda x: x.astype(jnp.float32), mild_attention(1)))
        embeddings = transform(noise)
        assert embeddings.dtype == jnp.float32
        np.testing.assert_allclose(transform.inv(embeddings), noise, atol=1e-4)


def test_log_abs_det_jacobian_is_that_of_the_differentiated_solve():
    transform, noise = CausalAttentionTransform(mild_attention(2)), noise_of(1)
    jacobian = jax.jacrev(transform)(noise).reshape(15, 15)
    embeddings = transform(noise)
    log_det = transform.log_abs_det_jacobian(noise, embeddings)
    assert abs(log_det) > 1e-3
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-8)
    np.testing.assert_allclose(transform.inv.log_abs_det_jacobian(embeddings, noise), -log_det, atol=1e-12)


def test_the_gradient_in_the_parameters_matches_finite_differences():
    attention, noise = mild_attention(3), noise_of(2)

    def last(scale):
        scaled = Attention(scale * attention.query, attention.key, attention.value)
        return CausalAttentionTransform(scaled)(noise)[-1].sum()

    difference = (last(1.0 + 1e-5) - last(1.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(last)(1.0), difference, atol=1e-7)


def test_densities_and_log_determinants_are_those_of_the_process():
    attention = mild_attention(4)
    transform = CausalAttentionTransform(attention)
    base = dist.Normal(jnp.zeros((5, 3)), jnp.array([2.0, *[0.5] * 4])[:, None]).to_event(2)
    transformed = dist.TransformedDistribution(base, transform)
    assert (transformed.batch_shape, transformed.event_shape) == ((), (5, 3))
    draws = transformed.sample(jax.random.key(0), (4,))
    process = EmbeddingProcess(attention, 5, noise_scale=0.5, first_scale=2.0)
    np.testing.assert_allclose(transformed.log_prob(draws), process.log_prob(draws), atol=1e-10)
    _, _, (_, log_det) = dense_truth(attention.query, attention.key, attention.value, draws[0])
    assert abs(log_det) > 1e-3
    np.testing.assert_allclose(transform.log_abs_det_jacobian(draws, draws)[0], -log_det, atol=1e-10)


def test_transforms_are_pytrees_and_compare_by_class_and_parameters():
    one = CausalAttentionTransform(mild_attention(6))
    assert jax.tree.unflatten(jax.tree.structure(one), jax.tree.leaves(one)) == one
    assert one != CausalAttentionTransform(mild_attention(7))
    assert one != CausalAttentionTransform(one.attention, continuation_steps=3)
    assert one.inv.domain is one.domain is one.codomain is constraints.real_matrix


def test_past_the_boundary_the_status_is_named_and_calling_raises():
    # d = 1, past (-1, 1, 0.3), a = 4: near u = 0 the determinant is negative, and noise there has three roots.
    transform = CausalAttentionTransform(Attention(np.array([[[4.0]]]), np.ones((1, 1, 1))))
    noise = transform.inv(jnp.array([[-1.0], [1.0], [0.3], [0.0]]))
    _, status = transform.solve(noise)
    failed = int(np.argmax(np.asarray(status) > 0))
    with pytest.raises(ImplicitSolveError, match=f"at position {failed}") as info:
        transform(noise)
    assert (info.value.status, info.value.position) == (SolveStatus(int(status[failed])), failed)
    compiled = jax.jit(jax.vmap(lambda x: transform(x)))
    np.testing.assert_allclose(compiled(0.1 * noise[None])[0], transform(0.1 * noise), atol=1e-12)
    with pytest.raises(Exception, match=r"past_boundary|not_converged"):
        jax.block_until_ready(compiled(noise[None]))


def test_noise_too_large_for_the_logits_has_a_named_status():
    transform = CausalAttentionTransform(Attention(np.array([[[-4.0]]]), np.ones((1, 1, 1))))
    noise = np.array([[1.0], [1e308], [1.0], [1.0]])
    _, status = transform.solve(noise)
    assert SolveStatus(int(status[1])) is SolveStatus.NOT_CONVERGED
    with pytest.raises(ImplicitSolveError, match="not_converged at position 1"):
        transform(noise)


def test_solving_twice_with_the_same_shapes_compiles_once():
    CausalAttentionTransform(mild_attention(8)).solve(noise_of(4))
    before = solve_sequences._cache_size()
    CausalAttentionTransform(mild_attention(9)).solve(noise_of(4) + 1.0)
    assert solve_sequences._cache_size() == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t(np.ones((5, 2))), r"noise: has shape \(5, 2\)"),
        (lambda t: t(np.full((5, 3), np.nan)), "noise: contains NaN or inf"),
        (lambda t: t(np.ones((1, 3))), "noise: has n = 1 positions"),
        (lambda t: CausalAttentionTransform(np.eye(2)), "attention: got ndarray; pass an Attention"),
        (lambda t: CausalAttentionTransform(t.attention, 0), "continuation_steps: got 0"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(CausalAttentionTransform(mild_attention(0)))


def test_an_empty_batch_has_no_draws():
    assert CausalAttentionTransform(mild_attention(0))(jnp.zeros((0, 6, 3))).shape == (0, 6, 3)

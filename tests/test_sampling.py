import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints

from prob_transformer import (
    Attention,
    CausalAttentionTransform,
    EmbeddingProcess,
    ImplicitSolveError,
    SolveStatus,
    stability_margin,
)
from tests.support.dense import dense_map, draw


def safe_attention(seed, width=3, strength=20.0):
    """Identity values and an interaction whose symmetric part is negative definite: det J >= 1 everywhere."""
    rng = np.random.default_rng(seed)
    root, twist = rng.normal(size=(2, width, width))
    interaction = -strength * root @ root.T + 0.3 * strength * (twist - twist.T)
    return Attention(np.sqrt(width) * interaction[None], np.eye(width)[None])


def mild_attention(seed):
    """Two heads with values, weak enough that standard normal noise stays far inside the safe region."""
    query, key, value, _ = draw(seed, (2, 2, 3, 5, True), scale=0.2)
    return Attention(query, key, value)


@pytest.mark.parametrize("attention", [safe_attention(0), safe_attention(1, strength=500.0), mild_attention(0)])
def test_sampling_then_inverse_returns_the_noise(attention):
    transform = CausalAttentionTransform(attention)
    noise = np.random.default_rng(0).normal(size=(50, 6, 3))
    embeddings, status = transform.solve(noise)
    assert (status == SolveStatus.CONVERGED).all()
    assert (stability_margin(attention, embeddings) > 0).all()
    np.testing.assert_allclose(transform.inv(embeddings), noise, atol=1e-8)
    independent = dense_map(attention.query, attention.key, attention.value, embeddings[0])
    np.testing.assert_allclose(independent, noise[0], atol=1e-8)


@pytest.mark.parametrize("x64", [True, False])
def test_float32_roundtrip_with_and_without_x64(x64):
    noise = np.random.default_rng(0).normal(size=(20, 5, 3)).astype(np.float32)
    with jax.enable_x64(x64):
        attention = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), mild_attention(1))
        transform = CausalAttentionTransform(attention)
        embeddings = transform(noise)
        assert embeddings.dtype == jnp.float32
        np.testing.assert_allclose(transform.inv(embeddings), noise, atol=1e-4)


def test_the_solved_roots_agree_with_scipys():
    from scipy.optimize import brentq

    # d = 1, a < 0: e(u) is increasing, so bracketing finds the only root.
    attention = Attention(np.array([[[-3.0]]]), np.ones((1, 1, 1)))
    noise = np.array([[0.4], [-1.1], [0.9]])
    embeddings = CausalAttentionTransform(attention)(noise)
    past = []
    for i in range(3):

        def mismatch(u, i=i):
            if not past:
                return u - noise[i, 0]
            weights = np.exp(-3.0 * u * np.array(past))
            return u - weights @ past / weights.sum() - noise[i, 0]

        past.append(brentq(mismatch, -10, 10, xtol=1e-14))
        assert abs(embeddings[i, 0] - past[-1]) < 1e-10


def test_log_abs_det_jacobian_is_that_of_the_differentiated_solve():
    transform = CausalAttentionTransform(mild_attention(2))
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)))
    jacobian = jax.jacrev(transform)(noise).reshape(15, 15)
    embeddings = transform(noise)
    log_det = transform.log_abs_det_jacobian(noise, embeddings)
    assert abs(log_det) > 1e-3
    np.testing.assert_allclose(log_det, np.linalg.slogdet(jacobian)[1], atol=1e-8)
    np.testing.assert_allclose(transform.inv.log_abs_det_jacobian(embeddings, noise), -log_det, atol=1e-12)


def test_the_gradient_in_the_parameters_matches_finite_differences():
    attention = mild_attention(3)
    noise = jnp.asarray(np.random.default_rng(2).normal(size=(5, 3)))

    def last(scale):
        scaled = Attention(scale * attention.query, attention.key, attention.value)
        return CausalAttentionTransform(scaled)(noise)[-1].sum()

    difference = (last(1.0 + 1e-5) - last(1.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(last)(1.0), difference, atol=1e-7)


def test_numpyros_transformed_distribution_gives_the_process():
    attention = mild_attention(4)
    scales = jnp.array([2.0, 0.5, 0.5, 0.5, 0.5])[:, None]
    base = dist.Normal(jnp.zeros((5, 3)), scales).to_event(2)
    transformed = dist.TransformedDistribution(base, CausalAttentionTransform(attention))
    process = EmbeddingProcess(attention, 5, noise_scale=0.5, first_scale=2.0)
    assert (transformed.batch_shape, transformed.event_shape) == ((), (5, 3))
    draws = transformed.sample(jax.random.key(0), (4,))
    np.testing.assert_allclose(transformed.log_prob(draws), process.log_prob(draws), atol=1e-10)


def test_domain_and_codomain_are_declared_coupled():
    transform = CausalAttentionTransform(mild_attention(5))
    assert transform.domain is constraints.real_matrix
    assert transform.codomain is constraints.real_matrix
    assert transform.inv.domain is constraints.real_matrix


def test_transforms_are_pytrees_and_compare_by_parameters():
    one, other = CausalAttentionTransform(mild_attention(6)), CausalAttentionTransform(mild_attention(7))
    rebuilt = jax.tree.unflatten(jax.tree.structure(one), jax.tree.leaves(one))
    assert rebuilt == one
    assert one != other
    assert one != CausalAttentionTransform(one.attention, continuation_steps=3)


def past_boundary_noise():
    """d = 1, past (-1, 1, 0.3), a = 4: near u = 0 the determinant is negative, and noise there has three roots."""
    attention = Attention(np.array([[[4.0]]]), np.ones((1, 1, 1)))
    past = jnp.array([[-1.0], [1.0], [0.3], [0.0]])
    noise = CausalAttentionTransform(attention).inv(past)
    return attention, noise


def test_past_the_boundary_the_status_is_named_and_calling_raises():
    attention, noise = past_boundary_noise()
    transform = CausalAttentionTransform(attention)
    _, status = transform.solve(noise)
    assert SolveStatus(int(status.max())) is not SolveStatus.CONVERGED
    failed = int(np.argmax(np.asarray(status) > 0))
    with pytest.raises(
        ImplicitSolveError, match=f"at position {failed}: .*docs/theory.md|at position {failed}"
    ) as info:
        transform(noise)
    assert info.value.status == SolveStatus(int(status[failed]))
    assert info.value.position == failed


def test_inside_jit_a_failed_solve_raises_when_it_runs():
    attention, noise = past_boundary_noise()
    with pytest.raises(Exception, match=r"past_boundary|not_converged"):
        jax.block_until_ready(jax.jit(lambda x: CausalAttentionTransform(attention)(x))(noise))


@pytest.mark.usefixtures("optimised")
def test_every_status_is_true_of_its_root():
    # Strong random attention crosses the boundary often; whatever is called converged must be a root with det J > 0.
    query, key, value, _ = draw(0, (2, 2, 3, 6, True), scale=1.5)
    attention = Attention(query, key, value)
    noise = np.random.default_rng(3).normal(size=(60, 6, 3))
    transform = CausalAttentionTransform(attention)
    embeddings, status = transform.solve(noise)
    assert np.isfinite(embeddings).all()
    error = np.abs(transform.inv(embeddings) - noise).max(-1)
    margins = stability_margin(attention, embeddings)
    assert {SolveStatus(int(code)) for code in np.unique(status)} >= {SolveStatus.CONVERGED, SolveStatus.PAST_BOUNDARY}
    assert (error[status != SolveStatus.NOT_CONVERGED] < 1e-8).all()
    assert (margins[status == SolveStatus.CONVERGED] > 0).all()
    assert (status[margins <= 0] != SolveStatus.CONVERGED).all()


def test_solving_twice_with_the_same_shapes_compiles_once():
    from prob_transformer import root_finder as module

    transform = CausalAttentionTransform(mild_attention(8))
    noise = np.random.default_rng(4).normal(size=(5, 3))
    transform.solve(noise)
    with jax.log_compiles(), pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr(module, "_solve_position", lambda *args: compiled.append(args))
        CausalAttentionTransform(mild_attention(9)).solve(noise + 1.0)
    assert compiled == []


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
    attention = mild_attention(0)
    assert CausalAttentionTransform(attention)(jnp.zeros((0, 6, attention.width))).shape == (0, 6, attention.width)

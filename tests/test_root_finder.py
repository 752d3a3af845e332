import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import brentq, root
from scipy.special import softmax

import prob_transformer
from prob_transformer import Attention, CausalAttentionTransform, EmbeddingProcess, ImplicitSolveError, SolveStatus
from prob_transformer import root_finder as module
from prob_transformer.root_finder import residual_tolerance
from tests.helpers.dense import SHAPES, dense_map, draw

# Most of the time goes into compiling, so many tests share one shape: heads, head size, width, length, own values.
SHARED, BATCH = (2, 2, 3, 6, True), 64


def attention_of(seed, scale=0.2, shape=SHARED, dtype=np.float64):
    """With the default scale weak enough that standard normal noise stays inside the boundary."""
    return Attention(*draw(seed, shape, dtype, scale)[:3])


def noise_of(seed, shape=SHARED, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(BATCH, shape[3], shape[2])).astype(dtype)


def assert_round_trip(attention, noise, embeddings):
    def residual(u):
        return dense_map(attention.query, attention.key, attention.value, u)

    atol = 1e-8 if noise.dtype == np.float64 else residual_tolerance(noise.dtype) * (1 + np.abs(noise).max())
    np.testing.assert_allclose(jax.jit(jax.vmap(residual))(embeddings), noise, atol=atol)


ROUND_TRIPS = [(shape, np.float64) for shape in SHAPES] + [(SHAPES[index], np.float32) for index in (0, 5)]


@pytest.mark.parametrize(("shape", "dtype"), ROUND_TRIPS)
def test_sampling_then_the_dense_residual_returns_the_noise(shape, dtype):
    attention, noise = attention_of(0, 0.15, shape, dtype), noise_of(0, shape, dtype)
    embeddings, status = CausalAttentionTransform(attention).solve(noise)
    assert embeddings.dtype == dtype
    assert (status == SolveStatus.CONVERGED).all()
    assert_round_trip(attention, noise, embeddings)


@pytest.mark.parametrize(("strength", "dtype"), [(20.0, np.float64), (500.0, np.float64), (20.0, np.float32)])
def test_steep_interactions_inside_the_boundary_are_solved(strength, dtype):
    # Identity values and an interaction whose symmetric part is negative definite: det J >= 1 everywhere.
    root, twist = np.random.default_rng(1).normal(size=(2, 3, 3))
    interaction = strength * (0.3 * (twist - twist.T) - root @ root.T)
    attention = Attention((np.sqrt(3) * interaction[None]).astype(dtype), np.eye(3, dtype=dtype)[None])
    noise = noise_of(0, dtype=dtype)
    embeddings, status = CausalAttentionTransform(attention).solve(noise)
    assert (status == SolveStatus.CONVERGED).all()
    assert_round_trip(attention, noise, embeddings)


def root_on_the_path(attention, past, noise, points=200):
    """The root that SciPy follows from the noise in small steps, or None where det J <= 0.05 is met or it is lost."""
    query, key, value = (np.asarray(x) for x in (attention.query, attention.key, attention.value))

    def mean(u):
        logits = np.einsum("hpa,a,hpb,sb->hs", query, u, key, past) / np.sqrt(query.shape[1])
        return np.einsum("hs,hab,sb->a", softmax(logits, axis=-1), value, past)

    def determinant(u):
        columns = [(mean(u + step) - mean(u - step)) / 2e-6 for step in 1e-6 * np.eye(len(u))]
        return np.linalg.det(np.eye(len(u)) - np.stack(columns, 1))

    u, begin = noise, noise - mean(noise)
    for fraction in np.linspace(0, 1, points + 1):
        if determinant(u) < 0.05:
            return None
        target = begin + fraction * (noise - begin)
        found = root(lambda x, target=target: x - mean(x) - target, u, tol=1e-13)
        if np.abs(found.fun).max() > 1e-9:
            return None
        u = found.x
    return u if determinant(u) > 0.05 else None


def test_the_root_is_the_one_that_scipy_follows_from_the_noise():
    # Past the boundary as well: paths that come near det J = 0 are left out, on which either may jump.
    attention, noise = attention_of(0, 0.7), noise_of(3)[:12]
    embeddings, status = (np.asarray(x) for x in CausalAttentionTransform(attention).solve(noise))
    followed = 0
    for sequence in range(len(noise)):
        for i in range(1, noise.shape[1]):
            found = root_on_the_path(attention, embeddings[sequence, :i], noise[sequence, i])
            if found is not None:
                followed += 1
                assert status[sequence, i] == SolveStatus.CONVERGED
                np.testing.assert_allclose(embeddings[sequence, i], found, atol=1e-8)
    assert 0.3 < followed / (len(noise) * (noise.shape[1] - 1)) < 0.95


def residual_on_the_line(a, past, u):
    """d = 1: e(u) and e'(u) (..., k) at u (..., k) given the past (..., s), for query a and key 1."""
    weights = softmax(a * u[..., None] * past[..., None, :], axis=-1)
    mean = (weights * past[..., None, :]).sum(-1)
    return u - mean, 1 - a * ((weights * past[..., None, :] ** 2).sum(-1) - mean**2)


def path_on_the_line(a, past, noise):
    """d = 1: "start" where e' <= 0 at u = noise, "fold" where e' comes near 0 before the root, or the root."""
    (value,), (slope,) = residual_on_the_line(a, past, np.array([noise]))
    if slope <= 0:
        return "start"
    direction = np.sign(noise - value)
    grid = noise + direction * np.linspace(0, 2 * np.abs(past).max() + 1, 4001)
    value, slope = residual_on_the_line(a, past, grid)
    arrived = int(np.argmax(direction * (value - noise) >= 0))
    if slope[: arrived + 1].min() < 0.05:
        return "fold"
    if arrived == 0:
        return grid[0]
    ends = grid[arrived - 1 : arrived + 1]
    return brentq(lambda u: residual_on_the_line(a, past, np.array([u]))[0][0] - noise, *ends, xtol=1e-14)


@pytest.mark.parametrize("a", [-3.0, 4.0])
def test_on_the_line_the_root_is_the_one_at_the_end_of_the_path(a):
    attention = Attention(np.array([[[a]]]), np.ones((1, 1, 1)))
    noise = noise_of(1, SHAPES[0])
    embeddings, status = (np.asarray(x) for x in CausalAttentionTransform(attention).solve(noise))
    seen = {"start": 0, "fold": 0, "root": 0}
    for sequence in range(BATCH):
        for i in range(1, 4):
            found = path_on_the_line(a, embeddings[sequence, :i, 0], noise[sequence, i, 0])
            kind = found if isinstance(found, str) else "root"
            seen[kind] += 1
            if kind == "start":
                assert status[sequence, i] >= SolveStatus.PAST_BOUNDARY
            elif kind == "root":
                assert status[sequence, i] == SolveStatus.CONVERGED
                assert abs(embeddings[sequence, i, 0] - found) < 1e-10
    assert seen["root"] == 3 * BATCH if a < 0 else min(seen.values()) > 5


def test_the_draw_whose_path_jumped_to_another_branch_is_refused():
    process = EmbeddingProcess(Attention(np.ones((1, 1, 1)), np.ones((1, 1, 1))), 5, 1.0, 3.0)
    with pytest.raises(ImplicitSolveError, match=r"(past_boundary|not_converged) at position 4"):
        process.sample(jax.random.key(119))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_what_converged_did_not_jump_over_the_boundary_and_nothing_else_is_refused(dtype):
    # For d = 1 the path is the segment from the noise to the root, for as long as e' > 0.
    a, noise = 1.0, np.random.default_rng(7).normal(size=(1000, 6, 1))
    noise[:, 0] *= 3
    attention = Attention(np.full((1, 1, 1), a, dtype), np.ones((1, 1, 1), dtype))
    embeddings, status = (np.asarray(x) for x in CausalAttentionTransform(attention).solve(noise.astype(dtype)))
    refused = 0
    for i in range(1, 6):
        past, begin, end = embeddings[:, :i, 0].astype(float), noise[:, i], embeddings[:, i]
        _, slopes = residual_on_the_line(a, past, begin + (end - begin) * np.linspace(0, 1, 201))
        lowest = slopes.min(-1)
        assert (lowest[status[:, i] == SolveStatus.CONVERGED] > -0.02).all()
        for sequence in np.flatnonzero(status[:, i]):
            refused += 1
            found = path_on_the_line(a, past[sequence], noise[sequence, i, 0])
            assert isinstance(found, str), (sequence, i, found)
    assert refused > 200


def assert_statuses_are_true(attention, noise):
    embeddings, status = (np.asarray(x) for x in CausalAttentionTransform(attention).solve(noise))
    assert np.isfinite(embeddings).all()
    residual, sign, _ = (np.asarray(x) for x in prob_transformer.residual_and_log_det(attention, embeddings))
    allowed = residual_tolerance(np.float64) * (1 + np.abs(noise).max(-1))
    assert (np.abs(residual - noise).max(-1) <= allowed)[status != SolveStatus.NOT_CONVERGED].all()
    assert (sign[status == SolveStatus.CONVERGED] > 0).all()
    return status


def test_every_status_is_true_of_its_root():
    status = assert_statuses_are_true(attention_of(0, 1.5), noise_of(3))
    assert set(np.unique(status)) == {SolveStatus.CONVERGED, SolveStatus.PAST_BOUNDARY, SolveStatus.NOT_CONVERGED}


@settings(max_examples=25, deadline=None)
@given(
    *(arrays(float, (2, 2, 3), elements=st.floats(-4, 4)) for _ in range(2)),
    # Larger values let embeddings grow until the residual itself is rounding.
    arrays(float, (2, 3, 3), elements=st.floats(-0.5, 0.5)),
    st.integers(0, 1000),
    st.floats(0, 5),
)
def test_every_status_is_true_whatever_the_attention(query, key, value, seed, scale):
    assert_statuses_are_true(Attention(query, key, value), scale * noise_of(seed))


@pytest.mark.slow
def test_gradients_match_finite_differences_to_second_order():
    attention, noise = attention_of(3), jnp.asarray(noise_of(2)[0])

    @jax.jit
    def loss(scale, noise):
        scaled = Attention(scale * attention.query, attention.key, scale * attention.value)
        return jnp.sin(CausalAttentionTransform(scaled).solve(noise).embeddings).sum()

    def gradient(scale):
        return jax.value_and_grad(loss, (0, 1))(scale, noise)

    derivatives = jax.jit(lambda scale: jax.jvp(gradient, (scale,), (1.0,)))
    (_, (slope, noise_slope)), (forward_slope, (second, mixed)) = derivatives(1.0)
    np.testing.assert_allclose(forward_slope, slope, rtol=1e-9)
    direction = np.random.default_rng(9).normal(size=noise.shape)
    ends = [loss(1.0, noise + step * direction) for step in (1e-5, -1e-5)]
    np.testing.assert_allclose((noise_slope * direction).sum(), (ends[0] - ends[1]) / 2e-5, rtol=1e-7)
    (above, (above_slope, above_mixed)), (below, (below_slope, below_mixed)) = (
        derivatives(1 + step)[0] for step in (1e-5, -1e-5)
    )
    np.testing.assert_allclose(slope, (above - below) / 2e-5, atol=1e-7)
    np.testing.assert_allclose(second, (above_slope - below_slope) / 2e-5, rtol=1e-6)
    np.testing.assert_allclose(mixed, (above_mixed - below_mixed) / 2e-5, atol=1e-8)


@pytest.mark.slow
def test_a_long_sequence_is_one_scan_compiled_once():
    # Query = -key: the symmetric part of the interaction is negative semidefinite, so det J >= 1.
    rng = np.random.default_rng(5)
    key, noise = rng.normal(size=(1, 4, 16)), rng.normal(size=(1000, 16))
    transform = CausalAttentionTransform(Attention(-key, key), continuation_steps=4)
    before = module.solve_sequences._cache_size()
    embeddings, status = transform.solve(noise)
    again = CausalAttentionTransform(Attention(-2 * key, 2 * key), continuation_steps=4).solve(noise[::-1])
    assert module.solve_sequences._cache_size() == before + 1
    assert (status == SolveStatus.CONVERGED).all()
    assert (again.status == SolveStatus.CONVERGED).all()
    np.testing.assert_allclose(transform.inv(embeddings), noise, atol=1e-8)


def test_there_is_one_loop_over_positions_and_no_lapack_in_it():
    traced = module.solve_sequences.trace(attention_of(0), jnp.zeros((4, 6, 3)), 16)
    assert [eqn.params["length"] for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan"] == [6]
    assert "lapack" not in traced.lower().as_text()


def test_half_precision_is_solved_in_single():
    attention = attention_of(0, shape=SHAPES[0], dtype=np.float32)
    noise = jnp.asarray(noise_of(8, SHAPES[0]), jnp.bfloat16)
    embeddings, status = CausalAttentionTransform(attention).solve(noise)
    assert embeddings.dtype == jnp.bfloat16
    assert (status == SolveStatus.CONVERGED).all()
    single = CausalAttentionTransform(attention)(noise.astype(jnp.float32))
    np.testing.assert_array_equal(embeddings, single.astype(jnp.bfloat16))

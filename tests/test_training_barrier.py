import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer import Attention, barrier_penalty
from prob_transformer.kernels.tiling import Tiling
from tests.helpers import layers
from tests.helpers.plain_decoder import draw, jacobians

SEQUENCES, LENGTH, WIDTH = 2, 9, 5
# All but the capped one are swept.
LAYERS = {
    "swept": {"bias": True},
    "rotary": {"bias": True, "pairs": 2},
    "interleaved": {"pairs": 1, "interleaved": True},
    "window": {"window": 3},
    "normed": {"bias": True, "pairs": 1, "normed": True, "interleaved": True},
    "capped": {"pairs": 2, "normed": True, "cap": 2.0, "window": 5},
}


def problem(name, seed=7):
    plain = draw(seed, heads=4, groups=2, size=4, width=WIDTH, **LAYERS[name])
    return plain, np.random.default_rng(seed).normal(size=(SEQUENCES, LENGTH, WIDTH))


def layer_of(weights, plain):
    """The library's layer from the arrays that are trained, as a user's loss would make it."""
    query, key, query_bias, key_bias, query_gain = weights
    trained = {"query": query, "key": key, "query_bias": query_bias, "key_bias": key_bias, "query_gain": query_gain}
    return layers.layer_of(plain._replace(**trained), query.dtype)


def weights_of(plain, dtype=np.float64):
    weights = (plain.query, plain.key, plain.query_bias, plain.key_bias, plain.query_gain)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), weights)


def mean_penalty(plain):
    """The penalty of the layer as a function of its weights and inputs."""
    return lambda given: barrier_penalty([(layer_of(given[0], plain), given[1])]).mean


def determinants(plain, sequences):
    """Sign and log|det J_i| by the autodiff Jacobian of every head and position."""
    return np.linalg.slogdet(np.stack([np.eye(WIDTH) - jacobians(plain, inputs, False, False) for inputs in sequences]))


def truth(plain, sequences):
    """Mean barrier and share of negative signs."""
    sign, log_det = determinants(plain, sequences)
    return -log_det.mean(), (sign < 0).mean()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_value_and_negative_share_are_those_of_the_autodiff_jacobian(name, dtype):
    plain, sequences = problem(name)
    mean, share = truth(plain, sequences)
    assert 0 < share < 1
    found = jax.jit(lambda weights, inputs: barrier_penalty([(layer_of(weights, plain), inputs)]))(
        weights_of(plain, dtype), jnp.asarray(sequences, dtype)
    )
    assert found.mean.dtype == dtype
    np.testing.assert_allclose(found.mean, mean, rtol=2e-4 if dtype == np.float32 else 1e-10)
    np.testing.assert_allclose(found.negative_share, share, rtol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_worked_on_as_the_numbers_it_is(name, dtype):
    plain, sequences = problem(name)
    untrained = {"frequencies": plain.frequencies, "key_gain": plain.key_gain}
    plain = plain._replace(**jax.tree.map(lambda x: np.asarray(jnp.asarray(x, dtype), float), untrained))
    penalty = mean_penalty(plain)
    # Weights half as large keep every position away from the boundary, near which float32 itself loses digits.
    weights = jax.tree.map(lambda x: x / 2, weights_of(plain))
    narrow = jax.tree.map(lambda x: x.astype(dtype), (weights, jnp.asarray(sequences)))
    wide = jax.tree.map(lambda x: x.astype(np.float64), narrow)
    found, gradient = jax.value_and_grad(penalty)(narrow)
    expected, exact = jax.value_and_grad(penalty)(wide)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(exact))

    def compare(ours, theirs):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, float), theirs, rtol=jnp.finfo(dtype).eps, atol=2e-3 * largest)

    jax.tree.map(compare, gradient, exact)


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_in_weights_and_inputs_equals_finite_differences(name):
    plain, sequences = problem(name)
    given = (weights_of(plain), jnp.asarray(sequences))
    penalty = jax.jit(mean_penalty(plain))
    gradient = jax.grad(penalty)(given)
    rng = np.random.default_rng(0)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), given)
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, v: (g * v).sum(), gradient, direction)))
    step = 1e-6
    ends = [penalty(jax.tree.map(lambda x, v, s=s: x + s * v, given, direction)) for s in (step, -step)]
    assert np.isfinite(jax.tree.leaves(jax.tree.map(jnp.sum, gradient))).all()
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-6)


def test_blocks_and_their_padding_leave_no_trace():
    plain, _ = problem("rotary")
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(40, WIDTH)))
    found = barrier_penalty([(layer_of(weights_of(plain), plain), inputs)])
    mean, share = truth(plain, np.asarray(inputs)[None])
    np.testing.assert_allclose(found[:2], (mean, share), rtol=1e-10)


def test_layers_count_by_their_places():
    rotary, first = problem("rotary")
    swept, second = problem("swept", seed=4)
    third = second[:1, :6] + 1
    pairs = [(rotary, first), (swept, second), (swept, third)]
    found = barrier_penalty([(layer_of(weights_of(p), p), jnp.asarray(x)) for p, x in pairs])
    places = np.array([x.shape[0] * x.shape[1] for _, x in pairs])
    expected = np.array([truth(p, x) for p, x in pairs])
    np.testing.assert_allclose(found[:2], places @ expected / places.sum(), rtol=1e-10)


@pytest.mark.parametrize("name", ["rotary", "capped"])
def test_the_one_sided_form_is_its_formula_of_the_autodiff_determinants(name):
    plain, sequences = problem(name)
    sign, log_det = determinants(plain, sequences)
    x = log_det - np.log(0.8)
    inside = np.where(x < 0, -x * np.exp(1 / np.where(x < -1e-3, x, -1e-3)), 0)
    largest = np.log(0.8) - np.log(np.finfo(float).smallest_subnormal)
    expected = np.where(sign > 0, inside, largest * (1 + np.logaddexp(x, 0)))
    assert ((inside > 1e-3) & (sign > 0)).any()
    layer = layer_of(weights_of(plain), plain)
    found = barrier_penalty([(layer, jnp.asarray(sequences))], form="one-sided", threshold=0.8)
    np.testing.assert_allclose(found.mean, expected.mean(), rtol=1e-9)
    assert found.variance == 0


def test_a_share_is_unbiased_and_its_variance_that_of_the_draws():
    plain, _ = problem("rotary")
    sequences = jnp.asarray(np.random.default_rng(2).normal(size=(3, 12, WIDTH)))
    pairs = [(layer_of(weights_of(p), p), sequences) for p in (plain, draw(8, heads=4, groups=2, size=4, width=WIDTH))]
    exact = barrier_penalty(pairs)
    keys = jax.random.split(jax.random.key(0), 3000)
    draws = jax.jit(jax.vmap(lambda key: barrier_penalty(pairs, share=0.25, key=key, tiling=Tiling(8, 8))))(keys)
    error = draws.mean.std() / np.sqrt(len(keys))
    assert abs(draws.mean.mean() - exact.mean) < 4 * error
    assert abs(draws.variance.mean() / draws.mean.var() - 1) < 0.15


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"form": "both"}, "form: got 'both'; pass one of two-sided, one-sided"),
        ({"share": 0.0}, "share: got 0.0; pass a share"),
        ({"share": 0.5}, "key: got None; pass one JAX random key"),
        ({"share": 0.5, "form": "one-sided"}, "share: got 0.5; the one-sided penalty"),
        ({"threshold": 0.0}, "threshold: got 0.0"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_by_name(asked, message):
    plain, sequences = problem("swept")
    with pytest.raises(ValueError, match=message):
        barrier_penalty([(layer_of(weights_of(plain), plain), sequences)], **asked)


@pytest.mark.parametrize(
    ("query", "window", "past", "expected"),
    [
        # The past -1 and 1 attended evenly has variance 1, so det J = 1 - 1 at the third of three positions.
        (1.0, None, (-1.0, 1.0), (np.inf, 1 / 3)),
        (1.0, 3, (-1.0, 1.0), (np.inf, 1 / 3)),
        # det(I - A Cov) by hand: one head, d = 1, past (0, 2), the third token at 0 attends evenly.
        (1.5, None, (0.0, 2.0), (-np.log(abs(1 - 1.5 * 1.0)) / 3, 1 / 3)),
    ],
    ids=["on the boundary", "on the boundary in a window", "past it"],
)
def test_a_plain_layer_is_read_by_its_own_weights_and_a_position_on_the_boundary_counts(query, window, past, expected):
    layer = Attention(jnp.full((1, 1, 1), query), jnp.ones((1, 1, 1)), window=window)
    found = barrier_penalty([(layer, jnp.array([*past, 0.0])[:, None])])
    np.testing.assert_allclose(found[:2], expected, rtol=1e-12)


@pytest.mark.parametrize("form", ["two-sided", "one-sided"])
def test_a_layer_of_two_precisions_is_worked_on_in_the_wider_one(form):
    weights = np.random.default_rng(1).normal(size=(2, 2, 2, 3))
    inputs = np.random.default_rng(2).normal(size=(6, 3))
    narrow = [jnp.asarray(x, jnp.float32) for x in (*weights, inputs)]
    bias = np.ones((2, 2))
    mixed = barrier_penalty([(Attention(*narrow[:2], key_bias=bias), narrow[2])], form=form)
    wide = [np.asarray(x, np.float64) for x in narrow]
    expected = barrier_penalty([(Attention(*wide[:2], key_bias=bias), wide[2])], form=form)
    np.testing.assert_allclose(mixed.mean, expected.mean, rtol=1e-14)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (lambda layer, u: [(u, layer)], r"layer 0: got .*; pass a pair"),
        (lambda layer, u: [layer], r"layer 0: got .*; pass a pair"),
        (lambda layer, u: [(layer,)], r"layer 0: got .*; pass a pair"),
        (lambda layer, u: [], "layers: got none"),
        (lambda layer, u: [(layer, u), (layer, u[..., :3])], "layer 1: inputs: has shape"),
        (lambda layer, u: [(layer, u[:0])], r"layer 0: inputs: has shape .*; pass at least one sequence"),
        (lambda layer, u: [(layer, u[:, :1])], "layer 0: inputs: has n = 1"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(pairs, message):
    plain, sequences = problem("swept")
    with pytest.raises(ValueError, match=message):
        barrier_penalty(pairs(layer_of(weights_of(plain), plain), sequences))

"""The process of any strict layer, heads taken together: biases, key groups, norms, rotary positions, window, cap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from prob_transformer import (
    CausalAttentionTransform,
    EmbeddingProcess,
    certified_radius,
    conditioning_margin,
    jacobian_block,
    residual_and_log_det,
)
from tests.helpers.layers import layer_of
from tests.helpers.plain_decoder import draw, jacobians, mean_at, rotation

LAYERS = {
    "rotary": {"inner": 3, "pairs": 2, "bias": True},
    "interleaved": {"inner": 2, "pairs": 1, "interleaved": True, "window": 3},
    "normed": {"inner": 3, "pairs": 2, "bias": True, "normed": True, "interleaved": True},
    "capped": {"inner": 2, "bias": True, "cap": 1.5},
    "all": {"inner": 3, "pairs": 2, "bias": True, "normed": True, "cap": 2.0, "window": 4},
}
LENGTH, WIDTH = 7, 5


def problem(name, strength=0.6):
    plain = draw(3, heads=4, groups=2, size=4, width=WIDTH, **LAYERS[name])
    plain = plain._replace(value=strength * plain.value)
    return plain, layer_of(plain), np.random.default_rng(5).normal(size=(LENGTH, WIDTH))


def dense(plain, inputs):
    """Residuals and Jacobian blocks of all heads together, from the plain layer."""
    rotations = np.stack([rotation(plain, s) for s in range(LENGTH)])
    heads = range(plain.query.shape[0])
    means = [
        sum(mean_at(plain, True, rotations, jnp.asarray(inputs), False, h, i, inputs[i]) for h in heads)
        for i in range(LENGTH)
    ]
    return inputs - np.stack(means), np.eye(WIDTH) - jacobians(plain, inputs, True, False).sum(0)


@pytest.mark.parametrize("name", LAYERS)
def test_density_and_jacobian_are_those_of_the_whole_layer(name):
    plain, layer, inputs = problem(name)
    residual, blocks = dense(plain, inputs)
    sign, log_det = np.linalg.slogdet(blocks)
    assert np.abs(log_det).max() > 0.1
    np.testing.assert_allclose(jacobian_block(layer, inputs), blocks, atol=1e-12)
    found = residual_and_log_det(layer, inputs)
    np.testing.assert_allclose(found.residual, residual, atol=1e-12)
    np.testing.assert_array_equal(found.sign, sign)
    np.testing.assert_allclose(found.log_det, log_det, atol=1e-12)
    scale = np.where(np.arange(LENGTH) == 0, 1.5, 0.5)[:, None]
    expected = norm.logpdf(residual, 0, scale).sum(-1) + log_det
    process = EmbeddingProcess(layer, LENGTH, 0.5, 1.5)
    np.testing.assert_allclose(process.position_log_prob(inputs), expected, atol=1e-11)
    past, one_by_one = process.empty_past(), []
    for embedding in inputs:
        density, past = process.extend(past, embedding)
        one_by_one.append(density)
    np.testing.assert_allclose(one_by_one, expected, atol=1e-11)


@pytest.mark.parametrize("name", LAYERS)
def test_noise_to_embeddings_and_back(name):
    _, layer, noise = problem(name, strength=0.1)
    embeddings = CausalAttentionTransform(layer)(noise)
    np.testing.assert_allclose(residual_and_log_det(layer, embeddings).residual, noise, atol=1e-8)


@pytest.mark.parametrize("name", [name for name in LAYERS if "cap" not in LAYERS[name]])
def test_the_blocked_sweep_gives_the_same_values_and_gradients(name):
    _, layer, inputs = problem(name)

    def total(density, layer, inputs):
        residual, _, log_det = density(layer, inputs)
        weights = jnp.arange(1.0, LENGTH + 1)
        return (weights * (log_det + jnp.sin(residual).sum(-1))).sum()

    found, expected = (
        jax.value_and_grad(lambda layer, inputs, density=density: total(density, layer, inputs), (0, 1))(layer, inputs)
        for density in (partial(residual_and_log_det, implementation="blocked"), residual_and_log_det)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10), found, expected)


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("capped", partial(residual_and_log_det, implementation="blocked"), "attention: has a cap"),
        ("rotary", partial(conditioning_margin, key=jax.random.key(0)), "attention: has rotary positions"),
        ("capped", certified_radius, "attention: has a norm or a cap"),
        ("normed", certified_radius, "attention: has a norm or a cap"),
    ],
)
def test_layers_that_a_method_does_not_cover_are_refused_by_name(name, function, message):
    _, layer, inputs = problem(name)
    with pytest.raises(ValueError, match=message):
        function(layer, inputs)

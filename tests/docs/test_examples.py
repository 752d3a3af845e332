"""The examples of docs/own_model.md, a few steps each."""

import importlib.util
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

FOLDER = Path(__file__).parents[2] / "docs/examples"


@pytest.fixture(scope="module", params=["equinox_model", "flax_nnx_model"])
def example(request):
    spec = importlib.util.spec_from_file_location(request.param, FOLDER / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_penalty_keeps_heads_from_the_boundary(example):
    found = example.compare(steps=60)
    without, with_penalty = found[0.0], found[0.05]
    assert with_penalty["smallest margin"] > without["smallest margin"]
    assert with_penalty["negative share"] <= without["negative share"]
    # It is a minor addition to the loss, not another task.
    assert with_penalty["loss"] < without["loss"] + 0.3


def parts(example):
    """The model's trained arrays in float64, and how they become a model again."""
    if example.__name__ == "equinox_model":
        arrays, rest = eqx.partition(example.Transformer(jax.random.key(3), example.CONFIG), eqx.is_inexact_array)
        return arrays, lambda given: eqx.combine(given, rest)
    whole = example.Decoder(nnx.Rngs(3))
    # Flax's embeddings hand out the dtype they were made in, whatever they hold later.
    whole.embedding.dtype = whole.places.dtype = jnp.float64
    definition, state = nnx.split(whole)
    return state, lambda given: nnx.merge(definition, given)


def test_the_gradient_of_the_whole_loss_equals_finite_differences(example):
    arrays, model = parts(example)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64) if eqx.is_inexact_array(x) else x, arrays)
    tokens = example.batch(jax.random.key(2))[:2]

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(given):
        return example.loss(model(given), tokens, 2.0)[0]

    rng = np.random.default_rng(1)
    direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), arrays)
    _, gradient = loss_and_gradient(arrays)
    along = sum((g * v).sum() for g, v in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True))
    # Flax makes the softmax of its attention in float32, whatever comes in.
    step = 1e-4
    ends = [loss_and_gradient(jax.tree.map(lambda x, v, s=s: x + s * v, arrays, direction))[0] for s in (step, -step)]
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / (2 * step), rtol=1e-4)

"""Layers of Qwen3 and Gemma 2 against transformers and autograd: layers.npz and the command that makes it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer import Attention, RMSNorm, Rotary, barrier_penalty, layer_margins
from prob_transformer.pretrained.decoder import attention_logits

STORED = np.load(Path(__file__).parent / "layers.npz")
LAYERS = sorted({name.split("/")[0] for name in STORED})


def stored(layer):
    return {name.split("/")[1]: STORED[name] for name in STORED if name.startswith(f"{layer}/")}


def attention_of(found):
    norms = {
        f"{name}_norm": RMSNorm(jnp.asarray(found[f"{name}_gain"]), float(found["epsilon"]))
        for name in ("query", "key")
        if f"{name}_gain" in found
    }
    return Attention(
        *(found[name] for name in ("query", "key", "value", "output")),
        rotary=Rotary(found["frequencies"]),
        window=int(found["window"]) if "window" in found else None,
        scale=float(found["scale"]),
        cap=float(found["cap"]) if "cap" in found else None,
        **norms,
    )


def test_the_layers_have_what_they_are_there_for():
    has = {layer: {name for name in ("query_gain", "cap", "window") if name in stored(layer)} for layer in LAYERS}
    assert has == {"gemma2.0": {"cap", "window"}, "gemma2.1": {"cap"}, "qwen3.0": {"query_gain"}}


@pytest.mark.parametrize("layer", LAYERS)
def test_logits_are_those_of_transformers(layer):
    found = stored(layer)
    # transformers makes norms and rotations in float32.
    np.testing.assert_allclose(attention_logits(attention_of(found), found["inputs"]), found["logits"], atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("own", [False, True])
def test_margins_are_those_of_autograd(layer, own):
    found = stored(layer)
    margins = layer_margins(
        attention_of(found), found["inputs"], values="own" if own else "identity", self_inclusive=own
    )
    np.testing.assert_array_equal(margins.sign, found["sign"][int(own)])
    np.testing.assert_allclose(margins.log_det, found["log_det"][int(own)], atol=1e-4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_penalty_is_the_mean_over_all_layers(dtype):
    layers = [(attention_of(stored(layer)), stored(layer)["inputs"]) for layer in LAYERS]
    cast = jax.tree.map(lambda x: jnp.asarray(x, dtype), layers)
    log_det = np.concatenate([stored(layer)["log_det"][0].ravel() for layer in LAYERS])
    sign = np.concatenate([stored(layer)["sign"][0].ravel() for layer in LAYERS])
    found = barrier_penalty(cast)
    np.testing.assert_allclose(found.mean, -log_det.mean(), atol=1e-4)
    np.testing.assert_allclose(found.negative_share, (sign < 0).mean(), rtol=1e-6)

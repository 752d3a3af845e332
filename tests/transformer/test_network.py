"""The transformer as a network: the scale of new weights, and which tokens it reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prob_transformer.transformer import TokenProcess, Transformer, TransformerConfig

SMALL = TransformerConfig(vocabulary=5, context=30, layers=1, width=4, heads=1)


def test_new_weights_have_the_standard_deviations_of_the_docstring():
    layers, width, hidden = 3, 40, 60
    model = Transformer(jax.random.key(0), TransformerConfig(50, 30, layers, width, 4, 20, hidden), jnp.float64)
    deep = 2 * layers
    expected = {
        **dict.fromkeys(("query", "key", "value", "up"), width**-0.5),
        "output": (deep * width) ** -0.5,
        "down": (deep * hidden) ** -0.5,
    }
    for name, sd in expected.items():
        drawn = np.concatenate([np.ravel(getattr(block, name)) for block in model.blocks])
        # Six standard errors.
        np.testing.assert_allclose(drawn.std(), sd, rtol=6 / np.sqrt(2 * drawn.size))
    for drawn, sd in ((model.head, width**-0.5), (model.token_embedding, 0.1), (model.position_embedding, 0.1)):
        np.testing.assert_allclose(np.std(drawn), sd, rtol=6 / np.sqrt(2 * drawn.size))


@pytest.mark.parametrize("tokens", [[], 3, [[0, 1], [2, 3]], [0] * 31])
def test_a_transformer_refuses_what_is_not_one_text_within_its_context(tokens):
    model = Transformer(jax.random.key(1), SMALL)
    with pytest.raises(ValueError, match=r"tokens: has shape \(.*\); pass one text \(n,\), n from 1 to .* 30"):
        model(tokens)
    assert model([0] * 30).shape == (30, 5)


@pytest.mark.parametrize("traced", [lambda function: function, jax.jit], ids=["plain", "jit"])
def test_known_tokens_outside_the_vocabulary_are_refused_inside_a_trace_too(traced):
    model = Transformer(jax.random.key(1), SMALL)
    with pytest.raises(ValueError, match=r"tokens: contains tokens outside 0\.\.4"):
        traced(lambda: model(np.array([0, 9], np.uint8)))()
    with pytest.raises(ValueError, match=r"prompt: contains tokens outside 0\.\.4"):
        traced(lambda key: TokenProcess(model, [0, 9], 2).sample(key))(jax.random.key(3))
    with pytest.raises(ValueError, match="tokens: got a list that forms no array"):
        traced(lambda a: model([[a, 1], [2]]))(jnp.asarray(0))
    # Tokens that a trace computes are not known.
    assert jax.jit(lambda a, b: model([a, b]))(0, 1).shape == (2, 5)

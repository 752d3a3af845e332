"""Each site of the NumPyro model alone against a documented number or plain NumPy: priors, barrier, drawn texts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro import handlers

from prob_transformer.transformer import (
    HeadBarrier,
    transformer_model,
)
from tests.helpers.tiny_transformer import UNEQUAL
from tests.transformer.test_dense_transformer import (
    SIZES,
    WEIGHT,
    weights,  # noqa: F401
    windows,  # noqa: F401
)
from theory_checks.truth import transformer as dense_transformer

PREFIX = "transformer/"


def sites_of(*tokens, known=None, **given):
    """The sites of one seeded run of the model, where `known` weights replace those that it draws."""
    model = handlers.seed(partial(transformer_model, **given), jax.random.key(0))
    data = {f"{PREFIX}{name}": jnp.asarray(value) for name, value in (known or {}).items()}
    return handlers.trace(handlers.substitute(model, data=data)).get_trace(*tokens)


def test_default_priors_have_the_documented_means_and_scales():
    """Maps have N(0, 1 / inputs), embeddings and the biases of norms N(0, 1), the scales of norms N(1, 1)."""
    expected = {
        "_embedding": (0, 1),
        "norm.scale": (1, 1),
        "norm.bias": (0, 1),
        ".query": (0, 1 / 2),
        ".key": (0, 1 / 2),
        ".value": (0, 1 / 2),
        ".output": (0, 6**-0.5),
        ".up": (0, 1 / 2),
        ".down": (0, 1 / 3),
        "head": (0, 1 / 2),
    }
    sites = sites_of(jnp.zeros((2, 4), int), config=UNEQUAL)
    priors = {name: site["fn"] for name, site in sites.items() if name.startswith(PREFIX)}
    # Two embeddings, the head, query and key of the prior stage, two arrays of the last norm, ten of each layer.
    assert len(priors) == 2 + 1 + 2 + 2 + 2 * 10
    for name, prior in priors.items():
        [(mean, scale)] = [value for ending, value in expected.items() if name.endswith(ending)]
        np.testing.assert_allclose(prior.mean, mean, atol=1e-7, err_msg=name)
        np.testing.assert_allclose(prior.variance, scale**2, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("site", ["embedding", "layers"])
def test_recorded_barriers_are_the_mean_penalty_and_the_share_of_negative_determinants(weights, windows, site):  # noqa: F811
    """Both sites are means over sequences, heads and positions: of -log|det J_i|, and of whether det J_i < 0."""
    blocks = []
    for row in windows:
        embeddings = dense_transformer.embed(weights, row[:-1])
        if site == "embedding":
            heads = [(weights["prior_stage.query"], weights["prior_stage.key"], embeddings)]
        else:
            inputs = dense_transformer.forward(weights, embeddings)[1]
            heads = [
                (weights[f"{layer}query"][[h]], weights[f"{layer}key"][[h]], x)
                for layer, x in zip(dense_transformer.layer_names(weights), inputs, strict=True)
                for h in range(SIZES.heads)
            ]
        blocks += [dense_transformer.jacobian_blocks(query, key, None, x) for query, key, x in heads]
    sign, log_det = np.linalg.slogdet(np.stack(blocks))
    assert 0 < (sign < 0).mean() < 1
    found = sites_of(
        jnp.asarray(windows), known=weights, config=SIZES, barrier_weight=WEIGHT, penalty=HeadBarrier(site)
    )
    np.testing.assert_allclose(found["barrier_mean"]["value"], -log_det.mean(), rtol=1e-10)
    np.testing.assert_allclose(found["barrier_negative_share"]["value"], (sign < 0).mean(), rtol=1e-12)


@pytest.mark.parametrize(
    ("latents", "shortest", "message"),
    [
        ("table", 3, r"tokens: has shape \(2, 2\); pass 3 to 9"),
        ("process", 2, r"tokens: has shape \(2, 1\); pass 2 to 8"),
    ],
)
def test_sequences_have_at_least_two_positions(latents, shortest, message):
    """A sequence of a table has one token more than positions, because its first token is given."""
    given = {"config": UNEQUAL, "latents": latents}
    assert len(sites_of(jnp.zeros((2, shortest), int), **given)["tokens"]["value"]) == 2
    with pytest.raises(ValueError, match=message):
        sites_of(jnp.zeros((2, shortest - 1), int), **given)


@pytest.mark.parametrize("attention", ["free", "tied"])
def test_a_text_drawn_from_the_process_has_the_laws_of_its_embeddings_and_tokens(attention):
    """The drawn embeddings have the density with these two scales, and the decoder reads the embeddings in order."""
    scales = {"noise_scale": 0.2, "first_scale": 0.8}
    sites = sites_of(
        config=UNEQUAL,
        priors=dist.Normal(jnp.zeros(()), 0.25),
        latents="process",
        attention=attention,
        length=5,
        dtype=jnp.float64,
        **scales,
    )
    drawn = {name.removeprefix(PREFIX): np.asarray(s["value"]) for name, s in sites.items() if name.startswith(PREFIX)}
    stage = "prior_stage." if attention == "free" else "blocks[0]."
    value_map = None if attention == "free" else dense_transformer.value_maps(drawn, stage)
    embeddings = np.asarray(sites["embeddings"]["value"])
    expected = dense_transformer.process_log_density(
        drawn[f"{stage}query"], drawn[f"{stage}key"], embeddings, **scales, value_map=value_map
    )
    np.testing.assert_allclose(sites["embeddings"]["fn"].log_prob(embeddings), expected, rtol=1e-10)
    logits = dense_transformer.forward(drawn, embeddings)[0]
    assert np.abs(logits - logits[::-1]).max() > 0.01
    emission = sites["tokens"]["fn"]
    for token in range(UNEQUAL.vocabulary):
        of_all = np.log(dense_transformer.softmax(logits))[:, token]
        found = emission.base_dist.log_prob(jnp.full(5, token))
        np.testing.assert_allclose(found, of_all, rtol=1e-10)

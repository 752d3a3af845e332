"""Kolmogorov consistency of the transformer's tokens: enumeration of texts, latents in a table and from the process."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpyro.infer.util import log_density

from prob_transformer.transformer import TransformerConfig, transformer_model
from tests.helpers.shrinking_cases import safe_cases, shrinking_weights
from theory_checks.check import quick_jit
from theory_checks.claims.kolmogorov import reach, sheared
from theory_checks.claims.token_consistency import (
    SeesAhead,
    all_texts,
    marginal_error,
    table_extension,
    table_law,
    true_steps,
)
from theory_checks.drawn_cases import Shape
from theory_checks.drawn_transformers import draw_weights, sites_of, transformer_of
from theory_checks.truth import transformer as truth
from theory_checks.truth.quadrature import integrate

ROUNDING = 1e-10
NOISE_SCALE, FIRST_SCALE = 1.0, 1.5
# As in test_kolmogorov.py: embeddings at most one deviation of the noise from 0, and 1e-10 of its mass left out.
NEAR_ZERO = st.integers(-4, 4).map(lambda quarters: quarters / 4)
EXTENT, QUADRATURE, TOLERANCE = 6.5, 1e-8, 1e-6


def sizes(vocabulary, width=3):
    return TransformerConfig(vocabulary, 6, layers=2, width=width, heads=1, head_size=2, hidden=2)


# Embeddings of two coordinates each, so that an integral over one of them is quick.
PLANE = sizes(2, width=2)


@st.composite
def splits_of_texts(draw):
    """Weights of a vocabulary of two or three, and the lengths of a prefix and of the whole text."""
    vocabulary = draw(st.integers(2, 3))
    kept, length = draw(st.sampled_from(((1, 2), (1, 6), (2, 3), (3, 6), (5, 6))))
    return vocabulary, draw(shrinking_weights(sizes(vocabulary))), kept, length


@settings(max_examples=50)
@given(split=splits_of_texts())
def test_with_latents_in_a_table_the_laws_of_all_lengths_are_one_process(split):
    vocabulary, weights, kept, length = split
    transformer = transformer_of(weights, sizes(vocabulary))
    texts = all_texts(vocabulary, length)
    whole = np.asarray(table_law(transformer, texts, 1))
    shorter = true_steps(weights, all_texts(vocabulary, kept)).sum(axis=1)
    assert marginal_error(whole, shorter) < ROUNDING
    # Any split, and one token at a time with the cache.
    after = np.asarray(table_law(transformer, texts, kept))
    np.testing.assert_allclose(
        np.repeat(shorter, len(after) // len(shorter)) + after, whole, rtol=ROUNDING, atol=ROUNDING
    )
    extended = np.asarray(table_extension(transformer, texts)).sum(axis=1)
    np.testing.assert_allclose(extended, whole, rtol=ROUNDING, atol=ROUNDING)


@functools.partial(quick_jit, static_argnames="config")
def log_joint(sites, sequences, embeddings, config):
    """log p(u, x, weights) by the model, of embeddings (m, n, 2) with each of the texts (k, n), as (m, k)."""
    options = {"latents": "process", "noise_scale": NOISE_SCALE, "first_scale": FIRST_SCALE, "priors": dist.Normal()}

    def one(embeddings, tokens):
        values = sites | {"embeddings": embeddings[None]}
        return log_density(transformer_model, (tokens[None],), {"config": config, **options}, values)[0]

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(embeddings, sequences)


@settings(max_examples=15)
@given(
    case=st.one_of(*(safe_cases((Shape(1, 2, 2, kept, False),), NEAR_ZERO) for kept in (1, 2))),
    weights=shrinking_weights(PLANE),
    data=st.data(),
)
def test_with_latents_from_the_process_the_last_position_marginalises(case, weights, data):
    """Texts of two and three tokens, the last one summed and its embedding integrated out at every prefix."""
    kept = len(case.embeddings)
    tokens = data.draw(st.lists(st.integers(0, 1), min_size=kept, max_size=kept))
    weights = weights | {"prior_stage.query": case.query, "prior_stage.key": case.key}
    del weights["token_embedding"], weights["position_embedding"]
    shorter = truth.log_prior(weights, dict.fromkeys(weights, (0.0, 1.0)))
    shorter += truth.process_log_density(case.query, case.key, case.embeddings, NOISE_SCALE, FIRST_SCALE)
    shorter += truth.emission_log_probability(weights, [case.embeddings], np.array([tokens]))
    edge = np.repeat(reach(case.attention, case.embeddings, 1, EXTENT * NOISE_SCALE), 2)
    sequences = np.array([[*tokens, last] for last in range(2)])

    def ratio(offsets):
        embeddings = sheared(case.embeddings, jnp.asarray(offsets)[:, None])
        # The sum over the last token first: of each of them LayerNorm makes nearly a step, which quadrature would miss.
        return jnp.exp(log_joint(sites_of(weights), sequences, embeddings, PLANE) - shorter).sum(axis=1)

    found = integrate(ratio, -edge, edge, tolerance=QUADRATURE, confirm=False)
    assert abs(found.value.sum() - 1) + found.error.sum() < TOLERANCE


@pytest.mark.parametrize("vocabulary", [2, 3])
def test_the_enumeration_notices_a_decoder_that_sees_ahead(vocabulary):
    weights = draw_weights(np.random.default_rng(0), sizes(vocabulary))
    transformer = transformer_of(weights, sizes(vocabulary))
    for decoder, disagree in ((transformer, False), (SeesAhead(transformer), True)):
        whole, shorter = (table_law(decoder, all_texts(vocabulary, length), 1) for length in (4, 3))
        assert (marginal_error(whole, shorter) > 0.01) == disagree

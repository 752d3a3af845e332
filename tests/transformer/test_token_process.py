"""The law of the tokens after a prompt, against enumeration of texts and against the model's likelihood."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
from numpyro.infer import log_likelihood
from scipy.stats import chi2

from prob_transformer.transformer import TokenProcess, Transformer, TransformerConfig, transformer_model
from prob_transformer.transformer.weight_sites import weights_of
from tests.helpers.tiny_transformer import TINY, UNEQUAL, strong


def all_texts(length):
    return jnp.asarray(list(itertools.product(range(TINY.vocabulary), repeat=length)))


@pytest.mark.parametrize("length", [1, 3, 5])
def test_the_token_process_has_mass_one_and_prefixes_marginalise(length):
    """Kolmogorov consistency by enumeration of all texts: of the law of the tokens given the first."""
    prompt = jnp.asarray([2])
    process = TokenProcess(strong(), prompt, length)
    mass = np.exp(process.log_prob(all_texts(length))).reshape((TINY.vocabulary,) * length)
    np.testing.assert_allclose(mass.sum(), 1, rtol=1e-12)
    for shorter in range(1, length):
        marginal = mass.reshape(TINY.vocabulary**shorter, -1).sum(1)
        expected = np.exp(TokenProcess(strong(), prompt, shorter).log_prob(all_texts(shorter)))
        np.testing.assert_allclose(marginal, expected, rtol=1e-12)


def test_the_density_of_the_token_process_is_that_of_the_model():
    transformer = strong()
    text = jnp.asarray([[2, 0, 1, 1, 2], [2, 2, 0, 1, 0]])
    given = {"config": TINY, "priors": dist.Normal(), "dtype": jnp.float64}
    found = log_likelihood(transformer_model, jax.tree.map(lambda x: x[None], weights_of(transformer)), text, **given)[
        "tokens"
    ]
    expected = TokenProcess(transformer, jnp.asarray([2]), 4).log_prob(text[:, 1:])
    np.testing.assert_allclose(found[0], expected, rtol=1e-12)
    assert found.shape == (1, 2)


def test_draws_of_the_token_process_follow_its_density():
    """Pearson's statistic over all 27 texts stays below the quantile that a right sampler exceeds once in a million."""
    process = TokenProcess(strong(), jnp.asarray([0]), 3)
    count, texts = 20_000, all_texts(3)
    drawn = jax.jit(lambda key: process.sample(key, (count,)))(jax.random.key(5))
    expected = count * np.exp(process.log_prob(texts))
    observed = np.bincount(np.asarray(drawn) @ [9, 3, 1], minlength=27)
    rare = expected < 5
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (observed, expected)]
    statistic = ((pooled[0] - pooled[1]) ** 2 / pooled[1]).sum()
    assert statistic < chi2.isf(1e-6, len(pooled[0]) - 1)


@pytest.mark.parametrize("prompt_length", [1, 3, 8])
def test_the_longest_text_after_a_prompt_fills_the_positions_but_for_its_last_token(prompt_length):
    """With a context of 8, m + length - 1 <= 8, so the longest length is 9 - m."""
    transformer, prompt = Transformer(jax.random.key(0), UNEQUAL), jnp.zeros(prompt_length, int)
    longest = 9 - prompt_length
    assert TokenProcess(transformer, prompt, longest).event_shape == (longest,)
    with pytest.raises(ValueError, match=rf"prompt: has shape \({prompt_length},\) with length {longest + 1}"):
        TokenProcess(transformer, prompt, longest + 1)


def test_the_support_of_a_text_is_the_vocabulary():
    """Of a vocabulary of 7, the tokens 0 to 6 are in the support, and a text with another number is not."""
    support = TokenProcess(Transformer(jax.random.key(0), UNEQUAL), jnp.asarray([0]), 2).support
    numbers = np.arange(-2, 14)
    for texts in (np.stack([numbers, 0 * numbers], 1), np.stack([0 * numbers, numbers], 1)):
        assert numbers[np.asarray(support(texts))].tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(3, int), r"value: has shape \(3,\); pass \(..., n\), n = 2"),
        (np.zeros((), int), r"value: has shape \(\); pass \(..., n\), n = 2"),
        (np.zeros(2), r"value: has shape \(2,\) and dtype float64; pass integers"),
        (np.zeros((0, 2)), r"value: has shape \(0, 2\) and dtype float64; pass integers"),
    ],
)
def test_the_law_of_tokens_refuses_what_is_no_continuation(value, message):
    with pytest.raises(ValueError, match=message):
        TokenProcess(strong(), [0, 1], 2).log_prob(value)


def test_the_law_of_tokens_takes_integers_too_narrow_for_the_vocabulary():
    model = Transformer(jax.random.key(1), TransformerConfig(300, 4, layers=1, width=4, heads=1))
    law = TokenProcess(model, [1, 2], 3)
    exact = jax.nn.log_softmax(model([1, 2, 7, 2])[1:])[jnp.arange(3), jnp.array([7, 2, 100])].sum()
    for dtype in (np.int8, np.uint8, np.int64, np.uint64):
        np.testing.assert_allclose(law.log_prob(np.array([7, 2, 100], dtype)), exact, rtol=1e-6)


@pytest.mark.parametrize("key", [None, 0, jax.random.split(jax.random.key(3), 3)])
def test_the_law_of_tokens_refuses_what_is_no_key(key):
    with pytest.raises(ValueError, match=r"key: got .*; pass one JAX random key"):
        TokenProcess(strong(), [0, 1], 2).sample(key)

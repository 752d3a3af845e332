"""Continued texts against passes over the whole text so far, which keep nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import chisquare

from prob_transformer.pretrained.generation import continue_texts
from prob_transformer.pretrained.load import load_pretrained
from tests.helpers.tiny_models import GPT2, LLAMA, gpt2_weights, llama_weights, write

MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 4}
PROMPTS = np.random.default_rng(0).integers(0, 260, (2, 5))


@pytest.fixture(scope="module", params=["llama", "mistral with a window", "gpt2"])
def decoder(request, tmp_path_factory):
    config = {"llama": LLAMA, "gpt2": GPT2}.get(request.param, MISTRAL)
    weights = gpt2_weights(config) if request.param == "gpt2" else llama_weights(config)
    return load_pretrained(str(write(tmp_path_factory.mktemp(request.param) / "model", config, weights))).decoder


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_greedy_texts_take_the_largest_logit_of_the_plain_forward_pass(decoder):
    steps = list(continue_texts(decoder, PROMPTS, 20, keys=keys_of(2), temperature=0))
    assert len(steps) == 20
    for row, prompt in enumerate(PROMPTS):
        text = list(prompt)
        for step in steps:
            logs = log_softmax(np.asarray(decoder(np.array(text)), np.float64)[-1])
            assert step.tokens[row] == logs.argmax()
            np.testing.assert_allclose(step.log_probs[row], logs.max(), rtol=1e-3, atol=1e-4)
            text.append(int(logs.argmax()))


@pytest.mark.parametrize(("temperature", "top_k"), [(0.5, 2), (2.0, 3)])
def test_two_tokens_have_their_joint_law_at_the_temperature_among_the_top_k(decoder, temperature, top_k):
    count = 3000
    prompts = np.repeat(PROMPTS[:1], count, axis=0)
    given = {"temperature": temperature, "top_k": top_k}
    drawn = np.stack([step.tokens for step in continue_texts(decoder, prompts, 2, keys=keys_of(count), **given)], 1)

    def law(text):
        logits = np.asarray(decoder(np.array(text)), np.float64)[-1]
        largest = np.argsort(-logits)[:top_k]
        return zip(largest.tolist(), softmax(logits[largest] / temperature), strict=True)

    expected = {}
    for first, probability in law(PROMPTS[0]):
        for second, then in law([*PROMPTS[0], first]):
            expected[first, second] = probability * then
    found = {pair: 0 for pair in expected}
    for pair in map(tuple, drawn.tolist()):
        found[pair] += 1
    # Pairs that are hardly ever drawn are one class.
    rare = [pair for pair, probability in expected.items() if count * probability < 5]
    classes = [[pair] for pair in expected if pair not in rare] + ([rare] if rare else [])
    observed = np.array([sum(found[pair] for pair in of_class) for of_class in classes])
    meant = np.array([count * sum(expected[pair] for pair in of_class) for of_class in classes])
    assert (np.abs(observed - meant) <= 1).all() or chisquare(observed, meant).pvalue > 1e-4


def test_log_probabilities_are_those_at_temperature_1(decoder):
    first = next(iter(continue_texts(decoder, PROMPTS, 1, keys=keys_of(2), temperature=5.0, top_k=4)))
    for row, prompt in enumerate(PROMPTS):
        logs = log_softmax(np.asarray(decoder(prompt), np.float64)[-1])
        np.testing.assert_allclose(first.log_probs[row], logs[int(first.tokens[row])], rtol=1e-3, atol=1e-4)


def test_a_text_depends_on_its_own_key_and_not_on_the_others(decoder):
    # Near-certain tokens would be equal for every key.
    def drawn(prompts, keys):
        return np.stack([step.tokens for step in continue_texts(decoder, prompts, 8, keys=keys, temperature=5.0)], 1)

    together = drawn(PROMPTS, keys_of(2))
    np.testing.assert_array_equal(together[1], drawn(PROMPTS[1:], keys_of(2)[1:])[0])
    for one, other in ((keys_of(2), keys_of(2, seed=1)), (keys_of(2), keys_of(2)[::-1])):
        assert (drawn(PROMPTS, one) != drawn(PROMPTS, other)).any(axis=1).all()


def test_logits_that_are_not_finite_are_refused(decoder):
    broken = eqx.tree_at(lambda d: d.head, decoder, replace_fn=lambda head: jnp.nan * head)
    with pytest.raises(ValueError, match="decoder: gives drawn tokens log-probabilities that are not finite"):
        list(continue_texts(broken, PROMPTS, 2, keys=keys_of(2)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"length": 0}, "length: got 0"),
        ({"length": 28}, "length: got 28, but a context of 32 has room for 27 tokens after a prompt of 5"),
        ({"temperature": -0.1}, "temperature: got -0.1"),
        ({"temperature": float("nan")}, "temperature: contains NaN or inf"),
        ({"top_k": 0}, "top_k: got 0"),
        ({"top_k": 261}, "top_k: got 261; pass at most 260"),
        ({"prompts": np.zeros((2, 32), int)}, "prompts: got 32 tokens, but a context of 32"),
        ({"prompts": np.zeros((2, 0), int)}, "pass at least one token number"),
        ({"prompts": np.full((2, 3), 260)}, "260 but the model has 260 embeddings"),
        ({"prompts": np.zeros(3, int)}, r"prompts: has shape \(3,\); pass texts of one length"),
        ({"prompts": np.zeros((0, 3), int)}, r"prompts: has shape \(0, 3\)"),
        ({"prompts": [[1, 2]]}, r"keys: got shape \(2,\) and dtype .*; pass random keys of shape \(1,\), one each"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_call(decoder, given, message):
    asked = {"prompts": PROMPTS, "length": 3} | given
    with pytest.raises(ValueError, match=message):
        continue_texts(decoder, asked.pop("prompts"), asked.pop("length"), keys=keys_of(2), **asked)

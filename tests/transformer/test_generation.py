import math
from operator import attrgetter

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from scipy.stats import chi2

from prob_transformer import layer_margins
from prob_transformer.transformer import (
    Transformer,
    TransformerConfig,
    generate,
    next_token_logits,
    sample,
    stream,
)
from prob_transformer.transformer.decoding import Decoding
from prob_transformer.transformer.generation import Rule
from tests.helpers.plain_decoder import Plain, jacobians

VOCABULARY = 5
KEY = jax.random.key(3)


def made(context=6, width=6, heads=2, head_size=2, dtype=jnp.float64, seed=0, vocabulary=VOCABULARY):
    config = TransformerConfig(vocabulary, context, 2, width, heads, head_size)
    model = Transformer(jax.random.key(seed), config, jnp.float64)
    # Long embeddings and queries along the keys: logits that differ, and determinants of both signs.
    where = lambda m: (m.token_embedding, m.position_embedding, m.head)  # noqa: E731
    model = eqx.tree_at(where, model, replace_fn=lambda x: 5 * x)
    queries = lambda m: [block.query for block in m.blocks]  # noqa: E731
    model = eqx.tree_at(queries, model, [block.query + 1.5 * block.key for block in model.blocks])
    return jax.tree.map(lambda x: x.astype(dtype), model)


def text(length, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, length)


def windows_one_by_one(tokens, context):
    """After each token: the window, by the rule in words."""
    window, found, kept = [], [], math.ceil(context / 2)
    for token in tokens:
        window = [*window, int(token)]
        if len(window) > context:
            window = window[-kept:]
        found.append(window)
    return found


@eqx.filter_jit
def logits_of(model, windows):
    return jax.vmap(lambda window: model(window))(windows)


def uncached(model, tokens):
    """Logits (m, V) after each token, by a pass over each window."""
    windows = windows_one_by_one(tokens, model.context)
    padded = jnp.asarray([window + [0] * (model.context - len(window)) for window in windows])
    return np.asarray(logits_of(model, padded))[np.arange(len(windows)), [len(window) - 1 for window in windows]]


@eqx.filter_jit
def cached(model, first, rest):
    """Logits after the first tokens, and after each of the others as it is appended."""
    begun = Decoding.of(model, first)

    def step(state, token):
        state = state.append(model, token)
        return state, state.logits

    return jnp.concatenate([begun.logits[None], jax.lax.scan(step, begun, rest)[1]])


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.float64, 1e-10)])
@pytest.mark.parametrize("context", [1, 2, 6, 7])
def test_cached_logits_are_the_uncached_ones_of_the_window_in_words(context, dtype, tolerance):
    model, tokens = made(context, dtype=dtype), text(4 * context + 3)
    expected = uncached(model, tokens)
    assert expected.std() > 0.5
    np.testing.assert_allclose(cached(model, tokens[:1], tokens[1:]), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("length", [1, 6, 7, 9, 10, 11, 20])
def test_a_long_prompt_is_read_as_if_its_tokens_had_come_one_by_one(length):
    model, tokens = made(), text(25)
    expected = uncached(model, tokens)
    np.testing.assert_allclose(
        cached(model, tokens[:length], tokens[length:]), expected[length - 1 :], rtol=1e-10, atol=1e-10
    )
    np.testing.assert_allclose(next_token_logits(model, tokens[:length]), expected[length - 1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prompt", [1, 5, 8])
def test_log_probabilities_are_those_of_full_passes_over_the_generated_text(prompt):
    model = made()
    found = generate(model, text(prompt), 20, key=KEY, temperature=2.0, top_k=4, margins=False)
    whole = np.concatenate([text(prompt), found.tokens])
    expected = log_softmax(uncached(model, whole), axis=-1)[prompt - 1 : -1]
    np.testing.assert_allclose(found.log_probs, expected[np.arange(20), found.tokens], rtol=1e-10)


def expected_margins(model, tokens, embedded=None):
    """J (L, H, d, d) at the last position of a window, by autodiff of a layer written out plainly."""
    window = jnp.asarray(tokens)
    inputs = model.decode(model.embed(window) if embedded is None else embedded)[1].inputs
    last = len(tokens) - 1
    slopes = [
        jacobians(Plain(np.asarray(block.query), np.asarray(block.key)), layer, False, False, [last])[:, 0]
        for block, layer in zip(model.blocks, inputs, strict=True)
    ]
    return np.eye(inputs.shape[-1]) - np.stack(slopes)


# Head sizes below half the width, above it, and above the width.
@pytest.mark.parametrize(
    ("context", "prompt", "width", "size"), [(6, 2, 6, 2), (7, 5, 4, 3), (5, 12, 3, 4), (1, 1, 2, 1)]
)
def test_margins_are_those_of_the_position_that_was_read(context, prompt, width, size):
    model = made(context, width, 2, size)
    found = generate(model, text(prompt), 2 * context + 3, key=KEY)
    whole = np.concatenate([text(prompt), found.tokens])
    read = windows_one_by_one(whole, context)[prompt - 1 : -1]
    jacobian = np.stack([expected_margins(model, window) for window in read], 2)
    sign, log_det = np.linalg.slogdet(jacobian)
    np.testing.assert_array_equal(found.sign, sign)
    np.testing.assert_allclose(found.log_det, log_det, rtol=1e-8, atol=1e-10)
    smallest = np.linalg.svd(jacobian, compute_uv=False)[..., -1]
    np.testing.assert_allclose(found.conditioning, smallest, rtol=1e-8)
    if context > 1:
        assert set(sign.ravel()) == {-1, 1}


def test_margins_in_float32_are_those_that_layer_margins_finds():
    model = made(8, 12, 3, 4, dtype=jnp.float32)
    found = generate(model, text(8), 1, key=KEY)
    inputs = model.decode(model.embed(jnp.asarray(text(8))))[1].inputs
    for number, (block, layer) in enumerate(zip(model.blocks, inputs, strict=True)):
        expected = layer_margins(block.attention(), layer, kinds=("determinant", "conditioning"), positions=[7])
        np.testing.assert_array_equal(found.sign[number], expected.sign)
        np.testing.assert_allclose(found.log_det[number], expected.log_det, atol=1e-4)
        np.testing.assert_allclose(found.conditioning[number], expected.conditioning, atol=1e-5)


DRAWS = 40_000
# A right sampler fails each of the tests below for one key in a million.
FALSE_ALARM = 1e-6


def assert_drawn_from(probabilities, counts):
    """Pearson's chi-square test at the stated false-alarm rate; cells of probability 0 must be empty."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = counts.sum() * probabilities[possible]
    assert expected.min() > 20
    statistic = (np.square(counts[possible] - expected) / expected).sum()
    assert statistic < chi2.isf(FALSE_ALARM, possible.sum() - 1)


@pytest.fixture(scope="module")
def flat():
    """A model of three tokens whose probabilities are not far apart."""
    return eqx.tree_at(lambda m: m.head, made(3, vocabulary=3), replace_fn=lambda x: x / 8)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 2), (1.0, 3)])
def test_pairs_of_tokens_follow_the_softmax_of_the_uncached_logits(flat, temperature, top_k):
    # Pairs after a full window: the second token is drawn from a window that was started anew.
    prompt = [0, 2, 1]

    def law(tokens):
        logits = np.asarray(next_token_logits(flat, np.asarray(tokens))) / temperature
        smallest = -np.inf if top_k is None else np.sort(logits)[-top_k]
        return softmax(np.where(logits >= smallest, logits, -np.inf))

    joint = np.stack([law(prompt)[first] * law([*prompt, first]) for first in range(3)])
    draw = eqx.filter_jit(
        jax.vmap(lambda key: sample(flat, jnp.asarray(prompt), key, 2, temperature=temperature, top_k=top_k).tokens)
    )
    tokens = np.asarray(draw(jax.random.split(KEY, DRAWS)))
    counts = np.bincount(3 * tokens[:, 0] + tokens[:, 1], minlength=9).reshape(3, 3)
    assert_drawn_from(joint.ravel(), counts.ravel())


@pytest.mark.parametrize("lag", [1, 3, 4, 12])
def test_tokens_of_different_steps_are_drawn_independently(flat, lag):
    # Without a head all logits are 0, so that pairs at any distance are uniform; no token is in two of the pairs.
    uniform = eqx.tree_at(lambda m: m.head, flat, replace_fn=jnp.zeros_like)
    tokens = np.asarray(generate(uniform, np.array([0]), 4800, key=KEY, margins=False).tokens).reshape(-1, 2, lag)
    counts = np.bincount((3 * tokens[:, 0] + tokens[:, 1]).ravel(), minlength=9)
    assert_drawn_from(np.full(9, 1 / 9), counts)


def test_temperature_zero_and_one_of_the_largest_are_greedy():
    model = made()
    greedy = generate(model, text(4), 15, key=KEY, temperature=0.0, margins=False)
    whole = np.concatenate([text(4), greedy.tokens])
    np.testing.assert_array_equal(greedy.tokens, uncached(model, whole).argmax(1)[3:-1])
    for other in ({"top_k": 1}, {"temperature": 1e-300}, {"temperature": 1e-310, "top_k": 2}):
        np.testing.assert_array_equal(sample(model, jnp.asarray(text(4)), KEY, 15, **other).tokens, greedy.tokens)


@pytest.mark.parametrize("top_k", [None, 1, 3])
@pytest.mark.parametrize("temperature", [1e-37, 1e-38, 1e-46])
def test_a_temperature_that_float32_counts_as_zero_draws_among_the_largest(temperature, top_k):
    logits = jnp.asarray([1, 2, 9, 3, 9, 0], jnp.float32)
    rule = Rule.checked(temperature, top_k, 0.0, 6)
    drawn = np.asarray(jax.jit(jax.vmap(lambda key: rule.draw(key, logits)))(jax.random.split(KEY, 200)))
    assert set(drawn.tolist()) == ({2} if top_k == 1 else {2, 4})


@pytest.mark.parametrize("prompt", [2, 6, 11])
def test_the_margins_of_a_short_text_are_those_of_the_same_places_in_a_longer_one(prompt):
    whole = generate(made(), text(prompt), 15, key=KEY)
    for length in range(1, 7):
        found = generate(made(), text(prompt), length, key=KEY)
        np.testing.assert_array_equal(found.tokens, whole.tokens[:length])
        for short, long in zip(found[1:], whole[1:], strict=True):
            np.testing.assert_allclose(short, long[..., :length], rtol=1e-9, atol=1e-10)


def test_a_key_of_the_old_kind_counts_as_its_new_form():
    old = jax.random.PRNGKey(7)
    found, expected = (generate(made(), text(3), 5, key=k).tokens for k in (old, jax.random.wrap_key_data(old)))
    np.testing.assert_array_equal(found, expected)


def test_a_stream_judges_no_token_that_is_not_asked_for():
    """The last chunk is drawn whole; what comes after the length may be no number."""
    model = eqx.tree_at(lambda m: m.position_embedding, made(), replace_fn=lambda x: x.at[3].set(jnp.nan))
    parts = list(stream(model, [0], 3, key=KEY, chunk=2, margins=False))
    assert sum(part.tokens.size for part in parts) == 3


@pytest.mark.parametrize("name", ["head", "token_embedding", "final_norm.scale", "prior_stage.query"])
def test_weights_of_two_dtypes_generate_what_the_wider_one_does(name):
    model = made(dtype=jnp.float32)
    where = attrgetter(name)
    mixed = eqx.tree_at(where, model, replace_fn=lambda x: x.astype(jnp.float64))
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), model)
    found, expected = (generate(m, text(5), 9, key=KEY, temperature=0) for m in (mixed, wide))
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4)
    assert found.log_probs.dtype == (jnp.float32 if name == "prior_stage.query" else jnp.float64)


@pytest.mark.parametrize("noise_scale", [0.0, 0.3])
@pytest.mark.parametrize(("prompt", "chunk"), [(3, 1), (3, 4), (3, 19), (3, 40), (6, 2), (6, 4), (6, 6)])
def test_a_stream_is_the_generated_text_whatever_the_chunk(prompt, chunk, noise_scale):
    model, asked = made(), {"key": KEY, "top_k": 4, "temperature": 1.5, "noise_scale": noise_scale}
    whole = generate(model, text(prompt), 19, **asked)
    parts = list(stream(model, text(prompt), 19, chunk=chunk, **asked))
    assert [part.tokens.size for part in parts[:-1]] == [min(chunk, 19)] * (len(parts) - 1)
    joined = [np.concatenate(field, -1) for field in zip(*parts, strict=True)]
    np.testing.assert_array_equal(joined[0], whole.tokens)
    for found, expected in zip(joined[1:], whole[1:], strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-10)
    bare = list(stream(model, text(prompt), 19, chunk=chunk, margins=False, **asked))
    assert bare[0].sign is bare[0].log_det is bare[0].conditioning is None
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in bare]), whole.tokens)


def test_posterior_draws_of_the_weights_generate_under_vmap_what_each_generates_alone():
    models = [made(seed=seed) for seed in range(3)]
    keys = jax.random.split(KEY, 3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    together = jax.jit(jax.vmap(lambda model, key: generate(model, jnp.asarray(text(4)), 9, key=key)))(stacked, keys)
    for index, (model, key) in enumerate(zip(models, keys, strict=True)):
        alone = generate(model, text(4), 9, key=key)
        np.testing.assert_array_equal(together.tokens[index], alone.tokens)
        for found, expected in zip(together[1:], alone[1:], strict=True):
            np.testing.assert_allclose(found[index], expected, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match=r"transformer: its token embedding has shape \(3, 5, 6\).*jax.vmap"):
        generate(stacked, text(4), 9, key=KEY)


def test_noise_is_on_the_embedding_of_each_token_and_moves_with_the_window():
    model, scale, prompt = made(), 0.4, 3
    found = generate(model, text(prompt), 12, key=KEY, noise_scale=scale)
    whole = np.concatenate([text(prompt), found.tokens])
    noise = Rule.of(1.0, None, scale).noise(model, jax.random.split(KEY)[1])(jnp.arange(whole.size))
    for step, window in enumerate(windows_one_by_one(whole, model.context)[prompt - 1 : -1]):
        end = prompt + step
        embedded = model.embed(jnp.asarray(window)) + noise[end - len(window) : end]
        expected = log_softmax(model.decode(embedded)[0][-1])[found.tokens[step]]
        np.testing.assert_allclose(found.log_probs[step], expected, rtol=1e-10)
        smallest = np.linalg.svd(expected_margins(model, window, embedded), compute_uv=False)[..., -1]
        np.testing.assert_allclose(found.conditioning[..., step], smallest, rtol=1e-8)


def test_noise_is_normal_and_independent_of_the_draws_of_tokens():
    model = made(width=6)
    noise = np.asarray(Rule.of(1.0, None, 0.4).noise(model, KEY)(jnp.arange(4000))) / 0.4
    # Sums of 24,000 standard normals and of their squares, and of 20,000 products: five standard deviations.
    assert abs(noise.sum()) < 5 * np.sqrt(noise.size)
    assert abs(np.square(noise).sum() - noise.size) < 5 * np.sqrt(2 * noise.size)
    assert abs((noise[1:] * noise[:-1]).sum()) < 5 * np.sqrt(noise.size)
    assert abs((noise[:, 1:] * noise[:, :-1]).sum()) < 5 * np.sqrt(noise.size)


def test_another_key_temperature_or_scale_compiles_nothing_new(caplog):
    model = made()
    first, second = (jnp.asarray(text(4, seed)) for seed in range(2))
    generate(model, first, 9, key=KEY, temperature=0.7, noise_scale=0.1)
    with jax.log_compiles():
        generate(model, second, 9, key=jax.random.key(9), temperature=1.3, noise_scale=0.2)
    assert [record.message for record in caplog.records if record.message.startswith("Compiling ")] == []


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prompt": []}, "prompt: has shape .* at least one token"),
        ({"prompt": [[0, 1]]}, r"prompt: has shape \(1, 2\)"),
        ({"prompt": [0.0, 1.0]}, "prompt: has shape .* and dtype float64; pass integers"),
        ({"prompt": [True, False]}, "prompt: has shape .* and dtype bool; pass integers"),
        ({"prompt": [0, 5]}, r"prompt: contains tokens outside 0\.\.4"),
        ({"prompt": [-1, 2]}, r"prompt: contains tokens outside 0\.\.4"),
        ({"length": 0}, "length: got 0; pass an integer of at least 1"),
        ({"length": 2.0}, "length: got 2.0"),
        ({"temperature": -0.5}, "temperature: got -0.5; pass one number of at least 0"),
        ({"temperature": [1.0, 2.0]}, "temperature: got .* one number"),
        ({"temperature": np.nan}, "temperature: contains NaN"),
        ({"noise_scale": -1}, "noise_scale: got -1; pass one number of at least 0"),
        ({"top_k": 0}, "top_k: got 0; pass an integer of at least 1"),
        ({"key": 0}, "key: got 0; pass one JAX random key"),
        ({"key": jnp.zeros(3)}, r"key: got shape \(3,\) and dtype float64; pass one JAX random key"),
        ({"key": jax.random.split(KEY, 2)}, r"key: got shape \(2,\) and dtype key.*; pass one JAX random key"),
        ({"top_k": 6}, "top_k: got 6; pass at most 5, the size of the vocabulary"),
        ({"transformer": "gpt"}, "transformer: got str; pass a Transformer"),
    ],
)
@pytest.mark.parametrize("function", [generate, stream])
def test_bad_arguments_are_refused_by_name(function, asked, message):
    given = {"transformer": made(), "prompt": [0, 1], "length": 3, "key": KEY} | asked
    with pytest.raises(ValueError, match=message):
        function(**given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: stream(model, [0], 3, key=KEY, chunk=0),
            "chunk: got 0; pass an integer of at least 1",
        ),
        (lambda model: next_token_logits(model, [0, 7]), r"tokens: contains tokens outside 0\.\.4"),
        (
            lambda model: generate(eqx.tree_at(lambda t: t.token_embedding, model, None), [0, 1], 3, key=KEY),
            "transformer: has no embedding of tokens",
        ),
    ],
    ids=["chunk", "text", "no embedding of tokens"],
)
def test_a_bad_chunk_text_or_transformer_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call(made())


@pytest.mark.parametrize("noise_scale", [0.0, 1e39])
@pytest.mark.parametrize("write", [generate, lambda *given, **asked: list(stream(*given, **asked))])
def test_logits_that_are_not_finite_are_refused(write, noise_scale):
    """NaN weights, and noise that is beyond the largest number of float32."""
    weight = jnp.nan if noise_scale == 0 else 1.0
    model = eqx.tree_at(lambda t: t.head, made(), replace_fn=lambda head: (weight * head).astype(jnp.float32))
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    with pytest.raises(ValueError, match="transformer: gives drawn tokens log-probabilities that are not finite"):
        write(model, [0, 1], 3, key=KEY, noise_scale=noise_scale)


def test_margins_that_are_no_numbers_are_refused():
    """The logits depend on W_K^T W_Q, which is as before; float32 does not hold the determinant on the way."""
    model = made(dtype=jnp.float32)
    queries, keys = (lambda m, name=name: [getattr(b, name) for b in m.blocks] for name in ("query", "key"))
    model = eqx.tree_at(queries, model, replace_fn=lambda x: x * 1e30)
    model = eqx.tree_at(keys, model, replace_fn=lambda x: x * 1e-30)
    with pytest.raises(ValueError, match="transformer: log_det of some margin is not a number in float32"):
        generate(model, text(4), 6, key=KEY)
    assert np.isfinite(generate(model, text(4), 6, key=KEY, margins=False).log_probs).all()


@pytest.mark.parametrize("top_k", [None, 40])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_draws_of_equal_logits_in_half_precision_are_uniform(dtype, top_k):
    """Half precision has so few values that noise of that type would prefer the first of equal logits."""
    rule, logits = Rule.checked(1.0, top_k, 0.0, 40), jnp.zeros(40, dtype)
    keys = jax.random.split(jax.random.key(0), 40_000)
    counts = np.bincount(jax.jit(jax.vmap(lambda key: rule.draw(key, logits)))(keys), minlength=40)
    assert ((counts - 1000) ** 2 / 1000).sum() < chi2.isf(FALSE_ALARM, 39)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from scipy.special import softmax

from prob_transformer import CausalAttentionTransform, EmbeddingProcess, RMSNorm, Rotary, residual_and_log_det
from prob_transformer.attention import (
    Attention,
    Past,
    attention_weights,
    logit_slopes,
    require_layer,
    weighted_covariance,
    weighted_mean,
)


def random_attention(rng, heads=2, size=3, width=4, values=True):
    value = rng.normal(size=(heads, width, width)) if values else None
    return Attention(rng.normal(size=(heads, size, width)), rng.normal(size=(heads, size, width)), value)


def weights_at(attention, embeddings, position):
    past = Past.of(attention, embeddings, position)
    return attention_weights(attention, past, embeddings[position])


def test_weights_are_the_softmax_of_scaled_dot_products_over_the_strict_past():
    rng = np.random.default_rng(0)
    attention, embeddings = random_attention(rng), rng.normal(size=(5, 4))
    for i in range(1, 5):
        for h in range(2):
            query = np.asarray(attention.query[h]) @ embeddings[i]
            logits = [(np.asarray(attention.key[h]) @ embeddings[s]) @ query / np.sqrt(3) for s in range(i)]
            weights = weights_at(attention, jnp.asarray(embeddings), i)[h]
            np.testing.assert_allclose(weights[:i], softmax(logits), rtol=1e-13)
            assert (weights[i:] == 0).all()


def test_interaction_gives_the_logits():
    rng = np.random.default_rng(1)
    attention = random_attention(rng, heads=1, values=False)
    past, u = rng.normal(size=(2, 4)), rng.normal(size=4)
    logits = past @ np.asarray(attention.interaction[0]) @ u
    weights = attention_weights(attention, Past.of(attention, jnp.asarray(past)), jnp.asarray(u))[0]
    np.testing.assert_allclose(np.log(weights[0] / weights[1]), logits[0] - logits[1], rtol=1e-12)


def test_an_empty_past_has_no_weight():
    rng = np.random.default_rng(2)
    attention = random_attention(rng)
    weights = weights_at(attention, jnp.asarray(rng.normal(size=(3, 4))), 0)
    assert (weights == 0).all()


def test_weights_that_underflow_stay_finite_with_finite_gradients():
    attention = Attention(jnp.full((1, 1, 1), 1e3), jnp.ones((1, 1, 1)))
    past = jnp.array([[1.0], [-1.0], [0.5]])

    def largest(u):
        return attention_weights(attention, Past.of(attention, past, 2), u)[0, 0]

    for u in (-1e3, 0.0, 1e3):
        weight, slope = jax.value_and_grad(largest)(jnp.array([u]))
        assert np.isfinite(weight)
        assert np.isfinite(slope).all()
    assert largest(jnp.array([-1e3])) == 0.0
    assert largest(jnp.array([1e3])) == 1.0


def test_logits_far_below_zero_beside_a_hidden_row_keep_their_weights():
    # exp(-1000) is 0: the largest visible logit must be taken out first, and the hidden row's 0 must not count as one.
    attention = Attention(jnp.full((1, 1, 1), 1e3), jnp.ones((1, 1, 1)))
    past = Past.of(attention, jnp.array([[-1.0], [-1.001], [0.0]]), 2)
    weights = attention_weights(attention, past, jnp.ones(1))[0]
    np.testing.assert_allclose(weights, [*softmax([-1000.0, -1001.0]), 0.0], rtol=1e-12)


def test_hidden_rows_change_nothing_not_even_when_huge():
    rng = np.random.default_rng(3)
    attention, embeddings = random_attention(rng), rng.normal(size=(4, 4))
    spoiled = embeddings.copy()
    spoiled[3] = 1e200
    u = jnp.asarray(rng.normal(size=4))
    plain = attention_weights(attention, Past.of(attention, jnp.asarray(embeddings), 3), u)
    with_spoiled = attention_weights(attention, Past.of(attention, jnp.asarray(spoiled), 3), u)
    np.testing.assert_array_equal(plain, with_spoiled)


def test_weighted_moments_equal_numpys():
    rng = np.random.default_rng(4)
    weights = rng.dirichlet(np.ones(6))
    x, y = rng.normal(size=(6, 2)), rng.normal(size=(6, 3))
    joint = np.cov(np.hstack([x, y]).T, aweights=weights, ddof=0)
    np.testing.assert_allclose(weighted_mean(weights, x), np.average(x, axis=0, weights=weights), rtol=1e-13)
    np.testing.assert_allclose(weighted_covariance(weights, x, y), joint[:2, 2:], atol=1e-14)


def test_covariance_keeps_its_digits_far_from_the_origin():
    rng = np.random.default_rng(5)
    weights, x = rng.dirichlet(np.ones(5)), rng.normal(size=(5, 2))
    # A shift that is a power of two well above the data loses 2^-26 of them to rounding and no more.
    shifted = weighted_covariance(weights, x + 2.0**26, x + 2.0**26)
    np.testing.assert_allclose(shifted, weighted_covariance(weights, x, x), rtol=1e-6)


def test_covariance_of_a_single_token_is_exactly_zero():
    weights = jnp.array([0.0, 1.0, 0.0])
    x = jnp.array([[1.0], [3.14159], [1e5]])
    assert weighted_covariance(weights, x, x)[0, 0] == 0.0


def test_covariance_with_rows_that_coincide_is_exactly_zero():
    # Their weighted mean is rounded, so that rows minus mean alone would not be.
    for seed in range(5):
        rng = np.random.default_rng(seed)
        weights, same, others = rng.dirichlet(np.ones(7)), np.tile(rng.normal(size=3), (7, 1)), rng.normal(size=(7, 3))
        assert not np.any(weighted_covariance(weights, same, others))
        assert not np.any(weighted_covariance(weights, others, same))


@pytest.mark.parametrize("window", [None, 1, 2])
def test_a_position_sees_its_strict_past_within_the_window(window):
    attention = Attention(np.ones((1, 2, 3)), np.ones((1, 2, 3)), window=window)
    found = attention.sees(jnp.arange(5)[:, None], jnp.arange(5))
    reach = 5 if window is None else window
    np.testing.assert_array_equal(found, [[s < i and i - s < reach for s in range(5)] for i in range(5)])


def test_writing_one_position_equals_building_the_cache_at_once():
    rng = np.random.default_rng(6)
    attention, embeddings = random_attention(rng), jnp.asarray(rng.normal(size=(3, 4)))
    past = Past.empty(attention, 3)
    for embedding in embeddings:
        past = past.write(attention, embedding)
    for grown, whole in zip(jax.tree.leaves(past), jax.tree.leaves(Past.of(attention, embeddings)), strict=True):
        np.testing.assert_allclose(grown, whole, atol=1e-15)


def test_writing_indexes_nothing_out_of_bounds():
    # JAX clamps such an index without a word; checkify names it.
    attention = random_attention(np.random.default_rng(9))
    write = checkify.checkify(lambda past: past.write(attention, jnp.ones(4)), errors=checkify.index_checks)
    past = Past.empty(attention, 3)
    for _ in range(3):
        error, past = write(past)
        error.throw()
    error, _ = write(past)
    assert "out-of-bounds" in error.get()


def general_attention(rng, **options):
    """Four heads of size 6 on two key groups, with biases; as many heads as coordinates, which must not be mixed up."""
    query, key = rng.normal(size=(4, 6, 4)), rng.normal(size=(2, 6, 4))
    biases = {"query_bias": rng.normal(size=(4, 6)), "key_bias": rng.normal(size=(2, 6))}
    return Attention(query, key, **biases | options)


BETWEEN = {
    "nothing": {},
    "query norm": {"query_norm": RMSNorm(np.arange(1.0, 7), 1e-5)},
    "key norm": {"key_norm": RMSNorm(np.arange(1.0, 7), 1e-5)},
    "rotary": {"rotary": Rotary(np.array([1.0, 0.1]))},
    "cap": {"cap": 1.5},
}


@pytest.mark.parametrize("between", BETWEEN)
def test_slopes_of_the_logits_are_their_derivatives_by_central_differences(between):
    rng = np.random.default_rng(10)
    attention = general_attention(rng, scale=0.7, **BETWEEN[between])
    past, queries = Past.of(attention, jnp.asarray(rng.normal(size=(3, 4)))), rng.normal(size=(4, 6))

    def logits(queries):
        seen = np.asarray(attention.seen_queries(jnp.asarray(queries), past.position))
        raw = np.einsum("hnp,hp->hn", past.keys, seen)
        return raw if attention.cap is None else attention.cap * np.tanh(raw / attention.cap)

    steps = 1e-5 * np.eye(6)
    expected = np.stack([(logits(queries + step) - logits(queries - step)) / 2e-5 for step in steps], -1)
    np.testing.assert_allclose(logit_slopes(attention, past, jnp.asarray(queries)), expected, atol=1e-8)
    assert attention.is_bilinear == (between in ("nothing", "key norm"))


def test_a_head_alone_has_its_own_query_and_the_keys_of_its_group():
    everything = {name: part for parts in BETWEEN.values() for name, part in parts.items()}
    whole = general_attention(np.random.default_rng(11), window=3, scale=0.7, **everything)
    assert (whole.heads, whole.head_size, whole.width) == (4, 6, 4)
    for head in range(4):
        alone = whole.head_alone(head)
        own, group = slice(head, head + 1), slice(head // 2, head // 2 + 1)
        expected = Attention(
            whole.query[own], whole.key[group], query_bias=whole.query_bias[own], key_bias=whole.key_bias[group],
            window=3, scale=0.7, **everything,
        )  # fmt: skip
        assert jax.tree.structure(alone) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, alone, expected)
    for outside in (-1, 4, 5):
        with pytest.raises(ValueError, match=f"head: got {outside}; pass 0 to 3"):
            whole.head_alone(outside)


def test_a_cache_is_read_before_any_position_as_if_it_ended_there():
    rng = np.random.default_rng(12)
    attention, embeddings = general_attention(rng, window=2), jnp.asarray(rng.normal(size=(5, 4)))
    whole, query = Past.of(attention, embeddings), jnp.asarray(rng.normal(size=4))
    for position in range(6):
        before, built = whole.before(attention, position), Past.of(attention, embeddings, position)
        assert before.position == built.position == position
        np.testing.assert_array_equal(
            attention_weights(attention, before, query), attention_weights(attention, built, query)
        )


def test_rotary_positions_may_turn_all_coordinates_of_a_head():
    assert Attention(np.ones((1, 6, 2)), np.ones((1, 6, 2)), rotary=Rotary(np.ones(3))).head_size == 6


def test_value_maps_of_the_heads_are_those_of_their_groups_after_the_output():
    rng = np.random.default_rng(13)
    value, output, left = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 4, 3)), rng.normal(size=(6, 4))
    attention = general_attention(rng, value=value, output=output)
    maps = [output[head] @ value[head // 2] for head in range(4)]
    np.testing.assert_allclose(attention.value_maps(jnp.asarray(left)), [left @ each for each in maps], atol=1e-13)
    np.testing.assert_allclose(attention.values(jnp.asarray(left)), [left @ each.T for each in maps], atol=1e-13)
    with pytest.raises(ValueError, match="value: is None; identity values need no maps"):
        general_attention(rng).value_maps(jnp.asarray(left))


@pytest.mark.parametrize(
    "pair",
    [
        [random_attention(np.random.default_rng(0)), np.ones((3, 4))],
        (random_attention(np.random.default_rng(0)),),
        (random_attention(np.random.default_rng(0)), np.ones((3, 4)), None),
        (np.ones((3, 4)), random_attention(np.random.default_rng(0))),
    ],
)
def test_a_layer_is_a_pair_of_attention_and_inputs(pair):
    with pytest.raises(ValueError, match=r"pass a pair \(Attention, inputs\)"):
        require_layer(pair)


def test_attention_is_a_pytree():
    attention = general_attention(np.random.default_rng(7), window=np.int64(2), scale=0.7, cap=1.5)
    doubled = jax.tree.map(lambda leaf: 2 * leaf, attention)
    assert (doubled.window, doubled.scale, doubled.cap) == (2, 0.7, 1.5)
    assert isinstance(doubled.window, int)
    attention = random_attention(np.random.default_rng(7))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, attention)
    np.testing.assert_array_equal(doubled.query, 2 * attention.query)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), attention, doubled)
    norms = jax.vmap(lambda a: jnp.linalg.norm(a.interaction))(stacked)
    np.testing.assert_allclose(norms[1], 4 * norms[0], rtol=1e-12)


def test_heads_with_identity_values_are_refused_where_they_are_taken_together():
    attention, u = Attention(np.ones((2, 2, 3)), np.ones((2, 2, 3))), np.ones((4, 3))
    for joint in (
        lambda: residual_and_log_det(attention, u),
        lambda: residual_and_log_det(attention, u, implementation="blocked"),
        lambda: EmbeddingProcess(attention, 4),
        lambda: CausalAttentionTransform(attention),
    ):
        with pytest.raises(ValueError, match="value: is None with H = 2 heads"):
            joint()
    one, u = Attention(np.zeros((1, 2, 3)), np.ones((1, 2, 3))), np.random.default_rng(14).normal(size=(4, 3))
    expected = [u[0], *(u[i] - u[:i].mean(0) for i in range(1, 4))]
    np.testing.assert_allclose(residual_and_log_det(one, u).residual, expected, atol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": np.ones((2, 3)), "key": np.ones((2, 3))}, r"query: has shape \(2, 3\); pass \(H, p, d\)"),
        ({"query": np.ones((1, 0, 3)), "key": np.ones((1, 0, 3))}, "query: has shape"),
        ({"query": np.ones((1, 2, 3, 4)), "key": np.ones((1, 2, 3, 4))}, r"query: has shape \(1, 2, 3, 4\)"),
        ({"query": np.ones((1, 2, 3)), "key": np.ones((1, 1, 3))}, r"key: has shape \(1, 1, 3\); pass the shape"),
        ({"query": np.ones((1, 2, 3)), "key": np.ones((0, 2, 3))}, r"key: has shape \(0, 2, 3\); pass the shape"),
        ({"query": np.ones((1, 2, 3)), "key": np.ones((1, 3, 3))}, r"key: has shape \(1, 3, 3\); pass the shape"),
        (
            {"query": np.ones((2, 2, 3)), "key": np.ones((2, 2, 3)), "value": np.ones((1, 3, 3))},
            r"value: has shape \(1, 3, 3\); pass \(G, v, d\)",
        ),
        (
            {"query": np.ones((2, 2, 3)), "key": np.ones((2, 2, 3)), "value": np.ones((3, 3, 3))},
            r"value: has shape \(3, 3, 3\); pass \(G, v, d\)",
        ),
        *[
            (
                {
                    "query": np.ones((2, 2, 3)),
                    "key": np.ones((2, 2, 3)),
                    "value": np.ones(shape),
                    "output": np.ones((2, 3, 4)),
                },
                r"value: has shape .*\); pass \(G, v, d\), v = d without an output, = \(2, 3, 3\)",
            )
            for shape in ((2, 4), (2, 4, 3, 1))
        ],
        ({"query": np.full((1, 2, 3), np.nan), "key": np.ones((1, 2, 3))}, "query: contains NaN or inf"),
        ({"query": np.ones((1, 2, 3)), "key": np.full((1, 2, 3), np.inf)}, "key: contains NaN or inf"),
        (
            {"query": np.ones((1, 1, 1)), "key": np.ones((1, 1, 1)), "value": np.full((1, 1, 1), np.inf)},
            "value: contains NaN or inf",
        ),
        ({"query": "weights", "key": np.ones((1, 2, 3))}, "query: got str; pass a numeric array"),
        ({"query": np.ones((1, 2, 3), complex), "key": np.ones((1, 2, 3))}, "query: has dtype complex"),
        (
            {"query": np.ones((1, 3, 3)), "key": np.ones((1, 3, 3)), "rotary": Rotary(np.ones(2))},
            "rotary: has 2 frequencies; pass at most p / 2 for head size p = 3",
        ),
        (
            {"query": np.ones((1, 2, 3)), "key": np.ones((1, 2, 3)), "query_norm": RMSNorm(np.ones(3), 1e-6)},
            r"query_norm: has shape \(3,\); pass a gain \(p,\) = \(2,\)",
        ),
        *[
            (
                {"query": np.ones((1, 2, 3)), "key": np.ones((1, 2, 3)), "key_norm": RMSNorm(np.ones(2), epsilon)},
                "key_norm.epsilon: ",
            )
            for epsilon in (np.nan, -10.0, 0.0)
        ],
        ({"query": np.ones((1, 2, 3)), "key": np.ones((1, 2, 3)), "scale": np.ones(2)}, r"scale: has shape \(2,\)"),
        ({"query": np.ones((1, 2, 3)), "key": np.ones((1, 2, 3)), "cap": 10**30}, "cap: got an integer too large"),
    ],
)
def test_bad_parameters_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        Attention(**arguments)


def test_numbers_that_float32_does_not_hold_are_refused_where_it_is_the_dtype():
    """1e39 is inf in float32, and 1e-50 is 0."""
    query = np.ones((1, 2, 3))
    assert Attention(1e39 * query, query, scale=1e-50).scale == 1e-50
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="query: contains NaN or inf in float32"), np.errstate(over="ignore"):
            Attention(1e39 * query, query)
        with pytest.raises(ValueError, match="scale: got 1e-50; pass a value greater than 0 in float32"):
            Attention(query, query, scale=1e-50)


def test_float32_stays_float32_unless_an_empty_cache_is_asked_for_in_a_wider_dtype():
    attention = Attention(jnp.ones((1, 2, 2), jnp.float32), jnp.ones((1, 2, 2), jnp.float32))
    past = Past.of(attention, jnp.ones((3, 2), jnp.float32))
    assert attention_weights(attention, past, jnp.ones(2, jnp.float32)).dtype == jnp.float32
    assert Past.empty(attention, 3).values.dtype == jnp.float32
    assert Past.empty(attention, 3, jnp.float64).values.dtype == jnp.float64

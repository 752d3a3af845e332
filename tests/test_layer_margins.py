import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from prob_transformer import Attention, RMSNorm, Rotary, decoder_margins, layer_margins
from prob_transformer.margins import _margins
from tests.helpers.layers import layer_of
from tests.helpers.plain_decoder import draw, jacobians, weights_at

# Grouped keys, rotary in both layouts (all and part of a head), biases, windows, values of another size than the keys,
# values without an output map, heads smaller and larger than half the width.
CASES = {
    "plain": {"heads": 2, "groups": 2, "size": 2, "width": 7},
    "rotary": {"heads": 4, "groups": 2, "size": 4, "width": 5, "inner": 3, "pairs": 2, "bias": True},
    "interleaved": {"heads": 2, "groups": 1, "size": 6, "width": 4, "pairs": 2, "interleaved": True},
    "window": {"heads": 2, "groups": 1, "size": 2, "width": 9, "inner": 2, "pairs": 1, "bias": True, "window": 3},
    "values": {"heads": 2, "groups": 2, "size": 2, "width": 3, "inner": 3, "output": False},
    "normed": {"heads": 4, "groups": 2, "size": 4, "width": 5, "inner": 3, "pairs": 2, "bias": True, "normed": True},
    "capped": {"heads": 2, "groups": 1, "size": 2, "width": 5, "inner": 3, "bias": True, "cap": 1.5, "window": 4},
    "both": {"heads": 2, "groups": 2, "size": 4, "width": 3, "pairs": 2, "normed": True, "cap": 0.7},
    "long": {"heads": 2, "groups": 1, "size": 2, "width": 3, "pairs": 1},
}
LENGTH = 7
MODES = [
    ("plain", "identity", False),
    ("plain", "identity", True),
    ("rotary", "identity", True),
    ("rotary", "own", False),
    ("rotary", "own", True),
    ("interleaved", "identity", False),
    ("interleaved", "identity", True),
    ("window", "identity", False),
    ("window", "own", True),
    ("values", "own", True),
    ("normed", "identity", False),
    ("normed", "identity", True),
    ("normed", "own", False),
    ("normed", "own", True),
    ("capped", "identity", False),
    ("capped", "identity", True),
    ("capped", "own", True),
    ("both", "identity", True),
]


def case(name, seed=0, length=LENGTH):
    return draw(seed, **CASES[name]), np.random.default_rng(seed).normal(size=(length, CASES[name]["width"]))


def truth(plain, inputs, values, inclusive):
    change = jacobians(plain, inputs, values == "own", inclusive)
    identity = np.eye(inputs.shape[1])
    return identity - change, identity - change.sum(0)


@pytest.mark.parametrize(("name", "values", "inclusive"), MODES)
def test_margins_equal_those_of_the_autodiff_jacobian(name, values, inclusive):
    plain, inputs = case(name)
    blocks, joint_blocks = truth(plain, inputs, values, inclusive)
    asked = {"kinds": ("determinant", "conditioning"), "values": values, "self_inclusive": inclusive, "k": 3}
    found = layer_margins(layer_of(plain), inputs, joint=values == "own", **asked)
    determinants = np.linalg.det(blocks)
    # Alone with itself the first position has J = 0, or nearly so by autodiff.
    np.testing.assert_allclose(found.determinant, determinants, rtol=1e-9, atol=1e-30)
    np.testing.assert_array_equal(found.sign, np.sign(found.determinant))
    np.testing.assert_allclose(found.barrier[:, 1:], -np.log(np.abs(determinants[:, 1:])), atol=1e-9)
    singular = np.linalg.svd(blocks, compute_uv=False)[..., -1]
    np.testing.assert_allclose(found.conditioning, singular, rtol=1e-9, atol=1e-13)
    if values == "own":
        together = np.asarray(found.joint_sign * jnp.exp(found.joint_log_det))
        np.testing.assert_allclose(together, np.linalg.det(joint_blocks), rtol=1e-9)
        singular = np.linalg.svd(joint_blocks, compute_uv=False)[..., -1]
        np.testing.assert_allclose(found.joint_conditioning, singular, rtol=1e-9)


def test_where_attention_only_stretches_the_smallest_singular_value_is_one():
    # Past tokens on one axis, along which J = 1 + 0.8 Var and across which it is the identity; no two logits are equal.
    query = jnp.zeros((1, 1, 5)).at[0, 0, 0].set(1.0)
    inputs = np.zeros((4, 5))
    inputs[:, 0] = [1.0, -2.0, 0.5, 1.5]
    found = layer_margins(Attention(query, -0.8 * query), inputs, kinds=("determinant", "conditioning"))
    u = inputs[:, 0]
    for i in (2, 3):
        weights = softmax(-0.8 * u[:i] * u[i])
        stretched = 1 + 0.8 * weights @ (u[:i] - weights @ u[:i]) ** 2
        assert stretched > 1.3
        np.testing.assert_allclose(found.determinant[0, i], stretched, rtol=1e-12)
    np.testing.assert_allclose(found.conditioning, 1, rtol=1e-12)


@pytest.mark.parametrize(("values", "inclusive"), [("identity", True), ("own", False)])
def test_float32_layers_lose_no_more_than_their_sums(values, inclusive):
    plain, inputs = case("rotary")
    plain = plain._replace(**{f: x.astype(np.float32) for f, x in plain._asdict().items() if isinstance(x, np.ndarray)})
    inputs = inputs.astype(np.float32)
    wide = plain._replace(**{f: x.astype(float) for f, x in plain._asdict().items() if isinstance(x, np.ndarray)})
    blocks, _ = truth(wide, inputs.astype(float), values, inclusive)
    there = [6, 2, 4]
    found = layer_margins(layer_of(plain, np.float32), inputs, values=values, self_inclusive=inclusive, positions=there)
    np.testing.assert_array_equal(found.positions, there)
    assert found.log_det.dtype == found.support.margins.dtype == np.float32
    np.testing.assert_allclose(found.determinant, np.linalg.det(blocks)[:, there], rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("values", "inclusive"), [("identity", False), ("identity", True), ("own", False)])
def test_layers_in_half_precision_are_worked_on_as_the_numbers_they_are(dtype, values, inclusive):
    plain, inputs = case("rotary")
    narrow = jax.tree.map(lambda x: x.astype(dtype), layer_of(plain))
    inputs = jnp.asarray(inputs, dtype)
    wide = jax.tree.map(lambda x: x.astype(np.float64), narrow)
    expected = layer_margins(wide, inputs.astype(np.float64), values=values, self_inclusive=inclusive)
    found = layer_margins(narrow, inputs, values=values, self_inclusive=inclusive)
    (listed,) = decoder_margins([(narrow, inputs)], values=values, self_inclusive=inclusive)
    np.testing.assert_array_equal(listed.log_det, found.log_det)
    assert found.log_det.dtype == found.support.margins.dtype == np.float32
    np.testing.assert_array_equal(found.sign, expected.sign)
    np.testing.assert_allclose(found.log_det, expected.log_det, rtol=1e-6, atol=2e-5)


def test_long_texts_are_swept_in_blocks_and_chunks_without_a_seam():
    # More positions than two chunks of keys; the truth at positions on both sides of every seam.
    plain, inputs = case("long", length=290)
    there = [1, 63, 64, 127, 128, 129, 255, 256, 257, 289]
    expected = np.linalg.det(np.eye(3) - jacobians(plain, inputs, False, True, there))
    found = layer_margins(layer_of(plain), inputs, self_inclusive=True)
    np.testing.assert_allclose(found.determinant[:, there], expected, rtol=1e-9)


def test_without_a_past_strict_heads_are_the_identity_and_inclusive_ones_are_zero():
    plain, inputs = case("plain")
    both = ("determinant", "conditioning")
    strict = layer_margins(layer_of(plain), inputs, kinds=both, k=3)
    np.testing.assert_array_equal(strict.log_det[:, :2], 0)
    np.testing.assert_array_equal(strict.sign[:, :2], 1)
    inclusive = layer_margins(layer_of(plain), inputs, kinds=both, self_inclusive=True, k=3)
    np.testing.assert_array_equal(inclusive.sign[:, 0], 0)
    np.testing.assert_array_equal(inclusive.barrier[:, 0], np.inf)
    np.testing.assert_array_equal(inclusive.conditioning[:, 0], 0)
    # On the boundary by construction: no support token.
    assert (inclusive.support.positions > 0).all()


@pytest.mark.parametrize(("name", "values", "inclusive"), [("plain", "identity", True), ("window", "own", True)])
def test_support_tokens_are_each_heads_smallest_margins_with_their_shares_of_the_variance(name, values, inclusive):
    plain, inputs = case(name)
    asked = {"kinds": ("determinant", "conditioning"), "values": values, "self_inclusive": inclusive, "k": 3}
    found = layer_margins(layer_of(plain), inputs, joint=values == "own", **asked)
    for head in range(2):
        barrier = np.asarray(found.barrier[head, 1:])
        expected = 1 + np.argsort(-barrier, kind="stable")[:3]
        np.testing.assert_array_equal(found.support.positions[head], expected)
        np.testing.assert_array_equal(found.support.margins[head], found.determinant[head, expected])
        for rank, position in enumerate(expected.tolist()):
            weights = np.asarray(weights_at(plain, inputs, inclusive, head, position))
            group = head * plain.key.shape[0] // plain.query.shape[0]
            attended = inputs if values == "identity" else inputs @ plain.value[group].T @ plain.output[head].T
            spread = weights * np.square(attended - weights @ attended).sum(1)
            np.testing.assert_allclose(found.support.carriers[head, rank], spread / spread.sum(), atol=1e-12)


def test_without_determinants_support_tokens_are_ranked_by_singular_values_and_one_is_given():
    plain, inputs = case("plain")
    there = [5, 0, 6, 3]
    found = layer_margins(layer_of(plain), inputs, kinds=("conditioning",), positions=there)
    assert (found.sign, found.log_det, found.determinant, found.barrier) == (None, None, None, None)
    # The first position, which has no past, is none of them.
    smallest = np.asarray(found.conditioning)[:, [0, 2, 3]]
    np.testing.assert_array_equal(found.support.positions[:, 0], np.array([5, 6, 3])[smallest.argmin(1)])
    np.testing.assert_array_equal(found.support.margins, smallest.min(1, keepdims=True))
    all_of_them = layer_margins(layer_of(plain), inputs, positions=there, k=4).support.positions
    np.testing.assert_array_equal(np.sort(all_of_them), [[0, 3, 5, 6]] * 2)


def test_ties_go_to_the_earlier_position_and_the_first_position_comes_last():
    # Zero interaction makes all 200 margins 1; a sort that is not stable keeps the order of short sequences only.
    layer = Attention(np.zeros((1, 1, 1)), np.ones((1, 1, 1)))
    inputs = np.random.default_rng(0).normal(size=(200, 1))
    found = layer_margins(layer=layer, inputs=inputs, k=200)
    assert found.support.positions.tolist() == [[*range(1, 200), 0]]
    with pytest.raises(ValueError, match="positions: pass different positions from 0 to n - 1 = 199"):
        layer_margins(layer, inputs, positions=[200])


def test_layers_of_one_shape_share_one_compilation_where_ranks_may_not_be_promoted():
    before = _margins._cache_size()
    with jax.numpy_rank_promotion("raise"):
        for seed in range(3):
            plain, inputs = case("normed", seed, length=6)
            layer_margins(layer_of(plain), inputs, positions=[0, 4])
    assert _margins._cache_size() == before + 1


def test_a_decoder_is_read_one_layer_at_a_time():
    plain, inputs = case("plain")
    read = []

    def layers():
        for number in range(3):
            read.append(number)
            yield layer_of(plain), inputs if number < 2 else inputs[:, :2]

    walk = decoder_margins(layers(), kinds=("determinant", "conditioning"), k=3)
    assert next(walk).sign.shape == (2, LENGTH)
    assert read == [0]
    next(walk)
    with pytest.raises(ValueError, match=r"layer 2: inputs: has shape \(7, 2\)"):
        next(walk)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"kinds": "determinant"},
            "kinds: got 'determinant'; pass one or more of determinant, conditioning in a tuple",
        ),
        ({"kinds": ()}, r"kinds: got \(\)"),
        ({"kinds": ("norm",)}, "kinds: got"),
        ({"values": "other"}, "values: got 'other'; pass one of identity, own"),
        ({"values": "own"}, "the layer has no value maps"),
        ({"joint": True}, 'joint=True needs values="own"'),
        ({"k": 0}, "k: got 0"),
        ({"k": 8}, "k: got 8; pass at most the number of positions, 7"),
        ({"positions": []}, "positions: pass at least one"),
        ({"k": 3, "positions": [1, 2]}, "k: got 3; pass at most the number of positions, 2"),
        ({"positions": [0.5]}, "positions: pass at least one integer"),
        ({"positions": np.zeros(0, int)}, "positions: pass at least one integer"),
        ({"positions": [[1, 2]]}, "positions: pass at least one integer"),
        ({"positions": [2, -1]}, "positions: pass different positions from 0 to n - 1 = 6"),
        ({"positions": [7]}, "positions: pass different positions from 0 to n - 1 = 6"),
        ({"positions": [9]}, "positions: pass different positions"),
        ({"positions": [1, 1]}, "positions: pass different positions"),
        ({"positions": 5}, "positions: pass at least one integer"),
    ],
)
def test_bad_arguments_are_refused_by_name(asked, message):
    plain, inputs = case("plain")
    with pytest.raises(ValueError, match=message):
        layer_margins(layer_of(plain), inputs, **asked)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (np.full((7, 7), np.nan), "inputs: contains NaN"),
        (np.zeros((7, 6)), "inputs: has shape"),
        (np.zeros((1, 7)), "inputs: has n = 1"),
        (np.zeros((2, 7, 7)), "inputs: has shape .* one sequence"),
        (1e200 * np.arange(49.0).reshape(7, 7), "inputs: log_det is not a number in float64"),
    ],
)
def test_bad_inputs_are_refused_by_name(inputs, message):
    with pytest.raises(ValueError, match=message):
        layer_margins(layer_of(case("plain")[0]), inputs, kinds=("determinant", "conditioning"), k=3)


def ones(*shape):
    return np.ones(shape)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(ones(4, 3), ones(1, 2, 3)), "query: has shape"),
        (lambda: Attention(ones(4, 2, 3), ones(3, 2, 3)), "key: has shape .* G a divisor of H = 4"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 4)), "key: has shape"),
        (lambda: Attention(np.nan * ones(4, 2, 3), ones(2, 2, 3)), "query: contains NaN"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), output=ones(4, 3, 2)), "output: given without value"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), ones(2, 2, 3)), "value: .* without an output"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), ones(2, 2, 3), ones(2, 3, 2)), "output: has shape"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), query_bias=ones(2, 2)), "query_bias: has shape"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), key_bias=ones(4, 2)), "key_bias: has shape"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), rotary=Rotary(ones(2))), "rotary: has 2 frequencies"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), window=0), "window: got 0"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), key_norm=ones(2)), "key_norm: got ndarray; pass an RMSNorm"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), rotary=10000.0), "rotary: got float; pass a Rotary"),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3), scale=-1.0), "scale: got"),
        (lambda: Rotary(ones(2, 2)), "frequencies: has shape"),
        (lambda: RMSNorm("gain", 1e-6), "gain: "),
        (lambda: Attention(ones(4, 2, 3), ones(2, 2, 3)).head_alone(4), "head: got 4; pass 0 to 3"),
        (
            lambda: next(decoder_margins([Attention(ones(4, 2, 3), ones(2, 2, 3))])),
            "layer 0: got Attention; pass a pair",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()

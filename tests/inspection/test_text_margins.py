import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from prob_transformer import Attention
from prob_transformer.inspection.text_margins import QUANTILES, Setting, inspect_text, pieces_of
from tests.helpers.plain_decoder import draw, jacobians

LENGTH, WIDTH = 6, 3
PIECES = tuple("abcdef")


def problem(count=3, first=0):
    """Layers with their inputs, plainly and for the library."""
    rng = np.random.default_rng(5)
    plain = [draw(seed, heads=2, groups=1, size=2, width=WIDTH, inner=2) for seed in range(first, first + count)]
    inputs = [2 * rng.normal(size=(LENGTH, WIDTH)) for _ in plain]
    layers = [(Attention(*map(jnp.asarray, p[:4])), jnp.asarray(x)) for p, x in zip(plain, inputs, strict=True)]
    return plain, inputs, layers


# Seeds that give determinants of both signs.
@pytest.mark.parametrize(("setting", "first"), [(Setting(), 2), (Setting("own", True), 1)])
def test_signs_and_log_determinants_are_those_of_autodiff_in_the_order_of_the_text(setting, first):
    plain, inputs, layers = problem(first=first)
    found = inspect_text(layers, PIECES, np.arange(LENGTH), setting, (0, 2))
    assert found.layers == (0, 2)
    assert found.setting == setting
    for row, layer in enumerate(found.layers):
        blocks = np.eye(WIDTH) - jacobians(plain[layer], inputs[layer], setting.values == "own", setting.self_inclusive)
        sign, log_det = np.linalg.slogdet(blocks)
        np.testing.assert_array_equal(found.sign[row], sign)
        np.testing.assert_allclose(found.log_det[row], log_det, rtol=1e-9, atol=1e-9)
    assert len(np.unique(found.sign)) == 2


def test_carriers_are_the_heaviest_terms_of_the_weighted_variance():
    plain, inputs, layers = problem(1)
    found = inspect_text(layers, PIECES, np.arange(LENGTH), Setting(), (0,))
    u = inputs[0]
    for head in range(2):
        for i in range(1, LENGTH):
            weights = softmax(u[:i] @ plain[0].key[0].T @ plain[0].query[head] @ u[i] / np.sqrt(2))
            spread = weights * ((u[:i] - weights @ u[:i]) ** 2).sum(-1)
            share = spread / spread.sum() if i > 1 else np.zeros(1)
            largest = np.sort(share)[::-1][:3]
            got = found.shares[0, head, i]
            np.testing.assert_allclose(got[: largest.size], largest, rtol=1e-9, atol=1e-12)
            assert not got[largest.size :].any()
            if i > 1:
                np.testing.assert_array_equal(found.carriers[0, head, i, : largest.size], np.argsort(-share)[:3])


def test_layers_are_read_no_further_than_needed_and_each_is_announced():
    _, _, layers = problem()
    done = []

    def walk():
        yield from layers[:2]
        raise AssertionError("read past the last layer asked for")

    inspect_text(walk(), PIECES, np.arange(LENGTH), Setting(), (1,), lambda: done.append(1))
    assert done == [1]


@pytest.mark.parametrize(
    ("pieces", "setting", "chosen", "message"),
    [
        (PIECES[:5], Setting(), (0,), "pieces: got 5 for 6 tokens"),
        (PIECES, Setting(), (0, 3), r"layers: \[3\] are not in the model"),
        (PIECES, Setting("own"), (0,), "layer 0: values"),
    ],
)
def test_what_does_not_fit_is_named(pieces, setting, chosen, message):
    _, inputs, layers = problem(1)
    without_values = [(Attention(layers[0][0].query, layers[0][0].key), inputs[0])]
    with pytest.raises(ValueError, match=message):
        inspect_text(without_values, pieces, np.arange(LENGTH), setting, chosen)


def test_figures_leave_the_first_position_out(made_up):
    found = made_up.summary
    np.testing.assert_array_equal(found.negative, [[3 / 4], [0]])
    # - - + -, and + 0 + +
    np.testing.assert_array_equal(found.crossings, [[2], [2]])
    np.testing.assert_array_equal(found.closest, [[2], [2]])
    np.testing.assert_array_equal(found.worst, [[0, 0], [1, 0]])
    # Barriers 1 4 -2 3 and -0.5 inf -1.5 -800: the smallest of which at most half are smaller, and so on.
    assert QUANTILES == (0.05, 0.5, 0.95)
    np.testing.assert_array_equal(found.quantiles, [[[-2, 1, 4]], [[-800, -1.5, np.inf]]])


def test_pieces_joined_are_the_text_and_the_rest_of_a_character_is_empty():
    # "a", then an emoji in two tokens, then a token after a space that the tokenizer left out.
    assert pieces_of("a😀 bc", [1, 2, 2, 4, 5]) == ("a", "😀", "", " b", "c")
    # A token that ends before the one ahead of it.
    assert pieces_of("abc", [2, 1, 3]) == ("ab", "", "c")
    assert pieces_of("", []) == ()

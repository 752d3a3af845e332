"""docs/examples/pytorch_model.py on a stand-in with PyTorch's interface, which is too large to install for a test.

The stand-in's layer has the weights of a plain one, whose margins are autodiff's.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from prob_transformer import decoder_margins
from tests.helpers.plain_decoder import EPSILON, draw, jacobians

FOLDER = Path(__file__).parents[2] / "docs/examples"
LENGTH, WIDTH = 6, 8


class Tensor(SimpleNamespace):
    """A NumPy array behind the calls that PyTorch needs; with `is_half` it has no NumPy dtype, as bfloat16 there."""

    is_half = False

    @property
    def shape(self):
        return self.array.shape

    def detach(self):
        return self

    def cpu(self):
        return self

    def float(self):
        return Tensor(array=self.array.astype(np.float32))

    def element_size(self):
        return 2 if self.is_half else self.array.itemsize

    def numpy(self):
        assert not self.is_half
        return self.array

    def __getitem__(self, index):
        return Tensor(array=self.array[index], is_half=self.is_half)


class Layer(SimpleNamespace):
    def register_forward_pre_hook(self, hook, *, with_kwargs):
        assert with_kwargs
        self.hooks = [*getattr(self, "hooks", []), hook]
        return SimpleNamespace(remove=lambda: self.hooks.remove(hook))


class Model(SimpleNamespace):
    def __call__(self, tokens):
        for block in self.model.layers:
            for hook in block.self_attn.hooks:
                hook(block.self_attn, (), {"hidden_states": Tensor(array=tokens[None])})


def example():
    spec = importlib.util.spec_from_file_location("pytorch_model", FOLDER / "pytorch_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(plain, family):
    """A model of one layer with these weights, as transformers names them in a family."""

    def linear(weight, bias):
        bias = None if bias is None else Tensor(array=bias.ravel())
        return SimpleNamespace(weight=Tensor(array=weight.reshape(-1, WIDTH)), bias=bias)

    layer = Layer(
        q_proj=linear(plain.query, plain.query_bias), k_proj=linear(plain.key, plain.key_bias), head_dim=4, scaling=0.5
    )
    config = SimpleNamespace(model_type=family)
    if plain.query_gain is not None:
        layer.q_norm, layer.k_norm = (
            SimpleNamespace(weight=Tensor(array=gain), variance_epsilon=EPSILON)
            for gain in (plain.query_gain, plain.key_gain)
        )
    if family == "mistral":
        config.sliding_window = plain.window
    elif family != "llama":
        layer.sliding_window = plain.window
    rotary = SimpleNamespace(inv_freq=Tensor(array=plain.frequencies), attention_scaling=1.0)
    layers = [SimpleNamespace(self_attn=layer)]
    return Model(model=SimpleNamespace(rotary_emb=rotary, layers=layers), config=config)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("mistral", {"window": 3}),
        ("qwen2", {"bias": True, "window": 4}),
        ("qwen3", {"normed": True}),
    ],
)
def test_the_example_reads_every_part_of_a_layer_and_leaves_no_hook(family, options):
    plain = draw(0, heads=4, groups=2, size=4, width=WIDTH, pairs=2, **options)
    model = model_of(plain, family)
    inputs = np.random.default_rng(0).normal(size=(LENGTH, WIDTH))
    (margins,) = decoder_margins(example().layers_of(model, inputs))
    blocks = np.eye(WIDTH) - jacobians(plain, inputs, False, False)
    np.testing.assert_allclose(margins.determinant, np.linalg.det(blocks), rtol=1e-9)
    assert model.model.layers[0].self_attn.hooks == []


def test_half_precision_is_read_as_float32():
    model = model_of(draw(0, heads=4, groups=2, size=4, width=WIDTH, pairs=2), "llama")
    model.model.layers[0].self_attn.q_proj.weight.is_half = True
    ((attention, _),) = example().layers_of(model, np.ones((LENGTH, WIDTH)))
    assert attention.query.dtype == np.float32


def test_a_family_that_was_not_tried_is_refused():
    model = model_of(draw(0, heads=4, groups=2, size=4, width=WIDTH, pairs=2), "gemma2")
    with pytest.raises(ValueError, match="model: is a gemma2; this reads llama, mistral, qwen2, qwen3"):
        example().layers_of(model, np.ones((LENGTH, WIDTH)))

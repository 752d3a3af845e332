"""docs/examples/pytorch_model.py on a stand-in with PyTorch's interface, which is too large to install for a test.

The stand-in's layer has the weights of a plain one, whose margins are autodiff's.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from prob_transformer import decoder_margins
from tests.support.plain_decoder import draw, jacobians

FOLDER = Path(__file__).parents[2] / "docs/examples"
LENGTH, WIDTH = 6, 8


class Tensor(SimpleNamespace):
    """A NumPy array behind the two calls that PyTorch needs."""

    def detach(self):
        return self

    def numpy(self):
        return self.array

    def __getitem__(self, index):
        return Tensor(array=self.array[index])


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


def test_the_example_hooks_every_layer_and_leaves_no_hook():
    spec = importlib.util.spec_from_file_location("pytorch_model", FOLDER / "pytorch_model.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    plain = draw(0, heads=4, groups=2, size=4, width=WIDTH, pairs=2)

    def linear(weight):
        return SimpleNamespace(weight=Tensor(array=weight.reshape(-1, WIDTH)))

    layer = Layer(q_proj=linear(plain.query), k_proj=linear(plain.key), head_dim=4, scaling=0.5)
    rotary = SimpleNamespace(inv_freq=Tensor(array=plain.frequencies))
    model = Model(model=SimpleNamespace(rotary_emb=rotary, layers=[SimpleNamespace(self_attn=layer)]))
    inputs = np.random.default_rng(0).normal(size=(LENGTH, WIDTH))
    (margins,) = decoder_margins(example.layers_of(model, inputs))
    blocks = np.eye(WIDTH) - jacobians(plain, inputs, False, False)
    np.testing.assert_allclose(margins.determinant, np.linalg.det(blocks), rtol=1e-9)
    assert layer.hooks == []

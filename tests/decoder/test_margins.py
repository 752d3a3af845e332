import jax.numpy as jnp
import numpy as np
import pytest
from plain_decoder import draw, jacobians

from prob_transformer.decoder import DecoderAttention, Rotary, layer_margins

# Grouped keys, rotary in both layouts (all and part of a head), biases, windows, values of another size than the keys,
# values without an output map, heads smaller and larger than half the width.
CASES = {
    "plain": {"heads": 2, "groups": 2, "size": 2, "width": 7},
    "rotary": {"heads": 4, "groups": 2, "size": 4, "width": 5, "inner": 3, "pairs": 2, "bias": True},
    "interleaved": {"heads": 2, "groups": 1, "size": 6, "width": 4, "inner": 1, "pairs": 2, "interleaved": True},
    "window": {"heads": 2, "groups": 1, "size": 2, "width": 9, "inner": 2, "pairs": 1, "bias": True, "window": 3},
    "values": {"heads": 2, "groups": 2, "size": 2, "width": 3, "inner": 3, "output": False},
}
LENGTH = 7
MODES = [
    (name, values, inclusive)
    for name, case in CASES.items()
    for values in (("identity", "own") if "inner" in case else ("identity",))
    for inclusive in (False, True)
]


def layer_of(plain, dtype=np.float64):
    def cast(x):
        return None if x is None else jnp.asarray(x, dtype)

    rotary = None if plain.frequencies is None else Rotary(cast(plain.frequencies), plain.interleaved)
    return DecoderAttention(
        *map(cast, plain[:4]),
        query_bias=cast(plain.query_bias),
        key_bias=cast(plain.key_bias),
        rotary=rotary,
        window=plain.window,
    )


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
    joint = values == "own"
    found = layer_margins(
        layer_of(plain),
        inputs,
        kinds=("determinant", "conditioning"),
        values=values,
        self_inclusive=inclusive,
        joint=joint,
        k=3,
    )
    np.testing.assert_allclose(found.determinant, np.linalg.det(blocks), rtol=1e-9, atol=1e-30)
    np.testing.assert_array_equal(found.sign, np.sign(found.determinant))
    np.testing.assert_allclose(found.barrier[:, 1:], -np.log(np.abs(np.linalg.det(blocks[:, 1:]))), atol=1e-9)
    singular = np.linalg.svd(blocks, compute_uv=False)[..., -1]
    np.testing.assert_allclose(found.conditioning, singular, rtol=1e-9, atol=1e-13)
    if joint:
        np.testing.assert_allclose(
            found.joint_sign * np.exp(found.joint_log_det), np.linalg.det(joint_blocks), rtol=1e-9
        )
        singular = np.linalg.svd(joint_blocks, compute_uv=False)[..., -1]
        np.testing.assert_allclose(found.joint_conditioning, singular, rtol=1e-9)

"""Laplace of a character GPT against what laplace-torch 0.3 found for the same weights, windows and prior precision.

laplace_torch.json is the result of `python -m benchmarks.laplace_torch` of version 0.1, which ran laplace-torch in an
environment of its own (torch 2.13, CPU) beside this library; its provenance is in it. laplace_torch.npz holds what both
sides were given: the weights after `python -m models.char_gpt train --objective ce --steps 500`, 16 windows of training
and 8 of validation text. Its factors add up what the positions of a window send back before they are multiplied, which
is `positions="together"` here.
"""

import json
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.char_gpt.config import Config
from models.char_gpt.linear_maps import matrices, trained_network, with_matrices
from prob_transformer.inference.laplace import laplace
from prob_transformer.transformer.network import Transformer

RESULT = json.loads(Path(__file__).with_name("laplace_torch.json").read_text(encoding="utf-8"))
CONFIGURATION = RESULT["provenance"]["configuration"]
TAU = CONFIGURATION["prior_precision"]


@pytest.fixture(scope="module")
def given():
    """The model, and the windows of training and validation text."""
    with np.load(Path(__file__).with_name("laplace_torch.npz")) as stored:
        arrays = dict(stored)
    sizes = {name: CONFIGURATION["run_configuration"][name] for name in ("layers", "width", "heads", "context")}
    model = Transformer(jax.random.key(0), Config(**sizes).transformer(len(arrays["head"])))
    model = with_matrices(model, {name: jnp.asarray(arrays[name]) for name in matrices(model)})

    def others(model):
        norms = {"final_norm": model.final_norm}
        for i, block in enumerate(model.blocks):
            norms |= {f"{i}.{name}": getattr(block, name) for name in ("attention_norm", "mlp_norm")}
        found = {f"{name}.{part}": getattr(norm, part) for name, norm in norms.items() for part in ("scale", "bias")}
        return found | {name: getattr(model, name) for name in ("token_embedding", "position_embedding")}

    model = eqx.tree_at(
        lambda m: list(others(m).values()), model, [jnp.asarray(arrays[name]) for name in others(model)]
    )
    return model, jnp.asarray(arrays["training"]), arrays["validation"]


@pytest.mark.parametrize("structure", ["last-layer", pytest.param("kronecker", marks=pytest.mark.slow)])
def test_evidence_and_predictive_loss_are_those_of_laplace_torch(given, structure):
    model, training, validation = given
    found = laplace(trained_network(model, training), structure=structure, positions="together", prior_precision=TAU)
    theirs = RESULT["structures"][structure]
    for name, part in found.evidence._asdict().items():
        np.testing.assert_allclose(part, theirs["log_evidence"]["theirs"][name], rtol=1e-5)
    probabilities = found.probit_probabilities(jnp.asarray(validation[:, :-1]))
    seen = np.take_along_axis(probabilities, validation[:, 1:, None], -1)
    np.testing.assert_allclose(-np.log(seen).mean(), theirs["predictive_loss"]["theirs"], rtol=1e-6)


@pytest.mark.slow
def test_positions_apart_change_the_evidence_as_they_did(given):
    model, training, _ = given
    found = laplace(trained_network(model, training), structure="kronecker", positions="apart", prior_precision=TAU)
    assert found.log_evidence == pytest.approx(RESULT["positions"]["kronecker_log_evidence"]["apart"], rel=1e-6)

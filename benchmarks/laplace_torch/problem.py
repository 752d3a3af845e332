"""What both sides are given, as arrays: weights by name, windows of training and validation text, prior precision."""

from typing import Any

import equinox as eqx
import jax
import numpy as np

from models import corpus
from models.char_gpt.config import Config
from models.char_gpt.laplace import training_windows
from models.char_gpt.linear_maps import matrices
from models.char_gpt.model import CharGPT, LayerNorm
from prob_transformer.inference.laplace import NetworkStructure

STRUCTURES: tuple[NetworkStructure, ...] = ("last-layer", "kronecker")


def weights(model: CharGPT) -> dict[str, np.ndarray]:
    """Everything that takes part in prediction: maps as matrices (outputs, inputs), embeddings, scales and biases."""
    found: dict[str, Any] = dict(matrices(model))
    found |= {name: getattr(model, name) for name in ("token_embedding", "position_embedding")}
    norms: dict[str, LayerNorm] = {"final_norm": model.final_norm}
    for index, block in enumerate(model.blocks):
        norms |= {f"{index}.{name}": getattr(block, name) for name in ("attention_norm", "mlp_norm")}
    for name, norm in norms.items():
        found |= {f"{name}.scale": norm.scale, f"{name}.bias": norm.bias}
    used = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array)))
    unused = sum(leaf.size for leaf in jax.tree.leaves(eqx.filter(model.prior_stage, eqx.is_inexact_array)))
    if sum(x.size for x in found.values()) != used - unused:
        raise AssertionError("weights: a parameter of the model is not handed over; add it here.")
    return {name: np.asarray(x) for name, x in found.items()}


def problem(
    model: CharGPT, config: Config, text: corpus.Corpus, prior_precision: float, sizes: dict[str, int]
) -> dict[str, Any]:
    """The arrays of the exchange file. Raises ValueError naming the option for sizes that do not fit the text."""
    shortest = {"training_windows": 1, "validation_windows": 1, "validation_length": 1, "batch": 1}
    for name, smallest in shortest.items():
        if sizes[name] < smallest:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: got {sizes[name]}; pass an integer of at least {smallest}.")
    length = sizes["validation_length"]
    if length > config.context:
        raise ValueError(f"--validation-length: got {length}; pass at most the context of the run, {config.context}.")
    available = len(text.validation) // (length + 1)
    if sizes["validation_windows"] > available:
        raise ValueError(f"--validation-windows: got {sizes['validation_windows']}; pass at most {available}.")
    starts = np.arange(sizes["validation_windows"]) * (available // sizes["validation_windows"]) * (length + 1)
    return {
        "training": training_windows(text, config, sizes["training_windows"] * config.context),
        "validation": np.stack([text.validation[start : start + length + 1] for start in starts]),
        "prior_precision": prior_precision,
        "heads": config.heads,
        "batch": sizes["batch"],
        "structures": np.array(STRUCTURES),
        **{f"weight/{name}": x for name, x in weights(model).items()},
    }

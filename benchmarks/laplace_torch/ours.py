"""This library's answers to a problem: evidence parts, probit predictions, and seconds with and without compilation."""

import time
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.char_gpt.linear_maps import trained_network
from models.char_gpt.model import CharGPT
from prob_transformer.inference.laplace import NetworkLaplace, NetworkStructure, Positions, laplace


def _fitted(
    model: CharGPT, problem: dict[str, Any], structure: NetworkStructure, positions: Positions
) -> tuple[NetworkLaplace, float]:
    """The Gaussian, and the seconds until its evidence was there."""
    network = trained_network(model, jnp.asarray(problem["training"]))
    started = time.perf_counter()
    found = laplace(network, structure=structure, positions=positions, prior_precision=problem["prior_precision"])
    return found, time.perf_counter() - started


def answer(model: CharGPT, problem: dict[str, Any], structure: NetworkStructure) -> dict[str, Any]:
    """Evidence parts, seconds of a first and a second fit, and probit probabilities of the validation windows."""
    contexts = jnp.asarray(problem["validation"][:, :-1])
    # As laplace-torch combines positions, so that the same thing is compared.
    _, first = _fitted(model, problem, structure, "together")
    found, seconds = _fitted(model, problem, structure, "together")
    started = time.perf_counter()
    probabilities = found.probit_probabilities(contexts)
    return {
        "evidence": np.array(found.evidence),
        "probabilities": probabilities,
        "seconds": seconds,
        "first_seconds": first,
        "predictive_seconds": time.perf_counter() - started,
        "logits": np.asarray(found.logits(contexts)),
    }


def log_evidence_with(model: CharGPT, problem: dict[str, Any], positions: Positions) -> float:
    """The Kronecker log-evidence in nats with positions combined in another way."""
    return _fitted(model, problem, "kronecker", positions)[0].log_evidence

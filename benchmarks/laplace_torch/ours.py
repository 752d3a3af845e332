"""This library's answers to a problem: evidence parts, probit predictions, and seconds with and without compilation."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.char_gpt import last_layer, linear_maps
from models.char_gpt.laplace import Curvature, Structure, covered, curvature, evidence_of
from models.char_gpt.model import CharGPT
from models.char_gpt.predictive import probit
from prob_transformer.inference.laplace.kfac import Positions
from prob_transformer.inference.laplace.kronecker import KroneckerPrecision


def _fitted(
    model: CharGPT, windows: Int[Array, "W n+1"], structure: Structure, positions: Positions, tau: float
) -> tuple[Curvature, float]:
    """The curvature, and the seconds until log det P was there."""
    started = time.perf_counter()
    found = curvature(model, windows, structure, positions)
    found.log_det_ratio(tau)
    return found, time.perf_counter() - started


@jax.jit
def _variances(
    model: CharGPT, at: linear_maps.Matrices, precision: KroneckerPrecision, characters: Int[Array, " n"]
) -> Float[Array, "n V"]:
    def one(position: Int[Array, ""]) -> Float[Array, " V"]:
        return jnp.diag(precision.covariance_of(linear_maps.logit_jacobian(model, at, characters, position)))

    return jax.lax.map(one, jnp.arange(characters.shape[0]))


def answer(model: CharGPT, problem: dict[str, Any], structure: Structure) -> dict[str, Any]:
    """Evidence parts, seconds of a first and a second fit, and probit probabilities of the validation windows."""
    windows, contexts = (jnp.asarray(problem["training"]), jnp.asarray(problem["validation"][:, :-1]))
    tau, at = problem["prior_precision"], covered(model, structure)
    # As laplace-torch combines positions, so that the same thing is compared.
    _, first = _fitted(model, windows, structure, "together", tau)
    found, seconds = _fitted(model, windows, structure, "together", tau)
    precision = found.at(tau)
    parts = evidence_of(model, windows, at, found.log_det_ratio)(tau)
    started = time.perf_counter()
    inputs, logits = last_layer.head_inputs(model, contexts)
    if isinstance(precision, KroneckerPrecision):
        variances = np.concatenate([_variances(model, at, precision, window) for window in contexts])
    else:
        variances = last_layer.logit_variance(precision, inputs)
    return {
        "evidence": np.array(parts),
        "probabilities": probit(logits, variances).reshape(*contexts.shape, -1),
        "logits": np.asarray(logits).reshape(*contexts.shape, -1),
        "seconds": seconds,
        "first_seconds": first,
        "predictive_seconds": time.perf_counter() - started,
    }


def log_evidence_with(model: CharGPT, problem: dict[str, Any], positions: Positions) -> float:
    """The Kronecker log-evidence in nats with positions combined in another way."""
    windows, at = jnp.asarray(problem["training"]), covered(model, "kronecker")
    found = curvature(model, windows, "kronecker", positions)
    return evidence_of(model, windows, at, found.log_det_ratio)(problem["prior_precision"]).total

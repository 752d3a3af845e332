"""What a Gaussian over weights predicts, logits taken as linear in the weights, and how good and calibrated that is.

logits(theta) = f + J (theta - theta*),    theta ~ N(theta*, P^{-1})
sampled     mean over draws of softmax(f + J (theta_s - theta*))
probit      softmax(f_v / sqrt(1 + pi/8 var_v)),    var = diag(J P^{-1} J^T)        (MacKay 1992)
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.char_gpt.evaluation import standard_error
from models.char_gpt.linear_maps import Matrices, with_matrices
from models.char_gpt.model import CharGPT

BINS = 15


class Score(NamedTuple):
    """Mean loss in nats a character, its standard error over windows (None for one), and the expected calibration
    error."""

    nats_per_character: float
    standard_error: float | None
    calibration_error: float


def probit(logits: Float[Any, "*n V"], variances: Float[Any, "*n V"]) -> Float[np.ndarray, "*n V"]:
    """Probabilities of the probit approximation from means and variances of the logits."""
    scaled = np.asarray(logits, np.float64) / np.sqrt(1 + np.pi / 8 * np.asarray(variances, np.float64))
    exponentials = np.exp(scaled - scaled.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


@eqx.filter_jit
def sampled(
    model: CharGPT, at: Matrices, draws: Matrices, windows: Int[Array, "W n+1"]
) -> tuple[Float[Array, "W n V"], Float[Array, "S W n"]]:
    """Mean probabilities over draws of the linearised logits, and every draw's log-probability of what came next.

    `draws` holds deviations from `at`, the matrices of the model that are uncertain, with S of them in front.
    """

    def one_window(window: Int[Array, " n+1"]) -> tuple[Array, Array]:
        logits, change = jax.linearize(lambda replaced: with_matrices(model, replaced)(window[:-1]), at)

        def one_draw(total: Array, draw: Matrices) -> tuple[Array, Array]:
            log_p = jax.nn.log_softmax(logits + change(draw))
            return total + jnp.exp(log_p), jnp.take_along_axis(log_p, window[1:, None], -1)[:, 0]

        total, seen = jax.lax.scan(one_draw, jnp.zeros_like(logits), draws)
        return total / len(seen), seen

    probabilities, seen = jax.lax.map(one_window, windows)
    return probabilities, seen.swapaxes(0, 1)


def calibration_error(probabilities: Float[np.ndarray, "N V"], targets: Int[np.ndarray, " N"]) -> float:
    """Mean distance of accuracy from confidence over 15 equal bins of the largest probability, weighted by count."""
    confidence, hit = probabilities.max(-1), probabilities.argmax(-1) == targets
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, confidence - hit, BINS)
    return float(np.abs(gaps).sum() / len(targets))


def score(probabilities: Float[Any, "W n V"], targets: Int[np.ndarray, "W n"]) -> Score:
    """How well probabilities predict the targets of several windows."""
    p = np.asarray(probabilities, np.float64)
    losses = -np.log(np.take_along_axis(p, targets[..., None], -1))[..., 0].mean(-1)
    error = calibration_error(p.reshape(-1, p.shape[-1]), np.ravel(targets))
    return Score(float(losses.mean()), standard_error(losses), error)

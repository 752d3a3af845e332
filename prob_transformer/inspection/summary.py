"""An inspection by layer and head: how often det J_i is negative, how often its sign changes, how close it comes.

The first position has no past (J = I, or J = 0 with itself included), so it says nothing of the text and is left out.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from prob_transformer.inspection.inspection import Inspection

QUANTILES = (0.05, 0.5, 0.95)


class Summary(NamedTuple):
    """Of every layer and head, over the positions after the first.

    `negative` is the share of positions with det J_i < 0, `crossings` the number of times the sign differs from that of
    the position before, `quantiles` those of the barrier -log|det J_i| in nats at QUANTILES, `closest` the position of
    the largest barrier, +inf where the determinant is 0.
    """

    negative: Float[np.ndarray, "L H"]
    crossings: Int[np.ndarray, "L H"]
    quantiles: Float[np.ndarray, "L H q"]
    closest: Int[np.ndarray, "L H"]


def summary(inspection: Inspection) -> Summary:
    """The figures of each layer and head."""
    sign, barrier = inspection.sign[..., 1:], -inspection.log_det[..., 1:]
    # Observed values: between two of them an infinite barrier would leave no number.
    quantiles = np.quantile(barrier, QUANTILES, axis=-1, method="inverted_cdf")
    return Summary(
        negative=(sign < 0).mean(-1),
        crossings=(sign[..., 1:] != sign[..., :-1]).sum(-1),
        quantiles=np.moveaxis(quantiles, 0, -1),
        closest=1 + barrier.argmax(-1),
    )


def worst_first(negative: np.ndarray, barrier: np.ndarray) -> np.ndarray:
    """Heads by share of negative determinants, then by largest barrier."""
    return np.lexsort((-barrier.max(-1), -negative))


def worst_heads(inspection: Inspection, found: Summary) -> list[tuple[int, int]]:
    """Row of the layer and head, the worst first: by share of negative determinants, then by largest barrier."""
    heads = inspection.sign.shape[1]
    barrier = -inspection.log_det[..., 1:].reshape(-1, inspection.tokens.size - 1)
    return [divmod(int(index), heads) for index in worst_first(found.negative.ravel(), barrier)]

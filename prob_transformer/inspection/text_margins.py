"""The numbers of an inspection: sign and log|det J_i| of every layer, head and position of a text, and the carriers.

They are summed up by layer and head: how often det J_i is negative, how often its sign changes, how close it comes. The
first position has no past (J = I, or J = 0 with itself included), so it says nothing of the text and is left out there.

The map analysed is e_i = u_i - mu_i(u_i) of each head on the layer's own normalised inputs, not the residual block
u + mu that the decoder computes (docs/inspect.md). Carriers are the tokens with the largest share of the weighted
variance sum_s alpha_s |v_s - v_mean|^2 that a position attends to.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from prob_transformer import layer_margins
from prob_transformer.attention import Attention
from prob_transformer.margins import Values

CARRIERS = 3
QUANTILES = (0.05, 0.5, 0.95)


class Setting(NamedTuple):
    """How a layer is looked at: values "identity" or "own"; the strict past, or the position itself too."""

    values: Values = "identity"
    self_inclusive: bool = False


class Summary(NamedTuple):
    """Of every layer and head, over the positions after the first.

    `negative` is the share of positions with det J_i < 0, `crossings` the number of times the sign differs from that of
    the position before, `quantiles` those of the barrier -log|det J_i| in nats at QUANTILES, `closest` the position of
    the largest barrier, +inf where the determinant is 0. `worst` has rows and heads in the order of how often they are
    past the boundary, then of their largest barrier.
    """

    negative: Float[np.ndarray, "L H"]
    crossings: Int[np.ndarray, "L H"]
    quantiles: Float[np.ndarray, "L H q"]
    closest: Int[np.ndarray, "L H"]
    worst: Int[np.ndarray, "LH 2"]


@dataclass(frozen=True)
class Inspection:
    """What was found on n tokens in L layers of H heads.

    `pieces` is the text of each token, "" where it continues a character that an earlier token began; joined they are
    the text, with the names of the tokens that the tokenizer added. `sign` and `log_det` (in nats) are of det J_i;
    `carriers` are positions, heaviest first, with their `shares` (0 where there are fewer). `layers` are the numbers of
    the layers in the model.
    """

    pieces: tuple[str, ...]
    tokens: Int[np.ndarray, " n"]
    layers: tuple[int, ...]
    sign: Int[np.ndarray, "L H n"]
    log_det: Float[np.ndarray, "L H n"]
    carriers: Int[np.ndarray, "L H n c"]
    shares: Float[np.ndarray, "L H n c"]
    setting: Setting

    @cached_property
    def summary(self) -> Summary:
        """The figures of each layer and head."""
        sign, barrier = self.sign[..., 1:], -self.log_det[..., 1:]
        negative = (sign < 0).mean(-1)
        # Observed values: between two of them an infinite barrier would leave no number.
        quantiles = np.quantile(barrier, QUANTILES, axis=-1, method="inverted_cdf")
        order = np.lexsort((-barrier.max(-1).ravel(), -negative.ravel()))
        return Summary(
            negative,
            crossings=(sign[..., 1:] != sign[..., :-1]).sum(-1),
            quantiles=np.moveaxis(quantiles, 0, -1),
            closest=1 + barrier.argmax(-1),
            worst=np.stack(np.unravel_index(order, negative.shape), axis=-1),
        )


def pieces_of(text: str, ends: Iterable[int]) -> tuple[str, ...]:
    """The text cut where each token ends, by character offsets; "" for a token within a character already begun.

    Whatever a tokenizer leaves out between two tokens goes with the later one.
    """
    pieces, start = [], 0
    for end in ends:
        pieces.append(text[start:end])
        start = max(start, end)
    return tuple(pieces)


def inspect_text(
    layers: Iterable[tuple[Attention, Float[Any, "n d"]]],
    pieces: Sequence[str],
    tokens: Int[Any, " n"],
    setting: Setting,
    chosen: Sequence[int],
    after_layer: Callable[[], object] = lambda: None,
) -> Inspection:
    """The margins of the layers numbered `chosen`; `layers` are pairs of a layer and its normalised inputs (n, d).

    `layers` is read no further than needed, and one layer's matrices are alive at a time. Raises ValueError, naming the
    layer, as `layer_margins` does, and for tokens and pieces of different numbers.
    """
    numbers = np.asarray(tokens)
    if len(pieces) != numbers.size:
        raise ValueError(f"pieces: got {len(pieces)} for {numbers.size} tokens; pass one a token.")
    wanted, found = set(chosen), list[tuple[np.ndarray, ...]]()
    for index, (layer, inputs) in enumerate(layers):
        if index in wanted:
            values, inclusive = setting
            try:
                margins = layer_margins(layer, inputs, values=values, self_inclusive=inclusive, k=numbers.size)
            except ValueError as error:
                raise ValueError(f"layer {index}: {error}") from None
            # The support tokens come closest first.
            order = np.argsort(margins.support.positions, axis=1)
            shares = np.take_along_axis(np.asarray(margins.support.carriers), order[..., None], axis=1)
            carriers = np.argsort(-shares, axis=-1, kind="stable")[..., :CARRIERS]
            shares = np.take_along_axis(shares, carriers, axis=-1)
            found.append((np.asarray(margins.sign).astype(np.int8), np.asarray(margins.log_det), carriers, shares))
            wanted.remove(index)
            after_layer()
        if not wanted:
            break
    if wanted:
        raise ValueError(f"layers: {sorted(wanted)} are not in the model; pass numbers it has.")
    sign, log_det, carriers, shares = map(np.stack, zip(*found, strict=True))
    return Inspection(tuple(pieces), numbers, tuple(sorted(chosen)), sign, log_det, carriers, shares, setting)

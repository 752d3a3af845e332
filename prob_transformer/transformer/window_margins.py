"""Margins of the positions that generated tokens were predicted from, a window of the text at a time.

Windows are those of decoding.py: n tokens, a new one every g = floor(n / 2) + 1 tokens. But for the first window, the
positions that are read are the last g ones, from position n - g to n - 1. So windows are worked on in blocks of g
positions, all of one shape: first the positions from 0 of the first window, then those from n - g of every window.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from prob_transformer._dtypes import in_common_type
from prob_transformer.attention import Attention
from prob_transformer.kernels.block_triangular import HeadMargins, margins_of_columns, query_basis
from prob_transformer.self_inclusion import Head, Reading, heads_of, view_from
from prob_transformer.transformer.decoding import (
    Decoding,
    Noise,
    window_embeddings,
    window_number,
    window_start,
    window_step,
)
from prob_transformer.transformer.network import Transformer

Basis = tuple[Float[Array, "H d d"], Float[Array, "H r p"]]


def columns_of_heads(
    attention: Attention, basis: Basis, inputs: Float[Array, "n d"], positions: Int[Array, " b"]
) -> Float[Array, "H b d r"]:
    """Q^T L T^T (kernels/block_triangular.py) of every head of a layer, with L = Cov_alpha(u, k) / sqrt(p)."""
    attention, inputs = in_common_type((attention, inputs))
    reading = Reading(inclusive=False, narrow=str(inputs.dtype))

    def of_head(head: Head, basis: Float[Array, "d d"], triangular: Float[Array, "r p"]) -> Float[Array, "b d r"]:
        return view_from(attention, head, inputs @ basis, positions, reading).covariance @ triangular.T

    return jax.vmap(of_head)(heads_of(attention, inputs, own_values=False), *basis)


def _margins_of_block(
    transformer: Transformer,
    bases: tuple[Basis, ...],
    embeddings: Float[Array, "n d"],
    positions: Int[Array, " b"],
    number: Int[Array, ""],
) -> HeadMargins:
    """Margins (L, H, b) at some positions of one window."""
    inputs = transformer.decode(embeddings)[1].inputs
    layers = zip(transformer.blocks, bases, inputs, strict=True)
    columns = jnp.stack(
        [columns_of_heads(block.attention(), basis, of_layer, positions) for block, basis, of_layer in layers]
    )
    found = margins_of_columns(columns.reshape(-1, *columns.shape[3:]), number)
    return jax.tree.map(lambda x: x.reshape(columns.shape[:3]).astype(inputs.dtype), found)


def margins_of_steps(
    transformer: Transformer, text: Decoding, tokens: Int[Array, " N"], windows: int, noise: Noise | None
) -> HeadMargins:
    """Margins (L, H, N) of the positions that N tokens after a text were predicted from.

    `windows` is how many windows the positions lie in, or more.
    """
    context, step = transformer.context, window_step(transformer.context)
    start = window_start(text.length, context)
    count = text.length - start
    room = max(step * (windows - 1) + context, context + tokens.shape[0])
    written = lax.dynamic_update_slice(jnp.pad(text.tokens, (0, room - context)), tokens, (count,))
    bases = tuple(query_basis(in_common_type(block.query)) for block in transformer.blocks)
    last = context - step

    def of_block(number: Int[Array, ""]) -> HeadMargins:
        first = step * jnp.maximum(number - 1, 0)
        window = lax.dynamic_slice(written, (first,), (context,))
        embeddings = window_embeddings(transformer, window, start + first, noise)
        positions = jnp.where(number == 0, 0, last) + jnp.arange(step)
        return _margins_of_block(transformer, bases, embeddings, positions, number)

    found = lax.map(of_block, jnp.arange(windows + 1))
    counts = count + jnp.arange(tokens.shape[0])
    number = window_number(counts, context)
    position = counts - 1 - step * number
    is_early = position < last
    block, place = jnp.where(is_early, 0, number + 1), position - jnp.where(is_early, 0, last)
    return jax.tree.map(lambda x: jnp.moveaxis(x[block, :, :, place], 0, -1), found)

"""Stability margins and support tokens: how far each position is from the degeneracy boundary det J_i = 0.

Two margins that can rank positions differently when d > 1, so every report names the one it used:

    determinant   det J_i, with its sign: 1 without attention, 0 on the boundary, negative past it
    conditioning  sigma_min(J_i): u_i moves by at most 1 / sigma_min times a small change of eps_i, its past fixed

Both speak of the generator, noise to embedding, at one position. The sensitivity of u -> mu(u), which a decoder
computes, is I - J_i, bounded at the boundary with past and A fixed. Neither is a margin of the sequence (theory
section 4).

Layers of trained decoders are looked at head by head, and with the position among its own keys too (`layer_margins`).
What is analysed is the map e_i = u_i - mu_i(u_i) of each head on the layer's own normalised inputs, not the residual
block u + mu that the decoder computes; the closed forms are in self_inclusion.py. Inputs of any dtype are worked on in
float64 there, but for the sums of the covariances, which are made in the dtype of the inputs, in float32 for narrower
ones; so are the results given. A logit of 50 rounded in float32 leaves c = 1 - alpha_ii six digits, and det J_i of a
self-inclusive head has c^d in it.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from prob_transformer._dtypes import cast, in_float32_at_least, ranks_promoted
from prob_transformer._implementation import Implementation, is_blocked
from prob_transformer._validation import require_choice, require_count, require_embeddings, require_key
from prob_transformer.attention import (
    Attention,
    Past,
    attention_weights,
    require_joint,
    require_layer,
    weighted_mean,
)
from prob_transformer.change_of_variables import jacobian_block, residual_and_log_det
from prob_transformer.kernels.conditioning import conditioning_margin
from prob_transformer.kernels.moments import LogDet
from prob_transformer.self_inclusion import (
    Head,
    Reading,
    block_log_det,
    factored_jacobian,
    heads_of,
    shares_of,
    smallest_singular_value,
)

MarginKind = Literal["determinant", "conditioning"]


class SupportTokens(NamedTuple):
    """The k positions closest to the boundary, closest first.

    `positions` (..., k); `margins` (..., k) of the kind asked for; `carriers` (..., k, n): the share of each past
    token in the total weighted variance that the position attends to (summing to 1, or all 0 where that variance is 0).
    """

    positions: Int[Array, "... k"]
    margins: Float[Array, "... k"]
    carriers: Float[Array, "... k n"]


@in_float32_at_least
def stability_margin(
    attention: Attention,
    embeddings: Float[Array, "... n d"],
    kind: MarginKind = "determinant",
    *,
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "... n"]:
    """Margin m_i of every position: det J_i with its sign, or the smallest singular value of J_i.

    The determinant is inf where it exceeds the range of the dtype; `residual_and_log_det` still gives its logarithm.
    The blocked conditioning margin is the upper end of `conditioning_margin`, whose iterations start from `key`. Raises
    ValueError for an unknown kind, for a key that is missing, and as `residual_and_log_det`. Source: theory section 4,
    our definition.
    """
    require_choice("kind", kind, get_args(MarginKind))
    if kind == "determinant":
        _, sign, log_det = residual_and_log_det(attention, embeddings, implementation=implementation)
        return sign * jnp.exp(log_det)
    if is_blocked(implementation):
        return conditioning_margin(attention, embeddings, require_key("key", key)).upper
    return jnp.linalg.svd(jacobian_block(attention, embeddings), compute_uv=False)[..., -1]


def _ratio(part: Float[Array, "..."], whole: Float[Array, ""]) -> Float[Array, "..."]:
    """part / whole, where the whole is 0 or more, and 0 where both are 0."""
    return part / jnp.where(whole > 0, whole, 1)


def _variance_share(weights: Float[Array, "H n"], values: Float[Array, "H n d"]) -> Float[Array, " n"]:
    """Share of token s in sum_h tr Cov_{alpha^h}(v^h): sum_h alpha^h_s |v^h_s - v^h_mean|^2, normalised."""
    is_attended = (weights > 0)[..., None]
    # Relative to the token of the largest weight, as in `weighted_covariance`, and to the largest deviation, whose
    # square might leave the range of the dtype.
    heaviest = jnp.argmax(weights, axis=1)[:, None, None]
    values = jnp.where(is_attended, values - jnp.take_along_axis(values, heaviest, axis=1), 0)
    deviations = jnp.where(is_attended, values - jax.vmap(weighted_mean)(weights, values)[:, None], 0)
    largest = jnp.abs(deviations).max()
    spread = (weights * jnp.square(_ratio(deviations, largest)).sum(-1)).sum(0)
    return _ratio(spread, spread.sum())


@partial(jax.jit, static_argnums=3, inline=True)
def _closest_positions(
    attention: Attention, embeddings: Float[Array, "... n d"], margins: Float[Array, "... n"], k: int
) -> SupportTokens:
    positions = jnp.argsort(jnp.abs(margins), axis=-1, stable=True)[..., :k]

    def one_sequence(sequence: Float[Array, "n d"], chosen: Int[Array, " k"]) -> Float[Array, "k n"]:
        past = Past.of(attention, sequence)

        def one_position(position: Int[Array, ""]) -> Float[Array, " n"]:
            before = past.before(attention, position)
            return _variance_share(attention_weights(attention, before, sequence[position]), before.values)

        return jax.vmap(one_position)(chosen)

    for _ in range(embeddings.ndim - 2):
        one_sequence = jax.vmap(one_sequence)
    return SupportTokens(
        positions, jnp.take_along_axis(margins, positions, axis=-1), one_sequence(embeddings, positions)
    )


@in_float32_at_least
def support_tokens(
    attention: Attention,
    embeddings: Float[Array, "... n d"],
    k: int,
    kind: MarginKind = "determinant",
    *,
    key: PRNGKeyArray | None = None,
    implementation: Implementation | None = None,
) -> SupportTokens:
    """The k positions closest to the degeneracy boundary, and the past tokens that carry their weighted covariance.

    Closest means smallest |margin|, which for the determinant is the largest barrier b_i; a negative margin stays
    visible in `margins`. Ties go to the earlier position. Raises ValueError if k is not between 1 and n, and as
    `stability_margin`.
    """
    embeddings = require_joint("embeddings", embeddings, attention)
    margins = stability_margin(attention, embeddings, kind, key=key, implementation=implementation)
    require_count("k", k, 1, "the number of positions to return")
    if k > embeddings.shape[-2]:
        raise ValueError(f"k: got {k}; pass at most n = {embeddings.shape[-2]}, the number of positions.")
    return _closest_positions(attention, embeddings, margins, k)


def _carriers_of_head(
    layer: Attention, inputs: Float[Array, "n d"], reading: Reading, parts: tuple[Head, Int[Array, " k"]]
) -> Float[Array, "k n"]:
    """Of one head at k positions, each token's share of sum_s alpha_s |v_s - v_mean|^2; all 0 where that sum is 0."""
    head, positions = parts
    shares = shares_of(layer, head, positions, reading)
    weights = shares.past_share[:, None] * shares.weights
    weights = weights.at[jnp.arange(len(positions)), positions].set(shares.own_share)
    values = inputs if head.value is None or head.output is None else inputs @ head.value.T @ head.output.T
    return jax.vmap(_variance_share, (0, None))(weights[:, None], values[None])


def _closest_of_heads(
    layer: Attention,
    heads: Head,
    inputs: Float[Array, "n d"],
    positions: Int[Array, " m"],
    distance: Float[Array, "H m"],
    margins: Float[Array, "H m"],
    k: int,
    reading: Reading,
) -> SupportTokens:
    """The k positions of smallest distance of every head, (H, k), their margins, and their carriers (H, k, n).

    The first position of a text has no past, so its margin says nothing of the text: it comes after all others.
    """
    order = jnp.argsort(jnp.where(positions > 0, distance, jnp.inf), stable=True)[:, :k]
    chosen = positions[order]
    carriers = lax.map(partial(_carriers_of_head, layer, inputs, reading), (heads, chosen))
    return SupportTokens(chosen, jnp.take_along_axis(margins, order), carriers)


Values = Literal["identity", "own"]

# Positions a step: the covariances of one head at this many positions are alive at once.
_BLOCK = 64
_BLOCK_OF_FULL_MATRICES = 16


class LayerMargins(NamedTuple):
    """Margins of one layer at m positions, per head; what was not asked for is None.

    `sign` and `log_det` (H, m) of det J_i in nats; `conditioning` (H, m), sigma_min(J_i); `joint_sign`,
    `joint_log_det`, `joint_conditioning` (m,), the same of all heads together; `support`, the closest of each head.
    """

    positions: Int[Array, " m"]
    sign: Float[Array, "H m"] | None
    log_det: Float[Array, "H m"] | None
    conditioning: Float[Array, "H m"] | None
    joint_sign: Float[Array, " m"] | None
    joint_log_det: Float[Array, " m"] | None
    joint_conditioning: Float[Array, " m"] | None
    support: SupportTokens

    @property
    def barrier(self) -> Float[Array, "H m"] | None:
        """b_i = -log|det J_i| in nats."""
        return None if self.log_det is None else -self.log_det

    @property
    def determinant(self) -> Float[Array, "H m"] | None:
        """det J_i with its sign: 0 or inf where it leaves the range of the dtype, so compare barriers instead."""
        if self.sign is None or self.log_det is None:
            return None
        return self.sign * jnp.exp(self.log_det)


class _Asked(NamedTuple):
    """What to compute: hashable, so that every layer of a decoder runs the same compiled function."""

    determinant: bool
    conditioning: bool
    own_values: bool
    reading: Reading
    joint: bool


def _in_blocks(function: Any, positions: Int[Array, " m"], block: int) -> Any:
    """What `function` gives for a block of positions, vectors (b,), for all positions (m,), a block at a time."""
    count = len(positions)
    block = min(block, count)
    # The last position once more fills the last block.
    filled = jnp.pad(positions, (0, -count % block), mode="edge").reshape(-1, block)
    return jax.tree.map(lambda x: x.reshape(-1)[:count], lax.map(function, filled))


def _joint(
    layer: Attention, heads: Head, inputs: Float[Array, "n d"], there: Int[Array, " b"], asked: _Asked
) -> tuple[LogDet | None, Float[Array, " b"] | None]:
    """J_i = I - sum_h W_O^h G^h_i as full matrices."""

    def add_head(total: Float[Array, "b d d"], head: Head) -> tuple[Float[Array, "b d d"], None]:
        found = factored_jacobian(layer, head, inputs, there, asked.reading)
        return total - found.left @ found.right, None

    identity = jnp.broadcast_to(jnp.eye(layer.width, dtype=inputs.dtype), (len(there), layer.width, layer.width))
    whole, _ = lax.scan(add_head, identity, heads)
    log_det = LogDet(*jnp.linalg.slogdet(whole)) if asked.determinant else None
    return log_det, jnp.linalg.svd(whole, compute_uv=False)[:, -1] if asked.conditioning else None


@partial(jax.jit, static_argnames=("asked", "k"))
@ranks_promoted
def _margins(
    layer: Attention, inputs: Float[Array, "n d"], positions: Int[Array, " m"], asked: _Asked, k: int
) -> LayerMargins:
    layer, inputs = cast((layer, inputs), jnp.float64)[0]
    heads = heads_of(layer, inputs, asked.own_values)

    def log_det(head: Head) -> LogDet:
        there = partial(block_log_det, layer, head, inputs, reading=asked.reading)
        return _in_blocks(there, positions, _BLOCK)

    def conditioning(head: Head) -> Float[Array, " m"]:
        def there(block: Int[Array, " b"]) -> Float[Array, " b"]:
            return smallest_singular_value(factored_jacobian(layer, head, inputs, block, asked.reading))

        return _in_blocks(there, positions, _BLOCK_OF_FULL_MATRICES)

    sign = log = smallest = None
    if asked.conditioning:
        smallest = distance = margins = lax.map(conditioning, heads)
    if asked.determinant:
        # Ranked by logarithms, because determinants leave the range of the dtype.
        sign, log = lax.map(log_det, heads)
        distance, margins = log, sign * jnp.exp(log)
    together, together_smallest = None, None
    if asked.joint:
        blocks = partial(_joint, layer, heads, inputs, asked=asked)
        together, together_smallest = _in_blocks(blocks, positions, _BLOCK_OF_FULL_MATRICES)
    support = _closest_of_heads(layer, heads, inputs, positions, distance, margins, k, asked.reading)
    joint_sign, joint_log_det = (None, None) if together is None else together
    found = LayerMargins(positions, sign, log, smallest, joint_sign, joint_log_det, together_smallest, support)
    return cast(found, jnp.dtype(asked.reading.narrow))[0]


def _positions(positions: Sequence[int] | Int[Array, " m"] | None, length: int) -> Int[Array, " m"]:
    if positions is None:
        return jnp.arange(length)
    given = np.asarray(positions)
    if given.ndim != 1 or not given.size or not np.issubdtype(given.dtype, np.integer):
        raise ValueError("positions: pass at least one integer position, or None for all.")
    if given.min() < 0 or given.max() >= length or np.unique(given).size < given.size:
        raise ValueError(f"positions: pass different positions from 0 to n - 1 = {length - 1}.")
    return jnp.asarray(given)


def layer_margins(
    layer: Attention,
    inputs: Float[Array, "n d"],
    *,
    kinds: Sequence[MarginKind] = ("determinant",),
    values: Values = "identity",
    self_inclusive: bool = False,
    joint: bool = False,
    k: int = 1,
    positions: Sequence[int] | None = None,
) -> LayerMargins:
    """Margins of every head of one decoder layer on its normalised inputs (n, d), and k support tokens of each head.

    `values` "identity" takes v = u, the paper's form, head by head; "own" the layer's W_O W_V, for which `joint` adds
    all heads together at the cost of a d x d determinant a position. `self_inclusive` lets a position attend to itself,
    as the layer computes it, instead of to its strict past only. Kind "conditioning" costs a singular value
    decomposition a position and head: choose `positions` for it. Support tokens are ranked by determinant where it is
    among `kinds`. Raises ValueError for arguments that do not fit, and where the dtype cannot hold the numbers.
    Equations: self_inclusion.py.
    """
    if isinstance(kinds, str) or not kinds or set(kinds) - set(get_args(MarginKind)):
        raise ValueError(f"kinds: got {kinds!r}; pass one or more of {', '.join(get_args(MarginKind))} in a tuple.")
    if values not in get_args(Values):
        raise ValueError(f"values: got {values!r}; pass one of {', '.join(get_args(Values))}.")
    if joint and values == "identity":
        raise ValueError('joint=True needs values="own": heads with identity values cannot be combined.')
    inputs = require_embeddings("inputs", inputs, layer.width)
    if inputs.ndim != 2:
        raise ValueError(f"inputs: has shape {inputs.shape}; pass one sequence (n, d) at a time.")
    chosen = _positions(positions, inputs.shape[0])
    require_count("k", k, 1, "the number of support tokens of each head")
    if k > len(chosen):
        raise ValueError(f"k: got {k}; pass at most the number of positions, {len(chosen)}.")
    reading = Reading(self_inclusive, str(jnp.promote_types(inputs.dtype, jnp.float32)))
    asked = _Asked("determinant" in kinds, "conditioning" in kinds, values == "own", reading, joint)
    with jax.enable_x64(True):
        found = _margins(layer, inputs, chosen, asked, k)
    for name in ("log_det", "conditioning", "joint_log_det", "joint_conditioning"):
        numbers = getattr(found, name)
        if numbers is not None and not isinstance(numbers, jax.core.Tracer) and np.isnan(numbers).any():
            raise ValueError(f"inputs: {name} is not a number in {inputs.dtype}; pass smaller inputs or float64.")
    return found


def decoder_margins(layers: Iterable[tuple[Attention, Float[Array, "n d"]]], **asked: Any) -> Iterator[LayerMargins]:
    """Margins of a whole decoder, one layer at a time: `layer_margins(layer, inputs, **asked)` of every pair.

    `layers` is any iterable of a layer and its normalised inputs; when it is a generator that runs the model as it is
    read, memory holds one layer's numbers only and does not grow with depth. ValueErrors name the layer.
    """
    for index, pair in enumerate(layers):
        try:
            found = layer_margins(*require_layer(pair), **asked)
        except ValueError as error:
            raise ValueError(f"layer {index}: {error}") from None
        yield found

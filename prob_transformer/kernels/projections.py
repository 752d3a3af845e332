"""What the blocked implementation works on: queries, keys and features of attentions, positions last."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from prob_transformer.attention import Attention


class QueryMap(NamedTuple):
    """B_i = d q^_i / d q_i, how the query that the logits see moves with the plain one, for every position i.

        B_i = R_i diag(gain_i) (I - direction_i direction_i^T)

    `cosine` and `sine` (..., r, n) turn the pairs (j, j + r) of coordinates; `gain` and `direction` (..., H, p, n) are
    those of a query norm. What a layer does not have is None.
    """

    cosine: Float[Array, "... r n"] | None = None
    sine: Float[Array, "... r n"] | None = None
    gain: Float[Array, "... H p n"] | None = None
    direction: Float[Array, "... H p n"] | None = None

    def after(self, x: Float[Array, "c H a p b"]) -> Float[Array, "c H a p b"]:
        """x_i B_i for a block of positions."""
        if self.cosine is not None and self.sine is not None:
            x = _turned(x, self.cosine, -self.sine, 3)
        if self.gain is not None and self.direction is not None:
            x, direction = x * self.gain[:, :, None], self.direction[:, :, None]
            x = x - (x * direction).sum(3, keepdims=True) * direction
        return x

    def pull_back(
        self, x: Float[Array, "c H a p b"], pull: Float[Array, "c H p a b"]
    ) -> tuple[Float[Array, "c H p a b"], "QueryMap"]:
        """The pull on x and that on B_i of a pull on x_i B_i; pulls have the axis of p before that of a."""
        if self.cosine is None or self.sine is None or self.gain is not None:
            _, general = jax.vjp(lambda x, query_map: query_map.after(x), x, self)
            of_x, of_map = general(jnp.swapaxes(pull, 2, 3))
            return jnp.swapaxes(of_x, 2, 3), of_map
        # Written out, because turning the axes of a large array around takes as long as its rotation.
        pairs = self.cosine.shape[1]
        low, high = x[:, :, :, :pairs], x[:, :, :, pairs : 2 * pairs]
        of_low, of_high = pull[:, :, :pairs], pull[:, :, pairs : 2 * pairs]

        def along(pull: Float[Array, "c H r a b"], x: Float[Array, "c H a r b"]) -> Float[Array, "c r b"]:
            return jnp.einsum("chjab,chajb->cjb", pull, x)

        of_map = QueryMap(along(of_low, low) + along(of_high, high), along(of_low, high) - along(of_high, low))
        return _turned(pull, self.cosine, self.sine, 2), of_map


def _turned(
    x: Float[Array, "c H _ _ b"], cosine: Float[Array, "c r b"], sine: Float[Array, "c r b"], axis: int
) -> Float[Array, "c H _ _ b"]:
    shape = [1] * x.ndim
    shape[0], shape[axis], shape[-1] = cosine.shape
    cosine, sine = cosine.reshape(shape), sine.reshape(shape)
    first, second, rest = jnp.split(x, (shape[axis], 2 * shape[axis]), axis)
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis)


class Projections(eqx.Module):
    """Queries (..., H, p, n), and what they attend to (..., H, Hp + p, n): features above keys, positions last.

    Features are the values seen through the queries, W_Q V u_s. All three are as the sweep multiplies them: logits are
    queries . keys, and determinants those of I - Cov(features, keys) B. So both queries and features have the scale of
    the logits in them; queries and keys are normed and turned, features are not. `query_map` is B, or None where it is
    the identity. With `window` w position i sees s > i - w only. The leading axes count cells: a cell is one analysed
    attention on one sequence.
    """

    queries: Float[Array, "... H p n"]
    attended: Float[Array, "... H rows n"]
    query_map: QueryMap | None = None
    window: int | None = eqx.field(static=True, default=None)

    @classmethod
    def of(cls, attention: Attention, embeddings: Float[Array, "... n d"]) -> "Projections":
        """The cell of one attention and each sequence (..., n, d); heads are joint, as in the process."""
        if attention.value is None:
            return cls._of_heads(attention, embeddings)
        query = attention.query
        if attention.rotary is not None:
            query = jnp.swapaxes(attention.rotary.halves_first(jnp.swapaxes(query, 1, 2)), 1, 2)
        stacked_query = attention.scale * query.reshape(-1, attention.width)
        through = attention.value_maps(stacked_query)
        return cls._of_heads(attention, embeddings, jnp.einsum("hrd,...nd->...hrn", through, embeddings))

    @classmethod
    def of_heads_alone(cls, attention: Attention, embeddings: Float[Array, "... n d"]) -> "Projections":
        """A cell (..., H, 1, p, n) for every sequence and head, each alone and with identity values."""
        cells = cls._of_heads(attention, embeddings)
        query_map = cells.query_map
        if query_map is not None:
            each = cells.queries.shape[:-2]
            rotation = (
                None if x is None else jnp.broadcast_to(x[..., None, :, :], (*each, *x.shape[-2:]))
                for x in query_map[:2]
            )
            norm = (None if x is None else x[..., None, :, :] for x in query_map[2:])
            query_map = QueryMap(*rotation, *norm)
        return cls(cells.queries[..., None, :, :], cells.attended[..., None, :, :], query_map, cells.window)

    @classmethod
    def _of_heads(
        cls,
        attention: Attention,
        embeddings: Float[Array, "... n d"],
        features: Float[Array, "... H Hp n"] | None = None,
    ) -> "Projections":
        """With the features given, or with those of identity values, heads being looked at alone."""
        if attention.cap is not None:
            raise ValueError(
                "attention: has a cap, which the blocked implementation does not cover; use the reference."
            )
        rotary, norm = attention.rotary, attention.query_norm
        positions = jnp.arange(embeddings.shape[-2])
        plain = attention.plain_queries(embeddings)

        def last(x: Float[Array, "H ... n p"]) -> Float[Array, "... H p n"]:
            return jnp.moveaxis(x if rotary is None else rotary.halves_first(x), (0, -2), (-3, -1))

        queries = last(attention.seen_queries(plain, positions))
        keys = last(attention.of_heads(attention.seen_keys(attention.plain_keys(embeddings), positions)))
        query_map = None
        if rotary is not None or norm is not None:
            query_map = QueryMap()
            if rotary is not None:
                angles = rotary.angles(positions, plain.dtype, embeddings.shape[:-2])
                query_map = query_map._replace(cosine=jnp.cos(angles), sine=jnp.sin(angles))
            if norm is not None:
                gain, direction = (last(x) for x in norm.slope(plain))
                query_map = query_map._replace(gain=gain, direction=direction)
        attended = jnp.concatenate([attention.scale * last(plain) if features is None else features, keys], -2)
        return cls(queries, attended, query_map, attention.window)

    @property
    def rank(self) -> int:
        """Hp: how many of the attended rows are features."""
        return self.attended.shape[-2] - self.queries.shape[-2]

    @property
    def keys(self) -> Float[Array, "... H p n"]:
        return self.attended[..., self.rank :, :]

    @property
    def length(self) -> int:
        return self.queries.shape[-1]

    def flat(self) -> "Projections":
        """The same cells with one leading axis (c, H, ..., n)."""
        leading = self.queries.ndim - 3
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[leading:]), self)

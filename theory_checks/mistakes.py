"""Plausible mistakes in the library's source, each of which at least one check has to notice: the one list of them.

The sabotage puts `MISTAKES` into a copy of the library. Tests put one for every check, and the fine ones, into the
library that is loaded.

A mistake is a list of replacements: a file of `prob_transformer`, lines as they are, lines as they would be.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """A name, and what to replace by what in which file; every old text occurs exactly once in its file."""

    name: str
    replacements: tuple[tuple[str, str, str], ...]


def _mistake(name: str, file: str, old: str, new: str, *more: tuple[str, str]) -> Mistake:
    return Mistake(name, ((file, old, new), *((file, other_old, other_new) for other_old, other_new in more)))


_SOFTMAX, _ATTENTION, _CHANGE, _PROCESS = "softmax.py", "attention.py", "change_of_variables.py", "embedding_process.py"
_MARGIN, _RADIUS, _OBJECTIVE, _TOKENS = "margins.py", "certified_radius.py", "map_objectives.py", "token_model.py"
_MODEL, _LAW = "transformer/numpyro_model.py", "transformer/token_process.py"

MISTAKES: tuple[Mistake, ...] = (
    # attention
    _mistake("self-inclusion", _ATTENTION, "(distance > 0) & recent", "(distance >= 0) & recent"),
    _mistake("off-by-one mask", _ATTENTION, "(distance > 0) & recent", "(distance > 1) & recent"),
    _mistake("future seen", _ATTENTION, "(distance > 0) & recent", "(distance != 0) & recent"),
    _mistake("1/sqrt(p) missing in the logits", _ATTENTION, "return self.scale * (seen if", "return (seen if"),
    _mistake(
        "A transposed: query and key swapped in the logits",
        _ATTENTION,
        'jnp.einsum("gpd,...d->g...p", self.key, inputs)',
        'jnp.einsum("gpd,...d->g...p", self.query, inputs)',
        ('jnp.einsum("hpd,...d->h...p", self.query, inputs)', 'jnp.einsum("hpd,...d->h...p", self.key, inputs)'),
    ),
    _mistake(
        "values ignored",
        _ATTENTION,
        "if self.value is None:\n            return jnp.broadcast",
        "if True:\n            return jnp.broadcast",
    ),
    _mistake(
        "values seen through the keys",
        _ATTENTION,
        "stacked_query = attention.query.reshape",
        "stacked_query = attention.key.reshape",
    ),
    _mistake(
        "softmax without its largest logit",
        _SOFTMAX,
        'below = logits - jnp.take_along_axis(logits, index, axis=-2, mode="promise_in_bounds")',
        "below = logits",
        ("below = jnp.where(below > 0, 0, below)", "largest = jnp.exp(jnp.take_along_axis(logits, index, axis=-2))"),
        ("total = 1 + unnormalised", "total = largest + unnormalised"),
        ("jnp.where(is_any, 1 / total, 0)", "jnp.where(is_any, largest / total, 0)"),
    ),
    _mistake(
        "weights taken for constants in the gradient",
        _SOFTMAX,
        "below = jnp.where(below > 0, 0, below)",
        "below = jax.lax.stop_gradient(jnp.where(below > 0, 0, below))",
    ),
    _mistake(
        "moments not centred",
        _ATTENTION,
        "centred_x = x - weighted_mean(weights, x)[None]",
        "centred_x = x",
        ("centred_y = y - weighted_mean(weights, y)[None]", "centred_y = y"),
    ),
    _mistake(
        "biased covariance, n / (n - 1)",
        _ATTENTION,
        "(weights[:, None] * centred_x).T @ centred_y",
        "(weights[:, None] * centred_x).T @ centred_y * len(x) / (len(x) - 0.99)",
    ),
    _mistake(
        "unweighted covariance",
        _ATTENTION,
        "(weights[:, None] * centred_x).T @ centred_y",
        "((weights > 0)[:, None] * centred_x).T @ centred_y / jnp.maximum((weights > 0).sum(), 1)",
    ),
    # change of variables
    _mistake(
        "sign of the log-determinant",
        _CHANGE,
        "return ResidualAndLogDet(residual, sign, log_det)",
        "return ResidualAndLogDet(residual, sign, -log_det)",
    ),
    _mistake(
        "derivative of the weights dropped",
        _CHANGE,
        "shape[0], dtype=low_rank.dtype) - low_rank",
        "shape[0], dtype=low_rank.dtype) - 0 * low_rank",
    ),
    _mistake(
        "J = I + M", _CHANGE, "shape[0], dtype=low_rank.dtype) - low_rank", "shape[0], dtype=low_rank.dtype) + low_rank"
    ),
    _mistake(
        "1/sqrt(p) missing in the derivative", _ATTENTION, "return attention.scale * past.keys", "return past.keys"
    ),
    _mistake(
        "heads one by one",
        _CHANGE,
        "return jnp.moveaxis(blocks, 0, 1).reshape(queries.size, queries.size)",
        "return jax.scipy.linalg.block_diag(*(b[h * b.shape[1] :][: b.shape[1]] for h, b in enumerate(blocks)))",
    ),
    _mistake(
        "heads in the wrong axis",
        _CHANGE,
        "jnp.moveaxis(blocks, 0, 1).reshape(queries.size, queries.size)",
        "blocks.reshape(queries.size, queries.size)",
    ),
    _mistake(
        "sign of the determinant lost",
        _CHANGE,
        "return ResidualAndLogDet(residual, sign, log_det)",
        "return ResidualAndLogDet(residual, jnp.abs(sign), log_det)",
    ),
    _mistake(
        "residual of the opposite sign of attention",
        _CHANGE,
        "residual = embedding - jnp.einsum",
        "residual = embedding + jnp.einsum",
    ),
    _mistake("Jacobian block transposed", _CHANGE, '"hdp,hpe->de"', '"hdp,hpe->ed"'),
    # process and transform
    _mistake(
        "first token with the noise of the others",
        _PROCESS,
        "is_first = jnp.arange(self.length) == 0",
        "is_first = jnp.arange(self.length) < 0",
    ),
    _mistake(
        "variance taken for a standard deviation",
        _PROCESS,
        "residual / scale[..., None]",
        "residual / jnp.sqrt(scale)[..., None]",
    ),
    _mistake(
        "normalising constant of one dimension", _PROCESS, "residual.shape[-1] * (jnp.log(scale)", "1 * (jnp.log(scale)"
    ),
    _mistake(
        "density without its log-determinant",
        _PROCESS,
        "return _normal_log_density(residual, self._scales()) + log_det",
        "return _normal_log_density(residual, self._scales())",
    ),
    _mistake(
        "cached extension with the prior of the first token",
        _PROCESS,
        "jnp.where(position == 0, self",
        "jnp.where(position >= 0, self",
    ),
    _mistake("noise of unit size sampled", _PROCESS, "solve(noise * scales)", "solve(noise)"),
    _mistake(
        "transform's log-determinant of the inverse",
        "sampling.py",
        "return -residual_and_log_det(self.attention, y).log_det.sum(-1)",
        "return residual_and_log_det(self.attention, y).log_det.sum(-1)",
    ),
    _mistake(
        "explicit step instead of the implicit equation",
        "root_finder.py",
        "return u, status_after(mismatch, search.here.sign, allowed, search.status)",
        "return noise - _mismatch(noise, attention, past, noise), jnp.zeros_like(search.status)",
    ),
    # barrier, margin, radius
    _mistake(
        "barrier of the wrong sign",
        "barrier.py",
        "return -residual_and_log_det(attention, embeddings, implementation",
        "return residual_and_log_det(attention, embeddings, implementation",
    ),
    _mistake(
        "largest instead of smallest singular value", _MARGIN, "compute_uv=False)[..., -1]", "compute_uv=False)[..., 0]"
    ),
    _mistake(
        "determinant margin without its sign", _MARGIN, "return sign * jnp.exp(log_det)", "return jnp.exp(log_det)"
    ),
    _mistake("support tokens farthest first", _MARGIN, "jnp.argsort(jnp.abs(margins)", "jnp.argsort(-jnp.abs(margins)"),
    _mistake("radius with a third of the steepness", _RADIUS, "spread * reach**2 / 8", "spread * reach**2 / 24"),
    _mistake(
        "radius without the growth of the variance",
        _RADIUS,
        "product * jnp.expm1(jnp.minimum(t, turning) * reach)",
        "product * jnp.minimum(t, turning) * reach",
    ),
    # objectives
    _mistake(
        "barrier weight times the mean",
        _TOKENS,
        "barrier(attention, embeddings).sum(-1))",
        "barrier(attention, embeddings).mean(-1))",
    ),
    _mistake("barrier rewarded in the model", _TOKENS, '"barrier", -barrier_weight', '"barrier", barrier_weight'),
    _mistake(
        "full objective without the density's log-determinant", _OBJECTIVE, "+ constants - log_det)", "+ constants)"
    ),
    _mistake(
        "weight prior with a squared scale",
        _OBJECTIVE,
        "jstats.norm.logpdf(leaf, 0.0, scale)",
        "jstats.norm.logpdf(leaf, 0.0, scale**2)",
    ),
    _mistake(
        "cross-entropy averaged in the objective",
        _OBJECTIVE,
        "tokens[..., None], axis=-1).sum()",
        "tokens[..., None], axis=-1).mean()",
    ),
    # the transformer and its model
    _mistake(
        "barrier of the last position dropped",
        _MODEL,
        "[(transformer.prior_stage, embeddings)]",
        "[(transformer.prior_stage, embeddings[:, :-1])]",
        (
            "transformer.blocks], attended.inputs, strict=True)",
            "transformer.blocks], attended.inputs[:, :, :-1], strict=True)",
        ),
    ),
    _mistake(
        "gradient of the decoder stopped",
        _MODEL,
        "logits, attended = decoded(transformer, embeddings, remat)",
        "logits, attended = jax.lax.stop_gradient(decoded(transformer, embeddings, remat))",
    ),
    _mistake(
        "minibatch counted for itself alone", _MODEL, "handlers.scale(scale=minibatch)", "handlers.scale(scale=1.0)"
    ),
    _mistake(
        "barrier of a minibatch counted for itself alone",
        _MODEL,
        "total = count * positions if total_tokens is None else total_tokens",
        "total = count * positions",
    ),
    _mistake(
        "factor inside the plate, counted once a sequence",
        _MODEL,
        'numpyro.factor("barrier", -barrier_weight * total * found.mean)',
        "del name, value",
        (
            '        numpyro.sample("tokens", dist.Categorical(logits=logits).to_event(1), obs=batch)\n',
            '        numpyro.sample("tokens", dist.Categorical(logits=logits).to_event(1), obs=batch)\n'
            "        if not is_zero(barrier_weight):\n"
            '            numpyro.factor("barrier", -barrier_weight * total * found.mean)\n',
        ),
    ),
    _mistake(
        "scales of first position and noise swapped",
        _MODEL,
        "EmbeddingProcess(stage, positions, noise_scale, first_scale)",
        "EmbeddingProcess(stage, positions, first_scale, noise_scale)",
    ),
    _mistake(
        "prior of one weight twice as wide",
        "transformer/weight_sites.py",
        '"head": wide,',
        '"head": dist.Normal(0 * one, 2 * wide.scale),',
    ),
    _mistake(
        "next token read from the position before",
        _LAW,
        "self.transformer(text[:-1])[self.prompt.size - 1 :]",
        "jnp.roll(self.transformer(text[:-1]), 1, axis=0)[self.prompt.size - 1 :]",
    ),
    _mistake(
        "decoder that sees ahead",
        "transformer/network.py",
        "visible = jnp.tril(jnp.ones((length, length), bool))",
        "visible = jnp.ones((length, length), bool)",
    ),
    _mistake(
        "cache with the embedding of the token before",
        "transformer/decoding.py",
        "lax.dynamic_slice_in_dim(transformer.embed(tokens), position, 1)",
        "lax.dynamic_slice_in_dim(transformer.embed(tokens), position - 1, 1)",
    ),
)

# Hardly visible ones, by the check that has to notice them.
FINE_MISTAKES: tuple[tuple[str, Mistake], ...] = (
    (
        "change-of-variables",
        _mistake(
            "residual off by a millionth",
            _CHANGE,
            "return ResidualAndLogDet(residual, sign, log_det)",
            "return ResidualAndLogDet(residual * (1 + 1e-6), sign, log_det)",
        ),
    ),
    (
        "finite",
        # The square root of an exact 0, as at the first position, has no finite derivative.
        _mistake(
            "NaN in a gradient",
            _CHANGE,
            "return ResidualAndLogDet(residual, sign, log_det)",
            "return ResidualAndLogDet(residual, sign, log_det + 0 * jnp.sqrt(jnp.abs(log_det)))",
        ),
    ),
    (
        "invariance",
        _mistake(
            "log-determinant that sees the next position",
            _CHANGE,
            "return over_positions(residual_and_log_det_at, attention, embeddings)",
            "found = over_positions(residual_and_log_det_at, attention, embeddings)\n"
            "    return found._replace(log_det=found.log_det + 1e-9 * jnp.roll(embeddings[..., 0], -1, axis=-1))",
        ),
    ),
    (
        "sampler-law",
        _mistake("twice the noise sampled", _PROCESS, "solve(noise * scales)", "solve(2 * noise * scales)"),
    ),
    (
        "certified-radius",
        _mistake(
            "radius twice too large",
            _RADIUS,
            "return jnp.where(never, jnp.inf, jnp.maximum(",
            "return 2 * jnp.where(never, jnp.inf, jnp.maximum(",
        ),
    ),
    (
        "support-tokens",
        _mistake(
            "barrier doubled",
            "barrier.py",
            "return -residual_and_log_det(attention, embeddings, implementation",
            "return -2 * residual_and_log_det(attention, embeddings, implementation",
        ),
    ),
    (
        "map-equivalence",
        _mistake(
            "decoder without its prior",
            _OBJECTIVE,
            "weight_prior((attention, decoder), weight_scale)",
            "weight_prior(attention, weight_scale)",
        ),
    ),
    (
        "map-equivalence",
        _mistake(
            "noise one per cent too wide in the model",
            _TOKENS,
            "EmbeddingProcess(attention, length, noise_scale, first_scale)",
            "EmbeddingProcess(attention, length, 1.01 * noise_scale, first_scale)",
        ),
    ),
    (
        "boundedness",
        _mistake(
            "weights without their prior",
            _OBJECTIVE,
            "total + weight_prior((attention, decoder), weight_scale)",
            "total",
        ),
    ),
)

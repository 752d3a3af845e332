"""Particle filter: latent embeddings given tokens, and an estimate of the evidence that is unbiased.

    target after i tokens    p(u_1..i) prod_{s <= i} p(x_s | u_s)                              (token_model)
    weight of particle k     w_i^k = p(x_i | u_i^k) p(u_i^k | u_<i^k) / q(u_i^k | u_<i^k)      (q: proposals)
    carried weight           W_i^k proportional to W_{i-1}^k w_i^k, or to w_i^k after resampling
    estimate                 Z = prod_i sum_k W_{i-1}^k w_i^k,      E[Z] = p(x_1..n)

Attention sees the whole past, so a particle is a whole past with its key-value cache, and resampling permutes caches.
Before a position particles are resampled (systematically, by Blackjax) when the effective sample size after the one
before is at most threshold * N; otherwise weights are carried. Z is unbiased for the evidence; log Z, which is what is
returned, is below the log-evidence on average (Jensen), and less so the more particles. This holds where det J > 0
everywhere; `proposals` says what is estimated elsewhere.
"""

import enum
from typing import Any, Literal, NamedTuple, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from prob_transformer._extras import require
from prob_transformer._validation import (
    require_choice,
    require_count,
    require_draws,
    require_floating,
    require_key,
    require_vocabulary,
)
from prob_transformer.attention import Attention, Past
from prob_transformer.embedding_process import EmbeddingProcess
from prob_transformer.files import provenance
from prob_transformer.inference.joint import key_and_seed
from prob_transformer.inference.law import Law, law_of
from prob_transformer.inference.proposals import PROPOSALS, ProposalName
from prob_transformer.inference.result_tree import Allow, DataTree, Dims, datatree, require_allowed
from prob_transformer.inference.smoothing import ancestral_indices, genealogy, smoothing_indices
from prob_transformer.root_finder import SolveStatus
from prob_transformer.token_model import Decoder, require_tokens

Paths = Literal["smoothed", "ancestral"]
_PATHS = 1000

# No position of the filter has this number, whose key would be the same as that of fold_in.
_DRAWS = 2**31 - 1


class ParticleStatus(enum.IntEnum):
    """What the evidence is worth; the larger the worse, and the worst that happened is reported.

    PAST_BOUNDARY: a particle met det J <= 0, so the evidence belongs to the law of the root finder ("process") or to
    the |det J| density of mass above 1 ("direct"). NOT_CONVERGED: a root was not found or a weight was NaN; such a
    particle has weight 0, so the evidence misses its share. ALL_DIED: no particle has a weight above 0. OK says only
    that no particle met any of this: several roots with det J > 0 each cannot be seen.
    """

    OK = 0
    PAST_BOUNDARY = 1
    NOT_CONVERGED = 2
    ALL_DIED = 3


_REMEDY = {
    ParticleStatus.PAST_BOUNDARY: (
        "det J <= 0 was met, so these are not draws from a normalised density; scale query or key down"
    ),
    ParticleStatus.NOT_CONVERGED: (
        "roots were not found or weights were NaN, and what they stood for is missing; use float64 or "
        "proposal='direct', scale query or key down, and look at the decoder for NaN"
    ),
    ParticleStatus.ALL_DIED: (
        "no particle explains the tokens, so there are no draws; use more particles, and look at the decoder for "
        "tokens it gives probability 0"
    ),
}

_STATS_DIMS: Dims = {
    "ess": ("position",),
    "resampled": ("position",),
    "unsolved": ("position",),
    "distinct": ("position",),
    "log_weights": ("particle",),
}


class ParticleResult(NamedTuple):
    """N particles after n positions, and how they came about; all weights are normalised, in nats.

    `log_evidence` () log Z, -inf when all died; `embeddings` (N, n, d) whole paths and `log_weights` (N,) theirs;
    `ess` (n,) after each position; `resampled` (n,) whether particles were resampled before it; `ancestors` (n, N)
    which particle of the position before each descends from; `distinct` (n,) how many particles of each position the
    paths of weight above 0 go through; `status` () a `ParticleStatus` code; `unsolved` (n,) particles that met
    det J <= 0 or got no root or weight. `filtered` (n, N, d), `filtered_log_weights` (n, N) and `log_likelihood` (n, N)
    of the token are of the particles as they were at each position, which `smooth` needs together with the `process`.
    `tokens` (n,), `key` and its `seed`, if it had one, are what the filter was given.
    """

    log_evidence: Float[Array, ""]
    embeddings: Float[Array, "N n d"]
    log_weights: Float[Array, " N"]
    ess: Float[Array, " n"]
    resampled: Bool[Array, " n"]
    ancestors: Int[Array, "n N"]
    distinct: Int[Array, " n"]
    status: Int[Array, ""]
    unsolved: Int[Array, " n"]
    filtered: Float[Array, "n N d"]
    filtered_log_weights: Float[Array, "n N"]
    log_likelihood: Float[Array, "n N"]
    process: EmbeddingProcess
    tokens: Int[Array, " n"]
    key: PRNGKeyArray
    seed: int | None = None

    @property
    def posterior(self) -> dict[str, Float[Array, "1 draws n d"]]:
        """One chain of 1000 smoothed paths, as `to_datatree` has them."""
        return self._draw("smoothed", None, _PATHS)[0]

    def _require_one_run(self) -> None:
        if self.filtered.ndim != 3:
            raise ValueError(
                f"result: holds several runs, log_evidence has shape {self.log_evidence.shape}; pick one of them by "
                "jax.tree.map(lambda leaf: leaf[0], result)."
            )

    def _draw(self, paths: Paths, key: PRNGKeyArray | None, draws: int) -> tuple[dict[str, Array], dict[str, Array]]:
        self._require_one_run()
        key = jax.random.fold_in(self.key, _DRAWS) if key is None else require_key("key", key)
        if paths == "ancestral":
            indices = ancestral_indices(key, draws, self.filtered_log_weights[-1], self.ancestors)
        else:
            particles = self.filtered, self.filtered_log_weights, self.ancestors
            indices = smoothing_indices(key, draws, self.process, *particles)
        rows = jnp.arange(self.filtered.shape[0])
        log_likelihood = {"tokens": self.log_likelihood[rows, indices][None]}
        return {"embeddings": self.filtered[rows, indices][None]}, log_likelihood

    @property
    def law(self) -> Law:
        """Whether the process is certified to be a probability law; the mass is given the heaviest particle's past."""
        self._require_one_run()
        heaviest = self.embeddings[jnp.argmax(self.log_weights)]
        return law_of({"embeddings": (self.process, heaviest)}, None)

    def to_datatree(
        self,
        dims: Dims | None = None,
        *,
        draws: int = _PATHS,
        paths: Paths = "smoothed",
        key: PRNGKeyArray | None = None,
        allow: Allow = (),
    ) -> DataTree:
        """One chain of equally weighted paths (draws, n, d) and, as its one draw, the statistics of the filter's run.

        Paths are drawn by backward simulation ("smoothed", see `smooth` for its cost) or from the N paths of the
        particles by their weights ("ancestral", cheap, few distinct early embeddings), from `key` or else from one
        derived from the filter's. Raises ValueError with status and remedy for particles that died or were lost, past
        the boundary unless `allow` has PAST_BOUNDARY, for several results at once, and as `datatree`.
        """
        self._require_one_run()
        require_count("draws", draws, 1, "the number of paths")
        require_choice("paths", paths, get_args(Paths))
        status = ParticleStatus(int(self.status))
        if status:
            where = f"(unsolved by position {np.asarray(self.unsolved).tolist()})"
            never = [ParticleStatus.NOT_CONVERGED, ParticleStatus.ALL_DIED]
            require_allowed({status: f"{where}: {_REMEDY[status]}"}, allow, never)
        posterior, log_likelihood = self._draw(paths, key, draws)
        configuration = {"method": "particles", "particles": self.log_weights.shape[0], "paths": paths}
        attrs = provenance(self.seed, configuration) | {
            "objective": "log p(embeddings, tokens) in nats, embeddings by the process",
            "status": status.name.lower(),
            "law": self.law.line,
        }
        stats = ("log_evidence", "status", *_STATS_DIMS)
        groups: dict[str, dict[str, Any]] = {
            "posterior": posterior,
            "log_likelihood": log_likelihood,
            "sample_stats": {name: np.asarray(getattr(self, name))[None, None] for name in stats},
            "observed_data": {"tokens": self.tokens},
        }
        return datatree(groups, {**_STATS_DIMS, **(dims or {})}, attrs)


def _smc() -> Any:
    """Blackjax's SMC package, imported when it is used: the import starts JAX's backend, after which jax.distributed
    can no longer be set up. What it computes on the way must not become part of a trace."""
    with jax.ensure_compile_time_eval():
        import blackjax.smc.ess
        import blackjax.smc.resampling
    return blackjax.smc


def _ess(log_weights: Float[Array, " N"]) -> Float[Array, ""]:
    """1 / sum_k W_k^2 of normalised log-weights: from 1 to N, and 0 where all weights are."""
    # Blackjax gives NaN where all are 0, and rounding may take it past N, which would foil a threshold of 1.
    size = jnp.minimum(_smc().ess.ess(log_weights), log_weights.shape[0])
    return jnp.where((log_weights > -jnp.inf).any(), size, 0.0)


@eqx.filter_jit
def _filter(
    process: EmbeddingProcess,
    decoder: Decoder,
    tokens: Int[Array, " n"],
    key: PRNGKeyArray,
    threshold: Float[Array, ""],
    particles: int,
    proposal: str,
) -> ParticleResult:
    attention, length, dtype = process.attention, process.length, process.noise_scale.dtype

    def extend(
        past: Past, embeddings: Array, position: Array, token: Array, standard_normal: Array
    ) -> tuple[tuple[Past, Array], Array, Array, Array, Array]:
        scale = jnp.where(position == 0, process.first_scale, process.noise_scale)
        embedding, log_weight, status = PROPOSALS[proposal](attention, past, scale, standard_normal)
        log_likelihood = jax.nn.log_softmax(decoder(embedding[None])[0])[token]
        log_weight = log_weight + log_likelihood
        # Written so that NaN and inf count; -inf is an exact zero and no trouble.
        status = jnp.where(log_weight < jnp.inf, status, SolveStatus.NOT_CONVERGED)
        log_weight = jnp.where(status == SolveStatus.NOT_CONVERGED, -jnp.inf, log_weight)
        extended = past.write(attention, embedding), embeddings.at[position].set(embedding)
        return extended, embedding, log_weight.astype(dtype), log_likelihood.astype(dtype), status

    def step(
        carry: tuple[Past, Array, Array], inputs: tuple[Array, Array, PRNGKeyArray]
    ) -> tuple[tuple[Past, Array, Array], tuple[Array, ...]]:
        pasts, embeddings, log_weights = carry
        position, token, key = inputs
        resample_key, noise_key = jax.random.split(key)
        ess = _ess(log_weights)
        resampled = (position > 0) & (ess > 0) & (ess <= threshold * particles)
        drawn = _smc().resampling.systematic(resample_key, jnp.exp(log_weights), particles)
        ancestors = jnp.where(resampled, drawn, jnp.arange(particles))
        # Rounding may let a particle of weight 0 at either end be drawn: it stays dead.
        equal = jnp.where(log_weights[ancestors] > -jnp.inf, -jnp.log(jnp.asarray(particles, dtype)), -jnp.inf)
        log_weights = jnp.where(resampled, equal, log_weights)
        pasts, embeddings = jax.tree.map(lambda leaf: leaf[ancestors], (pasts, embeddings))

        noise = jax.random.normal(noise_key, (particles, attention.width), dtype)
        extended, latest, log_increments, log_likelihood, status = jax.vmap(extend, in_axes=(0, 0, None, None, 0))(
            pasts, embeddings, position, token, noise
        )
        alive = log_weights > -jnp.inf
        unsolved = (alive & (status != SolveStatus.CONVERGED)).sum()
        worst = jnp.where(alive, status, SolveStatus.CONVERGED).max()
        joint = log_weights + log_increments
        log_mean = logsumexp(joint)
        log_weights = jnp.where(joint > -jnp.inf, joint - log_mean, -jnp.inf)
        kept = (log_mean, _ess(log_weights), resampled, ancestors, unsolved, worst, latest, log_weights, log_likelihood)
        return (*extended, log_weights), kept

    empty = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (particles, *leaf.shape)), process.empty_past())
    blank = jnp.zeros((particles, length, attention.width), dtype)
    uniform = jnp.full(particles, -jnp.log(jnp.asarray(particles, dtype)))
    positions = jnp.arange(length), tokens, jax.random.split(key, length)
    (_, embeddings, log_weights), kept = jax.lax.scan(step, (empty, blank, uniform), positions)
    log_means, ess, resampled, ancestors, unsolved, worst, filtered, filtered_log_weights, log_likelihood = kept
    alive = log_weights > -jnp.inf
    paths = genealogy(ancestors, jnp.arange(particles), length - 1)
    distinct = jax.vmap(lambda indices: jnp.zeros_like(alive).at[indices].max(alive).sum())(paths)
    # The codes of the two enumerations agree as far as the first goes.
    status = jnp.where(alive.any(), worst.max(), ParticleStatus.ALL_DIED)
    return ParticleResult(
        log_means.sum(),
        embeddings,
        log_weights,
        ess,
        resampled,
        ancestors,
        distinct,
        status,
        unsolved,
        filtered,
        filtered_log_weights,
        log_likelihood,
        process,
        tokens,
        key,
    )


def _require_decoder(decoder: Any, width: int, dtype: Any) -> int:
    """The size of the vocabulary of a decoder that treats every row alone and alike."""
    if not callable(decoder):
        raise ValueError(f"decoder: got {type(decoder).__name__}; pass a callable from (n, d) to logits (n, V).")
    rows = jnp.linspace(-1.0, 1.0, 2 * width, dtype=dtype).reshape(2, width)
    logits = decoder(rows)
    if logits.ndim != 2 or logits.shape[0] != 2:
        raise ValueError(f"decoder: maps (2, {width}) to {logits.shape}; pass a callable from (n, d) to logits (n, V).")
    alone = decoder(rows[1:])
    if not isinstance(alone, jax.core.Tracer) and not np.allclose(
        alone[0], logits[1], rtol=1e-3, atol=1e-3, equal_nan=True
    ):
        raise ValueError(
            "decoder: its logits for a row depend on the rows before; pass one that acts row by row, as LinearDecoder."
        )
    return logits.shape[1]


def particle_filter(
    key: PRNGKeyArray | int,
    attention: Attention,
    decoder: Decoder,
    tokens: Int[Array, " n"],
    particles: int = 1000,
    *,
    noise_scale: Float[Array, ""] | float = 1.0,
    first_scale: Float[Array, ""] | float = 1.0,
    threshold: Float[Array, ""] | float = 0.5,
    proposal: ProposalName = "process",
) -> ParticleResult:
    """Embeddings given tokens (n,) under `token_model`, and an estimate of log p(tokens) in nats whose exp is unbiased.

    `key` is a JAX random key, or an integer seed, which the result is then labelled with. Resamples where the effective
    sample size is at most `threshold` * N. The decoder must act row by row, as `LinearDecoder` does, so that token i
    depends on the past through u_i alone. Never raises for numerical trouble: see `status`. Raises ValueError for bad
    arguments, and MissingExtraError without Blackjax. Equations: module docstring.
    """
    require("inference", "blackjax")
    tokens = require_tokens(tokens)
    if tokens.ndim != 1:
        raise ValueError(f"tokens: has shape {tokens.shape}; pass one sequence (n,), or vmap over sequences.")
    if tokens.shape[0] < 2:
        raise ValueError(f"tokens: has n = {tokens.shape[0]} positions; pass at least 2, or there is no attention.")
    require_count("particles", particles, 2, "one particle has no weights to compare")
    require_choice("proposal", proposal, get_args(ProposalName))
    is_known = not isinstance(threshold, jax.core.Tracer)
    if require_floating("threshold", threshold).ndim or (is_known and not 0 <= float(threshold) <= 1):
        raise ValueError(f"threshold: got {threshold}; pass a share of the particles from 0 (never) to 1 (always).")
    random_key, seed = key_and_seed(key, "the particles")
    process = EmbeddingProcess(attention, tokens.shape[0], noise_scale, first_scale)
    if process.batch_shape:
        raise ValueError(f"noise_scale: has shape {process.batch_shape} with first_scale; pass scalars, or vmap.")
    dtype = attention.query.dtype
    process = EmbeddingProcess(
        attention, tokens.shape[0], process.noise_scale.astype(dtype), process.first_scale.astype(dtype)
    )
    require_vocabulary("tokens", tokens, _require_decoder(decoder, attention.width, dtype))
    found = _filter(process, decoder, tokens, random_key, jnp.asarray(threshold, dtype), particles, proposal)
    return found._replace(seed=seed)


def smooth(key: PRNGKeyArray, result: ParticleResult, draws: int) -> Float[Array, "draws n d"]:
    """`draws` paths of embeddings given all tokens, each of equal weight, independent given the particles.

    Their law tends to the posterior as the particles grow in number; past the boundary that holds for the "direct"
    proposal only, because the weights are those of the |det J| density. Raises ValueError for fewer than one draw and
    for a result whose particles all died. Equation: smoothing.
    """
    if not isinstance(result, ParticleResult):
        raise ValueError(f"result: got {type(result).__name__}; pass what particle_filter returned.")
    require_draws(key, draws)
    if not isinstance(result.log_evidence, jax.core.Tracer) and not (result.log_evidence > -jnp.inf).all():
        raise ValueError("result: has status ALL_DIED; there are no paths, look at the tokens and at `unsolved` first.")
    return result._draw("smoothed", key, draws)[0]["embeddings"][0]

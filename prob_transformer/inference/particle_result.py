"""What a particle filter leaves behind: weighted particles, how they came about, and what they are worth."""

import enum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from prob_transformer._validation import require_count
from prob_transformer.embedding_process import EmbeddingProcess
from prob_transformer.files import provenance
from prob_transformer.inference.law import Law, law_of
from prob_transformer.inference.results import Dims, datatree, for_arviz
from prob_transformer.inference.smoothing import ancestral_indices, smoothing_indices

if TYPE_CHECKING:
    import xarray as xr

Paths = Literal["smoothed", "ancestral"]

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
        "det J <= 0 was met, so these are not draws from a normalised density; scale query or key down, or pass "
        "allow_past_boundary=True to keep them all the same"
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
    `tokens` (n,) and `key` are what the filter was given.
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

    @property
    def law(self) -> Law:
        """Whether the process is certified to be a probability law; the mass is given the heaviest particle's past."""
        heaviest = self.embeddings[jnp.argmax(self.log_weights)]
        return law_of({"embeddings": (self.process, heaviest)}, None)

    def to_datatree(
        self,
        dims: Dims | None = None,
        *,
        draws: int = 1000,
        paths: Paths = "smoothed",
        key: PRNGKeyArray | None = None,
        seed: int | None = None,
        allow_past_boundary: bool = False,
    ) -> "xr.DataTree":
        """One chain of equally weighted paths (draws, n, d) and, as its one draw, the statistics of the filter's run.

        Paths are drawn by backward simulation ("smoothed", see `smooth` for its cost) or from the N paths of the
        particles by their weights ("ancestral", cheap, few distinct early embeddings), from `key` or else from one
        derived from the filter's; `seed` is a label. Raises ValueError with status and remedy for particles that died
        or were lost, past the boundary unless that is allowed, for several results at once, and as `datatree`.
        """
        if self.filtered.ndim != 3:
            raise ValueError(
                f"result: holds several runs, log_evidence has shape {self.log_evidence.shape}; pick one of them by "
                "jax.tree.map(lambda leaf: leaf[0], result)."
            )
        require_count("draws", draws, 1, "the number of paths")
        if paths not in get_args(Paths):
            raise ValueError(f"paths: got {paths!r}; pass one of {', '.join(get_args(Paths))}.")
        status = ParticleStatus(int(self.status))
        allowed = status == ParticleStatus.OK or (status == ParticleStatus.PAST_BOUNDARY and allow_past_boundary)
        if not allowed:
            unsolved = np.asarray(self.unsolved).tolist()
            raise ValueError(f"status: {status.name.lower()}, unsolved by position {unsolved}: {_REMEDY[status]}.")
        indices_of = smoothing_indices if paths == "smoothed" else ancestral_indices
        indices = indices_of(self, jax.random.fold_in(self.key, _DRAWS) if key is None else key, draws)
        rows = jnp.arange(self.filtered.shape[0])
        stats: dict[str, Any] = {
            name: getattr(self, name) for name in ("log_evidence", "status", "ess", "resampled", "unsolved", "distinct")
        }
        attrs = provenance(seed, {"method": "particles", "particles": self.log_weights.shape[0], "paths": paths}) | {
            "objective": "log p(embeddings, tokens) in nats, embeddings by the process",
            "status": status.name.lower(),
            "law": self.law.line,
        }
        groups: dict[str, dict[str, Any]] = {
            "posterior": {"embeddings": self.filtered[rows, indices][None]},
            "log_likelihood": {"tokens": self.log_likelihood[rows, indices][None]},
            "sample_stats": {
                name: np.asarray(value)[None, None]
                for name, value in (stats | {"log_weights": self.log_weights}).items()
            },
            "observed_data": {"tokens": self.tokens},
        }
        return datatree(groups, {**_STATS_DIMS, **({} if dims is None else dims)}, attrs)

    def to_inferencedata(self, dims: Dims | None = None, **options: Any) -> Any:
        """What the installed ArviZ takes, from `to_datatree` with the same options: InferenceData or DataTree."""
        return for_arviz(self.to_datatree(dims, **options))

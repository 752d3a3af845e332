"""Whether the likelihood behind a result is a probability law, and if not, by how much its mass exceeds 1.

    certified    identity values and A + A^T negative semidefinite, from which det J_i >= 1 for every embedding follows
                 (docs/limits.md); the sign is decided up to rounding, so a positive eigenvalue below it passes too
    mass         integral of N(e(u); 0, sigma^2) |de/du| du = total variation of Phi(e(u) / sigma),    d = 1

With value maps no process is certified, although some are one (A = 0; d = 1 with a_h v_h <= 0; one head with
V = -A^T): the condition |V| |A| diam^2 / 4 < 1 bounds one conditional given one past.
The mass is that of the last conditional given the data's own past; for d > 1 it is not computed.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jaxtyping import Array, Bool, Float

from prob_transformer.attention import Attention, Past
from prob_transformer.change_of_variables import residual_and_log_det_at
from prob_transformer.embedding_process import EmbeddingProcess
from prob_transformer.inference.embedding_sites import Processes, processes

# Of A + A^T, in units of its largest entry times its size and the rounding of its dtype.
_ROUNDING = 8
_GRID = 8001
# The attended mean stays inside the past, so this many standard deviations beyond it hold all the mass there is.
_REACH = 12
_POSITIVE = "A + A^T has a positive eigenvalue, so with three or more positions the likelihood's mass exceeds 1"
# A mass this far above 1 is not told from 1 on the grid.
_SMALLEST_EXCESS = 1e-6


def certificate(attention: Attention) -> tuple[Float[Array, ""], Bool[Array, ""]]:
    """The largest eigenvalue of A + A^T over heads, and whether identity values and A + A^T <= 0, up to rounding, make
    every conditional of the process that this attention defines a probability density."""
    symmetric = attention.interaction + attention.interaction.mT
    largest = jnp.linalg.eigvalsh(symmetric).max()
    rounding = _ROUNDING * attention.width * jnp.finfo(symmetric.dtype).eps * jnp.abs(symmetric).max()
    return largest, (largest <= rounding) & (attention.value is None)


def statistics(trace: Mapping[str, dict[str, Any]]) -> dict[str, Array]:
    """Of one draw: "certified", and the largest "symmetric_eigenvalue" of its processes; empty for a model without."""
    found = [certificate(process.attention) for process, _ in processes(trace).values()]
    if not found:
        return {}
    eigenvalues, certified = (jnp.stack(each) for each in zip(*found, strict=True))
    return {"certified": certified.all(), "symmetric_eigenvalue": eigenvalues.max()}


@eqx.filter_jit
def conditional_mass(process: EmbeddingProcess, embeddings: Float[Array, "n 1"]) -> Float[Array, ""]:
    """The mass of p(u_n given u_<n) with |det J|, for embeddings of width 1; 1 where e is monotone."""
    attention, scale = process.attention, jnp.ravel(process.noise_scale)[0]
    past = Past.of(attention, embeddings[:-1])
    # With value maps the attended mean lies inside the values' range.
    reach = jnp.abs(past.values).sum(0).max() + _REACH * scale
    grid = jnp.linspace(-reach, reach, _GRID)
    residual = jax.vmap(lambda u: residual_and_log_det_at(attention, past, u[None]).residual[0])(grid)
    return jnp.abs(jnp.diff(ndtr(residual / scale))).sum()


class Law(NamedTuple):
    """Whether the likelihood of a result is certified to be a probability law.

    `share` (0 to 1) of the draws, or of the one point, are certified, None for a model without an embedding process.
    `excess` is the mass above 1 of the last conditional, given the past of the first sequence, at the draw that is
    furthest from certified: None where all are certified or d > 1. `value_maps` says that the process has value maps,
    for which no certificate is computed.
    """

    share: float | None
    excess: float | None
    draws: int
    value_maps: bool

    @property
    def line(self) -> str:
        """The one line that a summary shows."""
        if self.share is None:
            return "law: the model has no embedding process"
        if self.share == 1:
            where = "" if self.draws == 1 else f" in all {self.draws} draws"
            return (
                f"law: certified up to rounding{where}: no eigenvalue of A + A^T exceeds its rounding, and where "
                "none is positive the likelihood is a probability density"
            )
        if self.value_maps:
            start = "law: not certified: with value maps, Popoviciu's bound certifies single conditionals, no process"
        elif self.draws == 1:
            start = f"law: not certified: {_POSITIVE}"
        else:
            start = f"law: certified in {self.share:.1%} of {self.draws} draws; in the others {_POSITIVE}"
        if self.excess is None:
            return f"{start}; by how much was not computed (docs/limits.md)"
        size = f"by {self.excess:.3g}" if self.excess > _SMALLEST_EXCESS else f"by less than {_SMALLEST_EXCESS:.0e}"
        worst = "" if self.draws == 1 else ", in the draw with the largest"
        return f"{start}; the last conditional given its past has mass above 1 {size}{worst} (docs/limits.md)"


NO_LAW = Law(None, None, 1, False)


def law_of(found: Processes, certified: Bool[np.ndarray, "..."] | None = None) -> Law:
    """The law behind processes at one point, by default, or at many draws of which some are `certified`.

    `found` is then that of the draw whose mass is to be computed.
    """
    if not found:
        return NO_LAW
    if certified is None:
        certified = np.array([all(bool(certificate(process.attention)[1]) for process, _ in found.values())])
    share = float(np.mean(certified))
    masses = [
        float(conditional_mass(process, jnp.reshape(value, (-1, *value.shape[-2:]))[0]))
        for process, value in found.values()
        if share < 1 and process.attention.width == 1
    ]
    excess = max(0.0, max(masses) - 1) if masses else None
    value_maps = any(process.attention.value is not None for process, _ in found.values())
    return Law(share, excess, int(np.size(certified)), value_maps)

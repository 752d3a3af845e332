"""Section "evidence": the evidence of tokens by particles, against quadrature."""

import itertools
from functools import partial
from typing import Any, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from benchmarks.result_tables import Column, Section, at_most
from prob_transformer.inference import ParticleStatus, particle_filter
from prob_transformer.inference.proposals import ProposalName
from theory_checks.check import Check
from theory_checks.inference.inferred_models import Sizes, judged
from theory_checks.truth.token_models import SCALES, EvidenceCase, cases, scalar_case

# Standard errors that chance may put between an estimate and the truth.
MOST_ERRORS = 3.0
PAST_THE_BOUNDARY = 4.0


@eqx.filter_jit
def _runs(
    case: EvidenceCase, keys: PRNGKeyArray, particles: int, proposal: ProposalName
) -> tuple[Float[Array, " repeats"], Int[Array, " repeats"]]:
    def run(key: PRNGKeyArray) -> tuple[Float[Array, ""], Int[Array, ""]]:
        found = particle_filter(
            key, case.attention, case.decoder, jnp.asarray(case.tokens), particles, proposal=proposal, **SCALES
        )
        return found.log_evidence, found.status

    return jax.vmap(run)(keys)


def _row(case: EvidenceCase, proposal: ProposalName, key: PRNGKeyArray, sizes: Sizes) -> dict[str, Any]:
    keys = jax.random.split(key, sizes.repeats)
    log_evidences, status = map(np.asarray, _runs(case._replace(name=""), keys, sizes.particles, proposal))
    relative = np.exp(log_evidences - np.log(case.evidence))
    error = relative.std(ddof=1) / np.sqrt(sizes.repeats)
    return {
        "model": case.name,
        "proposal": proposal,
        "quadrature": float(np.log(case.evidence)),
        "particles": float(np.log(case.evidence) + np.log(relative.mean())),
        "standard_error": float(error / relative.mean()),
        "deviation": float(abs(relative.mean() - 1) / error),
        "mass": float(case.mass),
        "status": ParticleStatus(int(status.max())).name.lower(),
    }


def run_evidence(sizes: Sizes) -> dict[str, Any]:
    """Both proposals on every case with a known evidence, each row with a key of its own."""
    pairs = list(itertools.product(cases(), get_args(ProposalName)))
    keys = jax.random.split(jax.random.key(sizes.seed), len(pairs))
    rows = [_row(case, proposal, key, sizes) for (case, proposal), key in zip(pairs, keys, strict=True)]
    past_the_boundary = _row(scalar_case(PAST_THE_BOUNDARY), "process", jax.random.key(sizes.seed), Sizes())
    targets = [
        at_most(f"evidence, {row['model']}, proposal {row['proposal']}: standard errors", row["deviation"], MOST_ERRORS)
        for row in rows
    ]
    return {
        "setting": (
            f"{sizes.repeats} independent runs of {sizes.particles} particles, three tokens, float64; every row has a "
            "random key of its own"
        ),
        "rows": rows,
        "targets": targets,
        "notes": [],
        "counterexample": past_the_boundary["deviation"] / MOST_ERRORS,
    }


SECTION = Section(
    "evidence",
    "The evidence by particles, against quadrature",
    "Models inside the safe region. The estimate Z is unbiased, so the mean of Z over runs is compared; its standard "
    "error is that of log Z by the delta method. The mass is that of the density by the same quadrature, and must be "
    "1.",
    (
        Column("model", "model", "text"),
        Column("proposal", "proposal", "text"),
        Column("quadrature", "log-evidence by quadrature, nats", "number"),
        Column("particles", "by particles, nats", "number"),
        Column("standard_error", "standard error", "number"),
        Column("deviation", "standard errors apart", "number"),
        Column("mass", "mass of the density", "number"),
        Column("status", "status", "text"),
    ),
    run_evidence,
)

CHECK = Check(
    id=SECTION.name,
    claim="the evidence that particles estimate is that of the density",
    statement="E[Z] = sum over embeddings of p(u, x) by quadrature, for both proposals and any number of particles.",
    mark="ours",
    regime="det J > 0 at every embedding that noise reaches: three tokens, d = 1 with a = -2, -0.5, 0.1, and d = 2.",
    counterexample=(
        "Past the boundary (a = 4) noise solved by continuation finds one root of several, so that its evidence is not "
        "that of the |det J| formula."
    ),
    tolerance=1.0,
    tolerance_reason=f"{MOST_ERRORS:g} standard errors over independent runs.",
    figure_name="largest distance from quadrature, in units of its bound",
    run=partial(judged, compare=run_evidence),
)

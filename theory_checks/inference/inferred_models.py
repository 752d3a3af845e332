"""What is inferred, and how much is drawn for it: models inside the safe region, with det J >= 1 for all parameters.

scalar     b = -a and noise_scale of scalar attention, embeddings observed      (models/scalar/dataset.py)
plane      the same with d = 2: A = -diag(b), two strengths
latent     embeddings of the scalar process given tokens, its parameters known
conjugate  embeddings without interaction, seen with Gaussian noise: a linear Gaussian model
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from models.scalar.dataset import Priors, decoder, generate, parameter_model
from models.scalar.density import scalar_attention
from prob_transformer import Attention, EmbeddingProcess, token_model
from theory_checks.check import Outcome, Plan
from theory_checks.claims.normalisation import interaction_attention

TRUE_A, TRUE_NOISE_SCALE = -1.0, 1.0
TRUE_STRENGTHS = (1.0, 2.0)
OBSERVATION_SCALE = 0.7
# Few tokens say little about their embeddings: what is left of the prior is not Gaussian.
LATENT_TOKENS = (0, 2, 1, 2)
# Narrower than those of the model: no draw of them is so steep that float64 loses its roots.
CALIBRATION_PRIORS = Priors((0.0, 0.5), (-0.7, 0.5))


class Sizes(NamedTuple):
    """Sizes of a whole run; a result is a function of these, the code and the machine."""

    seed: int = 0
    # Datasets of the parameter models: few sequences, and enough for a posterior close to a Gaussian.
    sequences: int = 40
    many_sequences: int = 400
    positions: int = 8
    # NUTS.
    warmup: int = 400
    draws: int = 1500
    chains: int = 2
    # The particle filter: independent runs, and particles in each.
    repeats: int = 400
    particles: int = 500
    # Simulation-based calibration: datasets, and the draws that each truth is ranked among.
    replicates: int = 1000
    calibration_sequences: int = 20
    calibration_positions: int = 4
    ranked_draws: int = 99
    thinning: int = 5
    calibration_particles: int = 1000
    # Deviation of a posterior, as a share of the right one, that calibration has to notice.
    much_too_narrow: float = 0.8


QUICK = Sizes(
    sequences=6,
    many_sequences=12,
    positions=3,
    # With 200 draws the effective sample size is itself so uncertain that right draws lie six standard errors off.
    warmup=500,
    draws=1000,
    repeats=8,
    particles=20,
    replicates=100,
    calibration_sequences=4,
    ranked_draws=19,
    calibration_particles=50,
    much_too_narrow=0.5,
)


def sizes_for(quick: bool, seed: int) -> Sizes:
    """The sizes of a whole run, or of one that only shows that everything runs."""
    return (QUICK if quick else Sizes())._replace(seed=seed)


def judged(plan: Plan, compare: Callable[[Sizes], dict[str, Any]], unless: str | None = None) -> Outcome:
    """A comparison as the outcome of a check: every figure in units of its bound, and the counterexample's likewise.

    Figures whose name holds `unless` are shown and not judged: they belong to the counterexample.
    """
    found = compare(sizes_for(plan.quick, plan.seed))
    targets = [target for target in found["targets"] if unless is None or unless not in target["what"]]
    figure = max(
        target["figure"] / target["at_most"] if "at_most" in target else target["at_least"] / target["figure"]
        for target in targets
    )
    counterexample = found["counterexample"]
    return Outcome(len(found["rows"]), figure, figure <= 1.0, counterexample, counterexample > 1.0, found)


class Problem(NamedTuple):
    """A NumPyro model with its data."""

    name: str
    model: Callable[..., Any]
    data: tuple[Any, ...]


def plane_attention(strengths: Float[Array, " d"]) -> Attention:
    """One head with A = -diag(strengths) and identity values: negative definite, so det J >= 1."""
    return interaction_attention(-jnp.diag(strengths))


def plane_model(embeddings: Float[Array, "S n 2"]) -> None:
    """NumPyro model over "strengths" (2,) and "noise_scale", both LogNormal(0, 1), the embeddings observed."""
    strengths = numpyro.sample("strengths", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1))
    noise_scale = numpyro.sample("noise_scale", dist.LogNormal(0.0, 1.0))
    process = EmbeddingProcess(plane_attention(strengths), embeddings.shape[-2], noise_scale)
    with numpyro.plate("sequences", embeddings.shape[0]):
        numpyro.sample("embeddings", process, obs=embeddings)


def latent_model(tokens: Int[Array, " n"]) -> None:
    """NumPyro model over the "embeddings" (n, 1) of the scalar process at its true parameters, tokens observed."""
    token_model(scalar_attention(TRUE_A), decoder(), tokens, noise_scale=TRUE_NOISE_SCALE)


def conjugate_model(seen: Float[Array, "n d"]) -> None:
    """NumPyro model over "embeddings" (n, d) without interaction, seen with noise N(0, OBSERVATION_SCALE^2)."""
    length, width = seen.shape
    attention = Attention(jnp.zeros((1, width, width)), jnp.eye(width)[None])
    process = EmbeddingProcess(attention, length, TRUE_NOISE_SCALE)
    embeddings = numpyro.sample("embeddings", process)
    numpyro.sample("seen", dist.Normal(embeddings, OBSERVATION_SCALE).to_event(2), obs=seen)


def scalar_problem(sizes: Sizes, sequences: int) -> Problem:
    """Parameters of the scalar process, from so many sequences that it generates."""
    key = jax.random.key(sizes.seed)
    data = generate(key, sequences, sizes.positions, TRUE_A, TRUE_NOISE_SCALE)
    return Problem(f"scalar, d = 1, {sequences} sequences", parameter_model, (data.embeddings,))


def plane_problem(sizes: Sizes, sequences: int) -> Problem:
    """Parameters of the process in the plane, from so many sequences that it generates."""
    attention = plane_attention(jnp.asarray(TRUE_STRENGTHS))
    process = EmbeddingProcess(attention, sizes.positions, TRUE_NOISE_SCALE)
    embeddings = process.sample(jax.random.key(sizes.seed + 1), (sequences,))
    return Problem(f"plane, d = 2, {sequences} sequences", plane_model, (embeddings,))


def latent_problem() -> Problem:
    """Embeddings of a few tokens; there is no truth, for the tokens were not drawn from any."""
    return Problem("latent, d = 1, 4 tokens", latent_model, (jnp.asarray(LATENT_TOKENS),))

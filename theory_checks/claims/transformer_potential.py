"""The part of the claim `map-equivalence` at the whole transformer: NumPyro's potential against the log joint in NumPy.

Of both sides only the weights, the tokens and the choices are the same: the truth computes decoder, process, barrier
and priors without the library, and its gradient by the complex step.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int
from numpyro.handlers import substitute
from numpyro.infer.util import potential_energy

from prob_transformer.transformer import HeadBarrier, TransformerConfig, transformer_model
from theory_checks.check import Plan, Worst, quick_jit
from theory_checks.drawn_transformers import Weights, draw_weights, sites_of
from theory_checks.truth import transformer as truth

# No two sizes are equal, and sequences of five positions leave rows of the position table unused.
SIZES = TransformerConfig(vocabulary=7, context=6, layers=2, width=4, heads=3, head_size=1, hidden=8)
SEQUENCES, LENGTH = 3, 5
THRESHOLD, BARRIER_WEIGHT = 0.7, 0.4
SCALES: dict[str, Any] = {"noise_scale": 0.8, "first_scale": 1.7}


class Setting(NamedTuple):
    """The choices of the model: latents, the process's attention, the barrier's site, values and form, the minibatch.

    No site is no barrier. A minibatch of two of the sequences is drawn by the "plate", or "given" by the caller.
    """

    latents: str = "table"
    attention: str = "free"
    site: str | None = None
    values: str = "identity"
    form: str = "two-sided"
    minibatch: str = "none"


# Every choice occurs, and both sites with both forms; each is compiled by itself, which takes most of the time.
SETTINGS = (
    Setting(site="embedding", minibatch="plate"),
    Setting(site="layers", form="one-sided"),
    Setting(site="layers", values="own", minibatch="given"),
    Setting("process", site="embedding", form="one-sided", minibatch="plate"),
    Setting("process", "tied", site="layers"),
)
# Both latents, both sites and forms, and both minibatches: enough to tell a mistake in the model from a right one.
QUICK_SETTINGS = SETTINGS[2:4]


def draw_problem(setting: Setting, seed: int) -> tuple[Weights, Int[np.ndarray, "N m"], Int[np.ndarray, " B"]]:
    """Values of all latent sites, tokens of all sequences, and the indices of the batch."""
    generator = np.random.default_rng(seed)
    values = draw_weights(generator, SIZES)
    tokens = generator.integers(0, SIZES.vocabulary, (SEQUENCES, LENGTH + (setting.latents == "table")))
    batch = np.arange(SEQUENCES) if setting.minibatch == "none" else generator.permutation(SEQUENCES)[:2]
    if setting.latents == "process":
        unused = ("token_embedding", "position_embedding") + ("prior_stage.",) * (setting.attention == "tied")
        values = {name: value for name, value in values.items() if not name.startswith(unused)}
        values["embeddings"] = 1.5 * generator.normal(size=(len(batch), LENGTH, SIZES.width))
    return values, tokens, batch


@functools.partial(quick_jit, static_argnames="setting")
def model_side(
    sites: dict[str, Float[Array, "..."]], tokens: Any, batch: Any, setting: Setting
) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
    """NumPyro's potential energy of `transformer_model`, and its gradient in every site."""
    given: dict[str, Any] = {"latents": setting.latents, "attention": setting.attention, **SCALES}
    if setting.site is not None:
        given["barrier_weight"] = BARRIER_WEIGHT
        given["penalty"] = HeadBarrier(setting.site, setting.form, THRESHOLD, setting.values)  # type: ignore[arg-type]
    model = functools.partial(transformer_model, config=SIZES, **given)
    if setting.minibatch == "plate":
        model = substitute(functools.partial(model, subsample_size=len(batch)), data={"sequences": batch})
    if setting.minibatch == "given":
        model = functools.partial(model, total_tokens=SEQUENCES * LENGTH)
        tokens = tokens[batch]
    return jax.value_and_grad(lambda sites: potential_energy(model, (tokens,), {}, sites))(sites)


def prior_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a weight's default prior: N(0, 1 / inputs) for maps, else N(0, 1) or N(1, 1)."""
    kind = name.rpartition(".")[2]
    if kind in ("scale", "bias") or name.endswith("_embedding"):
        return float(kind == "scale"), 1.0
    # The heads' outputs (H, d, p) are summed, so the inputs are those of all heads.
    return 0.0, 1 / np.sqrt(shape[0] * shape[2] if kind == "output" else shape[-1])


def true_side(
    values: Mapping[str, Any], tokens: Any, batch: Any, setting: Setting, barrier_weight: float = BARRIER_WEIGHT
) -> Any:
    """The negative log joint of the values in plain NumPy, data and factor of a minibatch counted for all sequences."""
    weights = {name: value for name, value in values.items() if name != "embeddings"}
    priors = {name: prior_of(name, value.shape) for name, value in weights.items()}
    options: dict[str, Any] = {"latents": setting.latents, "attention": setting.attention, **SCALES}
    if setting.latents == "process":
        options["embeddings"] = values["embeddings"]
    if setting.site is not None:
        options |= {"barrier_weight": barrier_weight, "site": setting.site, "values": setting.values}
        options |= {"form": setting.form} | ({"threshold": THRESHOLD} if setting.form == "one-sided" else {})
    prior = truth.log_prior(weights, priors)
    of_data = truth.log_joint(weights, tokens[batch], priors=priors, **options) - prior
    return -prior - of_data * (SEQUENCES / len(batch))


def errors_of(setting: Setting, seed: int) -> tuple[float, float, float]:
    """Errors of the value and of the gradient of one drawn problem, and of the value for the mean of the barrier.

    Relative to 1 + the value, and to 1 + the largest entry of each site's gradient, which is compared along a drawn
    direction of length 1. The mean of b_i stands for their sum in the last one, 0 where there is no barrier.
    """
    values, tokens, batch = draw_problem(setting, seed)
    own = {name: value for name, value in values.items() if name != "embeddings"}
    latents = {name: values[name] for name in values.keys() - own.keys()}
    value, slopes = model_side({**sites_of(own), **latents}, tokens, batch, setting)
    expected = true_side(values, tokens, batch, setting)
    generator, worst = np.random.default_rng([seed, 1]), Worst()
    for name, array in values.items():
        direction = generator.normal(size=array.shape)
        direction /= np.linalg.norm(direction)
        slope = np.asarray(slopes[name if name in latents else next(iter(sites_of({name: array})))])
        along = truth.directional_derivative(
            lambda moved: true_side(moved, tokens, batch, setting), values, {name: direction}
        )
        worst.see(abs(np.sum(slope * direction) - along) / (1 + np.abs(slope).max()), name)
    mistaken = true_side(values, tokens, batch, setting, BARRIER_WEIGHT / LENGTH)
    size = 1 + abs(expected)
    return abs(float(value) - expected) / size, worst.figure, abs(mistaken - expected) / size


def compare(plan: Plan) -> dict[str, Any]:
    """The worst errors over drawn problems of every setting, and the median error of the mean of the barrier."""
    settings, each = plan.pick(SETTINGS, QUICK_SETTINGS), plan.pick(4, 1)
    seeds = np.random.default_rng(plan.seed).integers(2**32, size=(len(settings), each))
    values, gradients, wrong = Worst(), Worst(), []
    for setting, of_setting in zip(settings, seeds.tolist(), strict=True):
        for seed in of_setting:
            value, gradient, mistaken = errors_of(setting, seed)
            values.see(value, (setting, seed))
            gradients.see(gradient, (setting, seed))
            if setting.site is not None:
                wrong.append(mistaken)
    return {
        "cases": seeds.size,
        "value_relative_error": values.to_json(),
        "gradient_relative_error": gradients.to_json(),
        "mean_instead_of_sum_median_relative_error": float(np.median(wrong)),
    }

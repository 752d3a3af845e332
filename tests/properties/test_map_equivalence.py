"""NumPyro's potential energy against the objective written by hand with autodiff and SciPy, and how both scale."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax.scipy.stats import norm
from numpyro.handlers import substitute
from numpyro.infer.util import log_density, potential_energy
from scipy.special import log_softmax

from prob_transformer import Attention, LinearDecoder, map_objective, token_model
from tests.helpers.dense import dense_truth
from tests.helpers.shrinking_cases import SIMPLE_NUMBERS, shrinking_cases
from theory_checks.check import quick_jit
from theory_checks.claims.map_equivalence import Setting, bayesian_model, by_hand, relative_difference
from theory_checks.drawn_cases import MODERATE_KINDS, Case, Shape
from theory_checks.truth.numpy_attention import amplification
from theory_checks.truth.transformer import process_log_density

VOCABULARY = 2
SMALL, LARGE = Shape(1, 1, 1, 3, False), Shape(2, 1, 2, 3, True)
# Smallest first; the last argument says that there is a barrier.
SETTINGS = (
    Setting(SMALL, "margin", False, True),
    Setting(SMALL, "full", False, True),
    Setting(LARGE, "margin", True, True),
    Setting(LARGE, "full", True, True),
)
TOLERANCE, LARGEST_KAPPA = 1e-9, 1e5


class Problem(NamedTuple):
    """Parameters as nested lists, tokens, and the noise, first, weight and barrier scales."""

    setting: Setting
    parameters: dict[str, list]
    tokens: list
    scales: tuple[float, float, float, float]

    def arrays(self):
        return {name: np.array(nested) for name, nested in self.parameters.items()}, np.array(self.tokens)


def simple_array(shape, elements=SIMPLE_NUMBERS):
    return arrays(np.float64, shape, elements=elements, fill=st.nothing()).map(np.ndarray.tolist)


@st.composite
def problems(draw, among=SETTINGS):
    setting = draw(st.sampled_from(among))
    # Far from the origin and at extreme scales the gradients of query and key are small differences of large numbers.
    case = draw(shrinking_cases((setting.shape,), (*MODERATE_KINDS, "sharp")))
    batch = (2,) if setting.batched else ()
    parameters = {
        "query": case.query.tolist(),
        "key": case.key.tolist(),
        "decoder_weight": draw(simple_array((VOCABULARY, setting.shape.width))),
        "decoder_bias": draw(simple_array(VOCABULARY)),
        "embeddings": case.embeddings.tolist(),
    }
    if setting.batched:
        parameters["embeddings"] = [parameters["embeddings"], draw(simple_array(case.embeddings.shape))]
    if case.value is not None:
        parameters["value"] = case.value.tolist()
    tokens = draw(arrays(np.int64, (*batch, setting.shape.length), elements=st.integers(0, VOCABULARY - 1)))
    scales = draw(st.tuples(*[st.sampled_from((1.0, 0.5, 2.0))] * 3, st.sampled_from((1.0, 0.5, 0.0))))
    return Problem(setting, parameters, tokens.tolist(), scales)


def small_problem(query, embeddings, objective="full"):
    parameters = {
        "query": [[[query]]],
        "key": [[[1.0]]],
        "decoder_weight": [[1.0], [-0.5]],
        "decoder_bias": [0.0, 0.5],
        "embeddings": embeddings,
    }
    return Problem(Setting(SMALL, objective, False, True), parameters, [0, 1, 1], (0.5, 2.0, 1.0, 0.5))


def negative_log_joint(parameters, tokens, scales, objective):
    """-log p(x, u, weights) with determinants of autodiff blocks, and those blocks; no code of the library."""
    noise_scale, first_scale, weight_scale, barrier_weight = scales

    def one_sequence(embeddings, tokens):
        residual, blocks, _ = dense_truth(parameters["query"], parameters["key"], parameters.get("value"), embeddings)
        logits = embeddings @ parameters["decoder_weight"].T + parameters["decoder_bias"]
        log_det = jnp.linalg.slogdet(blocks)[1].sum()
        total = jax.nn.log_softmax(logits)[jnp.arange(tokens.size), tokens].sum() + barrier_weight * log_det
        if objective == "full":
            scale = jnp.where(jnp.arange(tokens.size) == 0, first_scale, noise_scale)
            total += norm.logpdf(residual, 0.0, scale[:, None]).sum() + log_det
        return -total, blocks

    if tokens.ndim == 1:
        total, blocks = one_sequence(parameters["embeddings"], tokens)
    else:
        totals, blocks = jax.vmap(one_sequence)(parameters["embeddings"], tokens)
        total = totals.sum()
    weights = [leaf for name, leaf in parameters.items() if name != "embeddings"]
    return total - sum(norm.logpdf(leaf, 0.0, weight_scale).sum() for leaf in weights), blocks


@functools.cache
def compiled(setting):
    def potential(parameters, tokens, scales):
        shapes = {name: array.shape for name, array in parameters.items() if name != "embeddings"}
        arguments = (tokens, scales, setting.objective, setting.with_barrier, shapes)
        return potential_energy(bayesian_model, arguments, {}, parameters)

    def objective(parameters, tokens, scales):
        return by_hand(parameters, tokens, scales, setting.objective, setting.with_barrier)

    def truth(parameters, tokens, scales):
        return negative_log_joint(parameters, tokens, scales, setting.objective)

    @quick_jit
    def sides(*arguments):
        return (
            jax.value_and_grad(truth, has_aux=True)(*arguments),
            jax.value_and_grad(potential)(*arguments),
            jax.value_and_grad(objective)(*arguments),
        )

    return sides


@given(problem=problems())
@example(problem=small_problem(1.5, [[-1.0], [1.0], [0.25]], "margin"))
@example(problem=small_problem(4.0, [[-1.0], [1.0], [0.0]]))  # det J < 0
@example(problem=small_problem(1000.0, [[-1.0], [1.0], [0.5]]))  # a weight underflows: no gradient may be NaN
@example(problem=small_problem(-100.0, [[1.0], [2.0], [3.0]]))  # logits far below those of hidden positions
def test_potential_and_objective_are_the_negative_log_joint_in_value_and_gradient(problem):
    parameters, tokens = problem.arrays()
    scales = np.array(problem.scales)
    ((value, blocks), gradient), *sides = compiled(problem.setting)(parameters, tokens, scales)
    sequences = parameters["embeddings"].reshape(-1, *parameters["embeddings"].shape[-2:])
    blocks = np.asarray(blocks).reshape(*sequences.shape, -1)
    for embeddings, of_sequence in zip(sequences, blocks, strict=True):
        case = Case.given(parameters["query"], parameters["key"], parameters.get("value"), embeddings)
        assume(amplification(case, of_sequence) <= LARGEST_KAPPA)
    for energy, slope in sides:
        assert relative_difference(energy, value) <= TOLERANCE
        for name in parameters:
            assert relative_difference(slope[name], gradient[name]) <= TOLERANCE


def modules(parameters):
    return (
        Attention(parameters["query"], parameters["key"]),
        LinearDecoder(parameters["decoder_weight"], parameters["decoder_bias"]),
    )


def per_position(parameters, tokens):
    """Cross-entropy and barrier of every position of one sequence, and the largest kappa."""
    logits = parameters["embeddings"] @ parameters["decoder_weight"].T + parameters["decoder_bias"]
    cross_entropy = -log_softmax(logits, axis=-1)[np.arange(len(tokens)), tokens]
    arrays = (parameters["query"], parameters["key"], None, parameters["embeddings"])
    blocks = np.asarray(dense_truth(*arrays)[1])
    assume(amplification(Case.given(*arrays), blocks) <= LARGEST_KAPPA)
    return cross_entropy, -np.linalg.slogdet(blocks)[1]


@quick_jit
def margin_sides(parameters, tokens, barrier_weight):
    """Minus NumPyro's log density, and the objective: margin-only, without a weight prior."""
    options = {"objective": "margin", "barrier_weight": barrier_weight}
    embeddings = parameters["embeddings"]
    joint, _ = log_density(token_model, (*modules(parameters), tokens), options, {"embeddings": embeddings})
    return -joint, map_objective(*modules(parameters), embeddings, tokens, **options)


@given(problem=problems(SETTINGS[:1]), copies=st.integers(1, 3))
@example(problem=small_problem(1.5, [[-1.0], [1.0], [0.25]], "margin"), copies=2)
def test_the_margin_objective_of_t_tokens_is_t_times_the_training_loss(problem, copies):
    parameters, tokens = problem.arrays()
    barrier_weight = problem.scales[-1]
    cross_entropy, barrier = per_position(parameters, tokens)
    loss = cross_entropy.mean() + barrier_weight * barrier.mean()
    parameters["embeddings"] = np.stack([parameters["embeddings"]] * copies)
    number_of_tokens = copies * len(tokens)
    for total in margin_sides(parameters, np.stack([tokens] * copies), barrier_weight):
        assert relative_difference(total, number_of_tokens * loss) <= TOLERANCE


@quick_jit
def subsampled(parameters, embeddings, tokens, index, scales):
    """Minus the log density of one sequence of several, drawn by a subsampling plate, with a prior on the query."""
    noise_scale, first_scale, weight_scale, barrier_weight = scales

    def model():
        shape = parameters["query"].shape
        query = numpyro.sample("query", dist.Normal(0.0, weight_scale).expand(shape).to_event(len(shape)))
        attention, decoder = modules(parameters | {"query": query})
        with numpyro.plate("data", len(tokens), subsample_size=1) as chosen:
            token_model(
                attention,
                decoder,
                tokens[chosen[0]],
                noise_scale=noise_scale,
                first_scale=first_scale,
                barrier_weight=barrier_weight,
            )

    values = {"query": parameters["query"], "embeddings": embeddings[index][None]}
    return -log_density(substitute(model, {"data": index[None]}), (), {}, values)[0]


@settings(max_examples=30)
@given(problem=problems(SETTINGS[1:2]), others=simple_array((2, 3, 1)))
def test_over_all_subsamples_the_mean_potential_is_that_of_all_sequences(problem, others):
    parameters, tokens = problem.arrays()
    embeddings = np.stack([parameters.pop("embeddings"), *np.array(others)])
    tokens = np.stack([tokens, 1 - tokens, tokens[::-1]])
    scales = np.array(problem.scales)
    weight_scale, barrier_weight = scales[2:]
    total = -norm.logpdf(parameters["query"], 0.0, weight_scale).sum()
    for sequence, of_sequence in zip(embeddings, tokens, strict=True):
        cross_entropy, barrier = per_position(parameters | {"embeddings": sequence}, of_sequence)
        total += cross_entropy.sum() + barrier_weight * barrier.sum()
        total -= process_log_density(parameters["query"], parameters["key"], sequence, *scales[:2])
    found = [subsampled(parameters, embeddings, tokens, np.array(index), scales) for index in range(3)]
    assert relative_difference(np.mean(found), total) <= TOLERANCE

"""Kolmogorov consistency: marginals by quadrature and enumeration, inside the safe regime and past the boundary."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpyro.infer.util import log_density
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax
from scipy.stats import norm

from prob_transformer import Attention, EmbeddingProcess, LinearDecoder, token_model
from tests.helpers.shrinking_cases import ONE, SIMPLE_NUMBERS, safe_cases
from theory_checks.check import quick_jit
from theory_checks.claims.kolmogorov import reach, sheared
from theory_checks.claims.normalisation import TAIL, roots, signed_density
from theory_checks.drawn_cases import Case, Shape
from theory_checks.truth import numpy_attention
from theory_checks.truth.quadrature import integrate
from theory_checks.truth.transformer import process_log_density

# Between tokens many deviations of the noise apart the density is a narrow peak, which the first nodes of a quadrature
# would miss: embeddings and values are therefore at most one deviation from 0.
NOISE_SCALE, FIRST_SCALE = 1.0, 1.5
NEAR_ZERO = st.integers(-4, 4).map(lambda quarters: quarters / 4)
SCALES = {"noise_scale": NOISE_SCALE, "first_scale": FIRST_SCALE}
TOLERANCE = 1e-6
QUADRATURE = 1e-8
# Noise beyond 6.5 standard deviations has 1e-10 of the mass.
EXTENT = 6.5
VOCABULARY = 2


def kept_and_integrated(kept, integrated, width=1, heads=1, with_values=False):
    """Safe cases of `kept` embeddings, with the number of positions to integrate out."""
    return st.tuples(safe_cases((Shape(heads, 1, width, kept, with_values),), NEAR_ZERO), st.just(integrated))


# Every split of two to four positions on the line, and of two and three in the plane, smallest first.
SPLITS = st.one_of(
    kept_and_integrated(1, 1),
    kept_and_integrated(2, 1),
    kept_and_integrated(3, 1),
    kept_and_integrated(1, 2),
    kept_and_integrated(2, 2),
    kept_and_integrated(2, 1, heads=2, with_values=True),
    kept_and_integrated(1, 1, width=2),
    kept_and_integrated(2, 1, width=2),
)
TOKEN_SPLITS = st.one_of(kept_and_integrated(1, 1), kept_and_integrated(2, 1), kept_and_integrated(1, 2))
DECODERS = st.tuples(*[SIMPLE_NUMBERS] * VOCABULARY)


with_tails = quick_jit(sheared)


@quick_jit
def density(attention: Attention, embeddings: jax.Array) -> jax.Array:
    """The library's p(u) of many sequences of embeddings (m, n, d)."""
    return jnp.exp(EmbeddingProcess(attention, embeddings.shape[1], NOISE_SCALE, FIRST_SCALE).log_prob(embeddings))


@quick_jit
def joint(attention: Attention, weight: jax.Array, sequences: jax.Array, embeddings: jax.Array) -> jax.Array:
    """The library's p(u, x) of embeddings (m, n, d) with each of the token sequences (k, n), as (m, k)."""
    decoder = LinearDecoder(weight, jnp.zeros(VOCABULARY))

    def one(embeddings, tokens):
        found, _ = log_density(token_model, (attention, decoder, tokens), SCALES, {"embeddings": embeddings})
        return jnp.exp(found)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(embeddings, sequences)


def marginal(function, case: Case, integrated: int, shorter: float):
    """Integral of function(embeddings) over every likely tail of the case over exp(shorter), and its error estimate."""
    edge = np.repeat(reach(case.attention, case.embeddings, integrated, EXTENT * NOISE_SCALE), case.shape.width)

    def ratio(offsets):
        tails = offsets.reshape(-1, integrated, case.shape.width)
        return function(with_tails(case.embeddings, tails)) * np.exp(-shorter)

    found = integrate(ratio, -edge, edge, tolerance=QUADRATURE, confirm=False)
    return found.value.sum(), found.error.sum()


@settings(max_examples=30)
@given(split=SPLITS)
@example(split=(Case.given([[[-9.0]]], ONE, None, [[-1.0], [1.0], [0.25]]), 1))
def test_integrating_out_the_last_embeddings_leaves_the_density_of_the_first(split):
    case, integrated = split
    shorter = process_log_density(case.query, case.key, case.embeddings, NOISE_SCALE, FIRST_SCALE, case.value)
    mass, error = marginal(functools.partial(density, case.attention), case, integrated, shorter)
    assert abs(mass - 1) + error < TOLERANCE


@settings(max_examples=25)
@given(split=TOKEN_SPLITS, weight=DECODERS, first_token=st.integers(0, VOCABULARY - 1))
def test_summing_out_the_last_tokens_with_their_embeddings_leaves_the_joint_law_of_the_first(
    split, weight, first_token
):
    case, integrated = split
    weight = np.array(weight)[:, None]
    tokens = [first_token] * len(case.embeddings)
    tails = itertools.product(range(VOCABULARY), repeat=integrated)
    sequences = np.array([[*tokens, *tail] for tail in tails])
    shorter = process_log_density(case.query, case.key, case.embeddings, NOISE_SCALE, FIRST_SCALE, case.value)
    shorter += log_softmax(case.embeddings @ weight.T, axis=-1)[:, first_token].sum()
    mass, error = marginal(functools.partial(joint, case.attention, weight, sequences), case, integrated, shorter)
    assert abs(mass - 1) + error < TOLERANCE


@settings(max_examples=15)
@given(case=safe_cases((Shape(1, 1, 1, 2, False),), NEAR_ZERO), weight=DECODERS)
def test_token_probabilities_of_two_positions_sum_to_those_of_one(case, weight):
    weight = np.array(weight)[:, None]
    sequences = np.array(list(itertools.product(range(VOCABULARY), repeat=2)))
    edge = EXTENT * np.array([FIRST_SCALE, FIRST_SCALE + NOISE_SCALE])

    def probabilities(points):
        return joint(case.attention, weight, sequences, points[..., None])

    found = integrate(probabilities, -edge, edge, tolerance=QUADRATURE, confirm=False)
    for first in range(VOCABULARY):
        expected, _ = quad(
            lambda u, first=first: norm.pdf(u, 0, FIRST_SCALE) * softmax(weight[:, 0] * u)[first],
            -edge[0],
            edge[0],
            epsabs=1e-10,
        )
        assert abs(found.value[sequences[:, 0] == first].sum() - expected) + found.error.sum() < TOLERANCE


LAST_NOISE = 0.5


def pieces(case: Case, low: float, high: float):
    """The ends of the intervals on which det J keeps its sign, between which the density has no kink (d = 1)."""

    def determinant(u):
        return numpy_attention.determinants(case, np.atleast_1d(u)[:, None])

    grid = np.linspace(low, high, 20_001)
    changes = np.flatnonzero(np.diff(np.sign(determinant(grid))))
    kinks = [brentq(lambda u: determinant(u)[0], grid[k], grid[k + 1]) for k in changes]
    return np.unique([low, *kinks, high])


@given(
    strength=st.integers(1, 24).map(lambda quarters: quarters / 4),
    past=st.lists(SIMPLE_NUMBERS, min_size=2, max_size=3).map(tuple),
)
@example(strength=1.0, past=(-1.0, 1.0))
@example(strength=1.5, past=(-1.0, 1.0, 0.3))
@example(strength=4.0, past=(-1.0, 1.0, 0.3))
def test_at_every_strength_the_mass_is_the_expected_number_of_roots_and_the_signed_mass_is_one(strength, past):
    case = Case.given([[[strength]]], ONE, None, [*([token] for token in past), [0.0]])
    next_density = functools.partial(signed_density, case.attention, case.embeddings[:-1], LAST_NOISE)
    ends = pieces(case, min(past) - TAIL * LAST_NOISE, max(past) + TAIL * LAST_NOISE)
    found = [integrate(next_density, *piece, tolerance=QUADRATURE, confirm=False) for piece in itertools.pairwise(ends)]
    mass, signed = sum(integral.value for integral in found)
    error = sum(integral.error.max() for integral in found)
    assert abs(mass - roots(case.attention, case.embeddings[:-1], LAST_NOISE)) + error < TOLERANCE
    assert abs(signed - 1) + error < TOLERANCE

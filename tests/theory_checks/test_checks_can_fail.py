"""Each quick check holds on the library and comes out differently on a deliberately wrong one."""

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from prob_transformer import (
    EmbeddingProcess,
    barrier,
    certified_radius,
    jacobian_block,
    map_objective,
    residual_and_log_det,
    stability_margin,
    support_tokens,
    token_model,
    weight_prior,
)
from theory_checks.check import Plan, Result, evaluate
from theory_checks.claims import CHECKS, change_of_variables, kolmogorov, map_equivalence
from theory_checks.claims import certified_radius as certified_radius_check
from theory_checks.drawn_cases import SHAPES

IDS = [check.id for check in CHECKS]


def result(identifier: str, seed: int = 0) -> Result:
    found = evaluate(next(check for check in CHECKS if check.id == identifier), Plan(quick=True, seed=seed))
    assert found.error is None
    return found


def forget_compiled() -> None:
    """Let every check compile anew: what is compiled already knows the library as it was then."""
    for check in CHECKS:
        for found in vars(importlib.import_module(check.run.__module__)).values():
            if hasattr(found, "clear_cache"):
                found.clear_cache()


# Their quadratures and samples run longer than their functions take to compile.
LONG_RUNNING = {"normalisation", "sampler-law"}
# A whole check of these is long by nature, on the library as on a mistake.
SLOW = {"normalisation", "kolmogorov", "sampler-law", "certified-radius"}


@pytest.fixture
def optimised_if_long(request):
    if request.getfixturevalue("identifier") in LONG_RUNNING:
        request.getfixturevalue("optimised")


@pytest.fixture
def replaced(monkeypatch):
    """Replaces what a module calls by something else until the end of the test."""

    def replace(module: Any, name: str, other: Any) -> None:
        monkeypatch.setattr(module, name, other)
        forget_compiled()

    yield replace
    monkeypatch.undo()
    forget_compiled()


@pytest.mark.usefixtures("optimised_if_long")
@pytest.mark.parametrize(
    "identifier", [pytest.param(one, marks=pytest.mark.slow) if one in SLOW else one for one in IDS]
)
def test_library_comes_out_as_stated(identifier):
    assert result(identifier, seed=1).as_stated


@pytest.mark.parametrize("identifier", ["low-rank-identity", "conditioning", "support-tokens", "boundedness"])
def test_another_run_of_the_same_shapes_compiles_nothing(identifier, caplog):
    result(identifier, seed=1)
    with jax.log_compiles():
        result(identifier, seed=2)
    assert [record.message for record in caplog.records if record.message.startswith("Compiling ")] == []


def flipped_log_det(attention, embeddings):
    right = residual_and_log_det(attention, embeddings)
    return right._replace(log_det=-right.log_det)


def shifted_residual(attention, embeddings):
    right = residual_and_log_det(attention, embeddings)
    return right._replace(residual=right.residual * (1 + 1e-6))


def without_sign(attention, embeddings):
    right = residual_and_log_det(attention, embeddings)
    return right._replace(sign=jnp.abs(right.sign))


def weights_held_fixed(attention, embeddings):
    right = residual_and_log_det(attention, embeddings)
    return right._replace(log_det=0 * right.log_det)


def with_nan_gradient(attention, embeddings):
    # The square root of an exact 0, as at the first position, has no finite derivative.
    right = residual_and_log_det(attention, embeddings)
    return right._replace(log_det=right.log_det + 0 * jnp.sqrt(jnp.abs(right.log_det)))


def attention_added_rather_than_subtracted(attention, embeddings):
    block = jacobian_block(attention, embeddings)
    return 2 * jnp.eye(block.shape[-1]) - block


def transposed_block(attention, embeddings):
    return jnp.swapaxes(jacobian_block(attention, embeddings), -1, -2)


def margin_of_the_opposite_attention(attention, embeddings):
    return 2 - stability_margin(attention, embeddings)


def determinant_for_every_kind(attention, embeddings, kind="determinant"):
    return jnp.abs(stability_margin(attention, embeddings))


def log_det_that_sees_the_next_position(attention, embeddings):
    right = residual_and_log_det(attention, embeddings)
    return right._replace(log_det=right.log_det + 1e-9 * jnp.roll(embeddings[..., 0], -1, axis=-1))


def radius_twice_too_large(attention, embeddings):
    return 2 * certified_radius(attention, embeddings)


def farthest_first(attention, embeddings, k):
    found = support_tokens(attention, embeddings, embeddings.shape[-2])
    return found._replace(positions=found.positions[..., ::-1][..., :k])


def doubled_barrier(attention, embeddings):
    return 2 * barrier(attention, embeddings)


class WithoutLogDet(EmbeddingProcess):
    """Scores the residual alone."""

    def position_log_prob(self, value):
        return super().position_log_prob(value) - residual_and_log_det(self.attention, value).log_det


class ExtendsFromFirstScale(EmbeddingProcess):
    """Gives every added position the prior of the first."""

    def extend(self, past, embedding):
        return EmbeddingProcess(self.attention, self.length, self.first_scale, self.first_scale).extend(past, embedding)


class FirstLikeTheOthers(EmbeddingProcess):
    """Gives the first position the noise of the others."""

    def __init__(self, attention, length, noise_scale=1.0, first_scale=1.0, **others):
        super().__init__(attention, length, noise_scale, noise_scale, **others)


class SamplesTwiceTheNoise(EmbeddingProcess):
    """Draws noise of twice the scale that it scores."""

    def solve_sample(self, key, sample_shape=()):
        twice = EmbeddingProcess(self.attention, self.length, 2 * self.noise_scale, self.first_scale)
        return twice.solve_sample(key, sample_shape)


def mean_barrier(attention, decoder, embeddings, tokens, *, barrier_weight, **others):
    weight = barrier_weight / embeddings.shape[-2]
    return map_objective(attention, decoder, embeddings, tokens, barrier_weight=weight, **others)


def decoder_without_prior(attention, decoder, embeddings, tokens, *, weight_scale, **others):
    return map_objective(attention, decoder, embeddings, tokens, **others) + weight_prior(attention, weight_scale)


def without_weight_prior(*arguments, weight_scale, **others):
    return map_objective(*arguments, **others)


def token_model_with_wrong_noise(*arguments, noise_scale, **others):
    return token_model(*arguments, noise_scale=1.01 * noise_scale, **others)


MISTAKES: list[tuple[str, str, Callable[..., Any]]] = [
    ("change-of-variables", "residual_and_log_det", flipped_log_det),
    ("change-of-variables", "residual_and_log_det", shifted_residual),
    ("change-of-variables", "residual_and_log_det", weights_held_fixed),
    ("low-rank-identity", "residual_and_log_det", flipped_log_det),
    ("low-rank-identity", "jacobian_block", attention_added_rather_than_subtracted),
    ("low-rank-identity", "jacobian_block", transposed_block),
    ("invariance", "residual_and_log_det", log_det_that_sees_the_next_position),
    ("finite", "residual_and_log_det", with_nan_gradient),
    ("normalisation", "residual_and_log_det", without_sign),
    ("normalisation", "EmbeddingProcess", WithoutLogDet),
    ("kolmogorov", "EmbeddingProcess", WithoutLogDet),
    ("kolmogorov", "EmbeddingProcess", ExtendsFromFirstScale),
    ("sampler-law", "EmbeddingProcess", WithoutLogDet),
    ("sampler-law", "EmbeddingProcess", SamplesTwiceTheNoise),
    ("gaussian-limit", "EmbeddingProcess", FirstLikeTheOthers),
    ("safe-region", "stability_margin", margin_of_the_opposite_attention),
    ("conditioning", "stability_margin", determinant_for_every_kind),
    ("certified-radius", "certified_radius", radius_twice_too_large),
    ("support-tokens", "support_tokens", farthest_first),
    ("support-tokens", "barrier", doubled_barrier),
    ("map-equivalence", "map_objective", mean_barrier),
    ("map-equivalence", "map_objective", decoder_without_prior),
    ("map-equivalence", "token_model", token_model_with_wrong_noise),
    ("boundedness", "map_objective", without_weight_prior),
]


# Every mistake runs a whole check again, which is long by nature: `make test` does so for the first mistake of each.
# For the certified radius, whose only one takes longest, it has the test of few cases instead; that of the sampler
# draws ten thousand samples and has none.
LONGEST = {"certified-radius", "sampler-law"}
QUICK = {identifier: mistake for identifier, _, mistake in reversed(MISTAKES) if identifier not in LONGEST}


def as_parameter(identifier: str, name: str, mistake: Callable[..., Any]) -> Any:
    marks = () if QUICK.get(identifier) is mistake else pytest.mark.slow
    return pytest.param(identifier, name, mistake, id=f"{identifier}-{mistake.__name__}", marks=marks)


@pytest.mark.parametrize(("identifier", "name", "mistake"), [as_parameter(*mistake) for mistake in MISTAKES])
@pytest.mark.usefixtures("optimised_if_long")
def test_mistake_is_caught(replaced, identifier, name, mistake):
    replaced(importlib.import_module(f"theory_checks.claims.{identifier.replace('-', '_')}"), name, mistake)
    assert not result(identifier).as_stated


def test_few_cases_tell_a_certified_radius_from_twice_of_it(replaced):
    few = Plan(quick=True, cases=30)
    assert certified_radius_check.run(few).holds
    replaced(certified_radius_check, "certified_radius", radius_twice_too_large)
    assert not certified_radius_check.run(few).holds


def test_every_check_has_a_mistake_that_it_catches():
    assert {identifier for identifier, *_ in MISTAKES} == set(IDS)


def test_nothing_counted_is_not_as_stated(monkeypatch):
    """Sequences of two have log-determinant 0: no case counts, and nothing shows that a missing gradient is wrong."""
    monkeypatch.setattr(change_of_variables, "FEW_SHAPES", SHAPES[2:3])
    found = result("change-of-variables")
    assert (found.verdict, found.counterexample_verdict) == ("fails", "holds")


@pytest.mark.slow
def test_token_probabilities_notice_a_wrong_embedding_density(replaced, monkeypatch):
    # Two tokens show it as well as three do, in half the time.
    monkeypatch.setattr(kolmogorov, "VOCABULARY", 2)
    # The package exports a function of the same name, which hides the module from attribute access.
    replaced(importlib.import_module("prob_transformer.token_model"), "EmbeddingProcess", WithoutLogDet)
    assert kolmogorov._tokens(Plan())["worst"] > kolmogorov.TOLERANCE


@pytest.mark.slow
def test_optimum_notices_a_wrong_barrier_scaling(monkeypatch):
    assert map_equivalence.optimum()["relative_difference"] < map_equivalence.OPTIMUM_TOLERANCE
    monkeypatch.setattr(map_equivalence, "map_objective", mean_barrier)
    assert map_equivalence.optimum()["relative_difference"] > map_equivalence.OPTIMUM_TOLERANCE

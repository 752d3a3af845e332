"""Each check holds on the library and comes out differently on a deliberately wrong one."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import pytest

from prob_transformer import (
    EmbeddingProcess,
    jacobian_block,
    map_objective,
    residual_and_log_det,
    stability_margin,
    token_model,
    weight_prior,
)
from theory_checks import (
    change_of_variables,
    kolmogorov,
    low_rank_identity,
    map_equivalence,
    normalisation,
    safe_region,
)
from theory_checks.check import Result, evaluate
from theory_checks.registry import CHECKS
from theory_checks.strategies import SHAPES, attention_cases

IDS = [check.id for check in CHECKS]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The checks on a few shapes, splits and strengths: enough to tell right from wrong."""
    few = SHAPES[5:8]
    for module in (change_of_variables, low_rank_identity):
        monkeypatch.setattr(module, "attention_cases", functools.partial(module.attention_cases, shapes=few))
    monkeypatch.setattr(kolmogorov, "SHAPES", few[:1])
    monkeypatch.setattr(kolmogorov, "SPLITS_1D", ((2, 1), (1, 2)))
    monkeypatch.setattr(kolmogorov, "SPLITS_2D", ((2, 1),))
    monkeypatch.setattr(kolmogorov, "VOCABULARY", 2)
    monkeypatch.setattr(normalisation, "OTHER_PASTS", ())
    monkeypatch.setattr(normalisation, "STRENGTHS", (-1.0, 1.5, 4.0))
    monkeypatch.setattr(safe_region, "_IDENTITY", safe_region._IDENTITY[:1])
    monkeypatch.setattr(safe_region, "_GENERAL", safe_region._GENERAL[:1])
    monkeypatch.setattr(map_equivalence, "SETTINGS", map_equivalence.SETTINGS[::4])


def result(identifier: str) -> Result:
    found = evaluate(next(check for check in CHECKS if check.id == identifier), cases=40)
    assert found.error is None
    return found


@pytest.mark.parametrize("identifier", IDS)
def test_library_comes_out_as_stated(identifier):
    assert result(identifier).as_stated


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


def attention_added_rather_than_subtracted(attention, embeddings):
    block = jacobian_block(attention, embeddings)
    return 2 * jnp.eye(block.shape[-1]) - block


def margin_of_the_opposite_attention(attention, embeddings):
    return 2 - stability_margin(attention, embeddings)


class WithoutLogDet(EmbeddingProcess):
    """Scores the residual alone."""

    def position_log_prob(self, value):
        return super().position_log_prob(value) - residual_and_log_det(self.attention, value).log_det


class ExtendsFromFirstScale(EmbeddingProcess):
    """Gives every added position the prior of the first."""

    def extend(self, past, embedding):
        return EmbeddingProcess(self.attention, self.length, self.first_scale, self.first_scale).extend(past, embedding)


def mean_barrier(attention, decoder, embeddings, tokens, *, barrier_weight, **others):
    weight = barrier_weight / embeddings.shape[-2]
    return map_objective(attention, decoder, embeddings, tokens, barrier_weight=weight, **others)


def decoder_without_prior(attention, decoder, embeddings, tokens, *, weight_scale, **others):
    return map_objective(attention, decoder, embeddings, tokens, **others) + weight_prior(attention, weight_scale)


def token_model_with_wrong_noise(*arguments, noise_scale, **others):
    return token_model(*arguments, noise_scale=1.01 * noise_scale, **others)


MISTAKES: list[tuple[str, Any, str, Callable[..., Any]]] = [
    ("change-of-variables", change_of_variables, "residual_and_log_det", flipped_log_det),
    ("change-of-variables", change_of_variables, "residual_and_log_det", shifted_residual),
    ("change-of-variables", change_of_variables, "residual_and_log_det", weights_held_fixed),
    ("low-rank-identity", low_rank_identity, "residual_and_log_det", flipped_log_det),
    ("low-rank-identity", low_rank_identity, "jacobian_block", attention_added_rather_than_subtracted),
    ("safe-region", safe_region, "stability_margin", margin_of_the_opposite_attention),
    ("normalisation", normalisation, "residual_and_log_det", without_sign),
    ("normalisation", normalisation, "EmbeddingProcess", WithoutLogDet),
    ("kolmogorov", kolmogorov, "EmbeddingProcess", WithoutLogDet),
    ("kolmogorov", kolmogorov, "EmbeddingProcess", ExtendsFromFirstScale),
    ("map-equivalence", map_equivalence, "map_objective", mean_barrier),
    ("map-equivalence", map_equivalence, "map_objective", decoder_without_prior),
    ("map-equivalence", map_equivalence, "token_model", token_model_with_wrong_noise),
]


@pytest.mark.parametrize(
    ("identifier", "module", "name", "mistake"),
    MISTAKES,
    ids=[f"{mistake[0]}-{mistake[3].__name__}" for mistake in MISTAKES],
)
def test_mistake_is_caught(monkeypatch, identifier, module, name, mistake):
    # The two slow parts have tests of their own below; here the rest must catch the mistake without them.
    monkeypatch.setattr(kolmogorov, "_tokens", lambda: {"worst": 0.0, "sequences": 0})
    monkeypatch.setattr(map_equivalence, "optimum", lambda: {"relative_difference": 0.0, "log_det": 1.0})
    monkeypatch.setattr(module, name, mistake)
    assert not result(identifier).as_stated


def test_every_check_has_a_mistake_that_it_catches():
    assert {identifier for identifier, *_ in MISTAKES} == set(IDS)


def test_nothing_counted_is_not_as_stated(monkeypatch):
    """Sequences of two have log-determinant 0: no case counts, and nothing shows that a missing gradient is wrong."""
    trivial = functools.partial(attention_cases, shapes=SHAPES[2:3])
    monkeypatch.setattr(change_of_variables, "attention_cases", trivial)
    found = result("change-of-variables")
    assert (found.verdict, found.counterexample_verdict) == ("fails", "holds")


def test_token_probabilities_notice_a_wrong_embedding_density(monkeypatch):
    # The package exports a function of the same name, which hides the module from attribute access.
    monkeypatch.setattr(importlib.import_module("prob_transformer.token_model"), "EmbeddingProcess", WithoutLogDet)
    assert kolmogorov._tokens()["worst"] > kolmogorov.TOLERANCE


def test_optimum_notices_a_wrong_barrier_scaling(monkeypatch):
    assert map_equivalence.optimum()["relative_difference"] < map_equivalence.OPTIMUM_TOLERANCE
    monkeypatch.setattr(map_equivalence, "map_objective", mean_barrier)
    assert map_equivalence.optimum()["relative_difference"] > map_equivalence.OPTIMUM_TOLERANCE

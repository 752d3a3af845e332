"""MAP, Laplace and NUTS of a small transformer: functions of the weights, their deviations and the evidence, against
plain NumPy."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from prob_transformer.inference.laplace import laplace
from prob_transformer.transformer import TransformerConfig
from prob_transformer.transformer.weight_sites import PREFIX
from theory_checks.drawn_transformers import draw_weights, transformer_of
from theory_checks.inference import transformer_posterior as command
from theory_checks.inference.small_transformer import QUICK, functionals, log_scores, searched, task
from theory_checks.inference.transformer_evidence import importance_evidence
from theory_checks.inference.transformer_posterior import compared, linearised, smallest_variance
from theory_checks.truth import transformer as truth

NAMES = ("attention logits", "output logits", "det J")


def plain(weights):
    """Arrays of NumPy by the names of the truth."""
    return {name.removeprefix(f"{PREFIX}/"): np.asarray(value) for name, value in weights.items()}


def expected_functionals(weights, texts):
    """The functionals of one head a layer with loops over layers and positions; analytic in the weights."""
    found = {name: [] for name in NAMES}
    for text in texts:
        logits, inputs = truth.forward(weights, truth.embed(weights, text))
        found["output logits"].append((logits - logits.mean(-1, keepdims=True)).ravel())
        for layer, x in zip(truth.layer_names(weights), inputs, strict=True):
            query, key = weights[f"{layer}query"], weights[f"{layer}key"]
            for i in range(1, len(text)):
                dots = (x[: i + 1] @ key[0].T) @ (query[0] @ x[i])
                found["attention logits"].append(dots - dots.mean())
            found["det J"].append(np.linalg.det(truth.jacobian_blocks(query, key, None, x))[2:])
    return {name: np.concatenate(parts) for name, parts in found.items()}


def test_functionals_and_scores_are_those_of_plain_numpy():
    config = TransformerConfig(vocabulary=3, context=5, layers=2, width=4, heads=1, head_size=1, hidden=3)
    rng = np.random.default_rng(0)
    weights, texts = draw_weights(rng, config), rng.integers(0, 3, (3, 6))
    transformer = transformer_of(weights, config)
    found, expected = functionals(transformer, jnp.asarray(texts[:, :-1])), expected_functionals(weights, texts[:, :-1])
    for name in NAMES:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-11)
    assert np.std(found["det J"]) > 0.1
    scores = [truth.log_likelihood(weights, text[None]) for text in texts]
    np.testing.assert_allclose(log_scores(transformer, jnp.asarray(texts)), scores, rtol=1e-11)


def test_the_smallest_variance_before_a_norm_is_that_of_small_embeddings():
    config = TransformerConfig(vocabulary=3, context=5, layers=2, width=4, heads=1, head_size=1, hidden=3)
    rng = np.random.default_rng(1)
    weights, texts = draw_weights(rng, config), rng.integers(0, 3, (3, 6))
    # Every block adds a function of normalised inputs, which is not small.
    weights |= {name: 0.01 * weights[name] for name in ("token_embedding", "position_embedding")}
    expected = min(truth.embed(weights, text[:-1]).var(-1).min() for text in texts)
    found = smallest_variance(transformer_of(weights, config), jnp.asarray(texts))
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def small(free, sequences, width=4):
    """A task with the weights of these names free, and its Laplace approximation."""
    config = TransformerConfig(vocabulary=3, context=4, layers=1, width=width, heads=1, head_size=1, hidden=2)
    one = task(1, sequences, 2, config).with_free([f"{PREFIX}/{name}" for name in free])
    return one, laplace(searched(one, QUICK)[0])


def test_deviations_of_functionals_follow_from_a_hessian_in_plain_numpy():
    free = ["blocks[0].key", "blocks[0].query", "head"]
    one, fit = small(free, 12)
    known, at = plain(one.known), plain(fit.mean)
    priors = {"blocks[0].key": (0, 0.5), "blocks[0].query": (0, 0.5), "head": (0, 0.5)}
    texts, held_out = np.asarray(one.texts), np.asarray(one.held_out)[:, :-1]

    def basis(step):
        for name in free:
            for index in np.ndindex(at[name].shape):
                moved = {other: value.astype(complex) for other, value in at.items()}
                moved[name][index] += step
                yield moved

    def log_joint(weights):
        return truth.log_likelihood({**known, **weights}, texts) + truth.log_prior(weights, priors)

    def gradient(weights):
        def along(name, index):
            direction = {name: np.zeros(at[name].shape)}
            direction[name][index] = 1.0
            return truth.directional_derivative(log_joint, weights, direction)

        return np.array([along(name, index) for name in free for index in np.ndindex(at[name].shape)])

    np.testing.assert_allclose(gradient(at), 0, atol=1e-5)
    step = 1e-5
    sides = [
        np.array([gradient({name: value.real for name, value in moved.items()}) for moved in basis(side)])
        for side in (step, -step)
    ]
    precision = (sides[1] - sides[0]) / (2 * step)
    np.testing.assert_allclose(fit.precision.log_det, np.linalg.slogdet(precision)[1], rtol=1e-6)
    slopes = [expected_functionals({**known, **moved}, held_out) for moved in basis(1e-30j)]
    found = linearised(fit, one, jnp.asarray(held_out))
    for name, value in expected_functionals({**known, **at}, held_out).items():
        slope = np.array([of[name].imag / 1e-30 for of in slopes])
        sd = np.sqrt((slope * np.linalg.solve(precision, slope)).sum(0))
        np.testing.assert_allclose(found[name][0], value, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(found[name][1], sd, rtol=1e-5, atol=1e-9)
        assert sd.max() > 0.05


@pytest.mark.parametrize("sequences", [1, 20])
def test_the_evidence_by_importance_sampling_is_that_of_quadrature(sequences):
    one, fit = small(["blocks[0].query"], sequences, width=2)
    known = plain(one.known)

    def log_p(total, difference):
        query = np.array([[[total + difference, total - difference]]]) / 2
        return truth.log_likelihood({**known, "blocks[0].query": query}, np.asarray(one.texts))

    # A norm of width 2 returns multiples of (1, -1), so the likelihood is a function of q_1 - q_2 alone, which has the
    # law N(0, 1): the prior of q_1 and of q_2 is N(0, 1 / width).
    np.testing.assert_allclose(log_p(1.3, 0.7), log_p(-0.4, 0.7), rtol=1e-12)
    nodes = np.linspace(-7, 7, 561)
    values = np.array([log_p(0.0, node) for node in nodes]) + norm.logpdf(nodes)
    expected = values.max() + np.log(np.exp(values - values.max()).sum() * (nodes[1] - nodes[0]))
    found = importance_evidence(fit, jax.random.key(0), 20_000)
    assert found.standard_error < 0.02
    assert abs(found.log_evidence - expected) < 4 * found.standard_error
    assert 0.05 < found.ess_share <= 1


def test_rows_have_the_moments_and_distances_of_known_laws():
    rng = np.random.default_rng(0)
    # Variances 1 and 2, excess kurtosis 0 and 3.
    draws = np.stack([rng.normal(size=(4, 20_000)), rng.laplace(size=(4, 20_000))], -1)
    sampled, linear = 2 * rng.normal(size=(50_000, 2)) + [0.5, 0], (np.array([0.5, 0.0]), np.array([1.0, 1e-9]))
    (nuts, of_sampled, of_linear), marginals = compared(draws, sampled, linear)
    np.testing.assert_allclose((nuts["kurtosis_median"], nuts["kurtosis_largest"]), (1.5, 3), atol=0.3)
    np.testing.assert_allclose(nuts["sd"], (1 + np.sqrt(2)) / 2, rtol=0.02)
    np.testing.assert_allclose((of_sampled["ratio_smallest"], of_sampled["ratio_largest"]), (np.sqrt(2), 2), rtol=0.03)
    np.testing.assert_allclose(of_linear["apart_largest"], 0.5, atol=0.03)
    # 2 Phi(1 / 4) - 1 of the shifted normal law, and 1 / 2 of the point mass at the median.
    np.testing.assert_allclose(of_linear["distance_median"], (0.1974 + 0.5) / 2, atol=0.02)
    assert [row["laplace_sd"] for row in marginals] == [1e-9, 1e-9]


def test_the_tables_on_the_page_are_those_of_the_committed_result(tmp_path):
    committed, page = command.ROOT / "docs" / "transformer_posterior.md", tmp_path / "page.md"
    shutil.copy(committed, page)
    command.main(["--page", str(page)])
    assert page.read_text(encoding="utf-8") == committed.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--out", "x.json", "--seed", "-1"), "--seed: got -1"),
        (("--out", "x.json", "--only", "free", "fre"), "--only: unknown 'fre'"),
        (("--page", "x.md", "--results", "a.json", "b.json"), "--results: got 2; this page shows one"),
    ],
)
def test_bad_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        command.main(given)

"""The log joint in plain NumPy is compared with finite differences, autodiff, the library and the training loss."""

import ast
import itertools
from functools import partial
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest
from scipy.stats import norm

from models.char_gpt import loss
from models.char_gpt.config import Config
from prob_transformer import EmbeddingProcess, one_sided_penalty, residual_and_log_det
from prob_transformer.transformer import numpyro_model
from prob_transformer.transformer.network import Transformer, TransformerConfig
from tests.helpers import dense
from theory_checks.drawn_transformers import draw_weights
from theory_checks.truth import transformer as dense_transformer
from theory_checks.truth.transformer import (
    directional_derivative,
    forward,
    jacobian_blocks,
    log_joint,
    log_prior,
    penalty,
    process_log_density,
    residuals,
    sign_and_log_det,
)

# No two sizes are equal, and sequences of five positions leave rows of the position table unused.
SIZES = TransformerConfig(vocabulary=7, context=8, layers=2, width=4, heads=3, head_size=2, hidden=6)
SEQUENCES, LENGTH = 4, 5
PRIOR_SCALE, THRESHOLD, WEIGHT = 1.3, 0.7, 0.4
PENALTIES = [(None, "two-sided"), *itertools.product(("embedding", "layers"), ("two-sided", "one-sided"))]


def site_of(path):
    """The name that NumPyro gives the array at the path of a module."""
    return jtu.keystr(path)[1:]


_TEMPLATE = Transformer(jax.random.key(0), SIZES, jnp.float64)


def model_of(weights, dtype=jnp.float64):
    """The library's transformer with the weights."""
    return jtu.tree_map_with_path(lambda path, _: jnp.asarray(weights[site_of(path)], dtype), _TEMPLATE)


def by_site(module):
    """The arrays of a transformer by site."""
    return {site_of(path): np.asarray(leaf, np.float64) for path, leaf in jtu.tree_leaves_with_path(module)}


@pytest.fixture(scope="module")
def weights():
    """Weights of which the determinants have both signs at both sites, and no norm is the identity."""
    return draw_weights(np.random.default_rng(6), SIZES)


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(6).integers(0, SIZES.vocabulary, (SEQUENCES, LENGTH + 1))


@pytest.fixture(scope="module")
def latents():
    return 1.5 * np.random.default_rng(7).normal(size=(SEQUENCES, LENGTH, SIZES.width))


def priors_of(weights):
    return dict.fromkeys(weights, (0.0, PRIOR_SCALE))


def directions_of(weights):
    """For every site a direction of length 1 that is zero at all other sites."""
    rng = np.random.default_rng(8)
    drawn = {name: rng.normal(size=value.shape) for name, value in weights.items()}
    return {name: {name: direction / np.linalg.norm(direction)} for name, direction in drawn.items()}


def errors(truth, weights, value, gradient):
    """Relative error of a value, and the worst of those of its gradient, which is compared along a direction a site."""
    assert gradient.keys() == weights.keys()
    worst = 0.0
    for name, direction in directions_of(weights).items():
        error = (gradient[name] * direction[name]).sum() - directional_derivative(truth, weights, direction)
        # Against the length of the site's own gradient, so that none hides behind a longer one.
        worst = max(worst, abs(error) / np.linalg.norm(gradient[name]))
    expected = truth(weights)
    return abs(value - expected) / abs(expected), worst


def test_the_prior_is_normal_with_the_mean_and_the_scale_of_each_site(weights):
    priors = {name: (0.1 * count, 0.5 + 0.1 * count) for count, name in enumerate(weights)}
    expected = sum(norm.logpdf(weights[name], *priors[name]).sum() for name in weights)
    np.testing.assert_allclose(log_prior(weights, priors), expected, rtol=1e-13)


def test_the_truth_shares_no_code_with_the_library():
    tree = ast.parse(Path(dense_transformer.__file__).read_text())
    nodes = list(ast.walk(tree))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    # What annotates arguments computes nothing.
    assert imported - {"collections.abc", "typing", "jaxtyping"} == {"numpy"}


@pytest.mark.parametrize("own_values", [False, True])
def test_the_jacobian_blocks_are_those_of_autodiff_and_of_the_complex_step(own_values):
    query, key, value, inputs = dense.draw(3, (2, 2, 3, 5, own_values))
    blocks = jacobian_blocks(query, key, value, inputs)
    expected_residuals, expected_blocks, (sign, log_det) = dense.dense_truth(query, key, value, inputs)
    np.testing.assert_allclose(residuals(query, key, value, inputs), expected_residuals, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(blocks, expected_blocks, rtol=1e-12, atol=1e-13)
    signs, log_dets = sign_and_log_det(blocks)
    np.testing.assert_allclose((signs.prod(), log_dets.sum()), (sign, log_det), rtol=1e-11)
    np.testing.assert_array_equal(blocks[0], np.eye(3))
    # Column b of J_i is the derivative of e_i in coordinate b of u_i.
    for i, b in np.ndindex(inputs.shape):
        moved = inputs.astype(complex)
        moved[i, b] += 1e-30j
        column = residuals(query, key, value, moved)[i].imag / 1e-30
        np.testing.assert_allclose(blocks[i, :, b], column, rtol=1e-12, atol=1e-14)


def test_the_logits_and_layer_inputs_are_those_of_the_decoder(weights, latents):
    logits, attended = eqx.filter_jit(lambda model, u: model.decode(u))(model_of(weights), jnp.asarray(latents[0]))
    expected_logits, inputs = forward(weights, latents[0])
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(attended.inputs, inputs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("smallest_of", [np.float32, np.float64])
def test_the_one_sided_penalty_and_its_slope_are_those_of_the_library(smallest_of):
    determinants = np.concatenate([-np.geomspace(1e-30, 1e3, 12), np.geomspace(1e-30, 1e3, 200), [0.6995, 0.7]])
    smallest = {np.float32: 2.0**-149, np.float64: 2.0**-1074}[smallest_of]
    tolerance = {np.float32: 1e-5, np.float64: 1e-12}[smallest_of]

    def library(log_det, sign):
        return one_sided_penalty(sign, log_det, THRESHOLD)

    sign, log_det = np.sign(determinants), np.log(np.abs(determinants))
    found, slope = jax.vmap(jax.value_and_grad(library))(log_det.astype(smallest_of), sign.astype(smallest_of))
    expected = penalty(sign, log_det + 1e-30j, "one-sided", THRESHOLD, smallest)
    np.testing.assert_allclose(found, expected.real, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(slope, expected.imag / 1e-30, rtol=tolerance, atol=tolerance)


# Every combination of site, form and values.
BARRIERS = [
    {"site": "embedding", "form": "two-sided"},
    {"site": "embedding", "form": "one-sided", "threshold": THRESHOLD},
    {"site": "layers", "form": "two-sided"},
    {"site": "layers", "form": "one-sided", "threshold": THRESHOLD},
    {"site": "layers", "form": "two-sided", "values": "own"},
    {"site": "layers", "form": "one-sided", "values": "own", "threshold": THRESHOLD},
]


@pytest.mark.parametrize("kind", ["table", "process"])
@pytest.mark.parametrize("barrier", BARRIERS, ids=lambda barrier: "-".join(map(str, barrier.values())))
def test_the_complex_step_is_the_derivative_by_finite_differences(weights, windows, latents, barrier, kind):
    chosen = {**weights, "latents": latents}

    def truth(chosen):
        own = {name: value for name, value in chosen.items() if name != "latents"}
        how = {"priors": priors_of(own), "barrier_weight": WEIGHT, "noise_scale": 0.9, "first_scale": 1.2, **barrier}
        if kind == "table":
            return log_joint(own, windows, **how)
        return log_joint(own, windows[:, 1:], latents="process", embeddings=chosen["latents"], **how)

    rng = np.random.default_rng(9)
    for _ in range(3):
        direction = {name: rng.normal(size=value.shape) for name, value in chosen.items()}
        slope = directional_derivative(truth, chosen, direction)
        step = 1e-6
        ahead, behind = (
            truth({name: value + side * step * direction[name] for name, value in chosen.items()}) for side in (1, -1)
        )
        np.testing.assert_allclose(slope, (ahead - behind) / (2 * step), rtol=1e-6)


def test_the_process_density_and_its_gradient_are_those_of_the_distribution(weights, latents):
    noise_scale, first_scale = 0.7, 1.4
    chosen = {name: weights[f"prior_stage.{name}"] for name in ("query", "key")} | {"embeddings": latents}

    def library(parts):
        stage = eqx.tree_at(lambda a: (a.query, a.key), _TEMPLATE.prior_stage, (parts["query"], parts["key"]))
        process = EmbeddingProcess(stage, LENGTH, noise_scale, first_scale)
        return process.log_prob(parts["embeddings"]).sum()

    def truth(parts):
        own = parts["query"], parts["key"]
        return sum(process_log_density(*own, u, noise_scale, first_scale) for u in parts["embeddings"])

    value, gradient = jax.jit(jax.value_and_grad(library))(jax.tree.map(jnp.asarray, chosen))
    value_error, gradient_error = errors(truth, chosen, value, gradient)
    assert value_error < 1e-12
    assert gradient_error < 1e-10


def test_the_joint_of_process_latents_is_that_of_its_parts_in_the_library(weights, windows, latents):
    tokens = windows[:, 1:]

    def library(model, latents):
        process = EmbeddingProcess(model.prior_stage, LENGTH, 0.9, 1.2).log_prob(latents).sum()
        logits, attended = jax.vmap(model.decode, out_axes=(0, 1))(latents)
        emitted = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(tokens)[..., None], axis=-1).sum()
        # The layers' own values, all heads of a layer jointly.
        barriers = [
            -residual_and_log_det(block.attention("own"), inputs).log_det
            for block, inputs in zip(model.blocks, attended.inputs, strict=True)
        ]
        prior = sum(jax.scipy.stats.norm.logpdf(leaf, 0.0, PRIOR_SCALE).sum() for leaf in jax.tree.leaves(model))
        return prior + process + emitted - WEIGHT * tokens.size * jnp.stack(barriers).mean()

    def truth(chosen):
        own = {name: value for name, value in chosen.items() if name != "latents"}
        return log_joint(
            own,
            tokens,
            priors=priors_of(own),
            latents="process",
            embeddings=chosen["latents"],
            noise_scale=0.9,
            first_scale=1.2,
            barrier_weight=WEIGHT,
            site="layers",
            values="own",
        )

    both = jax.jit(jax.value_and_grad(library, argnums=(0, 1)))
    value, (of_model, of_latents) = both(model_of(weights), jnp.asarray(latents))
    chosen = {**weights, "latents": latents}
    value_error, gradient_error = errors(truth, chosen, value, {**by_site(of_model), "latents": of_latents})
    assert value_error < 1e-12
    assert gradient_error < 1e-9


def truth_of(windows, site=None, form="two-sided", smallest=2.0**-1074):
    """-log_joint of the windows as a function of the weights, without a barrier where there is no site."""

    def negative_log_joint(weights):
        how = {"site": site, "form": form, "threshold": THRESHOLD, "smallest": smallest} if site else {}
        return -log_joint(weights, windows, priors=priors_of(weights), barrier_weight=WEIGHT if site else 0.0, **how)

    return negative_log_joint


class ConfigOfSizes(Config):
    """A run with sizes that its options cannot all express."""

    def transformer(self, vocabulary):
        return SIZES


def training_loss(weights, windows, site=None, form="two-sided", dtype=jnp.float64, implementation="reference"):
    """T times the loss of models/char_gpt, T the number of predicted tokens, and its gradient by site."""
    config = ConfigOfSizes(
        objective="margin" if site else "ce",
        barrier_site=site or "embedding",
        barrier_form=form,
        barrier_weight=WEIGHT,
        barrier_threshold=THRESHOLD,
        weight_prior_scale=PRIOR_SCALE,
        implementation=implementation,
    )
    predicted = windows[:, 1:].size

    @eqx.filter_jit
    def value_and_gradient(model, windows):
        def scaled(model):
            return predicted * loss.loss_terms(model, windows, config, predicted, jax.random.key(0)).loss

        return jax.value_and_grad(scaled)(model)

    value, gradient = value_and_gradient(model_of(weights, dtype), jnp.asarray(windows))
    return value, by_site(gradient)


def rounded(weights):
    """The nearest float32 numbers."""
    return {name: value.astype(np.float32).astype(np.float64) for name, value in weights.items()}


def test_the_cases_cover_both_sides_of_the_wall_and_of_the_threshold(weights, windows):
    embeddings = [dense_transformer.embed(weights, row[:-1]) for row in windows]
    inputs = np.stack([forward(weights, u)[1] for u in embeddings])
    stages = [(weights["prior_stage.query"], weights["prior_stage.key"], u) for u in embeddings]
    heads = [
        (weights[f"blocks[{layer}].query"][h, None], weights[f"blocks[{layer}].key"][h, None], x[layer])
        for x in inputs
        for layer in range(SIZES.layers)
        for h in range(SIZES.heads)
    ]
    for every in (stages, heads):
        found = np.linalg.det([jacobian_blocks(query, key, None, x)[2:] for query, key, x in every])
        assert (found < 0).any()
        assert ((found > 0) & (found < THRESHOLD)).any()
        assert (found > THRESHOLD).any()


LOSSES = [
    *((*penalty, dtype, "reference") for dtype in ("float64", "float32") for penalty in PENALTIES),
    *((site, "two-sided", "float32", "blocked") for site in ("embedding", "layers")),
]


@pytest.mark.parametrize(("site", "form", "dtype", "implementation"), LOSSES)
def test_the_training_loss_is_the_negative_log_joint(weights, windows, site, form, dtype, implementation):
    given, smallest, of_value, of_gradient = {
        "float64": (weights, 2.0**-1074, 1e-12, 1e-9),
        "float32": (rounded(weights), 2.0**-149, 1e-5, 3e-5),
    }[dtype]
    value, gradient = training_loss(given, windows, site, form, dtype, implementation)
    assert value.dtype == dtype
    value_error, gradient_error = errors(truth_of(windows, site, form, smallest), given, value, gradient)
    assert value_error < of_value
    assert gradient_error < of_gradient


def drop_the_last_barrier(monkeypatch):
    original = loss.residual_and_log_det

    def without_last(*args, **kwargs):
        found = original(*args, **kwargs)
        return found._replace(log_det=found.log_det.at[..., -1].set(0.0))

    monkeypatch.setattr(loss, "residual_and_log_det", without_last)


def change_what_is_decoded(changed, monkeypatch):
    original = numpyro_model.decoded
    monkeypatch.setattr(numpyro_model, "decoded", lambda *args: changed(*original(*args)))


@pytest.mark.parametrize(
    ("mistake", "changes_the_value"),
    [
        (drop_the_last_barrier, True),
        (partial(change_what_is_decoded, lambda logits, inputs: (jax.lax.stop_gradient(logits), inputs)), False),
        (partial(change_what_is_decoded, lambda logits, inputs: (logits, jax.lax.stop_gradient(inputs))), False),
    ],
    ids=["last barrier dropped", "no gradient of the logits", "no gradient of the layer inputs"],
)
def test_a_mistake_in_the_training_loss_is_noticed(weights, windows, mistake, changes_the_value, monkeypatch):
    mistake(monkeypatch)
    value, gradient = training_loss(weights, windows, "layers")
    value_error, gradient_error = errors(truth_of(windows, "layers"), weights, value, gradient)
    assert (value_error > 1e-4) if changes_the_value else (value_error < 1e-12)
    assert gradient_error > 1e-2

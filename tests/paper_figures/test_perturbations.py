from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from models.char_gpt import evaluation
from models.char_gpt.config import Config
from models.char_gpt.evaluation import clean_losses, stream_rms
from paper_figures.study import perturbations
from paper_figures.study.perturbations import KINDS, kept_positions, spare_characters, substituted, swapped
from prob_transformer.transformer.network import Transformer
from tests.helpers.tiny_gpt import made_wide

CONFIG = Config(layers=2, width=8, heads=2, context=12)
N, V = CONFIG.context, 7
# More than one chunk, and the last not full.
WINDOWS = np.random.default_rng(0).integers(0, V, (40, N + 1 + spare_characters(N))).astype(np.int32)
KEYS = jax.random.split(jax.random.key(3), 4000)
ONES = np.ones(2)


def perturbed_losses(model, windows, kind, levels, rms):
    return evaluation.perturbed_losses(model, windows, KINDS[kind], levels, rms)


@pytest.fixture(scope="module")
def model():
    """In float64, so that small differences can be seen; embeddings ten times as long, so that layers matter."""
    return made_wide(CONFIG, V, scale=10.0)


class Squares(eqx.Module):
    """Its loss is the mean square of all that is added to embeddings of 0, or to the streams of its layers."""

    blocks: tuple[int, ...] = eqx.field(default=(0, 1), static=True)
    context: int = eqx.field(default=N, static=True)
    token_embedding: jax.Array = eqx.field(default_factory=lambda: jnp.zeros((V, 8)))

    def embed(self, characters):
        return jnp.zeros((len(characters), 8), jnp.float32)

    def decode(self, embeddings, hook=lambda name, inputs, outputs: outputs):
        streams = [hook(f"{index}.stream", embeddings, embeddings) for index in self.blocks]
        squares = jnp.square(jnp.stack(streams)).mean((0, 2))
        # With the target 0 the cross-entropy of these two logits is softplus(log(expm1(s))) = s.
        return jnp.stack([jnp.zeros(N), jnp.log(jnp.expm1(squares))], axis=-1), None


class Successor(eqx.Module):
    """Expects character v + 1 after v: its loss is `cost` times the share of positions where that does not come."""

    cost: jax.Array
    token_embedding: jax.Array = eqx.field(default_factory=lambda: jnp.zeros((60, 1)))
    blocks: tuple[int, ...] = eqx.field(default=(0,), static=True)
    context: int = eqx.field(default=32, static=True)
    traces: ClassVar[list[int]] = []

    def embed(self, characters):
        return characters[:, None].astype(jnp.float32)

    def decode(self, embeddings):
        self.traces.append(0)
        # One more than there are characters, for the successor of the last.
        return jnp.where(jnp.arange(61) == embeddings + 1, 0.0, -self.cost), None


# Every character is its own position from 1, so that what follows it in the original is known from it alone.
COUNTING = np.tile(np.arange(1, 32 + 2 + spare_characters(32), dtype=np.int32), (400, 1))


@eqx.filter_jit
def decoded(model, embeddings):
    return model.decode(embeddings)[0]


def by_hand(model, embeddings, targets):
    """Mean loss of one window."""
    log_p = log_softmax(np.asarray(decoded(model, embeddings)), axis=-1)
    return -np.take_along_axis(log_p, np.asarray(targets)[:, None], -1).mean()


def test_the_clean_loss_is_that_of_every_window(model):
    expected = [by_hand(model, model.embed(window[:N]), window[1 : N + 1]) for window in WINDOWS[[0, 31, 32, 39]]]
    np.testing.assert_allclose(clean_losses(model, WINDOWS)[[0, 31, 32, 39]], expected, rtol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_perturbed_at_level_0_and_something_at_the_largest(model, kind):
    rms = stream_rms(model, WINDOWS)
    losses = perturbed_losses(model, WINDOWS, kind, (0.0, KINDS[kind].levels[-1]), rms)
    assert losses.shape == (2, 40)
    clean = clean_losses(model, WINDOWS)
    np.testing.assert_allclose(losses[0], clean, rtol=1e-12)
    assert np.abs(losses[1] - clean).max() > 1e-3


def test_the_rms_is_that_of_what_enters_every_layer(model):
    windows = WINDOWS[:35]
    embeddings = np.stack([model.embed(window[:N]) for window in windows])
    second = eqx.filter_jit(jax.vmap(lambda u: model.blocks[0](u)[0]))(jnp.asarray(embeddings))
    expected = [np.sqrt(np.square(streams).mean()) for streams in (embeddings, second)]
    np.testing.assert_allclose(stream_rms(model, windows), expected, rtol=1e-12)


def test_a_hook_on_a_stream_shifts_what_its_block_reads(model):
    shift = np.random.default_rng(1).normal(size=(2, N, 8))
    embeddings = model.embed(WINDOWS[0, :N])
    seen = []

    def hook(name, inputs, outputs):
        layer, _, own = name.partition(".")
        if own != "stream":
            return outputs
        seen.append(name)
        np.testing.assert_array_equal(inputs, outputs)
        return outputs + shift[int(layer)]

    logits, _ = model.decode(embeddings, hook=hook)
    stream = model.blocks[0](embeddings + shift[0])[0]
    stream = model.blocks[1](stream + shift[1])[0]
    np.testing.assert_allclose(logits, model.final_norm(stream) @ model.head.T, rtol=1e-12, atol=1e-12)
    assert seen == ["0.stream", "1.stream"]


def test_noise_has_the_variance_of_its_level_and_the_same_draws_at_every_level():
    zeros, rms = np.zeros_like(WINDOWS), np.array([0.5, 2.0])
    # The relative standard error of a mean of m squared normals is sqrt(2 / m).
    four_errors = 4 * np.sqrt(2 / (40 * N * 8))
    for kind, unit in (("embedding-noise", 1.0), ("relative-embedding-noise", 0.25)):
        losses = perturbed_losses(Squares(), zeros, kind, (0.3, 0.9), rms)
        np.testing.assert_allclose(losses[0].mean(), 0.09 * unit, rtol=four_errors)
        np.testing.assert_allclose(losses[1], 9 * losses[0], rtol=1e-5)
        assert len(np.unique(losses[0])) == 40
    for layer, scale in enumerate(rms):
        only = np.where(np.arange(2) == layer, rms, 0.0)
        losses = perturbed_losses(Squares(), zeros, "layer-noise", (0.3, 0.9), only)
        # Half, for the mean is over both layers.
        np.testing.assert_allclose(losses[0].mean(), 0.09 * scale**2 / 2, rtol=four_errors)
        np.testing.assert_allclose(losses[1], 9 * losses[0], rtol=1e-5)
    both = perturbed_losses(Squares(), zeros, "layer-noise", (0.3, 0.9), ONES)[0]
    apart = [perturbed_losses(Squares(), zeros, "layer-noise", (0.3, 0.9), np.eye(2)[i])[0] for i in range(2)]
    np.testing.assert_allclose(both, apart[0] + apart[1], rtol=1e-5)
    assert abs(np.corrcoef(*apart)[0, 1]) < 0.6


def test_a_small_adversarial_step_raises_the_loss_by_its_length_times_the_gradient(model):
    small = 2.0**-14
    losses = perturbed_losses(model, WINDOWS, "adversarial", (small, 0.05), ONES)
    clean = clean_losses(model, WINDOWS)
    random = np.random.default_rng(2)

    @jax.jit
    def loss(embeddings, targets):
        log_p = jax.nn.log_softmax(model.decode(embeddings)[0])
        return -log_p[jnp.arange(N), targets].mean()

    for w in (0, 20, 39):
        embeddings, targets = model.embed(WINDOWS[w, :N]), WINDOWS[w, 1 : N + 1]
        slope = np.linalg.norm(jax.grad(loss)(embeddings, targets))
        length = np.linalg.norm(embeddings)
        np.testing.assert_allclose(losses[0, w] - clean[w], small * length * slope, rtol=2e-2)
        for _ in range(20):
            direction = random.normal(size=embeddings.shape)
            step = 0.05 * length * direction / np.linalg.norm(direction)
            assert loss(embeddings + step, targets) < losses[1, w]


def test_a_direction_has_norm_1_however_short_and_zeros_stay():
    direction = np.random.default_rng(0).normal(size=(N, 8)).astype(np.float32)
    for scale in (1.0, 1e-30, 1e30):
        unit = perturbations._unit(jnp.asarray(scale * direction, jnp.float32))
        np.testing.assert_allclose(unit, direction / np.linalg.norm(direction), rtol=1e-5)
    np.testing.assert_array_equal(perturbations._unit(jnp.zeros((N, 8))), np.zeros((N, 8)))


def test_substitution_draws_every_other_known_character_equally_often():
    original = jnp.arange(V, dtype=jnp.int32)
    of_every_key = jax.jit(jax.vmap(lambda k, share: substituted(k, original, share, V), (0, None)))
    small, large = (np.asarray(of_every_key(KEYS, jnp.float32(share))) for share in (0.1, 0.4))
    assert large.dtype == np.int32
    changed = large != original
    np.testing.assert_allclose(changed.mean(0), 0.4, atol=4 * np.sqrt(0.24 / 4000))
    # At a smaller level fewer characters change, and to the same ones.
    assert (small[small != original] == large[small != original]).all()
    for character in range(V):
        drawn = np.bincount(large[changed[:, character], character], minlength=V)
        allowed = [v for v in range(1, V) if v != character]
        assert set(np.flatnonzero(drawn)) == set(allowed)
        expected = drawn.sum() / len(allowed)
        np.testing.assert_allclose(drawn[allowed], expected, atol=4.5 * np.sqrt(expected))


@pytest.mark.parametrize("length", [11, 12])
def test_swaps_exchange_disjoint_neighbours_and_every_pair_equally_often(length):
    place = np.arange(length)
    found = np.asarray(jax.jit(jax.vmap(lambda k: swapped(k, jnp.arange(length), 0.4)))(KEYS))
    assert (np.abs(found - place) <= 1).all()
    np.testing.assert_array_equal(np.take_along_axis(found, found, -1), np.tile(place, (len(KEYS), 1)))
    moved_up = (found == place + 1)[:, :-1]
    np.testing.assert_allclose(moved_up.mean(0), 0.2, atol=4 * np.sqrt(0.16 / 4000))
    np.testing.assert_allclose((found != place).mean(), 0.4 * (length - 1) / length, rtol=0.04)


def test_deletion_keeps_as_many_positions_as_asked_in_order():
    """Against a list made from the same draws."""
    of_every_key = jax.jit(jax.vmap(lambda k, share: kept_positions(k, 40, 32, share), (0, None)))
    draws = np.asarray(jax.vmap(lambda k: jax.random.uniform(k, (40,), jnp.float32))(KEYS[:50]))
    for share in (0.02, 0.1, 0.4, 1.0):
        found = np.asarray(of_every_key(KEYS, jnp.float32(share)))
        assert found.shape == (4000, 32)
        for row, drawn in zip(found[:50], draws, strict=True):
            # No more than the eight positions to spare are left out.
            left_out = np.flatnonzero(drawn < np.float32(share))[:8]
            np.testing.assert_array_equal(row, [i for i in range(40) if i not in left_out][:32])
        if share < 0.1:
            # Every one of the positions before the last is left out with the same probability.
            there = (found[:, :, None] == np.arange(30)).any(1)
            np.testing.assert_allclose(1 - there.mean(0), share, atol=4.5 * np.sqrt(share / 4000))


@pytest.mark.parametrize("kind", ["substitution", "swap", "deletion"])
def test_the_target_is_what_came_next_in_the_original(kind):
    cost = 20.0
    losses = perturbed_losses(Successor(jnp.float32(cost)), COUNTING, kind, (0.1, 0.3), np.ones(1)) / cost
    if kind == "deletion":
        # Whatever is left out, a character that is kept is followed by its own successor.
        np.testing.assert_allclose(losses, 0, atol=1e-6)
        return
    # Wrong just where the input was changed: a substitute or a neighbour does not have that successor.
    places = 32 if kind == "substitution" else 31
    for level, found in zip((0.1, 0.3), losses, strict=True):
        np.testing.assert_allclose(32 * found, np.round(32 * found), atol=1e-4)
        np.testing.assert_allclose(found.mean(), level * places / 32, rtol=0.1)


@pytest.mark.parametrize("kind", ["substitution", "swap"])
def test_models_and_numbers_of_windows_share_their_draws_and_levels_their_compilation(kind):
    levels, rms = (0.1, 0.3), np.ones(1)
    one = perturbed_losses(Successor(jnp.float32(20.0)), COUNTING, kind, levels, rms)
    compiled = len(Successor.traces)
    other = perturbed_losses(Successor(jnp.float32(25.0)), COUNTING[:35], kind, levels, rms)
    np.testing.assert_allclose(one[:, :35] / 20, other / 25, atol=1e-6)
    perturbed_losses(Successor(jnp.float32(20.0)), COUNTING, kind, (0.05, 0.2), 2 * rms)
    assert len(Successor.traces) == compiled


def test_all_is_in_float32_for_a_float32_model(model):
    narrow = jax.tree.map(lambda x: x.astype(jnp.float32), model)
    arguments = jnp.asarray(WINDOWS[:32]), jnp.arange(32, dtype=jnp.int32)
    levels, rms = jnp.asarray([0.05, 0.1], jnp.float32), jnp.ones(2, jnp.float32)
    for kind, perturbation in KINDS.items():
        result = jax.eval_shape(
            lambda *x, p=perturbation: evaluation._chunk_losses(p.at, p.draws, narrow, *x, levels, rms), *arguments
        )
        assert result.dtype == jnp.float32, kind


@pytest.mark.parametrize(
    ("vocabulary", "windows", "kind", "message"),
    [
        (V, WINDOWS[:, : N + 1], "deletion", r"windows: hold 13 characters; pass at least 20 for deletion"),
        (2, WINDOWS % 2, "substitution", r"model: has a vocabulary with no second character"),
    ],
)
def test_bad_arguments_are_named(vocabulary, windows, kind, message):
    with pytest.raises(ValueError, match=message):
        perturbed_losses(Transformer(jax.random.key(0), CONFIG.transformer(vocabulary)), windows, kind, (0.1,), ONES)

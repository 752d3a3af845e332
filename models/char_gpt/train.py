"""The training loop: a compiled step, margins noted on the way, and checkpoints from which a run goes on unchanged."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, PyTree
from tqdm import tqdm

from models.char_gpt import checkpoint
from models.char_gpt.config import Config, Site
from models.char_gpt.device_mesh import OVER_DATA, constrained, gathered, placed, require_agreement
from models.char_gpt.loss import Loss, LossTerms, Strength, loss_terms, negatives_at
from models.char_gpt.training_record import BatchMargins, Record, batch_margins, ends, new_record, note
from models.corpus import Corpus
from prob_transformer.transformer.network import Transformer

HISTORY_EVERY = 20


class TrainingDivergedError(RuntimeError):
    """The loss stopped being finite; the last checkpoint is kept."""


# What becomes of the optimiser's update: a function of it, the model, the learning rate and the strength.
Update = Callable[[PyTree, Transformer, Float[Array, ""], Strength], PyTree]


class Method(NamedTuple):
    """A loss in place of the configuration's own: its name, the strength that multiplies what it adds, and its terms.

    `update` is for what is added to the step and not to the loss, as decoupled weight decay is.
    """

    name: str
    strength: float
    loss: Loss = loss_terms
    update: Update | None = None


class State(NamedTuple):
    """What a step changes: model, optimiser state, and how often steps were halved by backtracking."""

    model: Transformer
    optimiser: PyTree
    halvings: Int[Array, ""]


def learning_rate(config: Config) -> optax.Schedule:
    """A linear warm-up over a tenth of the steps and a cosine decay to a tenth; then the rate of the last step."""
    warmup = max(1, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(config.steps, warmup + 1), 0.1 * config.learning_rate
    )
    return lambda step: schedule(jnp.minimum(step, config.steps - 1))


def optimiser(config: Config) -> optax.GradientTransformation:
    """Adam with clipped gradients, at the learning rate of the step."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate(config)))


class StepData(NamedTuple):
    """What a step is given beside the state: training characters, seed, step, and the strength of the method."""

    characters: Int[Array, " N"]
    seed: Int[Array, ""]
    step: Int[Array, ""]
    strength: Float[Array, ""]

    @classmethod
    def of(cls, characters: Int[Array, " N"], config: Config, step: int, strength: float | None = None) -> "StepData":
        """The data of a step; the strength is the configuration's own unless another is given."""
        strength = config.strength if strength is None else strength
        return cls(characters, jnp.asarray(config.seed), jnp.asarray(step), jnp.asarray(strength, jnp.float32))


def draw_windows(
    characters: Int[Array, " N"], seed: Int[Array, ""], step: Int[Array, ""], config: Config
) -> Int[Array, "B n+1"]:
    """The batch of a step: a function of seed and step alone, so that a resumed run sees the same data."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    length = config.context + 1
    starts = jax.random.randint(key, (config.batch,), 0, characters.shape[0] - length + 1)
    return jax.vmap(lambda start: jax.lax.dynamic_slice(characters, (start,), (length,)))(starts)


def full_configuration(config: Config, method: Method | None) -> dict[str, Any]:
    """All that a run depends on but its text: the configuration, and "method" and "strength" if it has another loss."""
    return config.as_dict() | ({} if method is None else {"method": method.name, "strength": method.strength})


def backtracked(
    model: Transformer, update: PyTree, windows: Int[Array, "B n+1"], config: Config, mesh: Mesh | None = None
) -> tuple[Transformer, Int[Array, ""]]:
    """The model after the update, and how often that was halved to keep det J <= 0 from spreading in the batch.

    The update is halved, at most `backtrack` times, while it makes more determinants at the penalised site
    non-positive than before.
    """

    def negatives(candidate: Transformer) -> Int[Array, ""]:
        return negatives_at(candidate, windows, config.barrier_site, config.implementation, mesh)

    def apply(scale: Float[Array, ""]) -> Transformer:
        return eqx.apply_updates(model, jax.tree.map(lambda u: scale * u, update))

    before = negatives(model)

    def too_far(carry: tuple[Float[Array, ""], Int[Array, ""]]) -> Array:
        scale, halvings = carry
        return (halvings < config.backtrack) & (negatives(apply(scale)) > before)

    start = (jnp.ones((), jnp.float32), jnp.zeros((), jnp.int32))
    scale, halvings = jax.lax.while_loop(too_far, lambda carry: (carry[0] / 2, carry[1] + 1), start)
    return apply(scale), halvings


@eqx.filter_jit
def train_step(
    data: StepData,
    state: State,
    config: Config,
    mesh: Mesh | None = None,
    loss: Loss = loss_terms,
    update: Update | None = None,
) -> tuple[State, LossTerms]:
    """One optimiser step on the batch of seed and step; all but the data and the state is static."""
    characters, seed, step, strength = data
    windows = constrained(draw_windows(characters, seed, step, config), mesh, OVER_DATA)
    # Apart from the key that drew the windows.
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 1)

    def objective(model: Transformer) -> tuple[Float[Array, ""], LossTerms]:
        terms = loss(model, windows, config, characters.shape[0], key, mesh, strength)
        return terms.loss, terms

    (_, terms), gradient = eqx.filter_value_and_grad(objective, has_aux=True)(state.model)
    change, optimiser_state = optimiser(config).update(gradient, state.optimiser, state.model)
    if update is not None:
        change = update(change, state.model, learning_rate(config)(step), strength)
    if config.backtrack and config.objective != "ce":
        model, halvings = backtracked(state.model, change, windows, config, mesh)
    else:
        model, halvings = eqx.apply_updates(state.model, change), jnp.zeros((), jnp.int32)
    return constrained((State(model, optimiser_state, state.halvings + halvings), terms), mesh)


@eqx.filter_jit
def _margins(data: StepData, model: Transformer, config: Config, mesh: Mesh | None) -> dict[Site, BatchMargins]:
    windows = constrained(draw_windows(data.characters, data.seed, data.step, config), mesh, OVER_DATA)
    return constrained(batch_margins(model, windows, config.implementation, mesh), mesh)


def initial_state(config: Config, vocabulary_size: int) -> State:
    """The state before the first step, a function of the configuration alone."""
    # A stream of its own, apart from the one that draws batches.
    key = jax.random.fold_in(jax.random.key(config.seed), np.uint32(0xFFFFFFFF))
    model = Transformer(key, config.transformer(vocabulary_size))
    state = optimiser(config).init(eqx.filter(model, eqx.is_inexact_array))
    return State(model, state, jnp.zeros((), jnp.int32))


def extend(record: Record, config: Config, step: int, steps: int) -> None:
    """Note in the record that the run, now after `step` steps, is extended to `steps` steps in all.

    Nothing is noted again for an extension to as many steps that was stopped on its way. Raises ValueError naming
    --steps if the run has as many steps already.
    """
    last = ends(config, record)[-1]
    if record["extensions"] and step < steps == last:
        return
    if steps <= last:
        raise ValueError(f"--steps: got {steps} for a run of {last} steps; pass more, or resume without --steps.")
    rate = float(learning_rate(config)(config.steps - 1))
    record["extensions"].append({"from_step": last, "to_step": steps, "learning_rate": rate})


def train_model(
    config: Config,
    corpus: Corpus,
    out: Path,
    method: Method | None = None,
    *,
    steps: int | None = None,
    stop_at: int | None = None,
    mesh: Mesh | None = None,
    quiet: bool = False,
) -> tuple[State, Record]:
    """Train from the checkpoint in `out` if there is one, else from the start, up to the last step or `stop_at`.

    `steps` extends the run to so many steps in all, at its final learning rate; a run that was extended before goes on
    to the steps of its last extension. The loss is that of the configuration, or of the method. Checkpoints every
    `checkpoint_every` steps; returns the last state, whole even if it was spread over a mesh, and record. Raises
    TrainingDivergedError when the loss is not finite, leaving the last checkpoint; ValueError for an unwritable folder,
    a foreign checkpoint, or no more `steps` than the run has.
    """
    configuration = full_configuration(config, method)
    method = Method(config.method, config.strength) if method is None else method
    state, step, record = initial_state(config, len(corpus.vocabulary)), 0, new_record()
    path = out / checkpoint.NAME
    is_first = jax.process_index() == 0
    if path.exists():
        state, step, record = checkpoint.load(path, configuration, corpus.sha256, state)
    if steps is not None:
        extend(record, config, step, steps)
    # Also keeps the first process from writing before the others have looked.
    require_agreement(options=configuration, text=corpus.sha256, checkpoint=record)
    if is_first:
        # A run that goes on is saved too: its extension is new, or its file was without a vocabulary.
        checkpoint.save(path, configuration, corpus, state, step, record)
    state = placed(state, mesh)
    fixed = placed(StepData.of(jnp.asarray(corpus.train), config, step, method.strength), mesh)
    # What a compiled step depends on: neither seed nor strength.
    compiled_for = dataclasses.replace(config, seed=0, barrier_weight=1.0)
    stages = ends(config, record)
    last = stages[-1] if stop_at is None else min(stop_at, stages[-1])
    started, compiling = time.perf_counter() - record["wall_seconds"], True
    name = f"{method.name} seed {config.seed}"
    with tqdm(
        total=stages[-1],
        initial=step,
        desc=f"{name}, compiling",
        unit="step",
        mininterval=1,
        disable=quiet or not is_first,
    ) as bar:
        while step < last:
            data = fixed._replace(step=placed(jnp.asarray(step), mesh))
            if step % config.watch_every == 0:
                note(record, step, _margins(data, state.model, compiled_for, mesh))
            state, terms = train_step(data, state, compiled_for, mesh, method.loss, method.update)
            if not np.isfinite(terms.loss):
                raise TrainingDivergedError(
                    f"the loss is {float(terms.loss)} at step {step} of {method.name}, seed {config.seed}; lower "
                    f"--learning-rate or the strength. The last checkpoint is kept in {out}."
                )
            if compiling:
                record["starting_seconds"] += time.perf_counter() - started - record["wall_seconds"]
                record["starts"] += 1
                compiling = False
                bar.set_description(name)
            if step % HISTORY_EVERY == 0 or step + 1 in stages:
                record["history"].append({"step": step, **{key: float(x) for key, x in terms._asdict().items()}})
            step += 1
            progress = {"ce": f"{terms.cross_entropy:.3f}", "negative": f"{terms.negative_share:.1%}"}
            bar.set_postfix(progress, refresh=False)
            bar.update()
            if step % config.checkpoint_every == 0 or step == last:
                record["wall_seconds"] = time.perf_counter() - started
                whole = gathered(state, mesh)
                if is_first:
                    checkpoint.save(path, configuration, corpus, whole, step, record)
    return gathered(state, mesh), record

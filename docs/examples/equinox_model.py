# %% [markdown]
# # The barrier in a training loop of your own: an Equinox model
#
# The library's `Transformer`, an Equinox module, is trained twice on characters by a loop of its own, without and with
# `barrier_penalty`. What the penalty needs is what every attention layer has: its query and key maps, and the
# normalised inputs that it attends over. Run it with `python docs/examples/equinox_model.py`; it takes about a minute.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from prob_transformer import Attention, barrier_penalty, decoder_margins
from prob_transformer.transformer import Transformer, TransformerConfig

LENGTH, BATCH = 24, 8
TEXT = (
    "The weights of attention depend on the query, and the query on the embedding itself, so that a small change of a "
    "token moves its own mean. Where the two cancel, the map from noise to embedding folds over, and a little noise is "
    "amplified without limit. The tokens closest to that boundary are the support tokens of the sequence. "
) * 4
VOCABULARY = sorted(set(TEXT))
TOKENS = jnp.array([VOCABULARY.index(character) for character in TEXT])
CONFIG = TransformerConfig(len(VOCABULARY), LENGTH, layers=2, width=16, heads=2)


# %% [markdown]
# Every layer as the library reads it: an `Attention` with `query` and `key` of shape (heads, head size, width), and the
# inputs (..., length, width). `decode` returns the inputs of all layers next to the logits. In a module of your own,
# return them from its `__call__`, as the [Flax NNX example](flax_nnx_model.py) does.


# %%
def decoded(model, tokens):
    """Next-token logits (B, n, V) of sequences (B, n), and each layer's attention with its inputs (B, n, d)."""
    logits, attended = jax.vmap(lambda row: model.decode(model.embed(row)), out_axes=(0, 1))(tokens)
    layers = [Attention(block.query, block.key) for block in model.blocks]
    return logits, list(zip(layers, attended.inputs, strict=True))


# %% [markdown]
# The loss. The two lines with `penalty` are all that the barrier adds to it.


# %%
def loss(model, tokens, weight):
    logits, layers = decoded(model, tokens[:, :-1])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    penalty = barrier_penalty(layers)
    return cross_entropy + weight * penalty.mean, (cross_entropy, penalty)


def batch(key):
    starts = jax.random.randint(key, (BATCH,), 0, TOKENS.shape[0] - LENGTH)
    return TOKENS[starts[:, None] + jnp.arange(LENGTH + 1)]


# Not bounded below, the barrier needs a weight prior: decay.
OPTIMISER = optax.adamw(1e-2, weight_decay=1e-2)


@eqx.filter_jit
def step(model, state, tokens, weight):
    (_, reported), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model, tokens, weight)
    updates, state = OPTIMISER.update(gradient, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, reported


def train(weight, steps):
    """A model trained with that weight of the barrier, from the same start and on the same batches."""
    model = Transformer(jax.random.key(0), CONFIG)
    state = OPTIMISER.init(eqx.filter(model, eqx.is_inexact_array))
    weight = jnp.asarray(weight)  # a number of Python's would be compiled in
    for key in jax.random.split(jax.random.key(1), steps):
        model, state, (cross_entropy, _) = step(model, state, batch(key), weight)
    return model, float(cross_entropy)


# %% [markdown]
# After training: margins of every layer, head and position of one sequence.


# %%
def closest(model):
    """Smallest det J and share of negative signs over all layers and heads, on the first sequence of the text."""
    _, layers = decoded(model, TOKENS[None, :LENGTH])
    found = list(decoder_margins((layer, inputs[0]) for layer, inputs in layers))
    determinants = jnp.stack([margins.determinant for margins in found])[..., 1:]
    return float(determinants.min()), float((determinants < 0).mean())


def compare(steps):
    """Training loss, smallest margin and share of negative signs by weight of the barrier."""
    figures = {}
    for weight in (0.0, 0.05):
        model, cross_entropy = train(weight, steps)
        smallest, share = closest(model)
        figures[weight] = {"loss": cross_entropy, "smallest margin": smallest, "negative share": share}
    return figures


# %%
if __name__ == "__main__":
    for barrier_weight, found in compare(steps=200).items():
        print(f"weight {barrier_weight}: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))

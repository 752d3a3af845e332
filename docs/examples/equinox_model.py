# %% [markdown]
# # The barrier in a training loop of your own: an Equinox model
#
# A small character decoder is trained twice, without and with `barrier_penalty`. What the penalty needs is what every
# attention layer has: its query and key maps, and the normalised inputs that it attends over. Run it with
# `python docs/examples/equinox_model.py`; it takes about a minute.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from prob_transformer import Attention, barrier_penalty, decoder_margins

WIDTH, HEADS, LAYERS, LENGTH, BATCH = 16, 2, 2, 24, 8
TEXT = (
    "The weights of attention depend on the query, and the query on the embedding itself, so that a small change of a "
    "token moves its own mean. Where the two cancel, the map from noise to embedding folds over, and a little noise is "
    "amplified without limit. The tokens closest to that boundary are the support tokens of the sequence. "
) * 4
VOCABULARY = sorted(set(TEXT))
TOKENS = jnp.array([VOCABULARY.index(character) for character in TEXT])


# %%
class Block(eqx.Module):
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    perceptron_norm: eqx.nn.LayerNorm
    perceptron: eqx.nn.MLP

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.norm, self.perceptron_norm = eqx.nn.LayerNorm(WIDTH), eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=first)
        self.perceptron = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, 1, jax.nn.gelu, key=second)

    def __call__(self, stream):
        """The stream after the layer, and the inputs that its heads attended over, (n, d) each."""
        inputs = jax.vmap(self.norm)(stream)
        causal = jnp.tril(jnp.ones((stream.shape[0], stream.shape[0]), bool))
        stream = stream + self.attention(inputs, inputs, inputs, mask=causal)
        return stream + jax.vmap(self.perceptron)(jax.vmap(self.perceptron_norm)(stream)), inputs


class Decoder(eqx.Module):
    embedding: eqx.nn.Embedding
    places: jax.Array
    blocks: list[Block]
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, LAYERS + 3)
        self.embedding = eqx.nn.Embedding(len(VOCABULARY), WIDTH, key=keys[0])
        self.places = 0.1 * jax.random.normal(keys[1], (LENGTH, WIDTH))
        self.blocks = [Block(block_key) for block_key in keys[3:]]
        self.head = eqx.nn.Linear(WIDTH, len(VOCABULARY), key=keys[2])

    def __call__(self, tokens):
        """Next-token logits, and the inputs of every layer."""
        stream, inputs = jax.vmap(self.embedding)(tokens) + self.places[: tokens.shape[0]], []
        for block in self.blocks:
            stream, attended = block(stream)
            inputs.append(attended)
        return jax.vmap(self.head)(stream), inputs


# %% [markdown]
# The layer as the library reads it: `query` and `key` of shape (heads, head size, width). Equinox stacks the heads
# along the rows of one matrix.


# %%
def attention_layer(block):
    query, key = (projection.weight for projection in (block.attention.query_proj, block.attention.key_proj))
    return Attention(query.reshape(HEADS, -1, WIDTH), key.reshape(HEADS, -1, WIDTH))


def layers_of(model, inputs):
    return [(attention_layer(block), attended) for block, attended in zip(model.blocks, inputs, strict=True)]


# %% [markdown]
# The loss. The two lines with `penalty` are all that the barrier adds to it.


# %%
def loss(model, tokens, weight):
    logits, inputs = jax.vmap(model)(tokens[:, :-1])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    penalty = barrier_penalty(layers_of(model, inputs))
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
    model = Decoder(jax.random.key(0))
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
    _, inputs = model(TOKENS[:LENGTH])
    found = list(decoder_margins(layers_of(model, inputs)))
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

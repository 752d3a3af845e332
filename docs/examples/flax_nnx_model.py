# %% [markdown]
# # The barrier in a training loop of your own: a Flax NNX model
#
# A small character decoder is trained twice, without and with `barrier_penalty`. What the penalty needs is what every
# attention layer has: its query and key maps, and the normalised inputs that it attends over. Run it with
# `python docs/examples/flax_nnx_model.py`; it takes about a minute.

# %%
import jax
import jax.numpy as jnp
import optax
from flax import nnx

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
class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.perceptron_norm = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
        self.expand = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.contract = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, stream):
        """The stream after the layer, and the inputs that its heads attended over, (b, n, d) each."""
        inputs = self.norm(stream)
        causal = jnp.tril(jnp.ones((1, 1, stream.shape[1], stream.shape[1]), bool))
        stream = stream + self.attention(inputs, mask=causal)
        return stream + self.contract(nnx.gelu(self.expand(self.perceptron_norm(stream)))), inputs


class Decoder(nnx.Module):
    def __init__(self, rngs):
        self.embedding = nnx.Embed(len(VOCABULARY), WIDTH, embedding_init=nnx.initializers.normal(1.0), rngs=rngs)
        self.places = nnx.Embed(LENGTH, WIDTH, embedding_init=nnx.initializers.normal(0.1), rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.head = nnx.Linear(WIDTH, len(VOCABULARY), rngs=rngs)

    def __call__(self, tokens):
        """Next-token logits, and the inputs of every layer."""
        stream, inputs = self.embedding(tokens) + self.places(jnp.arange(tokens.shape[1])), []
        for block in self.blocks:
            stream, attended = block(stream)
            inputs.append(attended)
        return self.head(stream), inputs


# %% [markdown]
# The layer as the library reads it: `query` and `key` of shape (heads, head size, width), biases (heads, head size).
# Flax keeps kernels input first, (width, heads, head size).


# %%
def attention_layer(block):
    query, key = block.attention.query, block.attention.key
    return Attention(
        query.kernel[...].transpose(1, 2, 0),
        key.kernel[...].transpose(1, 2, 0),
        query_bias=query.bias[...],
        key_bias=key.bias[...],
    )


def layers_of(model, inputs):
    return [(attention_layer(block), attended) for block, attended in zip(model.blocks, inputs, strict=True)]


# %% [markdown]
# The loss. The two lines with `penalty` are all that the barrier adds to it.


# %%
def loss(model, tokens, weight):
    logits, inputs = model(tokens[:, :-1])
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    penalty = barrier_penalty(layers_of(model, inputs))
    return cross_entropy + weight * penalty.mean, (cross_entropy, penalty)


def batch(key):
    starts = jax.random.randint(key, (BATCH,), 0, TOKENS.shape[0] - LENGTH)
    return TOKENS[starts[:, None] + jnp.arange(LENGTH + 1)]


# Not bounded below, the barrier needs a weight prior: decay.
OPTIMISER = optax.adamw(1e-2, weight_decay=1e-2)


@nnx.jit
def step(model, optimiser, tokens, weight):
    (_, reported), gradient = nnx.value_and_grad(loss, has_aux=True)(model, tokens, weight)
    optimiser.update(model, gradient)
    return reported


def train(weight, steps):
    """A model trained with that weight of the barrier, from the same start and on the same batches."""
    model = Decoder(nnx.Rngs(0))
    optimiser = nnx.Optimizer(model, OPTIMISER, wrt=nnx.Param)
    for key in jax.random.split(jax.random.key(1), steps):
        cross_entropy, _ = step(model, optimiser, batch(key), weight)
    return model, float(cross_entropy)


# %% [markdown]
# After training: margins of every layer, head and position of one sequence.


# %%
def closest(model):
    """Smallest det J and share of negative signs over all layers and heads, on the first sequence of the text."""
    _, inputs = model(TOKENS[None, :LENGTH])
    found = list(decoder_margins(layers_of(model, [attended[0] for attended in inputs])))
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

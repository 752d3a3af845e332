"""A decoder of the GPT-2 family: its configuration, and the model from the weights of a Hugging Face folder.

Layer norms, learned positions, one fused map for queries, keys and values, GELU, biases everywhere. GPT-2 stores its
maps input first, (in, out): x W + b. Fields of config.json have the names and defaults of transformers.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import msgspec
from jaxtyping import Array

from prob_transformer.attention import Attention
from prob_transformer.pretrained.config_fields import Count, Positive, require_supported
from prob_transformer.pretrained.decoder import Block, Decoder, GeluMLP
from prob_transformer.pretrained.weights import Stored, read_all_weights


class Gpt2Config(msgspec.Struct):
    """What is read of the config.json of a model of type gpt2. Raises ValueError for what is not computed here."""

    vocab_size: Count = 50257
    n_positions: Count = 1024
    n_embd: Count = 768
    n_layer: Count = 12
    n_head: Count = 12
    n_inner: Count | None = None
    activation_function: str = "gelu_new"
    layer_norm_epsilon: Positive = 1e-5
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    add_cross_attention: bool = False
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        require_supported(
            self,
            activation_function=("gelu_new", "gelu_pytorch_tanh", "gelu"),
            scale_attn_weights=(True,),
            scale_attn_by_inverse_layer_idx=(False,),
            add_cross_attention=(False,),
        )
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd = {self.n_embd} does not divide into n_head = {self.n_head} heads")


def gpt2_decoder(config: Gpt2Config, stored: Stored, prefix: str, head: dict[str, str]) -> Decoder:
    """The decoder in float32. Raises ValueError for weights that are missing, left over or do not fit.

    `prefix` is what the names of the model's body begin with; `head` is empty where it is the token embedding.
    """
    width, heads, size = config.n_embd, config.n_head, config.n_embd // config.n_head
    hidden = 4 * width if config.n_inner is None else config.n_inner
    whole = {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.n_positions, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
        "head": (config.vocab_size, width),
    }
    of_layer: dict[str, tuple[int, ...]] = {
        f"{norm}.{part}": (width,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")
    }
    for name, rows, columns in (
        ("attn.c_attn", width, 3 * width),
        ("attn.c_proj", width, width),
        ("mlp.c_fc", width, hidden),
        ("mlp.c_proj", hidden, width),
    ):
        of_layer |= {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}
    names = {name: prefix + name for name in whole if name != "head"} | head
    names |= {name: f"{prefix}h.{{}}.{name}" for name in of_layer}

    def norm(weights: dict[str, Array], name: str) -> eqx.nn.LayerNorm:
        empty = eqx.nn.LayerNorm(width, config.layer_norm_epsilon)
        return eqx.tree_at(lambda n: (n.weight, n.bias), empty, (weights[f"{name}.weight"], weights[f"{name}.bias"]))

    # Compiled once for all layers, so that their shapes are checked once.
    @jax.jit
    def block(weights: dict[str, Array]) -> Block:
        # (in, 3, heads, size) to query, key and value, each (heads, size, in).
        query, key, value = weights["attn.c_attn.weight"].reshape(width, 3, heads, size).transpose(1, 2, 3, 0)
        query_bias, key_bias, value_bias = weights["attn.c_attn.bias"].reshape(3, heads, size)
        output = weights["attn.c_proj.weight"].reshape(heads, size, width).transpose(0, 2, 1)
        attention = Attention(query, key, value, output, query_bias=query_bias, key_bias=key_bias)
        # Weights sum to one, so each head passes the bias of its values on unchanged.
        output_bias = weights["attn.c_proj.bias"] + jnp.einsum("hdv,hv->d", output, value_bias)
        mlp = GeluMLP(
            weights["mlp.c_fc.weight"].T,
            weights["mlp.c_fc.bias"],
            weights["mlp.c_proj.weight"].T,
            weights["mlp.c_proj.bias"],
            approximate=config.activation_function != "gelu",
        )
        return Block(norm(weights, "ln_1"), attention, output_bias, norm(weights, "ln_2"), mlp)

    found, blocks = read_all_weights(stored, names, whole, of_layer, config.n_layer, block)
    arrays = {name: jnp.asarray(array) for name, array in found.items()}
    return Decoder(
        token_embedding=arrays["wte.weight"],
        position_embedding=arrays["wpe.weight"],
        blocks=blocks,
        final_norm=norm(arrays, "ln_f"),
        head=arrays.get("head", arrays["wte.weight"]),
        context=config.n_positions,
    )

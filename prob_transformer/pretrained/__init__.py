"""Pretrained decoders of the Llama and GPT-2 families in JAX, from files on disk, for looking at their margins.

Needs the extra `inspect`. Read in this order: decoder, llama and gpt2 (the families), weights, gguf_file and
huggingface (where weights come from), gguf_tokenizer, load, generation.
"""

from prob_transformer._extras import require

require("inspect", "gguf", "msgspec", "safetensors", "tokenizers")

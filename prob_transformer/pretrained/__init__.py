"""Pretrained decoders of the Llama and GPT-2 families in JAX, from files on disk, for looking at their margins.

Needs the extra `inspect`. Read in this order: model (the decoder), llama and gpt2 (the families), gguf_file,
huggingface and smollm2 (where weights come from), tokenizer, load.
"""

from prob_transformer._extras import require

require("inspect", "gguf", "msgspec", "safetensors", "tokenizers")

"""Pretrained decoders of the Llama and GPT-2 families in JAX, for looking at their margins."""

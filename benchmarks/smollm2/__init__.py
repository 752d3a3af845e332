"""SmolLM2 in JAX next to transformers on PyTorch, both reading one GGUF file."""

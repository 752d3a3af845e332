import jax

# The reference is checked in float64; tests of the fast path pass float32 arrays explicitly.
jax.config.update("jax_enable_x64", True)

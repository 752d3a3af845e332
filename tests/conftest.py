import jax

import models  # noqa: F401  (sets up JAX's CPU thread pool before JAX starts it)

# The reference is checked in float64; tests of the fast path pass float32 arrays explicitly.
jax.config.update("jax_enable_x64", True)

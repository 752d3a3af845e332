"""Compilation for functions that are called a few hundred times on tiny arrays, where compiling is most of the cost."""

import functools

import jax

# Halves compile time, and changes results by rounding only.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

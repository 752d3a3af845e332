"""Shapes and dtypes of the annotations, checked at every call of a test: `make test-shapes`.

Annotations name `Array`, which is JAX's; callers pass NumPy arrays too, which every public function converts. A pytest
plugin, loaded before `prob_transformer` is imported.
"""

import jax
import jaxtyping
import numpy as np

jaxtyping.Array = jax.Array | np.ndarray

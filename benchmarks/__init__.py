"""Time, memory and agreement of the kernels against straightforward versions: `python -m benchmarks`.

Read in this order: sizes (what is measured), timing (paired rounds), straightforward, straightforward_torch and
autodiff_jacobian (whom the kernels is held against), contestants, and one file a section of the table.
"""

import os

# On a GPU, memory is measured in other processes beside this one, which must leave them some. Read when JAX starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

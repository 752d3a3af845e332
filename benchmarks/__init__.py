"""Time, memory and agreement of the kernels against straightforward versions: `python -m benchmarks`.

Read in this order: problem_sizes (what is measured), timing (paired rounds), straightforward and straightforward_torch
(whom the kernels are held against), contestants, and the sections of the table: training_step, kernel_time,
peak_memory, agreement.
"""

import os

# On a GPU, memory is measured in other processes beside this one, which must leave them some. Read when JAX starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

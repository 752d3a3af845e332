"""Models composed from the library, run from a checkout with `python -m models.NAME`."""

import os

# JAX 0.10 sizes its CPU thread pool by the cores. With two of them a training step can end up waiting for itself: every
# thread of the pool idle, the step never ending (seen at batch 4, 8 and 12 on every run, not at 16, and not with JAX
# 0.12). More threads than cores avoid it. Read when JAX starts its CPU backend, so set before any computation.
os.environ.setdefault("PJRT_NPROC", str(max(8, os.cpu_count() or 1)))

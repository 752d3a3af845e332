"""Inference held against the truth: `python -m benchmarks.inference`.

Read in this order: sizes, models (what is inferred), truth (closed forms and quadrature), conjugate, laplace_nuts,
evidence, calibration (the sections), page.
"""

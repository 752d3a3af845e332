"""Inference held against the truth: closed forms, quadrature, calibration, and Laplace against NUTS.

Every comparison is a check, run by `python -m theory_checks --only ID`, and a section of the saved result that
`python -m theory_checks.inference` writes. They take much longer than the claims on the density, so that `python -m
theory_checks` runs them only when asked.
"""

from theory_checks.check import Check
from theory_checks.inference import calibration, conjugate_posterior, laplace_against_nuts, particle_evidence

_COMPARISONS = (conjugate_posterior, laplace_against_nuts, particle_evidence, calibration)
SECTIONS = tuple(module.SECTION for module in _COMPARISONS)
CHECKS: tuple[Check, ...] = tuple(module.CHECK for module in _COMPARISONS)

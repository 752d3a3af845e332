"""Laplace's approximation of a posterior: a Gaussian at its mode, in unconstrained coordinates.

Read in this order: precision (the structures).
"""

from prob_transformer.inference.laplace.precision import (
    BlockPrecision,
    DensePrecision,
    DiagonalPrecision,
    IndefiniteCurvatureError,
    Precision,
)

__all__ = [
    "BlockPrecision",
    "DensePrecision",
    "DiagonalPrecision",
    "IndefiniteCurvatureError",
    "Precision",
]

"""Laplace's approximation of a posterior: a Gaussian at its mode, in unconstrained coordinates.

Read in this order: precision (the structures), potential (what is approximated, split in likelihood and rest),
curvature, low_rank and blockwise (more structures), predictive, result, and fit, which puts them together.
"""

from prob_transformer.inference.laplace.curvature import Curvature
from prob_transformer.inference.laplace.fit import Structure, laplace
from prob_transformer.inference.laplace.precision import (
    BlockPrecision,
    DensePrecision,
    DiagonalPrecision,
    IndefiniteCurvatureError,
    Precision,
)
from prob_transformer.inference.laplace.predictive import LinearisedPredictive, SampledPredictive
from prob_transformer.inference.laplace.result import LaplaceResult

__all__ = [
    "BlockPrecision",
    "Curvature",
    "DensePrecision",
    "DiagonalPrecision",
    "IndefiniteCurvatureError",
    "LaplaceResult",
    "LinearisedPredictive",
    "Precision",
    "SampledPredictive",
    "Structure",
    "laplace",
]

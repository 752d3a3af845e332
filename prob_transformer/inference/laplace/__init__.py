"""Laplace's approximation of a posterior: a Gaussian at its mode, in unconstrained coordinates.

Read in this order: precision (the structures), potential (what is approximated, split in likelihood and rest),
curvature, low_rank and blockwise (more structures), predictive, result, fit, which puts them together, and what is
done with a fit: matrix_free (products with the exact covariance) and tuning (the precision of the prior).
"""

from prob_transformer.inference.laplace.curvature import Curvature
from prob_transformer.inference.laplace.fit import Structure, laplace
from prob_transformer.inference.laplace.matrix_free import covariance_product
from prob_transformer.inference.laplace.precision import (
    BlockPrecision,
    DensePrecision,
    DiagonalPrecision,
    FlatDirectionsError,
    IndefiniteCurvatureError,
    Precision,
)
from prob_transformer.inference.laplace.predictive import LinearisedPredictive, SampledPredictive
from prob_transformer.inference.laplace.result import LaplaceResult
from prob_transformer.inference.laplace.tuning import PriorTuning, TuningStatus, tune_prior_precision

__all__ = [
    "BlockPrecision",
    "Curvature",
    "DensePrecision",
    "DiagonalPrecision",
    "FlatDirectionsError",
    "IndefiniteCurvatureError",
    "LaplaceResult",
    "LinearisedPredictive",
    "Precision",
    "PriorTuning",
    "SampledPredictive",
    "Structure",
    "TuningStatus",
    "covariance_product",
    "laplace",
    "tune_prior_precision",
]

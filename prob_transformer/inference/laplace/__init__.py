"""Laplace's approximation of a posterior: a Gaussian at its mode, in unconstrained coordinates.

Read in this order: precision (what a structure is), curvature (of the potential that is approximated, split in
likelihood and rest), then the structures low_rank, kronecker and last_layer (of networks), predictive, result,
tuning (the precision of the prior), network, and fit, which puts them together.
"""

from prob_transformer.inference.laplace.curvature import Curvature
from prob_transformer.inference.laplace.fit import Structure, laplace
from prob_transformer.inference.laplace.kronecker import Positions
from prob_transformer.inference.laplace.low_rank import DiagonalPrecision
from prob_transformer.inference.laplace.network import Evidence, NetworkLaplace, NetworkStructure, TrainedNetwork
from prob_transformer.inference.laplace.precision import (
    BlockPrecision,
    DensePrecision,
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
    "Evidence",
    "FlatDirectionsError",
    "IndefiniteCurvatureError",
    "LaplaceResult",
    "LinearisedPredictive",
    "NetworkLaplace",
    "NetworkStructure",
    "Positions",
    "Precision",
    "PriorTuning",
    "SampledPredictive",
    "Structure",
    "TrainedNetwork",
    "TuningStatus",
    "laplace",
    "tune_prior_precision",
]

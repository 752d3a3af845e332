"""Laplace's approximation of a posterior: a Gaussian at its mode, in unconstrained coordinates.

Read in this order: precision (what a structure is), curvature (of the potential that is approximated, split in
likelihood and rest), then the structures low_rank, kronecker and last_layer (of networks), predictive, result,
tuning (the precision of the prior), network, and fit, which puts them together.
"""

from prob_transformer.inference.laplace.fit import laplace
from prob_transformer.inference.laplace.network import TrainedNetwork
from prob_transformer.inference.laplace.precision import (
    FlatDirectionsError,
    IndefiniteCurvatureError,
)
from prob_transformer.inference.laplace.tuning import TuningStatus, tune_prior_precision

__all__ = [
    "FlatDirectionsError",
    "IndefiniteCurvatureError",
    "TrainedNetwork",
    "TuningStatus",
    "laplace",
    "tune_prior_precision",
]

"""Inference for the models of this library, and results in the form that ArviZ reads.

Read in this order: results (what every method returns), joint, law (whether the likelihood is a probability law),
gauge (sites that are not identified), minimise (steps that stay on their side of det J = 0), map, proposals, particles,
smoothing, particle_result, reparam, nuts, predictive.
"""

from prob_transformer.inference.gauge import Gauge
from prob_transformer.inference.law import Law
from prob_transformer.inference.map import MapResult, embedding_signs, find_map
from prob_transformer.inference.minimise import MapStatus
from prob_transformer.inference.nuts import nuts
from prob_transformer.inference.nuts_result import NutsResult, NutsStatus
from prob_transformer.inference.particle_result import ParticleResult, ParticleStatus
from prob_transformer.inference.particles import particle_filter
from prob_transformer.inference.predictive import Predictive
from prob_transformer.inference.reparam import NoiseReparam, through_noise
from prob_transformer.inference.results import datatree, for_arviz, load, save
from prob_transformer.inference.smoothing import smooth

__all__ = [
    "Gauge",
    "Law",
    "MapResult",
    "MapStatus",
    "NoiseReparam",
    "NutsResult",
    "NutsStatus",
    "ParticleResult",
    "ParticleStatus",
    "Predictive",
    "datatree",
    "embedding_signs",
    "find_map",
    "for_arviz",
    "load",
    "nuts",
    "particle_filter",
    "save",
    "smooth",
    "through_noise",
]

"""Inference for the models of this library, and results in the form that ArviZ reads.

Read in this order: result_tree (what all results share, and their form on disk), joint, embedding_sites, law (whether
the likelihood is a probability law), gauge (sites that are not identified), minimise (steps that stay on their side of
det J = 0), map, chains, nuts_sampler, proposals, smoothing, particles, calibration.
"""

from prob_transformer.inference.embedding_sites import NoiseReparam, Predictive, through_noise
from prob_transformer.inference.map import find_map
from prob_transformer.inference.minimise import MapStatus
from prob_transformer.inference.nuts_sampler import NutsStatus, nuts
from prob_transformer.inference.particles import ParticleStatus, particle_filter, smooth
from prob_transformer.inference.result_tree import for_arviz, load, save

__all__ = [
    "MapStatus",
    "NoiseReparam",
    "NutsStatus",
    "ParticleStatus",
    "Predictive",
    "find_map",
    "for_arviz",
    "load",
    "nuts",
    "particle_filter",
    "save",
    "smooth",
    "through_noise",
]

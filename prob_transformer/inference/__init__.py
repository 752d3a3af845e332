"""Inference over the embeddings given tokens: particles."""

from prob_transformer.inference.particles import ParticleResult, ParticleStatus, particle_filter
from prob_transformer.inference.smoothing import smooth

__all__ = ["ParticleResult", "ParticleStatus", "particle_filter", "smooth"]

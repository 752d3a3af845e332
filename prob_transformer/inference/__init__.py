"""Inference for the models of this library, and results in the form that ArviZ reads.

Read in this order: results (what every method returns), minimise (steps that stay on their side of det J = 0), map.
"""

from prob_transformer.inference.map import MapResult, embedding_signs, find_map
from prob_transformer.inference.minimise import MapStatus
from prob_transformer.inference.results import datatree, load, save

__all__ = ["MapResult", "MapStatus", "datatree", "embedding_signs", "find_map", "load", "save"]

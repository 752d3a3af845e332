"""Inference for the models of this library, and results in the form that ArviZ reads.

Read in this order: results (what every method returns), minimise, map.
"""

from prob_transformer.inference.results import datatree, load, save

__all__ = ["datatree", "load", "save"]

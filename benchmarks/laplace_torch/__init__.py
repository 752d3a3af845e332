"""Laplace of the character GPT next to laplace-torch: same weights, windows, prior precision and predictive.

Read in this order: problem, torch_side, ours, compare.
"""

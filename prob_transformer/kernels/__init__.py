"""The change of variables at scale: what `implementation="blocked"` runs; internal, and free to change.

Read in this order: elimination (many small inverses), projections (what is swept), tiling (how it is cut), moments
(block by block), cancellation (what they cannot do), log_det (its gradient), blocked, barrier, conditioning; sharding
spreads the cells over devices. block_triangular has det J and sigma_min(J) together, for the positions of generated
text.
"""

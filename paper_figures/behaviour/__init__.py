"""Do the margins of a trained decoder say anything about what it does? Measured on passages of text.

Read in this order: measure (figures of every token), correlations (of ranks, with intervals, and words by rule),
repetition (margins before repetitions and errors of text that the decoder draws).
"""

"""The study of training with the barrier: what is trained, what is compared, and the verdicts, made by code.

Trained: design, regularisers, perturbations, sweep. Analysed, from the saved lines alone and
without a model: runs, strength_selection, comparisons, paired_tests, verdicts, analysis, wording, tables.
"""

"""What a sweep says: strengths chosen on validation text, comparisons paired by seed, and verdicts made by code.

It stands beside the figures, not in `models`, because it reads saved runs alone and needs no model. Reading order:
paired, tests_of_means, holm, selection, equal_cost, comparisons, verdicts, findings, words, answers, tables.
"""

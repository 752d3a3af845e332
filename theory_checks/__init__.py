"""Claims about causal self-attention as a generative process, each with the counterexample where it must fail.

`python -m theory_checks` runs them. A claim is a file; what a check is made of is in check.py.
"""

"""The claims, one a file: what is checked, its figure and its counterexample."""

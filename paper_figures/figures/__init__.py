"""The figures, one a file, and their one style."""

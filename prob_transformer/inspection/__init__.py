"""`prob-transformer inspect`: a trained decoder's support tokens on a text, as a table, a page and a netCDF file.

Read in this order: inspection (the numbers), summary, table, tree, page (with page.html, page.css, page.js), command.
"""

from prob_transformer.inspection.command import Loaded, main
from prob_transformer.inspection.inspection import Inspection, Setting, inspect_text
from prob_transformer.inspection.page import page
from prob_transformer.inspection.tree import tree

__all__ = ["Inspection", "Loaded", "Setting", "inspect_text", "main", "page", "tree"]

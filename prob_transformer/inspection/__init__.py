"""`prob-transformer inspect`: a trained decoder's support tokens on a text, as a table, a page and a netCDF file.

`prob-transformer generate`, text that the decoder draws, is in generate and generated_text.

Read in this order: text_margins (the numbers), explanation, terminal_table, html_page (with page.html, page.css,
page.js), netcdf, command.
"""

from prob_transformer.inspection.html_page import inspection_page
from prob_transformer.inspection.netcdf import inspection_tree
from prob_transformer.inspection.text_margins import Setting, inspect_text

__all__ = ["Setting", "inspect_text", "inspection_page", "inspection_tree"]

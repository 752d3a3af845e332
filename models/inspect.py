"""Margins of a trained decoder on a text, as a table, a page and a netCDF file: python -m models.inspect inspect."""

import sys

from models.decoder.load import load
from prob_transformer.inspect import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], load))

"""Style transfer: `config.py` (every default), `objective.py` (what is minimised), `optimize.py` (how), `stylize.py` (the
loop from coarse to fine and its result). Importing this package imports no torch."""

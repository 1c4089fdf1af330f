"""Style transfer. Importing this package imports no torch.

`config.py` states every default, `objective.py` what is minimised, of large pictures in `tiles.py`, `optimize.py` how,
and `stylize.py` holds the loop from coarse to fine and its result.
"""

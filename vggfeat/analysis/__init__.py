"""What a VGG is made of and what it costs: layer tables, comparisons, the 3×3 argument, receptive fields.

`describe` and `stacked_3x3` compute from plain data and need no torch. All sizes are of float32; MB are 10⁶ bytes; a
MAC is one multiplication with its addition, and FLOPs are twice the MACs (the papers and torchvision count MACs).

`layers.py` describes one VGG, `comparison.py` sets networks side by side, `measure.py` runs them, `fields.py` has the
3×3 argument and the receptive fields.
"""

from vggfeat.analysis.comparison import ACCURACY, Comparison, Net, compare
from vggfeat.analysis.fields import EffectiveField, Stacked, effective_field, stacked_3x3
from vggfeat.analysis.layers import Description, Row, describe
from vggfeat.analysis.measure import Measured, PeakMemory, saved_for_backward

__all__ = [
    "ACCURACY",
    "Comparison",
    "Description",
    "EffectiveField",
    "Measured",
    "Net",
    "PeakMemory",
    "Row",
    "Stacked",
    "compare",
    "describe",
    "effective_field",
    "saved_for_backward",
    "stacked_3x3",
]

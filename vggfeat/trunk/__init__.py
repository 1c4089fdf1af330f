"""The frozen trunk: VGG's convolutions forward, and backward to the image alone, written by hand.

A loss network is frozen, which autograd does not exploit: it keeps every convolution's input, every ReLU's output, all
pool inputs and 64-bit indices. All that the gradient with respect to the image needs is the weights, the sign of each
ReLU's output and the argmax of each pooling window. The forward keeps just that, as single bits (`keep="bits"`), or
the outputs of ReLUs and pools and maps of the pools' winners, where memory does not matter and time does
(`keep="values"`); the backward walks back.

Everything runs in channels_last, in which these convolutions are fastest on CPUs and GPUs alike. `plain` is the same
computation in ordinary differentiable operations: for second derivatives, for export, and to test against.

From the outside in: `plan.py` says what to run and `filters.py` with which weights. Autograd goes through `autograd.py`
and the two operators of `operators.py`; callers that need the gradient immediately bypass it by `Walk.vjp`, or, for
what is made of sums over positions, `Walk.vjp_by_rows`. All are the walk of `walk.py`, forward and backward: stage
after stage (`stage.py`), the first block strip by strip (`strips.py`). It is made of the operations of `layers.py`,
convolutions of `direct.py` and, by Winograd's algorithm, of `vggfeat/winograd.py`, and the packed signs of `bits.py`.
"""

from vggfeat.trunk.autograd import run
from vggfeat.trunk.filters import PickledTrunk, Trunk
from vggfeat.trunk.plain import plain
from vggfeat.trunk.plan import Plan
from vggfeat.trunk.stage import OnTap, Product, whole
from vggfeat.trunk.walk import TapGradOf, TapGradOfRows, Walk

__all__ = [
    "OnTap",
    "PickledTrunk",
    "Plan",
    "Product",
    "TapGradOf",
    "TapGradOfRows",
    "Trunk",
    "Walk",
    "plain",
    "run",
    "whole",
]

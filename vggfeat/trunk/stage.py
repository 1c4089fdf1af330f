"""One stage, forward and back: a convolution and what follows it, on whole maps or on some of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vggfeat.devices import bfloat16_is_fast, convolution_precision, triton_kernels
from vggfeat.trunk import layers
from vggfeat.trunk.bits import bands, pack, unpack
from vggfeat.trunk.filters import Filters
from vggfeat.trunk.plan import Plan, Stage

ByName = dict[str, Tensor]  # taps of a stage by their kind, or what is kept of it by the names of `kept_of`
Rows = slice  # some rows of a map: where they start and where they stop
# what the forward keeps for the backward: "none"; "values", the outputs of ReLUs and max pools; "bits", their signs; or
# "taps", bits except for ReLUs that are taps, for callers that hold those anyway
Keep = str
OnTap = Callable[[str, Tensor, Rows], object]  # gets some rows of one image's tap, and which they are


@dataclass(frozen=True, eq=False)
class ByRows:
    """The gradient with respect to a tap of one image, computed on demand, some rows at a time.

    Attributes:
        of: gives it for some rows of the tap, and which these are.
        tap: the tap; None where its rows are recomputed.
    """

    of: Callable[[Tensor, Rows], Tensor]
    tap: Tensor | None

    def bands(self) -> Iterator[tuple[Rows, Tensor]]:
        """All of it, as many rows at a time as stay in the caches."""
        assert self.tap is not None
        for _, rows, _ in bands(self.tap.shape, self.tap.device):
            yield rows, self.of(cut(self.tap, rows), rows)

    def whole(self) -> Tensor:
        """All of it."""
        assert self.tap is not None
        grad = torch.empty_like(self.tap)
        for rows, part in self.bands():
            grad[:, :, rows] = part
        return grad


@dataclass(frozen=True, eq=False)
class Product:
    """The gradient tap · matrix with respect to a tap (N,C,h,w), left to be computed where it is added: off the CPU.

    Attributes:
        tap: the tap.
        matrix: (C,C), in its type.
    """

    tap: Tensor
    matrix: Tensor

    def whole(self) -> Tensor:
        """Its values."""
        rows = self.tap.permute(0, 2, 3, 1)
        return (rows.flatten(1, 2) @ self.matrix).view(rows.shape).permute(0, 3, 1, 2)


TapGrad = Tensor | ByRows | Product | None  # the gradient with respect to a tap; None where it is 0


def whole(grad: Tensor | Product) -> Tensor:
    """A gradient's values."""
    return grad.whole() if isinstance(grad, Product) else grad


def kept_of(plan: Plan, number: int, keep: Keep) -> tuple[str, ...]:
    """What the backward of a stage needs besides the weights, in the order in which it is kept.

    | name     | what                                | as                                                           |
    |----------|-------------------------------------|--------------------------------------------------------------|
    | "relu"   | the output of the ReLU              | (N,C,H,W)                                                    |
    | "sign"   | whether that was positive           | bits, uint8 (N, bytes)                                       |
    | "argmax" | of each window of a max pool        | bits, uint8 (N, 3, bytes): its row, its column, and whether  |
    |          |                                     | the maximum was positive; or beside "pool" 2 · row + column, |
    |          |                                     | (N,C,h,w) of `layers.argmax_type`                            |
    | "pool"   | the pooled map                      | (N,C,h,w)                                                    |

    A ReLU right before a max pool needs no sign unless it was tapped: those of the maxima suffice. What is also a tap
    is kept as that tap, or recomputed like it.

    Args:
        plan: what is run.
        number: of the stage.
        keep: what the backward will find.
    """
    stage = plan.stages[number]
    if keep == "none" or "relu" not in stage.steps:
        return ()
    pool = plan.pooling if "pool" in stage.steps else ""
    tapped = "relu" in stage.taps
    beside = ("pool",) if keep == "values" else ()
    winners = ("argmax", *beside) if pool == "max" else ()
    if "lrn" in stage.steps or pool == "l2":
        return ("relu", *winners)
    if pool == "max" and not tapped:
        return winners
    return ("relu" if keep == "values" or (keep == "taps" and tapped) else "sign", *winners)


@dataclass(frozen=True, eq=False)
class ReadyStage:
    """A stage with its filters.

    Attributes:
        plan: the plan that it belongs to.
        stage: the stage itself.
        folded: its filters, with a batch normalisation that follows folded in.
        unfolded: its filters without that, where the convolution is tapped.
        keeps: the names from `kept_of`.
    """

    plan: Plan
    stage: Stage
    folded: Filters
    unfolded: Filters | None
    keeps: tuple[str, ...]

    @property
    def hands_over(self) -> bool:
        """Whether only the next stage uses the output: it is not kept, and no tap, which a caller may hold."""
        last = (self.stage.steps or ("conv",))[-1]
        return last not in (*self.stage.taps, *self.keeps)

    def forward(
        self, x: Tensor, finite: bool, rows: Rows | None = None, own: Rows | None = None, *, overwrite: bool = False
    ) -> tuple[Tensor, ByName, ByName]:
        """The output, the taps, and what else is kept.

        Args:
            x: the input, all rows of it or some.
            finite: whether everything is, by `layers.stays_finite`.
            rows: of the convolution's output, those to use further: the ones not affected by where the map was cut.
            own: of these, the strip's own, to hand out and to keep.
            overwrite: the output may take the place of `x`.
        """
        stage, pooling, padding = self.stage, self.plan.pooling, self.plan.padding
        taps: ByName = {}
        kept: ByName = {}
        # where the value before the ReLU is a tap, the ReLU is a step of its own
        fused = "relu" in stage.steps and not {"conv", "bn"} & set(stage.taps) and finite
        below = layers.padded(x, stage.pad, padding)
        pad = stage.pad if padding == "zeros" else 0
        beside = self.unfolded
        x = cut(layers.conv(below, self.folded, pad, relu=fused, overwrite=overwrite and beside is None), rows)
        if "conv" in stage.taps:
            taps["conv"] = cut(x if beside is None else cut(layers.conv(below, beside, pad), rows), own)
        del below
        if "bn" in stage.taps:
            taps["bn"] = cut(x, own)
        if "relu" in stage.steps:
            x = x if fused else x.relu()
            mine = cut(x, own)
            if "relu" in stage.taps:
                taps["relu"] = mine
            elif "relu" in self.keeps:
                kept["relu"] = mine
            if "sign" in self.keeps:
                kept["sign"] = pack(mine)
        if "lrn" in stage.steps:
            x = layers.lrn(x)
            if "lrn" in stage.taps:
                taps["lrn"] = cut(x, own)
        if "pool" in stage.steps:  # in strips: the last stage, where the rows that are left are the strip's own
            how = "none" if "argmax" not in self.keeps else "values" if "pool" in self.keeps else "bits"
            x, argmax = layers.pool(x, pooling, how, finite)
            if argmax is not None:
                kept["argmax"] = argmax
            if "pool" in stage.taps:
                taps["pool"] = x
            elif "pool" in self.keeps:
                kept["pool"] = x
        return x, taps, kept

    def backward(
        self,
        flow: GradientAccumulator,
        tap_grad: Callable[[str], TapGrad],
        kept: ByName,
        height: int,
        width: int,
    ) -> None:
        """Turn the gradient with respect to the output into that with respect to the input.

        Args:
            flow: the gradient; is changed.
            tap_grad: gives the gradient with respect to a tap by its kind, if there is one; asked for once each.
            kept: what the forward kept, including taps that are read again, by the names of `kept_of`; is emptied.
            height: of the input.
            width: of the input.
        """
        stage, pooling = self.stage, self.plan.pooling
        values, signs = kept.pop("relu", None), kept.pop("sign", None)
        argmax, pooled = kept.pop("argmax", None), kept.pop("pool", None)
        if "pool" in stage.steps:
            flow.add(tap_grad("pool"))
            if flow.grad is not None:
                if pooling == "max":
                    assert argmax is not None
                    flow.replace(layers.max_pool_backward(flow.grad, height, width, argmax, pooled))
                elif pooling == "average":
                    flow.replace(layers.average_pool_backward(flow.grad, height, width))
                else:
                    assert values is not None
                    before = layers.lrn(values) if "lrn" in stage.steps else values
                    flow.replace(layers.l2_pool_backward(flow.grad, height, width, before))
                    del before
            argmax = pooled = None
        if "lrn" in stage.steps:
            flow.add(tap_grad("lrn"))
            if flow.grad is not None:
                assert values is not None
                flow.replace(layers.lrn_backward(flow.grad, values))
        of_relu = tap_grad("relu")
        if isinstance(of_relu, Product) and values is not None:  # which is the tap
            flow.add_product(of_relu, masked=True)
        else:
            flow.add(of_relu)
            if flow.grad is not None and (values is not None or signs is not None):
                flow.mask(values, signs)
        values = signs = of_relu = None
        flow.add(tap_grad("bn"))

        def through(flow: GradientAccumulator, filters: Filters) -> Tensor | None:
            if flow.grad is None:
                return None
            grad = layers.channels_last(flow.grad)
            size = (height, width)
            weight = filters.weight_backward
            return layers.conv_backward(grad, weight, stage.pad, self.plan.padding, *size, overwrite=flow.owned)

        if self.unfolded is not None:
            beside = GradientAccumulator()
            beside.add(tap_grad("conv"))
            flow.replace(through(flow, self.folded))
            flow.add(through(beside, self.unfolded))
        else:
            flow.add(tap_grad("conv"))
            flow.replace(through(flow, self.folded))


def cut(x: Tensor, rows: Rows | None) -> Tensor:
    """Some rows of a map; the map itself for None or all of its rows."""
    return x if rows is None or length(rows) == x.shape[2] else x[:, :, rows]


def length(rows: Rows) -> int:
    """How many."""
    return int(rows.stop - rows.start)


class GradientAccumulator:
    """The gradient in the backward: accumulated in place once it is owned, copied first while a caller holds it.

    Attributes:
        grad: (N,C,H,W), None as long as there is none.
        owned: whether nothing else refers to it.
    """

    def __init__(self) -> None:
        self.grad: Tensor | None = None
        self.owned = False

    def replace(self, grad: Tensor | None) -> None:
        """Put an owned gradient in its place."""
        self.grad, self.owned = grad, grad is not None

    def add(self, other: TapGrad) -> None:
        """Add what arrives from a tap, if anything does."""
        if other is None:
            return
        if isinstance(other, ByRows):
            if self.grad is None:
                self.replace(other.whole())
                return
            if not self.owned:
                self.replace(self.grad.clone())
            for rows, part in other.bands():
                self.grad[:, :, rows].add_(part)
        elif isinstance(other, Product):
            self.add_product(other)
        elif self.grad is None:
            self.grad, self.owned = layers.channels_last(other), False
        elif self.owned:
            self.grad.add_(other)
        else:
            self.replace(self.grad + other)

    def add_product(self, other: Product, masked: bool = False) -> None:
        """Add a product; with `masked` let the sum through only where its tap, a ReLU's output, is positive."""
        device = other.tap.device
        if bfloat16_is_fast(device) and (kernels := triton_kernels(device, other.tap.dtype)):
            if self.grad is not None and not self.owned:
                self.replace(self.grad.clone())
            onto = None if self.grad is None else layers.channels_last(self.grad)
            precision = convolution_precision()  # it meets the gradients of convolutions
            self.replace(kernels.add_product(other.tap, other.matrix, onto, masked=masked, precision=precision))
            return
        self.add(other.whole())
        if masked:
            self.mask(other.tap, None)

    def mask(self, values: Tensor | None, packed: Tensor | None) -> None:
        """Let through only where the ReLU did."""
        assert self.grad is not None
        if values is not None:
            if self.owned:
                torch.ops.aten.threshold_backward.grad_input(self.grad, values, 0, grad_input=self.grad)
            else:
                self.replace(torch.ops.aten.threshold_backward(self.grad, values, 0))
            return
        assert packed is not None
        if not self.owned:
            self.replace(self.grad.clone())
        if kernels := triton_kernels(self.grad.device, self.grad.dtype):
            self.replace(layers.channels_last(self.grad))
            kernels.mask(self.grad, packed)
            return
        for images, rows, where in bands(self.grad.shape, self.grad.device):
            part = self.grad[images, :, rows]
            layers.as_integers(part).mul_(unpack(packed[images, where], part.shape))

"""The frozen trunk: VGG's convolutions forward, and backward to the image alone, written by hand.

A loss network is frozen, which autograd does not know: it keeps every convolution's input, every ReLU's output, every
pool's input and 64-bit indices. All that the gradient with respect to the image needs is the weights, the sign of each
ReLU's output and the winner of each pooling window. `forward` keeps just that, as single bits (`keep="bits"`), or the
ReLU outputs themselves where memory does not matter and time does (`keep="values"`); `backward` walks back through it.

Everything runs in channels_last, in which these convolutions are fastest on CPUs and GPUs alike. `plain` is the same
computation in ordinary differentiable operations: for second derivatives, for export, and to test against.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from vggfeat.arch import LRN, Arch
from vggfeat.errors import InputError, nearest

__all__ = ["PADDINGS", "POOLINGS", "Plan", "Stage", "Trunk", "plain"]

POOLINGS = ("max", "average", "l2")
PADDINGS = ("zeros", "reflect", "replicate")


# ── what to run ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Stage:
    """One convolution and what follows it up to the next: [bn] [relu] [lrn] [pool].

    Attributes:
        conv: name of the convolution.
        pad: pixels of padding on each side.
        steps: what follows the convolution before the trunk ends: some of "bn", "relu", "lrn", "pool", in this order.
        taps: kinds of layer to hand out: "conv" or some of the steps.
    """

    conv: str
    pad: int
    steps: tuple[str, ...]
    taps: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What to run: the stages up to the deepest tap, and how to pool and pad. `code` survives as a string in graphs."""

    arch: Arch
    names: tuple[str, ...]
    pooling: str = "max"
    padding: str = "zeros"

    def __post_init__(self) -> None:
        self.arch.check(self.names)
        if self.pooling not in POOLINGS:
            raise InputError(f"unknown pooling {self.pooling!r}: {nearest(str(self.pooling), POOLINGS)}")
        if self.padding not in PADDINGS:
            raise InputError(f"unknown padding {self.padding!r}: {nearest(str(self.padding), PADDINGS)}")
        # computed now, since torch.compile cannot follow a cached property's first use (it takes a lock in Python 3.11)
        _ = self.code, self.stages, self.order, self.min_size

    @functools.cached_property
    def code(self) -> str:
        """The plan as a string, for the operators below; `Plan.decode` reads it back."""
        arch = self.arch
        return "|".join(
            (
                arch.config,
                str(int(arch.batch_norm)),
                ",".join(map(str, arch.channels)),
                ",".join(self.names),
                self.pooling,
                self.padding,
            )
        )

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def decode(code: str) -> Plan:
        """The plan of a code."""
        config, bn, channels, names, pooling, padding = code.split("|")
        blocks = tuple(map(int, channels.split(",")))
        return Plan(Arch(config, bool(int(bn)), head=None, blocks=blocks), tuple(names.split(",")), pooling, padding)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """Shallow to deep."""
        stages: list[Stage] = []
        for layer in self.arch.until(self.names):
            tapped = (layer.kind,) if layer.name in self.names else ()
            if layer.kind == "conv":
                stages.append(Stage(layer.name, layer.kernel // 2, (), tapped))
            else:
                last = stages[-1]
                stages[-1] = Stage(last.conv, last.pad, (*last.steps, layer.kind), last.taps + tapped)
        return tuple(stages)

    @functools.cached_property
    def order(self) -> tuple[int, ...]:
        """Position of each name among the taps, shallow to deep, that `forward` gives."""
        ran = sorted(self.names, key=self.arch.names.index)
        return tuple(ran.index(name) for name in self.names)

    @functools.cached_property
    def min_size(self) -> int:
        """The shortest image side that the deepest tap can be computed of."""
        layers = self.arch.until(self.names)
        if self.padding != "reflect":
            return layers[-1].stride
        # reflection needs a second pixel at every 3×3 convolution, the pool after the last needs none
        return max(2 * layer.stride if layer.kind == "conv" and layer.kernel > 1 else layer.stride for layer in layers)


class Trunk:
    """Frozen convolutions, shared by everything that uses the same weights, ready to run on any device and precision.

    Not a module: it has no parameters to train, no buffers to save, and copying or pickling what refers to it must not
    copy 80 MB of weights. A copy is the same object; a pickle carries the weights and finds the live object again.
    """

    _live: weakref.WeakValueDictionary[tuple[object, ...], Trunk] = weakref.WeakValueDictionary()

    def __init__(self, arch: Arch, state: dict[str, Tensor], key: tuple[object, ...]) -> None:
        self.arch = arch
        self.state = state
        self.key = key
        self._ready: dict[tuple[torch.device, torch.dtype], dict[str, tuple[Tensor, ...]]] = {}

    @staticmethod
    def shared(arch: Arch, state: dict[str, Tensor], key: tuple[object, ...]) -> Trunk:
        """The live trunk of that network and key, given the layers that it lacks, or a new one."""
        trunk = Trunk._live.setdefault((arch, *key), Trunk(arch, {}, key))
        with _outside():
            for name, value in state.items():
                if name not in trunk.state:  # a copy: its owner may go on training it
                    trunk.state[name] = value.detach().clone()
        return trunk

    def __deepcopy__(self, memo: dict[int, Any]) -> Trunk:
        return self

    def __copy__(self) -> Trunk:
        return self

    def __reduce__(self) -> tuple[Callable[..., Trunk], tuple[Any, ...]]:
        return Trunk.shared, (self.arch, self.state, self.key)

    def filters(self, plan: Plan, device: torch.device, dtype: torch.dtype, linear: Sequence[int] = ()) -> list[Tensor]:
        """For each stage: weight, bias and the weight that carries the gradient back; twice where BN is tapped around.

        BN of a frozen network is a factor and a shift per channel, folded into the convolution. A tap on the
        convolution itself then comes of a second, unfolded convolution, so that the stream below it does not depend on
        what was asked for. `linear` are the classifier's layers that will be asked for next: a compiler that has looked
        at what is ready does not see what comes later.
        """
        names: list[str] = []
        for stage in plan.stages:
            names.append("folded " * ("bn" in stage.steps) + stage.conv)
            if "bn" in stage.steps and "conv" in stage.taps:
                names.append(stage.conv)
        found = self._get((*names, *(f"classifier.{index}" for index in linear)), device, dtype)
        return [value for values in found[: len(names)] for value in values]

    def linear(self, index: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Weight and bias of `classifier.{index}`."""
        return self._get((f"classifier.{index}",), device, dtype)[0]

    def _get(self, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        self._fill(names, device, dtype)
        ready = self._ready[device, dtype]
        return [ready[name] for name in names]

    def _fill(self, names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> None:
        ready = self._ready.setdefault((device, dtype), {})
        for name in names:
            if name not in ready:
                with _outside():
                    ready[name] = self._prepare(name, device, dtype)

    # run while a graph is traced, not traced: torch.compiler.assume_constant_result without importing the compiler
    _fill._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _prepare(self, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if name.startswith("classifier."):
            return tuple(self.state[f"{name}.{part}"].to(device, dtype) for part in ("weight", "bias"))
        folded, _, conv = name.rpartition(" ")
        index = self.arch.layer(conv).index
        weight, bias = (self.state[f"features.{index}.{part}"].to(torch.float64) for part in ("weight", "bias"))
        if folded:
            gamma, beta, mean, var = (
                self.state[f"features.{index + 1}.{part}"].to(torch.float64)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / torch.sqrt(var + 1e-5)
            weight, bias = weight * scale[:, None, None, None], (bias - mean) * scale + beta
        # the gradient of a convolution is a convolution with the kernel turned round and channels exchanged
        back = weight.flip(2, 3).transpose(0, 1)
        if dtype == torch.bfloat16 and index == 0:
            high = weight.to(dtype).to(weight.dtype)
            weight = torch.cat([high, high, weight - high], dim=1)  # meets `_doubled`
        layouts = ((weight, torch.channels_last), (bias, torch.contiguous_format), (back, torch.channels_last))
        return tuple(value.to(device, dtype).contiguous(memory_format=layout).clone() for value, layout in layouts)


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Outside of whatever the caller is inside of (inference mode, export, vmap): what is kept must be real tensors."""
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
        yield


# ── plain: the reference, differentiable any number of times ──────────────────────────────────────────────────────────


def plain(x: Tensor, filters: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The taps, shallow to deep, by ordinary operations.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: of `Trunk.filters` for the same plan.
        plan: what to run.
    """
    taps: list[Tensor] = []
    left = list(filters)
    x = _doubled(x, filters[0])

    def conv(x: Tensor, pad: int) -> Tensor:
        weight, bias, _ = left[:3]
        del left[:3]
        return F.conv2d(_padded(x, pad, plan.padding), weight, bias, padding=pad if plan.padding == "zeros" else 0)

    for stage in plan.stages:
        below, x = x, conv(x, stage.pad)
        if "conv" in stage.taps:
            taps.append(conv(below, stage.pad) if "bn" in stage.steps else x)
        for step in stage.steps:
            if step == "relu":
                x = F.relu(x)
            elif step == "lrn":
                x = F.local_response_norm(x, *LRN)
            elif step == "pool":
                x = _plain_pool(x, plan.pooling)
            if step in stage.taps:
                taps.append(x)
    return taps


def _doubled(x: Tensor, weight: Tensor) -> Tensor:
    """What the first convolution takes: the images, or for bfloat16 their upper and lower halves, (N,9,H,W).

    Eight bits of mantissa are fewer than a photograph has, and conv1_1 takes differences of neighbours. With image and
    weight as sums of two bfloat16 numbers, x w ≈ xₕwₕ + xₗwₕ + xₕwₗ is exact to 16 bits, and 9 channels cost a
    convolution unit no more than 3: it works on 16 or more at a time.
    """
    if weight.dtype != torch.bfloat16 or weight.shape[1] != 9:
        return x
    high = x.to(weight.dtype)
    low = (x - high.to(x.dtype)).to(weight.dtype)
    return torch.cat([high, low, high], dim=1)


def _padded(x: Tensor, pad: int, padding: str) -> Tensor:
    return x if padding == "zeros" or not pad else F.pad(x, (pad,) * 4, mode=padding)


def _plain_pool(x: Tensor, pooling: str) -> Tensor:
    if pooling == "max":
        return F.max_pool2d(x, 2)
    if pooling == "average":
        return F.avg_pool2d(x, 2)
    square = F.avg_pool2d(x * x, 2)
    alive = square > 0  # the root's slope at 0 is infinite; the gradient there is 0
    return torch.where(alive, torch.where(alive, square, 1).sqrt(), 0)


# ── forward ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _kept(stage: Stage, pooling: str) -> str:
    """What the backward of a stage needs.

    "sign" of the ReLU, "route" of the gradient through a max pool, "sign route" for both, or the "values" that came out
    of the ReLU. A ReLU right before a max pool needs no sign unless it was tapped: the winners' own say enough.
    """
    if "relu" not in stage.steps:
        return ""
    if "lrn" in stage.steps:
        return "values route" if "pool" in stage.steps and pooling == "max" else "values"
    if "pool" not in stage.steps or pooling == "average":
        return "sign"
    if pooling == "l2":
        return "values"
    return "sign route" if "relu" in stage.taps else "route"


def reread(plan: Plan, keep: str) -> tuple[int, ...]:
    """Positions, shallow to deep, of the taps that the backward reads again, because keeping them twice is waste."""
    kinds = [(stage, kind) for stage in plan.stages for kind in stage.taps]
    return tuple(i for i, (stage, kind) in enumerate(kinds) if _rereads(stage, kind, plan.pooling, keep))


def _rereads(stage: Stage, kind: str, pooling: str, keep: str) -> bool:
    wants = _kept(stage, pooling)
    if kind == "relu":
        return "values" in wants or ("sign" in wants and keep == "values")
    return kind == "pool" and "route" in wants and keep == "values"


@torch.library.custom_op("vggfeat::trunk", mutates_args=())
def _forward(x: Tensor, filters: Sequence[Tensor], code: str, keep: str) -> list[Tensor]:
    """The trunk: taps, shallow to deep, then what the backward needs as `keep` says: "none", "bits" or "values"."""
    plan = Plan.decode(code)
    taps: list[Tensor] = []
    kept: list[Tensor] = []
    left = list(filters)
    x = _doubled(x, filters[0]).contiguous(memory_format=torch.channels_last)
    with no_autocast(x.device):
        for stage in plan.stages:
            wants = _kept(stage, plan.pooling) if keep != "none" else ""
            # where the value before the ReLU is a tap, the ReLU is a step of its own
            fused = "relu" in stage.steps and not {"conv", "bn"} & set(stage.taps)
            below = _padded(x, stage.pad, plan.padding)
            pad = stage.pad if plan.padding == "zeros" else 0
            x = _conv(below, left[0], left[1], pad, relu=fused)
            del left[:3]
            if "conv" in stage.taps:
                if "bn" in stage.steps:
                    taps.append(_conv(below, left[0], left[1], pad))
                    del left[:3]
                else:
                    taps.append(x)
            if "bn" in stage.taps:
                taps.append(x)
            if "relu" in stage.steps:
                x = x if fused else x.relu()
                if "relu" in stage.taps:
                    taps.append(x)
                if "values" in wants or ("sign" in wants and keep == "values"):
                    kept += [x] if "relu" not in stage.taps else []
                elif "sign" in wants:
                    kept.append(_pack(x))
            if "lrn" in stage.steps:
                x = F.local_response_norm(x, *LRN)
                if "lrn" in stage.taps:
                    taps.append(x)
            if "pool" in stage.steps:
                x, route = _pool(x, plan.pooling, keep if "route" in wants else "none")
                kept += [] if route is None else [route]
                if "pool" in stage.taps:
                    taps.append(x)
                elif "route" in wants and keep == "values":
                    kept.append(x)
    return taps + kept


# ── backward ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@torch.library.custom_op("vggfeat::trunk_backward", mutates_args=())
def _backward(
    grads: Sequence[Tensor],
    present: Sequence[int],
    taps: Sequence[Tensor],
    kept: Sequence[Tensor],
    filters: Sequence[Tensor],
    shape: Sequence[int],
    code: str,
    keep: str,
) -> Tensor:
    """Gradient with respect to the normalised images of `shape`.

    Args:
        grads: gradients of some of the taps, in their shapes.
        present: which taps, as positions shallow to deep.
        taps: the taps at `reread(plan, keep)`.
        kept: what `_forward` returned behind the taps.
        filters: as there.
        shape: of the images.
        code: as there.
        keep: as there.
    """
    plan = Plan.decode(code)
    incoming = dict(zip(present, grads, strict=True))
    again = dict(zip(reread(plan, keep), taps, strict=True))
    left, stack = list(filters), list(kept)
    position = len(plan.names)
    heights = _sizes(plan, shape)
    flow = _Flow()
    with no_autocast(grads[0].device):
        for stage, (height, width) in zip(reversed(plan.stages), reversed(heights), strict=True):
            position -= len(stage.taps)
            at = {kind: position + i for i, kind in enumerate(stage.taps)}
            wants = _kept(stage, plan.pooling)

            def arriving(kind: str, at: dict[str, int] = at) -> Tensor | None:
                return incoming.get(at.get(kind, -1))

            def remembered(kind: str, at: dict[str, int] = at) -> Tensor:
                return again[at[kind]] if kind in at else stack.pop()

            pooled = remembered("pool") if "route" in wants and keep == "values" else None
            if "pool" in stage.steps and "route" in wants:
                route = stack.pop()
            values = packed = None
            if "values" in wants or ("sign" in wants and keep == "values"):
                values = remembered("relu")
            elif "sign" in wants:
                packed = stack.pop()

            if "pool" in stage.steps:
                flow.add(arriving("pool"))
                if flow.grad is not None:
                    if plan.pooling == "max":
                        flow.own(_max_pool_back(flow.grad, height, width, route, pooled))
                    else:
                        before = (
                            F.local_response_norm(values, *LRN)
                            if values is not None and "lrn" in stage.steps
                            else values
                        )
                        flow.own(_pool_back(flow.grad, height, width, plan.pooling, before))
            if "lrn" in stage.steps:
                flow.add(arriving("lrn"))
                if flow.grad is not None:
                    assert values is not None
                    flow.own(_lrn_back(flow.grad, values))
            flow.add(arriving("relu"))
            if flow.grad is not None and (values is not None or packed is not None):
                flow.mask(values, packed)
            flow.add(arriving("bn"))
            aside = arriving("conv")
            double = "bn" in stage.steps and "conv" in stage.taps
            if not double:
                flow.add(aside)
            raw = left.pop() if double else None
            if double:
                del left[-2:]
            back = left.pop()
            del left[-2:]
            total = None if flow.grad is None else _conv_back(flow.grad, back, stage.pad, plan.padding, height, width)
            if double and aside is not None:
                assert raw is not None
                extra = _conv_back(_laid(aside), raw, stage.pad, plan.padding, height, width)
                total = extra if total is None else total.add_(extra)
            flow.own(total)
    if flow.grad is None:
        return grads[0].new_zeros(tuple(shape))
    return flow.grad


class _Flow:
    """The gradient on its way up: added to in place once it is ours, copied while it is somebody's tap gradient."""

    def __init__(self) -> None:
        self.grad: Tensor | None = None
        self.ours = False

    def own(self, grad: Tensor | None) -> None:
        self.grad, self.ours = grad, grad is not None

    def add(self, other: Tensor | None) -> None:
        if other is None:
            return
        if self.grad is None:
            self.grad, self.ours = _laid(other), False
        elif self.ours:
            self.grad.add_(other)
        else:
            self.own(self.grad + other)

    def mask(self, values: Tensor | None, packed: Tensor | None) -> None:
        """Let through only where the ReLU did."""
        assert self.grad is not None
        if values is None:
            assert packed is not None
            values = _unpack(packed, self.grad.shape).to(self.grad.dtype)
        if self.ours:
            torch.ops.aten.threshold_backward.grad_input(self.grad, values, 0, grad_input=self.grad)
        else:
            self.own(torch.ops.aten.threshold_backward(self.grad, values, 0))


def _laid(grad: Tensor) -> Tensor:
    return grad.contiguous(memory_format=torch.channels_last)


def _sizes(plan: Plan, shape: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width that each stage works at."""
    height, width = shape[2], shape[3]
    sizes = []
    for stage in plan.stages:
        sizes.append((height, width))
        if "pool" in stage.steps:
            height, width = height // 2, width // 2
    return sizes


# ── the operations ────────────────────────────────────────────────────────────────────────────────────────────────────


def no_autocast(device: torch.device) -> Any:
    """Autocast is answered once, by the choice of the trunk's precision; inside it must not cast again."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _fused_conv_works(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and has_onednn()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def has_onednn() -> bool:
    """Whether this torch can use oneDNN's kernels."""
    return bool(torch.backends.mkldnn.is_available())


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, pad: int, *, relu: bool = False) -> Tensor:
    """Convolution with stride 1, and its ReLU where oneDNN can do it on the way out."""
    if _fused_conv_works(x):
        attr = "relu" if relu else "none"
        ones, pads = [1, 1], [pad, pad]
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, pads, ones, ones, 1, attr, [], "")  # type: ignore[no-any-return]
    y = F.conv2d(x, weight, bias, padding=pad)
    return y.relu_() if relu else y


def _conv_back(grad: Tensor, back: Tensor, pad: int, padding: str, height: int, width: int) -> Tensor:
    """Gradient with respect to a convolution's input (before its padding) of that height and width."""
    kernel = back.shape[-1]
    if padding == "zeros" or not pad:
        return _conv(grad, back, None, kernel - 1 - pad)
    full = _conv(grad, back, None, kernel - 1)  # with respect to the padded input
    like = full.new_empty(full.shape[0], full.shape[1], height, width)
    fold = (
        torch.ops.aten.reflection_pad2d_backward if padding == "reflect" else torch.ops.aten.replication_pad2d_backward
    )
    return _laid(fold(full, like, [pad] * 4))


def _pool(x: Tensor, pooling: str, keep: str) -> tuple[Tensor, Tensor | None]:
    """The pooled tensor and, of a max pool, the way back: who won in each window."""
    if pooling != "max":
        return _plain_pool(x, pooling), None
    if keep == "none":
        return F.max_pool2d(x, 2), None
    if keep == "values" and x.device.type == "cpu":
        found: tuple[Tensor, Tensor] = torch.ops.aten.max_pool2d_with_indices(x, [2, 2], [2, 2])
        return found
    a, b, c, d = _quarters(x, x.shape[2] // 2, x.shape[3] // 2)
    top, bottom = torch.maximum(a, b), torch.maximum(c, d)
    y = torch.maximum(top, bottom)
    # of equals the first wins, as in torch.nn.MaxPool2d
    down = bottom > top
    right = ((d > c) & down) | ((b > a) & ~down)
    if keep == "values":
        return y, down.to(torch.uint8).mul_(2).add_(right)
    return y, torch.stack([_pack(down), _pack(right), _pack(y)], dim=1)


def _max_pool_back(grad: Tensor, height: int, width: int, route: Tensor, pooled: Tensor | None) -> Tensor:
    """Each gradient goes to the winner of its window, and nowhere where the winner was not positive."""
    if pooled is None:
        down, right, alive = (_unpack(bits, grad.shape).to(grad.dtype) for bits in route.unbind(1))
        grad = torch.ops.aten.threshold_backward(grad, alive, 0)
    else:
        grad = torch.ops.aten.threshold_backward(grad, pooled, 0)
        if route.dtype == torch.int64:  # torch's own, on a CPU; on CUDA it adds atomically, in no fixed order
            size = (*grad.shape[:2], height, width)
            like = torch.empty(size, dtype=grad.dtype, memory_format=torch.channels_last)
            back = torch.ops.aten.max_pool2d_with_indices_backward
            return back(grad, like, [2, 2], [2, 2], [0, 0], [1, 1], False, route)  # type: ignore[no-any-return]
        down, right = (route >= 2).to(grad.dtype), (route & 1).to(grad.dtype)
    out = _unpooled(grad, height, width)
    a, b, c, d = _quarters(out, *grad.shape[2:])
    bottom = torch.ops.aten.threshold_backward(grad, down, 0)
    top = grad.sub_(bottom)
    torch.ops.aten.threshold_backward.grad_input(top, right, 0, grad_input=b)
    torch.sub(top, b, out=a)
    torch.ops.aten.threshold_backward.grad_input(bottom, right, 0, grad_input=d)
    torch.sub(bottom, d, out=c)
    return out


def _pool_back(grad: Tensor, height: int, width: int, pooling: str, values: Tensor | None) -> Tensor:
    out = _unpooled(grad, height, width)
    if pooling == "average":
        share = grad / 4
        for quarter in _quarters(out, *grad.shape[2:]):
            quarter.copy_(share)
        return out
    assert values is not None
    pooled = _plain_pool(values, "l2")
    share = torch.where(pooled > 0, grad / (4 * pooled), 0)
    for quarter, value in zip(_quarters(out, *grad.shape[2:]), _quarters(values, *grad.shape[2:]), strict=True):
        torch.mul(share, value, out=quarter)
    return out


def _unpooled(grad: Tensor, height: int, width: int) -> Tensor:
    """Room for the gradient of a pool's input; an odd last row or column was never pooled and gets none."""
    n, c, h, w = grad.shape
    size = (n, c, height, width)
    out = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
    if height > 2 * h:
        out[:, :, -1].zero_()
    if width > 2 * w:
        out[:, :, :, -1].zero_()
    return out


def _quarters(x: Tensor, h: int, w: int) -> list[Tensor]:
    """The four corners of every 2×2 window, (N,C,h,w) views in reading order."""
    return [x[:, :, i : 2 * h : 2, j : 2 * w : 2] for i in (0, 1) for j in (0, 1)]


def _lrn_back(grad: Tensor, x: Tensor) -> Tensor:
    """Of y = x / d^β with d = k + α · mean of x² over the neighbouring channels."""
    size, alpha, beta, k = LRN

    def neighbours(v: Tensor) -> Tensor:
        reach = size // 2
        return F.avg_pool3d(F.pad(v[:, None], (0, 0, 0, 0, reach, reach)), (size, 1, 1), stride=1)[:, 0]

    d = k + alpha * neighbours(x * x)
    back = neighbours(grad * x * d ** (-beta - 1))
    return _laid(grad * d**-beta - 2 * alpha * beta * x * back)


# eight bytes of 0 or 1 times this number have their eight bits side by side in the topmost byte
_GATHER = 0x0102040810204080
_SELECT = struct.unpack("<q", bytes(1 << i for i in range(8)))[0]  # byte i has bit i
_SPREAD = 0x0101010101010101


def _pack(x: Tensor) -> Tensor:
    """One bit for each value, set where it is positive: (N,C,H,W) channels_last to uint8 (N, ceil(C·H·W / 8)).

    Values are bool or come out of a ReLU: none is below 0.
    """
    if x.dtype == torch.bfloat16:  # only the sign of 0 can be set: without it, what is not 0 is positive
        x = x.view(torch.int16).bitwise_left_shift(1).to(torch.bool)  # faster than a comparison
    flat = (x if x.dtype == torch.bool else x > 0).permute(0, 2, 3, 1).flatten(1)
    if flat.shape[1] % 8:
        flat = F.pad(flat, (0, 8 - flat.shape[1] % 8))
    return flat.view(torch.int64).mul(_GATHER).bitwise_right_shift_(56).to(torch.uint8)


def _unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of `_pack`: uint8 (N,C,H,W), channels_last, above 0 where the bit was set.

    Not bool, which a CPU takes several times as long to convert to bfloat16.
    """
    n, c, h, w = shape
    spread = bits.to(torch.int64).mul_(_SPREAD).bitwise_and_(_SELECT)
    return spread.view(torch.uint8)[:, : c * h * w].view(n, h, w, c).permute(0, 3, 1, 2)


# ── what compilers and vmap need to know of the operators ─────────────────────────────────────────────────────────────


def _fake_pack(shape: Sequence[int], x: Tensor, planes: tuple[int, ...] = ()) -> Tensor:
    n, c, h, w = shape
    return x.new_empty((n, *planes, -(-c * h * w // 8)), dtype=torch.uint8)


@_forward.register_fake
def _(x: Tensor, filters: Sequence[Tensor], code: str, keep: str) -> list[Tensor]:
    plan = Plan.decode(code)
    taps: list[Tensor] = []
    kept: list[Tensor] = []

    def like(c: int, h: int, w: int, dtype: torch.dtype = filters[0].dtype) -> Tensor:
        return torch.empty((x.shape[0], c, h, w), dtype=dtype, device=x.device, memory_format=torch.channels_last)

    for stage, (h, w) in zip(plan.stages, _sizes(plan, x.shape), strict=True):
        c = plan.arch.layer(stage.conv).channels
        wants = _kept(stage, plan.pooling) if keep != "none" else ""
        taps += [like(c, h, w) for kind in stage.taps if kind != "pool"]
        if "values" in wants or ("sign" in wants and keep == "values"):
            kept += [like(c, h, w)] if "relu" not in stage.taps else []
        elif "sign" in wants:
            kept.append(_fake_pack((x.shape[0], c, h, w), x))
        if "pool" in stage.steps:
            small = (c, h // 2, w // 2)
            if "route" in wants:
                if keep == "bits":
                    kept.append(_fake_pack((x.shape[0], *small), x, (3,)))
                else:
                    kept += [like(*small, dtype=torch.int64 if x.device.type == "cpu" else torch.uint8)]
                    kept += [like(*small)] if "pool" not in stage.taps else []
            taps += [like(*small)] if "pool" in stage.taps else []
    return taps + kept


@_backward.register_fake
def _(
    grads: Sequence[Tensor],
    present: Sequence[int],
    taps: Sequence[Tensor],
    kept: Sequence[Tensor],
    filters: Sequence[Tensor],
    shape: Sequence[int],
    code: str,
    keep: str,
) -> Tensor:
    return torch.empty(tuple(shape), dtype=grads[0].dtype, device=grads[0].device, memory_format=torch.channels_last)


def _joined(size: int, value: Tensor, dim: int | None) -> Tensor:
    """A vmapped (B,N,…) value as one batch of B·N images; the trunk treats every image alone."""
    value = value.unsqueeze(0).expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.flatten(0, 1)


@_forward.register_vmap
def _(info: Any, dims: Any, x: Tensor, filters: Sequence[Tensor], code: str, keep: str) -> tuple[list[Tensor], Any]:
    size = info.batch_size
    found = _forward(_joined(size, x, dims[0]), filters, code, keep)
    return [value.unflatten(0, (size, -1)) for value in found], [0] * len(found)


@_backward.register_vmap
def _(
    info: Any,
    dims: Any,
    grads: Sequence[Tensor],
    present: Sequence[int],
    taps: Sequence[Tensor],
    kept: Sequence[Tensor],
    filters: Sequence[Tensor],
    shape: Sequence[int],
    code: str,
    keep: str,
) -> tuple[Tensor, Any]:
    size = info.batch_size

    def join(values: Sequence[Tensor], where: Any) -> list[Tensor]:
        where = where if isinstance(where, list | tuple) else [where] * len(values)
        return [_joined(size, value, dim) for value, dim in zip(values, where, strict=True)]

    whole = [size * shape[0], *shape[1:]]
    found = _backward(
        join(grads, dims[0]), present, join(taps, dims[2]), join(kept, dims[3]), filters, whole, code, keep
    )
    return found.unflatten(0, (size, -1)), 0


# ── the trunk as autograd sees it ─────────────────────────────────────────────────────────────────────────────────────


def run(x: Tensor, filters: Sequence[Tensor], plan: Plan, *, keep: str = "bits") -> list[Tensor]:
    """The taps in the order of `plan.names`; gradients flow to `x` alone.

    Args:
        x: normalised images (N,3,H,W), float32 for bfloat16 filters, else in the filters' type.
        filters: of `Trunk.filters` for the same plan.
        plan: what to run.
        keep: what to remember for the backward: "bits" (a tenth of autograd's memory and less) or "values" (faster).
    """
    if forward_ad._current_level >= 0:  # forward-mode derivatives want ordinary operations
        found: Sequence[Tensor] = plain(x, filters, plan)
    elif torch.is_grad_enabled() and x.requires_grad:
        found = _Trunk.apply(x, plan.code, keep, len(plan.names), reread(plan, keep), *filters)
    else:
        found = _forward(x, filters, plan.code, "none")
    return [found[i] for i in plan.order]


class _Trunk(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, code: str, keep: str, count: int, again: tuple[int, ...], *filters: Tensor
    ) -> tuple[Tensor, ...]:
        return tuple(_forward(x, filters, code, keep))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.code, ctx.keep, ctx.count, again, *filters = inputs
        taps, kept = output[: ctx.count], output[ctx.count :]
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.split = (len(again), len(kept))
        ctx.save_for_backward(x, *[taps[i] for i in again], *kept, *filters)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, *rest = ctx.saved_tensors
        nothing = (None,) * (4 + len(rest) - sum(ctx.split))
        present = [i for i, grad in enumerate(grads[: ctx.count]) if grad is not None]
        if not present:
            return (None, *nothing)
        # called plainly where that does: torch.compile of torch 2.13 gives `apply` in a backward one argument too many
        back: Any = _Back.apply if torch.is_grad_enabled() else _Back.forward
        return (back(x, ctx.code, ctx.keep, ctx.split, present, *[grads[i] for i in present], *rest), *nothing)


class _Back(torch.autograd.Function):
    """The backward as a function of its own, so that it can be differentiated in its turn."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, code: str, keep: str, split: tuple[int, int], present: list[int], *rest: Tensor) -> Tensor:
        n, (again, kept) = len(present), split
        grads, rest = rest[:n], rest[n:]
        taps, rest = rest[:again], rest[again:]
        found: Tensor = _backward(grads, present, taps, rest[:kept], rest[kept:], list(x.shape), code, keep)
        return found.to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.code, _, split, ctx.present, *rest = inputs
        n = len(ctx.present)
        ctx.nothing = (None,) * (len(rest) - n)
        ctx.save_for_backward(x, *rest[:n], *rest[n + sum(split) :])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # second derivatives are rare: recompute with ordinary operations, which can be differentiated without end
        n = len(ctx.present)
        x, *rest = ctx.saved_tensors
        plan = Plan.decode(ctx.code)

        def taps(x: Tensor) -> list[Tensor]:
            found = plain(x, rest[n:], plan)
            return [found[i] for i in ctx.present]

        def first(x: Tensor, grads: list[Tensor]) -> Tensor:
            found: Tensor = torch.func.vjp(taps, x)[1](grads)[0]
            return found

        of_x, of_grads = torch.func.vjp(first, x, rest[:n])[1](grad)
        return (of_x, None, None, None, None, *of_grads, *ctx.nothing)

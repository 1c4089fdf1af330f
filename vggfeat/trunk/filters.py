"""The weights of a frozen trunk: shared by all that use them, and made ready for each device and precision."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from vggfeat import winograd
from vggfeat.arch import Arch
from vggfeat.modes import constant_when_traced, without_modes
from vggfeat.trunk import direct
from vggfeat.trunk.plan import Plan

IMAGE_CHANNELS = 8  # of the gradient with respect to images, as CUDA computes it: the rest are 0
# a convolution, whether batch normalisation is folded in, and which of its parts; or what `_original` says
Key = tuple[str, bool, str]


class Filters(NamedTuple):
    """One convolution's prepared weights.

    Attributes:
        weight: (K,C,h,w).
        bias: (K,).
        weight_backward: of the convolution that gives the input's gradient: flipped, channels exchanged, (C,K,h,w);
            or, where Winograd is faster, the transformed weight (36,C,K), used both ways (`winograd.py`). Of the first
            convolution, on CUDA, to `IMAGE_CHANNELS`.
    """

    weight: Tensor
    bias: Tensor
    weight_backward: Tensor


class _Bound(NamedTuple):
    """What bounds a convolution's output, factor · max |image| + shift: for each channel, and the largest of all."""

    factors: Tensor
    shifts: Tensor
    largest: tuple[float, float]


_bounds: MutableMapping[Tensor, _Bound] = WeakTensorKeyDictionary()  # by weight


def bounds(chain: Iterable[Filters]) -> Iterator[tuple[float, float]]:
    """For each convolution, factor and shift with which no output exceeds factor · max |image| + shift.

    By the sums of absolute weights, channel by channel: nothing between two convolutions, be it a ReLU, a pool, local
    response normalisation or padding, makes the largest value larger. Computed once for each weight, which always
    follows the same ones.
    """
    below: _Bound | None = None
    for filters in chain:
        if filters.weight not in _bounds:
            norms = torch.linalg.vector_norm(filters.weight, 1, (2, 3), dtype=torch.float64)
            factors = norms.sum(1) if below is None else norms @ below.factors
            shifts = filters.bias.abs().double() + (0 if below is None else norms @ below.shifts)
            _bounds[filters.weight] = _Bound(factors, shifts, (float(factors.max()), float(shifts.max())))
        below = _bounds[filters.weight]
        yield below.largest


def by_stage(plan: Plan, filters: Sequence[Tensor]) -> list[tuple[Filters, Filters | None]]:
    """`Trunk.filters` by stage: with batch normalisation folded in, and without, if the convolution is tapped."""
    following = map(Filters, filters[::3], filters[1::3], filters[2::3])
    return [(next(following), next(following) if stage.unfolded else None) for stage in plan.stages]


class Trunk:
    """Frozen convolutions, shared by everything that uses the same weights, ready to run on any device and precision.

    Not a module: it has no parameters to train, no buffers to save, and copying or pickling what refers to it must not
    copy 80 MB of weights (`PickledTrunk`).
    """

    _live: weakref.WeakValueDictionary[tuple[object, ...], Trunk] = weakref.WeakValueDictionary()
    _lock = threading.RLock()

    def __init__(self, arch: Arch, state: dict[str, Tensor], key: tuple[object, ...]) -> None:
        self.arch = arch
        self.state = state
        self.key = key
        self._ready: dict[tuple[torch.device, torch.dtype], dict[Key, tuple[Tensor, ...]]] = {}

    @staticmethod
    def shared(arch: Arch, state: dict[str, Tensor], key: tuple[object, ...]) -> Trunk:
        """The live trunk of that network and key, given the layers that it lacks, or a new one."""
        with Trunk._lock, without_modes():
            trunk = Trunk._live.setdefault((arch, *key), Trunk(arch, {}, key))
            for name, value in state.items():
                if name not in trunk.state:  # a copy: its owner may go on training it
                    trunk.state[name] = value.detach().clone()
        return trunk

    def filters(
        self,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        linear: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> list[Tensor]:
        """The `Filters` of all stages in one list, as torch's operators take them; `by_stage` takes it apart.

        BN of a frozen network is a factor and a shift per channel, folded into the convolution. A tap on the
        convolution itself then takes a second, unfolded convolution, so that deeper layers do not depend on what is
        tapped.

        Args:
            plan: what will run.
            device: where.
            dtype: in which precision.
            linear: the classifier's layers that will be needed next: a compiler that has seen what is ready does not
                notice what is added later.
            size: height and width of the images, which decide what is faster; None if unknown.
        """
        keys: list[Key] = []
        reordered: list[Key] = []  # of convolutions on maps so small that oneDNN's own layout pays
        sizes = plan.sizes(*size) if size else [(0, 0)] * len(plan.stages)
        for stage, (height, width) in zip(plan.stages, sizes, strict=True):
            layer = plan.arch.layer(stage.conv)
            shape = (layer.in_channels, layer.channels, height, width)
            tiled = layer.kernel == 3 and winograd.is_faster(device, dtype, *shape)
            for folded in ["bn" in stage.steps] + [False] * stage.unfolded:
                # where it goes by tiles, only `plain` needs the weight itself: no copy of 80 MB
                original = _original(f"features.{layer.index}") if tiled and not folded else None
                keys.append(original or (stage.conv, folded, "forward"))
                keys.append((stage.conv, folded, "winograd" if tiled else "backward"))
                if layer.kernel == 3 and not tiled and 0 < height * width <= direct.SMALL_MAP:
                    reordered.append((stage.conv, folded, "reordered"))
        heads = [_original(f"classifier.{index}") for index in linear]
        tensors = self._get((*keys, *reordered, *heads), device, dtype)
        return [value for values in tensors[: len(keys)] for value in values]

    def linear(self, index: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Weight and bias of `classifier.{index}`."""
        return self._get((_original(f"classifier.{index}"),), device, dtype)[0]

    def _get(self, keys: tuple[Key, ...], device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
        self._fill(keys, device, dtype)
        ready = self._ready[device, dtype]
        return [ready[key] for key in keys]

    @constant_when_traced
    def _fill(self, keys: tuple[Key, ...], device: torch.device, dtype: torch.dtype) -> None:
        ready = self._ready.setdefault((device, dtype), {})
        if all(key in ready for key in keys):
            return
        with Trunk._lock:  # one thread: a second's weights would replace those that are in oneDNN's layout already
            for key in keys:
                if key not in ready:
                    with without_modes():
                        ready[key] = self._prepare(key, device, dtype)

    def _prepare(self, key: Key, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        name, folded, part = key
        if part == "original":
            return tuple(self.state[f"{name}.{each}"].to(device, dtype) for each in ("weight", "bias"))
        weight, bias = self._kernel(name, folded)
        if part == "reordered":  # requested after the two that it reorders; contributes no tensors
            for each in ("forward", "backward"):
                if direct.benefits_from_reordering(prepared := self._ready[device, dtype][name, folded, each][0]):
                    direct.reorder(prepared)
            return ()
        if part == "winograd":
            # in bfloat16 too: they are used where products are in float32 anyway
            return (winograd.transformed(weight).to(device, torch.float32),)
        if part == "backward":
            # the gradient of a convolution is a convolution with the kernel flipped and channels exchanged
            flipped = weight.flip(2, 3).transpose(0, 1)
            if device.type == "cuda" and self.arch.layer(name).index == 0:
                # to 3 channels cuDNN may have no kernel on matrix units: an H200 took 10 times as long in float32
                flipped = F.pad(flipped, (0, 0, 0, 0, 0, 0, 0, IMAGE_CHANNELS - len(flipped)))
            return (flipped.to(device, dtype).contiguous(memory_format=torch.channels_last).clone(),)
        if dtype == torch.bfloat16 and self.arch.layer(name).index == 0:
            high = weight.to(dtype).to(weight.dtype)
            weight = torch.cat([high, high, weight - high], dim=1)  # meets `layers.split_bfloat16`
            if device.type == "cuda":
                # cuDNN has no kernel on matrix units for 9 channels: that took 4 times as long on an H200
                weight = F.pad(weight, (0, 0, 0, 0, 0, 16 - weight.shape[1]))
        weight = weight.to(device, dtype).contiguous(memory_format=torch.channels_last).clone()
        return weight, bias.to(device, dtype).clone()

    def _kernel(self, conv: str, folded: bool) -> tuple[Tensor, Tensor]:
        """Weight and bias in float64, with the batch normalisation behind it where it is to be folded in."""
        index = self.arch.layer(conv).index
        weight, bias = (self.state[f"features.{index}.{part}"].to(torch.float64) for part in ("weight", "bias"))
        if folded:
            gamma, beta, mean, var = (
                self.state[f"features.{index + 1}.{part}"].to(torch.float64)
                for part in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gamma / torch.sqrt(var + 1e-5)
            weight, bias = weight * scale[:, None, None, None], (bias - mean) * scale + beta
        return weight, bias


def _unlock() -> None:
    """In a forked child, which lacks the thread that held the lock."""
    Trunk._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


class PickledTrunk:
    """Stands for a trunk in the copies and pickles of an owner: a copy shares the trunk.

    A pickle carries the layers that the owner uses, not those that others have brought, and becomes the live trunk
    again, where there is one.
    """

    def __init__(self, trunk: Trunk, names: tuple[str, ...]) -> None:
        self.trunk, self.names = trunk, names

    def __deepcopy__(self, memo: dict[int, Any]) -> PickledTrunk:
        return self

    def __reduce__(self) -> tuple[Callable[..., Trunk], tuple[Any, ...]]:
        trunk = self.trunk
        return Trunk.shared, (trunk.arch, {name: trunk.state[name] for name in self.names}, trunk.key)


def _original(prefix: str) -> Key:
    """The weight and bias under that prefix of the state, as they are."""
    return prefix, False, "original"

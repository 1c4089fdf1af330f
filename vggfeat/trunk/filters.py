"""The weights of a frozen trunk: shared by all that use them, and made ready for each device and precision."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from vggfeat import winograd
from vggfeat.arch import Arch
from vggfeat.trunk.plan import Plan

__all__ = ["Trunk", "outside"]


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
        with outside():
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

    def filters(
        self,
        plan: Plan,
        device: torch.device,
        dtype: torch.dtype,
        linear: Sequence[int] = (),
        size: tuple[int, int] | None = None,
    ) -> list[Tensor]:
        """For each stage three: weight, bias and what carries the gradient back; twice where BN is tapped around.

        What carries the gradient back is the turned kernel (C,K,3,3), or where that is faster for images of `size`
        the kernel at the points of a tile (36,C,K), which serves both ways (`winograd.py`).

        BN of a frozen network is a factor and a shift per channel, folded into the convolution. A tap on the
        convolution itself then comes of a second, unfolded convolution, so that the stream below it does not depend on
        what was asked for. `linear` are the classifier's layers that will be asked for next: a compiler that has looked
        at what is ready does not see what comes later.
        """
        names: list[str] = []
        sizes = plan.sizes(*size) if size else [(0, 0)] * len(plan.stages)
        for stage, (height, width) in zip(plan.stages, sizes, strict=True):
            layer = self.arch.layer(stage.conv)
            tiled = layer.kernel == 3 and winograd.pays(device, dtype, layer.in_channels, layer.channels, height, width)
            bn, aside = "bn" in stage.steps, "conv" in stage.taps
            for kernel in [f"folded {stage.conv}"] * bn + [stage.conv] * (aside or not bn):
                names += [kernel, f"{'tiles' if tiled else 'back'} {kernel}"]
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
                with outside():
                    ready[name] = self._prepare(name, device, dtype)

    # run while a graph is traced, not traced: torch.compiler.assume_constant_result without importing the compiler
    _fill._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _prepare(self, name: str, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
        if name.startswith("classifier."):
            return tuple(self.state[f"{name}.{part}"].to(device, dtype) for part in ("weight", "bias"))
        *how, conv = name.split()
        weight, bias = self._kernel(conv, "folded" in how)
        if "tiles" in how:
            # in bfloat16 they serve where products are made in float32 all the same
            return (winograd.transformed(weight).to(device, torch.float32),)
        if "back" in how:
            # the gradient of a convolution is a convolution with the kernel turned round and channels exchanged
            back = weight.flip(2, 3).transpose(0, 1)
            return (back.to(device, dtype).contiguous(memory_format=torch.channels_last).clone(),)
        if dtype == torch.bfloat16 and self.arch.layer(conv).index == 0:
            high = weight.to(dtype).to(weight.dtype)
            weight = torch.cat([high, high, weight - high], dim=1)  # meets `layers.doubled`
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


@contextlib.contextmanager
def outside() -> Iterator[None]:
    """Outside of whatever the caller is inside of (inference mode, export, vmap): what is kept must be real tensors."""
    with _disable_current_modes(), torch._C._DisableFuncTorch(), torch.inference_mode(False), torch.no_grad():
        yield

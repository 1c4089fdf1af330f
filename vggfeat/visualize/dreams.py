"""Images made from features: what excites a channel, a unit or a class most, and images back from their features."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vggfeat.arch import Arch
from vggfeat.errors import InputError, WeightsError, nearest
from vggfeat.features import VGGFeatures
from vggfeat.functional import wide
from vggfeat.image import fit, to_pil, to_tensor
from vggfeat.transfer.config import StyleConfig
from vggfeat.transfer.optimize import Adam
from vggfeat.transfer.stylize import StyleResult, StyleStep, stylize
from vggfeat.visualize.sheet import ImageLike, Sheet, chosen, load_image
from vggfeat.weights import DEFAULT, WeightsLike, load

__all__ = ["Dream", "DreamStep", "Inversion", "dream", "invert"]

PARAMETRIZATIONS = ("fourier", "pixels")

# a root of the covariance of colours in natural images (lucid, https://github.com/tensorflow/lucid, Apache-2.0)
_COLORS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
_SPREAD = 0.4941  # the largest norm of its columns
_BLUR = 4  # steps between two blurs
_BLURS = (1.2, 0.4)  # σ in pixels, from the first to the last
_TURN = 5.0  # degrees, at most
_ZOOM = 0.1  # at most


@dataclass(frozen=True)
class DreamStep:
    """What the callback is told after each step.

    Attributes:
        step: which, from 1.
        steps: how many.
        activations: of each channel, as the optimiser sees it, on the jittered image.
    """

    step: int
    steps: int
    activations: list[float]
    _images: Tensor = field(repr=False, compare=False)

    def images(self) -> list[Image.Image]:
        """The pictures as they stand."""
        return [to_pil(image) for image in self._images]


@dataclass(frozen=True)
class Dream:
    """What `dream` returns.

    Attributes:
        images: one picture for each channel.
        channels: their numbers.
        activations: of each channel on its picture as it is saved, in 8 bits.
        start: likewise on the picture that the run began with.
        sheet: the pictures side by side; a single one as it is.
    """

    images: list[Image.Image]
    channels: list[int]
    activations: list[float]
    start: list[float]
    sheet: Sheet = field(repr=False)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the sheet, see `Sheet.save`."""
        return self.sheet.save(path, overwrite=overwrite)


def dream(
    layer: str = "conv3_1",
    channels: Sequence[int] | None = None,
    *,
    count: int = 9,
    unit: bool | tuple[int, int] = False,
    parametrization: str = "fourier",
    size: int = 128,
    steps: int = 200,
    learning_rate: float = 0.05,
    jitter: int = 8,
    seed: int = 0,
    arch: str | Arch | None = None,
    weights: WeightsLike = DEFAULT,
    precision: str = "auto",
    device: str | torch.device = "cpu",
    callback: Callable[[DreamStep], object] | None = None,
) -> Dream:
    """Images that excite a channel, a unit or a class most (Erhan et al. 2009; Olah et al. 2017, Feature Visualization).

    Each step sees the image shifted, turned and zoomed a little at random, so that only what survives that grows. The
    image is either `fourier` (Olah et al. 2017; Mordvintsev et al. 2018, Differentiable Image Parameterizations):
    complex amplitudes divided by their frequency, of three colours that are uncorrelated in natural images, through a
    sigmoid; or `pixels`, blurred every few steps, ever less (Yosinski et al. 2015, arXiv:1506.06579).

    Args:
        layer: `conv3_1`, …; `fc8` (`fc` of a slim head) for classes. For `relu3_1` the value below is maximised: what
            drives one drives the other, and below there is a gradient where the ReLU is silent.
        channels: numbers of the channels or classes; None takes the first `count`.
        count: how many, where no channel is named.
        unit: False maximises a channel's mean, True the unit in the middle of the map, (row, column) that one.
        parametrization: `fourier` or `pixels`.
        size: side of the pictures in pixels.
        steps: of Adam.
        learning_rate: of Adam: in units of the amplitudes; for pixels a third of it, in units of their range.
        jitter: largest shift in pixels.
        seed: of the start and of the jitter.
        arch: the network, see `VGGFeatures`.
        weights: see `vggfeat.weights.load`.
        precision: `auto`, `float32` or `bfloat16`.
        device: where to run.
        callback: called after each step.

    Raises:
        InputError: a layer, channel, unit or choice that is not there, or a size too small for the layer.
        WeightsError: weights that cannot be had or do not reach the layer.
    """
    if parametrization not in PARAMETRIZATIONS:
        raise InputError(f"unknown parametrization {parametrization!r}: {nearest(parametrization, PARAMETRIZATIONS)}")
    for name, value, least in (("steps", steps, 1), ("size", size, 2), ("jitter", jitter, 0)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    loaded = load(weights, arch)
    if loaded.arch.head is None and layer in ("fc6", "relu6", "fc7", "relu7", "fc8", "fc"):
        raise WeightsError(f"weights {loaded.label} hold no classifier, so there is no {layer}: give some that do")
    loaded.require([layer])
    driven = _driven(loaded.arch, layer)
    features = VGGFeatures(dict.fromkeys([driven, layer]), weights=loaded, precision=precision, keep="values")
    with torch.no_grad():
        probe = features(torch.full((1, 3, size, size), 0.5, device=device))[layer]
    shown = chosen(channels, count, probe.shape[1], probe[0], "first", f"{layer} of {loaded.arch.name}")
    place = _place(unit, probe, layer)

    def activation(images: Tensor, name: str) -> Tensor:
        tap = wide(features.taps(images)[name])  # (K,C,h,w) or (K,C)
        tap = tap[range(len(shown)), shown]
        return tap if tap.ndim == 1 else tap.mean((1, 2)) if place is None else tap[:, place[0], place[1]]

    generator = torch.Generator().manual_seed(seed)
    shape = (len(shown), 3, size, size)
    jitter = min(jitter, size // 8)
    if parametrization == "fourier":
        images = _fourier(shape, generator, device)
    else:
        images = _pixels(shape, generator, device)
    last = next(images)
    before = [to_pil(image) for image in last]
    for step in range(1, steps + 1):
        value = activation(_jittered(last, jitter, generator), driven)
        last = images.send((-value.sum(), learning_rate, step / steps))
        if callback is not None:
            callback(DreamStep(step, steps, value.tolist(), last.detach()))
    pictures = [to_pil(image) for image in last]
    with torch.no_grad():
        start, end = (
            activation(torch.cat([to_tensor(each) for each in several]).to(device), layer).tolist()
            for several in (before, pictures)
        )
    settings = {
        "picture": "dream", "layer": layer, "channels": shown, "activations": end, "parametrization": parametrization,
        "steps": steps, "seed": seed, "arch": loaded.arch.name, "weights": loaded.label,
    }  # fmt: skip
    single = len(shown) == 1
    title = "" if single else f"What excites {layer} of {loaded.arch.name} most"
    labels = [] if single else [str(channel) for channel in shown]
    return Dream(pictures, shown, end, start, Sheet(pictures, labels, title, settings=settings))

"""Images made from features: what excites a channel, unit or class most, and images recovered from features."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vggfeat.arch import HEAD_NAMES, Arch, layer_names
from vggfeat.devices import resolve
from vggfeat.errors import InputError, WeightsError, check_choice, optional, whole_number
from vggfeat.features import VGGFeatures
from vggfeat.functional import upcast
from vggfeat.image import ImageLike, to_pil, to_tensor
from vggfeat.modes import with_gradients
from vggfeat.transfer.config import StyleConfig
from vggfeat.transfer.optimize import Adam
from vggfeat.transfer.stylize import StyleResult, StyleStep, stylize
from vggfeat.visualize.inputs import chosen, load_image
from vggfeat.visualize.sheet import Sheet, net_label
from vggfeat.weights import DEFAULT, WeightsLike, load, resolved, run_metadata

PARAMETRIZATIONS = ("fourier", "pixels")

# a root of the covariance of colours in natural images (lucid, https://github.com/tensorflow/lucid, Apache-2.0)
_COLORS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
_SPREAD = 0.4941  # the largest norm of its columns
_BLUR = 4  # steps between two blurs
_BLURS = (1.2, 0.4)  # σ in pixels, from the first to the last
_TURN = 5.0  # degrees, at most
_ZOOM = 0.1  # at most
_LEAK = 0.1  # share kept of what a ReLU cuts off


@dataclass(frozen=True)
class DreamStep:
    """What the callback is told after each step.

    Attributes:
        step: its number, from 1.
        steps: how many.
        activations: one per channel, as the optimiser sees it, on the jittered image.
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
        images: one picture per channel.
        channels: their numbers.
        activations: each channel's on its picture as saved, in 8 bits.
        start: each channel's on the picture that the run began with, before rounding.
        labels: what the sheet calls them: the names of classes, where they are known, else numbers.
        sheet: the pictures side by side; a single one as it is.
        interrupted: whether Ctrl-C ended it early; the pictures are then as they stood.
    """

    images: list[Image.Image]
    channels: list[int]
    activations: list[float]
    start: list[float]
    labels: list[str]
    sheet: Sheet = field(repr=False)
    interrupted: bool = False

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the sheet; see `Sheet.save`."""
        return self.sheet.save(path, overwrite=overwrite)


@with_gradients()
def dream(
    layer: str = "relu3_1",
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
    names: Sequence[str] | None = None,
    precision: str = "auto",
    device: str | torch.device = "auto",
    callback: Callable[[DreamStep], object] | None = None,
) -> Dream:
    """Images that excite a channel, a unit or a class most (Erhan et al. 2009; Olah et al. 2017).

    After the first step Ctrl-C does not raise: it ends the run with the pictures as they stand.

    Each step sees the image randomly shifted, turned and zoomed a little, so that only what survives this grows. The
    image is either `fourier` (Olah et al. 2017, Feature Visualization; Mordvintsev et al. 2018, Differentiable Image
    Parameterizations): complex amplitudes divided by their frequency, of three colours that are uncorrelated in natural
    images, through a sigmoid; or `pixels`, blurred every few steps, less and less (Yosinski et al. 2015,
    arXiv:1506.06579).

    Args:
        layer: `conv3_1`, …; `fc8` (`fc` of a slim head) for classes. For a ReLU, a tenth of what it cuts off counts
            too, so that there is a gradient where it is silent.
        channels: numbers of the channels or classes; None takes the first `count`.
        count: how many, if no channel is named.
        unit: False maximises a channel's mean, True the map's middle unit, (row, column) that unit.
        parametrization: `fourier` or `pixels`.
        size: side of the pictures in pixels.
        steps: of Adam.
        learning_rate: of Adam: in units of the amplitudes; for pixels a third of it, in units of their range.
        jitter: largest shift in pixels; no more than an eighth of the side is used, for a unit no more than a quarter
            of its receptive field.
        seed: of the start and of the jitter, from 0 to 2⁶³ - 1.
        arch: the network, see `VGGFeatures`.
        weights: see `vggfeat.weights.load`.
        names: of all classes, for the labels of the classifier's last layer; None means those stored with the weights
            of a run of `train`, if any.
        precision: `auto`, `float32` or `bfloat16`.
        device: where to run; `auto` is CUDA if available, else the CPU.
        callback: called after each step.

    Raises:
        InputError: an unknown layer, channel, unit or choice, a size too small for the layer, or names that are not one
            for each class.
        WeightsError: weights that are unavailable or do not reach the layer.
        KeyboardInterrupt: at Ctrl-C before the first step has ended.
    """
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    steps, jitter = whole_number("steps", steps), whole_number("jitter", jitter, least=0)
    size = whole_number("size", size, least=2 if parametrization == "fourier" else 4)  # 4 for the blur
    seed = whole_number("seed", seed, least=0)
    if seed >= 2**63:
        raise InputError(f"seed must be below 2^63, got {seed}")
    if not 0 < learning_rate < math.inf:
        raise InputError(f"learning_rate must be a positive number, got {learning_rate}")
    if names is None and isinstance(weights, str | os.PathLike):
        names = run_metadata(weights).get("classes")
    device, loaded = resolve(device), load(weights, arch, classifier=layer in HEAD_NAMES)
    if loaded.arch.head is None and layer in HEAD_NAMES:
        raise WeightsError(f"weights {loaded.label} have {loaded.classifier}, so no {layer}: give some that do")
    loaded.require([layer])
    relu = layer.startswith("relu")
    below = loaded.arch.names[loaded.arch.names.index(layer) - 1] if relu else layer
    features = VGGFeatures([below], weights=loaded, precision=precision, keep="values")
    with torch.no_grad():
        probe = features(torch.full((1, 3, size, size), 0.5, dtype=torch.float32, device=device))[below]
    shown = chosen(channels, count, probe[0], "first", f"{layer} of {loaded.arch.name}")
    if names is not None and loaded.arch.head is not None and len(names) != loaded.arch.num_classes:
        raise InputError(f"{len(names)} names for {loaded.arch.num_classes} classes")
    last = layer in loaded.arch.head_names[-1:]
    labels = [names[channel] if names is not None and last else str(channel) for channel in shown]
    place, shift = _place(unit, probe, layer), min(jitter, size // 8)
    if place is not None:  # whose patch must stay where it sees it
        shift = min(shift, loaded.arch.layer(layer).receptive_field // 4)

    def activation(images: Tensor, leak: float = 0.0) -> Tensor:
        tap = upcast(features.taps(images)[below])[range(len(shown)), shown]  # (K,h,w) or (K,)
        if relu:
            tap = F.leaky_relu(tap, leak) if leak else F.relu(tap)  # a leak of 0 would make negative zeros
        return tap if tap.ndim == 1 else tap.mean((1, 2)) if place is None else tap[:, place[0], place[1]]

    generator = torch.Generator().manual_seed(seed)
    kind = _Fourier if parametrization == "fourier" else _Pixels
    canvas: _Canvas = kind((len(shown), 3, size, size), learning_rate, generator, device)
    before = canvas.images()
    done = _improve(canvas, lambda images: activation(_jittered(images, shift, generator), _LEAK), steps, callback)
    pictures = [to_pil(image) for image in canvas.images()]
    after = torch.cat([to_tensor(each) for each in pictures]).to(device)
    with torch.no_grad():
        start, end = activation(before).tolist(), activation(after).tolist()
    settings = {
        "picture": "dream", "layer": layer, "channels": shown, "activations": end, "parametrization": parametrization,
        "steps": done, "seed": seed, "arch": loaded.arch.name, "weights": loaded.label,
    }  # fmt: skip
    single = len(shown) == 1
    title = "" if single else f"What excites {layer} of {net_label(loaded)} most"
    sheet = Sheet(pictures, [] if single else labels, title, settings=settings)
    return Dream(pictures, shown, end, start, labels, sheet, interrupted=done < steps)


def _place(unit: bool | tuple[int, int], tap: Tensor, layer: str) -> tuple[int, int] | None:
    """Row and column of the unit; None for the mean over all units."""
    if unit is False:
        return None
    if tap.ndim == 2:
        raise InputError(f"{layer} has no rows and columns: its channels are units already")
    height, width = tap.shape[2:]
    row, column = (height // 2, width // 2) if unit is True else unit
    if not (0 <= row < height and 0 <= column < width):
        raise InputError(f"{layer} has {height} rows and {width} columns at this size, got unit ({row}, {column})")
    return row, column


def _jittered(images: Tensor, jitter: int, generator: torch.Generator) -> Tensor:
    """The images randomly shifted, turned and zoomed, all alike."""
    draw = (torch.rand(4, generator=generator, device="cpu") * 2 - 1).tolist()
    angle, zoom = math.radians(_TURN) * draw[0], 1 + _ZOOM * draw[1]
    cos, sin = math.cos(angle) * zoom, math.sin(angle) * zoom
    right, down = (2 * jitter * each / images.shape[2] for each in draw[2:])
    turn = images.new_tensor([[cos, -sin, right], [sin, cos, down]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


class _Canvas(Protocol):
    """Images in [0,1], as the optimiser represents them."""

    def images(self) -> Tensor:
        """(K,3,H,W)."""

    def step(self, loss: Tensor, progress: float) -> None:
        """Improve them; `progress` is the share of the run done."""


def _improve(
    canvas: _Canvas,
    excitation: Callable[[Tensor], Tensor],
    steps: int,
    callback: Callable[[DreamStep], object] | None,
) -> int:
    """Raise the excitation of each image; returns after how many steps, fewer than asked for where Ctrl-C ended it."""
    done = 0
    try:
        for step in range(1, steps + 1):
            images = canvas.images()
            excited = excitation(images)
            canvas.step(-excited.sum(), step / steps)
            done = step
            if callback is not None:
                callback(DreamStep(step, steps, excited.tolist(), images.detach()))
    except KeyboardInterrupt:
        if not done:
            raise
    return done


class _Fourier:
    """Amplitudes divided by frequency, of uncorrelated colours."""

    def __init__(self, shape: tuple[int, ...], rate: float, generator: torch.Generator, device: torch.device) -> None:
        self.size = shape[2:]
        down, right = torch.fft.fftfreq(shape[2], device="cpu")[:, None], torch.fft.rfftfreq(shape[3], device="cpu")
        # frequency f has amplitude 1/f, the mean that of the lowest; the rest makes a pixel's σ the same at any size
        frequency = torch.sqrt(down**2 + right**2).clamp_min(1 / max(self.size))
        self.scale = (math.sqrt(shape[2] * shape[3]) / 4 / frequency)[..., None].float().to(device)
        start = 0.01 * torch.randn(
            *shape[:2], *frequency.shape, 2, generator=generator, dtype=torch.float32, device="cpu"
        )
        self.spectrum = start.to(device).requires_grad_()
        self.colors = torch.tensor(_COLORS, dtype=torch.float32, device=device) / _SPREAD
        self.optimizer = torch.optim.Adam([self.spectrum], rate)

    def images(self) -> Tensor:
        """Through the inverse transform, the colours and a sigmoid."""
        spectrum = torch.view_as_complex(self.spectrum * self.scale)
        plain = torch.fft.irfft2(spectrum, s=self.size, norm="backward")
        return torch.einsum("kchw,rc->krhw", plain, self.colors).sigmoid()

    def step(self, loss: Tensor, progress: float) -> None:
        """One step of Adam."""
        self.optimizer.zero_grad()
        loss.backward()
        with torch.device("cpu"):  # Adam of torch 2.10 creates its step count on the default device
            self.optimizer.step()


class _Pixels:
    """The values themselves, blurred now and then, less and less as the run goes on."""

    def __init__(self, shape: tuple[int, ...], rate: float, generator: torch.Generator, device: torch.device) -> None:
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
        self.pixels = (0.5 + 0.05 * noise).to(device)
        self.optimizer = Adam(rate / 3)
        self.filters = optional("kornia.filters", "pixels need kornia, which does not work here: pip install kornia")
        self.count = 0

    def images(self) -> Tensor:
        """The values."""
        self.pixels = self.pixels.detach().requires_grad_()
        return self.pixels

    def step(self, loss: Tensor, progress: float) -> None:
        """One step of Adam, and a blur every few."""
        (grad,) = torch.autograd.grad(loss, self.pixels)
        self.pixels = self.optimizer.step(self.pixels.detach(), grad)
        self.count += 1
        if self.count % _BLUR == 0 and progress < 1:
            sigma = _BLURS[0] + (_BLURS[1] - _BLURS[0]) * progress
            with self.pixels.device:  # kornia creates its filter on the default one
                self.pixels = self.filters.gaussian_blur2d(self.pixels, 7, (sigma, sigma))


# ── inversion ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Inversion:
    """What `invert` returns.

    Attributes:
        image: the picture that was found.
        original: the one whose features it should have.
        layers: whose features.
        error: mean over the layers of ‖F - P‖² / ‖P‖², or of ‖G - A‖² / ‖A‖², of the picture as saved; NaN after Ctrl-C
            at a coarser scale.
        start: the same of the noise that the run began with, before rounding, at the coarsest scale.
        result: the run, with its history.
    """

    image: Image.Image
    original: Image.Image
    layers: tuple[str, ...]
    error: float
    start: float
    result: StyleResult = field(repr=False)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the picture; see `Sheet.save`."""
        settings = {"picture": "invert", "error": self.error} | self.result.to_dict()
        return Sheet([self.image], settings=settings).save(path, overwrite=overwrite)


def invert(
    image: ImageLike,
    layers: Sequence[str] | None = None,
    *,
    gram: bool = False,
    size: int = 256,
    steps: int = 200,
    tv_weight: float | None = None,
    seed: int = 0,
    arch: str | None = None,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] = DEFAULT,
    callback: Callable[[StyleStep], object] | None = None,
    **options: Any,
) -> Inversion:
    """The image recovered from noise, by features (Mahendran and Vedaldi 2015, arXiv:1412.0035) or Gram matrices.

    From features, at one size, the mean of ‖F - P‖² / ‖P‖² plus total variation is minimised, eqs. 1 to 3 of the paper
    with β = 2.
    Gram matrices give an image of the same texture, but not of the same things in the same places: texture synthesis
    (Gatys et al. 2015, arXiv:1505.07376); it goes from coarse to fine, so that the texture's large forms appear too, of
    which the Gram matrices of one size know little. Both are `stylize` with one term.

    Args:
        image: a file, a PIL image or a tensor (1,3,H,W) in [0,1].
        layers: whose features or Gram matrices; None means relu3_1, and with `gram` relu1_1, relu2_1 … relu5_1 as far
            as the weights reach.
        gram: match the Gram matrices.
        size: long side of the picture in pixels.
        steps: at the finest scale; each coarser one gets half as many.
        tv_weight: of the total variation; None means 1 from features and 0 from Gram matrices.
        seed: of the noise.
        arch: the network; None means the weights' own, and vgg19 where they imply none.
        weights: a name, a path or a state dict; see `vggfeat.weights.load`.
        callback: called after each step.
        options: further fields of `StyleConfig`, such as `pooling`, `optimizer`, `device`, `precision`.

    Raises:
        InputError: an unknown layer or choice, or an image that cannot be read or is too small.
        WeightsError: weights that are unavailable or do not reach the layers.
        RunError: the loss was not finite from the start.
        KeyboardInterrupt: Ctrl-C before the first step is done; later, the result so far is returned.
    """
    original = to_pil(load_image(image, size))
    weights = weights if weights == "auto" else resolved(weights)  # `auto` is resolved later, and recorded as asked for
    for name in options:
        check_choice("option", name, [each.name for each in fields(StyleConfig)])
    if layers is None:
        layers = ["relu3_1"]
        if gram:
            known = load(weights, arch, default="vgg19")
            layers = known.served([f"relu{block}_1" for block in range(1, 6)])
    layers = tuple(layer_names(layers))
    if taken := {"init", "content_layers", "content_weight", "style_layers", "style_weight"} & options.keys():
        raise InputError(f"invert sets {min(taken)} itself: layers and gram say what is matched")
    # style must name a layer at weight 0, too, and a classifier's has no Gram matrix
    spare = ("conv1_1",) if HEAD_NAMES.intersection(layers) else layers[:1]
    terms: dict[str, Any] = {"style_layers": spare, "style_weight": 0.0, "content_layers": layers}
    if gram:
        terms = {"style_layers": layers, "content_layers": layers[:1], "content_weight": 0.0, "style_weight": 1.0}
    else:
        terms |= {"content_weight": 1.0, "start_size": size}
    tv_weight = (0.0 if gram else 1.0) if tv_weight is None else tv_weight
    fixed = {"size": size, "steps": steps, "tv_weight": tv_weight, "seed": seed, "init": "noise", "arch": arch}
    config = StyleConfig(**(terms | fixed | {"weights": weights} | options))
    result = stylize(original, original, config, callback=callback)
    term = "style" if gram else "content"
    error = result.losses.get(term, math.nan)  # NaN after Ctrl-C at a coarser scale
    return Inversion(result.image, original, layers, error, result.history[0][term], result)

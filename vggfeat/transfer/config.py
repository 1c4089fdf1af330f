"""The settings of a style transfer: every default is stated here and nowhere else. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from vggfeat.arch import HEAD_NAMES, PADDINGS, POOLINGS, parse
from vggfeat.errors import InputError, counted, whole_number
from vggfeat.settings import PRECISIONS, Settings, option


@dataclass(frozen=True)
class StyleConfig(Settings):
    """Settings of `stylize`; each is a flag of `vggstyle` with the same name in dashes.

    Attributes:
        size: long side of the result in pixels.
        weights: what `vggfeat.weights.load` takes; `auto` is what the environment variable VGGFEAT_WEIGHTS says, else
            ImageNet's where available, else the bundled ones, or random ones for networks other than vgg19.
        arch: the network; None means the weights' own, and vgg19 where they imply none.
        style_layers: layers whose Gram matrices are matched; none of the classifier's.
        content_layers: layers whose features are matched.
        style_layer_weights: one for each style layer; equal by default. Only their proportions matter.
        content_layer_weights: the same for the content layers.
        style_weight: weight of the style term; None means 1, and with `gatys` 1000.
        content_weight: weight of the content term; None means 0.05, and with `gatys` 1.
        tv_weight: weight of the total variation, the mean squared difference of neighbouring pixels.
        style_blend: one for each style image; equal by default. Only their proportions matter.
        style_scale: long side of the style images, relative to the result's.
        normalization: `scale-free` (each layer's error relative to its target) or `gatys` (eqs. 1 and 4 of the paper).
        pooling: `max`, `average` or `l2`.
        padding: `zeros`, `reflect` or `replicate`.
        init: `content`, `noise`, or an image file to start from, which is brought to the result's size.
        optimizer: `lbfgs` or `adam`.
        learning_rate: Adam's step, in units of the full range of a pixel.
        steps: steps at the finest scale; each coarser one gets half as many. A step looks at a picture and makes the
            next, so N steps choose among N pictures, the first of which is the scale's start.
        start_size: long side of the coarsest scale; at least `size` means a single scale.
        seed: of the noise.
        device: `auto` (CUDA, else the CPU), or a torch device.
        precision: of the network: `auto`, `float32` or `bfloat16`.
        keep_color: keep the content's colours and take only lightness from the style.
        tile: side in pixels of the tiles that pictures are computed in, with less memory and in about twice the time;
            values and gradients are the same to rounding, but L-BFGS remembers 8 steps instead of 20. 0 computes
            pictures whole, None decides by the free memory.

    Raises:
        InputError: a value out of range or not among the choices.
    """

    CHOICES: ClassVar[Mapping[str, Sequence[str]]] = {
        "normalization": ("scale-free", "gatys"),
        "pooling": POOLINGS,
        "padding": PADDINGS,
        "optimizer": ("lbfgs", "adam"),
        "precision": PRECISIONS,
    }

    size: int = option(512, "Long side of the result in pixels.")
    weights: str | Mapping[str, Any] = option(
        "auto", "imagenet, caffe, bundled, random, auto, a .pth, .safetensors or .h5 file, or a run's folder."
    )
    arch: str | None = option(None, "Network: vgg19 (default), vgg16, …; a file's own if it has one.")
    style_layers: tuple[str, ...] = option(
        ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"), "Layers that carry the style."
    )
    content_layers: tuple[str, ...] = option(("relu4_2",), "Layers that carry the content.")
    style_layer_weights: tuple[float, ...] | None = option(None, "One number for each style layer.")
    content_layer_weights: tuple[float, ...] | None = option(None, "One number for each content layer.")
    style_weight: float | None = option(None, "Weight of the style; 1, or 1000 with --normalization gatys.")
    content_weight: float | None = option(None, "Weight of the content; 0.05, or 1 with --normalization gatys.")
    tv_weight: float = option(
        0.0, "Weight of the total variation: higher is smoother. 0.1 calms colours, and keeps long runs free of grain."
    )
    style_blend: tuple[float, ...] | None = option(None, "One number for each style image.")
    style_scale: float = option(1.0, "Size of the style images relative to the result: larger gives coarser strokes.")
    normalization: str = option("scale-free", "How errors are scaled.")
    pooling: str = option("max", "How the network pools.")
    padding: str = option("zeros", "How the network sees beyond the border.")
    init: str = option("content", "Where to start: content, noise, or an image file.")
    optimizer: str = option("lbfgs", "How the picture is improved.")
    learning_rate: float = option(0.04, "Step of Adam.")
    steps: int = option(70, "Steps at the finest scale; coarser ones get half as many.")
    start_size: int = option(128, "Long side of the coarsest scale.")
    seed: int = option(0, "Seed of the noise.")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, …")
    precision: str = option("auto", "Precision of the network.")
    keep_color: bool = option(False, "Keep the content's colours.")
    tile: int | None = option(None, "Side of the tiles for a large picture; 0 for none.  [default: by free memory]")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch is not None:
            parse(self.arch)
        for name in ("style_layers", "content_layers"):
            layers = getattr(self, name)
            if len(set(layers)) < len(layers):
                raise InputError(f"{name} names a layer twice ({', '.join(layers)}): give it a larger weight instead")
        if not self.style_layers:
            raise InputError("no style layer: name at least one, such as 'relu3_1'")
        if heads := HEAD_NAMES.intersection(self.style_layers):
            raise InputError(
                f"{min(heads)} has no positions, over which style is summed: it can only be a content layer"
            )
        if not 0 <= self.seed < 2**64:
            raise InputError(f"seed must be from 0 to 2^64 - 1, got {self.seed}")
        for name in ("size", "steps", "start_size"):
            whole_number(name, getattr(self, name))
        if self.tile is not None:
            whole_number("tile", self.tile, least=0)
            if self.tile and (heads := HEAD_NAMES.intersection(self.content_layers)):
                raise InputError(
                    f"{min(heads)} sees the picture as a whole, not in tiles: leave tile out, or set it to 0"
                )
        if not 0 < self.style_scale <= 100:
            raise InputError(f"style_scale must be a positive number of at most 100, got {self.style_scale}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"learning_rate must be a positive number, got {self.learning_rate}")
        if self.optimizer == "lbfgs" and self.learning_rate != StyleConfig.learning_rate:
            raise InputError("learning_rate is Adam's: leave it out, or choose optimizer='adam' (--optimizer adam)")
        for name in ("style_weight", "content_weight", "tv_weight"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise InputError(f"{name} must be a number of at least 0, got {value}")
        if not any(self.term_weights) and not self.tv_weight:
            raise InputError("style_weight, content_weight and tv_weight are all 0: there is nothing to improve")
        for name in ("style_layer_weights", "content_layer_weights", "style_blend"):
            values = getattr(self, name)
            if values is None:
                continue
            if not all(value >= 0 and math.isfinite(value) for value in values) or not sum(values) > 0:
                raise InputError(f"{name} must be numbers of at least 0, not all 0, got {values}")
            layers = {"style_layer_weights": self.style_layers, "content_layer_weights": self.content_layers}.get(name)
            if layers is not None and len(values) != len(layers):
                raise InputError(f"{name} has {len(values)} numbers for {len(layers)} layers ({', '.join(layers)})")

    @property
    def term_weights(self) -> tuple[float, float]:
        """The weights of style and content, None resolved."""
        style, content = (1.0, 0.05) if self.normalization == "scale-free" else (1000.0, 1.0)
        return (
            style if self.style_weight is None else self.style_weight,
            content if self.content_weight is None else self.content_weight,
        )

    @property
    def init_files(self) -> tuple[str, ...]:
        """The image file to start from, if `init` is one."""
        return () if self.init in ("content", "noise") else (self.init,)

    def shares(self, name: str, count: int) -> tuple[float, ...]:
        """The weights field of that name as `count` shares that sum to 1.

        Raises:
            InputError: it holds another number of values.
        """
        values = getattr(self, name) or (1.0,) * count
        if len(values) != count:
            raise InputError(f"{name} has {counted(len(values), 'number')} for {counted(count, 'image')}")
        values = tuple(value / max(values) for value in values)  # whose sum is finite
        return tuple(value / sum(values) for value in values)

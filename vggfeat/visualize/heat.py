"""Where two images differ for a VGG, and where it looks when it names a class: heat maps over the image."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vggfeat.arch import MIN_SIDE, Arch, layer_names
from vggfeat.errors import ImageError, InputError, counted, whole_number
from vggfeat.features import per_channel
from vggfeat.functional import upcast
from vggfeat.image import SUFFIXES, ImageLike, as_picture, fit, resize, size_for, to_pil
from vggfeat.losses import PerceptualLoss
from vggfeat.metrics import LPIPS, lpips_weights
from vggfeat.modes import with_gradients
from vggfeat.network import VGG, eval_mode, network_from_weights
from vggfeat.tables import Column, Report, Table, apart, short
from vggfeat.visualize.inputs import load_image
from vggfeat.visualize.sheet import Sheet, net_label, overlay, spread
from vggfeat.weights import DEFAULT, IMAGENET, Weights, WeightsLike, load, run_metadata

SHOWN = 400  # pixels of the longer side of a picture on the sheet of distances


@dataclass(frozen=True)
class Distance:
    """What `distance` returns.

    Attributes:
        total: the sum over layers.
        layers: the distance in each layer: the mean of its map.
        maps: the distance at each position of each layer, (h,w).
        map: (H,W), the sum of the layers' maps spread over the image.
        sheet: both images, the heat of all layers together, and each layer's, each at most 400 pixels long.
    """

    total: float
    layers: dict[str, float]
    maps: dict[str, Tensor] = field(repr=False)
    map: Tensor = field(repr=False)
    sheet: Sheet = field(repr=False)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the sheet; see `Sheet.save`."""
        return self.sheet.save(path, overwrite=overwrite)


def distance(
    a: ImageLike,
    b: ImageLike,
    layers: Sequence[str] | None = None,
    *,
    lpips: bool = False,
    size: int | None = None,
    colors: str = "turbo",
    arch: str | Arch | None = None,
    weights: WeightsLike = DEFAULT,
) -> Distance:
    """The perceptual distance of two images: in total, by layer, and by position.

    At each position of a layer it is Σ over channels of (â - b̂)², with â and b̂ the channel vectors at unit length, so
    from 0 (the same direction) to 4; for a layer the mean; in total the sum: LPIPS without its learned weights (Zhang
    et al. 2018, arXiv:1801.03924, eq. 1 with w = 1). It is `PerceptualLoss(layers, normalize_features=True,
    layer_weights=…)` with each layer's number of channels as its weight.

    Args:
        a: a file, a PIL image or a tensor (1,3,H,W) in [0,1].
        b: likewise, of the same size.
        layers: whose features; None means the last ReLU of each block, as far as the weights reach.
        lpips: LPIPS itself, with its learned weights, for VGG-16 and its own five layers: see `vggfeat.LPIPS`.
        size: long side to resize both to, in pixels; None leaves them.
        colors: `grey` or a colour map of kornia's.
        arch: the network, see `VGGFeatures`.
        weights: see `vggfeat.weights.load`.

    Raises:
        InputError: an unknown layer, an image that cannot be read, or two of different sizes; with `lpips`, layers.
        WeightsError: weights that are unavailable or do not reach the layers; with `lpips`, of a network other than
            VGG-16.
    """
    first, second = _two(a, b, size)
    loss, loaded = _loss(layers, lpips, arch, weights)
    with torch.no_grad():
        maps = {name: each[0] for name, each in loss.maps(first, second).items()}
    values = {name: float(each.mean()) for name, each in maps.items()}
    total = sum(values.values())
    full = (first.shape[2], first.shape[3])
    heats = {name: spread(each, full) for name, each in maps.items()}
    summed = torch.stack(list(heats.values())).sum(0)
    tiles, labels = [_shown(first), _shown(second)], [_name(a, "A"), _name(b, "B")]
    by_layer = [(name, heats[name], values[name]) for name in heats]
    together = [("all layers", summed, total)] if len(heats) > 1 else []
    for label, heat, value in together + by_layer:
        tiles.append(_shown(overlay(first, heat / heat.max().clamp_min(1e-6), colors)))
        labels.append(f"{label}: mean {value:.3g}, max {float(heat.max()):.3g}")
    what = "LPIPS" if lpips else "Perceptual distance"
    settings = {
        "picture": "distance", "lpips": lpips, "total": total, "layers": values,
        "arch": loaded.arch.name, "weights": loaded.label,
    }  # fmt: skip
    title = f"{what} {total:.3g}, {net_label(loaded)}"
    sheet = Sheet(tiles, labels, title, settings=settings)
    return Distance(total, values, maps, summed, sheet)


@dataclass(frozen=True, repr=False)
class Distances(Report):
    """What `distances` returns; prints as a table.

    Attributes:
        names: the files' names, sorted.
        layers: each pair's distance in each layer.
        unpaired: names of images that only one of the folders has.
        lpips: whether it is LPIPS.
        arch: the network.
        weights: its weights.
    """

    names: list[str]
    layers: list[dict[str, float]]
    unpaired: list[str]
    lpips: bool
    arch: str
    weights: str

    @property
    def totals(self) -> list[float]:
        """Each pair's distance, the sum over layers."""
        return [sum(each.values()) for each in self.layers]

    @property
    def mean(self) -> float:
        """The mean of `totals`."""
        return math.fsum(self.totals) / len(self.totals)

    def tables(self) -> list[Table]:
        """One row for each pair."""
        what = "LPIPS" if self.lpips else "Perceptual distance"
        of = f"mean {self.mean:.6g} of {counted(len(self.names), 'pair')}"
        title = f"{what}, {self.arch}, weights {self.weights}: {of}"
        shown = dict(zip(self.names, apart(self.names), strict=True))
        columns = [Column("image", "image", shown.__getitem__, left=True)]
        columns += [Column(name, name, "{:.6g}".format) for name in ("total", *self.layers[0])]
        rows = zip(self.names, self.totals, self.layers, strict=True)
        return [Table(title, columns, [(name, total, *each.values()) for name, total, each in rows])]

    def to_dict(self) -> dict[str, Any]:
        """The mean, what it was measured with, and the pairs."""
        rows = zip(self.names, self.totals, self.layers, strict=True)
        pairs = [{"image": name, "total": total, "layers": each} for name, total, each in rows]
        about = {"lpips": self.lpips, "arch": self.arch, "weights": self.weights, "unpaired": self.unpaired}
        return {"mean": self.mean} | about | {"pairs": pairs}


def distances(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    layers: Sequence[str] | None = None,
    *,
    lpips: bool = False,
    size: int | None = None,
    arch: str | Arch | None = None,
    weights: WeightsLike = DEFAULT,
    callback: Callable[[int, int], object] | None = None,
) -> Distances:
    """The distances, as by `distance`, of the images of the same names in two folders.

    What has no partner by its whole name gets one by its name without the suffix, where that is clear among the rest.

    Args:
        a: a folder; images in folders inside it are not looked at.
        b: another.
        layers: see `distance`.
        lpips: see `distance`.
        size: see `distance`.
        arch: see `distance`.
        weights: see `distance`.
        callback: called after each pair with how many are done, and how many there are.

    Raises:
        InputError: as `distance`, naming the pair; no folder, or no two images of one name.
        WeightsError: as `distance`.
    """
    first, second = (_images_in(Path(folder)) for folder in (a, b))
    partners = {name: name for name in first & second}
    stems = _by_stem(second - first)
    partners |= {name: stems[stem] for stem, name in _by_stem(first - second).items() if stem in stems}
    names = sorted(partners)
    if not names:
        counts = f"{len(first)} and {len(second)} images, folders inside left out"
        raise InputError(f"no image in {a} has the name of one in {b}: {counts}")
    loss, loaded = _loss(layers, lpips, arch, weights)
    found: list[dict[str, float]] = []
    for name in names:
        try:
            pair = _two(Path(a) / name, Path(b) / partners[name], size)
            with torch.no_grad():
                found.append({layer: float(each.mean()) for layer, each in loss.maps(*pair).items()})
        except ImageError:
            raise
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if callback is not None:
            callback(len(found), len(names))
    unpaired = sorted((first - partners.keys()) | (second - set(partners.values())))
    return Distances(names, found, unpaired, lpips, loaded.arch.name, loaded.label)


def _images_in(folder: Path) -> set[str]:
    """The names of a folder's images, as far as their suffixes tell."""
    if not folder.is_dir():
        raise InputError(f"expected a folder at {folder}, found {'a file' if folder.exists() else 'nothing'}")
    files = (each for each in folder.iterdir() if each.suffix.lower() in SUFFIXES and each.name[0] != ".")
    return {each.name for each in files if each.is_file()}


def _by_stem(names: set[str]) -> dict[str, str]:
    """By their names without the suffix, those that no two share."""
    shared = Counter(Path(name).stem for name in names)
    return {Path(name).stem: name for name in names if shared[Path(name).stem] == 1}


def _two(a: ImageLike, b: ImageLike, size: int | None) -> tuple[Tensor, Tensor]:
    """Both images, (1,3,H,W)."""
    first, second = load_image(a, size), load_image(b, size)
    if first.shape != second.shape:
        (h, w), (k, v) = first.shape[2:], second.shape[2:]
        least = min(max(w, h), max(v, k))
        alike = size is None and fit(w, h, least) == fit(v, k, least)  # of one shape but for rounding
        hint = f"size={least} (--size {least}) resizes both" if alike else "scale or crop one of them first"
        raise InputError(f"the images differ in size, {w}×{h} and {v}×{k}: {hint}")
    return first, second


def _loss(
    layers: Sequence[str] | None, lpips: bool, arch: str | Arch | None, weights: WeightsLike
) -> tuple[PerceptualLoss, Weights]:
    """What measures the distance, and with which weights."""
    if lpips:
        if layers is not None:
            raise InputError("LPIPS has its own five layers: leave layers out")
        loaded = load(lpips_weights(weights), arch or "vgg16")
        return LPIPS(weights=loaded), loaded
    loaded = load(weights, arch)
    if layers is None:
        relus = [layer.name for layer in loaded.arch.layers if layer.kind == "relu"]
        layers = loaded.served({name[:5]: name for name in relus}.values())
    layers = layer_names(layers)
    channels = {name: loaded.arch.layer(name).channels for name in layers}  # the mean over them becomes the sum
    return PerceptualLoss(layers, layer_weights=channels, normalize_features=True, weights=loaded), loaded


def _shown(image: Tensor) -> Image.Image:
    """The picture as on a sheet, whose labels stay legible."""
    picture = to_pil(image)
    return resize(picture, *fit(*picture.size, min(SHOWN, max(picture.size))))


def _name(image: ImageLike, otherwise: str) -> str:
    return Path(image).name if isinstance(image, str | os.PathLike) else otherwise


@dataclass(frozen=True)
class Cam:
    """What `cam` returns.

    Attributes:
        map: (H,W) in [0,1], the class activation map over the image; all 0 if nothing speaks for the class.
        raw: (h,w), the same at the layer's positions, in units of the logit's change.
        class_index: which class.
        class_name: its name, if names were given or stored with a run's weights, else None.
        logit: its value before the softmax.
        probability: after it.
        sheet: the image, and the map over it.
    """

    map: Tensor = field(repr=False)
    raw: Tensor = field(repr=False)
    class_index: int
    class_name: str | None
    logit: float
    probability: float
    sheet: Sheet = field(repr=False)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the sheet; see `Sheet.save`."""
        return self.sheet.save(path, overwrite=overwrite)


def cam(
    image: ImageLike,
    class_index: int | None = None,
    *,
    layer: str | None = None,
    size: int | str | None = "auto",
    colors: str = "turbo",
    names: Sequence[str] | None = None,
    net: VGG | None = None,
    arch: str | Arch | None = None,
    weights: WeightsLike = DEFAULT,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Cam:
    """Where the classifier sees a class: Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391, eqs. 1 and 2).

    ReLU(Σ_k α_k A_k) with A the layer's feature maps and α_k the mean over positions of ∂y/∂A_k, y the class's logit.

    Args:
        image: a file, a PIL image or a tensor (1,3,H,W) in [0,1].
        class_index: which class; None means the top-ranked one.
        layer: whose maps; None means the last ReLU, as in the paper.
        size: long side to resize the image to, in pixels; None leaves it. `auto` means 224, or with the weights of a
            run of `train` whatever brings the shorter side to the scale it was tested at.
        colors: `grey` or a colour map of kornia's.
        names: of all classes, for the label; None means those stored with the weights of a run of `train`, if any.
        net: your own network of `vggfeat.vgg`; it is run in eval mode and left as it was.
        arch: without `net`: the network, see `VGGFeatures`.
        weights: without `net`: see `vggfeat.weights.load`; they must hold a classifier.
        mean: with `net`: what it expects to be subtracted from images in [0,1], per channel; None means ImageNet's.
        std: with `net`: what it expects them to be divided by then; None means ImageNet's.

    Raises:
        InputError: an unknown class or layer, or an image that cannot be read or is below 32 pixels.
        WeightsError: weights that are unavailable or hold no classifier.
    """
    mean, std = _normalisation(net, arch, weights, mean, std)
    picture = as_picture(image)  # before the weights, which may need fetching
    image = image if isinstance(image, Tensor) else picture  # a file is read once
    facts = run_metadata(weights) if net is None and isinstance(weights, str | os.PathLike) else {}
    seen, shown = _sizes(size, picture, facts)
    x = load_image(image, seen)
    if min(x.shape[2:]) < MIN_SIDE:
        needed = size_for(*picture.size, MIN_SIDE)
        raise InputError(
            f"a classifier needs at least {MIN_SIDE} pixels on each side, got {x.shape[3]}×{x.shape[2]}; choose a size "
            f"of {needed} or more"
        )
    label = "a network in memory"
    if net is None:
        loaded = load(weights, arch)
        names = facts.get("classes") if names is None else names
        label = loaded.label
        net = network_from_weights(loaded)
    layer = layer or [each.name for each in net.arch.layers if each.kind == "relu"][-1]
    net.arch.layer(layer)
    if class_index is not None and whole_number("class_index", class_index, least=0) >= net.num_classes:
        raise InputError(f"{net.arch.name} has classes 0 to {net.num_classes - 1} here, got {class_index}")
    if names is not None and len(names) != net.num_classes:
        raise InputError(f"{len(names)} names for {net.num_classes} classes")
    with eval_mode(net), with_gradients():
        raw, chosen, logits = _grad_cam(net, (x - per_channel(mean, x)) / per_channel(std, x), layer, class_index)

    def over(image: Tensor) -> Tensor:
        heat = spread(raw, (image.shape[2], image.shape[3]))
        return heat / torch.where(heat.max() > 0, heat.max(), 1)

    large = x if shown == seen else load_image(image, shown)
    probability = float(logits.softmax(0)[chosen])
    name = None if names is None else names[chosen]
    title = f"class {chosen}" if name is None else f"{chosen} {short(name, 24)}"
    nothing = "" if bool((raw > 0).any()) else ": nothing speaks for it"
    settings = {
        "picture": "cam", "layer": layer, "class": chosen, "probability": probability,
        "arch": net.arch.name, "weights": label,
    }  # fmt: skip
    sheet = Sheet(
        [to_pil(large), to_pil(overlay(large, over(large), colors))],
        ["", f"{title}, {100 * probability:.1f} %, by {layer}{nothing}"],
        f"Class activation map, {net.arch.name} ({short(label, 30)})",
        columns=2,
        settings=settings,
    )
    return Cam(over(x), raw, chosen, name, float(logits[chosen]), probability, sheet)


def _normalisation(
    net: VGG | None,
    arch: str | Arch | None,
    weights: WeightsLike,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation for images of the network, from `cam`'s arguments, each of which must have effect."""
    if net is not None and not isinstance(getattr(net, "arch", None), Arch):
        raise InputError(f"expected a network of vggfeat.vgg, got {type(net).__name__}")
    if net is None:
        useless = [name for name, value in (("mean", mean), ("std", std)) if value is not None]
    else:
        useless = ["arch"] * (arch is not None) + ["weights"] * (weights is not DEFAULT)
    if useless:
        raise InputError(f"{useless[0]} has no effect {'without' if net is None else 'with'} net: leave it out")
    mean, std = IMAGENET.mean if mean is None else mean, IMAGENET.std if std is None else std
    if len(mean) != 3 or len(std) != 3:
        raise InputError(f"mean and std are three numbers each, for red, green and blue; got {mean} and {std}")
    return tuple(map(float, mean)), tuple(map(float, std))


def _grad_cam(net: VGG, x: Tensor, layer: str, class_index: int | None) -> tuple[Tensor, int, Tensor]:
    """The map (h,w) of a class or of the top-ranked one, that class, and the logits of all; of one normalised image."""
    like, last = next(net.parameters()), net.arch.names[-1]
    taps = net.taps(x.to(like.device, like.dtype).requires_grad_(), [layer, last])
    logits = upcast(taps[last][0])
    chosen = int(logits.argmax()) if class_index is None else class_index
    (grad,) = torch.autograd.grad(logits[chosen], taps[layer])
    alpha = grad.mean((2, 3), keepdim=True)
    return (alpha * taps[layer]).sum(1).relu()[0].detach().float().cpu(), chosen, logits.detach()


def _sizes(size: int | str | None, picture: Image.Image, facts: dict[str, Any]) -> tuple[int | None, int | None]:
    """The long sides at which a classifier sees a picture, and at which that is shown."""
    if not isinstance(size, str):
        return size, size
    if size != "auto":
        raise InputError(f"size must be a number of pixels, None or 'auto', got {size!r}")
    trained = max(facts.get("scales") or [facts.get("size", 0)])
    seen = round(trained * max(picture.size) / min(picture.size)) if trained else 224
    return seen, max(224, seen)  # what a network for small images sees is hard to make out

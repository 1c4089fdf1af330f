"""What single channels look for: first-layer filters in colour, the patches that drive deeper ones, feature maps."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vggfeat.arch import Arch, Layer
from vggfeat.errors import InputError, check_choice, whole_number
from vggfeat.features import VGGFeatures
from vggfeat.functional import upcast
from vggfeat.image import ImageLike, to_pil
from vggfeat.visualize.inputs import chosen, load_image
from vggfeat.visualize.sheet import Sheet, colored, enlarged, net_label
from vggfeat.weights import DEFAULT, Weights, WeightsLike, load


def filters(
    layer: str = "conv1_1",
    images: ImageLike | Sequence[ImageLike] = (),
    *,
    channels: Sequence[int] | None = None,
    count: int = 64,
    order: str = "first",
    patches: int = 9,
    size: int | None = 512,
    tile: int = 0,
    arch: str | Arch | None = None,
    weights: WeightsLike = DEFAULT,
) -> Sheet:
    """What a layer's filters look for.

    Without images, the weights of conv1_1 as colours (Zeiler and Fergus 2014, arXiv:1311.2901, fig. 6): 0.5 + w / (2 m)
    with m the largest |w| of the filter, so that zero is mid-grey in every filter, and a filter of zeros is grey. A
    deeper layer's weights, over hundreds of inputs, mean nothing to the eye. What drives its channels does: with
    images, each channel of any convolutional layer is shown by the patches that its strongest units see, each as large
    as the layer's receptive field, strongest first. What lies beyond an image's border is grey; the tile of a channel
    that does not respond stays blank.

    Args:
        layer: any layer before the classifier.
        images: files, PIL images or tensors (1,3,H,W) in [0,1], of any sizes.
        channels: which to show; None takes `count` of them.
        count: how many, at most as many as there are.
        order: `first`, or `strongest`: by ‖w‖, or by the largest activation.
        patches: per channel; neighbours overlap by half a side at most.
        size: long side to resize the images to, in pixels; None leaves them.
        tile: side of a filter or patch on the sheet in pixels, roughly; 0 chooses.
        arch: the network, see `VGGFeatures`.
        weights: see `vggfeat.weights.load`.

    Returns:
        A sheet with a tile for each channel, labelled by its number.

    Raises:
        InputError: an unknown layer or channel, a layer other than conv1_1 without images, no or unreadable images.
        WeightsError: weights that are unavailable or do not reach the layer.
    """
    several = [images] if isinstance(images, str | os.PathLike | Image.Image | Tensor) else list(images)
    loaded = load(weights, arch)
    spec = loaded.arch.layer(layer)
    loaded.require([layer])
    pick = functools.partial(chosen, channels, count, order=order, what=f"{layer} of {loaded.arch.name}")
    net = net_label(loaded)
    if several:
        tensors = [load_image(image, size) for image in several]
        shown, tiles = _patch_tiles(loaded, spec, tensors, whole_number("patches", patches), tile, pick)
        field = spec.receptive_field
        title = f"Maximally activating patches of {layer}, {net}: {field}×{field} pixels"
    elif layer == "conv1_1":
        shown, tiles = _kernel_tiles(loaded.state["features.0.weight"], tile, pick)
        title = f"Filters of {layer}, {net}"
    elif spec.kind != "conv":
        conv = [each.name for each in loaded.arch.convs if each.index < spec.index][-1]
        raise InputError(
            f"{layer} has no filters: name the convolution before it, {conv}, or give images, for the patches that "
            f"drive {layer}"
        )
    else:
        raise InputError(
            f"{layer} takes {spec.in_channels} channels, which have no colour: give images, and its filters are "
            "shown by the patches that drive them (or see `dream`); conv1_1 needs none"
        )
    settings = {"picture": "filters", "layer": layer, "arch": loaded.arch.name, "weights": loaded.label}
    return Sheet(tiles, [str(channel) for channel in shown], title, settings=settings | {"channels": shown})


_Pick = Callable[[Tensor], list[int]]  # which channels are shown, by the strength of all


def _kernel_tiles(kernels: Tensor, tile: int, pick: _Pick) -> tuple[list[int], list[Image.Image]]:
    """Channels, and their kernels (C,3,k,k) as colours."""
    shown = pick(kernels.flatten(1).norm(dim=1))
    peak = kernels[shown].abs().amax((1, 2, 3), keepdim=True)
    pictures = 0.5 + 0.5 * kernels[shown] / torch.where(peak > 0, peak, 1)
    return shown, [enlarged(to_pil(picture), tile or 48) for picture in pictures]


def _patch_tiles(
    loaded: Weights, spec: Layer, images: Sequence[Tensor], patches: int, tile: int, pick: _Pick
) -> tuple[list[int], list[Image.Image]]:
    """Channels, and for each the patches that its strongest units see."""
    features = VGGFeatures([spec.name], weights=loaded)
    best = [_peaks(_tap(features, spec.name, image), spec, patches) for image in images]
    values = torch.cat([value for value, _ in best], dim=1)  # (C, images·patches)
    peaks = torch.cat([F.pad(where, (1, 0), value=i) for i, (_, where) in enumerate(best)], dim=1)
    shown = pick(values.amax(1))
    top = values.topk(min(patches, values.shape[1])).indices
    field = spec.receptive_field
    side = tile or min(96, max(36, field))
    width = enlarged(Image.new("RGB", (field, field)), side).width  # of a patch on the sheet
    tiles = []
    for channel in shown:
        places = peaks[channel, top[channel]][values[channel, top[channel]] > -math.inf]
        crops = [_crop(images[int(i)], spec, int(y), int(x)) for i, y, x in places]
        tiles.append(_mosaic([enlarged(to_pil(crop), side) for crop in crops], patches, width))
    return shown, tiles


def maps(
    image: ImageLike,
    layer: str = "relu3_1",
    *,
    channels: Sequence[int] | None = None,
    count: int = 64,
    order: str = "strongest",
    scale: str = "each",
    colors: str = "viridis",
    size: int | None = 512,
    tile: int = 128,
    arch: str | Arch | None = None,
    weights: WeightsLike = DEFAULT,
) -> Sheet:
    """A layer's feature maps of an image.

    Args:
        image: a file, a PIL image or a tensor (1,3,H,W) in [0,1].
        layer: any layer before the classifier.
        channels: which to show; None takes `count` of them.
        count: how many, at most as many as there are.
        order: `strongest` (by the mean of the positive part) or `first`.
        scale: `each` spans the colours of a map from 0, or from its 0.5th percentile where that is below 0, to its
            99.5th percentile, since a few peaks would leave the rest dark; `shared` does so over all maps shown, and
            the title says from where to where. A constant map has the highest colour if above 0, else the lowest.
        colors: `grey` or a colour map of kornia's.
        size: long side to resize the image to, in pixels; None leaves it.
        tile: long side of a map on the sheet, in pixels, roughly.
        arch: the network, see `VGGFeatures`.
        weights: see `vggfeat.weights.load`.

    Returns:
        A sheet with a tile for each channel, labelled by its number.

    Raises:
        InputError: an unknown layer, channel or choice, or an image that cannot be read or is too small.
        WeightsError: weights that are unavailable or do not reach the layer.
    """
    check_choice("scale", scale, ("each", "shared"))
    tile = whole_number("tile", tile)
    loaded = load(weights, arch)
    features = VGGFeatures([layer], weights=loaded)
    features.arch.layer(layer)
    tap = _tap(features, layer, load_image(image, size))
    what = f"{layer} of {features.arch.name}"
    shown = chosen(channels, count, tap.clamp_min(0).mean((1, 2)), order, what)
    values = tap[shown]
    rows = values.flatten(1) if scale == "each" else values.view(1, -1)
    low, high = _limits(rows)
    pictures = colored(((rows - low) / torch.where(high > low, high - low, 1)).view_as(values), colors)
    tiles = [enlarged(to_pil(picture), tile) for picture in pictures]
    settings = {"picture": "maps", "layer": layer, "arch": features.arch.name, "weights": features.weights}
    which = f", {len(shown)} of {len(tap)}"
    if channels is None and len(shown) < len(tap):
        which = f", the {order} {len(shown)} of {len(tap)}"
    elif channels is None:
        which = f", {order} first" * (order != "first")
    net = net_label(loaded)
    title = f"Feature maps of {layer}, {net}{which}, {tap.shape[2]}×{tap.shape[1]}"
    span = f"from {float(low):.3g} to {float(high):.3g}" if scale == "shared" else "for each map alone"
    title += f", colours {span}"
    return Sheet(tiles, [str(channel) for channel in shown], title, settings=settings | {"channels": shown})


def _tap(features: VGGFeatures, layer: str, image: Tensor) -> Tensor:
    """The layer's value (C,h,w) of an image (1,3,H,W)."""
    with torch.no_grad():
        return upcast(features(image)[layer])[0].contiguous()


def _limits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What the colours of each row span, (n,1): from 0, or the 0.5th percentile where that is below, to the 99.5th.

    To the highest value where the 99.5th percentile is no higher than the lowest colour.
    """
    n, top = rows.shape[1], rows.amax(1, keepdim=True)
    low, high = (rows.kthvalue(math.ceil(share * n), dim=1, keepdim=True).values for share in (0.005, 0.995))
    low = low.clamp_max(0)
    return low, torch.where(high > low, high, top)


def _peaks(tap: Tensor, layer: Layer, count: int) -> tuple[Tensor, Tensor]:
    """The highest local maxima of each channel: values (C,k), -inf where there are fewer, and rows and columns (C,k,2).

    A maximum is local if nothing within half a receptive field is higher; of equal ones, the first counts. Silent
    units, at 0, never count; units that see beyond the image's border, which alone drives many, only if there are no
    others.
    """
    reach = max(1, math.ceil(layer.receptive_field / layer.stride / 2))
    edge = math.ceil((layer.receptive_field / layer.stride - 1) / 2)
    tap = tap.masked_fill(tap == 0, -math.inf)  # a plateau of zeros would be a maximum
    if min(tap.shape[1:]) > 2 * edge:
        inside = tap[:, edge : tap.shape[1] - edge, edge : tap.shape[2] - edge]
        others = inside.amax((1, 2), keepdim=True) > -math.inf
        tap = torch.where(others, F.pad(inside, (edge, edge, edge, edge), value=-math.inf), tap)
    where = F.max_pool2d(tap[None], 2 * reach + 1, 1, reach, return_indices=True)[1]
    flat = tap.flatten(1)
    flat = flat.masked_fill(where[0].flatten(1) != torch.arange(flat.shape[1], device=flat.device), -math.inf)
    values, places = flat.topk(min(count, flat.shape[1]))
    return values, torch.stack([places // tap.shape[2], places % tap.shape[2]], dim=-1)


def _crop(image: Tensor, layer: Layer, row: int, column: int) -> Tensor:
    """What the unit at that position sees of the image (1,3,H,W): (1,3,r,r), grey beyond the border.

    The first pixel it sees is at row·stride + (stride - r) / 2: a unit is centred on its stride's cell.
    """
    r, s = layer.receptive_field, layer.stride
    top, left = row * s + (s - r) // 2, column * s + (s - r) // 2
    height, width = image.shape[2:]
    # negative padding crops
    return F.pad(image, (-left, left + r - width, -top, top + r - height), value=0.5)


def _mosaic(crops: list[Image.Image], count: int, side: int) -> Image.Image:
    """Up to `count` pictures with sides of `side` in a square, one pixel apart, empty places white."""
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    picture = Image.new("RGB", (across * (side + 1) - 1, down * (side + 1) - 1), "white")
    for i, crop in enumerate(crops):
        picture.paste(crop, (i % across * (side + 1), i // across * (side + 1)))
    return picture

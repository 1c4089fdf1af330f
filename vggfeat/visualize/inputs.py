"""What the functions of `vggfeat.visualize` take: images, channels, layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vggfeat.errors import InputError, check_choice, whole_number
from vggfeat.image import ImageLike, as_picture, fit, resize, to_tensor


def load_image(image: ImageLike, size: int | None = None) -> Tensor:
    """A file, PIL image or tensor (1,3,H,W) or (3,H,W) in [0,1], as (1,3,H,W), its long side at `size` pixels.

    Raises:
        ImageError: a file that cannot be read.
        InputError: anything else, a tensor that is not an image in [0,1], or a size that is no whole number from 1.
    """
    picture = as_picture(image)  # also checks a tensor
    if size is not None:
        return to_tensor(resize(picture, *fit(picture.width, picture.height, whole_number("size", size))))
    if isinstance(image, Tensor):  # without going through 8 bits
        return image.detach().reshape(1, *image.shape[-3:]).to("cpu", torch.float32)
    return to_tensor(picture)


def chosen(channels: int | Sequence[int] | None, count: int, strength: Tensor, order: str, what: str) -> list[int]:
    """Which channels are shown: those named, else up to `count` in `order`, `first` or `strongest`.

    Raises:
        InputError: an unknown channel or order, or a count below 1.
    """
    total = len(strength)
    if channels is not None:
        channels = [channels] if isinstance(channels, int) else channels
        channels = [whole_number("a channel", channel, least=0) for channel in channels]
        if not channels:
            raise InputError("no channel asked for: name at least one")
        if bad := [c for c in channels if c >= total]:
            raise InputError(f"{what} has channels 0 to {total - 1}, got {', '.join(map(str, bad))}")
        return channels
    count = whole_number("count", count)
    check_choice("order", order, ("strongest", "first"))
    if order == "first":
        return list(range(min(count, total)))
    return strength.argsort(descending=True, stable=True)[:count].tolist()

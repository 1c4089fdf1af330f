"""Training batches: shuffled, cropped, mirrored and blanked on the device.

A set that is in memory is kept on the device as one uint8 tensor, and a batch of crops is one gather from it: no worker
processes. Other sets are read image by image, by workers, in every epoch.

All random draws depend on the seed, the epoch and the step alone. So a resumed run sees what the unbroken one would
have seen, and each of several processes draws for the whole batch and keeps its own part. They are drawn on the CPU and
copied to the device without synchronising with it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vggfeat.devices import triton_kernels
from vggfeat.errors import ImageError, InputError, RunError, optional
from vggfeat.training.config import TrainConfig
from vggfeat.training.data import LEAVE_OUT, ImageSet
from vggfeat.training.distributed import World
from vggfeat.training.readers import Readers, scaled
from vggfeat.weights import IMAGENET

TRIES = 1000  # images drawn in the place of one that cannot be read
OPERATIONS = 200  # of TrivialAugment, drawn for a set in memory in each epoch: images that share one go in one call
_FILL = tuple(round(255 * value) for value in IMAGENET.mean)  # what is nearest to 0 once it is normalised


class Batch(NamedTuple):
    """Images (n,3,size,size) float32, normalised, channels_last, and labels (n,), both on the device."""

    images: Tensor
    labels: Tensor


def seeded(*numbers: int) -> torch.Generator:
    """A generator on the CPU whose stream depends on these numbers alone."""
    mixed = 0
    for number in numbers:  # splitmix64 (Steele et al. 2014): neighbouring steps get unrelated streams
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return torch.Generator().manual_seed(mixed % 2**63)


def split_holdout(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """A stratified split into training and held-out images, the same whichever of them can be read.

    Raises:
        InputError: a share that holds out no image, or leaves none of a class that can be read to train on.
    """
    everything = images.everything
    members: list[list[int]] = [[] for _ in images.classes]
    for i in torch.randperm(len(everything), generator=seeded(seed, -2), device="cpu").tolist():
        members[everything[i][1]].append(i)
    held = {i for mine in members for i in mine[: min(round(share * len(mine)), len(mine) - 1)]}
    train, test = (
        _part(images, [row for i, row in enumerate(everything) if (i in held) == wanted]) for wanted in (False, True)
    )
    if not len(test):
        raise InputError(f"holdout {share} of {len(images)} images sets aside no image: raise it")
    if lost := set(images.labels.tolist()) - set(train.labels.tolist()):
        name = images.classes[min(lost)]
        raise InputError(f"holdout {share} leaves no image of class {name} that can be read to train on: lower it")
    train.others = images.others  # of one part, so that they are reported once
    return train, test


def _part(images: ImageSet, rows: list[tuple[str, int, int]]) -> ImageSet:
    """The images of some rows of `ImageSet.everything`."""
    numbers = sorted(number for *_, number in rows if number >= 0)
    part = images.subset(torch.tensor(numbers, dtype=torch.int64, device="cpu"))
    part.skipped = {name: label for name, label, number in rows if number < 0}
    return part


def normalised(pixels: Tensor) -> Tensor:
    """uint8 (N,H,W,3) to float32 (N,3,H,W), channels_last, by ImageNet's mean and standard deviation.

    All of vggfeat's networks see images so, whatever they were trained on: saved weights then work anywhere.
    """
    mean, std = _convention(pixels.device)
    return pixels.float().sub_(mean).div_(std).permute(0, 3, 1, 2)


@functools.cache
def _convention(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device) * 255 for values in (IMAGENET.mean, IMAGENET.std)
    )
    return mean, std


def scale_for(size: int) -> int:
    """The shorter side that images of several sizes are brought to before crops of `size` are taken: 256 for 224."""
    return size * 8 // 7


def transforms() -> Any:
    """The module `transforms.v2` of torchvision.

    Raises:
        DependencyError: torchvision is missing or does not work.
    """
    return optional(
        "torchvision.transforms.v2",
        "this needs torchvision, which does not work here: pip install torch torchvision brings two that fit",
    )


class Batches:
    """The training batches of a set, as a configuration says.

    Args:
        images: the training set.
        config: the settings.
        size: side of the crops.
        world: the processes, each of which gets an equal part of every batch, on its device.

    Attributes:
        steps: batches of an epoch; the images left over are skipped, different ones in each.
        sides: what the shorter side of an image is scaled to before it is cropped; of several, a random one.
        skipped: images that could not be read during training, and why.
        extra: 1 where each part begins with the image before this process' own, which is mixed in, then dropped.

    Raises:
        InputError: fewer images than a batch, a batch size that does not divide, or images smaller than the crops.
        DependencyError: a set that does not fit into memory, or `augment`, where torchvision does not work.
    """

    def __init__(self, images: ImageSet, config: TrainConfig, size: int, world: World) -> None:
        parts = world.size * config.accumulate
        if config.batch_size % parts:
            raise InputError(f"batch_size {config.batch_size} is not divisible by {parts} (processes × accumulate)")
        if len(images) < config.batch_size:
            fewer = parts * max(1, len(images) // 8 // parts)
            raise InputError(
                f"{images.label} has {len(images)} images, fewer than batch_size {config.batch_size}: "
                f"lower batch_size, for instance to {fewer}"
            )
        if config.cutout >= size:
            raise InputError(f"cutout {config.cutout} can blank crops of {size} pixels whole: lower it")
        self.images, self.config, self.device, self.size = images, config, world.device, size
        # every process takes a piece of each part, so that parts do not depend on the number of processes
        places = torch.arange(config.batch_size, device="cpu").view(config.accumulate, -1)
        own = torch.arange(places.shape[1], device="cpu").view(world.size, -1)[world.rank]
        self.extra = int(world.size > 1 and bool(config.mixup or config.cutmix))
        if self.extra:  # which mix each image with the one before it
            own = torch.cat([own[:1] - 1, own])
        self.own = places[:, own].flatten()
        self.part = len(own)
        self.steps = len(images) // config.batch_size
        self.skipped: set[str] = set()
        self.labels = images.labels.to(self.device)
        self.pixels = None if images.pixels is None else images.pixels.to(self.device).contiguous()
        self.readers: Readers | None = None
        self.operation = _trivial_augment() if config.augment == "trivialaugment" else None
        self.sides = (images.side,) if self.pixels is not None else config.resize or (scale_for(size),)
        if self.pixels is None:
            if self.sides[0] + 2 * config.pad < size:
                raise InputError(f"resize {self.sides[0]} with pad {config.pad} is smaller than size {size}")
            self.readers = Readers(_Crops(images, config, self.sides, size), config.workers, _stacked)
        else:
            height, width = self.pixels.shape[1:3]
            if min(height, width) + 2 * config.pad < size:
                raise InputError(
                    f"images of {width}×{height} with pad {config.pad} are smaller than size {size}: set resize"
                )
        self.kernels: Any = None
        if triton_kernels(self.device, torch.float32):
            from vggfeat.training import kernels

            self.kernels = kernels
        # which images are mirrored in even epochs, and which in odd ones
        self.turns = torch.rand(len(images), generator=seeded(config.seed), device="cpu") < 0.5

    def epoch(self, epoch: int, first: int = 0) -> Iterator[list[Batch]]:
        """The batches of an epoch from step `first` on, each as its `accumulate` parts.

        Raises:
            RunError: an image that cannot be read; with `bad_images="skip"` only where no other takes its place.
        """
        order = torch.randperm(len(self.images), generator=seeded(self.config.seed, epoch), device="cpu")
        chosen = order[: self.steps * self.config.batch_size].view(self.steps, -1)[:, self.own]  # (steps,n)
        steps = range(first, self.steps)
        if self.pixels is None:
            assert self.readers is not None
            batches = self._read(self.readers, chosen, epoch, steps)
        else:
            batches = self._gathered(self._altered(self.pixels, epoch), chosen, epoch, steps)
        for numbers, images in batches:
            images = images.contiguous(memory_format=torch.channels_last)
            labels = self.labels[numbers.to(self.device, non_blocking=True)]
            yield [Batch(*part) for part in zip(images.split(self.part), labels.split(self.part), strict=True)]

    def _altered(self, pixels: Tensor, epoch: int) -> Tensor:
        """The set in memory, or, if there are random operations, a second one with one of these on each image."""
        if self.operation is None:
            return pixels
        order = torch.randperm(len(pixels), generator=seeded(self.config.seed, epoch, -1), device="cpu")
        altered = torch.empty_like(pixels)
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(seeded(self.config.seed, epoch, -2).get_state())  # which torchvision draws from
            for group in order.to(self.device).split(max(1, len(pixels) // OPERATIONS)):
                altered[group] = self.operation(pixels[group].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return altered

    def _gathered(self, pixels: Tensor, chosen: Tensor, epoch: int, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        config, sides = self.config, pixels.shape[1:3]
        for step in steps:
            numbers, generator = chosen[step], seeded(config.seed, epoch, step, 0)
            tops, lefts = (
                _drawn(-config.pad, side + config.pad - self.size + 1, (config.batch_size,), generator)[self.own]
                for side in sides
            )  # beyond the border where there is padding
            flips, corners = self._augmentation(numbers, epoch, step)
            if self.kernels is None:
                yield numbers, self._augmented(self._cropped(pixels, numbers, tops, lefts), flips, corners)
                continue
            drawn = torch.stack([numbers, tops, lefts, flips.long(), *corners]).to(self.device, non_blocking=True)
            zeros, convention = config.pad_mode == "zeros", _convention(pixels.device)
            yield numbers, self.kernels.crops(pixels, drawn, self.size, config.cutout, zeros, *convention)

    def _cropped(self, pixels: Tensor, numbers: Tensor, tops: Tensor, lefts: Tensor) -> Tensor:
        """Crops of images in memory, normalised."""
        height, width = pixels.shape[1:3]
        span = torch.arange(self.size, device=self.device)
        rows, columns = (first.to(self.device, non_blocking=True)[:, None] + span for first in (tops, lefts))
        places = _reflected(rows, height)[:, :, None], _reflected(columns, width)[:, None]
        images = normalised(pixels[numbers.to(self.device, non_blocking=True)[:, None, None], *places])
        if self.config.pad and self.config.pad_mode == "zeros":
            inside = _inside(rows, height)[:, :, None] & _inside(columns, width)[:, None]
            images = images * inside[:, None]
        return images

    def _read(self, readers: Readers, chosen: Tensor, epoch: int, steps: range) -> Iterator[tuple[Tensor, Tensor]]:
        config = self.config
        plan = [[(i, (config.seed, epoch, i)) for i in chosen[step].tolist()] for step in steps]
        for step, (numbers, crops, bad) in zip(steps, readers.read(plan), strict=True):
            if crops is None:
                if config.bad_images == "fail":
                    raise RunError(f"{bad[0]}; {LEAVE_OUT}")
                raise RunError(f"of {TRIES} images drawn none can be read, such as {bad[0]}")
            self.skipped.update(bad)
            images = normalised(crops.to(self.device, non_blocking=True))
            yield numbers, self._augmented(images, *self._augmentation(numbers, epoch, step))

    def _augmentation(self, numbers: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Draw what needs only the crops themselves: which are mirrored (n,), and corners of blanked squares (2,n)."""
        config = self.config
        generator = seeded(config.seed, epoch, step, 1)
        flips = (torch.rand(config.batch_size, generator=generator, device="cpu") < 0.5)[self.own]
        if config.flip == "alternating":
            flips = self.turns[numbers] ^ bool(epoch % 2)
        elif config.flip == "none":
            flips = torch.zeros_like(flips)
        corners = _drawn(0, self.size, (2, config.batch_size), generator)[:, self.own] - config.cutout // 2
        return flips, corners

    def _augmented(self, images: Tensor, flips: Tensor, corners: Tensor) -> Tensor:
        """Mirror and blank."""
        if self.config.flip != "none":
            images = torch.where(flips.to(self.device, non_blocking=True)[:, None, None, None], images.flip(3), images)
        if self.config.cutout:
            span = torch.arange(self.size, device=self.device)
            rows, columns = (
                _inside(span - corner.to(self.device, non_blocking=True)[:, None], self.config.cutout)
                for corner in corners
            )
            images = images.masked_fill((rows[:, :, None] & columns[:, None])[:, None], 0.0)
        return images


def _trivial_augment() -> Any:
    """A random operation on an image, or the same on several (…,3,H,W) uint8."""
    return transforms().TrivialAugmentWide()


def _drawn(low: int, high: int, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, size, generator=generator, device="cpu")


def _inside(lines: Tensor, side: int) -> Tensor:
    return (lines >= 0) & (lines < side)


def _reflected(lines: Tensor, side: int) -> Tensor:
    """Row or column numbers, mirrored at the border if beyond it, by up to one side's length."""
    return (side - 1 - (side - 1 - lines.abs()).abs()).clamp(0, side - 1)


class _Crop(NamedTuple):
    """A crop of an image: its number, uint8 (size,size,3) or None, and what could not be read before it."""

    number: int
    pixels: Tensor | None
    bad: list[str]


def _stacked(crops: list[_Crop]) -> tuple[Tensor, Tensor | None, list[str]]:
    """Numbers and crops as one tensor each, None if a crop is missing, and what could not be read."""
    there = [crop.pixels for crop in crops if crop.pixels is not None]
    return (
        torch.tensor([crop.number for crop in crops], device="cpu"),
        torch.stack(there) if len(there) == len(crops) else None,
        [message for crop in crops for message in crop.bad],
    )


class _Crops(Dataset[Any]):
    """Images read one by one, scaled and cropped at random.

    In place of one that cannot be read comes another of the set, drawn by the same seed in whichever process reads it,
    so that batches keep their size and do not depend on the number of processes.
    """

    def __init__(self, images: ImageSet, config: TrainConfig, resize: tuple[int, ...], size: int) -> None:
        v2 = transforms()
        mode = {"zeros": "constant", "reflect": "reflect"}[config.pad_mode]
        self.images, self.tries = images, 1 if config.bad_images == "fail" else TRIES
        self.shorter = range(resize[0], resize[-1] + 1)
        crop = [v2.RandomCrop(size, padding=config.pad or None, padding_mode=mode, fill=_FILL), v2.PILToTensor()]
        first = [_trivial_augment()] if config.augment == "trivialaugment" else []
        self.transform = v2.Compose(first + crop)

    def __getitem__(self, item: tuple[int, tuple[int, ...]]) -> _Crop:
        (number, seeds), bad = item, []
        for attempt in range(self.tries):
            if attempt:
                number = int(_drawn(0, len(self.images), (), seeded(*seeds, attempt, 0)))
            try:
                image = self.images.read(number)
            except ImageError as error:
                bad.append(str(error))
                continue
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(seeded(*seeds).get_state())  # torchvision draws from the global generator
                # not its RandomShortestSize, which can end a pixel short
                shorter = self.shorter[int(torch.randint(len(self.shorter), (), device="cpu"))]
                return _Crop(number, self.transform(scaled(image, shorter)).permute(1, 2, 0), bad)
        return _Crop(number, None, bad)

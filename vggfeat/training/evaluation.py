"""How good a classifier is: top-1, top-5, by class, confusions; by one view of each image or the paper's many."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from vggfeat.arch import MIN_SIDE
from vggfeat.devices import autocast_dtype
from vggfeat.errors import InputError, RunError, check_choice, whole_number
from vggfeat.files import PathLike
from vggfeat.network import VGG, eval_mode, network_from_weights
from vggfeat.settings import PRECISIONS
from vggfeat.tables import Column, Report, Table
from vggfeat.training.batches import normalised, scale_for, split_holdout
from vggfeat.training.config import TrainConfig, Views
from vggfeat.training.data import LEAVE_OUT, ImageSet, hashed, load_test_images
from vggfeat.training.distributed import World, all_reduce_sum, process_group
from vggfeat.training.readers import Readers, ScaledImages, reader_errors
from vggfeat.weights import WeightsLike, load, run_metadata

_percent = "{:.2f} %".format


@dataclass(frozen=True, repr=False)
class Evaluation(Report):
    """Results of a test.

    Attributes:
        images: how many were tested.
        loss: mean cross-entropy of the averaged probabilities.
        top1: share of images whose class has the highest probability.
        top5: share of images whose class is among the five highest; None with five classes or fewer.
        classes: their names.
        confusion: for each true class, how many images were taken for each class.
        views: views of each image.
        skipped: names of images that could not be read.
        data: what was tested on, as a person calls it.
    """

    images: int
    loss: float
    top1: float
    top5: float | None
    classes: list[str]
    confusion: list[list[int]]
    views: int
    skipped: list[str] = field(default_factory=list)
    data: str = ""

    @property
    def by_class(self) -> list[float | None]:
        """Share of each class' images that were recognised; None for a class without images."""
        return [row[i] / sum(row) if sum(row) else None for i, row in enumerate(self.confusion)]

    def tables(self) -> list[Table]:
        """Accuracy of each class, and of all."""
        columns = [
            Column("class", "class", left=True),
            Column("images", "images"),
            Column("accuracy", "accuracy", lambda v: _percent(100 * v)),
            Column("mistaken_for", "most often mistaken for", left=True),
        ]
        rows = []
        for i, (name, row, share) in enumerate(zip(self.classes, self.confusion, self.by_class, strict=True)):
            wrong = [0 if j == i else count for j, count in enumerate(row)]
            worst = max(range(len(row)), key=wrong.__getitem__)
            rows.append((name, sum(row), share, f"{self.classes[worst]} ({wrong[worst]})" if wrong[worst] else None))
        total = [
            *([("tested on", self.data)] if self.data else []),
            ("images", f"{self.images:,}"),
            ("views of each", str(self.views)),
            ("top-1", _percent(100 * self.top1)),
            ("top-5", None if self.top5 is None else _percent(100 * self.top5)),
            ("cross-entropy", f"{self.loss:.4f}"),
            *([("not readable", str(len(self.skipped)))] if self.skipped else []),
        ]
        sums = [Column("measure", "measure", left=True), Column("value", "value")]
        return [Table("By class", columns, rows), Table("All", sums, total)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; accuracies are shares from 0 to 1."""
        names = ("data", "images", "views", "top1", "top5", "loss", "classes", "by_class", "confusion", "skipped")
        return {name: getattr(self, name) for name in names}


def evaluate(
    weights: VGG | WeightsLike,
    data: PathLike | ImageSet,
    views: Views | None = None,
    *,
    arch: str | None = None,
    batch_size: int = 256,
    precision: str = "auto",
    device: str = "auto",
    bad_images: str = "fail",
    workers: int = 2,
) -> Evaluation:
    """Test a classifier.

    Args:
        weights: a network, or what `vggfeat.weights.load` knows with a classifier in it, such as a run's folder.
        data: what `vggfeat.load_images` knows: its test set where it has one, else the one for validation, else all of
            it; or one set that it gave. Of the set that a run was trained on with a share held out, only that share.
        views: what is seen of each image; one centre crop by default, of the size and scale that a run of `train` was
            tested at.
        arch: the network, where the weights do not say.
        batch_size: images at a time.
        precision: `auto`, `float32` or `bfloat16`.
        device: `auto`, or a torch device.
        bad_images: `fail` at an image that cannot be read, or `skip` it.
        workers: processes that read images which do not fit into memory.

    Returns:
        The report; it prints as tables.

    Raises:
        InputError: data that cannot be read, another number of classes than the weights', or images that are too small.
        WeightsError: weights that are unavailable or have no classifier.
        RunError: an image that cannot be read on the way, with `bad_images="fail"`, none that can, or scores that are
            not finite.
    """
    if not isinstance(views, Views | None):
        raise InputError(f"views must be a Views, such as vggfeat.Views(flip=True), got {type(views).__name__}")
    batch_size, workers = whole_number("batch_size", batch_size), whole_number("workers", workers, least=0)
    check_choice("bad_images", bad_images, TrainConfig.CHOICES["bad_images"])
    check_choice("precision", precision, PRECISIONS)
    names, held, views = None, None, views or Views()
    if isinstance(weights, VGG):
        net = weights
    else:
        if isinstance(weights, str | os.PathLike):
            facts = run_metadata(weights)
            names, held = facts.get("classes"), facts.get("holdout")
            if "size" in facts and views.size is None:
                size = None if views.dense else facts["size"]
                views = replace(views, size=size, scales=views.scales or facts["scales"])
        net = network_from_weights(load(weights, arch)).to(memory_format=torch.channels_last)
    if not isinstance(data, ImageSet):
        data = load_test_images(data, bad_images=bad_images)
    if len(data.classes) != net.num_classes:
        found = f"one class, {data.classes[0]}" if len(data.classes) == 1 else f"{len(data.classes)} classes"
        raise InputError(
            f"{data.label} has {found}, the network {net.num_classes}: test it on the classes that it was trained for"
        )
    if names is not None and names != data.classes:
        i = next(i for i, pair in enumerate(zip(names, data.classes, strict=True)) if pair[0] != pair[1])
        raise InputError(
            f"class {i} is {data.classes[i]!r} in {data.label} and {names[i]!r} in the weights: the classes differ"
        )
    if held is not None and (rest := _held_out(data, **held)) is not None:
        data = rest
    with process_group(device) as world:
        home = next(net.parameters()).device
        dtype = autocast_dtype(precision, world.device)
        try:
            readers = Readers(ScaledImages(data.read), workers)
            with eval_mode(net.to(world.device)), closing(readers), reader_errors():
                return evaluate_network(net, data, views, world, dtype, batch_size, bad_images, readers)
        finally:
            net.to(home)


def place_of(label: str) -> str:
    """A hash of a set's location, however its path is written, which does not reveal that location."""
    return hashed(os.path.realpath(label))


def _held_out(images: ImageSet, share: float, seed: int, digest: str, data: str, sizes: str | None) -> ImageSet | None:
    """The part of a training set that a run had set aside, and says so; None where this is another set.

    Names decide, since a copy may have been converted; where files differ in size, that is said.
    """
    with contextlib.suppress(InputError):  # too few to be split
        rest = split_holdout(images, share, seed)[1]
        if rest.digest == digest:
            by = "" if sizes in (None, rest.sizes) else ", by the names of its files, whose sizes differ"
            return replace(rest, label=f"{images.label}, what was held out{by}")
    if data == place_of(images.label):
        raise InputError(
            f"{images.label} is what the run was trained on, but its images have changed: which were held out is "
            "not known any more; test it on other images"
        )
    return None


@torch.inference_mode()
def evaluate_network(
    net: VGG,
    images: ImageSet,
    views: Views,
    world: World,
    dtype: torch.dtype,
    batch_size: int,
    bad_images: str,
    readers: Readers,
) -> Evaluation:
    """Test a network that is on `world.device`; every image once, shared among the processes."""
    size = views.size or images.side
    scales: tuple[int | None, ...] = views.scales or (None if images.pixels is not None else scale_for(size),)
    net.eval()
    scores = torch.zeros(len(images), net.num_classes, dtype=torch.float32, device=world.device)
    own = torch.arange(len(images), device="cpu")[world.rank :: world.size]
    missing = torch.zeros(len(images), device=world.device)
    count = 0
    with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
        for scale in scales:
            count += (1 if views.dense else views.grid**2) * (2 if views.flip else 1)
            for numbers, pixels in _read(images, own, scale, batch_size, readers, bad_images):
                if pixels is None:
                    missing[numbers] = 1
                    continue
                whole = normalised(pixels.to(world.device))
                for seen in (whole, whole.flip(3)) if views.flip else (whole,):
                    if views.dense:
                        scores[numbers] += net.dense(seen).float().mean((2, 3)).softmax(1)
                        continue
                    for crop in _crops(seen, size, views.grid, images.label):
                        crop = crop.contiguous(memory_format=torch.channels_last)
                        scores[numbers] += net(crop).float().softmax(1)
    all_reduce_sum(scores, world)
    all_reduce_sum(missing, world)
    if not scores.isfinite().all():
        raise RunError("the network's scores are not finite: its weights are damaged, or precision float16 overflows")
    good = (missing == 0).cpu()
    if not good.any():
        raise RunError(f"no image of {images.label} could be read")
    labels, scores = images.labels[good], scores.cpu()[good] / count
    skipped = [*images.skipped] + [images.names[i] for i in (~good).nonzero().flatten().tolist()]
    return replace(_metrics(labels, scores, images.classes, count, skipped), data=images.label)


def _metrics(labels: Tensor, scores: Tensor, classes: list[str], views: int, skipped: list[str]) -> Evaluation:
    n = len(classes)
    top = scores.topk(min(5, n), dim=1).indices == labels[:, None]
    confusion = torch.bincount(labels * n + scores.argmax(1), minlength=n * n).view(n, n)
    loss = F.nll_loss(scores.clamp_min(torch.finfo(scores.dtype).tiny).log(), labels)
    return Evaluation(
        images=len(labels),
        loss=loss.item(),
        top1=confusion.trace().item() / len(labels),
        top5=top.any(1).double().mean().item() if n > 5 else None,
        classes=classes,
        confusion=confusion.tolist(),
        views=views,
        skipped=skipped,
    )


def _crops(images: Tensor, size: int, grid: int, label: str) -> Iterator[Tensor]:
    """Crops of (n,3,H,W) on a regular grid that reaches the borders; for `grid` 1 the centre."""
    height, width = images.shape[2:]
    if size < MIN_SIDE:
        raise InputError(
            f"images of {label} at {size} pixels are smaller than {MIN_SIDE}, five pools' stride: set size and scales"
        )
    if min(height, width) < size:
        raise InputError(f"images of {label} are {width}×{height}, smaller than size {size}: scale them up with scales")
    tops, lefts = (
        [(side - size) // 2] if grid == 1 else [round(i * (side - size) / (grid - 1)) for i in range(grid)]
        for side in (height, width)
    )
    for top in tops:
        for left in lefts:
            yield images[:, :, top : top + size, left : left + size]


def _read(
    images: ImageSet, own: Tensor, scale: int | None, batch_size: int, readers: Readers, bad_images: str
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Numbers and (n,H,W,3) uint8 of the images, `batch_size` at a time or as many of one size as there are in them.

    Those that cannot be read come one at a time, with None.
    """
    if images.pixels is not None and scale in (None, images.side):
        for numbers in own.split(batch_size):
            yield numbers, images.pixels[numbers]
        return
    plan = [[(number, scale) for number in numbers.tolist()] for numbers in own.split(batch_size)]
    for items, read in zip(plan, readers.read(plan), strict=True):
        shapes: dict[tuple[int, ...], list[tuple[int, Any]]] = {}
        for (number, _), pixels in zip(items, read, strict=True):
            if not isinstance(pixels, str):
                shapes.setdefault(pixels.shape, []).append((number, pixels))
            elif bad_images == "fail":
                raise RunError(f"{pixels}; {LEAVE_OUT}")
            else:
                yield torch.tensor([number], device="cpu"), None
        for group in shapes.values():
            chosen, pixels = zip(*group, strict=True)
            # by NumPy: torch's copy would take threads from the processes that read
            yield torch.tensor(chosen, device="cpu"), torch.from_numpy(numpy.stack(pixels))

"""What exercises 2 and 9 share: images from zips, or gratings made here; a short recipe; a plot of how it went."""

import math
import sys
import time
import zipfile
from pathlib import PurePosixPath
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from vggfeat.errors import InputError
from vggfeat.plots import check_plot
from vggfeat.tables import written

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Data(NamedTuple):
    images: Tensor  # (N,3,H,W) uint8
    labels: Tensor  # (N,)
    classes: list[str]


class Epoch(NamedTuple):
    loss: float  # mean over the training images, label smoothing included
    accuracy: float  # on the test images
    seconds: float  # of training, without the test


def load(zips, limit, seed=0):
    """Training and test set from two zips of `…/<class>/*.jpg`, at most `limit` images each (0: all), or gratings."""
    if limit < 0:
        raise InputError(f"--limit must be at least 0, got {limit}")
    if not zips:
        return gratings(limit or 2000, seed), gratings(max(limit // 2, 200) if limit else 1000, seed + 1)
    if len(zips) != 2:
        raise InputError(f"expected two zips, TRAIN.zip and TEST.zip, or none for made-up images; got {len(zips)}")
    train, test = (read_zip(path, limit, seed) for path in zips)
    if train.classes != test.classes or train.images.shape[1:] != test.images.shape[1:]:
        raise InputError(f"{zips[0]} and {zips[1]} differ in their classes or image sizes: give two parts of one set")
    return train, test


def read_zip(path, limit=0, seed=0):
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png")))
            classes = sorted({PurePosixPath(name).parent.name for name in names})
            if limit:
                order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
                names = [names[i] for i in order[:limit]]
            pixels, sizes = bytearray(), set()
            for name in names:
                with archive.open(name) as file, Image.open(file) as image:
                    pixels += image.convert("RGB").tobytes()
                    sizes.add(image.size)
    except (OSError, zipfile.BadZipFile) as error:  # a damaged picture is an OSError, too
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(sizes) != 1 or len(classes) < 2:
        raise InputError(f"{path}: expected <class>/*.jpg of one size, got {len(classes)} classes, {len(sizes)} sizes")
    ((width, height),) = sizes
    images = torch.frombuffer(pixels, dtype=torch.uint8).view(len(names), height, width, 3).permute(0, 3, 1, 2)
    labels = torch.tensor([classes.index(PurePosixPath(name).parent.name) for name in names])
    return Data(images.to(DEVICE), labels.to(DEVICE), classes)


def gratings(count, seed, size=32):
    """Ten classes, five slants by two periods, in any phase and colours; a mirrored slant is the same class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    angle = (labels % 5) * math.pi / 8 * (2 * torch.randint(2, (count,), generator=generator) - 1)
    x, y = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy")
    way = x * angle.cos().view(-1, 1, 1, 1) + y * angle.sin().view(-1, 1, 1, 1)  # (N,1,H,W)
    phase, noise = (
        torch.rand(count, 1, 1, 1, generator=generator),
        torch.randn(count, 3, size, size, generator=generator),
    )
    wave = (2 * math.pi * (way / (4 + 4 * (labels // 5)).view(-1, 1, 1, 1) + phase)).sin()
    mean, contrast = torch.rand(2, count, 3, 1, 1, generator=generator)
    images = (mean + 0.4 * (contrast - 0.5) * wave + 0.1 * noise).clamp(0, 1).mul(255).byte()
    return Data(images.to(DEVICE), labels.to(DEVICE), [f"{22.5 * (n % 5):g}°/{4 + 4 * (n // 5)}px" for n in range(10)])


def augment(images, generator, pad=4):
    """A crop of every image, moved by up to `pad` pixels, half of them mirrored; comes out in channels_last."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    down, right = (torch.randint(2 * pad + 1, (2, n, 1), generator=generator)).to(images.device)
    rows, columns = (torch.arange(side, device=images.device) for side in (height, width))
    mirrored = torch.rand(n, 1, generator=generator).to(images.device) < 0.5
    rows, columns = down + rows, right + torch.where(mirrored, columns.flip(0), columns)
    which = torch.arange(n, device=images.device).view(n, 1, 1)
    return padded[which, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def fit(label, net, train, test, epochs, lr, batch, seed=0):
    """Train by SGD with momentum and one cycle of the learning rate, up to `lr`; one `Epoch` for each."""
    if min(epochs, batch - 1, lr) <= 0 or len(train.labels) < 2:
        raise InputError("expected at least one epoch, two images a batch, two images and a learning rate above 0")
    net = net.to(DEVICE, memory_format=torch.channels_last)
    sample = train.images[:: max(1, len(train.labels) // 2000)].float()
    mean, std = sample.mean((0, 2, 3), keepdim=True), sample.std((0, 2, 3), keepdim=True)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = max(1, len(train.labels) // batch)  # a last batch that is not full is left out
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps)
    generator, history = torch.Generator().manual_seed(seed), []
    for number in range(1, epochs + 1):
        start, total = time.perf_counter(), 0.0
        net.train()
        for chosen in torch.randperm(len(train.labels), generator=generator).split(batch)[:steps]:
            images = augment((train.images[chosen].float() - mean) / std, generator)
            loss = F.cross_entropy(net(images), train.labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        seconds, right = time.perf_counter() - start, 0
        net.eval()
        with torch.inference_mode():
            for images, labels in zip(test.images.split(256), test.labels.split(256), strict=True):
                images = ((images.float() - mean) / std).contiguous(memory_format=torch.channels_last)
                right += int((net(images).argmax(1) == labels).sum())
        history.append(Epoch(total / steps, right / len(test.labels), seconds))
        print(f"{label}: epoch {number} of {epochs}, loss {total / steps:.3f}", file=sys.stderr)
    return history


def draw(runs, path):
    """Loss and accuracy of each run (a name and its `Epoch`s) by epoch."""
    from matplotlib.figure import Figure

    path = check_plot(path, overwrite=True)
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, field in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for label, history in runs.items():
            axes.plot(range(1, len(history) + 1), [getattr(epoch, field) for epoch in history], "o-", label=label)
        axes.set(xlabel="epoch", title={"loss": "training loss", "accuracy": "test accuracy"}[field])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
    with written(path) as file:
        figure.savefig(file, format=path.suffix.lower()[1:], dpi=150)
    return path

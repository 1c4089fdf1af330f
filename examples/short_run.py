"""Shared by exercises 2 and 9: images from zips, or gratings made here, and a plain loop that trains any network."""

import math
import sys
import time

import torch
from torch.nn import functional as F

from vggfeat.devices import resolve
from vggfeat.errors import InputError
from vggfeat.training.batches import Batches, normalised
from vggfeat.training.config import TrainConfig
from vggfeat.training.data import ImageSet, load_images
from vggfeat.training.distributed import World
from vggfeat.training.folder import Epoch

DEVICE = resolve("auto")


def read(zips, limit, seed=0):
    """Training and test set: two zips of `…/<class>/*.jpg`, or gratings if there are none.

    At most `limit` images of each zip (0: all); `limit` gratings to train on, half as many, at least 200, to test.
    """
    if limit < 0:
        raise InputError(f"--limit must be at least 0, got {limit}")
    if not zips:
        return gratings(limit or 2000, seed), gratings(max(limit // 2, 200) if limit else 1000, seed + 1)
    if len(zips) != 2:
        raise InputError(f"expected two zips, TRAIN.zip and TEST.zip, or none for made-up images; got {len(zips)}")
    sets = load_images(*zips)
    for each in sets:
        if each.pixels is None:
            raise InputError(f"{each.label}: expected images of one size")
    if limit:
        order = torch.Generator().manual_seed(seed)
        sets = [each.subset(torch.randperm(len(each), generator=order)[:limit].sort().values) for each in sets]
    return sets


def gratings(count, seed, size=32):
    """Ten classes, five slants by two periods, in any phase and colour; a mirrored slant is the same class."""
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
    classes = [f"{22.5 * (n % 5):g}°/{4 + 4 * (n // 5)}px" for n in range(10)]
    names = [str(i) for i in range(count)]
    return ImageSet("gratings", classes, labels, names, None, images.permute(0, 2, 3, 1).contiguous())


def fit(label, net, train, test, epochs, lr, batch, seed=0):
    """Train by SGD with momentum and a one-cycle learning rate up to `lr`; returns an `Epoch` for each."""
    if epochs < 1 or batch < 2 or not 0 < lr < math.inf:
        raise InputError("expected at least one epoch, two images a batch and a learning rate above 0")
    size = min(train.pixels.shape[1:3])
    config = TrainConfig(batch_size=min(batch, len(train)), pad_mode="reflect", seed=seed)
    batches = Batches(train, config, size, World(DEVICE))
    net = net.to(DEVICE, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches.steps)
    history = []
    for number in range(1, epochs + 1):
        start, total, right = time.perf_counter(), 0.0, 0
        net.train()
        for ((images, labels),) in batches.epoch(number):
            scores = net(images)
            loss = F.cross_entropy(scores, labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
            right += int((scores.argmax(1) == labels).sum())
        seconds, count = time.perf_counter() - start, batches.steps * config.batch_size
        loss, accuracy = check(net, test)
        rate = schedule.get_last_lr()[0]
        means = total / batches.steps, right / count
        history.append(Epoch(number, rate, *means, loss, accuracy, None, seconds, count / seconds, 0))
        print(f"{label}: epoch {number} of {epochs}, loss {means[0]:.3f}", file=sys.stderr)
    return history


@torch.inference_mode()
def check(net, test):
    """Cross-entropy and accuracy on the test images."""
    net.eval()
    pairs = zip(test.pixels.split(256), test.labels.split(256), strict=True)
    scores = [(net(normalised(pixels.to(DEVICE))).cpu(), labels) for pixels, labels in pairs]
    loss = sum(F.cross_entropy(score, labels, reduction="sum").item() for score, labels in scores)
    right = sum(int((score.argmax(1) == labels).sum()) for score, labels in scores)
    return loss / len(test), right / len(test)

"""First part of the bundled weights: blocks 1 to 3 of a slim VGG-19 learn to see what Oxford's VGG-19 sees.

At each of the eight ReLUs a linear map M without bias takes the slim network's channels to the teacher's; it is no
parameter, but the best there is for the batch. Where it fits, a Gram matrix of the teacher is M G Mᵀ of the slim one's,
so that matching one matches the other. The loss is the relative squared error of the features plus that of the Gram
matrices. A part of every batch is pictures that the slim network itself has been made to stylise: where it is blind,
the optimiser of a style transfer puts what it cannot see, and on natural pictures alone nobody would notice.

    python examples/bundled/distill.py --out blocks123.safetensors
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import click
import torch
from data import TEACHER, crops, pictures
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vggfeat import VGGFeatures
from vggfeat.arch import Arch
from vggfeat.files import check_path
from vggfeat.functional import gram
from vggfeat.weights import IMAGENET

LAYERS = ("relu1_1", "relu1_2", "relu2_1", "relu2_2", "relu3_1", "relu3_2", "relu3_3", "relu3_4")
BATCH, SIDE = 16, 112
RIDGE = 1e-3  # relative, so that M stays small where S says nothing
OWN = 8  # of a batch are pictures from the pool
POOL, REFRESH, ANEW, EVERY, MOVES = 128, 16, 3, 10, 10


class Slim(nn.Module):
    """The slim network's blocks 1 to 3."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.arch = Arch("E", head=None, channels=(*channels, channels[-1], channels[-1]))
        self.convs = nn.ModuleList()
        for layer in self.arch.convs[: len(LAYERS)]:
            self.convs.append(nn.Conv2d(layer.in_channels, layer.channels, 3, padding=1))
        self.register_buffer("mean", torch.tensor(IMAGENET.mean)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET.std)[:, None, None])

    def forward(self, images: Tensor) -> list[Tensor]:
        """The eight ReLUs' outputs of images in [0,1]."""
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        found = []
        for conv, name in zip(self.convs, LAYERS, strict=True):
            if name in ("relu2_1", "relu3_1"):
                x = F.max_pool2d(x, 2)
            found.append(x := F.relu(conv(x)))
        return found

    def state(self, powers: list[Tensor]) -> dict[str, Tensor]:
        """torchvision's keys, each channel scaled to a mean square of 1; the next layer takes the scale out again.

        Otherwise a few strong channels are all that a Gram matrix speaks of.
        """
        state, before = {}, torch.ones(3)
        for layer, conv, power in zip(self.arch.convs, self.convs, powers, strict=False):
            scale = power.clamp_min(1e-6 * power.max()).rsqrt()
            weight = conv.weight.detach() * scale[:, None, None, None] / before[:, None, None]
            state[f"features.{layer.index}.weight"] = weight.contiguous()
            state[f"features.{layer.index}.bias"] = conv.bias.detach() * scale
            before = scale
        return state


def relative(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over images of ‖found - wanted‖² / ‖wanted‖²."""
    error = (found.float() - wanted.float()).square().flatten(1).sum(1)
    return (error / wanted.float().square().flatten(1).sum(1)).mean()


def best_map(own: Tensor, cross: Tensor) -> Tensor:
    """M of least ‖T - M S‖², from S Sᵀ and S Tᵀ."""
    ridge = torch.diag(RIDGE * own.detach().diagonal().mean().expand(len(own)))
    return torch.linalg.solve(own + ridge, cross).T


def errors(slim: Slim, teacher: VGGFeatures, images: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """For each of `LAYERS`: relative squared errors of features and of Gram matrices, and each channel's mean square.

    All of it is said by the products of the slim features S and the teacher's T, so that no mapped feature is ever
    computed: ‖T - M S‖² = tr T Tᵀ - 2 tr M S Tᵀ + tr M S Sᵀ Mᵀ, least for M = T Sᵀ (S Sᵀ)⁻¹.
    """
    with torch.no_grad():
        wanted = teacher.taps(images).values()
    with torch.autocast("cpu", torch.bfloat16):
        taps = slim(images)
    features, grams, powers = [], [], []
    for tap, target in zip(taps, wanted, strict=True):
        c = tap.shape[1]
        products = gram(torch.cat([tap, target.to(tap.dtype)], dim=1))
        powers.append(products[:, :c, :c].detach().diagonal(dim1=1, dim2=2).mean(0) * products.shape[1])
        products = products / products[:, c:, c:].diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        own, cross, goal = products[:, :c, :c], products[:, :c, c:], products[:, c:, c:]
        m = best_map(own.mean(0), cross.mean(0))
        mapped = m @ own @ m.T
        features.append(1 - 2 * (m.T * cross.mean(0)).sum() + mapped.mean(0).diagonal().sum())
        grams.append(relative(mapped, goal))
    return features, grams, powers


def choose(products: Tensor, count: int) -> list[int]:
    """The channels that leave least of all channels unexplained, taken one by one, most first (pivoted Cholesky)."""
    left, chosen = products.double().clone(), []
    for _ in range(count):
        gain = left.square().sum(0) / left.diagonal().clamp_min(1e-9 * products.diagonal().max())
        gain[chosen] = -1
        chosen.append(best := int(gain.argmax()))
        left -= left[:, best, None] * left[None, best] / left[best, best].clamp_min(1e-12)
    return chosen


@torch.no_grad()
def prune(slim: Slim, teacher: VGGFeatures, images: Tensor) -> None:
    """Begin as the teacher's best channels, each convolution behind the best guess of what is missing before it."""
    x = teacher.taps(images)
    before = torch.eye(3)
    for name, conv, layer in zip(LAYERS, slim.convs, teacher.arch.convs, strict=False):
        weight, bias = (teacher.trunk.state[f"features.{layer.index}.{part}"] for part in ("weight", "bias"))
        chosen = choose(gram(x[name]).mean(0), conv.out_channels)
        conv.weight.copy_(torch.einsum("oikl,im->omkl", weight[chosen], before))
        conv.bias.copy_(bias[chosen])
        tap = slim(images)[LAYERS.index(name)]
        c = tap.shape[1]
        products = gram(torch.cat([tap, x[name].float()], dim=1)).mean(0)
        before = best_map(products[:c, :c], products[:c, c:])


class Pool:
    """Pictures on their way from one crop to another crop's Gram matrices, as the slim network sees them."""

    def __init__(self, images: Tensor, generator: torch.Generator) -> None:
        self.images, self.generator = images, generator
        self.now = crops(images, POOL, SIDE, generator)
        self.goal = crops(images, POOL, SIDE, generator)

    def refresh(self, slim: Slim, powers: list[Tensor]) -> None:
        """Move a few on by some steps of Adam; some of them begin anew."""
        chosen = torch.randperm(POOL, generator=self.generator)[:REFRESH]
        anew = chosen[:ANEW]
        self.now[anew] = crops(self.images, len(anew), SIDE, self.generator)
        self.goal[anew] = crops(self.images, len(anew), SIDE, self.generator)
        with torch.no_grad():
            net = VGGFeatures(LAYERS, weights=slim.state(powers), precision="auto", keep="values")
            goals = [gram(tap) for tap in net.taps(self.goal[chosen]).values()]
        image = self.now[chosen].requires_grad_()
        adam = torch.optim.Adam([image], lr=0.05, betas=(0.9, 0.99))
        for _ in range(MOVES):
            taps = net.taps(image).values()
            loss = sum(relative(gram(tap), goal) for tap, goal in zip(taps, goals, strict=True))
            (image.grad,) = torch.autograd.grad(loss, image)
            adam.step()
            image.data.clamp_(0, 1)
        self.now[chosen] = image.detach()

    def draw(self, count: int) -> Tensor:
        """Some of them."""
        return self.now[torch.randperm(POOL, generator=self.generator)[:count]]


@click.command()
@click.option("--channels", default="48,96,192", show_default=True, help="Of blocks 1 to 3.")
@click.option("--steps", default=1000, show_default=True)
@click.option("--rate", default=5e-4, show_default=True, help="Adam's highest learning rate.")
@click.option("--own/--no-own", default=True, show_default=True, help="Train on what the network itself stylised, too.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(channels: str, steps: int, rate: float, own: bool, seed: int, out: Path) -> None:
    """Train blocks 1 to 3."""
    for path in (out, out.with_suffix(".csv")):
        check_path(path)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, _ = pictures("natural-224.zip")
    order = torch.randperm(len(images), generator=generator)
    test, train = images[order[:100]], images[order[100:]]
    held = crops(test, 32, SIDE, torch.Generator().manual_seed(1))
    teacher = VGGFeatures(LAYERS, weights=str(TEACHER), precision="auto")
    slim = Slim(tuple(map(int, channels.split(",")))).to(memory_format=torch.channels_last)
    prune(slim, teacher, crops(train, 48, SIDE, generator))
    optimizer = torch.optim.AdamW(slim.parameters(), lr=rate, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    pool = Pool(train, generator) if own else None
    start = time.perf_counter()
    with out.with_suffix(".csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "seconds", *LAYERS, *(f"gram {name}" for name in LAYERS), "own pictures"])
        for step in range(steps + 1):
            if step % 200 == 0 or step == steps:
                with torch.no_grad():
                    features, grams, powers = errors(slim, teacher, held)
                    mine = sum(errors(slim, teacher, pool.draw(32))[0]).item() / 8 if pool else float("nan")
                row = [
                    step,
                    round(time.perf_counter() - start),
                    *(f"{float(v):.4f}" for v in (*features, *grams, mine)),
                ]
                log.writerow(row)
                file.flush()
                print(*row, flush=True)
                save_file(slim.state(powers), out)
            if step == steps:
                break
            if pool and step and step % EVERY == 0:
                pool.refresh(slim, powers)
            batch = crops(train, BATCH, SIDE, generator)
            if pool and step:
                batch[:OWN] = pool.draw(OWN)
            features, grams, powers = errors(slim, teacher, batch)
            optimizer.zero_grad()
            (sum(features) + sum(grams)).backward()
            nn.utils.clip_grad_norm_(slim.parameters(), 1.0)
            optimizer.step()
            schedule.step()


if __name__ == "__main__":
    main()

"""Second part of the bundled weights: blocks 4 and 5, trained with labels on top of the frozen blocks 1 to 3.

Caltech-101 at 112 px and CIFAR-10 at 64 px, each with a linear classifier on the mean of pool4 and one on the mean of
pool5. Batch normalisation helps the training and is folded into the convolutions at the end, so that what is shipped is
a plain VGG-19. A fifth of Caltech-101, by position, is never trained on: `probe.py` measures there.

    python examples/bundled/deep.py --base blocks123.safetensors --out bundled.safetensors
"""

from __future__ import annotations

import csv
import time
from pathlib import Path

import click
import torch
from data import crops, pictures
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from vggfeat import VGGFeatures
from vggfeat.arch import Arch
from vggfeat.files import check_path

BATCH = {"caltech": (32, 112), "cifar": (64, 64)}


class Deep(nn.Module):
    """Blocks 4 and 5 with batch normalisation, and the classifiers."""

    def __init__(self, arch: Arch, classes: dict[str, int]) -> None:
        super().__init__()
        self.layers = [layer for layer in arch.convs if layer.name[4] in "45"]
        self.convs = nn.ModuleList(nn.Conv2d(a.in_channels, a.channels, 3, padding=1, bias=False) for a in self.layers)
        self.norms = nn.ModuleList(nn.BatchNorm2d(a.channels) for a in self.layers)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        width = self.layers[-1].channels
        self.heads = nn.ModuleDict(
            {f"{name}{block}": nn.Linear(width, count) for name, count in classes.items() for block in "45"}
        )

    def forward(self, x: Tensor, name: str) -> list[Tensor]:
        """Logits of pool4 and of pool5, from pool3."""
        found = []
        for layer, conv, norm in zip(self.layers, self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            if layer.name.endswith("_4"):
                x = F.max_pool2d(x, 2)
                found.append(self.heads[f"{name}{layer.name[4]}"](x.mean((2, 3))))
        return found

    def state(self) -> dict[str, Tensor]:
        """torchvision's keys, batch normalisation folded in."""
        state = {}
        for layer, conv, norm in zip(self.layers, self.convs, self.norms, strict=True):
            factor = norm.weight / (norm.running_var + norm.eps).sqrt()
            state[f"features.{layer.index}.weight"] = (conv.weight * factor[:, None, None, None]).detach().contiguous()
            state[f"features.{layer.index}.bias"] = (norm.bias - norm.running_mean * factor).detach()
        return state


def labelled(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and classes to train on, images and classes to test on."""
    if name == "cifar":
        return *pictures("cifar10-train.zip"), *pictures("cifar10-test.zip")
    images, labels = pictures("caltech101-128.zip")
    test = torch.arange(len(images)) % 5 == 0
    return images[~test], labels[~test], images[test], labels[test]


def batch(images: Tensor, labels: Tensor, name: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch to train on: crops, mirrored."""
    count, side = BATCH[name]
    chosen = torch.randint(len(images), (count,), generator=generator)
    if name == "cifar":
        x = F.pad(images[chosen].float() / 255, (4, 4, 4, 4))
        top, left = torch.randint(9, (2,), generator=generator).tolist()
        x = F.interpolate(x[:, :, top : top + 32, left : left + 32], size=side, mode="bilinear", align_corners=False)
        return (x.flip(3) if torch.rand((), generator=generator) < 0.5 else x), labels[chosen]
    return torch.cat([crops(images[i : i + 1], 1, side, generator) for i in chosen.tolist()]), labels[chosen]


def accuracy(base: VGGFeatures, deep: Deep, name: str, images: Tensor, labels: Tensor) -> list[float]:
    """Top-1 of both classifiers on whole pictures."""
    deep.eval()
    hits = torch.zeros(2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for x, y in zip(images.split(100), labels.split(100), strict=True):
            x = F.interpolate(x.float() / 255, size=64 if name == "cifar" else 128, mode="bilinear")
            hits += torch.stack([(out.argmax(1) == y).sum() for out in deep(base.taps(x)["pool3"], name)])
    deep.train()
    return (hits / len(images)).tolist()


@click.command()
@click.option("--base", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--channels", default="176,176", show_default=True, help="Of blocks 4 and 5.")
@click.option("--steps", default=1500, show_default=True)
@click.option("--rate", default=0.1, show_default=True, help="Highest learning rate of SGD.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
def main(base: Path, channels: str, steps: int, rate: float, seed: int, out: Path) -> None:
    """Train blocks 4 and 5."""
    for path in (out, out.with_suffix(".csv")):
        check_path(path)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    shallow = load_file(base)
    below = VGGFeatures(["pool3"], arch="vgg19", weights=shallow, precision="auto")
    arch = Arch("E", head=None, channels=(*below.arch.channels[:3], *map(int, channels.split(","))))
    data = {name: labelled(name) for name in BATCH}
    deep = Deep(arch, {name: int(found[1].max()) + 1 for name, found in data.items()})
    deep = deep.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(deep.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    start = time.perf_counter()
    with out.with_suffix(".csv").open("w", newline="") as file:
        log = csv.writer(file)
        log.writerow(["step", "seconds", "loss", *(f"{name} pool{block}" for name in BATCH for block in "45")])
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            total = torch.zeros(())
            for name, (images, labels, _, _) in data.items():
                x, y = batch(images, labels, name, generator)
                with torch.no_grad():
                    x = below.taps(x)["pool3"]
                with torch.autocast("cpu", torch.bfloat16):
                    outs = deep(x, name)
                total = total + sum(F.cross_entropy(o.float(), y, label_smoothing=0.1) for o in outs)
            total.backward()
            optimizer.step()
            schedule.step()
            if step % 500 == 0 or step == steps:
                found = [v for name, d in data.items() for v in accuracy(below, deep, name, d[2][:2000], d[3][:2000])]
                row = [step, round(time.perf_counter() - start), f"{total.item():.3f}", *(f"{v:.4f}" for v in found)]
                log.writerow(row)
                file.flush()
                print(*row, flush=True)
    save_file({key: value.to(torch.float16) for key, value in (shallow | deep.state()).items()}, out)


if __name__ == "__main__":
    main()

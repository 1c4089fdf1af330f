"""Exercise 2: a VGG with and without batch normalisation, same seed, data and recipe: which converges faster?

python examples/exercise2_batch_norm.py [TRAIN.zip TEST.zip] [--epochs N] [--limit IMAGES] [--lr RATE] [--plot FILE]

With BN it learns within a few epochs, at rates where the plain network stays at chance; the default shows it.
The zips hold `<class>/*.jpg`, such as CIFAR-10's; without them, gratings of ten kinds are made. `--limit 0` takes all.
"""

from dataclasses import replace

import torch
from console import command
from short_run import DEVICE, fit, read

import vggfeat
from vggfeat.arch import parse

NAMES = {"plain": False, "with BN": True}


def main(*zips, epochs=5, limit=2000, arch="vgg11", width=0.25, lr=0.02, batch=64, seed=0, plot=None):
    arch = replace(parse(arch), batch_norm=False)  # whichever of the two was named
    replace(arch, batch_norm=True)  # raises, before anything is trained
    train, test = read(zips, limit, seed)
    runs = {}
    for name, batch_norm in NAMES.items():
        torch.manual_seed(seed)
        net = vggfeat.vgg(arch.name, len(train.classes), batch_norm=batch_norm, head="slim", width=width, dropout=0.0)
        runs[name] = fit(name, net, train, test, epochs, lr, batch, seed)
    print(f"{arch.name} ×{width:g}, slim head, {len(train):,} images of {len(train.classes)} classes, ", end="")
    print(f"learning rate up to {lr:g}, {DEVICE}")
    print("       training loss       test accuracy       seconds")
    print("epoch  plain  with BN     plain  with BN   plain  with BN")
    for number, (plain, bn) in enumerate(zip(*runs.values(), strict=True), start=1):
        print(f"{number:5} {plain.train_loss:6.3f} {bn.train_loss:8.3f}", end="")
        print(f" {plain.test_accuracy:9.1%} {bn.test_accuracy:8.1%}", end="")
        print(f" {plain.seconds:7.1f} {bn.seconds:8.1f}")
    last = {name: history[-1].test_accuracy for name, history in runs.items()}
    first, second = sorted(last, key=last.get, reverse=True)
    chance = 1 / len(train.classes)
    called = {"plain": "plain network", "with BN": "network with BN"}
    if last[first] < 1.5 * chance:
        print(f"Both networks are still about at chance, {chance:.0%}: more epochs or images would tell.")
    elif last[second] < 1.5 * chance:
        print(f"The {called[second]} is still about at chance, {chance:.0%}.")
    else:
        epoch = next(n for n, each in enumerate(runs[first], start=1) if each.test_accuracy >= last[second])
        print(f"What the {called[second]} ends at, {last[second]:.1%}, the {called[first]} reaches in epoch {epoch}.")
    if plot:
        print(vggfeat.plot_training(runs, plot, overwrite=True))
    return runs


if __name__ == "__main__":
    command(main, __doc__)

"""Exercise 9: VGGs (BN, slim head) against ResNets of about their depth, for small images, same seeds, data and recipe.

python examples/exercise9_vgg_vs_resnet.py [TRAIN.zip TEST.zip] [--nets vgg11,vgg13,vgg16,vgg19] [--seeds N]
    [--epochs N] [--limit IMAGES] [--width W] [--plot FILE]

The zips hold `<class>/*.jpg`, such as CIFAR-10's; without them, gratings of ten kinds are made. `--limit 0` takes all.
The ResNets are made of torchvision's blocks, so that `--width` narrows both alike, with a 3×3 stem instead of 7×7 and
pool, as is usual for 32 px.
"""

import functools
import statistics

import torch
from console import command
from short_run import DEVICE, fit, read
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vggfeat
from vggfeat.arch import channels_at
from vggfeat.errors import check_choice, first_line

# blocks of the four stages: 9, 11, 13 and 17 convolutions against 8, 10, 13 and 16
RESNETS = {"vgg11": (1, 1, 1, 1), "vgg13": (1, 1, 1, 2), "vgg16": (1, 2, 2, 1), "vgg19": (2, 2, 2, 2)}


def vgg(arch, classes, width):
    return vggfeat.vgg(arch, classes, batch_norm=True, head="slim", width=width, dropout=0.0)


def resnet(blocks, classes, width):
    from torchvision.models.resnet import BasicBlock

    channels = [channels_at(width)[0]]
    net = [nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()]
    for stage, count in enumerate(blocks):
        for number in range(count):
            stride = 2 if stage and not number else 1
            before, after = channels[-1], channels[0] * 2**stage
            shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            net.append(BasicBlock(before, after, stride, shortcut if stride == 2 else None))
            channels.append(after)
    for module in nn.Sequential(*net).modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], classes))


def macs(net, size):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net.eval()(torch.zeros(1, 3, *size))
    return counter.get_total_flops() // 2


def main(*zips, nets=("vgg16",), epochs=8, seeds=1, limit=2000, width=0.25, lr=0.05, batch=64, seed=0, plot=None):
    if not nets:
        raise vggfeat.InputError(f"no network asked for: name at least one of {', '.join(RESNETS)}")
    for each in nets:
        check_choice("net", each, RESNETS)
    if seeds < 1:
        raise vggfeat.InputError(f"expected at least one seed, got {seeds}")
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError) as error:  # built for another torch: RuntimeError
        raise vggfeat.DependencyError(
            f"the ResNet is made of torchvision's blocks, and torchvision does not work here "
            f"({first_line(error)}): install the torchvision that belongs to your torch"
        ) from error
    train, test = read(zips, limit, seed)
    builders = {}
    for arch in nets:
        blocks = RESNETS[arch]
        builders[f"VGG-{arch[3:]}"] = functools.partial(vgg, arch)
        builders[f"ResNet-{2 + 2 * sum(blocks)}"] = functools.partial(resnet, blocks)
    runs, costs = {}, {}
    for name, build in builders.items():
        runs[name] = []
        for each in range(seed, seed + seeds):
            torch.manual_seed(each)
            net = build(len(train.classes), width)
            runs[name].append(fit(name, net, train, test, epochs, lr, batch, each))
        costs[name] = sum(p.numel() for p in net.parameters()), macs(net.cpu(), train.pixels.shape[1:3])
    print(f"Width ×{width:g}, {len(train):,} images of {len(train.classes)} classes, {epochs} epochs, {DEVICE}", end="")
    print(f", mean and standard deviation of {seeds} seeds" * (seeds > 1))
    print("network        params   M MACs  training loss  test accuracy  seconds an epoch")
    for name, histories in runs.items():
        (params, work), last = costs[name], [history[-1] for history in histories]
        loss = statistics.mean(epoch.train_loss for epoch in last)
        right = [epoch.test_accuracy for epoch in last]
        accuracy = f"{statistics.mean(right):.1%}" + (f" ± {statistics.stdev(right):.1%}" if seeds > 1 else "")
        seconds = min(epoch.seconds for history in histories for epoch in history)
        print(f"{name:10} {params:10,} {work / 1e6:8.1f} {loss:14.3f} {accuracy:>14} {seconds:17.1f}")
        if max(right) < 1.5 / len(train.classes):
            print(f"{name} is still about at chance, {1 / len(train.classes):.0%}: give it more epochs or images.")
    if plot:
        print(vggfeat.plot_training({name: each[0] for name, each in runs.items()}, plot, overwrite=True))
    return {name: (*costs[name], histories) for name, histories in runs.items()}


if __name__ == "__main__":
    command(main, __doc__)

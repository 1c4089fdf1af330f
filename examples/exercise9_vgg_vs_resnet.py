"""Exercise 9: VGG-16 (BN, slim head) against ResNet-18, both for small images, same seed, data and recipe.

python examples/exercise9_vgg_vs_resnet.py [TRAIN.zip TEST.zip] [--epochs N] [--limit IMAGES] [--width W] [--plot FILE]

The zips hold `<class>/*.jpg`, such as CIFAR-10's; without them, gratings of ten kinds are made. `--limit 0` takes all.
The ResNet is made of torchvision's blocks, so that `--width` narrows both alike, with a 3×3 stem instead of 7×7 and
pool, as is usual for 32 px.
"""

import torch
from console import command
from short_run import DEVICE, fit, read
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vggfeat
from vggfeat.errors import first_line


def vgg16(classes, width):
    return vggfeat.vgg16(classes, batch_norm=True, head="slim", width=width, dropout=0.0)


def resnet18(classes, width):
    from torchvision.models.resnet import BasicBlock

    channels = [round(64 * width)]
    net = [nn.Conv2d(3, channels[0], 3, padding=1, bias=False), nn.BatchNorm2d(channels[0]), nn.ReLU()]
    for stage in range(4):
        for stride in (1 if stage == 0 else 2, 1):
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


def main(*zips, epochs=3, limit=2000, width=0.25, lr=0.05, batch=64, seed=0, plot=None):
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError, AttributeError) as error:  # built for another torch: RuntimeError
        raise vggfeat.DependencyError(
            f"the ResNet is made of torchvision's blocks, and torchvision does not work here "
            f"({first_line(error)}): install the torchvision that belongs to your torch"
        ) from error
    train, test = read(zips, limit, seed)
    runs, costs = {}, {}
    for name, build in {"VGG-16": vgg16, "ResNet-18": resnet18}.items():
        torch.manual_seed(seed)
        net = build(len(train.classes), width)
        costs[name] = sum(p.numel() for p in net.parameters()), macs(net, train.pixels.shape[1:3])
        runs[name] = fit(name, net, train, test, epochs, lr, batch, seed)
    print(f"Width ×{width:g}, {len(train):,} images of {len(train.classes)} classes, {epochs} epochs, {DEVICE}")
    print("network        params   M MACs  training loss  test accuracy  seconds an epoch")
    for name, history in runs.items():
        (params, work), last = costs[name], history[-1]
        seconds = min(epoch.seconds for epoch in history)
        print(f"{name:10} {params:10,} {work / 1e6:8.1f} {last.train_loss:14.3f}", end="")
        print(f" {last.test_accuracy:14.1%} {seconds:17.1f}")
    if plot:
        print(vggfeat.plot_training(runs, plot, overwrite=True))
    return {name: (*costs[name], history) for name, history in runs.items()}


if __name__ == "__main__":
    command(main, __doc__)

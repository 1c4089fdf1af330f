"""A training step on images of 32×32 against the convolutions alone and against plain PyTorch.

- ours: what `vggfeat train` does in a step, the crops and the optimizer included;
- plain: torchvision's network with one linear layer, channels_last, autocast, cross-entropy, SGD; batches are at hand;
- convolutions, torch: `F.conv2d` forward, its gradients to input and filters, for every layer's shape, nothing else;
- convolutions, ours: the same through `vggfeat.convolution`.

On a GPU twenty steps are timed at once, so that the host can be ahead, as it is in training, and the convolutions are
replayed as a CUDA graph: launched one by one, they would wait for it.

    python -m tests.bench.training [ARCH] [BATCH] [PRECISION]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vggfeat_cli.run import keep_memory

from tests.bench.harness import alternate, machine
from vggfeat.convolution import convolve
from vggfeat.cuda_graphs import capture
from vggfeat.devices import resolve
from vggfeat.network import vgg
from vggfeat.training.config import recipe
from vggfeat.training.data import ImageSet
from vggfeat.training.distributed import World
from vggfeat.training.loop import _Run


def ours(arch: str, batch: int, precision: str, device: torch.device) -> Callable[[], object]:
    count = 4 * batch
    pixels = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    images = ImageSet("noise", list("0123456789"), torch.arange(count) % 10, list(map(str, range(count))), None, pixels)
    config = recipe("fast", arch=arch, batch_size=batch, precision=precision, lr=1e-4, epochs=100_000)
    run = _Run(config, images, None, World(device), Path(), None)
    run.learner.model.train()

    def forever() -> object:
        while True:
            for parts in run.batches.epoch(run.epoch):
                yield run._step(parts)
                run.step += 1
            run.epoch, run.step = run.epoch + 1, 0

    steps = forever()
    return lambda: next(steps)


def plain(arch: str, batch: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    import torchvision

    whole = getattr(torchvision.models, arch)()
    net = nn.Sequential(whole.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    net = net.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(net.parameters(), 1e-4, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % 10

    def step() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def convolutions(
    arch: str, batch: int, dtype: torch.dtype, device: torch.device, fast: bool
) -> tuple[Callable[[], object], float]:
    """Forward and both gradients of every convolution, and the floating-point operations of that."""
    work, operations = [], 0.0
    channels_last = {"dtype": dtype, "device": device, "memory_format": torch.channels_last}
    for layer in vgg(arch, 10, head="slim").arch.convs:
        side = 32 // layer.stride
        x = torch.randn(batch, layer.in_channels, side, side).to(**channels_last).requires_grad_(layer.in_channels > 3)
        weight = torch.randn(layer.channels, layer.in_channels, 3, 3).to(**channels_last).requires_grad_()
        grad = torch.randn(batch, layer.channels, side, side).to(**channels_last)
        work.append((x, weight, grad))
        passes = 3 if layer.in_channels > 3 else 2
        operations += passes * 2 * batch * side**2 * layer.channels * layer.in_channels * 9

    def step(_: Tensor) -> tuple[Tensor, ...]:
        for x, weight, grad in work:
            y = convolve(x, weight, None) if fast else F.conv2d(x, weight, padding=1)
            torch.autograd.grad(y, [v for v in (x, weight) if v.requires_grad], grad)
        return ()

    nothing, run = torch.zeros((), device=device), step
    if device.type == "cuda":
        for _ in range(3):
            step(nothing)
        run = capture(step, nothing)
    return (lambda: run(nothing)), operations


def main(arch: str = "vgg16_bn", batch: str = "256", precision: str = "bfloat16") -> None:
    """Print images per second of each, and shares of the convolutions' rate."""
    keep_memory()
    torch.backends.cudnn.benchmark = True  # as `train` has it
    device, count = resolve("auto"), int(batch)
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]
    torchs, operations = convolutions(arch, count, dtype, device, fast=False)
    sides: dict[str, Callable[[], object]] = {
        "vggfeat": ours(arch, count, precision, device),
        "plain PyTorch": plain(arch, count, dtype, device),
        "convolutions, torch": torchs,
        "convolutions, ours": convolutions(arch, count, dtype, device, fast=True)[0],
    }
    steps = 20 if device.type == "cuda" else 1

    def repeated(side: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(steps):
                side()

        return run

    times = alternate({name: repeated(side) for name, side in sides.items()}, runs=9, warmup=4)
    operations, count = operations * steps, count * steps
    rates = {name: count / statistics.median(values) for name, values in times.items()}
    print(f"\n{arch}, batch {batch}, {precision}\n{machine()}")
    for name, values in times.items():
        share = rates["vggfeat"] / rates[name]
        spread = f"{count / max(values):.0f}–{count / min(values):.0f}"
        print(f"  {name:22} {rates[name]:7.0f} images/s ({spread})  vggfeat is {share:.2f} of it")
    print(f"  convolutions: torch {operations / count * rates['convolutions, torch'] / 1e12:.2f} TFLOP/s, ", end="")
    print(f"ours {operations / count * rates['convolutions, ours'] / 1e12:.2f}, counted as plain convolutions")


if __name__ == "__main__":
    main(*sys.argv[1:])

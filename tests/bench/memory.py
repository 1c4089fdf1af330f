"""What PerceptualLoss takes of memory, VGG-16: held between forward and backward, and at the peak of both.

python -m tests.bench.memory        (pip install piq)
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from tests.bench.harness import machine
from vggfeat import PerceptualLoss, vgg16
from vggfeat.analysis import PeakMemory

SIDES = ("piq.ContentLoss", "vggfeat")


def held(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes of the distinct storages that the graph keeps, without those that are alive anyway."""
    outside = {tensor.untyped_storage().data_ptr() for tensor in known}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    waiting = [loss.grad_fn]
    while waiting:  # what a function of ours keeps beside what autograd saves for it
        node = waiting.pop()
        if node is not None:
            for value in filter(torch.is_tensor, tree_leaves(vars(node) if hasattr(node, "__dict__") else ())):
                pack(value)
            waiting += [below for below, _ in node.next_functions]
    loss.backward()
    return sum(storages.values())


def peak(side: str) -> None:
    """In a process of its own: peak bytes over the network and the images, and the seconds of forward and backward."""
    torch.manual_seed(0)
    net = vgg16()
    image, target = torch.rand(1, 3, 1024, 1024, requires_grad=True), torch.rand(1, 3, 1024, 1024)
    if side == "vggfeat":
        loss: Callable[..., Tensor] = PerceptualLoss(["relu2_2"], weights=net.state_dict())
    else:
        import piq

        loss = piq.ContentLoss(net.features, layers=["8"])
    gauge = PeakMemory(torch.device("cpu"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        loss(image, target).backward()
        times.append(time.perf_counter() - start)
    print(gauge.read(), statistics.median(times))


def main() -> None:
    if len(sys.argv) > 1:
        return peak(sys.argv[1])
    print(machine())
    print('held by PerceptualLoss(["conv3_3"]), 1×3×224×224')
    net = vgg16().requires_grad_(False).eval()
    image, target = torch.rand(1, 3, 224, 224, requires_grad=True), torch.rand(1, 3, 224, 224)
    state = net.state_dict()

    def plain() -> Tensor:
        with torch.no_grad():
            there = net.taps(target, ["conv3_3"])["conv3_3"]
        return F.mse_loss(net.taps(image, ["conv3_3"])["conv3_3"], there)

    base = held(plain, [image, target, *state.values()])
    print(f"plain autograd            {base / 1e6:7.2f} MB")
    for precision in ("float32", "bfloat16"):
        for keep in ("bits", "values"):
            ours = PerceptualLoss(["conv3_3"], weights=state, precision=precision, keep=keep)
            ours(image, target)  # the filters are prepared at the first call
            filters = [f for ready in ours.features.trunk._ready.values() for group in ready.values() for f in group]
            got = held(lambda ours=ours: ours(image, target), [image, target, *filters])
            print(f"vggfeat {precision:8} {keep:6}   {got / 1e6:7.2f} MB   1/{base / got:.1f}")
    print('peak of forward and backward, PerceptualLoss(["relu2_2"]), 1×3×1024×1024, medians of three processes')
    found: dict[str, list[tuple[int, float]]] = {side: [] for side in SIDES}
    for _ in range(3):
        for side, each in found.items():
            command = [sys.executable, "-m", "tests.bench.memory", side]
            taken, seconds = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            each.append((int(taken), float(seconds)))
    most, pace = (statistics.median(values) for values in zip(*found[SIDES[0]], strict=True))
    for side, each in found.items():
        taken, seconds = (statistics.median(values) for values in zip(*each, strict=True))
        print(f"{side:16} {taken / 1e6:8.0f} MB  1/{most / taken:.1f}   {seconds:6.2f} s  {pace / seconds:.2f}×")


if __name__ == "__main__":
    main()

"""Bytes held between forward and backward by PerceptualLoss(["conv3_3"]), against plain autograd: VGG-16, 1×3×224×224.

python -m tests.bench.memory
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.bench.harness import machine
from vggfeat import PerceptualLoss, vgg16


def held(run: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps, without those that are alive anyway."""
    outside = {tensor.untyped_storage().data_ptr() for tensor in known}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()
    loss.backward()
    return sum(storages.values())


def main() -> None:
    print(machine())
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


if __name__ == "__main__":
    main()

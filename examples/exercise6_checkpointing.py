"""Exercise 6: gradient checkpointing. Keep only each block's input, and recompute the rest in the backward.

The second forward must not update batch normalisation's running statistics again. A network sees to that once its
`checkpointing` is set (`vggfeat train --checkpointing`).
python examples/exercise6_checkpointing.py [--size PX] [--batch N] [--width W] [--repeats N]
"""

import copy
import time

import torch
from console import command
from torch import nn
from torch.nn import functional as F

import vggfeat
from vggfeat.analysis import PeakMemory, saved_for_backward
from vggfeat.arch import MIN_SIDE
from vggfeat.errors import whole_number


def step(net, images, targets):
    net.zero_grad()
    loss = F.cross_entropy(net(images), targets)
    loss.backward()
    return loss.item()


def main(size=64, batch=8, width=0.5, repeats=3):
    for name, value, least in (("size", size, MIN_SIDE), ("batch", batch, 1), ("repeats", repeats, 1)):
        whole_number(name, value, least)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = vggfeat.vgg16(num_classes=10, batch_norm=True, head="slim", width=width, dropout=0.0).to(device)
    nets = {"plain": plain, "checkpointed": copy.deepcopy(plain)}
    nets["checkpointed"].checkpointing = True
    images = torch.rand(batch, 3, size, size, device=device)
    targets = torch.arange(batch, device=device) % 10
    print(f"VGG-16 with BN, width ×{width}, {batch} images of {size}×{size}, {device}")
    on_gpu = device.type == "cuda"  # of a CPU's memory only the process' is known, in which what ran before stays
    print("              saved for backward  " + "peak of a step  " * on_gpu + "seconds a step     loss")
    results = {}
    for name, net in nets.items():
        state = copy.deepcopy(net.state_dict())
        kept = saved_for_backward(net, images)
        net.load_state_dict(state)
        gauge = PeakMemory(device)
        losses, times = [], []
        for _ in range(repeats):
            start = time.perf_counter()
            losses.append(step(net, images, targets))
            times.append(time.perf_counter() - start)
        peak = f"{gauge.read() / 1e6:13.0f} MB" if on_gpu else ""
        print(f"{name:12} {kept / 1e6:17.1f} MB{peak} {min(times):15.3f} {losses[-1]:8.4f}")
        results[name] = {"kept": kept, "loss": losses[-1]}
    counted = next(
        int(bn.num_batches_tracked) for bn in nets["checkpointed"].modules() if isinstance(bn, nn.BatchNorm2d)
    )
    same = all(
        torch.allclose(a, b, atol=1e-5) for a, b in zip(plain.buffers(), nets["checkpointed"].buffers(), strict=True)
    )
    print(f"saved: {results['plain']['kept'] / results['checkpointed']['kept']:.1f} times less; BN counted ", end="")
    print(f"{counted} steps of {repeats}, running statistics {'equal' if same else 'DIFFER'}")
    return results | {"same": same, "counted": counted}


if __name__ == "__main__":
    command(main, __doc__)

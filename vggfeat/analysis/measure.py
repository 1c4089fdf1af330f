"""What a network takes on this machine: time, memory, and what autograd keeps."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class Measured:
    """What a network took on this machine.

    Attributes:
        latency: seconds, forward of one image, the median of several.
        throughput: images a second, forward of the batch.
        memory: peak bytes of that forward, weights included; None if unknown.
        train_throughput: images a second, forward and backward of the batch.
        train_memory: peak bytes of that, weights and gradients included.
    """

    latency: float
    throughput: float
    memory: int | None
    train_throughput: float
    train_memory: int | None


def saved_for_backward(net: nn.Module, images: Tensor) -> int:
    """Bytes that autograd keeps after `net(images)`: every storage once, parameters and buffers left out.

    Works on the meta device too, where nothing is computed.
    """
    from torch.autograd.graph import saved_tensors_hooks

    own = {value.untyped_storage()._cdata for value in [*net.parameters(), *net.buffers()]}
    saved: dict[int, Tensor] = {}  # which keeps them alive, so that no two share an address

    def pack(value: Tensor) -> Tensor:
        saved.setdefault(value.untyped_storage()._cdata, value)
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        net(images)
    return sum(value.untyped_storage().nbytes() for key, value in saved.items() if key not in own)


def machine(device: torch.device) -> str:
    """What the figures were taken on: processor, threads, torch."""
    import torch

    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{kind}{threads}, torch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


class PeakMemory:
    """The peak of memory, in bytes, since `reset`, above what was in use when the gauge was made.

    On CUDA what torch's allocator handed out; on Linux the process's resident memory; elsewhere unknown (None).
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.base = 0
        self.known = device.type == "cuda" or (device.type == "cpu" and sys.platform == "linux")
        gc.collect()
        self.reset()
        self.base = self.read() or 0

    def reset(self) -> None:
        """Forget earlier peaks."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.known:
            if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
                trim(0)  # memory freed but not returned would hide new use
            try:
                Path("/proc/self/clear_refs").write_text("5")
            except OSError:  # a container may forbid it
                self.known = False

    def read(self) -> int | None:
        """The peak, or None if unknown."""
        import torch

        if not self.known:
            return None
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.base
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        kilobytes = next(line.split()[1] for line in lines if line.startswith("VmHWM"))
        return 1024 * int(kilobytes) - self.base


def measure_net(
    build: Callable[[], nn.Module], size: int, batch: int, device: torch.device, seconds: float
) -> Measured:
    """Latency, throughput and peak memory of a network; see `compare`."""
    import torch
    from torch.nn import functional as F

    gauge = PeakMemory(device)
    with torch.device("cpu"):
        net = build()
    net.to(device)
    images = torch.rand(batch, 3, size, size, device=device)
    targets = torch.zeros(batch, dtype=torch.long, device=device)

    def train() -> None:
        net.zero_grad()
        F.cross_entropy(net(images), targets).backward()

    net.eval()
    with torch.inference_mode():
        latency = _seconds(lambda: net(images[:1]), device, seconds)
        gauge.reset()
        forward = _seconds(lambda: net(images), device, seconds)
        memory = gauge.read()
    net.train()
    gauge.reset()
    step = _seconds(train, device, seconds)
    return Measured(latency, batch / forward, memory, batch / step, gauge.read())


def _seconds(run: Callable[[], object], device: torch.device, budget: float) -> float:
    """The median of a run's times, after one warm-up."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    timed()
    times: list[float] = []
    while len(times) < 3 or sum(times) < budget:
        times.append(timed())
    return statistics.median(times)

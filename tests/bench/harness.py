"""Timing in turn, so that a machine whose speed drifts is fair to both sides."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT.parent / "shared/weights/vgg19-oxford-conv1_1-conv3_4.safetensors"
DATA = ROOT.parent / "shared/data"


def machine() -> str:
    """Processor, threads and versions, for the head of a table."""
    model = platform.processor() or platform.machine()
    flags = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        model = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), model)
        flags = ", ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag}" in text)
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{model} ({flags}), {torch.get_num_threads()} threads{gpu}; torch {torch.__version__}"


def settle(device: torch.device | str) -> None:
    """Wait until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def alternate(sides: dict[str, Callable[[], object]], runs: int = 11, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each side, run in turn: A B C A B C …"""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in range(warmup + runs):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if torch.cuda.is_available():
                settle("cuda")
            if run >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def report(title: str, times: dict[str, list[float]], peer: str) -> None:
    """A table: median, spread, and how many times as fast as the peer."""
    print(f"\n{title}\n{machine()}")
    for name, values in times.items():
        middle = statistics.median(values)
        ratios = statistics.median(b / v for b, v in zip(times[peer], values, strict=True))
        print(
            f"  {name:44} {middle * 1e3:9.1f} ms  (min {min(values) * 1e3:.1f}, max {max(values) * 1e3:.1f})"
            f"  {ratios:5.2f}×" + ("" if name != peer else "  the peer")
        )

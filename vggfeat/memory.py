"""How much memory a device has and has left, as far as that can be told."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["all_memory", "free_memory"]

UNKNOWN = 4 << 30  # bytes, where nothing tells
NO_LIMIT = 1 << 62


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had on a device, on a CPU those of files that are only cached included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limit, used = _group()
    return min(_machine_free(), max(0, limit - used))


def all_memory() -> int:
    """Bytes that the machine has, or the container that this process is in: the same at every call."""
    try:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        pages = 2 * UNKNOWN
    return min(pages, _group()[0])


def _machine_free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration, IndexError):  # not Linux
        return UNKNOWN


def _group(folder: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """A container's limit and what is used of it, of either version of control groups."""
    for limit, used, statistics, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            numbers = int((folder / limit).read_text()), int((folder / used).read_text())
        except (OSError, ValueError):  # none, or "max"
            continue
        return numbers[0], numbers[1] - _line(folder / statistics, cached)  # files read once are given up for others
    return NO_LIMIT, 0


def _line(path: Path, name: str) -> int:
    """A number of a file of names and numbers; 0 where it has none of that name."""
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{name} "))
    except (OSError, ValueError, StopIteration, IndexError):
        return 0

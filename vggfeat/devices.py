"""Which device is used, what it does fast and what it cannot do at all, and how much memory it has left."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from vggfeat.errors import InputError, first_line
from vggfeat.modes import constant_when_traced

ASSUMED_MEMORY = 4 << 30  # bytes of memory, where nothing tells
NO_LIMIT = 1 << 62
_known: dict[tuple[torch.device, torch.dtype], Any] = {}  # by device and type, the kernels that work there


def resolve(device: str | torch.device) -> torch.device:
    """The device of that name; `auto` is CUDA where available, else the CPU.

    Raises:
        InputError: it cannot be used.
    """
    try:
        resolved = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"unknown device {device!r}: choose auto, cpu, cuda, cuda:1 or mps") from error
    try:
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA asserts
        raise InputError(f"device {str(device)!r} cannot be used here: {first_line(error)}") from error
    if resolved.type == "meta":
        raise InputError("device 'meta' holds no values: choose cpu or cuda")
    return resolved


@constant_when_traced
def has_onednn() -> bool:
    """Whether this torch can use oneDNN's kernels."""
    return bool(torch.backends.mkldnn.is_available())


@constant_when_traced
def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware: AMX or AVX512-BF16 on a CPU, sm80 and up on CUDA."""
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        asks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return has_onednn() and any(getattr(torch.cpu, ask, bool)() for ask in asks)
    return False


@constant_when_traced
def multiplies_bfloat16() -> bool:
    """Whether oneDNN takes bfloat16 on this CPU at all; on x86 that takes AVX-512 or AVX-NE-CONVERT.

    Where it does not, torch's own convolutions take eight times as long as in float32, matrix products a hundred times.
    """
    return has_onednn() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def emulates(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has no fast matrix product for that type, so that torch uses loops."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not multiplies_bfloat16()


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that convolutions are computed in."""
    if precision == "auto":
        return torch.bfloat16 if bfloat16_is_fast(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]


def trunk_dtype(precision: str, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.dtype:
    """What the trunk computes in, for a policy of `PRECISIONS`, on a device, for images of a type.

    float16 is never used: it ends at 65504, which Gram matrices of Oxford's weights exceed.
    """
    if precision == "bfloat16":
        return torch.bfloat16
    if dtype == torch.float64:
        return torch.float64
    if precision == "auto":
        return autocast_dtype("auto", device)
    if device.type != "meta" and torch.is_autocast_enabled(device.type):  # meta has none
        wanted = torch.get_autocast_dtype(device.type)
        if wanted == torch.bfloat16 or (wanted == torch.float16 and bfloat16_is_fast(device)):
            return torch.bfloat16
    return torch.float32


def convolution_precision() -> str:
    """How cuDNN multiplies float32 from sm80 on: "tf32", as torch allows by default, or as exactly as "tf32x3"."""
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by operator, which this reading refuses
        conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
        allowed = conv.fp32_precision == "tf32"
    return "tf32" if allowed else "tf32x3"


def triton_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The module `kernels` if a trial on a map of four pixels succeeds, else None.

    It needs Triton, which comes with torch for CUDA on Linux, and a C compiler.

    Raises:
        OutOfMemoryError: the device has no room for four pixels.
    """
    if device.type != "cuda" or dtype not in (torch.float32, torch.bfloat16):
        return None
    if (device, dtype) not in _known:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # nothing can be tried during a graph capture
        _known[device, dtype] = _working(device, dtype)
    return _known[device, dtype]


def _working(device: torch.device, dtype: torch.dtype) -> Any:
    try:
        from vggfeat import kernels

        y, argmax = kernels.max_pool(torch.arange(4.0, device=device, dtype=dtype).view(1, 1, 2, 2))
        return kernels if (y.item(), argmax.item()) == (3, 3) else None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # no Triton, no compiler, an unknown device: each fails in its own way
        return None


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a CPU, reclaimable page cache included, or on CUDA or MPS.

    Of other devices nothing is known: for them it is the CPU's.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limit, used = _cgroup_memory()
    return min(_machine_free(), max(0, limit - used))


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory of a device, on a CPU of the machine or container; the same at every call, None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None
    return min(pages, _cgroup_memory()[0])


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that an allocation failed, on any device, or is one that a failed allocation can cause."""
    said = ("can't allocate memory", "could not create a primitive")  # oneDNN says the latter of shapes, too
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in said)


def _machine_free() -> int:
    return _field(Path("/proc/meminfo"), "MemAvailable:") << 10 or ASSUMED_MEMORY  # other systems have no such file


def _cgroup_memory(folder: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """A container's memory limit and use, by either version of control groups."""
    for limit, used, statistics, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            numbers = int((folder / limit).read_text()), int((folder / used).read_text())
        except (OSError, ValueError):  # none, or "max"
            continue
        return numbers[0], numbers[1] - _field(folder / statistics, cached)  # cached files are evicted on demand
    return NO_LIMIT, 0


def _field(path: Path, name: str) -> int:
    """The number after that name in a file of such pairs; 0 if there is none."""
    try:
        return next(int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith(f"{name} "))
    except (OSError, ValueError, StopIteration, IndexError):
        return 0

"""What a CUDA device is spared: launching a step kernel by kernel, and waiting until its numbers were looked at.

On other devices all of this does nothing: the step is the function itself, and its numbers are there when it returns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vggfeat.errors import first_line, warn

__all__ = ["Reading", "ahead", "can_record", "kernels", "recorded", "replayed"]

Step = Callable[..., tuple[Tensor, ...]]
PAYS = 20  # steps from which a recording is made, for which the step runs three times and is replayed once
_broken: list[torch.cuda.CUDAGraph] = []  # recordings that failed: the allocator may refer to them, and takes no more
_known: dict[tuple[torch.device, torch.dtype], Any] = {}  # by device and type, the kernels that work there
AGREES = 0.01  # relative difference of a replayed step: kernels that add in no fixed order differ by less


def kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """The module `kernels`, where a map of four pixels shows that it works; else None.

    It wants Triton, which torch for CUDA brings on Linux, and a C compiler.

    Raises:
        OutOfMemoryError: the device has no room for four pixels.
    """
    if device.type != "cuda" or dtype not in (torch.float32, torch.bfloat16):
        return None
    if (device, dtype) not in _known:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # inside of somebody's recording nothing can be tried
        _known[device, dtype] = _working(device, dtype)
    return _known[device, dtype]


def _working(device: torch.device, dtype: torch.dtype) -> Any:
    try:
        from vggfeat import kernels

        y, route = kernels.max_pool(torch.arange(4.0, device=device, dtype=dtype).view(1, 1, 2, 2))
        return kernels if (y.item(), route.item()) == (3, 3) else None
    except torch.OutOfMemoryError:
        raise
    except Exception:  # no Triton, no compiler, a device that it does not know: each says so in its own way
        return None


def ahead(device: torch.device) -> int:
    """How many further steps to begin before the numbers of one are asked for."""
    return 1 if device.type == "cuda" else 0


class Reading:
    """A few numbers on their way to the host.

    Asked for at once they are what `.tolist()` gives. On CUDA, where work is only queued, asked for after the next step
    was queued they are had without the device running dry.
    """

    def __init__(self, values: Tensor) -> None:
        cuda = values.device.type == "cuda"
        self.values = values.to("cpu", non_blocking=cuda)
        self.arrived = torch.cuda.Event() if cuda else None
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(values.device))

    def get(self) -> list[float]:
        """The numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()
        found: list[float] = self.values.tolist()
        return found


def recorded(step: Step, image: Tensor, times: int) -> Step:
    """The step as a CUDA graph for images of this shape; the step itself on other devices and for few steps.

    The recording is tried on another image first: where it cannot be made, or does not give what the step gives, the
    step itself serves, with a warning that says so.

    Args:
        step: of an image, without reading anything back; what it returns is new at each call.
        image: (1,3,H,W), one of those to come.
        times: how many steps there will be.
    """
    if times < PAYS or _broken or not can_record(image.device):
        return step
    other = image.flip(3)
    wanted = warmed_up(step, other)  # here the step's own errors are raised
    if not all(bool(value.isfinite().all()) for value in wanted):
        return step  # which is for the loop to judge

    def agrees(replay: Step) -> bool:
        pairs = zip(replay(other), wanted, strict=True)
        return all(float((ours - theirs).norm()) <= AGREES * float(theirs.norm()) for ours, theirs in pairs)

    return replayed(step, image, agrees=agrees)


def replayed(step: Step, *inputs: Tensor, agrees: Callable[[Step], bool] = lambda replay: True) -> Step:
    """The step as a CUDA graph; itself, with a warning, where none can be made or what it gives does not agree.

    Args:
        step: of tensors of these shapes, which was run before; it reads nothing back, and what it changes besides, such
            as weights, stays where it is.
        inputs: some to record it on; it is not run on them.
        agrees: judges the recording.
    """
    if _broken:
        return step
    try:
        replay = record(step, *inputs)
        if agrees(replay):
            return replay
        why = "they give something else"
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Ctrl-C, under what ending a recording says to it
            raise KeyboardInterrupt from error
        why = first_line(error)
    warn(f"steps are not replayed as a CUDA graph: {why}")
    return step


def can_record(device: torch.device) -> bool:
    """Whether the device has graphs of recorded kernels."""
    return device.type == "cuda"


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all: libraries keep memory for each that they have seen."""
    return torch.cuda.Stream(device)


def warmed_up(step: Step, image: Tensor) -> tuple[Tensor, ...]:
    """What the step gives, where it will be recorded: in first calls libraries choose and allocate."""
    here, aside = torch.cuda.current_stream(image.device), _aside(image.device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        step(image)
        found = step(image)
    here.wait_stream(aside)
    return found


def record(step: Step, *inputs: Tensor) -> Step:
    """The step, recorded on these; what it reads besides is kept alive by it, and must not move."""
    fixed, graph, device = [value.detach().clone() for value in inputs], torch.cuda.CUDAGraph(), inputs[0].device
    here, aside = torch.cuda.current_stream(device), _aside(device)
    aside.wait_stream(here)
    try:
        # the outer context brings the stream back where a recording fails, which torch's own does not
        with (
            torch.cuda.device(device),
            torch.cuda.stream(aside),
            torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"),
        ):
            found = step(*fixed)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            graph.reset()  # the step itself needs the memory that the recording was given
        with contextlib.suppress(Exception):  # before torch 2.13 it thinks that it is being recorded still
            generator = torch.cuda.default_generators[
                torch.cuda.current_device() if device.index is None else device.index
            ]
            generator.graphsafe_set_state(generator.clone_state())
        _broken.append(graph)
        raise
    here.wait_stream(aside)

    def replay(*inputs: Tensor, reads: Step = step) -> tuple[Tensor, ...]:
        for mine, value in zip(fixed, inputs, strict=True):
            mine.copy_(value)
        graph.replay()
        return tuple(value.clone() for value in found)

    return replay

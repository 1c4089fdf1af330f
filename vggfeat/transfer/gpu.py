"""What keeps a GPU busy: a step recorded once and replayed, and numbers that are read a step later.

On another device both do nothing: the step is the function itself, and its numbers are there when it returns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Reading", "ahead", "recorded"]

Step = Callable[[Tensor], tuple[Tensor, ...]]
AGREES = 0.01  # relative difference of a replayed step: kernels that add in no fixed order differ by less


def ahead(device: torch.device) -> int:
    """How many steps to begin before the numbers of one are asked for."""
    return 1 if device.type == "cuda" else 0


def can_record(device: torch.device) -> bool:
    """Whether the device has graphs of recorded kernels."""
    return device.type == "cuda"


class Reading:
    """A few numbers on their way to the host.

    Asked for at once they are what `.tolist()` gives. On CUDA, where work is only queued, asked for after the next step
    was queued they are had without the GPU running dry.
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


def recorded(step: Step, image: Tensor) -> Step:
    """The step as a CUDA graph for images of this shape; the step itself on other devices.

    A step is some two hundred kernels, most of them shorter than it takes to launch them one by one. The recording is
    tried on another image first: where it cannot be made, or does not give what the step gives, the step itself serves,
    with a warning that says so.

    Args:
        step: of an image, without reading anything back; what it returns is new at each call.
        image: (1,3,H,W), one of those to come.
    """
    if not can_record(image.device):
        return step
    try:
        replay = _record(step, image)
        other = image.flip(3)
        pairs = zip(replay(other), step(other), strict=True)
        if all(float((ours - theirs).norm()) <= AGREES * float(theirs.norm()) for ours, theirs in pairs):
            return replay
        why = "it gives something else"
    except RuntimeError as error:
        why = str(error).splitlines()[0]
    warnings.warn(f"steps are not replayed as a CUDA graph, which is slower: {why}", stacklevel=2)
    return step


def _record(step: Step, image: Tensor) -> Step:
    fixed = image.detach().clone()
    here, aside = torch.cuda.current_stream(image.device), torch.cuda.Stream(image.device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):  # libraries choose and allocate in their first calls, which cannot be recorded
        for _ in range(2):
            step(fixed)
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(fixed)

    def replay(image: Tensor) -> tuple[Tensor, ...]:
        fixed.copy_(image)
        graph.replay()
        return tuple(value.clone() for value in found)

    return replay

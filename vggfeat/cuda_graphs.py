"""Steps captured as CUDA graphs, which saves launching kernel by kernel, and scalars read asynchronously.

On other devices all of this is a no-op: the step is the function itself, and its numbers are ready when it returns.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from vggfeat.errors import first_line, warn

Step = Callable[..., tuple[Tensor, ...]]
MIN_STEPS = 20  # fewest steps worth a capture, which takes three runs and a replay
REPLAY_RTOL = 0.01  # relative difference allowed to a replay: kernels that add in no fixed order differ by less
_broken: list[torch.cuda.CUDAGraph] = []  # failed captures: the allocator may refer to them, and accepts no more


def lookahead(device: torch.device) -> int:
    """How many further steps to queue before reading the numbers of one."""
    return 1 if device.type == "cuda" else 0


class AsyncScalars:
    """A few numbers, copied to the host asynchronously.

    On CUDA, where work is only queued, they are best read after queuing the next step, so that the device is never
    idle.
    """

    def __init__(self, values: Tensor) -> None:
        cuda = values.device.type == "cuda"
        self.values = values.to("cpu", non_blocking=cuda)
        self.arrived = torch.cuda.Event() if cuda else None
        if self.arrived is not None:
            self.arrived.record(torch.cuda.current_stream(values.device))

    def get(self) -> list[float]:
        """The numbers; waits for the copy."""
        if self.arrived is not None:
            self.arrived.synchronize()
        scalars: list[float] = self.values.tolist()
        return scalars


def captured_and_checked(step: Step, image: Tensor, times: int) -> Step:
    """The step as a CUDA graph for images of this shape; the step itself on other devices and for few steps.

    The graph is tried on another image first: where it cannot be captured, or its results differ from the step's, the
    step itself is returned, with a warning.

    Args:
        step: takes an image, reads nothing back, and returns new tensors at each call.
        image: (1,3,H,W), as the step will get.
        times: how many steps there will be.
    """
    if times < MIN_STEPS or _broken or not supports_capture(image.device):
        return step
    other = image.flip(3)
    wanted = warm_up(step, other)  # here the step's own errors are raised
    if not all(bool(value.isfinite().all()) for value in wanted):
        return step  # which is for the loop to judge

    def agrees(replay: Step) -> bool:
        pairs = zip(replay(other), wanted, strict=True)
        return all(float((ours - theirs).norm()) <= REPLAY_RTOL * float(theirs.norm()) for ours, theirs in pairs)

    return captured(step, image, agrees=agrees)


def captured(step: Step, *inputs: Tensor, agrees: Callable[[Step], bool] = lambda replay: True) -> Step:
    """The step as a CUDA graph; itself, with a warning, if capture fails or results do not agree.

    Args:
        step: takes tensors of these shapes, and was run before; it reads nothing back, and other tensors that it
            updates, such as weights, keep their memory.
        inputs: examples to capture it with, not run.
        agrees: judges the graph.
    """
    if _broken:
        return step
    try:
        replay = capture(step, *inputs)
        if agrees(replay):
            return replay
        why = "their results differ from the step's"
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Ctrl-C, masked by the error of ending a capture
            raise KeyboardInterrupt from error
        why = first_line(error)
    warn(f"steps are not replayed as a CUDA graph: {why}")
    return step


def supports_capture(device: torch.device) -> bool:
    """Whether the device has CUDA graphs."""
    return device.type == "cuda"


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all: libraries keep memory for each one they see."""
    return torch.cuda.Stream(device)


def warm_up(step: Step, image: Tensor) -> tuple[Tensor, ...]:
    """The step's result, on the capture stream: in first calls libraries tune and allocate."""
    here, aside = torch.cuda.current_stream(image.device), _aside(image.device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        step(image)
        outputs = step(image)
    here.wait_stream(aside)
    return outputs


def capture(step: Step, *inputs: Tensor) -> Step:
    """The step as a graph captured with these; it keeps alive what else it reads, which must not move."""
    fixed, graph, device = [value.detach().clone() for value in inputs], torch.cuda.CUDAGraph(), inputs[0].device
    here, aside = torch.cuda.current_stream(device), _aside(device)
    aside.wait_stream(here)
    try:
        # the outer context restores the stream where a capture fails, which torch's own does not
        with (
            torch.cuda.device(device),
            torch.cuda.stream(aside),
            torch.cuda.graph(graph, stream=aside, capture_error_mode="thread_local"),
        ):
            outputs = step(*fixed)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            graph.reset()  # the step itself needs the memory that the capture was given
        with contextlib.suppress(Exception):  # before torch 2.13 it still counts as being captured
            generator = torch.cuda.default_generators[
                torch.cuda.current_device() if device.index is None else device.index
            ]
            generator.graphsafe_set_state(generator.clone_state())
        _broken.append(graph)
        raise
    here.wait_stream(aside)

    # `reads` keeps alive what the step works on, where the graph will look for it
    def replay(*inputs: Tensor, reads: Step = step) -> tuple[Tensor, ...]:
        for mine, value in zip(fixed, inputs, strict=True):
            mine.copy_(value)
        graph.replay()
        return tuple(value.clone() for value in outputs)

    return replay

"""Steps captured as CUDA graphs, which saves launching kernel by kernel, and scalars read asynchronously.

`captured` is for a loop whose steps are all alike, `Replays` for calls that others make. On other devices all of this
is a no-op: the step is the function itself, and its numbers are ready when it returns.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vggfeat.devices import free_memory
from vggfeat.errors import first_line, warn

Step = Callable[..., tuple[Tensor, ...]]
MIN_STEPS = 20  # fewest steps worth a capture, which takes three runs and a replay
REPLAY_RTOL = 0.01  # relative difference allowed to a replay: kernels that add in no fixed order differ by less
TIMED = range(3, 6)  # calls of a series that are timed, the first being 1: by then libraries have chosen their kernels
HOST_BOUND = 1.2  # times the host's time, below which the device's says that it waits for the host
MOST_SERIES = 8  # that are remembered: each is of calls with other sizes or settings
MEMORY_SHARE = 4  # a graph may keep this part of what is free
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
    if not _finite(wanted):
        return step  # which is for the loop to judge
    return captured(step, image, agrees=lambda replay: _close(replay(other), wanted))


def _finite(values: Sequence[Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in values)


def _close(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    return all(
        float((own - other).norm()) <= REPLAY_RTOL * float(other.norm())
        for own, other in zip(ours, theirs, strict=True)
    )


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
    """Whether the device has CUDA graphs; AMD's were never tried."""
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all: libraries keep memory for each one they see."""
    return torch.cuda.Stream(device)


def warm_up(step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The step's result, on the capture stream: in first calls libraries tune and allocate."""
    device = inputs[0].device
    here, aside = torch.cuda.current_stream(device), _aside(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        step(*inputs)
        outputs = step(*inputs)
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


@contextlib.contextmanager
def side_by_side(device: torch.device) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """For parts of a step that do not depend on one another: gives a function that makes a context for each part.

    In a capture they become branches of the graph, which run at the same time; elsewhere they run in turn.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield contextlib.nullcontext
        return
    here, asides = torch.cuda.current_stream(device), list[torch.cuda.Stream]()

    def part() -> AbstractContextManager[object]:
        asides.append(torch.cuda.Stream(device))
        asides[-1].wait_stream(here)
        return torch.cuda.stream(asides[-1])

    yield part
    for aside in asides:
        here.wait_stream(aside)


# ── calls that others make ────────────────────────────────────────────────────────────────────────────────────────────


class Replays:
    """Calls of a function, captured once they repeat, where launching its kernels takes longer than running them.

    One object serves one function, for inputs of several sizes. Copies and pickles of it are empty: graphs belong to
    one process and one owner.
    """

    def __init__(self) -> None:
        self._series: dict[Hashable, _Series] = {}  # the last used last
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def __call__(self, function: Step, inputs: Sequence[Tensor], key: Hashable) -> tuple[Tensor, ...]:
        """The function's results.

        Args:
            function: see `captured`; a graph keeps it, and all that it refers to, alive.
            inputs: its arguments.
            key: what else the results depend on.
        """
        if not supports_capture(inputs[0].device) or torch.cuda.is_current_stream_capturing():
            return function(*inputs)
        kind = inputs[0].device, tuple((value.shape, value.dtype) for value in inputs), _switches(), key
        with self._lock:
            series = self._series[kind] = self._series.pop(kind, _Series())
            if len(self._series) > MOST_SERIES:
                del self._series[next(iter(self._series))]
        return series.run(function, inputs)


class _Series:
    """Calls of one function with tensors of the same sizes."""

    def __init__(self) -> None:
        self.calls = 0
        self.timed: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []  # begin, end, and the host's seconds
        self.replay: Step | None = None

    def run(self, function: Step, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The function's results."""
        if self.replay is not None:
            return self.replay(*inputs)
        self.calls += 1
        if self.calls in TIMED:
            return self._time(function, inputs)
        if self.calls == TIMED.stop and self._waits_for_host():
            self._capture(function, inputs)
            if self.replay is not None:
                return self.replay(*inputs)
        return function(*inputs)

    def _time(self, function: Step, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        here = torch.cuda.current_stream(inputs[0].device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(here)
        start = time.perf_counter()
        outputs = function(*inputs)
        self.timed.append((begin, end, time.perf_counter() - start))
        end.record(here)
        return outputs

    def _waits_for_host(self) -> bool:
        """Whether the device was done with most calls about as soon as the host was; what still runs was not."""
        timed, self.timed = self.timed, []
        votes = [end.query() and begin.elapsed_time(end) < HOST_BOUND * 1e3 * host for begin, end, host in timed]
        return votes.count(True) > len(votes) // 2

    def _capture(self, function: Step, inputs: Sequence[Tensor]) -> None:
        """Set `replay`, unless capture fails, results differ, or the graph keeps too much memory."""
        device = inputs[0].device
        with torch.inference_mode(False), torch.no_grad():  # a graph's memory is written again later
            wanted = warm_up(function, *inputs)
            if not _finite(wanted):
                self.calls = 0  # nothing to compare with: another time
                return
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved(device)
            replay = captured(function, *inputs, agrees=lambda replay: _close(replay(*inputs), wanted))
        kept = torch.cuda.memory_reserved(device) - before
        if replay is not function and kept * (MEMORY_SHARE + 1) <= free_memory(device):  # which counts it as free
            self.replay = _one_at_a_time(replay, device)


def _one_at_a_time(replay: Step, device: torch.device) -> Step:
    """A replay for callers on several threads and streams: all replays of a graph use the same memory."""
    lock, done = threading.Lock(), torch.cuda.Event()

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with lock:
            here = torch.cuda.current_stream(device)
            here.wait_event(done)
            outputs = replay(*inputs)
            done.record(here)
        return outputs

    return run


def _switches() -> tuple[object, ...]:
    """Torch's global settings that choose kernels: a graph keeps those that it was captured with."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    readings: tuple[Callable[[], object], ...] = (
        lambda: cudnn.allow_tf32,
        lambda: cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        lambda: torch.backends.fp32_precision,  # type: ignore[attr-defined]
        lambda: matmul.fp32_precision,
        torch.get_float32_matmul_precision,
    )
    return (
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        torch.are_deterministic_algorithms_enabled(),
        *map(_reading, readings),
    )


def _reading(read: Callable[[], object]) -> object:
    """A setting, or why it has no value: older torch lacks some, and refuses to read what is set in two ways."""
    try:
        return read()
    except (AttributeError, RuntimeError) as error:
        return type(error)

"""Steps captured as CUDA graphs, which saves launching kernel by kernel, and scalars read asynchronously.

`captured` is for a loop whose steps are all alike, `Replays` for calls that others make. On other devices all of this
is a no-op: the step is the function itself, and its numbers are ready when it returns.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from vggfeat.errors import first_line, warn

Step = Callable[..., tuple[Tensor, ...]]
Stream = torch.cuda.Stream
MIN_STEPS = 20  # fewest steps worth a capture, which takes three runs and a replay
REPLAY_RTOL = 0.01  # relative difference allowed to a replay: kernels that add in no fixed order differ by less
TIMED = range(3, 6)  # calls of a series that are timed, the first being 1: by then libraries have chosen their kernels
HOST_BOUND = 1.2  # times the host's time, below which the device's says that it waits for the host
STREAMS = 32  # that torch has for each device, and hands out in turn
SPARE = STREAMS // 2  # of those, no branch of a graph takes: they are for graphs to come
MOST_SERIES = 8  # of calls with other sizes or settings each: that have a graph, or may get one
MEMORY_SHARE = 0.2  # of what is free, that a graph may keep
_busy = threading.Lock()  # one capture at a time, and no replay meanwhile: before torch 2.14 that would be an error
# of graphs that live, the streams that each was captured on
_streams: weakref.WeakKeyDictionary[torch.cuda.CUDAGraph, list[Stream]] = weakref.WeakKeyDictionary()
_branches: list[Stream] = []  # the streams of the capture under way
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
    """The step as a CUDA graph; itself if capture fails or results do not agree, of which the first time warns.

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


def warm_up(step: Step, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The step's result, on a stream of its own: in first calls libraries tune and allocate."""
    device = inputs[0].device
    here, aside = torch.cuda.current_stream(device), _warm_up_stream(device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        step(*inputs)
        outputs = step(*inputs)
    here.wait_stream(aside)
    return outputs


@functools.cache
def _warm_up_stream(device: torch.device) -> Stream:
    """One for all: libraries keep memory for each stream that they see."""
    return torch.cuda.Stream(device)


def _unused_stream(device: torch.device, spare: int = 0) -> Stream | None:
    """A stream that nothing was warmed up on, and no living graph captured; None where no more than `spare` are left.

    cuBLAS's memory for a stream is torch's to free: since 2.12 at the end of any graph that was captured on the stream,
    and before every capture of `torch.compile`'s. A graph that got it from elsewhere would work on what others are
    given then (pytorch/pytorch#193402). Allocated during the capture it stays in the graph's own pool.
    """
    living = itertools.chain.from_iterable([*_streams.values()])
    used: list[Stream | None] = [_warm_up_stream(device), *_branches, *living]
    used.append(getattr(torch.cuda.graph, "default_capture_stream", None))  # of the caller's graphs
    unused = [stream for stream in (torch.cuda.Stream(device) for _ in range(STREAMS)) if stream not in used]
    return unused[0] if len(unused) > spare else None


def capture(step: Step, *inputs: Tensor) -> Step:
    """The step as a graph captured with these; it keeps alive what else it reads, which must not move."""
    fixed, graph, device = [value.detach().clone() for value in inputs], torch.cuda.CUDAGraph(), inputs[0].device
    here = torch.cuda.current_stream(device)
    with _busy:
        if _broken:
            raise RuntimeError("another capture failed")
        aside = _unused_stream(device)
        if aside is None:
            raise RuntimeError("there are as many graphs as torch has streams")
        aside.wait_stream(here)
        _branches.append(aside)
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
        finally:
            _streams[graph] = _branches.copy()
            _branches.clear()
    here.wait_stream(aside)

    def replay(*inputs: Tensor) -> tuple[Tensor, ...]:
        if _broken:  # before torch 2.13 that is the end of earlier graphs, too
            return step(*inputs)
        for mine, value in zip(fixed, inputs, strict=True):
            mine.copy_(value)
        with _busy:
            graph.replay()
        return tuple(value.clone() for value in outputs)

    return replay


@contextlib.contextmanager
def side_by_side(device: torch.device) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """For parts of a step that do not depend on one another: gives a function that makes a context for each part.

    In a capture they become branches of the graph, which run at the same time, as long as there are streams to spare;
    elsewhere they run in turn.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        yield contextlib.nullcontext
        return
    here, asides = torch.cuda.current_stream(device), list[Stream]()

    def part() -> AbstractContextManager[object]:
        aside = _unused_stream(device, SPARE)
        if aside is None:
            return contextlib.nullcontext()
        aside.wait_stream(here)
        asides.append(aside)
        if _branches:  # empty where the capture is the caller's
            _branches.append(aside)
        return torch.cuda.stream(aside)

    yield part
    for aside in asides:
        here.wait_stream(aside)


# ── calls that others make ────────────────────────────────────────────────────────────────────────────────────────────


class Replays:
    """Calls of a function, captured once they repeat, where launching its kernels takes longer than running them.

    One object serves one function, for inputs of several sizes. Copies and pickles of it are empty: graphs belong to
    one process and one owner. While a graph is captured, other threads must not draw random numbers on the device;
    torch raises an error there.
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
        series = self._series_of(
            (inputs[0].device, tuple((value.shape, value.dtype) for value in inputs), _switches(), key)
        )
        return function(*inputs) if series is None else series.run(function, inputs)

    def _series_of(self, kind: Hashable) -> _Series | None:
        """The calls of that kind; None for new ones once there are enough graphs."""
        with self._lock:
            series = self._series[kind] = self._series.pop(kind, _Series())
            if len(self._series) > MOST_SERIES:
                # a graph stays: to capture one for each of many sizes, again and again, would take longer than it saves
                oldest = next(kind for kind, other in self._series.items() if other.replay is None)
                if self._series.pop(oldest) is series:
                    return None
        return series


class _Series:
    """Calls of one function with tensors of the same sizes."""

    def __init__(self) -> None:
        self.numbers = itertools.count(1)  # of the calls; threads may call at once
        self.timed: list[tuple[torch.cuda.Event, torch.cuda.Event, float]] = []  # begin, end, and the host's seconds
        self.waits = False  # whether calls were found to wait for the host, and no capture was tried yet
        self.replay: Step | None = None

    def run(self, function: Step, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The function's results."""
        if self.replay is None:
            number = next(self.numbers)
            if number in TIMED:
                return self._time(function, inputs)
            if number == TIMED.stop:
                self.waits = self._waits_for_host()
            if self.waits and not _broken and not _busy.locked():  # or else at the next call
                self._capture(function, inputs)
                if self.replay is None:
                    torch.cuda.empty_cache()  # what the trial took on a stream of its own is of use to no other
        return function(*inputs) if self.replay is None else self.replay(*inputs)

    def _time(self, function: Step, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        here = torch.cuda.current_stream(inputs[0].device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(here)
        start = time.perf_counter()
        outputs = function(*inputs)
        seconds = time.perf_counter() - start
        end.record(here)
        self.timed.append((begin, end, seconds))
        return outputs

    def _waits_for_host(self) -> bool:
        """Whether the device was done with most calls about as soon as the host.

        A call that it is still not done with at the next but one counts against it.
        """
        timed, self.timed = self.timed, []
        votes = [end.query() and begin.elapsed_time(end) < HOST_BOUND * 1e3 * host for begin, end, host in timed]
        return votes.count(True) > len(votes) // 2

    def _capture(self, function: Step, inputs: Sequence[Tensor]) -> None:
        """Set `replay`, unless capture fails, results differ, or the graph would keep too much memory."""
        self.waits, device = False, inputs[0].device
        torch.cuda.empty_cache()  # what is free is then known, and what is reserved from now on is the function's
        free, before = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_reserved(device)
        with torch.inference_mode(False), torch.no_grad():  # a graph's memory is written again later
            try:
                wanted = warm_up(function, *inputs)
            except torch.OutOfMemoryError:  # in memory of another stream: in the caller's there may be room
                return
            if not _finite(wanted):  # nothing to compare with: another time
                self.numbers = itertools.count(1)
            elif torch.cuda.memory_reserved(device) - before <= MEMORY_SHARE * free:
                replay = captured(function, *inputs, agrees=lambda replay: _close(replay(*inputs), wanted))
                self.replay = None if replay is function else _one_at_a_time(replay, device)


@functools.cache
def _replayed(device: torch.device) -> torch.cuda.Event:
    """When the last replay on a device was done."""
    return torch.cuda.Event()


def _one_at_a_time(replay: Step, device: torch.device) -> Step:
    """A replay for callers on several threads and streams.

    All replays of a graph use the same memory, and streams are so few that it may share that of a library with a graph
    of the caller's.
    """
    lock, done = threading.Lock(), _replayed(device)

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
        lambda: (matmul.allow_bf16_reduced_precision_reduction, matmul.allow_fp16_reduced_precision_reduction),
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

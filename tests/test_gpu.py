"""What a GPU is asked to do. Without one, on tensors that have a device, a shape and no values: torch's fake tensors.

A fake tensor on CUDA refuses to be read and to be mixed with one on the CPU, so that a step which passes here does
neither. Autograd's engine does not run on them: the backward of the trunk is called by its operator, and a whole step
is watched on the CPU. What only a GPU can show is marked `gpu`.
"""

import concurrent.futures
import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import os
import pickle
import random
import subprocess
import sys
import time
import types
import warnings
import weakref

import pictures
import pytest
import torch
from pictures import scene
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vggfeat
from vggfeat import (
    PerceptualLoss,
    StyleConfig,
    TrainConfig,
    VGGFeatures,
    Views,
    cuda_graphs,
    devices,
    evaluate,
    feature_loss as feature_loss_module,
    features as features_module,
    functional as functional_module,
    stylize,
    train,
)
from vggfeat.arch import PADDINGS, POOLINGS
from vggfeat.functional import CRITERIA, average_pool, distance_and_gradient, gram, total_variation, unit_normalize
from vggfeat.image import to_tensor
from vggfeat.training import learner as learner_module
from vggfeat.transfer import stylize as stylize_module
from vggfeat.transfer.objective import Objective
from vggfeat.transfer.optimize import LBFGS, Adam, FourierPreconditioner
from vggfeat.trunk import (
    Plan,
    autograd as autograd_module,
    direct as direct_module,
    filters as filters_module,
    layers as layers_module,
    operators,
    walk,
)

TAPS = ("relu1_1", "conv2_1", "pool2", "relu3_1")


class Strict(TorchDispatchMode):
    """Refuses every operation that a GPU would have to wait for, or the host for it: one with a tensor on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, found)) if isinstance(value, torch.Tensor)]
        assert all(value.device.type == "cuda" for value in tensors), f"{func} has a tensor on the CPU"
        return found


@pytest.fixture
def fake(monkeypatch):
    """A context in which CUDA tensors can be made, and the trunk runs what its operators are made of."""
    monkeypatch.setattr(autograd_module, "is_watched", lambda *tensors: False)
    monkeypatch.setattr(filters_module, "without_modes", contextlib.nullcontext)  # so that weights become fake, too
    monkeypatch.setattr(features_module, "without_modes", contextlib.nullcontext)
    monkeypatch.setattr(functional_module, "without_modes", contextlib.nullcontext)
    for module in (devices, functional_module):
        monkeypatch.setattr(module, "bfloat16_is_fast", lambda device: True)
    # which fake tensors know nothing of
    monkeypatch.setattr(direct_module, "_cudnn_takes", lambda x, weight: False)
    monkeypatch.setattr(devices, "_known", {})
    monkeypatch.setattr(devices, "_working", lambda device, dtype: None)
    monkeypatch.setattr(VGGFeatures, "_check_values", lambda self, images: None)  # which reads the first batch
    kept = features_module._kept_channels, functional_module._kept_bins
    for each in kept:
        each.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode
    for each in kept:
        each.cache_clear()


class Stream:
    """Stands for `torch.cuda.Stream`: one of a few, which are handed out in turn."""

    made = itertools.count()

    def __init__(self, *_):
        self.number, self.waits = next(self.made) % cuda_graphs.STREAMS, 0

    def __eq__(self, other):
        return isinstance(other, Stream) and self.number == other.number

    def wait_stream(self, other):
        self.waits += 1


class Recorder:
    """Stands for `torch.cuda` and its graphs: a replay does again what was done while it was recorded."""

    def __init__(self, monkeypatch, fails=None):
        self.fails, self.steps, self.resets, self.here, self.warm_up = fails, [], 0, Stream(), Stream()
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.here)
        monkeypatch.setattr(cuda_graphs, "_warm_up_stream", lambda device: self.warm_up)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(cuda_graphs, "supports_capture", lambda device: True)
        monkeypatch.setattr(cuda_graphs, "_broken", [])
        monkeypatch.setattr(cuda_graphs, "_streams", weakref.WeakKeyDictionary())

    def reset(self):
        self.resets += 1
        raise RuntimeError("nothing to reset")  # which must not hide why it was to be

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        yield
        if self.fails is not None:
            raise self.fails

    def step(self, image):
        self.steps.append((image, out := image * 2))
        return (out,)

    def replay(self):
        fixed, out = self.recorded
        out.copy_(fixed * 2)

    @property
    def recorded(self):
        return self.steps[2]  # after two that warm up


def test_a_recorded_step_is_the_step(monkeypatch):
    recorder, image = Recorder(monkeypatch), torch.rand(1, 3, 4, 4)
    replay = cuda_graphs.captured_and_checked(recorder.step, image, cuda_graphs.MIN_STEPS)
    (streams,) = cuda_graphs._streams.values()
    # each way around the warming up and the recording
    assert len(recorder.steps) == 3 and recorder.here.waits == 2 and recorder.warm_up.waits == streams[0].waits == 1
    first, second = replay(image + 1)[0], replay(image + 2)[0]
    assert len(recorder.steps) == 3  # nothing was launched
    assert torch.equal(first, 2 * (image + 1)) and torch.equal(second, 2 * (image + 2))
    monkeypatch.setattr(cuda_graphs, "_broken", ["another capture"])  # after which torch may replay none
    assert torch.equal(replay(image + 3)[0], 2 * (image + 3)) and len(recorder.steps) == 4
    with pytest.raises(RuntimeError, match="another capture failed"):
        cuda_graphs.capture(recorder.step, image)


def test_no_two_graphs_that_live_are_recorded_on_one_stream(monkeypatch):
    """Torch frees the memory that cuBLAS has for a stream at the end of any graph that was recorded on it."""
    recorder, image = Recorder(monkeypatch), torch.rand(1, 3, 4, 4)

    class Graph:
        replay = staticmethod(lambda: None)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(recorder.graph.__func__, "default_capture_stream", Stream(), raising=False)  # of the caller's
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    made = []

    def step(image):
        with cuda_graphs.side_by_side(torch.device("cuda")) as part:
            for _ in range(3):
                with part():
                    made.append(image * 2)
        return (image * 2,)

    def numbers():
        return [stream.number for each in cuda_graphs._streams.values() for stream in each]

    step(image)  # in a graph of the caller's
    replays = [cuda_graphs.captured(step, image) for _ in range(3)]
    assert len(numbers()) == 3 * 4 and not cuda_graphs._branches
    apart = {*numbers(), recorder.warm_up.number, torch.cuda.graph.default_capture_stream.number}
    assert len(apart) == len(numbers()) + 2
    replays += [cuda_graphs.captured(step, image) for _ in range(17)]  # the first of them with one branch, others none
    assert len({*numbers()}) == len(numbers()) == 3 * 4 + 2 + 16 == cuda_graphs.STREAMS - 2 and len(made) == 3 * 21
    with pytest.warns(UserWarning, match="not replayed as a CUDA graph: there are as many graphs"):
        assert cuda_graphs.captured(step, image) is step
    del replays[0]
    assert cuda_graphs.captured(step, image) is not step


def test_a_recording_that_failed_is_the_last(monkeypatch):
    recorder, image = Recorder(monkeypatch, RuntimeError("operation not permitted")), torch.rand(1, 3, 4, 4)
    with pytest.warns(UserWarning, match="not replayed as a CUDA graph: operation not permitted"):
        assert cuda_graphs.captured_and_checked(recorder.step, image, cuda_graphs.MIN_STEPS) == recorder.step
    assert cuda_graphs._broken == [recorder] and recorder.resets == 1
    assert (
        cuda_graphs.captured_and_checked(recorder.step, image, cuda_graphs.MIN_STEPS) == recorder.step
        and len(recorder.steps) == 3
    )


def test_ctrl_c_while_recording_is_ctrl_c(monkeypatch):
    error = RuntimeError("the recording was not ended")
    error.__context__ = KeyboardInterrupt()
    recorder = Recorder(monkeypatch, error)
    with pytest.raises(KeyboardInterrupt):
        cuda_graphs.captured_and_checked(recorder.step, torch.rand(1, 3, 4, 4), cuda_graphs.MIN_STEPS)


def images(count=1, side=64):
    return torch.empty(count, 3, side, side, device="cuda")


def test_the_check_can_fail(fake):
    with pytest.raises(DataDependentOutputException):
        images().sum().item()
    with pytest.raises(AssertionError, match="on the CPU"), Strict():
        torch.tensor([1.0, 2.0], device="cuda")


@pytest.mark.parametrize("keep", ["bits", "values"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_the_trunk_waits_for_nothing(fake, keep, precision, pooling):
    padding = PADDINGS[(POOLINGS.index(pooling) + (keep == "bits") + (precision == "float32")) % 3]  # all pairs occur
    features = VGGFeatures(TAPS, weights="random", precision=precision, keep=keep, pooling=pooling, padding=padding)
    x = images(2, 40)
    features(x)  # weights and constants are brought over once
    with Strict():
        taps = features(x)
        shapes = [tuple(tap.shape) for tap in taps.values()]
    assert shapes == [(2, 64, 40, 40), (2, 128, 20, 20), (2, 128, 10, 10), (2, 256, 10, 10)]
    dtype = getattr(torch, precision)
    assert {(tap.device.type, tap.dtype) for tap in taps.values()} == {("cuda", dtype)}
    plan = features.plan
    filters = features.trunk.filters(plan, x.device, dtype, (), (40, 40))
    with Strict(), torch.no_grad():
        found = operators.forward(x, filters, plan.code, keep)
        count = len(plan.names)
        again = [found[i] for i in walk.reread(plan, keep)]
        gradient = operators.backward(
            [tap.clone() for tap in found[:count]],
            range(count),
            again,
            found[count:],
            filters,
            x.shape,
            plan.code,
            keep,
        )
    assert (gradient.shape, gradient.device.type, gradient.dtype) == (x.shape, "cuda", dtype)


@pytest.mark.parametrize("padding", ["reflect", "replicate"])
def test_a_gradient_of_padding_is_reproducible_where_that_is_asked_for(fake, padding, monkeypatch):
    """On CUDA torch has no such backward of its own, and raises an error."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    grad, weight = torch.empty(2, 8, 5, 6, device="cuda"), torch.empty(4, 8, 3, 3, device="cuda")
    for asked in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda asked=asked: asked)
        seen.clear()
        with Watch():
            found = layers_module.conv_backward(grad, weight, 1, padding, 5, 6)
        assert found.shape == (2, 4, 5, 6) and found.is_contiguous(memory_format=torch.channels_last)
        assert any("pad2d_backward" in each for each in seen) != asked


def test_what_compilers_are_told_of_the_operators_holds_on_cuda(fake):
    features = VGGFeatures(TAPS, weights="random")
    plan = Plan(features.arch, TAPS)
    for keep in ("none", "bits", "values"):
        x = images(2, 40)
        filters = features.trunk.filters(plan, x.device, torch.float32, (), (40, 40))
        ours = operators.forward(x, filters, plan.code, keep)
        told = operators.trunk_forward(x, filters, plan.code, keep)
        assert [(t.shape, t.dtype, t.stride()) for t in ours] == [(t.shape, t.dtype, t.stride()) for t in told]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_distances_wait_for_nothing(fake, criterion):
    ours, theirs = (torch.empty(2, 64, 20, 20, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    with Strict(), torch.no_grad():
        CRITERIA[criterion](unit_normalize(ours), unit_normalize(theirs))
        gram(ours)
        total_variation(images())
        if criterion != "cosine":
            _, grad = distance_and_gradient(ours, theirs, criterion, True, None)
            assert grad.device.type == "cuda"


def test_a_pool_that_is_reproducible_waits_for_nothing(fake, monkeypatch):
    """As in a deterministic training with the paper's head, whose steps are captured after a few."""
    monkeypatch.setattr(functional_module, "values_are_hidden", lambda: False)  # as there, where nothing is fake
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    x = torch.empty(2, 64, 4, 5, dtype=torch.bfloat16, device="cuda")
    average_pool(x)  # what it multiplies by is brought over once
    with Strict():
        assert average_pool(x).shape == (2, 64, 7, 7)


@pytest.mark.parametrize(
    "optimizer",
    [lambda x: LBFGS(history=2, preconditioner=FourierPreconditioner(x)), lambda x: LBFGS(), lambda x: Adam()],
)
def test_optimisers_wait_for_nothing(fake, optimizer):
    x = images()
    mover = optimizer(x)
    with Strict():
        for _ in range(4):
            x = mover.step(x, torch.randn_like(x))
    assert x.device.type == "cuda"


def test_terms_of_a_style_transfer_wait_for_nothing(fake):
    config = StyleConfig(tv_weight=0.1)
    layers = (*config.style_layers, *config.content_layers)
    features = VGGFeatures(layers, arch="vgg19", weights="random", precision="auto", keep="values")
    x = images(1, 64)
    objective = Objective(features, config, x, [x, x])
    with Strict(), torch.no_grad():
        terms = objective.terms(x)
    assert {value.device.type for value in terms.values()} == {"cuda"}


# ── reading late, and replayed steps ──────────────────────────────────────────────────────────────────────────────────


def test_a_reading_is_what_was_read():
    assert cuda_graphs.AsyncScalars(torch.tensor([1.5, -2.0])).get() == [1.5, -2.0]


def test_steps_are_themselves_where_there_is_no_cuda():
    def step(image):
        return (image,)

    assert cuda_graphs.captured_and_checked(step, torch.zeros(1, 3, 4, 4), times=100) is step
    assert cuda_graphs.lookahead(torch.device("cpu")) == 0


SETTINGS = {
    "size": 48,
    "start_size": 24,
    "steps": 12,
    "weights": "random",
    "style_layers": ("relu1_1", "relu2_1"),
    "content_layers": ("relu2_2",),
    "precision": "float32",
}


@pytest.mark.parametrize("optimizer", ["lbfgs", "adam"])
def test_looking_a_step_later_changes_nothing(optimizer, monkeypatch):
    config = StyleConfig(**SETTINGS, optimizer=optimizer)
    at_once = stylize(scene(48, 36, seed=1), scene(48, 36, seed=2), config)
    monkeypatch.setattr(stylize_module, "lookahead", lambda device: 1)
    later = stylize(scene(48, 36, seed=1), scene(48, 36, seed=2), config)
    assert later.history == at_once.history and len(later.history) == 18
    assert later.image.tobytes() == at_once.image.tobytes()


@pytest.fixture
def pretend(monkeypatch):
    """As on CUDA, but for what records: that is given."""

    def make(record):
        monkeypatch.setattr(cuda_graphs, "supports_capture", lambda device: True)
        monkeypatch.setattr(cuda_graphs, "warm_up", lambda step, image: step(image))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
        monkeypatch.setattr(cuda_graphs, "capture", record)

    return make


def step_of(image):
    return image.sum().expand(2), image * 2


class Events:
    """Stands for `torch.cuda.Event`: all of a call's work takes the device so many times as long as the host."""

    share = 1.0

    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self, stream):
        self.at = time.perf_counter()

    def query(self):
        return True

    def elapsed_time(self, end):
        return 1e3 * self.share * (end.at - self.at)


@pytest.fixture
def replays(monkeypatch):
    """`Replays` on the CPU, whose graphs are what is recorded of their capture: a list of functions and inputs."""
    made = []

    def record(step, *inputs):
        made.append((step, inputs))
        return lambda *inputs: tuple(value.clone() for value in step(*inputs))

    monkeypatch.setattr(cuda_graphs, "supports_capture", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "warm_up", lambda step, *inputs: step(*inputs))
    monkeypatch.setattr(cuda_graphs, "capture", record)
    monkeypatch.setattr(feature_loss_module, "supports_capture", lambda device: True)
    stream = types.SimpleNamespace(wait_event=lambda event: None)
    names = {
        "is_current_stream_capturing": lambda: False,
        "current_stream": lambda device: stream,
        "Stream": lambda device: stream,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (100, 200),
        "memory_reserved": lambda device: 0,
        "Event": Events,
    }
    for name, stand_in in names.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


def test_what_is_called_again_is_replayed(replays):
    calls = cuda_graphs.Replays()
    called = []

    def function(x):
        called.append(x)
        return x * 2, x.sum()

    for number in range(12):
        x = torch.full((3,), float(number))
        found = calls(function, [x], "a")
        assert torch.equal(found[0], 2 * x) and found[1] == x.sum()
        assert len(replays) == (number >= 5)
    other = torch.ones(4)
    for key in ("a", "b"):  # another size, other settings
        assert torch.equal(calls(function, [other], key)[0], 2 * other) and len(replays) == 1


def test_only_what_waits_for_the_host_is_replayed(replays, monkeypatch):
    monkeypatch.setattr(Events, "share", 1.5)
    calls = cuda_graphs.Replays()
    for _ in range(12):
        calls(step_of, [torch.ones(3)], None)
    assert not replays
    monkeypatch.setattr(Events, "query", lambda self: False)  # so far behind that it is not done at the next call
    monkeypatch.setattr(Events, "share", 0.1)
    calls = cuda_graphs.Replays()
    for _ in range(12):
        calls(step_of, [torch.ones(3)], None)
    assert not replays


@pytest.mark.parametrize("wrong", [{"capture": 2.0}, {"memory": 1 << 60}, {"nan": True}])
def test_a_graph_that_is_wrong_or_too_large_is_not_used(replays, monkeypatch, wrong):
    def doubled(step, *inputs):
        return lambda *given: step(*(2 * x for x in given))

    if "capture" in wrong:
        monkeypatch.setattr(cuda_graphs, "capture", doubled)
    if "memory" in wrong:
        sizes = iter([0, wrong["memory"]] * 9)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(sizes))
    x = torch.full((3,), math.nan if "nan" in wrong else 1.0)
    calls = cuda_graphs.Replays()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [calls(step_of, [x], None) for _ in range(12)]
    assert all(torch.equal(values[1].nan_to_num(), (2 * x).nan_to_num()) for values in found)
    (series,) = calls._series.values()
    assert series.replay is None


def test_a_capture_that_has_no_room_or_must_wait_is_not_made(replays, monkeypatch):
    calls, x = cuda_graphs.Replays(), torch.ones(3)
    for _ in range(5):
        calls(step_of, [x], None)
    with cuda_graphs._busy:  # by another thread
        assert torch.equal(calls(step_of, [x], None)[1], 2 * x) and not replays
    assert torch.equal(calls(step_of, [x], None)[1], 2 * x) and len(replays) == 1

    def no_room(step, *inputs):
        tried.append(step)
        raise torch.OutOfMemoryError("no room")

    tried = []
    monkeypatch.setattr(cuda_graphs, "warm_up", no_room)
    for broken in ([], ["failed before"]):
        monkeypatch.setattr(cuda_graphs, "_broken", broken)
        calls = cuda_graphs.Replays()
        for _ in range(12):
            assert torch.equal(calls(step_of, [x], None)[1], 2 * x)
        assert len(tried) == 1 and len(replays) == 1


def test_series_that_are_not_used_are_forgotten_and_graphs_stay(replays):
    calls = cuda_graphs.Replays()
    for size in range(1, 20):
        calls(step_of, [torch.ones(size)], None)
        calls(step_of, [torch.ones(1)], None)
    assert len(calls._series) == cuda_graphs.MOST_SERIES and len(replays) == 1
    assert not copy.deepcopy(calls)._series and not pickle.loads(pickle.dumps(calls))._series

    calls = cuda_graphs.Replays()
    replays.clear()
    sizes = random.Random(0)
    for _ in range(2000):
        x = torch.ones(sizes.randrange(1, 12))
        assert torch.equal(calls(step_of, [x], None)[1], 2 * x)
    graphs = [series for series in calls._series.values() if series.replay is not None]
    assert 4 < len(replays) == len(graphs) <= len(calls._series) == cuda_graphs.MOST_SERIES  # none was made in vain


def content_and_style(**options):
    content = vggfeat.PerceptualLoss(["relu2_2"], criterion="l1", **options)
    return vggfeat.CombinedLoss([content, vggfeat.StyleLoss(["relu1_2", "relu2_2"], **options)], [0.1, 50.0])


@pytest.mark.parametrize("kind", ["perceptual", "cosine", "style", "lpips", "combined"])
@pytest.mark.parametrize("given", ["images", "encoded", "masked", "one target", "both trained", "no grad"])
def test_losses_that_are_replayed_are_the_losses(replays, kind, given):
    make = {
        "perceptual": lambda **options: vggfeat.PerceptualLoss(["relu1_2", "conv2_2"], weights="random", **options),
        "cosine": lambda **options: vggfeat.PerceptualLoss(
            ["relu1_2"], weights="random", criterion="cosine", layer_weights=[2.0], **options
        ),
        "style": lambda **options: vggfeat.StyleLoss(["relu1_1", "relu2_1"], weights="random", **options),
        "lpips": lambda **options: vggfeat.LPIPS(weights="random", **options),
        "combined": lambda **options: content_and_style(weights="random", **options),
    }[kind]
    ours, theirs = make(), make(cuda_graphs=False)
    fixed = scene(24, 16, seed=50)

    def result(loss, number):
        x = torch.cat([scene(24, 16, seed=number), scene(24, 16, seed=number + 20)])
        y = torch.cat([scene(24, 16, seed=number + 30), fixed]) if given != "one target" else fixed
        mask = (x[:, :1] > 0.4).float() if given == "masked" else None
        image, y = x.clone().requires_grad_(given != "no grad"), y.requires_grad_(given == "both trained")
        value = loss(image, loss.encode(y) if given == "encoded" else y, mask)
        if given == "no grad":
            return (value,)
        value.sum().backward()
        return value.detach(), image.grad, *([y.grad] if y.requires_grad else [])

    for number in range(5):
        result(ours, number)
    assert not replays
    for number in (5, 6):
        for own, wanted in zip(result(ours, number), result(theirs, number), strict=True):
            torch.testing.assert_close(own, wanted)
    assert len(replays) == 1


def test_settings_of_a_loss_that_change_are_heeded(replays):
    loss = vggfeat.PerceptualLoss(["relu1_1", "relu1_2"], weights="random")
    x, y = scene(40, 32, seed=1), scene(40, 32, seed=2)
    with torch.no_grad():
        before = [loss(x, y) for _ in range(8)][-1]
        assert len(replays) == 1
        loss.layer_weights["relu1_1"] = 0.0
        assert loss(x, y) < before
        loss.layer_weights["relu1_1"] = 1.0
        torch.testing.assert_close(loss(x, y), before)
        loss.criterion = "l1"
        assert loss(x, y) != before
    with torch.no_grad():
        loss.layer_weights["relu1_2"] = weight = torch.tensor(1.0)
        values = [loss(x, y) for _ in range(8)]
        weight.zero_()  # which a graph would not notice
        assert loss(x, y) < values[-1]
        loss.layer_weights["relu1_2"], seen = 1.0, []
        hook = loss.features.register_forward_hook(lambda *given: seen.append(given))
        loss(x, y)
        assert len(seen) == 2
        hook.remove()
    assert not pickle.loads(pickle.dumps(loss))._replays._series
    assert not copy.deepcopy(loss)._replays._series and not loss._snapshot()._replays._series


@pytest.mark.parametrize("wrong", [0.0, 1e-4, 1e-2, math.nan])
def test_a_recording_serves_where_it_gives_the_same(pretend, wrong):
    def replay(image):
        return tuple(value + wrong * value.norm() for value in step_of(image))

    pretend(lambda step, image: replay)
    image = torch.rand(1, 3, 8, 8)
    assert cuda_graphs.captured_and_checked(step_of, image, times=cuda_graphs.MIN_STEPS - 1) is step_of
    if wrong < 1e-3:
        assert cuda_graphs.captured_and_checked(step_of, image, times=cuda_graphs.MIN_STEPS) is replay
    else:
        with pytest.warns(UserWarning, match="results differ"):
            assert cuda_graphs.captured_and_checked(step_of, image, times=cuda_graphs.MIN_STEPS) is step_of


def test_a_recording_that_ignores_its_image_is_not_used(pretend):
    image = torch.rand(1, 3, 8, 8)
    frozen = step_of(image)
    pretend(lambda step, image: lambda other: frozen)
    with pytest.warns(UserWarning, match="results differ"):
        assert cuda_graphs.captured_and_checked(step_of, image, times=100) is step_of


def test_errors_of_the_step_are_its_own(pretend):
    def fail(image):
        raise RuntimeError("out of memory")

    pretend(lambda step, image: pytest.fail("recorded"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="out of memory"):
            cuda_graphs.captured_and_checked(fail, torch.zeros(1, 3, 8, 8), times=100)
        image = torch.full((1, 3, 8, 8), math.nan)
        assert cuda_graphs.captured_and_checked(step_of, image, times=100) is step_of


def test_a_recording_that_fails_costs_a_warning(pretend):
    def fail(step, image):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    config = StyleConfig(**SETTINGS | {"start_size": 48, "steps": cuda_graphs.MIN_STEPS})
    wanted = stylize(scene(48, 36, seed=1), scene(48, 36, seed=2), config).image.tobytes()
    pretend(fail)
    with pytest.warns(UserWarning, match="not permitted when stream is capturing$") as seen:
        assert stylize(scene(48, 36, seed=1), scene(48, 36, seed=2), config).image.tobytes() == wanted
    assert [warning.filename for warning in seen] == [__file__]


class Apart(TorchDispatchMode):
    """Refuses to give a number to the host and to take one from it, on real tensors."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert func not in (aten._local_scalar_dense.default, aten.lift_fresh.default, aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("normalization", ["scale-free", "gatys"])
def test_a_whole_step_gives_and_takes_no_number(normalization, monkeypatch):
    monkeypatch.setattr(layers_module, "stays_finite", lambda *_: True)  # it looks at images on CPUs alone
    config = StyleConfig(**SETTINGS | {"normalization": normalization, "tv_weight": 0.1})
    layers = (*config.style_layers, *config.content_layers)
    features = VGGFeatures(layers, arch="vgg19", weights="random", keep="values")
    objective = Objective(features, config, scene(48, 36, seed=1), [scene(48, 36, seed=2), scene(48, 36, seed=3)])
    objective.value_and_grad(scene(48, 36, seed=1))  # constants are made once
    with Apart():
        numbers, grad = stylize_module._together(*objective.value_and_grad(scene(48, 36, seed=1)))
    assert numbers.shape == (4,) and grad.shape == (1, 3, 36, 48) and grad.abs().sum() > 0
    with pytest.raises(AssertionError, match="lift_fresh"), Apart():
        torch.tensor([1.0])


# ── on a GPU, what a CPU can run too ──────────────────────────────────────────────────────────────────────────────────

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"head": "slim", "ema": 0.9},
        {"head": "paper", "size": 64, "resize": (64,), "precision": "float16", "dropout": 0.3},
    ],
)
def test_a_deterministic_training_goes_on_to_the_same_bits(tmp_path, device, options):
    settings = {"arch": "vgg11_bn", "width": 0.125, "batch_size": 8, "epochs": 2, "save_every": 1} | options
    config = TrainConfig(**settings, device=device, deterministic=True)
    data = pictures.folder(tmp_path / "data", pictures.tree(8))

    def stop(step):
        if (step.epoch, step.step) == (2, 1):
            raise RuntimeError("stopped")

    whole = train(data, config=config, folder=tmp_path / "whole")
    with pytest.raises(RuntimeError, match="stopped"):
        train(data, config=config, folder=tmp_path / "parts", callback=stop)
    found = train(data, config=config, folder=tmp_path / "parts", resume=True)
    assert not found.damaged and len(found.history) == 2
    assert next(found.net.parameters()).device.type == device
    for ours, theirs in zip(found.net.state_dict().values(), whole.net.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) and ours.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "nesterov": True, "clip": 1.0},
        {"optimizer": "adam", "lr": 1e-3, "ema": 0.5, "schedule": "step", "step_size": 1},
        {"optimizer": "muon", "mixup": 0.2, "arch": "vgg11"},
        {"optimizer": "sgd", "head": "paper", "dropout": 0.0},  # with a pool of its own, where it is deterministic
    ],
    ids=["sgd", "adam", "muon", "paper"],
)
def test_a_replayed_training_is_the_training(tmp_path, device, options, monkeypatch):
    settings = {"arch": "vgg11_bn", "width": 0.125, "batch_size": 8, "epochs": 4, "precision": "float32"} | options
    config = TrainConfig(**settings, device=device, deterministic=True)
    data = pictures.folder(tmp_path / "data", pictures.tree(8))
    made, record = [], cuda_graphs.capture if device == "cuda" else lambda step, *inputs: step
    monkeypatch.setattr(learner_module, "supports_capture", lambda device: False)
    plain = train(data, config=config, folder=tmp_path / "plain")
    monkeypatch.setattr(learner_module, "supports_capture", lambda device: True)
    monkeypatch.setattr(cuda_graphs, "capture", lambda step, *inputs: made.append(step) or record(step, *inputs))
    replayed = train(data, config=config, folder=tmp_path / "replayed")
    assert len(made) == 1
    for ours, theirs in zip(replayed.net.state_dict().values(), plain.net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)  # rates are float32 where they are replayed
    for ours, theirs in zip(replayed.history, plain.history, strict=True):
        assert ours.lr == theirs.lr and ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-3)


def test_a_training_whose_recording_fails_is_the_training(tmp_path, monkeypatch):
    config = TrainConfig(arch="vgg11", width=0.125, batch_size=8, epochs=3, precision="float32", device="cpu")
    data = pictures.folder(tmp_path / "data", pictures.tree(8))
    wanted = train(data, config=config, folder=tmp_path / "plain")

    def record(step, *inputs):
        for value in step.__self__.net.parameters():
            value.grad = torch.full_like(value, math.nan)  # as the memory of a recording has anything in it
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", record)
    monkeypatch.setattr(learner_module, "supports_capture", lambda device: True)
    with pytest.warns(UserWarning, match="not replayed as a CUDA graph"):
        found = train(data, config=config, folder=tmp_path / "failed")
    for ours, theirs in zip(found.net.state_dict().values(), wanted.net.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_an_evaluation_is_that_on_the_cpu(tmp_path, device):
    data = pictures.folder(tmp_path / "data", pictures.tree(8))
    net = vggfeat.vgg11(num_classes=3, batch_norm=True, head="slim", width=0.25)
    options = {"views": Views(flip=True), "precision": "float32"}
    found, wanted = (evaluate(net, data, **options, device=each) for each in (device, "cpu"))
    assert found.images == wanted.images == 24 and found.loss == pytest.approx(wanted.loss, rel=1e-2)  # TF32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("pooling", "padding"), [*zip(POOLINGS, PADDINGS, strict=True)])
def test_second_derivatives_are_those_on_the_cpu(device, pooling, padding):
    features = VGGFeatures(["relu1_2", "relu2_1"], weights="random", pooling=pooling, padding=padding)
    generator = torch.Generator().manual_seed(0)
    image, along = torch.rand(2, 1, 3, 24, 24, generator=generator, dtype=torch.float64)
    results = []
    for each in (device, "cpu"):
        x = image.to(each, copy=True).requires_grad_()
        value = sum(tap.square().mean() for tap in features(x).values())
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        results.append(torch.autograd.grad((grad * along.to(each)).sum(), x)[0].cpu())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)


# ── on a GPU ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_style_transfer_on_a_gpu_is_replayed_and_looks_the_same(precision):
    config = StyleConfig(**SETTINGS | {"precision": precision, "size": 96, "steps": 40})
    there = stylize(scene(48, 36, seed=1), scene(48, 36, seed=2), dataclasses.replace(config, device="cpu"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that no graph could be made
        here = stylize(scene(48, 36, seed=1), scene(48, 36, seed=2), dataclasses.replace(config, device="cuda"))
    assert here.losses["total"] == pytest.approx(there.losses["total"], rel=0.1)
    assert (to_tensor(here.image) - to_tensor(there.image)).abs().mean() < 0.03  # 0.01 where TF32 is emulated


@pytest.mark.gpu
def test_a_replayed_step_gives_what_the_step_gives():
    config = StyleConfig(**SETTINGS)
    layers = (*config.style_layers, *config.content_layers)
    features = VGGFeatures(layers, arch="vgg19", weights="random", keep="values")
    content, style = scene(48, 36, seed=1).cuda(), scene(48, 36, seed=2).cuda()
    objective = Objective(features, config, content, [style])

    def step(image):
        total, terms, grad = objective.value_and_grad(image)
        return torch.stack([total, *terms.values()]), grad

    replay = cuda_graphs.captured_and_checked(step, content, times=100)
    assert replay is not step
    for image in (content, style, content.flip(2)):
        first = replay(image)
        replay(style)  # what was returned is not written over
        for ours, theirs in zip(first, step(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_losses_on_a_gpu_are_those_on_the_cpu(precision):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(2, 2, 3, 64, 64, generator=generator)
    results = []
    for device in ("cpu", "cuda"):
        x = ours.to(device, copy=True).requires_grad_()
        value = PerceptualLoss(["relu1_2", "conv3_3"], weights="random", precision=precision)(x, theirs.to(device))
        value.backward()
        results.append((value.item(), x.grad.cpu().flatten()))
    (there, wanted), (here, found) = results
    # both are as coarse: TF32 has ten bits, and a unit that cuts them off is 8e-3 away
    assert here == pytest.approx(there, rel=2e-2)
    assert torch.cosine_similarity(wanted, found, dim=0) > 0.99


def in_a_process_of_its_own(test):
    """A capture that failed leaves torch without graphs until the process ends."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        if os.environ.get("VGGFEAT_ALONE"):
            return test(*args, **kwargs)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command.append(f"{__file__}::{test.__name__}")
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # of a worker
        found = subprocess.run(command, env=env | {"VGGFEAT_ALONE": "1"}, capture_output=True, text=True)
        assert found.returncode == 0 and "1 passed" in found.stdout, found.stdout

    return run


@pytest.mark.gpu
@in_a_process_of_its_own
def test_after_a_recording_that_failed_all_is_as_before():
    image = scene(48, 36, seed=1).cuda()
    before = torch.cuda.current_stream()

    def reads(image):
        return (image * image.sum().item(),)

    with pytest.warns(UserWarning, match="not replayed"):
        assert cuda_graphs.captured_and_checked(reads, image, times=100) is reads
    assert torch.cuda.current_stream() == before
    assert torch.randn(8, device="cuda").isfinite().all()
    assert cuda_graphs.captured_and_checked(lambda image: (image * 2,), image, times=100)(image)[0].equal(image * 2)


@pytest.mark.gpu
@in_a_process_of_its_own
def test_memory_of_a_recording_that_failed_is_given_back():
    image, calls = scene(48, 36, seed=1).cuda(), 0

    def step(image):
        nonlocal calls
        calls += 1
        if calls == 3:  # the one that is recorded
            large = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").zero_()
            raise torch.OutOfMemoryError(f"no more than {large.numel()}")
        return (image * 2,)

    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with pytest.warns(UserWarning, match="not replayed"):
        assert cuda_graphs.captured_and_checked(step, image, times=100) is step
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + (1 << 29)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cudnns_convolution_and_relu_in_one(dtype, monkeypatch):
    """It keeps NaN, reads nothing of the memory that it is given to write to, and serves no deterministic run."""
    x = torch.randn(2, 64, 32, 32, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=dtype).contiguous(memory_format=torch.channels_last) / 24
    bias = torch.randn(64, device="cuda", dtype=dtype)
    assert direct_module._cudnn_takes(x, weight)
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1).relu()
    torch.full((2, 64, 32, 32), math.nan, device="cuda", dtype=dtype)  # its memory is what comes next
    found = direct_module.convolve(x, weight, bias, 1, relu=True)
    assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()
    x[0, 3, 5, 5] = math.nan
    assert direct_module.convolve(x, weight, bias, 1, relu=True).isnan().sum() == 9 * 64
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert not direct_module._cudnn_takes(x, weight)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["perceptual", "cosine", "style", "lpips", "combined"])
@pytest.mark.parametrize("given", ["images", "encoded", "masked", "both trained", "no grad", "autocast"])
def test_losses_called_again_on_a_gpu_are_replayed_and_stay_the_same(monkeypatch, precision, kind, given):
    monkeypatch.setattr(cuda_graphs._Series, "_waits_for_host", lambda self: True)
    options = {"weights": "random", "precision": precision}
    make = {
        "perceptual": functools.partial(vggfeat.PerceptualLoss, ["relu2_2", "relu3_3"]),
        "cosine": functools.partial(vggfeat.PerceptualLoss, ["relu2_2"], criterion="cosine"),
        "style": functools.partial(vggfeat.StyleLoss, ["relu1_1", "relu2_1"]),
        "lpips": vggfeat.LPIPS,
        "combined": content_and_style,
    }[kind]
    ours, theirs = make(**options), make(**options, cuda_graphs=False)
    streams = [torch.cuda.default_stream(), torch.cuda.Stream()]
    for number in range(10):
        x = torch.cat([scene(64, 48, seed=number + i) for i in range(2)]).cuda()
        y = torch.cat([scene(64, 48, seed=number + i + 30) for i in range(2)]).cuda()
        mask = (x[:, :1] > 0.4).float() if given == "masked" else None
        results = []
        torch.cuda.synchronize()
        for loss in (ours, theirs):
            with torch.cuda.stream(streams[number % 2]), torch.autocast("cuda", enabled=given == "autocast"):
                image = x.clone().requires_grad_(given != "no grad")
                target = loss.encode(y) if given == "encoded" else y.clone().requires_grad_(given == "both trained")
                value = loss(image, target, mask).sum()
                trained = [image, target] if given == "both trained" else [image]
                grads = torch.autograd.grad(value, trained) if given != "no grad" else []
            results.append((value.detach(), *grads))
        torch.cuda.synchronize()
        for own, wanted in zip(*results, strict=True):
            assert float((own - wanted).norm()) <= 0.01 * float(wanted.norm()) and wanted.any()
    (series,) = ours._replays._series.values()
    assert series.replay is not None and not theirs._replays._series


@pytest.mark.gpu
@pytest.mark.filterwarnings(
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning"
)  # torch's own, in forward mode
def test_bfloat16_on_a_gpu_can_be_differentiated_again_and_exported():
    features = VGGFeatures(["relu2_2"], weights="random", precision="bfloat16")
    results = []
    for device in ("cpu", "cuda"):
        x = scene(32, 24, seed=1).to(device).requires_grad_()
        value = features(x)["relu2_2"].float().square().mean()
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), x)
        direction = scene(32, 24, seed=2).to(device)
        _, forward = torch.func.jvp(lambda x: features(x)["relu2_2"].float().mean(), (x.detach(),), (direction,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x.detach(), direction)
            tangent = torch.autograd.forward_ad.unpack_dual(features(dual)["relu2_2"].float().mean()).tangent
        results.append([each.detach().cpu() for each in (grad, second, forward, tangent)])
        torch.export.export(features, (x.detach(),))
    for own, wanted in zip(*results, strict=True):
        assert float((own - wanted).norm()) <= 0.1 * float(wanted.norm()) and wanted.any()


@pytest.mark.gpu
def test_on_a_gpu_small_images_are_replayed_and_large_ones_not():
    loss = vggfeat.PerceptualLoss(["relu3_3"], weights="random")
    for _ in range(10):
        for count, side in ((1, 64), (16, 512)):
            image = torch.rand(count, 3, side, side, device="cuda", requires_grad=True)
            loss(image, image.detach().flip(3)).backward()
            torch.cuda.synchronize()
    small, large = loss._replays._series.values()
    assert small.replay is not None and large.replay is None


@pytest.mark.gpu
def test_a_replayed_loss_in_a_graph_of_the_callers_and_on_two_threads(monkeypatch):
    monkeypatch.setattr(cuda_graphs._Series, "_waits_for_host", lambda self: True)
    loss, plain = (
        vggfeat.PerceptualLoss(["relu2_2"], weights="random", cuda_graphs=graphs) for graphs in (True, False)
    )
    pairs = [(scene(64, 48, seed=i).cuda(), scene(64, 48, seed=i + 20).cuda()) for i in range(12)]
    wanted = [float(plain(*pair)) for pair in pairs]

    def values():
        return [float(loss(x.clone().requires_grad_(), y).detach()) for x, y in pairs]

    assert values() == pytest.approx(wanted, rel=1e-2)
    (series,) = loss._replays._series.values()
    assert series.replay is not None
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: values(), range(6)):
            assert found == pytest.approx(wanted, rel=1e-2)

    (x, y), graph = pairs[0], torch.cuda.CUDAGraph()
    x = x.clone().requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(loss(x, y), x)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        value = loss(x, y)
        (grad,) = torch.autograd.grad(value, x)
    with torch.no_grad():
        x.copy_(pairs[1][0])
        y.copy_(pairs[1][1])
    graph.replay()
    other = pairs[1][0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(plain(other, pairs[1][1]), other)
    assert float(value.detach()) == pytest.approx(wanted[1], rel=1e-2)
    assert float((grad - expected).norm()) <= 0.01 * float(expected.norm())


@pytest.mark.gpu
def test_a_host_that_trains_by_a_replayed_loss_learns_as_without(monkeypatch):
    monkeypatch.setattr(cuda_graphs._Series, "_waits_for_host", lambda self: True)
    weights = []
    for graphs in (True, False):
        torch.manual_seed(0)
        host = torch.nn.Conv2d(3, 3, 3, padding=1, device="cuda")
        loss = vggfeat.PerceptualLoss(["relu2_2"], weights="random", cuda_graphs=graphs)
        optimizer = torch.optim.SGD(host.parameters(), lr=1e-3)
        for number in range(20):
            x = scene(64, 48, seed=number).cuda()
            optimizer.zero_grad()
            loss(host(x), x).backward()
            optimizer.step()
        weights.append(host.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-2, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # torch's, of its own recording
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["perceptual", "lpips"])
def test_a_loss_as_torchs_graphed_callable(precision, kind):
    """Torch's own recording of forward and backward."""
    options = {"weights": "random", "precision": precision}
    if kind == "lpips":
        eager, recorded = (vggfeat.LPIPS(**options) for _ in range(2))
    else:
        eager, recorded = (vggfeat.PerceptualLoss(["relu2_2", "relu3_3"], **options) for _ in range(2))
    images = [scene(64, 48, seed=seed).cuda() for seed in range(4)]
    recorded = torch.cuda.make_graphed_callables(recorded, (images[0].clone().requires_grad_(), images[1].clone()))
    for x, y in ((images[0], images[1]), (images[2], images[3])):
        results = []
        for loss in (eager, recorded):
            x = x.detach().clone().requires_grad_()
            value = loss(x, y)
            value.sum().backward()
            results.append((value.detach().clone(), x.grad.clone()))
        for theirs, ours in zip(*results, strict=True):
            assert float((ours - theirs).norm()) <= 0.01 * float(theirs.norm()) and theirs.any()

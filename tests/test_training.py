"""The training loop: what it computes, what it leaves behind, and how a run stops and goes on."""

import contextlib
import copy
import csv
import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pictures
import pytest
import torch
from interpreters import Python, together
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

import vggfeat
from vggfeat import checkpoint, convolution, devices, winograd
from vggfeat.errors import InputError, RunError, WeightsError
from vggfeat.training import components, distributed, folder as folder_module, loop
from vggfeat.training.batches import split_holdout
from vggfeat.training.config import TrainConfig
from vggfeat.training.distributed import World
from vggfeat.training.evaluation import Evaluation
from vggfeat.training.folder import NEEDED, Epoch
from vggfeat.training.learner import Learner
from vggfeat.training.muon import Muon

REPO = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = {"arch": "vgg11_bn", "width": 0.125, "batch_size": 8, "epochs": 2, "precision": "float32", "lr": 0.01}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    files = {f"train/{name}": content for name, content in pictures.tree(8).items()}
    files |= {f"test/{name}": content for name, content in pictures.tree(5, offset=50).items()}
    return pictures.zipped(tmp_path_factory.mktemp("data") / "set.zip", files)


def run(data, folder, resume=False, callback=None, test=None, announce=None, **changes):
    config, rest = TrainConfig(**TINY | changes), {"callback": callback, "announce": announce}
    return vggfeat.train(data, config, test=test, folder=folder, resume=resume, **rest)


def weights(folder):
    return load_file(folder / "weights.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def begun(data, folder, **changes):
    """A run that has made no step yet."""
    images, test = vggfeat.load_images(data)
    return loop._Run(TrainConfig(**TINY | changes), images, test, World(CPU), folder, None)


# ── what it computes ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    steps = []
    return run(data, folder, callback=steps.append, epochs=8, ema=0.8, lr=0.02), steps


def test_it_learns(finished):
    result, _ = finished
    first, last = result.history[0], result.history[-1]
    assert last.train_loss < 0.5 * first.train_loss
    assert result.evaluation.top1 == last.test_accuracy > 0.8  # three plain colours; chance is a third
    assert not result.interrupted and not result.damaged


def test_the_callback_sees_every_step(finished):
    _, steps = finished
    assert [(s.epoch, s.step) for s in steps] == [(e, s) for e in range(1, 9) for s in range(1, 4)]
    assert all(s.epochs == 8 and s.steps == 3 and s.loss > 0 and s.lr >= 0 for s in steps)
    assert [s.finished is not None for s in steps] == [False, False, True] * 8


def test_what_a_run_leaves(finished, data):
    result, _ = finished
    assert {p.name for p in result.folder.iterdir()} - {"tensorboard"} == {
        "config.json",
        "log.csv",
        "checkpoints",
        "weights.safetensors",
    }
    config = json.loads((result.folder / "config.json").read_text())
    assert config["lr"] == 0.02 and config["classes"] == ["ant", "bee", "cow"] and str(data) in config["data"]
    with (result.folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train_loss"]) for row in rows] == [epoch.train_loss for epoch in result.history]
    assert len(list((result.folder / "checkpoints").iterdir())) == 2


def test_saved_weights_have_torchvisions_keys_and_work_everywhere(finished, torchvision, data):
    result, _ = finished
    path = result.folder / "weights.safetensors"
    with torch.device("meta"):
        other = torchvision.models.vgg11_bn(num_classes=3)
    ours = {key for key in weights(result.folder) if key.startswith("features.")}
    assert ours == {key for key in other.state_dict() if key.startswith("features.")}
    with safe_open(path, "pt") as file:
        assert [*file.metadata()] == ["vggfeat"]  # of several the order, and with it the file's hash, is random
        facts = json.loads(file.metadata()["vggfeat"])
    assert facts == {"classes": ["ant", "bee", "cow"], "size": 32, "scales": [32]}
    images = torch.rand(2, 3, 32, 32)
    taps = vggfeat.VGGFeatures(["conv3_1", "relu5_2"], weights=path)(images)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = result.net.taps((images - mean) / std, list(taps))
    for name, value in expected.items():
        torch.testing.assert_close(taps[name], value, rtol=1e-4, atol=1e-4)
    assert vggfeat.evaluate(path, data).top1 == result.evaluation.top1


def test_tensorboard_has_the_curves(finished):
    pytest.importorskip("tensorboard")
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = events.EventAccumulator(str(finished[0].folder / "tensorboard"))
    board.Reload()
    found = [(point.step, point.value) for point in board.Scalars("train_loss")]
    assert found == [(e.epoch, pytest.approx(e.train_loss)) for e in finished[0].history]


def test_a_curve_has_what_was_measured_be_it_0_and_nothing_else(tmp_path):
    board, points = folder_module.Board(tmp_path, pytest.fail), []
    board.close()
    board.writer = SimpleNamespace(add_scalar=lambda *point: points.append(point), flush=lambda: points.append("flush"))
    board.write(Epoch(3, 0.1, 0.5, 0.0, None, None, None, 2.0, 8.0, 0))
    assert points == [
        ("lr", 0.1, 3),
        ("train_loss", 0.5, 3),
        ("train_accuracy", 0.0, 3),
        ("seconds", 2.0, 3),
        ("images_per_second", 8.0, 3),
        ("skipped", 0, 3),
        "flush",  # for those who look on while it lasts
    ]


def plain(run, steps):
    """The same steps in the plainest way: torch's modules and optimizer, no helper of ours but the batches."""
    torch.manual_seed(0)
    net = components.build_network(run.config, 3)
    net.load_state_dict(run.net.state_dict())
    for module in net.features:
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
    weights = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim == 1]
    optimizer = torch.optim.SGD([{"params": weights, "weight_decay": 5e-4}, {"params": rest}], lr=0.01, momentum=0.9)
    total = run.config.epochs * run.batches.steps
    net.train()
    count = 0
    for (batch,) in run.batches.epoch(0):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 + torch.cos(torch.tensor(torch.pi * count / total)).item()) / 2
        optimizer.zero_grad()
        F.cross_entropy(net(batch.images), batch.labels, label_smoothing=run.config.label_smoothing).backward()
        optimizer.step()
        count += 1
        if count == steps:
            return net.state_dict()


@pytest.mark.parametrize("arch", ["vgg11", "vgg11_bn"])
def test_steps_are_those_of_plain_torch(data, tmp_path, arch):
    made = begun(data, tmp_path, arch=arch, label_smoothing=0.1)
    expected = plain(made, 3)
    made.learner.model.train()
    for batch in made.batches.epoch(0):
        made._step(batch)
        made.step += 1
    for key, value in made.net.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=2e-3, atol=2e-5, msg=key)


def gradients(data, tmp_path, arch="vgg11", **changes):
    """The gradients of a first step, before they are used."""
    torch.manual_seed(0)
    made = begun(data, tmp_path, arch=arch, **changes)
    made.learner.model.train()
    caught = {}
    made.learner.optimizer.register_step_pre_hook(
        lambda *_: caught.update(
            {name: p.grad.clone() for name, p in made.net.named_parameters() if p.grad is not None}
        )
    )
    made._step(next(made.batches.epoch(0)))
    return caught


def test_accumulation_gives_the_gradient_of_the_whole_batch(data, tmp_path):
    whole, parts = (gradients(data, tmp_path, accumulate=n) for n in (1, 4))
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("precision", ["float32", "float16"])  # whose gradients are scaled until then
def test_clipping(data, tmp_path, precision):
    free, clipped = (gradients(data, tmp_path, clip=c, precision=precision) for c in (0.0, 0.5))
    norm = torch.stack([g.norm() for g in free.values()]).norm()
    assert norm > 0.5
    assert torch.stack([g.norm() for g in clipped.values()]).norm() == pytest.approx(0.5, rel=1e-4)
    for name, grad in free.items():
        torch.testing.assert_close(clipped[name], grad * (0.5 / norm), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("arch", ["vgg11", "vgg11_bn"])
def test_checkpointing_changes_nothing_but_memory(data, tmp_path, arch):
    torch.manual_seed(0)
    results = {}
    for on in (False, True):
        made = begun(data, tmp_path, arch=arch, checkpointing=on)
        made.net.load_state_dict(results.get("start") or results.setdefault("start", made.net.state_dict()))
        results["start"] = {key: value.clone() for key, value in results["start"].items()}
        made.learner.model.train()
        for batch in made.batches.epoch(0):
            made._step(batch)
        results[on] = made.net.state_dict()
    assert same(results[False], results[True])
    if arch.endswith("bn"):
        assert int(results[True]["features.1.num_batches_tracked"]) == 3


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_near(data, tmp_path, precision):
    exact, rough = (gradients(data, tmp_path, precision=p) for p in ("float32", precision))
    for name in ("classifier.1.weight", "features.0.weight"):
        assert F.cosine_similarity(rough[name].flatten(), exact[name].flatten(), dim=0) > 0.98
        assert float(rough[name].norm() / exact[name].norm()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("hardware", [True, False])
def test_bfloat16_on_a_cpu_without_it(data, tmp_path, monkeypatch, hardware):
    """Said at the start; Muon's products, which would take a hundred times as long, are made in float32."""
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda: hardware)
    made = begun(data, tmp_path, optimizer="muon", precision="bfloat16")
    assert made.learner.optimizer.dtype == (torch.bfloat16 if hardware else torch.float32)
    assert ("computes it in loops" in "\n".join(made.summary([]))) != hardware


def test_compiled(data, tmp_path, monkeypatch):
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or compile_(net, backend="eager"))
    results = [run(data, tmp_path / str(option), compile=option, epochs=1) for option in (False, True)]
    assert len(compiled) == 1
    for plain, ours in zip(*(result.net.state_dict().values() for result in results), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def rates(config, steps=10):
    net = vggfeat.vgg11(num_classes=2, width=0.125, head="slim")
    optimizer = components.build_optimizer(net, config)
    scheduler = components.build_schedule(optimizer, config, steps)
    found = []
    for _ in range(config.epochs * steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedules():
    def config(**changes):
        return TrainConfig(lr=1.0, epochs=10, **changes)

    assert rates(config(schedule="constant")) == [1.0] * 100
    steps = rates(config(schedule="step", step_size=3, gamma=0.5))
    assert steps == pytest.approx([1.0] * 30 + [0.5] * 30 + [0.25] * 30 + [0.125] * 10)
    warm = rates(config(schedule="step", step_size=3, gamma=0.5, warmup=2.0))
    assert warm[20:] == pytest.approx(steps[20:])  # the warm-up is part of the first step
    long = rates(config(schedule="step", step_size=2, gamma=0.5, warmup=5.0))
    assert long[50:] == pytest.approx([0.25] * 10 + [0.125] * 20 + [0.0625] * 20)
    assert rates(config(schedule="linear")) == pytest.approx([1 - i / 100 for i in range(100)])
    cosine = rates(config(schedule="cosine"))
    assert cosine[50] == pytest.approx(0.5) and cosine[0] == 1.0 and cosine[-1] < 1e-3
    one = rates(config(schedule="onecycle", warmup=2.0))
    assert one[20] == max(one) == pytest.approx(1.0, rel=1e-9)
    assert one[0] == pytest.approx(1 / 25) and one[-1] < 2e-3
    warm = rates(config(schedule="cosine", warmup=2.0))
    assert warm[:20] == pytest.approx([(i + 1) / 20 - i / 20 / 20 for i in range(20)], abs=1e-9)
    assert warm[60] == pytest.approx(0.5) and warm[-1] < 1e-3
    assert warm[20] == pytest.approx(1.0) and warm == pytest.approx(sorted(warm[:21]) + sorted(warm[21:], reverse=True))


def test_groups_of_parameters():
    net = vggfeat.vgg11(num_classes=2, batch_norm=True, width=0.125, head="slim")
    config = TrainConfig(lr=0.1, features_lr=0.5, weight_decay=1e-3)
    groups = {
        (g["lr"], g["weight_decay"]): len(g["params"]) for g in components.build_optimizer(net, config).param_groups
    }
    assert groups == {(0.05, 1e-3): 8, (0.05, 0.0): 24, (0.1, 1e-3): 1, (0.1, 0.0): 1}
    groups = components.build_optimizer(net, TrainConfig(lr=0.1, decay_all=True)).param_groups
    assert [len(g["params"]) for g in groups] == [34]
    kinds = {
        kind: type(components.build_optimizer(net, TrainConfig(optimizer=kind)))
        for kind in ("sgd", "adam", "adamw", "muon")
    }
    assert kinds == {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}
    for nesterov in (False, True):
        (group, *_) = components.build_optimizer(net, TrainConfig(nesterov=nesterov)).param_groups
        assert (group["nesterov"], group["momentum"]) == (nesterov, 0.9)
    for kind in ("adam", "adamw"):
        made = components.build_optimizer(net, TrainConfig(optimizer=kind, momentum=0.8))
        assert made.param_groups[0]["betas"] == (0.8, 0.999)


@pytest.mark.parametrize("options", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
def test_mixing(data, tmp_path, options, torchvision):
    made = begun(data, tmp_path, **options)
    batch = next(made.batches.epoch(0))[0]
    torch.manual_seed(0)
    images, targets = made.mix(batch.images, batch.labels)
    assert targets.shape == (8, 3) and torch.allclose(targets.sum(1), torch.ones(8))
    assert targets.gather(1, batch.labels[:, None]).min() > 0 and not torch.equal(images, batch.images)
    made.learner.model.train()
    assert torch.isfinite(made._step(next(made.batches.epoch(0))))


def test_moving_average(data, tmp_path):
    made = begun(data, tmp_path, ema=0.75)
    made.learner.model.train()
    expected = None
    for batch in made.batches.epoch(0):
        made._step(batch)
        now = {key: value.double() for key, value in made.net.state_dict().items() if value.is_floating_point()}
        expected = now if expected is None else {k: 0.75 * expected[k] + 0.25 * now[k] for k in now}
    found = made.tested_net.state_dict()
    assert made.tested_net is not made.net
    for key, value in expected.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-6)


def test_dropout_and_seeds(data, tmp_path):
    state = torch.get_rng_state()
    runs = [
        weights(run(data, tmp_path / str(i), dropout=0.5, epochs=1, seed=seed).folder)
        for i, seed in enumerate((0, 0, 1))
    ]
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])
    assert torch.equal(state, torch.get_rng_state())  # the caller's own random numbers are untouched
    assert not torch.are_deterministic_algorithms_enabled()


def test_deterministic_algorithms(data, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    run(data, tmp_path / "r", deterministic=True, epochs=1,
        callback=lambda _: seen.append(torch.are_deterministic_algorithms_enabled()))  # fmt: skip
    assert all(seen) and seen and not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    run(data, tmp_path / "mine", deterministic=True, epochs=1)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("arch", ["vgg11", "vgg13_bn", "vgg16-c", "vgg11-lrn", "vgg19_bn"])
@pytest.mark.parametrize("head", ["slim", "paper"])
def test_every_network_trains(data, tmp_path, arch, head):
    made = begun(data, tmp_path, arch=arch, head=head, width=1 / 32, dropout=0.1)
    made.learner.model.train()
    before = {name: value.clone() for name, value in made.net.named_parameters()}
    made._step(next(made.batches.epoch(0)))
    assert made.net.arch.name == arch and made.net.arch.head == head
    assert all(not torch.equal(value, before[name]) for name, value in made.net.named_parameters() if value.ndim > 1)


def test_on_a_gpu_short_epochs_leave_no_checkpoint_each(data, tmp_path):
    """One may take less time than writing that; the last epoch's is always written, and on a CPU every one."""
    made = begun(data, tmp_path, epochs=3)
    assert made._epoch_saves()
    made.world = World(torch.device("cuda"))
    assert made._epoch_saves()  # the first
    made.saved = time.perf_counter()
    assert not made._epoch_saves()
    made.saved -= loop.SAVE_AFTER
    assert made._epoch_saves()
    made.saved, made.epoch = time.perf_counter(), 2
    assert made._epoch_saves()
    made.epoch, made.world = 0, World(torch.device("cuda"), 0, 2)  # where all processes must decide alike
    assert made._epoch_saves()


def test_biases_that_make_no_difference_rest_while_it_lasts(data, tmp_path):
    made = begun(data, tmp_path, ema=0.9)
    resting = {name for name, value in made.net.named_parameters() if not value.requires_grad}
    assert resting == {f"features.{layer.index}.bias" for layer in made.net.arch.convs}
    assert not resting & {name for name, value in begun(data, tmp_path, arch="vgg11").net.named_parameters()
                          if not value.requires_grad}  # fmt: skip
    result = run(data, tmp_path / "run", epochs=1, ema=0.9)
    assert all(value.requires_grad for value in result.net.parameters())
    assert all(value.requires_grad for value in run(data, tmp_path / "plain", epochs=1).net.parameters())


def test_a_run_of_a_version_that_trained_other_parameters_does_not_go_on(data, tmp_path):
    run(data, tmp_path / "run", epochs=1)
    (file,) = checkpoint.saved(tmp_path / "run" / "checkpoints")
    state = torch.load(file)
    state["optimizer"]["param_groups"][0]["params"].append(99)
    checkpoint.write(file, state)
    with pytest.raises(InputError, match="begun by another version"):
        run(data, tmp_path / "run", epochs=1, resume=True)


# ── transfer learning ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_from_bundled_weights_with_frozen_layers(data, tmp_path):
    config = {"arch": None, "width": 1.0, "weights": "bundled", "freeze": "relu3_4", "features_lr": 0.1}
    made = begun(data, tmp_path, **config)
    assert made.net.arch.channels == (48, 96, 192, 176, 176)
    before = {name: value.clone() for name, value in made.net.state_dict().items()}
    made.learner.model.train()
    made._step(next(made.batches.epoch(0)))
    moved = {name for name, value in made.net.state_dict().items() if not torch.equal(value, before[name])}
    numbers = {int(name.split(".")[1]) for name in moved if name.startswith("features.")}
    assert min(numbers) == made.net.arch.layer("conv4_1").index and "classifier.1.weight" in moved
    rates = {group["initial_lr"] for group in made.learner.optimizer.param_groups}
    assert sorted(rates) == pytest.approx([0.001, 0.01])


def test_frozen_batch_statistics_stay(finished, data, tmp_path):
    path = str(finished[0].folder / "weights.safetensors")
    result = run(data, tmp_path / "r", arch=None, width=1.0, weights=path, freeze="pool2", epochs=1)
    before, after = weights(finished[0].folder), weights(result.folder)
    cut = result.net.arch.layer("pool2").index
    idle = [f"features.{layer.index}.bias" for layer in result.net.arch.convs]  # before batch normalisation
    for key, value in after.items():
        frozen = key.startswith("features.") and int(key.split(".")[1]) < cut or key in idle
        if value.is_floating_point():
            assert torch.equal(value, before[key]) == frozen, key


def test_a_run_may_begin_with_a_state_dict(finished, data, tmp_path):
    state, options = weights(finished[0].folder), {"arch": None, "width": 1.0, "epochs": 1}
    file = run(data, tmp_path / "file", weights=str(finished[0].folder / "weights.safetensors"), **options)
    given = run(data, tmp_path / "state", weights=state, **options)
    assert same(weights(given.folder), weights(file.folder))
    assert json.loads((given.folder / "config.json").read_text())["weights"] == "a state dict"
    resumed = run(data, tmp_path / "state", weights=state, resume=True, **options)
    assert resumed.history == given.history


def test_a_new_head_is_asked_for(finished, tmp_path):
    files = {k: v for k, v in pictures.tree(6).items() if not k.startswith("cow")}
    two = pictures.folder(tmp_path / "two", files)
    options = {"arch": None, "width": 1.0, "weights": str(finished[0].folder / "weights.safetensors"), "epochs": 1}
    with pytest.raises(WeightsError, match=r"slim head for 3 classes.*for 2.*--new-head"):
        run(two, tmp_path / "a", **options)
    result = run(two, tmp_path / "b", new_head=True, **options)
    assert result.net.arch.num_classes == 2 and result.evaluation is None
    assert result.history[0].test_accuracy is None
    with pytest.raises(InputError, match="unknown layer 'conv9_9'"):
        run(two, tmp_path / "c", new_head=True, freeze="conv9_9", **options)


def test_holdout(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    source = pictures.folder(tmp_path / "s", pictures.tree(8))
    result = run(source, tmp_path / "r", holdout=0.25, epochs=1)
    assert result.evaluation.images == 6
    # later, on the set it was trained on, from wherever it lies by then: what was held out, and no other
    Path(source).rename(tmp_path / "moved")
    with pytest.raises(InputError, match="there is a test set: leave holdout at 0"):
        run(tmp_path / "moved", tmp_path / "r2", test=tmp_path / "moved", holdout=0.25)
    found = vggfeat.evaluate(tmp_path / "r", tmp_path / "moved", batch_size=6)
    assert (found.images, found.confusion) == (6, result.evaluation.confusion)
    assert found.data == found.to_dict()["data"] == f"{tmp_path / 'moved'}, what was held out"
    assert found.loss == pytest.approx(result.evaluation.loss, rel=1e-4)
    other = {name.replace("0.", "x."): content for name, content in pictures.tree(8).items()}
    assert vggfeat.evaluate(tmp_path / "r", pictures.folder(tmp_path / "other", other)).images == 24
    few = {name: content for name, content in pictures.tree(8).items() if "0." in name}
    test = vggfeat.evaluate(tmp_path / "r", pictures.folder(tmp_path / "few", few))
    assert test.images == len(few) and f"tested on {tmp_path / 'few'}" in " ".join(str(test).split())
    home = vggfeat.evaluate("~/r", tmp_path / "moved", batch_size=6)  # what the shell makes of it, where no shell does
    assert home.images == 6
    # of the set it was trained on and more, which were held out cannot be told, and most are those trained on
    more = pictures.folder(source, other | pictures.tree(8))
    for place, names in ((tmp_path, ("s", "r/../s")), (tmp_path / "few", (more, "../s"))):
        monkeypatch.chdir(place)
        for name in names:
            with pytest.raises(InputError, match="its images have changed"):
                vggfeat.evaluate(tmp_path / "r", name)


def test_a_checkpoint_is_tested_as_the_weights_of_its_run(tmp_path):
    source = pictures.folder(tmp_path / "s", pictures.tree(8))
    result = run(source, tmp_path / "r", holdout=0.25, ema=0.9, size=32, epochs=2, precision="float32")
    (last, *_) = checkpoint.saved(tmp_path / "r" / "checkpoints")
    facts = vggfeat.weights.run_metadata(last)
    assert facts | {"scales": [*facts["scales"]]} == vggfeat.weights.run_metadata(tmp_path / "r")
    state = vggfeat.weights.load(last).state
    assert all(torch.equal(value.cpu(), state[key]) for key, value in result.net.state_dict().items())
    for data in (source, pictures.folder(tmp_path / "other", pictures.tree(3))):
        found, wanted = (vggfeat.evaluate(each, data, precision="float32") for each in (last, tmp_path / "r"))
        assert (found.images, found.loss, found.data) == (wanted.images, wanted.loss, wanted.data)
    renamed = pictures.folder(tmp_path / "renamed", {"x" + name: each for name, each in pictures.tree(2).items()})
    with pytest.raises(InputError, match="the classes differ"):
        vggfeat.evaluate(last, renamed)


def test_another_set_with_the_same_names_is_told_apart(tmp_path):
    source = pictures.folder(tmp_path / "s", pictures.tree(8))
    run(source, tmp_path / "r", holdout=0.25, epochs=1)
    other = pictures.folder(tmp_path / "other", pictures.tree(8, width=33))  # or a copy, converted
    found = vggfeat.evaluate(tmp_path / "r", other, vggfeat.Views(size=32))
    assert found.images == 6 and found.data.endswith("what was held out, by the names of its files, whose sizes differ")
    with pytest.raises(InputError, match="was on other files than those of .*: their sizes differ"):
        run(other, tmp_path / "r", holdout=0.25, epochs=1, resume=True)
    tests = [pictures.folder(tmp_path / f"t{width}", pictures.tree(2, width=width, offset=20)) for width in (33, 34)]
    run(source, tmp_path / "tested", test=tests[0], epochs=1)
    with pytest.raises(InputError, match="has another test set, not .*t34, whose files differ in size"):
        run(source, tmp_path / "tested", test=tests[1], epochs=1, resume=True)
    zipped = pictures.zipped(tmp_path / "s.zip", pictures.tree(8))  # the same images
    found = vggfeat.evaluate(tmp_path / "r", zipped)
    assert found.images == 6 and found.data.endswith("what was held out")


def test_test_images_that_cannot_be_read_are_told_and_counted(tmp_path):
    source = pictures.folder(tmp_path / "s", pictures.tree(4))
    files = {
        f"{kind}/{i}.png": pictures.encoded(pictures.picture(kind, i, 40 + i, 40))
        for kind in pictures.COLORS
        for i in range(3)
    }
    test = pictures.folder(tmp_path / "t", files | {"ant/2.png": files["ant/2.png"][:70]})
    lines = []
    config = TrainConfig(**TINY | {"size": 32, "epochs": 2, "bad_images": "skip"})
    result = vggfeat.train(source, config, test=test, folder=tmp_path / "r", announce=lines.append)
    assert [epoch.skipped for epoch in result.history] == [1, 1] and result.evaluation.images == 8
    assert [line for line in lines if "left out" in line] == ["1 image of the test left out: ant/2.png"]


# ── stopping and going on ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_does_not_go_on_at_another_size(tmp_path, monkeypatch):
    """As where its images were in memory, and are too many for this machine's."""
    source = pictures.folder(tmp_path / "s", pictures.tree(8))
    with pytest.raises(Interrupted):
        run(source, tmp_path / "r", callback=stop_at(2), save_every=1)
    monkeypatch.setattr(vggfeat.training.data, "total_memory", lambda device: 4 * 3 * 32 * 32)
    with pytest.raises(InputError, match="used crops of 32 pixels, here they would have 224"):
        run(source, tmp_path / "r", resume=True, save_every=1)


def test_what_is_left_out_is_told_once(tmp_path):
    files = pictures.tree(8) | {"ant/x.heic": b"-", "bee/notes.txt": b"-", "loose.png": b"-", "README": b"-"}
    for holdout in (0, 0.25):
        lines = []
        source = pictures.folder(tmp_path / f"s{holdout}", files)
        config = TrainConfig(**TINY | {"epochs": 1, "holdout": holdout})
        vggfeat.train(source, config, folder=tmp_path / f"r{holdout}", announce=lines.append)
        assert [line for line in lines if "left out" in line] == [
            f"left out 3 files of {source} outside its folders or without an image suffix: ant/x.heic …"
        ]
        (found,) = (line for line in lines if "images of" in line and "left" not in line)
        assert found.startswith(f"{24 if not holdout else 18} images of 3 classes at 32 px, in memory; ")


def test_crops_are_told_with_what_they_are_cut_from(tmp_path, torchvision):
    mixed = pictures.tree(8, width=48, height=40) | {"ant/t.png": pictures.encoded(pictures.picture("ant", 7, 40, 60))}
    one, several = (tmp_path / name for name in ("one", "several"))
    pictures.folder(one, pictures.tree(8, width=48, height=40))
    pictures.folder(several, mixed)
    for source, changes, said in (
        (one, {}, "40 px, in memory"),
        (one, {"size": 32}, "32 px cropped from 40, in memory"),
        (one, {"size": 32, "resize": (36,)}, "32 px cropped from 36, in memory"),
        (several, {"size": 56}, "56 px cropped from 64, read in every epoch"),
        (several, {"size": 32, "resize": (34, 40)}, "32 px cropped from 34 to 40, read in every epoch"),
    ):
        images, _ = vggfeat.load_images(source, resize=changes.get("resize"))
        made = loop._Run(TrainConfig(**TINY | changes), images, None, World(CPU), tmp_path, None)
        lines = [*made.summary([])]
        assert f"images of 3 classes at {said}; no test set" in lines[1] and not any("each crop" in e for e in lines)
    large = pictures.folder(tmp_path / "large", pictures.tree(8, width=80, height=64))
    images, config = vggfeat.load_images(large)[0], TrainConfig(**TINY | {"size": 32})
    made = loop._Run(config, images, None, World(CPU), tmp_path, None)
    assert [*made.summary([])][2] == "each crop shows 20% of an image; resized to 36, it shows most of it"
    with pytest.raises(InputError, match="cutout 32 can blank crops of 32 pixels whole"):
        run(large, tmp_path / "r", size=32, cutout=32)


def test_an_empty_path_is_not_the_folder_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no images at an empty path"):
        run("", "r")


def test_a_run_is_never_overwritten(data, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"already exists.*--resume"):
        run(data, tmp_path / "r")
    assert [p.name for p in (tmp_path / "r").iterdir()] == ["mine.txt"]


class Interrupted(Exception):
    pass


def stop_at(count):
    def callback(step):
        if (step.epoch - 1) * step.steps + step.step == count:
            raise Interrupted

    return callback


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "dropout": 0.3, "precision": "bfloat16", "schedule": "onecycle"},
                                     {"optimizer": "adam", "lr": 1e-3, "warmup": 0.5, "arch": "vgg11"},
                                     {"optimizer": "muon", "precision": "bfloat16"}])  # fmt: skip
def test_going_on_gives_the_same_weights(data, tmp_path, options):
    """Stopped before the first checkpoint, in the middle, and in the last epoch."""
    whole = run(data, tmp_path / "whole", **options)
    for count in (1, 3, 5):
        with pytest.raises(Interrupted):
            run(data, tmp_path / "r", resume=count > 1, callback=stop_at(count), save_every=1, **options)
        assert not (tmp_path / "r" / "weights.safetensors").exists()
    result = run(data, tmp_path / "r", resume=True, save_every=1, **options)
    assert same(weights(result.folder), weights(whole.folder))
    for ours, theirs in zip(result.history, whole.history, strict=True):
        assert (ours.train_loss, ours.test_loss) == (theirs.train_loss, theirs.test_loss)
    assert len((result.folder / "log.csv").read_text().splitlines()) == 3


def test_going_on_needs_the_first_weights_no_more(finished, data, tmp_path):
    first = tmp_path / "first.safetensors"
    shutil.copy(finished[0].folder / "weights.safetensors", first)
    options = {"arch": None, "width": 1.0, "weights": str(first), "freeze": "pool2", "epochs": 1}
    whole = run(data, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        run(data, tmp_path / "r", callback=stop_at(2), save_every=1, **options)
    first.unlink()
    with pytest.raises(WeightsError, match="no weights at"):
        run(data, tmp_path / "other", **options)
    text = (tmp_path / "r" / "config.json").read_text()
    (tmp_path / "r" / "config.json").write_text(text.replace('"num_classes": 3', '"num_classes": 4'))
    with pytest.raises(InputError, match="is of another network than its config.json says"):
        run(data, tmp_path / "r", resume=True, save_every=1, **options)
    (tmp_path / "r" / "config.json").write_text(text)
    assert same(weights(run(data, tmp_path / "r", resume=True, save_every=1, **options).folder), weights(whole.folder))


def test_going_on_by_tiles_gives_the_same_weights(data, tmp_path, monkeypatch):
    """Channels enough for convolutions by tiles, whose room for what is halfway is shared by all that went before."""
    seen = []
    real = winograd.weight_gradient
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(convolution, "MIN_TILES", 1)
    monkeypatch.setattr(winograd, "weight_gradient", lambda *args: seen.append(args[0].shape[1]) or real(*args))
    wide = {"width": 0.25, "optimizer": "muon"}
    whole = run(data, tmp_path / "whole", **wide)
    assert set(seen) == {64, 128}
    with pytest.raises(Interrupted):
        run(data, tmp_path / "r", callback=stop_at(3), save_every=1, **wide)
    winograd._kept.__dict__.clear()
    winograd.convolve(torch.full((9, 64, 40, 40), torch.nan), torch.zeros(36, 64, 64), None, 1)
    assert same(weights(run(data, tmp_path / "r", resume=True, save_every=1, **wide).folder), weights(whole.folder))


def test_resuming_a_finished_run_changes_nothing(finished, data):
    result = finished[0]
    before = weights(result.folder)
    (result.folder / "weights.safetensors").unlink()
    again = run(data, result.folder, resume=True, epochs=8, ema=0.8, lr=0.02)
    assert same(before, weights(result.folder)) and again.evaluation.top1 == result.evaluation.top1


def test_resuming_with_other_settings_or_data(finished, data, tmp_path):
    with pytest.raises(InputError, match=r"lr was 0\.02, is 0\.1"):
        run(data, finished[0].folder, resume=True, epochs=8, ema=0.8, lr=0.1)
    files = {k: v for k, v in pictures.tree(9).items() if not k.startswith("cow")}
    other = pictures.folder(tmp_path / "s", files)
    with pytest.raises(InputError, match=r"24 images of 3 classes.*has 18 of 2"):
        run(other, finished[0].folder, resume=True, epochs=8, ema=0.8, lr=0.02)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_checkpoint_is_passed_over(data, tmp_path, damage):
    whole = run(data, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(data, tmp_path / "r", callback=stop_at(4), save_every=1)
    path = sorted((tmp_path / "r" / "checkpoints").iterdir())[-1]
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 2, len(content) // 2 + 200):  # more than the padding between two parts
        content[i] ^= 1
    path.write_bytes({"cut": content[:-1000], "flipped": content, "empty": b""}[damage])
    result = run(data, tmp_path / "r", resume=True, save_every=1)
    assert len(result.damaged) == 1 and path.name in result.damaged[0]
    assert same(weights(result.folder), weights(whole.folder))


def test_no_good_checkpoint_is_an_error(data, tmp_path):
    run(data, tmp_path / "r")
    for path in (tmp_path / "r" / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint in .* is intact"):
        run(data, tmp_path / "r", resume=True)


def test_a_checkpoint_holds_what_it_must(finished):
    state, damaged = checkpoint.newest(finished[0].folder / "checkpoints", NEEDED)
    assert not damaged
    assert {"net", "optimizer", "scheduler", "ema", "scaler", "epoch", "step", "config"} <= state.keys()
    assert (state["epoch"], state["step"]) == (7, 3)  # before the last test


@pytest.mark.usefixtures("real_signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step(data, tmp_path, number):
    def callback(step):
        if (step.epoch, step.step) == (1, 2):
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    result = run(data, tmp_path / "r", callback=callback)
    assert result.interrupted and not result.history and signal.getsignal(number) is before
    state, _ = checkpoint.newest(tmp_path / "r" / "checkpoints", NEEDED)
    assert state["step"] in (2, 3)
    whole = run(data, tmp_path / "whole")
    assert same(weights(run(data, tmp_path / "r", resume=True).folder), weights(whole.folder))


@pytest.mark.parametrize(("epoch", "step"), [(1, 2), (2, 3)])
def test_a_callback_ends_the_run_early_and_sees_the_network(data, tmp_path, epoch, step):
    """(2, 3) is the last step of its epoch, of which a callback hears after the test."""
    seen = {}

    def callback(state):
        if (state.epoch, state.step) == (epoch, step):
            seen.update({key: value.clone() for key, value in state.net.state_dict().items()})
            raise KeyboardInterrupt

    result = run(data, tmp_path / "r", callback=callback, ema=0.9, epochs=3)
    assert result.interrupted and len(result.history) == epoch - 1 + (step == 3)
    assert (result.evaluation is None) == (not result.history)
    assert seen and all(torch.equal(value, seen[key]) for key, value in result.net.state_dict().items())
    whole = run(data, tmp_path / "whole", ema=0.9, epochs=3)
    assert same(weights(run(data, tmp_path / "r", resume=True, ema=0.9, epochs=3).folder), weights(whole.folder))
    assert repr(result) == f"TrainResult(folder={result.folder!r}, interrupted=True, damaged=[])"


def test_the_last_test_of_a_run_that_was_stopped_is_given(data, tmp_path):
    def callback(state):
        if (state.epoch, state.step) == (2, 1):
            raise KeyboardInterrupt

    result = run(data, tmp_path / "r", callback=callback)
    assert result.interrupted and result.evaluation.top1 == result.history[0].test_accuracy


def test_a_callback_may_test_the_network(data, tmp_path):
    result = run(data, tmp_path / "r", callback=lambda state: state.net.eval(), arch="vgg11_bn", epochs=2)
    assert same(weights(result.folder), weights(run(data, tmp_path / "same", arch="vgg11_bn", epochs=2).folder))


@pytest.mark.usefixtures("real_signals")
def test_a_callback_that_ends_a_run_just_after_a_signal_loses_nothing(data, tmp_path):
    def callback(state):
        if state.step == 2:
            signal.raise_signal(signal.SIGTERM)
            raise KeyboardInterrupt

    assert run(data, tmp_path / "r", callback=callback).interrupted
    state, _ = checkpoint.newest(tmp_path / "r" / "checkpoints", NEEDED)
    assert (state["epoch"], state["step"]) == (0, 2)


@pytest.mark.usefixtures("real_signals")
def test_a_second_ctrl_c_while_a_callback_runs_ends_at_once(data, tmp_path):
    def callback(step):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "r", callback=callback)


@pytest.mark.usefixtures("real_signals")
def test_a_signal_during_a_test_loses_no_epoch(data, tmp_path, monkeypatch):
    """On a GPU, where epochs that take less than writing a checkpoint are not saved one by one."""
    monkeypatch.setattr(loop._Run, "_epoch_saves", lambda self: False)

    def callback(step):
        if step.finished and step.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    result = run(data, tmp_path / "r", callback=callback, epochs=3)
    assert result.interrupted and len(result.history) == 2
    assert result.evaluation.top1 == result.history[1].test_accuracy
    state, _ = checkpoint.newest(tmp_path / "r" / "checkpoints", NEEDED)
    assert (state["epoch"], state["step"], len(state["history"])) == (2, 0, 2)
    monkeypatch.undo()
    whole, told = run(data, tmp_path / "whole", epochs=3), []
    resumed = run(data, tmp_path / "r", resume=True, epochs=3, announce=told.append)
    assert same(weights(resumed.folder), weights(whole.folder)) and told[-1] == "resuming after 6 of 9 steps"


def test_other_generators_are_left_alone(data, tmp_path, monkeypatch):
    """Those of GPUs that a run on the CPU does not use."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    torch.manual_seed(0)
    seeded.clear()  # as torch's own function does
    run(data, tmp_path / "r", epochs=1)
    assert not seeded


def environment():
    path = os.pathsep.join(map(str, (REPO, REPO / "cli")))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def command(data, folder, *more):
    options = [f"--{key.replace('_', '-')}={value}" for key, value in (TINY | {"epochs": 3}).items()]
    return [
        str(data),
        "--recipe=fast",
        "--ema=0.9",
        "--warmup=1",
        "--save-every=1",
        f"--output={folder}",
        *options,
        *more,
    ]


def test_sigkill_at_random_steps(data, tmp_path):
    """The process is killed again and again, wherever it happens to be; the weights at the end are the same bits."""
    python = ["-m", "vggfeat.training"]
    whole = Python(*python, *command(data, tmp_path / "whole", "--quiet"))
    generator = random.Random(os.getpid())
    killed = 0
    for attempt in range(12):
        more = ["--quiet", *(["--resume"] if attempt else [])]
        folder = tmp_path / "killed" / "checkpoints"
        before = {p.name for p in folder.glob("*.pt")} if folder.exists() else set()
        run = Python(*python, *command(data, tmp_path / "killed", *more))
        limit = time.monotonic() + 120
        while run.process.is_alive() and killed < 3 and time.monotonic() < limit:
            if folder.exists() and {p.name for p in folder.glob("*.pt")} - before:  # it is at work
                time.sleep(generator.uniform(0, 0.15))
                run.process.kill()
                run.process.join()
                killed += run.process.exitcode == -signal.SIGKILL
            time.sleep(0.001)
        status, _, error = run.wait()
        if status == 0:
            break
        assert status == -signal.SIGKILL, error
    assert killed >= 1
    status, _, error = whole.wait()
    assert status == 0, error
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert all(path.suffix == ".pt" for path in (tmp_path / "killed" / "checkpoints").iterdir())


# ── what goes wrong ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_loss_that_is_not_finite(data, tmp_path):
    with pytest.raises(RunError, match=r"not finite at epoch 1, step \d of 3"):
        run(data, tmp_path / "r", arch="vgg11", lr=1e9, schedule="constant", save_every=1)
    state, _ = checkpoint.newest(tmp_path / "r" / "checkpoints", NEEDED)
    assert state is None or all(bool(value.isfinite().all()) for value in state["net"].values())
    assert not (tmp_path / "r" / "weights.safetensors").exists()


def test_a_run_that_saved_nothing_leaves_its_folder_free(data, tmp_path):
    with pytest.raises(RunError, match="not finite at epoch 1, step .* or set warmup or clip$"):
        run(data, tmp_path / "r", arch="vgg11", lr=1e9, schedule="constant")
    told = []
    config = TrainConfig(**TINY | {"epochs": 1})
    assert vggfeat.train(data, config, folder=tmp_path / "r", resume=True, announce=told.append).history
    assert f"no checkpoint in {tmp_path / 'r'} yet: the run begins" in told
    with pytest.raises(InputError, match="already exists"):
        run(data, tmp_path / "r", epochs=1)


@pytest.mark.skipif(sys.platform == "win32", reason="no such limit there")
def test_a_full_disk(data, tmp_path):
    """With a limit on the size of files, as near to a full disk as a test gets: one line, and what was there stays."""
    script = tmp_path / "limited.py"
    script.write_text("""
import resource, runpy
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
runpy.run_module("vggfeat.training", run_name="__main__")
""")
    status, _, error = Python(script, *command(data, tmp_path / "r", "--quiet")).wait()
    assert status == 1
    last = error.splitlines()[-1]
    assert "cannot write checkpoint" in last and "Traceback" not in error
    assert not (tmp_path / "r" / "checkpoints").exists() or not list((tmp_path / "r" / "checkpoints").iterdir())


def test_pictures_that_are_too_small(tmp_path):
    small = pictures.folder(tmp_path / "s", pictures.tree(8, width=20, height=20))
    with pytest.raises(InputError, match="20 pixels are smaller than 32"):
        run(small, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_device_that_is_not_there(data, tmp_path):
    with pytest.raises(InputError, match="device 'cuda:97' cannot be used here"):
        run(data, tmp_path / "r", device="cuda:97")


# ── several processes ─────────────────────────────────────────────────────────────────────────────────────────────────


def launched(data, folder, *more):
    """By torchrun, as people do it."""
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*start, "-m", "vggfeat.training", *command(data, folder, *more)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("local", "current", "own", "expected"),
    [(1, 0, True, 1), (1, 0, False, 1), (0, 2, False, 2), (3, 0, False, 0)],
)
@pytest.mark.parametrize("fails", [False, True])
def test_each_process_takes_its_gpu(monkeypatch, local, current, own, expected, fails):
    """Be the group its own or the caller's; and one that fails leaves NCCL's, which waits for all, as it is."""
    asked = []
    for name, value in {"RANK": 1, "LOCAL_RANK": local, "WORLD_SIZE": 3, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(distributed, "resolve", torch.device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(("set", device)))
    answers = {"is_initialized": not own, "get_rank": 1, "get_world_size": 3, "barrier": None}
    for name, value in answers.items():
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    for name in ("init_process_group", "destroy_process_group"):
        told = lambda *args, name=name, **options: asked.append((name, *args, *options.values()))  # noqa: E731
        monkeypatch.setattr(torch.distributed, name, told)
    with contextlib.suppress(ZeroDivisionError), distributed.process_group("auto") as world:
        assert (world.device, world.rank, world.size) == (torch.device("cuda", expected), 1, 3)
        assert not fails or 1 / 0
    begins, ends = [("init_process_group", "nccl", world.device)], [("destroy_process_group",)]
    assert asked == [("set", world.device), *begins * own, *ends * (own and not fails)]


def joined(*words):
    """The same without waiting for fresh interpreters."""
    found = together(2, *words)
    assert all(status == 0 for status, _, _ in found), found
    return "".join(out for _, out, _ in found)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.5, "cutmix": 1.0}])
def test_two_processes_are_one(data, tmp_path, mixing, request):
    """The same global batch in one process and in two: the same network to rounding, and the same test exactly."""
    if mixing:
        request.getfixturevalue("torchvision")
    options = ["--json", "--quiet", "--lr=0.02", "--epochs=1", "--warmup=0.3", "--accumulate=2"]
    options += [f"--{name}={value}" for name, value in mixing.items()]
    one = run(data, tmp_path / "one", **vars_of("fast", lr=0.02, epochs=1, warmup=0.3, accumulate=2, ema=0.9, **mixing))
    if mixing:
        said = joined("-m", "vggfeat.training", *command(data, tmp_path / "two", *options))
    else:
        said = launched(data, tmp_path / "two", *options)
    said = said[said.index("{") : said.rindex("}") + 1]  # Gloo of torch 2.10 reports its connections around it
    two, summary = weights(tmp_path / "two"), json.loads(said)
    for key, value in weights(one.folder).items():
        torch.testing.assert_close(two[key], value, rtol=5e-3, atol=5e-4, msg=key)
    row, other = summary["history"][0], one.history[0]
    assert row["train_loss"] == pytest.approx(other.train_loss, rel=1e-3)
    assert row["test_loss"] == pytest.approx(other.test_loss, rel=1e-2)
    found = vggfeat.evaluate(tmp_path / "two" / "weights.safetensors", data)
    assert found.images == 15 and row["test_accuracy"] == found.top1  # 15 is odd: nothing was padded


def test_a_signal_to_one_process_ends_all(data, tmp_path):
    """After the same step; and going on, they end where one process ends."""
    options = vars_of("fast", lr=0.02, epochs=1)
    script = tmp_path / "signalled.py"
    script.write_text(f"""
import os, signal, torch, torch.distributed as dist, vggfeat
dist.init_process_group("gloo")  # one for both runs
def callback(step):  # called in the first process alone
    if step.step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
options = dict(config=vggfeat.TrainConfig(**{options}), folder={str(tmp_path / "r")!r})
assert vggfeat.train({str(data)!r}, callback=callback, **options).interrupted
assert [name[-4:] for name in os.listdir({str(tmp_path / "r" / "checkpoints")!r})] == ["2.pt"]
result = vggfeat.train({str(data)!r}, resume=True, **options)
assert not result.interrupted
print("loss", result.history[0].train_loss, "end")
dist.destroy_process_group()
result.net.train()(torch.rand(2, 3, 32, 32))  # it is good without the other process
""")
    losses = re.findall(r"loss (\S+) end", joined(script))
    found, one = weights(tmp_path / "r"), run(data, tmp_path / "one", **options)
    assert [float(loss) for loss in losses] == pytest.approx([one.history[0].train_loss] * 2, rel=1e-3)
    for key, value in weights(one.folder).items():
        torch.testing.assert_close(found[key], value, rtol=5e-3, atol=5e-4, msg=key)


def vars_of(name, **changes):
    return vggfeat.recipe(name, **TINY | changes).to_dict()


def test_any_trouble_of_the_first_process_is_that_of_all(monkeypatch):
    told = []

    def broadcast(values):
        told.append(values[0])
        values[0] = told[0]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    for rank in (0, 1):
        with pytest.raises(ZeroDivisionError):
            distributed.run_on_main(lambda: 1 / 0, World(CPU, rank, 2))


def test_batch_norm_over_processes_is_that_of_the_whole_batch(tmp_path):
    """Value, gradients and statistics in two processes, against torch's on the whole batch."""
    script = """
import sys, torch, torch.distributed as dist
from torch import nn
from vggfeat.training.distributed import World, synchronise
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
x, grad = torch.randn(2, 6, 5, 4, 4).unbind()
plain = nn.BatchNorm2d(5)
nn.init.normal_(plain.weight), nn.init.normal_(plain.bias)
import copy
ours = copy.deepcopy(plain)
synchronise(ours, World(torch.device("cpu"), rank, 2))
whole = x.clone().requires_grad_()
plain(whole).backward(grad)
part = slice(0, 2) if rank == 0 else slice(2, 6)
mine = x[part].clone().requires_grad_()
ours(mine).backward(grad[part])
for p in ours.parameters():
    dist.all_reduce(p.grad)
torch.testing.assert_close(mine.grad, whole.grad[part], rtol=1e-4, atol=1e-5)
for a, b in zip(ours.parameters(), plain.parameters()):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
for (name, a), (_, b) in zip(ours.named_buffers(), plain.named_buffers()):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
print("good")
"""
    (tmp_path / "check.py").write_text(script)
    assert joined(tmp_path / "check.py").count("good") == 2


def test_the_run_is_a_zip_of_plain_values(finished):
    """A checkpoint holds tensors and plain values only, so that reading it can run no code."""
    path = sorted((finished[0].folder / "checkpoints").iterdir())[-1]
    assert zipfile.is_zipfile(path)
    assert torch.load(path, weights_only=True)["classes"] == ["ant", "bee", "cow"]


# ── found by reading ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_resuming_takes_over_nobody_elses_folder(data, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text("mine")
    (theirs / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="no checkpoint to resume from"):
        run(data, theirs, resume=True)
    assert (theirs / "config.json").read_text() == "mine"
    result = run(data, tmp_path / "new", resume=True, epochs=1)  # a run that was killed before it began
    assert (result.folder / "weights.safetensors").exists()


def test_a_test_that_fails_costs_no_epoch(tmp_path, torchvision):
    train = pictures.folder(tmp_path / "train", pictures.tree(8))
    files = pictures.tree(3, width=40) | {"ant/0.png": b"no image"}
    test = pictures.folder(
        tmp_path / "test", files | {"bee/w.png": pictures.encoded(pictures.picture("bee", 1, 50, 36))}
    )
    options = {"epochs": 1, "workers": 0}
    good, _ = vggfeat.load_images(train)
    tested = vggfeat.ImageSet(**vars(vggfeat.load_images(test, bad_images="skip")[0]))
    assert tested.pixels is None  # so that the damaged image is met on the way
    with pytest.raises(RunError, match=r"ant/0\.png.*--bad-images skip"):
        run(good, tmp_path / "r", test=tested, **options)
    state, _ = checkpoint.newest(tmp_path / "r" / "checkpoints", NEEDED)
    assert (state["epoch"], state["step"]) == (0, 3)
    result = run(good, tmp_path / "r", test=tested, resume=True, bad_images="skip", **options)
    assert result.evaluation.images == 9 and result.evaluation.skipped == ["ant/0.png"]


def test_processes_that_read_make_no_difference_and_end_with_the_run(tmp_path, torchvision):
    mixed = pictures.tree(8, width=48, height=40) | {"ant/t.png": pictures.encoded(pictures.picture("ant", 7, 40, 60))}
    images, _ = vggfeat.load_images(pictures.folder(tmp_path / "a", mixed))
    assert images.pixels is None
    options = {"test": images, "size": 32, "resize": (34, 40), "pad": 0, "epochs": 2}
    before, during = set(multiprocessing.active_children()), set()

    def watch(step):
        during.update(set(multiprocessing.active_children()) - before)

    alone = run(images, tmp_path / "r0", workers=0, callback=watch, **options)
    assert not during
    several = run(images, tmp_path / "r2", workers=2, callback=watch, **options)
    assert len(during) == 4  # two for training and two for the test, the same in both epochs
    assert several.evaluation == alone.evaluation
    for value, other in zip(several.net.state_dict().values(), alone.net.state_dict().values(), strict=True):
        assert torch.equal(value, other)

    def fail(step):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(images, tmp_path / "r3", workers=2, callback=fail, **options)
    assert set(multiprocessing.active_children()) == before


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL")
def test_a_process_that_is_killed_while_it_waits_is_an_error_that_says_so(tmp_path, torchvision):
    """Of those for the test, during training: torch raises in whatever the main process is doing."""
    mixed = pictures.tree(8, width=48, height=40) | {"ant/t.png": pictures.encoded(pictures.picture("ant", 7, 40, 60))}
    images, _ = vggfeat.load_images(pictures.folder(tmp_path / "a", mixed))
    before, first = set(multiprocessing.active_children()), set()

    def kill(step):
        if step.finished is None and step.epoch == 1:
            first.update(set(multiprocessing.active_children()) - before)  # those for training
        if step.finished is not None:
            waiting = set(multiprocessing.active_children()) - before - first
            assert len(waiting) == 2
            os.kill(waiting.pop().pid, signal.SIGKILL)
            time.sleep(1)

    with pytest.raises(RunError, match="a process that reads images was ended.*set workers lower"):
        run(images, tmp_path / "r", test=images, size=32, resize=(34, 40), pad=0, epochs=2, workers=2, callback=kill)
    assert set(multiprocessing.active_children()) == before


def test_images_in_memory_start_no_processes(tmp_path, monkeypatch):
    """Nor does torch warn that there are too many."""
    images, _ = vggfeat.load_images(pictures.folder(tmp_path / "a", pictures.tree(8)))
    monkeypatch.setattr(vggfeat.training.readers, "DataLoader", None)
    run(images, tmp_path / "r", test=images, workers=2, epochs=1)
    assert vggfeat.evaluate(tmp_path / "r", images, workers=2, precision="float32").images == 24


def test_test_images_are_scaled_as_training_images_are(tmp_path, torchvision):
    mixed = pictures.tree(8, width=48, height=40) | {"ant/t.png": pictures.encoded(pictures.picture("ant", 7, 40, 60))}
    images, _ = vggfeat.load_images(pictures.folder(tmp_path / "a", mixed))
    test, _ = vggfeat.load_images(pictures.folder(tmp_path / "b", pictures.tree(2, width=90, height=90)))
    config = TrainConfig(**TINY | {"size": 32, "resize": (34, 40), "pad": 0})
    made = loop._Run(config, images, test, World(CPU), tmp_path, None)
    assert (made.views.size, made.views.scales) == (32, (40,))
    with pytest.raises(InputError, match="resize 128 with pad 4 is smaller than size 224"):
        loop._Run(TrainConfig(**TINY | {"resize": (128,)}), images, test, World(CPU), tmp_path, None)
    images, _ = vggfeat.load_images(tmp_path / "b")  # of one size, and so kept as they are
    small, _ = vggfeat.load_images(pictures.folder(tmp_path / "c", pictures.tree(2)))
    made = loop._Run(TrainConfig(**TINY | {"batch_size": 2}), images, small, World(CPU), tmp_path, None)
    assert (made.views.size, made.views.scales) == (90, (90,))
    with pytest.raises(InputError, match="tested 90 pixels high or wide, smaller than size 96: set resize"):
        loop._Run(TrainConfig(**TINY | {"batch_size": 2, "size": 96}), images, small, World(CPU), tmp_path, None)


def test_a_run_is_evaluated_as_it_was_tested(tmp_path):
    big = pictures.folder(tmp_path / "s", pictures.tree(8, width=48, height=48))
    result = run(big, tmp_path / "r", size=32, holdout=0.5, epochs=1)
    images = vggfeat.load_images(big)[0]
    found = vggfeat.evaluate(tmp_path / "r", images, precision="float32")
    held = split_holdout(images, 0.5, 0)[1]
    explicit = vggfeat.evaluate(result.net, held, vggfeat.Views(size=32), precision="float32")
    assert found.loss == pytest.approx(explicit.loss, rel=1e-5)
    assert found.loss != pytest.approx(vggfeat.evaluate(result.net, held, precision="float32").loss, rel=1e-5)


def test_a_run_sees_larger_images_at_the_scale_it_was_trained_at(finished, tmp_path):
    result, _ = finished
    large, small = pictures.tree(3, offset=20, width=64, height=64), {}
    for name, content in large.items():
        image = Image.open(io.BytesIO(content))
        image.paste((128, 128, 128), (16, 16, 48, 48))  # what a crop of 32×32 pixels would see
        large[name] = pictures.encoded(image)
        small[name] = pictures.encoded(image.resize((32, 32), Image.Resampling.BILINEAR))
    found = vggfeat.evaluate(result.folder, pictures.folder(tmp_path / "large", large), precision="float32")
    same = vggfeat.evaluate(result.folder, pictures.folder(tmp_path / "small", small), precision="float32")
    assert found.loss == pytest.approx(same.loss, rel=1e-6)
    crop = vggfeat.evaluate(result.net, tmp_path / "large", vggfeat.Views(size=32), precision="float32")
    assert crop.top1 == pytest.approx(1 / 3) and found.loss != pytest.approx(crop.loss, rel=0.01)


def test_what_was_held_out_is_found_again_whatever_could_not_be_read(tmp_path):
    files = {
        f"{kind}/{i}.png": pictures.encoded(pictures.picture(kind, i, 40 + 3 * i, 40 + 3 * i))
        for kind in pictures.COLORS
        for i in range(8)
    }
    source = pictures.folder(tmp_path / "s", files | {"bee/3.png": b"no image"})
    options = {"size": 32, "resize": (32,), "holdout": 0.3, "epochs": 1, "bad_images": "skip"}
    lines = []
    config = TrainConfig(**TINY | options)
    result = vggfeat.train(source, config, folder=tmp_path / "r", announce=lines.append)
    assert [line for line in lines if "left out" in line] == [
        f"left out 1 image of {source} that cannot be read: bee/3.png"
    ]
    found = vggfeat.evaluate(tmp_path / "r", source, bad_images="skip", precision="float32")
    assert found.images == result.evaluation.images and 5 <= found.images <= 6
    assert found.loss == pytest.approx(result.evaluation.loss, rel=1e-5)
    images, _ = vggfeat.load_images(source, bad_images="skip")
    assert images.pixels is None and not images.skipped  # sizes differ: the damaged one was not met
    copied, _ = vggfeat.load_images(images, resize=(32,), bad_images="skip")
    assert copied.skipped == {"bee/3.png": 1} and not images.skipped
    assert vggfeat.evaluate(tmp_path / "r", images, bad_images="skip", precision="float32").loss == found.loss
    images, _ = vggfeat.load_images(source, resize=(48,), bad_images="skip")
    assert images.pixels is not None and images.skipped == {"bee/3.png": 1}
    again = vggfeat.evaluate(tmp_path / "r", images, bad_images="skip", precision="float32")
    assert (again.loss, again.skipped) == (found.loss, found.skipped)
    larger = vggfeat.evaluate(tmp_path / "r", source, vggfeat.Views(size=40), bad_images="skip", precision="float32")
    held = split_holdout(vggfeat.load_images(source, bad_images="skip")[0], 0.3, 0)[1]
    whole = vggfeat.evaluate(result.net, held, vggfeat.Views(size=40), bad_images="skip", precision="float32")
    assert larger.loss == pytest.approx(whole.loss, rel=1e-6)


def test_small_images_are_padded_to_their_size(tmp_path):
    """As those of MNIST, 28×28, are."""
    source = pictures.folder(tmp_path / "s", pictures.tree(4, width=28, height=28))
    assert run(source, tmp_path / "r", size=32, pad=4, epochs=1).evaluation is None
    assert vggfeat.weights.run_metadata(tmp_path / "r")["scales"] is None
    found = vggfeat.evaluate(tmp_path / "r", source, vggfeat.Views(size=32, scales=(32,)), precision="float32")
    assert found.images == 12
    with pytest.raises(InputError, match="tested 28 pixels high or wide, smaller than size 32: set resize"):
        run(source, tmp_path / "q", size=32, pad=4, epochs=1, test=source)


def test_without_a_test_set_a_run_knows_its_size_too(tmp_path):
    big = pictures.folder(tmp_path / "s", pictures.tree(4, width=80, height=80))
    result = run(big, tmp_path / "r", size=32, epochs=1)
    assert result.evaluation is None
    found = vggfeat.evaluate(tmp_path / "r", big, precision="float32")
    explicit = vggfeat.evaluate(result.net, big, vggfeat.Views(size=32), precision="float32")
    assert found.loss == pytest.approx(explicit.loss, rel=1e-5)


def test_a_run_goes_on_as_weights(finished, tmp_path):
    """For every command; and Grad-CAM knows the classes."""
    result, _ = finished
    loaded = vggfeat.weights.load(result.folder)
    assert loaded.label == "finished/weights.safetensors" and loaded.arch == result.net.arch
    picture = pictures.picture("ant", 0, 80, 64)
    seen = vggfeat.visualize.cam(picture, 1, weights=result.folder)
    assert seen.class_name == "bee" and "1 bee" in seen.sheet.labels[1]
    assert tuple(seen.map.shape) == (32, 40)  # at the size that it was trained at …
    assert seen.sheet.tiles[0].size == (224, 179)  # … and shown at one that a person can make out
    assert max(vggfeat.visualize.cam(picture, weights=result.folder, size=64).map.shape) == 64


def test_a_tensorboard_that_does_not_work_stops_nothing(data, tmp_path, monkeypatch):
    module = type(sys)("torch.utils.tensorboard")

    def broken(*_):
        raise TypeError("Descriptors cannot be created directly")

    module.SummaryWriter, told = broken, []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    config = TrainConfig(**TINY | {"epochs": 1})
    assert vggfeat.train(data, config, folder=tmp_path / "r", announce=told.append).history
    assert "no log for TensorBoard, which does not work here: Descriptors cannot be created directly" in told


def test_settings_of_torchs_are_left_as_they_were(data, tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run(data, tmp_path / "r", deterministic=True, epochs=1)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_some_clusters_variables_are_not_torchruns(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run(data, tmp_path / "r", epochs=1).history


@pytest.mark.parametrize("damage", range(40))
def test_a_damaged_checkpoint_is_passed_over_whatever_the_damage(finished, tmp_path, damage):
    result, _ = finished
    older, newer = sorted((result.folder / "checkpoints").iterdir())
    for path in (older, newer):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content, draw = bytearray(newer.read_bytes()), random.Random(damage)
    if damage < 20:  # where zips keep their directory, and all over the file
        place = len(content) - 1 - draw.randrange(6000)
    else:
        place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    (tmp_path / newer.name).write_bytes(content)
    state, wrong = checkpoint.newest(tmp_path, NEEDED)
    assert state is not None and len(wrong) <= 1
    intact = torch.load(older if wrong else newer)
    assert state["epoch"] == (6 if wrong else 7) == intact["epoch"] and same(state["net"], intact["net"])


def test_what_freezes_is_the_convolutional_part(finished, data, tmp_path):
    options = {"arch": None, "width": 1.0, "weights": str(finished[0].folder / "weights.safetensors")}
    with pytest.raises(InputError, match="one of the head's layers"):
        begun(data, tmp_path, new_head=True, head="paper", freeze="fc7", **options)


def test_synchronised_layers_are_batch_normalisation_too():
    from vggfeat.network import _still

    block = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    assert not isinstance(block[0], nn.BatchNorm2d)
    with _still(block):
        assert block[0].momentum == 0.0
    assert block[0].momentum == 0.1


def test_what_a_kill_left_is_cleared_away(data, tmp_path):
    with pytest.raises(Interrupted):
        run(data, tmp_path / "r", callback=stop_at(2), save_every=1)
    folder = tmp_path / "r" / "checkpoints"
    (folder / ".vggfeat-0123456789abcdef.tmp").write_bytes(b"half a checkpoint")
    (folder / "step-000000099.pt").write_bytes(b"damaged")
    good = {path.name for path in folder.glob("step-00000000?.pt")}
    state, damaged = checkpoint.newest(folder, NEEDED)
    assert state["step"] == 1 and len(damaged) == 1
    # nothing but half a file is lost
    assert {path.name for path in folder.iterdir()} == good | {"step-000000099.damaged"}


def test_a_damaged_checkpoint_that_cannot_be_renamed_does_not_end_a_run(data, tmp_path):
    with pytest.raises(Interrupted):
        run(data, tmp_path / "r", callback=stop_at(2), save_every=1)
    folder = tmp_path / "r" / "checkpoints"
    (folder / "step-000000099.pt").write_bytes(b"damaged")
    (folder / "step-000000099.damaged").mkdir()
    state, damaged = checkpoint.newest(folder, NEEDED)
    assert state["step"] == 1 and len(damaged) == 1


def test_recipes_bend():
    assert vggfeat.recipe("fast", epochs=1).epochs == 1
    bent = vggfeat.recipe("fast", optimizer="sgd", lr=0.2, nesterov=True)
    assert (bent.optimizer, bent.lr, bent.nesterov, bent.schedule) == ("sgd", 0.2, True, "linear")
    with pytest.raises(InputError, match="unknown setting 'rate': choose from arch, head, width, "):
        vggfeat.recipe("fast", rate=0.2)


def test_a_refusal_reaches_every_process(data, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("mine")
    for status, _, error in together(2, "-m", "vggfeat.training", *command(data, tmp_path / "r")):
        assert status == 2 and "r already exists" in error
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["mine.txt"]


# ── what a user would lose ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_resized_is_evaluated_as_it_was_tested(tmp_path):
    big = pictures.folder(tmp_path / "s", pictures.tree(8, width=48, height=48))
    test = pictures.folder(tmp_path / "t", pictures.tree(4, offset=50, width=48, height=48))
    result = run(big, tmp_path / "r", test=test, resize=(36,), size=32, epochs=1)
    found = vggfeat.evaluate(tmp_path / "r", test, precision="float32")
    assert found.loss == pytest.approx(result.history[-1].test_loss, rel=1e-5)
    several = vggfeat.evaluate(tmp_path / "r", test, vggfeat.Views(scales=(40, 48)), precision="float32")
    explicit = vggfeat.evaluate(result.net, test, vggfeat.Views(32, (40, 48)), precision="float32")
    assert several.loss == pytest.approx(explicit.loss, rel=1e-5)  # scales of one's own, and the run's size
    dense = vggfeat.evaluate(tmp_path / "r", test, vggfeat.Views(dense=True), precision="float32")
    explicit = vggfeat.evaluate(result.net, test, vggfeat.Views(scales=(36,), dense=True), precision="float32")
    assert dense.loss == pytest.approx(explicit.loss, rel=1e-5) and dense.loss != pytest.approx(found.loss, rel=1e-5)


def test_a_checkpoint_is_weights(data, tmp_path):
    """Of a run that diverged, say."""
    result = run(data, tmp_path / "r", epochs=1)
    path = max((tmp_path / "r" / "checkpoints").iterdir())
    loaded = vggfeat.weights.load(path).state
    assert all(torch.equal(value, loaded[key]) for key, value in result.net.state_dict().items())


def test_fast_takes_shorter_steps_from_weights():
    assert vggfeat.recipe("fast", weights="bundled").lr == vggfeat.recipe("fast", arch="vgg19").lr == 0.005
    assert (
        vggfeat.recipe("fast", weights="mine.pth", arch="vgg11_bn").lr == 0.005
    )  # whether the network is named or not
    assert vggfeat.recipe("fast").lr == vggfeat.recipe("fast", weights="random", arch="vgg16_bn").lr == 0.05
    config = vggfeat.recipe("fast", weights="random", new_head=True)  # of the VGG-16 without batch normalisation
    assert (
        components.build_network(config, 10).arch.name == "vgg16"
        and config.lr == vggfeat.recipe("fast", arch="vgg16").lr
    )


def test_other_peoples_folders_are_left_alone(data, tmp_path):
    theirs = tmp_path / "theirs"
    (theirs / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "thesis.txt", "checkpoints/best.pt"):
        (theirs / name).write_text("{}")
    before = {path: path.read_text() for path in theirs.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="choose another folder"):
        run(data, theirs, resume=True, epochs=1)
    (theirs / "thesis.txt").unlink()
    with pytest.raises(InputError, match="was not written by vggfeat: choose another folder"):
        run(data, theirs, resume=True, epochs=1)
    torch.save({"epoch": 3}, theirs / "checkpoints" / "step-000000001.pt")
    with pytest.raises(InputError, match="it lacks classes, config, digest, images, net, size"):
        run(data, theirs, resume=True, epochs=1)
    assert all(path.read_text() == text for path, text in before.items() if path.name != "thesis.txt")


def test_one_process_at_a_time(data, tmp_path):
    """A second one in the same folder is refused, whether it begins or goes on; afterwards it may."""
    pytest.importorskip("fcntl")
    said = []

    def callback(step):
        for resume in (True, False) if not said else ():
            with pytest.raises(InputError) as info:
                run(data, tmp_path / "r", resume=resume, epochs=1)
            said.append(str(info.value))

    run(data, tmp_path / "r", callback=callback, epochs=1)
    assert all(each.startswith("another process is using") for each in said) and len(said) == 2
    assert run(data, tmp_path / "r", resume=True, epochs=1).history


def test_what_has_to_be_given_again_is_said_first(data, tmp_path):
    run(data, tmp_path / "r", epochs=1)
    with pytest.raises(InputError, match="other settings, pass the same ones: .*batch_size was 8, is 500"):
        vggfeat.train(data, vggfeat.recipe("fast"), folder=tmp_path / "r", resume=True)
    with pytest.raises(InputError, match=r"epochs was 1, is 2; to train .* longer, begin a new run with weights='.*r'"):
        run(data, tmp_path / "r", resume=True, epochs=2)


def test_one_class_is_none(tmp_path):
    one = pictures.folder(tmp_path / "s", {k: v for k, v in pictures.tree(8).items() if k.startswith("ant")})
    with pytest.raises(InputError, match="has one class, ant: there is nothing to tell apart"):
        run(one, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(116, "Stale file handle"), "Stale file handle"),
        (MemoryError(), "there is not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "there is not enough memory"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_now_stays(data, tmp_path, monkeypatch, error, said):
    run(data, tmp_path / "r", epochs=2)
    files = sorted((tmp_path / "r" / "checkpoints").iterdir())

    def refused(path, *_):
        raise error

    monkeypatch.setattr(checkpoint.zipfile, "ZipFile", refused)
    with pytest.raises(RunError, match=f"cannot read .*step-000000006.pt: {said}"):
        checkpoint.newest(tmp_path / "r" / "checkpoints", NEEDED)
    assert sorted((tmp_path / "r" / "checkpoints").iterdir()) == files


def test_old_checkpoints_that_cannot_be_removed_end_nothing(data, tmp_path, monkeypatch):
    unlink, refused = Path.unlink, []

    def held(path, *given, **more):
        if path.parent.name == "checkpoints" and (path.suffix == ".pt" or path.name == ".vggfeat-0.tmp"):
            refused.append(path)
            raise PermissionError(13, "another program has it open")
        unlink(path, *given, **more)

    monkeypatch.setattr(Path, "unlink", held)
    assert len(run(data, tmp_path / "r", epochs=4).history) == 4 and refused
    (tmp_path / "r/checkpoints/.vggfeat-0.tmp").touch()
    assert checkpoint.newest(tmp_path / "r/checkpoints", NEEDED)[0]["images"] == len(vggfeat.load_images(data)[0])
    assert len(checkpoint.saved(tmp_path / "r/checkpoints")) == 4


def test_a_log_that_is_open_elsewhere_ends_no_run(data, tmp_path, monkeypatch):
    """Spreadsheets on Windows lock what they show. In the end that is an error, but the weights are there."""
    replace, locked, said = os.replace, [True], []

    def refused(source, target):
        if Path(target).name == "log.csv" and locked[0]:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refused)

    def callback(step):
        locked[0] = step.epoch < 2

    run(data, tmp_path / "r", callback=callback, announce=said.append)
    assert [line for line in said if "log.csv" in line] == [
        f"cannot write {tmp_path / 'r' / 'log.csv'}: Permission denied; the next epoch tries again"
    ]
    assert len((tmp_path / "r/log.csv").read_text().splitlines()) == 3
    locked[0] = True
    with pytest.raises(RunError, match="log.csv: Permission denied; the run can go on from its checkpoints"):
        run(data, tmp_path / "s")
    assert (tmp_path / "s/weights.safetensors").exists()
    locked[0] = False
    assert len(run(data, tmp_path / "s", resume=True).history) == 2 and (tmp_path / "s/log.csv").exists()


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def test_a_checkpoint_that_would_run_code_is_passed_over(tmp_path):
    folder, marker = tmp_path / "checkpoints", tmp_path / "marker"
    folder.mkdir()
    checkpoint.write(folder / "step-000000001.pt", {"step": 1})
    torch.save({"step": Evil(marker)}, folder / "step-000000002.pt")
    torch.load(folder / "step-000000002.pt", weights_only=False)
    marker.rmdir()  # so it does run code where one lets it
    state, wrong = checkpoint.newest(folder, {"step"})
    assert state == {"step": 1} and len(wrong) == 1 and "step-000000002.pt is damaged" in wrong[0]
    assert not marker.exists()


def test_a_checkpoint_that_lacks_something_is_passed_over(tmp_path):
    checkpoint.write(tmp_path / "step-000000001.pt", {"step": 1, "net": {}})
    checkpoint.write(tmp_path / "step-000000002.pt", {"step": 2})
    state, wrong = checkpoint.newest(tmp_path, {"step", "net"})
    assert state == {"step": 1, "net": {}} and len(wrong) == 1 and "it lacks net" in wrong[0]


def test_a_disk_that_is_full_by_now_names_the_newest_checkpoint(tmp_path, monkeypatch):
    for steps in (1, 2):
        checkpoint.save(tmp_path, steps, {"step": steps})

    class Full:
        room = 200  # bytes, after which torch wraps the error in one of its own

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

        def flush(self):
            pass

    monkeypatch.setattr(checkpoint, "new_file", lambda path, overwrite: contextlib.nullcontext(Full()))
    said = r"step-000000003.pt: No space left on device; free some space; the run can go on from .*step-000000002.pt$"
    with pytest.raises(RunError, match=said):
        checkpoint.save(tmp_path, 3, {"step": torch.zeros(1000)})


def test_damage_that_looks_like_the_system_s_is_passed_over(data, tmp_path):
    """A bit of the zip's end, by which its reader seeks to before the beginning: invalid argument."""
    run(data, tmp_path / "r", epochs=2)
    folder = tmp_path / "r" / "checkpoints"
    older, newest = sorted(folder.iterdir())
    expected = checkpoint.read(older, NEEDED)
    content, seen = bytearray(newest.read_bytes()), 0
    for place in range(len(content) - 60, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        newest.write_bytes(damaged)
        try:
            checkpoint.read(newest, NEEDED)
        except OSError as error:
            seen += error.errno == errno.EINVAL
            state, said = checkpoint.newest(folder, NEEDED)
            assert (state["epoch"], state["step"]) == (expected["epoch"], expected["step"])
            assert "Invalid argument" in said[0]
            newest.with_suffix(".damaged").unlink()
        except Exception:
            continue
    assert seen


def test_going_on_with_other_images_is_refused(tmp_path):
    source = pictures.folder(tmp_path / "s", pictures.tree(4))
    with pytest.raises(Interrupted):
        run(source, tmp_path / "r", callback=stop_at(2), save_every=1, batch_size=4)
    (source / "ant" / "0.png").rename(source / "ant" / "renamed.png")
    with pytest.raises(InputError, match="was on other images than .*: their names or labels differ"):
        run(source, tmp_path / "r", resume=True, save_every=1, batch_size=4)


def test_going_on_with_another_test_set_is_refused(tmp_path):
    source = pictures.folder(tmp_path / "s", pictures.tree(4))
    test = pictures.folder(tmp_path / "t", pictures.tree(2, offset=20))
    options = {"save_every": 1, "batch_size": 4}
    with pytest.raises(Interrupted):
        run(source, tmp_path / "r", test=test, callback=stop_at(2), **options)
    with pytest.raises(InputError, match="has another test set, and now there is none: pass the same one"):
        run(source, tmp_path / "r", resume=True, **options)
    with pytest.raises(InputError, match=f"has another test set, not {re.escape(str(source))}: pass the same one"):
        run(source, tmp_path / "r", resume=True, test=source, **options)
    with pytest.raises(Interrupted):
        run(source, tmp_path / "q", callback=stop_at(2), **options)
    with pytest.raises(InputError, match="has no test set: go on without one, or begin anew"):
        run(source, tmp_path / "q", resume=True, test=test, **options)
    assert run(source, tmp_path / "r", resume=True, test=test, **options).evaluation.images == 6


@pytest.mark.parametrize("steps", range(1, 12))
def test_one_cycle_of_any_length(steps):
    found = rates(TrainConfig(**TINY | {"schedule": "onecycle", "epochs": 1}), steps)
    assert len(found) == steps and all(0 < rate <= TINY["lr"] * (1 + 1e-6) for rate in found)
    top = max(1, round(0.2 * steps))
    if steps > 1:
        assert found[top] == pytest.approx(TINY["lr"], rel=1e-9)
        assert found == sorted(found[:top]) + sorted(found[top:], reverse=True)
    late = rates(TrainConfig(**TINY | {"schedule": "onecycle", "epochs": 1, "warmup": 0.99}), steps)
    assert late == sorted(late) and (steps == 1 or late[-1] == pytest.approx(TINY["lr"], rel=1e-9))


def test_the_average_of_a_count_is_the_count(data, tmp_path):
    result = run(data, tmp_path / "r", epochs=2, ema=0.9)
    assert int(result.net.state_dict()["features.1.num_batches_tracked"]) == 6


def test_links_to_folders_around_them_are_followed_once(tmp_path):
    source = pictures.folder(tmp_path / "s", pictures.tree(4))
    (source / "ant" / "up").symlink_to(source)
    assert len(vggfeat.load_images(source)[0]) == 12


def test_links_to_one_folder_are_as_many_folders(tmp_path):
    source = pictures.folder(tmp_path / "s", pictures.tree(4))
    (tmp_path / "split").mkdir()
    for part in ("train", "val"):
        (tmp_path / "split" / part).symlink_to(source)
    train, test = vggfeat.load_images(tmp_path / "split")
    assert len(train) == len(test) == 12 and torch.equal(train.pixels, test.pixels)


def test_a_setting_that_there_was_not_yet_is_as_if_not_used(data, tmp_path):
    run(data, tmp_path / "r", epochs=1)
    for path in checkpoint.saved(tmp_path / "r/checkpoints"):
        state = checkpoint.read(path, NEEDED)
        del state["config"]["augment"]
        checkpoint.write(path, state)
    config = json.loads((tmp_path / "r/config.json").read_text())
    before = config.pop("augment")
    (tmp_path / "r/config.json").write_text(json.dumps(config))
    assert before == "none" and run(data, tmp_path / "r", resume=True, epochs=1).history
    with pytest.raises(InputError, match="augment was none, is trivialaugment"):
        run(data, tmp_path / "r", resume=True, epochs=1, augment="trivialaugment")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("epochs", [1, 3, 40])
def test_curves_of_any_length(tmp_path, epochs):
    pytest.importorskip("matplotlib")
    history = [Epoch(i, 0.1, 1 / i, 0.5, 2 / i, 0.4, None, 1.0, 1.0, 0) for i in range(1, epochs + 1)]
    path = vggfeat.plot_training({"a": history}, tmp_path / "curves.png")
    assert path.stat().st_size > 5000


@pytest.mark.filterwarnings("error")
def test_curves_of_many_runs(tmp_path):
    pytest.importorskip("matplotlib")
    history = [Epoch(i, 0.1, math.nan, 0.5, 2 / i, 0.4, None, 1.0, 1.0, 0) for i in range(1, 4)]
    runs = {
        name: history for name in ("_hidden", "$x_1$", "a name that is much too long for any legend at all", *"abcdef")
    }
    assert vggfeat.plot_training(runs, tmp_path / "curves.png").stat().st_size > 5000
    with pytest.raises(InputError, match="expected one to 9 runs, got 10"):
        vggfeat.plot_training(runs | {"g": history}, tmp_path / "more.png")
    with pytest.raises(InputError, match="no run has an epoch"):
        vggfeat.plot_training({"a": []}, tmp_path / "none.png")


def test_curves_are_those_of_the_history(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("vggfeat.plots._save", lambda figure, path, overwrite: drawn.append(figure))
    history = [
        Epoch(1, 0.1, 2.5, 0.25, 2.0, 0.5, None, 1.0, 1.0, 0),
        Epoch(2, 0.1, 1.5, 0.75, None, None, None, 1.0, 1.0, 0),
    ]
    vggfeat.plot_training({"a": history}, tmp_path / "curves.png")
    dashes = {line.get_label(): line.get_linestyle() for line in drawn[0].axes[0].lines}
    assert dashes == {"a, train": ":", "a, test": "-"}
    panels = [{line.get_label(): [*line.get_xydata().tolist()] for line in axes.lines} for axes in drawn[0].axes]
    assert panels == [
        {"a, train": [[1, 2.5], [2, 1.5]], "a, test": [[1, 2]]},
        {"a, train": [[1, 25], [2, 75]], "a, test": [[1, 50]]},
    ]
    assert [axes.get_title().split()[0] for axes in drawn[0].axes] == ["loss", "accuracy,"]


def test_the_legend_of_several_runs_has_their_colours_and_the_kinds_of_line(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("vggfeat.plots._save", lambda figure, path, overwrite: drawn.append(figure))
    history = [Epoch(i, 0.1, 2.5, 0.25, 2.0, 0.5, None, 1.0, 1.0, 0) for i in (1, 2)]
    vggfeat.plot_training({"one": history, "two": history}, tmp_path / "curves.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    (legend,) = drawn[0].legends
    shown = dict(zip([text.get_text().strip() for text in legend.get_texts()], legend.legend_handles, strict=True))
    assert [*shown] == ["one", "two", "train", "test"]
    for name in ("one", "two"):
        assert {lines[f"{name}, {part}"].get_color() for part in ("train", "test")} == {shown[name].get_color()}
    assert shown["one"].get_color() != shown["two"].get_color()
    for part in ("train", "test"):
        assert shown[part].get_linestyle() == lines[f"one, {part}"].get_linestyle()


@pytest.mark.filterwarnings("error")
def test_classes_of_any_name(tmp_path):
    """What folders may be called, and labels of a figure may not."""
    pytest.importorskip("matplotlib")
    from vggfeat.training.evaluation import _metrics

    names = ["x$^$y", "a name that is much too long for a label", "caf\udce9", "tab\tand\nline"]
    labels = torch.arange(8) % 4
    found = _metrics(labels, torch.rand(8, 4).softmax(1), names, 1, [])
    assert vggfeat.plot_confusion(found, tmp_path / "c.png").stat().st_size > 5000


# ── what is on record ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_going_on_remembers_what_was_left_out(data, tmp_path):
    made, again = begun(data, tmp_path), begun(data, tmp_path)
    made.batches.skipped.add("ant/1.png is damaged")
    made.save()
    again.load(checkpoint.newest(tmp_path / "checkpoints", NEEDED)[0])
    assert again.batches.skipped == {"ant/1.png is damaged"}


def test_a_checkpoint_knows_what_any_process_left_out(data, tmp_path, monkeypatch):
    made = begun(data, tmp_path)
    monkeypatch.setattr(loop, "all_gather_union", lambda skipped, world: skipped | {"theirs"})
    made.batches.skipped.add("ours")
    made.save()
    assert checkpoint.newest(tmp_path / "checkpoints", NEEDED)[0]["skipped"] == ["ours", "theirs"]


def test_what_is_left_out_is_named_and_how_much_learns(data, tmp_path):
    state = vggfeat.vgg11(3, width=0.125, head="slim").state_dict()
    made = begun(data, tmp_path, weights=state, freeze="pool5", arch=None, width=1.0)
    for count, names in ((5, "0, 1, 2, 3, 4"), (6, "0, 1, 2, 3, 4 …")):
        made.images = replace(made.images, skipped={str(i): 1 for i in range(count)}, others=["a.txt"])
        said = [*made.summary([])]
        assert said[0].endswith(" M parameters, 0.00 M of them learning")  # 3 × 65
        assert f"left out {count} images of {data}/train that cannot be read: {names}" in said
        assert said[-1].endswith(f"{data}/train outside its folders or without an image suffix: a.txt")


def test_settings_are_those_of_the_checkpoint_too(data, tmp_path):
    run(data, tmp_path / "r", epochs=1)
    (tmp_path / "r" / "config.json").unlink()
    with pytest.raises(InputError, match="has other settings, pass the same ones: .*lr was 0.01, is 0.02"):
        run(data, tmp_path / "r", epochs=1, lr=0.02, resume=True)
    assert run(data, tmp_path / "r", epochs=1, resume=True).history


def test_the_rate_on_record_is_the_classifiers(data, tmp_path):
    steps = []
    result = run(data, tmp_path / "r", callback=steps.append, features_lr=0.1, schedule="constant", warmup=0, epochs=1)
    assert {step.lr for step in steps} == {0.01} and result.history[0].lr == 0.01


def test_the_loss_of_a_step_is_the_mean_over_its_parts(data, tmp_path):
    losses = []
    for parts in (1, 4):
        torch.manual_seed(0)
        made = begun(data, tmp_path, arch="vgg11", dropout=0.0, accumulate=parts)
        losses.append(made._step(next(made.batches.epoch(0))).item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_figures_of_an_epoch_are_of_its_own_steps(finished):
    result, steps = finished
    for epoch in result.history:
        losses = [step.loss for step in steps if step.epoch == epoch.epoch]
        assert epoch.train_loss == pytest.approx(sum(losses) / 3, rel=1e-4)
        assert epoch.images_per_second * epoch.seconds == pytest.approx(24)


def test_settings_that_change_a_result_stay_what_they_were(tmp_path):
    free, before = set(), TrainConfig().to_dict()
    for name in before:
        other = SimpleNamespace(to_dict=lambda name=name: before | {name: "other"})
        try:
            folder_module._compare(tmp_path, before, other)
        except InputError:
            continue
        free.add(name)
    assert free == {"device", "workers", "save_every", "compile", "bad_images"}


@pytest.mark.parametrize("left", ["weights.safetensors", "log.csv", "notes.txt"])
def test_a_run_without_its_checkpoints_is_not_overwritten(tmp_path, left):
    """Somebody deleted them to save room: what the run came to is still there."""
    facts = {"classes": ["a", "b"], "data": "x"} | TrainConfig().to_dict()
    (tmp_path / "config.json").write_text(json.dumps(facts))
    folder_module.check_folder(tmp_path, TrainConfig(), resume=False)  # killed before its first checkpoint
    (tmp_path / left).write_bytes(b"results")
    with pytest.raises(InputError, match="already exists"):
        folder_module.check_folder(tmp_path, TrainConfig(), resume=False)
    with pytest.raises(InputError, match="has no checkpoint to resume from"):
        folder_module.check_folder(tmp_path, TrainConfig(), resume=True)


def test_muon_takes_the_momentum_and_a_warm_up_is_rounded():
    net = vggfeat.vgg11(num_classes=2, batch_norm=True, width=0.125, head="slim")
    groups = components.build_optimizer(net, TrainConfig(optimizer="muon", momentum=0.8)).param_groups
    assert {group["momentum"] for group in groups} == {0.8}
    warm = rates(TrainConfig(lr=1.0, epochs=10, schedule="constant", warmup=0.29))  # 2.9 steps
    assert warm[2] < 1 == warm[3]


def test_a_linear_schedule_after_a_warm_up_ends_at_0():
    warm = rates(TrainConfig(lr=1.0, epochs=10, schedule="linear", warmup=2.0))
    assert warm[20:] == pytest.approx([1 - i / 80 for i in range(80)])


def test_shares_of_mixed_images_have_their_own_distributions(torchvision):

    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    for option in ("mixup", "cutmix"):
        mean = {}
        for alpha in (0.05, 20.0):  # Beta(α, α): near 0 or 1, or near ½
            torch.manual_seed(0)
            mix = components.build_mixing(TrainConfig(**{option: alpha}), 4)
            shares = torch.stack([mix(images, labels)[1].amax(1).mean() for _ in range(50)])
            mean[alpha] = float(shares.mean())
        assert mean[0.05] > mean[20.0] + 0.03, option


def _learner(**changes):

    torch.manual_seed(0)
    net = vggfeat.vgg11(3, width=0.125, head="slim").to(memory_format=torch.channels_last)
    return Learner(net, TrainConfig(batch_size=4, **changes), World(CPU), torch.float16)


def test_the_scale_of_losses_halves_where_gradients_overflow_and_is_saved():
    learner = _learner()
    scale = learner.scaler.get_scale()
    before = {key: value.clone() for key, value in learner.net.state_dict().items()}
    images, labels = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    learner.step(images * 1e7, labels, labels, True)  # infinite in float16
    assert all(torch.equal(value, before[key]) for key, value in learner.net.state_dict().items())
    assert learner.scaler.get_scale() == scale / 2
    other = _learner()
    other.load_state_dict(learner.state_dict())
    assert other.scaler.get_scale() == scale / 2


def test_muon_computes_in_float32_where_the_network_does_in_float16():

    net = vggfeat.vgg11(num_classes=2, width=0.125, head="slim")
    assert components.build_optimizer(net, TrainConfig(optimizer="muon", precision="float16")).dtype == torch.float32


def test_dropout_is_what_the_settings_say():
    """Of a network that begins anew, one with weights, and one that goes on."""

    state = vggfeat.vgg11(num_classes=3, width=0.125, head="slim").state_dict()
    scratch = components.build_network(TrainConfig(arch="vgg11", width=0.125, dropout=0.2), 3)
    given = TrainConfig(weights=state, dropout=0.2)
    for net in (scratch, components.build_network(given, 3), components.build_network(given, 3, scratch.arch)):
        assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.2}


def test_a_new_head_is_drawn_as_the_settings_say():

    state = vggfeat.vgg11(num_classes=3, head="slim", width=0.5).state_dict()
    net = components.build_network(TrainConfig(weights=state, new_head=True, init="paper"), 1000)
    assert float(net.classifier[-1].weight.detach().std()) == pytest.approx(0.1, rel=0.05)  # section 3.1
    assert torch.equal(net.features[0].weight, state["features.0.weight"])


def test_seconds_are_those_of_training_alone(data, tmp_path, monkeypatch):
    """A second for each step; checkpoints and tests take longer, before a run is stopped and after."""
    now = [0.0]

    def slowed(real, seconds):
        def slow(*args):
            now[0] += seconds
            return real(*args)

        return slow

    for name, seconds in (("_step", 1), ("save", 100), ("_test", 1000)):
        monkeypatch.setattr(loop._Run, name, slowed(getattr(loop._Run, name), seconds))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    with pytest.raises(Interrupted):
        run(data, tmp_path / "r", callback=stop_at(2), save_every=1)
    result = run(data, tmp_path / "r", resume=True, save_every=1)
    assert [(epoch.seconds, epoch.images_per_second) for epoch in result.history] == [(3, 8), (3, 8)]


def test_steps_between_checkpoints_are_counted_over_epochs(data, tmp_path, monkeypatch):
    saved, save = [], checkpoint.save
    monkeypatch.setattr(loop._Run, "_epoch_saves", lambda self: False)
    monkeypatch.setattr(checkpoint, "save", lambda folder, done, state: saved.append(done) or save(folder, done, state))
    run(data, tmp_path / "r", save_every=2, epochs=3)
    assert saved == [2, 4, 6, 8]  # of epochs of three


def test_a_run_that_was_stopped_in_a_test_knows_its_last_step(data, tmp_path, monkeypatch):
    monkeypatch.setattr(loop._Run, "_test", lambda self: 1 / 0)
    steps = []
    with pytest.raises(ZeroDivisionError):
        run(data, tmp_path / "r", callback=steps.append, epochs=1)
    monkeypatch.undo()
    resumed = []
    result = run(data, tmp_path / "r", callback=resumed.append, epochs=1, resume=True)
    whole = run(data, tmp_path / "whole", callback=steps.append, epochs=1)
    (last,) = resumed
    assert (last.lr, last.loss) == (steps[-1].lr, steps[-1].loss) and result.history[0].lr == whole.history[0].lr


def test_what_is_drawn_differs_from_part_to_part_and_from_process_to_process(data, tmp_path):
    seen = []

    def step(images, labels, targets, last):
        seen.append(torch.initial_seed())
        return torch.zeros(()), torch.zeros(())

    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        made = begun(data, tmp_path, accumulate=2, seed=seed)
        made.world, made.learner = World(CPU, rank), SimpleNamespace(step=step)
        made.scheduler = SimpleNamespace(step=int)
        for epoch, number in itertools.product(range(2), range(3)):
            made.epoch, made.step = epoch, number
            made._step([(torch.zeros(4, 3, 32, 32), torch.zeros(4))] * 2)
    assert len({*seen}) == len(seen) == 3 * 2 * 3 * 2


def test_a_network_that_is_not_finite_is_not_saved(data, tmp_path):
    made = begun(data, tmp_path)
    made.save()
    (first,) = checkpoint.saved(tmp_path / "checkpoints")
    made.step = 2
    made.save()
    made.step = 3
    made.net.features[0].weight.data[0] = math.inf
    with pytest.raises(RunError, match=r"epoch 1, step 3 of 3.*step-000000002\.pt is from before"):
        made.save()
    assert [path.name for path in checkpoint.saved(tmp_path / "checkpoints")] == ["step-000000002.pt", first.name]


def test_of_several_steps_that_were_not_finite_the_first_is_known(data, tmp_path):
    """A GPU's are not read after each."""
    made = begun(data, tmp_path, arch="vgg11")
    for number, batch in enumerate(made.batches.epoch(0)):
        if number == 1:
            made.net.classifier[-1].bias.data[0] = math.nan
        made._step(batch)
        made.step += 1
    assert int(made.bad) == 1


@pytest.mark.parametrize("step", [0, 4])
def test_the_first_step_that_was_not_finite_is_named(data, tmp_path, monkeypatch, step):
    real = loop._Run._step

    def spoilt(run, batch):
        if run.done == step:
            run.net.classifier[-1].bias.data[0] = math.nan
        return real(run, batch)

    monkeypatch.setattr(loop._Run, "_step", spoilt)
    with pytest.raises(RunError, match=f"at epoch {1 + step // 3}, step {1 + step % 3} of 3"):
        run(data, tmp_path / "r")


def test_a_second_ctrl_c_ends_a_run_at_once_and_a_second_sigterm_does_not(data, tmp_path):
    made, ended = begun(data, tmp_path), []
    for processes, number in ((1, "SIGINT"), (1, "SIGTERM"), (1, "SIGINT"), (2, "SIGINT")):
        made.world = World(CPU, 0, processes)  # of two, both may come from one: the terminal's, and torchrun's
        try:
            made._asked_to_end(getattr(signal, number), None)
            ended.append(False)
        except KeyboardInterrupt:
            ended.append(True)
    assert made.asked and ended == [False, False, True, False]


def test_figures_of_an_epoch_count_images_not_parts(data, tmp_path):
    """Images that are left out make parts of different sizes."""
    made = begun(data, tmp_path, accumulate=2)
    results = iter([(1.0, 6), (3.0, 1)])
    made.learner = SimpleNamespace(step=lambda *_, **__: tuple(map(torch.tensor, next(results))))
    made.scheduler = SimpleNamespace(step=int)
    images = torch.zeros(8, 3, 32, 32)
    made._step([(images[:6], torch.zeros(6)), (images[6:], torch.zeros(2))])
    made.seconds = 4.0
    made._close_epoch(Evaluation(9, 0.5, 0.25, 0.75, [], [], 1))
    (epoch,) = made.history
    assert (epoch.train_loss, epoch.train_accuracy) == ((6 * 1.0 + 2 * 3.0) / 8, 7 / 8)
    assert (epoch.test_loss, epoch.test_accuracy, epoch.test_top5) == (0.5, 0.25, 0.75)
    assert (epoch.images_per_second, made.seconds, made.step, made.epoch) == (2.0, 0.0, 0, 1)


def test_images_that_were_left_out_are_counted_from_the_start(tmp_path):
    """Of the training set and of the test set, where both are known to lack some before the first step."""
    files = pictures.tree(8) | {"ant/9.png": b"no image"}
    source, test = (pictures.folder(tmp_path / name, files) for name in ("s", "t"))
    lines = []
    result = run(source, tmp_path / "r", test=test, epochs=1, bad_images="skip", announce=lines.append)
    assert result.history[0].skipped == 2 and result.evaluation.skipped == ["ant/9.png"]
    assert [line for line in lines if "left out" in line] == [
        f"left out 1 image of {place} that cannot be read: ant/9.png" for place in (source, test)
    ]


def test_checkpointing_keeps_less_for_the_backward(data, tmp_path):
    kept = []
    for on in (False, True):
        made = begun(data, tmp_path, arch="vgg11", checkpointing=on)
        made.learner.model.train()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            made.learner.model(torch.rand(8, 3, 32, 32))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 2


def test_a_folder_that_fills_while_images_are_read_is_left_alone(data, tmp_path):
    images, test = vggfeat.load_images(data)
    config, folder = TrainConfig(**TINY), tmp_path / "r"
    folder_module.check_folder(folder, config, resume=False)
    pictures.folder(folder, {"mine.txt": b"mine"})
    with contextlib.ExitStack() as lock, pytest.raises(InputError, match="already exists"):
        folder_module.begin_or_resume(
            folder, config, components.build_network(config, 3).arch, images, test, False, lock
        )
    assert not (folder / "config.json").exists()


def test_a_run_makes_the_folders_around_its_own(data, tmp_path):
    assert run(data, tmp_path / "runs" / "today" / "r", epochs=1).folder.is_dir()


def test_what_a_kill_left_half_written_is_no_results(data, tmp_path):
    """Of a run that ended before its first checkpoint."""
    run(data, tmp_path / "r", epochs=1)
    for name in ("weights.safetensors", "log.csv"):
        (tmp_path / "r" / name).unlink()
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    pictures.folder(tmp_path / "r", {name: b"-" for name in (".vggfeat-1.tmp", "checkpoints/.vggfeat-2.tmp")})
    assert run(data, tmp_path / "r", epochs=1).history


def test_adam_goes_on_on_another_kind_of_device(data, tmp_path):
    """On a GPU its steps are captured as a graph, which is a setting in its state."""
    made = begun(data, tmp_path, optimizer="adam")
    batch = next(made.batches.epoch(0))
    made._step(batch)
    state = copy.deepcopy(made.learner.state_dict())
    for group in state["optimizer"]["param_groups"]:
        group["capturable"] = True
    made.learner.load_state_dict(state)
    assert not any(group["capturable"] for group in made.learner.optimizer.param_groups)
    made._step(batch)


def test_new_networks_are_those_of_the_settings():
    config = TrainConfig(arch="vgg11", width=0.125, head="paper", init="paper", dropout=0.3)
    state = vggfeat.vgg11(3, head="slim", width=0.125).state_dict()
    with pytest.raises(WeightsError, match="slim head for 3 classes, the run wants a paper head for 3"):
        components.build_network(TrainConfig(weights=state, head="paper"), 3)
    for net in (
        components.build_network(config, 3),
        components.build_network(TrainConfig(weights=state, init="paper"), 3),
    ):
        assert net.init == "paper"
    assert components.build_network(config, 3).arch.head == "paper"


def test_biases_before_a_frozen_batch_normalisation_learn():
    """It normalises by statistics that do not change, so that they make a difference."""
    net = vggfeat.vgg11(3, batch_norm=True, width=0.125, head="slim")
    net.features[1].requires_grad_(False)
    assert len(components.redundant_biases(net)) == 7 and all(
        bias is not net.features[0].bias for bias in components.redundant_biases(net)
    )


def test_accuracy_is_counted_by_labels_where_images_are_mixed():
    learner = _learner(dropout=0.0)
    learner.net.classifier[-1].bias.data[0] = 100.0  # class 0 for all
    shares = torch.tensor([[0.3, 0.7, 0.0]] * 4)  # mostly other images
    _, right = learner.step(torch.rand(4, 3, 32, 32), torch.tensor([0, 0, 0, 1]), shares, True)
    assert int(right) == 3


def test_a_folder_with_settings_of_something_else_is_somebodys(data, tmp_path):
    pictures.folder(tmp_path / "theirs", {"config.json": b"{}"})
    with pytest.raises(InputError, match="already exists"):
        run(data, tmp_path / "theirs", epochs=1)
    assert (tmp_path / "theirs" / "config.json").read_bytes() == b"{}"


def test_the_layer_that_is_named_is_frozen_too():
    state = vggfeat.vgg11(3, width=0.125, head="slim").state_dict()
    net = components.build_network(TrainConfig(weights=state, freeze="conv2_1"), 3)
    frozen = {name for name, value in net.named_parameters() if not value.requires_grad}
    assert frozen == {f"features.{number}.{kind}" for number in (0, 3) for kind in ("weight", "bias")}

"""vggfeat.weights: every source is checked against an independent computation, every failure against what it leaves."""

import contextlib
import errno
import hashlib
import http.server
import io
import math
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from vggfeat.arch import BLOCKS, Arch, parse, scaled
from vggfeat.errors import DependencyError, InputError, RunError, WeightsError, WeightsUnavailableError
from vggfeat.features import VGGFeatures
from vggfeat.losses import PerceptualLoss
from vggfeat.network import VGG, vgg
from vggfeat.visualize import cam
from vggfeat.weights import fetch, sets as W
from vggfeat.weights.state_dicts import infer_arch

BGR_MEAN = torch.tensor([103.939, 116.779, 123.68])[:, None, None]  # of the ILSVRC training set, as Oxford gives it
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def small(config="D", seed=0, **options):
    """A network of 4 to 32 channels."""
    torch.manual_seed(seed)
    net = vgg(config, **({"num_classes": 5, "width": 1 / 16} | options)).eval()
    for name, value in net.state_dict().items():
        if name.endswith(("bias", "running_mean")):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return net


def images(side=20, seed=1):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def shallow(state, last):
    """The part of a state dict up to features.{last}."""
    return {key: value for key, value in state.items() if key[0] == "f" and int(key.split(".")[1]) <= last}


def torch_bytes(state, **options):
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def publish(monkeypatch, data, name="imagenet", folder="http://127.0.0.1:9", digest=None, convention=W.IMAGENET):
    """Make `data` the published vgg16 of a set."""
    digest = digest or hashlib.sha256(data).hexdigest()[:8]
    entry = W.Published(f"{folder}/vgg16-{digest}.pth", convention, "a licence")
    monkeypatch.setattr(W, "SETS", W.SETS | {name: {"vgg16": entry}})
    return entry


def assert_same(loaded, net):
    expected = {key: value for key, value in net.state_dict().items()}
    assert set(loaded.state) == set(expected)
    assert all(torch.equal(loaded.state[key], expected[key]) for key in expected)
    assert loaded.arch == net.arch


@pytest.fixture(scope="module")
def net():
    return small()


@pytest.fixture(scope="module")
def state(net):
    return net.state_dict()


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", [dict, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "net.vgg."])
def test_torch_files(tmp_path, net, state, zipped, wrap, prefix):
    path = tmp_path / "w.pth"
    torch.save(wrap({prefix + key: value for key, value in state.items()}), path, _use_new_zipfile_serialization=zipped)
    loaded = W.load(path)
    assert_same(loaded, net)
    assert loaded.label == "w.pth"
    assert (loaded.mean, loaded.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_safetensors_file(tmp_path, net, state):
    from safetensors.torch import save_file

    save_file(dict(state), tmp_path / "w.safetensors")
    assert_same(W.load(str(tmp_path / "w.safetensors")), net)


def test_files_with_a_wrong_suffix(tmp_path, net, state):
    from safetensors.torch import save_file

    save_file(dict(state), tmp_path / "w.pth")
    assert_same(W.load(tmp_path / "w.pth"), net)
    torch.save(dict(state), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="no safetensors file: .*; it seems to be torch's: name it .pth"):
        W.load(tmp_path / "w.safetensors")


def test_an_address_is_no_path():
    with pytest.raises(WeightsUnavailableError, match="^https://a.b/c.pth is an address: download the file"):
        W.load("https://a.b/c.pth")


def test_an_address_is_no_path_where_it_is_no_name_either(monkeypatch):
    def refuse(path, **options):
        raise OSError(errno.EINVAL, "The filename, directory name, or volume label syntax is incorrect")  # Windows'

    monkeypatch.setattr(Path, "stat", refuse)
    with pytest.raises(WeightsUnavailableError, match="^https://a.b/c.pth is an address: download the file"):
        W.load("https://a.b/c.pth")


def test_tensors_that_are_not_dense(state):
    sparse = {key: value.to_sparse() if value.ndim == 4 else value for key, value in state.items()}
    with pytest.raises(WeightsError, match="features.0.weight has values of layout torch.sparse_coo: give it dense"):
        W.load(sparse)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_state_dict_of_the_features_alone(batch_norm):
    net = small("B", batch_norm=batch_norm)
    loaded = W.load(net.features.state_dict())
    assert loaded.arch == replace(net.arch, head=None, num_classes=loaded.arch.num_classes)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in loaded.state.items())
    with pytest.raises(WeightsError, match="not a VGG's: expected keys like features.0.weight"):
        W.load(net.classifier[0].state_dict(prefix="0."))


def test_tensors_that_require_gradients(net):
    loaded = W.load(net.state_dict(keep_vars=True))
    assert_same(loaded, net)
    assert not any(value.requires_grad for value in loaded.state.values())


def test_a_variance_may_be_0():
    state = small("A", batch_norm=True).state_dict()
    state["features.1.running_var"][0] = 0
    assert float(W.load(state).state["features.1.running_var"][0]) == 0


def test_other_keys_may_hold_whole_numbers(state):
    loaded = W.load(state | {"index.weight": torch.zeros(2, dtype=torch.long)})
    assert all(torch.equal(loaded.state[key], value) for key, value in state.items())


def test_a_pickle_of_another_protocol_is_read_without_a_warning(tmp_path, net, state):
    torch.save(dict(state), tmp_path / "w.pth", pickle_protocol=3)
    assert_same(W.load(tmp_path / "w.pth"), net)


def test_batch_norm_state_dict():
    """Its counters are tensors without dimensions."""
    net = small("B", batch_norm=True)
    assert_same(W.load(net.state_dict()), net)
    assert torch.equal(vgg("B", 5, True, net.state_dict(), width=1 / 16).eval()(images(32)), net(images(32)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(state, dtype):
    loaded = W.load({key: value.to(dtype) for key, value in state.items()})
    assert torch.equal(loaded.state["features.2.weight"], state["features.2.weight"].to(dtype).float())


def test_a_state_dict_is_copied():
    """Frozen weights, and a network started from another's, do not move when the first goes on training."""
    first = small()
    second = vgg("D", 5, width=1 / 16, weights=first.state_dict())
    loaded = W.load(first.state_dict())
    kept = {key: value.clone() for key, value in first.state_dict().items()}
    for value in first.state_dict().values():
        value.add_(1)
    assert all(torch.equal(value, kept[key]) for key, value in second.state_dict().items())
    assert all(torch.equal(value, kept[key]) for key, value in loaded.state.items())
    assert all(p.requires_grad and p.is_leaf for p in second.parameters())


def test_key_tells_the_numbers_apart(state):
    other = state | {"features.28.bias": state["features.28.bias"] + 1}
    assert W.load(state).key == W.load(dict(reversed(state.items()))).key
    assert W.load(state).key == W.load({"state_dict": state}).key
    assert W.load(state).key != W.load(other).key
    assert W.load({"state_dict": state}).key != W.load({"state_dict": other}).key


def test_the_same_numbers_under_other_keys_are_other_weights():
    values = [torch.ones(4, 3, 3, 3), torch.ones(4), torch.ones(4, 4, 3, 3), torch.ones(4)]
    one, other = (
        W.load(
            dict(zip([f"features.{i}.{part}" for i in (0, second) for part in ("weight", "bias")], values, strict=True))
        )
        for second in (2, 3)  # conv1_2, and conv2_1 of a network whose first block is one convolution
    )
    assert one.arch != other.arch and one.key != other.key


def test_other_layers_of_a_classifier_are_not_oxfords(state):
    loaded = W.load(state | {"classifier.4.weight": torch.zeros(2, 2)})  # and no warning
    assert torch.equal(loaded.state["classifier.3.weight"], state["classifier.3.weight"])


def test_jcjohnsons_keys(tmp_path, net, state):
    moved = {"classifier.0": "classifier.1", "classifier.3": "classifier.4"}
    theirs = {moved.get(key[:12], key[:12]) + key[12:]: value for key, value in state.items()}
    assert "classifier.4.weight" in theirs and "classifier.0.weight" not in theirs
    torch.save(theirs, tmp_path / "w.pth")
    for source in (tmp_path / "w.pth", theirs, {"state_dict": {f"module.{key}": each for key, each in theirs.items()}}):
        with pytest.warns(UserWarning, match=r"as Oxford's files do: .*load their file as caffe:PATH"):
            assert_same(W.load(source), net)
    assert W.load(f"caffe:{tmp_path / 'w.pth'}").std == W.CAFFE.std


# ── the network that a file belongs to ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("config", "bn"), [(config, bn) for config in BLOCKS for bn in (False, True) if not (bn and config == "A-LRN")]
)
@pytest.mark.parametrize(("head", "unit", "classes"), [("paper", 64, 1000), ("slim", 48, 10), ("paper", 2, 3)])
def test_infer_arch(config, bn, head, unit, classes):
    with torch.device("meta"):
        net = vgg(config, classes, bn, head=head, width=unit / 64)
    state = net.state_dict()
    assert infer_arch(state, "w") == Arch(config, bn, scaled(unit), head, classes)
    convs = {key: value for key, value in state.items() if key.startswith("features.")}
    assert infer_arch(convs, "w") == Arch(config, bn, scaled(unit), None)


@pytest.mark.parametrize(
    ("config", "bn", "last", "expected"),
    [
        ("D", False, "conv2_1", "vgg16"),  # vgg13, vgg16-c and vgg19 begin alike
        ("E", False, "conv3_3", "vgg16"),
        ("E", False, "conv3_4", "vgg19"),
        ("C", False, "conv3_2", "vgg16"),
        ("C", False, "conv3_3", "vgg16-c"),
        ("B", False, "conv4_2", "vgg13"),
        ("A", False, "conv2_1", "vgg11"),
        ("A-LRN", False, "conv2_1", "vgg11-lrn"),
        ("E", True, "bn2_2", "vgg16_bn"),
    ],
)
def test_infer_arch_of_shallow_files(config, bn, last, expected):
    with torch.device("meta"):
        net = vgg(config, batch_norm=bn)
    assert infer_arch(shallow(net.state_dict(), net.arch.layer(last).index), "w").name == expected


def test_a_shallow_file_serves_any_network_that_begins_so(state):
    first = shallow(state, 7)  # to conv2_2
    assert W.load(first).arch.name == "vgg16"
    assert W.load(first, "vgg19").arch.name == "vgg19"
    assert W.load(first, "vgg13").arch == Arch("B", channels=scaled(4), head=None)
    with pytest.raises(WeightsError, match="belong to vgg16, not to vgg11"):
        W.load(first, "vgg11")
    with pytest.raises(WeightsError, match="belong to vgg16, not to vgg16_bn"):
        W.load(first, "vgg16_bn")
    with pytest.raises(WeightsError, match="belong to vgg16, not to vgg19"):
        W.load(state, "vgg19")


def test_a_shallow_file_with_a_classifier_keeps_it(state):
    first = shallow(state, 7) | {key: value for key, value in state.items() if key.startswith("classifier.")}
    arch = W.load(first, "vgg19").arch
    assert (arch.name, arch.head, arch.num_classes) == ("vgg19", "paper", 5)


@pytest.mark.parametrize(("key", "columns"), [("classifier.6.weight", 64), ("classifier.1.weight", 7)])
def test_a_last_layer_of_another_width_is_of_another_classifier(state, key, columns):
    convs = {key: value for key, value in state.items() if key.startswith("features.")}
    assert W.load(convs | {key: torch.rand(5, columns)}).arch.head is None


def test_served(state):
    loaded = W.load(shallow(state, 7))  # to conv2_2
    assert loaded.served(["conv1_1", "relu2_2", "conv3_1", "conv1_2"]) == ["conv1_1", "relu2_2"]
    with pytest.raises(WeightsError, match="do not reach conv3_1"):
        loaded.served(["conv3_1"])


def test_require(state, net):
    loaded = W.load(shallow(state, 7))
    loaded.require(["conv1_1", "pool2"])
    with pytest.raises(
        WeightsError, match=r"do not reach relu3_1: missing features.10.weight, features.10.bias; .*pool2"
    ):
        loaded.require(["relu3_1", "conv1_1"])
    four = "features.10.weight, features.10.bias, features.12.weight, features.12.bias"
    with pytest.raises(WeightsError, match=rf"missing {four} …; the deepest layer they serve is pool2"):
        loaded.require(["pool5"])
    hole = W.load({key: value for key, value in state.items() if key != "features.2.bias"})
    with pytest.raises(WeightsError, match=r"do not reach conv1_2: missing features.2.bias; .* serve is relu1_1$"):
        hole.require(["conv1_2"])
    with pytest.raises(InputError, match="has no layer 'conv3_4'"):
        loaded.require(["conv3_4"])
    W.load(state).require(net.arch.names)
    beheaded = W.load({key: value for key, value in state.items() if not key.startswith("classifier.0")})
    beheaded.require(["pool5"])
    with pytest.raises(WeightsError, match=r"reach fc7: missing classifier.0.weight, .* serve is pool5$"):
        beheaded.require(["fc7"])


def test_batch_norm_statistics_are_required():
    net = small("A", batch_norm=True)
    state = {key: value for key, value in net.state_dict().items() if key != "features.1.running_var"}
    W.load(state).require(["conv1_1"])
    with pytest.raises(WeightsError, match=r"missing features.1.running_var; .* serve is conv1_1$"):
        W.load(state).require(["relu1_1"])
    counters = {key: value for key, value in net.state_dict().items() if not key.endswith("tracked")}
    assert torch.equal(W.load_weights(small("A", 9, batch_norm=True), counters).eval()(images(32)), net(images(32)))


@pytest.mark.data
def test_oxford_file(oxford):
    loaded = W.load(oxford)
    assert (loaded.arch.name, loaded.arch.head) == ("vgg19", None)
    loaded.require(["relu3_4", "pool3"])
    with pytest.raises(WeightsError, match=r"missing features.19.weight, features.19.bias; .* serve is pool3$"):
        loaded.require(["conv4_1"])


# ── Oxford's convention and Keras ─────────────────────────────────────────────────────────────────────────────────────


def oxford_conv1_1(x, weight, bias):
    """conv1_1 in Oxford's convention on RGB in [0,1], weight (out, BGR, 3, 3)."""
    return F.conv2d(255 * x[:, [2, 1, 0]] - BGR_MEAN, weight, bias, padding=1)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("way", ["prefix", "published name", "set"])
def test_caffe_convention(tmp_path, monkeypatch, state, way):
    data = torch_bytes(dict(state))
    name = publish(monkeypatch, data, "caffe", convention=W.CAFFE).filename
    path = tmp_path / ("own.pth" if way == "prefix" else name)
    path.write_bytes(data)
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", str(tmp_path))
    source = {"prefix": f"caffe:{path}", "published name": path, "set": "caffe"}[way]
    x = images()
    expected = oxford_conv1_1(x, state["features.0.weight"], state["features.0.bias"])
    taps = VGGFeatures(["conv1_1", "conv1_2"], weights=source)(x)
    close(taps["conv1_1"], expected)  # at the border too
    close(taps["conv1_2"], F.conv2d(expected.relu(), state["features.2.weight"], state["features.2.bias"], padding=1))

    net = W.load_weights(small(seed=5), path if way == "set" else source)  # a published set has the full width
    with torch.no_grad():
        folded = net.taps((x - MEAN) / STD, ["conv1_1"])["conv1_1"]
    close(folded[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    for key in state.keys() - {"features.0.weight", "features.0.bias"}:
        assert torch.equal(net.state_dict()[key], state[key])


def test_the_same_file_in_two_conventions(tmp_path, state):
    torch.save(dict(state), tmp_path / "w.pth")
    x = images()
    plain, caffe = (VGGFeatures(["conv1_1"], weights=p + str(tmp_path / "w.pth")) for p in ("", "caffe:"))
    weight, bias = state["features.0.weight"], state["features.0.bias"]
    close(caffe(x)["conv1_1"], oxford_conv1_1(x, weight, bias))
    close(plain(x)["conv1_1"], F.conv2d((x - MEAN) / STD, weight, bias, padding=1))


def test_a_file_replaced_while_it_is_read_is_read_anew_later(tmp_path, state, monkeypatch):
    path, read = tmp_path / "w.pth", W.read
    newer = {key: value + 1 for key, value in state.items()}
    torch.save(dict(state), path)

    def replaced_meanwhile(path, **options):
        raw = read(path, **options)
        torch.save(newer, path)
        return raw

    with monkeypatch.context() as patched:
        patched.setattr(W, "read", replaced_meanwhile)
        before = VGGFeatures(["conv1_1"], weights=path)
    x = images()
    for features, expected in ((before, state), (VGGFeatures(["conv1_1"], weights=path), newer)):
        weight, bias = expected["features.0.weight"], expected["features.0.bias"]
        close(features(x)["conv1_1"], F.conv2d((x - MEAN) / STD, weight, bias, padding=1))


def test_a_lack_of_memory_is_no_damage(tmp_path, state, monkeypatch):
    torch.save(dict(state), tmp_path / "w.pth")

    def no_memory(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 411041792 bytes")

    monkeypatch.setattr(torch, "load", no_memory)
    with pytest.raises(RunError, match="not enough memory"):
        W.load(tmp_path / "w.pth")


def keras_arrays(config, seed=0):
    """Layers of a Keras VGG with 4 to 32 channels: kernels (H,W,in,out), linear (in,out)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = {"D": (2, 2, 3, 3, 3), "E": (2, 2, 4, 4, 4)}[config]
    arrays, before = {}, 3
    for block, (count, channels) in enumerate(zip(blocks, (4, 8, 16, 32, 32), strict=True), start=1):
        for i in range(1, count + 1):
            kernel = torch.randn(3, 3, before, channels, generator=generator) * (2 / (9 * before)) ** 0.5
            arrays[f"block{block}_conv{i}"] = (kernel, torch.randn(channels, generator=generator) * 0.1)
            before = channels
    for name, rows, columns in (("fc1", 7 * 7 * 32, 256), ("fc2", 256, 256), ("predictions", 256, 5)):
        matrix = torch.randn(rows, columns, generator=generator) * (2 / rows) ** 0.5
        arrays[name] = (matrix, torch.randn(columns, generator=generator) * 0.1)
    return arrays


def write_keras(path, arrays, layout):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for layer, (kernel, bias) in arrays.items():
            if layout == "old":
                file[f"{layer}/{layer}_W_1:0"], file[f"{layer}/{layer}_b_1:0"] = kernel.numpy(), bias.numpy()
                continue
            top = "model_weights/" if layout == "whole model" else ""
            file[f"{top}{layer}/{layer}/kernel:0"], file[f"{top}{layer}/{layer}/bias:0"] = kernel.numpy(), bias.numpy()
            if layout == "whole model":  # an optimiser's moments have the same names and shapes
                moments = f"optimizer_weights/Adam/{layer}"
                file[f"{moments}/kernel/m:0"], file[f"{moments}/bias/m:0"] = 0 * kernel.numpy(), 0 * bias.numpy()
        if layout != "old":
            for i in range(1, 6):
                file.create_group(f"block{i}_pool")


def keras_forward(arrays, x):
    """What Keras computes, in its own layout (N,H,W,C) as far as it matters."""
    x = 255 * x[:, [2, 1, 0]] - BGR_MEAN
    values = {}
    for block in range(1, 6):
        for i in range(1, 5):
            if f"block{block}_conv{i}" in arrays:
                kernel, bias = arrays[f"block{block}_conv{i}"]
                values[f"conv{block}_{i}"] = x = F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=1)
                x = x.relu()
        values[f"pool{block}"] = x = F.max_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)
    for ours, name in (("fc6", "fc1"), ("fc7", "fc2"), ("fc8", "predictions")):
        if name in arrays:
            values[ours] = x = x @ arrays[name][0] + arrays[name][1]
            x = x.relu()
    return values


@pytest.mark.parametrize("layout", ["old", "new", "whole model"])
@pytest.mark.parametrize("config", ["D", "E"])
def test_keras_files(tmp_path, layout, config):
    arrays = keras_arrays(config)
    write_keras(tmp_path / "w.h5", arrays, layout)
    x = images(224)[:1]
    expected = keras_forward(arrays, x)
    names = ["conv1_1", "conv3_3", "pool5", "fc6", "fc7", "fc8"]
    features = VGGFeatures(names, weights=tmp_path / "w.h5")
    assert features.arch == Arch(config, channels=scaled(4), num_classes=5)
    for name, value in features(x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].abs().max()))
    net = W.load_weights(small(config, seed=3), tmp_path / "w.h5")
    with torch.no_grad():
        folded = net.taps((x - MEAN) / STD, ["conv1_1"])["conv1_1"]
    close(folded[..., 1:-1, 1:-1], expected["conv1_1"][..., 1:-1, 1:-1])


def test_keras_notop_and_partial_files(tmp_path):
    arrays = keras_arrays("D")
    top = {name: arrays[name] for name in arrays if name.startswith("block") and name < "block3_conv2"}
    write_keras(tmp_path / "w.h5", top, "new")
    loaded = W.load(tmp_path / "w.h5")
    assert loaded.arch.head is None
    with pytest.raises(WeightsError, match=r"w.h5 do not reach conv3_2: missing features.12.weight"):
        loaded.require(["conv3_2"])


def test_keras_file_of_the_first_blocks_of_vgg19(tmp_path):
    arrays = {name: each for name, each in keras_arrays("E").items() if "block1" <= name < "block4"}
    write_keras(tmp_path / "w.h5", arrays, "new")
    loaded = W.load(tmp_path / "w.h5")
    loaded.require(["conv3_4"])
    assert loaded.arch.name == "vgg19"


def test_keras_file_of_two_networks(tmp_path):
    h5py = pytest.importorskip("h5py")
    arrays = keras_arrays("D")
    write_keras(tmp_path / "w.h5", arrays, "new")
    with h5py.File(tmp_path / "w.h5", "a") as file:
        file["other/block1_conv1/kernel:0"] = arrays["block1_conv1"][0].numpy()
    with pytest.raises(WeightsError, match="holds more than one network: block1_conv1 is there twice"):
        W.load(tmp_path / "w.h5")


def test_keras_archive(tmp_path):
    (tmp_path / "vgg.keras").write_bytes(b"PK\3\4")
    with pytest.raises(WeightsError, match="is a Keras archive: save the weights alone, model.save_weights"):
        W.load(tmp_path / "vgg.keras")


def test_keras_convention_does_not_hang_on_the_files_name(tmp_path):
    arrays = keras_arrays("D")
    write_keras(tmp_path / "w.weights", arrays, "new")
    x = images(32)
    expected = keras_forward({name: arrays[name] for name in arrays if name.startswith("block")}, x)
    close(VGGFeatures(["conv1_1"], weights=tmp_path / "w.weights")(x)["conv1_1"], expected["conv1_1"])


def test_keras_file_with_another_classifier(tmp_path):
    arrays = keras_arrays("D") | {"fc1": (torch.randn(32, 256), torch.randn(256))}  # on a global pool
    write_keras(tmp_path / "w.h5", arrays, "new")
    loaded = W.load(tmp_path / "w.h5")
    loaded.require(["pool5"])
    assert loaded.arch.head is None


def test_keras_file_of_another_network(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["conv1/conv1/kernel:0"] = torch.zeros(7, 7, 3, 64).numpy()
    with pytest.raises(WeightsError, match="not a Keras VGG: expected layers named block1_conv1"):
        W.load(tmp_path / "w.h5")


def test_keras_file_without_h5py(tmp_path, monkeypatch):
    (tmp_path / "w.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(DependencyError, match=r"needs h5py: pip install 'vggfeat\[h5\]'"):
        W.load(tmp_path / "w.h5")


def test_keras_file_with_an_h5py_built_for_another_numpy(tmp_path, monkeypatch):
    said = "numpy.dtype size changed, may indicate binary incompatibility"  # as of h5py 3.10 with NumPy 2
    (tmp_path / "h5py.py").write_text(f"raise ValueError({said!r})")
    (tmp_path / "w.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.delitem(sys.modules, "h5py", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=rf"needs h5py: .* \({said}\)"):
        W.load(tmp_path / "w.h5")


# ── damage ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9999])
@pytest.mark.parametrize("kind", ["zip.pth", "legacy.pth", "w.safetensors", "w.h5"])
def test_truncated_files(tmp_path, state, kind, part):
    path = tmp_path / kind
    if kind == "w.h5":
        write_keras(path, keras_arrays("D"), "new")
    elif kind == "w.safetensors":
        from safetensors.torch import save_file

        save_file(dict(state), path)
    else:
        path.write_bytes(torch_bytes(dict(state), _use_new_zipfile_serialization=kind.startswith("zip")))
    W.load(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(part * len(data))])
    with pytest.raises(WeightsError, match=f"{kind} is damaged or no"):
        W.load(path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "h5"])
@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>404</html>", bytes(range(7, 256)) * 40])
def test_files_of_another_kind(tmp_path, suffix, data):
    (tmp_path / f"w.{suffix}").write_bytes(data)
    with pytest.raises(WeightsError, match=f"w.{suffix} is damaged or no"):
        W.load(tmp_path / f"w.{suffix}")


class Evil:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_pickle_that_would_run_code(tmp_path, state, kind):
    path, marker = tmp_path / "w.pth", tmp_path / "marker"
    evil = dict(state) | {"features.0.weight": Evil(marker)}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Evil(marker)))
        pickle.loads(path.read_bytes())
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=kind == "zip")
        torch.load(path, weights_only=False)
    marker.rmdir()  # so it does run code where one lets it
    with pytest.raises(
        WeightsError, match="not loaded: it holds more than tensors, and unpickling that could run code"
    ):
        W.load(path)
    assert not marker.exists()


def test_a_whole_module_is_not_unpickled(tmp_path, net):
    torch.save(net, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"save the state dict alone: torch.save\(net.state_dict\(\), path\)"):
        W.load(tmp_path / "w.pth")


def test_a_file_that_holds_no_state_dict(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds a list, expected a state dict"):
        W.load(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        ({"conv1.weight": torch.zeros(64, 3, 7, 7), "bn1.weight": torch.zeros(64)}, "found conv1.weight, bn1.weight"),
        ({}, "found nothing"),
        ({0: torch.zeros(1)}, "found 0"),
        ({"features.0.weight": torch.zeros(64, 3, 11, 11)}, r"shape \(64, 3, 11, 11\), which fits no configuration"),
        ({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, "found features.0.0.weight"),
    ],
    ids=["resnet", "empty", "numbers", "alexnet", "mobilenet"],
)
def test_keys_of_another_network(tmp_path, foreign, message):
    torch.save(foreign, tmp_path / "w.pth")
    for source in (tmp_path / "w.pth", foreign):
        with pytest.raises(WeightsError, match=f"are not a VGG's: .*{message}"):
            W.load(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(state, value):
    bad = state["features.5.weight"].clone()
    bad[1, 2, 0, 1] = value
    with pytest.raises(WeightsError, match="damaged: features.5.weight holds NaN or infinite"):
        W.load(state | {"features.5.weight": bad})


def test_none_is_untrained():
    arch = Arch("A", channels=scaled(4), head=None)
    untrained, random = W.load(None, arch), W.load("random", arch)
    assert untrained.label == "random" and untrained.key == random.key
    assert all(torch.equal(untrained.state[key], value) for key, value in random.state.items())


def test_what_is_no_file(tmp_path):
    with pytest.raises(WeightsError, match="is a folder without weights.safetensors: give a .pth"):
        W.load(tmp_path)
    with pytest.raises(WeightsUnavailableError, match="no weights at .*missing.pth: give a .pth"):
        W.load(tmp_path / "missing.pth")
    with pytest.raises(WeightsUnavailableError, match="did you mean imagenet"):
        W.load("imagnet")
    with pytest.raises(WeightsUnavailableError, match="choose from imagenet, caffe, bundled, random, auto"):
        W.load("xyz")
    for wrong in (3, small()):
        with pytest.raises(InputError, match=f"a path or a state dict, got {type(wrong).__name__}"):
            W.load(wrong)
    with pytest.raises(InputError, match="unknown architecture 'vgg61'"):
        W.load("random", "vgg61")


def test_a_file_that_may_not_be_read(tmp_path, state, monkeypatch):
    path = tmp_path / "w.pth"
    torch.save(dict(state), path)

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(W.Path, "open", refuse)  # chmod does not stop root
    with pytest.raises(WeightsUnavailableError, match="w.pth cannot be read: Permission denied"):
        W.load(path)


def test_a_published_file_that_may_not_be_read(monkeypatch):
    published = W.SETS["imagenet"]["vgg11"].filename
    hub().mkdir(parents=True)
    (hub() / published).write_bytes(b"locked")

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fetch, "_sha256", refuse)
    with pytest.raises(WeightsUnavailableError, match=f"{published} cannot be read: Permission denied"):
        W.load("imagenet", "vgg11")
    assert W.load("auto", "vgg11").label.startswith("random (imagenet weights for vgg11 are unavailable")


# ── published files: find, verify ─────────────────────────────────────────────────────────────────────────────────────


def hub():
    return W.folders()[-1]


def left():
    return sorted(path.name for path in hub().glob("*")) if hub().is_dir() else []


def test_published_names_end_in_their_digest():
    for entries in W.SETS.values():
        for arch, entry in entries.items():
            assert entry.filename.startswith(f"{arch}-{entry.digest}.")
            assert len(entry.digest) == 8 and int(entry.digest, 16)
            assert parse(arch).name == arch
    for name in ("vgg16.pth", "vgg16-1a2b3c.pth"):  # six digits are too few
        with pytest.raises(InputError, match="publishes its sha256"):
            W.fetch(f"http://127.0.0.1:9/{name}", hub())


def test_own_folder_comes_before_torch_hubs(tmp_path, monkeypatch, net, state):
    data = torch_bytes(dict(state))
    entry = publish(monkeypatch, data)
    assert hub() == W.Path(torch.hub.get_dir()) / "checkpoints"
    hub().mkdir(parents=True)
    (hub() / entry.filename).write_bytes(data)
    assert W.find("imagenet") == hub() / entry.filename
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", str(tmp_path))
    assert W.find("imagenet") == hub() / entry.filename
    (tmp_path / entry.filename).write_bytes(data)
    assert W.find("imagenet") == tmp_path / entry.filename
    loaded = W.load("imagenet")
    assert_same(loaded, net)
    assert loaded.label == f"imagenet ({entry.filename})"


def test_record_of_the_first_check(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(b"abc")
    full = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2's own example
    note = tmp_path / "w.bin.sha256"
    assert W.verify(path, "ba7816bf") == full
    assert note.read_text() == f"{full}  w.bin\n"
    note.write_text("")  # a record that says nothing is written anew
    assert W.verify(path) == full
    assert note.read_text().split() == [full, "w.bin"]
    note.write_text("ba7816bf" + "0" * 56 + "  w.bin\n")  # the published digits fit, the recorded ones do not
    with pytest.raises(WeightsError, match=r"changed since it was first checked: .* recorded in w.bin.sha256"):
        W.verify(path, "ba7816bf")


def test_a_record_may_be_in_capitals(tmp_path):
    """As some of Windows' tools write it."""
    (path := tmp_path / "w.bin").write_bytes(b"abc")
    note = tmp_path / "w.bin.sha256"
    note.write_text("BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD  w.bin\n")
    W.verify(path)
    assert fetch.recorded(path)
    note.write_text("A" * 64 + "  w.bin\n")
    with pytest.raises(WeightsError, match="was changed since it was first checked"):
        W.verify(path)


def test_a_record_is_read_the_same_in_any_locale(tmp_path):
    (path := tmp_path / "А.pth").write_bytes(b"abc")
    (tmp_path / "А.pth.sha256").write_text("0" * 64 + "  А.pth\n", encoding="utf-8")
    place = f"pathlib.Path(os.fsdecode({os.fsencode(path)!r}))"
    code = f"import os, pathlib; from vggfeat.weights import fetch; print(fetch.recorded({place}))"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout == "True\n"


def test_tampered_file(monkeypatch, state):
    data = torch_bytes(dict(state))
    entry = publish(monkeypatch, data)
    hub().mkdir(parents=True)
    path = hub() / entry.filename
    path.write_bytes(data)
    W.load("imagenet")
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    os.utime(path, ns=(1, 1))
    actual = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    for source, hint in (("imagenet", "delete it"), (path, "rename it if it was saved again, and say caffe:PATH")):
        with pytest.raises(WeightsError, match=f"damaged or was changed: .*{actual}, expected {entry.digest}; {hint}"):
            W.load(source)


def test_a_published_file_that_was_saved_again_is_taken_where_its_convention_is_said(monkeypatch, state):
    """As other tools' downloads do, under the same name."""
    entry = publish(monkeypatch, torch_bytes(dict(state)), name="caffe", convention=W.CAFFE)
    hub().mkdir(parents=True)
    path = hub() / entry.filename
    torch.save(dict(state) | {"classifier.0.bias": torch.zeros_like(state["classifier.0.bias"])}, path)
    assert W.load(f"caffe:{path}").std == W.CAFFE.std


def test_a_published_file_in_torchs_older_format(monkeypatch, net, state):
    """No zip, which alone can be mapped into memory."""
    data = torch_bytes(dict(state), _use_new_zipfile_serialization=False)
    entry = publish(monkeypatch, data)
    hub().mkdir(parents=True)
    (hub() / entry.filename).write_bytes(data)
    assert_same(W.load("imagenet"), net)


def test_a_published_file_given_by_its_path_is_recorded(monkeypatch, tmp_path, state):
    data = torch_bytes(dict(state))
    path = tmp_path / publish(monkeypatch, data).filename
    path.write_bytes(data)
    W.load(path)
    assert fetch.recorded(path)


def test_published_files_are_known_through_links(monkeypatch, tmp_path, state):
    data = torch_bytes(dict(state))
    entry = publish(monkeypatch, data, name="caffe", convention=W.CAFFE)
    (tmp_path / entry.filename).write_bytes(data)
    (tmp_path / "oxford.pth").symlink_to(entry.filename)
    assert W.load(tmp_path / "oxford.pth").std == W.CAFFE.std


def test_torchvisions_features_are_read_in_their_convention(monkeypatch, tmp_path, state):
    wanted = pytest.importorskip("torchvision.models").VGG16_Weights.IMAGENET1K_FEATURES
    assert W._FEATURES.url == wanted.url
    data = torch_bytes({key: value for key, value in state.items() if key.startswith("features.")})
    digest = hashlib.sha256(data).hexdigest()[:8]
    url = W._FEATURES.url.replace("88682ab5", digest)
    monkeypatch.setattr(W, "_FEATURES", replace(W._FEATURES, url=url))
    (tmp_path / W._FEATURES.filename).write_bytes(data)
    loaded = W.load(tmp_path / W._FEATURES.filename)
    transform = wanted.transforms()
    assert loaded.mean == pytest.approx(transform.mean) and loaded.std == pytest.approx(transform.std)
    assert torch.equal(loaded.state["features.0.weight"], state["features.0.weight"])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_outlive_their_file(tmp_path, state, suffix):
    save = {".pth": torch.save, ".safetensors": save_file}[suffix]
    path = tmp_path / f"w{suffix}"
    save(dict(state), path)
    loaded = W.load(path)
    with path.open("r+b") as file:  # in place, as torch.save does
        file.truncate(0)
    for key, value in loaded.state.items():
        assert torch.equal(value, state[key])
    save(loaded.state, path)
    assert W.load(path).state.keys() == state.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features.0.bias": torch.zeros(4, dtype=torch.long)}, "features.0.bias has torch.int64 values"),
        ({"features.1.running_var": -torch.ones(4)}, "features.1.running_var holds negative variances"),
        ({"features.0.weight": torch.tensor(1.0)}, r"features.0.weight has shape \(\)"),
        ({"features.0.weight": torch.zeros(0, 3, 3, 3)}, r"features.0.weight has shape \(0, 3, 3, 3\)"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_damaged_state_dicts(change, message):
    state = dict(small(batch_norm=True).state_dict()) | change
    with pytest.raises(WeightsError, match=message):
        W.load(state)


def test_a_classifier_without_its_last_layer_serves_the_others(net, state):
    cut = {key: value for key, value in state.items() if not key.startswith("classifier.6")}
    x = images(64)
    whole, part = (VGGFeatures(["fc6", "relu7"], weights=each)(x) for each in (dict(state), cut))
    assert all(torch.equal(whole[name], part[name]) for name in whole)
    for wanted in ("fc8", "fc"):
        with pytest.raises((WeightsError, InputError)):
            VGGFeatures([wanted], weights=cut)
    with pytest.raises(WeightsError, match=r"do not reach fc8: missing classifier\.6"):
        W.load_weights(small(), cut)


@pytest.mark.parametrize(
    ("change", "layer", "message"),
    [
        (
            {"classifier.0.weight": torch.rand(3, 4)},
            "fc6",
            r"classifier.0.weight has shape \(3, 4\), expected \(256, 1568\)",
        ),
        ({"classifier.6.bias": torch.rand(4)}, "fc8", r"classifier.6.bias has shape \(4,\), expected \(5,\)"),
        ({"classifier.3.bias": torch.full((256,), math.nan)}, "fc7", "classifier.3.bias holds NaN"),
    ],
    ids=["fc6", "fc8", "NaN"],
)
def test_classifiers_that_do_not_fit(state, change, layer, message):
    weights = dict(state) | change
    assert VGGFeatures(["conv5_3"], weights=weights).weights == "from a state dict"
    with pytest.raises(WeightsError, match=message):
        VGGFeatures([layer], weights=weights)
    with pytest.raises(WeightsError, match=message):
        W.load_weights(small(), weights)


def test_another_classifier_says_how_it_differs(state):
    weights = {key: value for key, value in state.items() if not key.startswith("classifier.")}
    for index, (rows, columns) in {0: (64, 32), 3: (64, 64), 6: (5, 64)}.items():
        weights |= {
            f"classifier.{index}.weight": torch.rand(rows, columns),
            f"classifier.{index}.bias": torch.rand(rows),
        }
    with pytest.raises(WeightsError, match=r"another classifier: classifier.0.weight has shape \(64, 32\)"):
        VGGFeatures(["fc6"], weights=weights)


@pytest.mark.parametrize(
    "order",
    [("model", "state_dict"), ("state_dict", "model"), ("net", "model"), ("ema", "model_state_dict")],
    ids="-".join,
)
def test_wrapped_twice(net, state, order):
    outer, inner = order
    assert_same(W.load({outer: {inner: dict(state)}, "epoch": 3}), net)
    assert_same(W.load(dict(state) | {outer: {"name": "vgg"}}), net)


@pytest.mark.parametrize(
    "path", ["", "caffe:", "~nobody-of-that-name/w.pth", "a" * 300 + ".pth"], ids=["empty", "caffe", "home", "long"]
)
def test_paths_that_lead_nowhere(monkeypatch, path):
    with pytest.raises(WeightsUnavailableError):
        W.load(path)
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", path)
    with pytest.raises(WeightsUnavailableError, match="is not in"):
        W.find("imagenet")
    if path:
        monkeypatch.setenv("VGGFEAT_WEIGHTS", path)
        with pytest.raises(WeightsUnavailableError, match="VGGFEAT_WEIGHTS is"):
            W.load(W.DEFAULT)


def test_what_auto_follows_is_named_where_it_fails(monkeypatch, tmp_path):
    (tmp_path / "bad.pth").write_bytes(b"no weights")
    monkeypatch.setenv("VGGFEAT_WEIGHTS", str(tmp_path / "bad.pth"))
    for weights in (W.DEFAULT, "auto"):
        with pytest.raises(WeightsError, match=r"\(VGGFEAT_WEIGHTS is '.*bad\.pth'\)"):
            W.load(weights)
    monkeypatch.setenv("VGGFEAT_WEIGHTS", "auto")
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", str(tmp_path))
    for weights in (W.DEFAULT, "auto"):
        assert W.load(weights, "vgg11").name == "random"


def test_an_unchanged_file_is_hashed_once(monkeypatch, state):
    data = torch_bytes(dict(state))
    entry = publish(monkeypatch, data)
    hub().mkdir(parents=True)
    path = hub() / entry.filename
    path.write_bytes(data)
    hashed = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, *rest: hashed.append(file.name) or digest(file, *rest))
    W.load("imagenet")
    W.load(path)
    W.load("imagenet")
    assert hashed == [str(path)]
    os.utime(path, ns=(5, 5))
    W.load("imagenet")
    assert hashed == [str(path)] * 2


def test_a_file_that_changes_within_a_second_is_hashed_again(tmp_path):
    path = tmp_path / "w.bin"
    for nanoseconds, data in enumerate((b"abc", b"xyz")):
        path.write_bytes(data)
        os.utime(path, ns=(nanoseconds, nanoseconds))
        assert W.verify(path, record=False) == hashlib.sha256(data).hexdigest()


def test_files_of_one_name_in_two_folders_are_two(tmp_path, monkeypatch):
    for name, data in (("a", b"abc"), ("b", b"xyz")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w.bin").write_bytes(data)
        os.utime(tmp_path / name / "w.bin", ns=(5, 5))
        monkeypatch.chdir(tmp_path / name)
        assert W.verify(W.Path("w.bin"), record=False) == hashlib.sha256(data).hexdigest()


def test_sets_that_do_not_exist():
    with pytest.raises(WeightsError, match="unknown weight set 'imagnet': did you mean imagenet"):
        W.find("imagnet")
    arrays = {"features.0.weight": torch.ones(8, 3, 3, 3).numpy()}
    with pytest.raises(WeightsError, match="hold values of type ndarray, expected tensors"):
        W.load(arrays)
    with pytest.raises(InputError, match=r"got Linear; give its state_dict\(\)"):
        W.load(torch.nn.Linear(1, 1))
    with pytest.raises(WeightsError, match="bundled weights need no file fetched"):
        W.find("bundled")
    with pytest.raises(WeightsUnavailableError, match="no 'caffe' weights for vgg11: choose from vgg16, vgg19"):
        W.load("caffe", "vgg11")
    with pytest.raises(WeightsUnavailableError, match="no 'imagenet' weights for vgg16 at width 0.5"):
        W.load("imagenet", Arch("D", channels=scaled(32)))


def test_no_network():
    with pytest.raises(WeightsUnavailableError) as caught:
        W.load("imagenet")
    message = str(caught.value)
    for part in ("vgg16-397923af.pth is not in", "refused", "give a path", "VGGFEAT_WEIGHTS_DIR", "weights 'bundled'"):
        assert part in message
    assert not left()
    with pytest.raises(WeightsUnavailableError) as caught:
        W.load("imagenet", "vgg16")  # which the bundled weights are not of
    assert "bundled" not in str(caught.value)
    with pytest.raises(WeightsUnavailableError, match=r"or use the weights 'bundled' \(a slim VGG-19\)"):
        W.load("imagenet", "vgg19")


# ── fetch, from a real server ─────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def serving(data, *, status=200, promise=0, seconds=0):
    """A web server that answers every request with `data`, promising `promise` bytes more than it sends."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            time.sleep(seconds)
            self.send_response(status)
            self.send_header("Content-Length", str(len(data) + promise))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("terminal", [True, False])
def test_fetch(monkeypatch, net, state, capfd, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    data = torch_bytes(dict(state))
    with serving(data) as (url, asked):
        entry = publish(monkeypatch, data, folder=url)
        assert_same(W.load("imagenet"), net)
        assert_same(W.load("imagenet"), net)
    assert asked == [f"/{entry.filename}"]
    assert left() == [entry.filename, entry.filename + ".sha256"]
    assert (hub() / entry.filename).read_bytes() == data
    record = (hub() / f"{entry.filename}.sha256").read_text()
    assert record == f"{hashlib.sha256(data).hexdigest()}  {entry.filename}\n"
    out, err = capfd.readouterr()
    assert (entry.filename in err and "100%" in err) if terminal else not err
    assert not out
    assert_same(W.load("imagenet"), net)  # with the server gone


@pytest.mark.skipif(os.name == "nt", reason="fcntl")
def test_of_several_that_want_a_file_one_fetches_it(monkeypatch, net, state):
    data = torch_bytes(dict(state))
    together = threading.Barrier(3)  # all have looked for it before one fetches it
    monkeypatch.setattr(W, "fetch", lambda *given: (together.wait(), fetch.fetch(*given))[1])
    with serving(data, seconds=0.3) as (url, asked):
        entry = publish(monkeypatch, data, folder=url)
        with (
            pytest.warns(UserWarning, match="waiting for another process that downloads into .*checkpoints"),
            ThreadPoolExecutor(3) as threads,  # which lock one another out as processes do
        ):
            found = [*threads.map(lambda _: W.find("imagenet"), range(3))]
    assert found == [hub() / entry.filename] * 3 and asked == [f"/{entry.filename}"]
    assert_same(W.load("imagenet"), net)


@pytest.mark.skipif(os.name == "nt", reason="fcntl")
def test_a_child_that_outlives_the_block_holds_no_lock(tmp_path):
    from vggfeat.files import locked

    with locked(tmp_path):
        forked = os.fork()
        if not forked:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path), pytest.raises(InputError, match="another process is using"), locked(tmp_path):
            pass
    finally:
        os.kill(forked, 9)
        os.waitpid(forked, 0)


def test_fetch_replaces_an_old_record(monkeypatch, state):
    data = torch_bytes(dict(state))
    with serving(data) as (url, _):
        entry = publish(monkeypatch, data, folder=url)
        hub().mkdir(parents=True)
        (hub() / f"{entry.filename}.sha256").write_text("0" * 64 + "  of a file that was deleted\n")
        W.load("imagenet")
    W.load("imagenet")


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ({"promise": 1000}, WeightsUnavailableError, r"(stopped after \d+ of \d+ bytes|IncompleteRead)"),
        (
            {"digest": "01234567"},
            WeightsUnavailableError,
            "gave a file whose sha256 starts with [0-9a-f]{8}, expected 01234567",
        ),
        ({"status": 404}, WeightsUnavailableError, "answered 404"),
        ({"status": 503}, WeightsUnavailableError, "answered 503"),
    ],
    ids=["truncated", "tampered", "missing", "busy"],
)
def test_bad_downloads_leave_nothing(monkeypatch, state, how, kind, message):
    data = torch_bytes(dict(state))
    digest = how.pop("digest", None)
    with serving(data, **how) as (url, _):
        publish(monkeypatch, data, folder=url, digest=digest)
        with pytest.raises(kind, match=message) as caught:
            W.load("imagenet")
    assert caught.type is kind
    assert not left()


@contextlib.contextmanager
def answering(data):
    """A server that answers one call with these bytes, whatever they are."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            call, _ = server.accept()
            with call:
                call.recv(1 << 16)
                call.sendall(data)

        threading.Thread(target=answer, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nabc"], ids=["ssh", "no number"]
)
def test_a_server_that_speaks_something_else(tmp_path, answer):
    with answering(answer) as url, pytest.raises(WeightsUnavailableError, match=r"download of .* failed \("):
        fetch.fetch(f"{url}/a-1a2b3c4d.pth", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_server_that_does_not_say_how_much_comes(tmp_path):
    with answering(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nabc") as url:
        assert fetch.fetch(f"{url}/a-ba7816bf.pth", tmp_path).read_bytes() == b"abc"


def test_what_is_there_is_verified_before_it_is_taken_for_fetched(tmp_path):
    (tmp_path / "a-1a2b3c4d.pth").write_bytes(b"other")
    with pytest.raises(WeightsError, match="damaged or was changed") as caught:
        fetch.fetch("http://127.0.0.1:9/a-1a2b3c4d.pth", tmp_path)
    assert caught.type is WeightsError


def test_what_a_killed_download_left_is_removed_a_day_later(monkeypatch, state):
    data = torch_bytes(dict(state))
    hub().mkdir(parents=True)
    old, new = hub() / ".vggfeat-0123.tmp", hub() / ".vggfeat-4567.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    with serving(data) as (url, _):
        publish(monkeypatch, data, folder=url)
        W.load("imagenet")
    assert new.exists() and not old.exists()


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome bytes, then none"])
def test_a_server_that_falls_silent(monkeypatch, greeting):
    monkeypatch.setattr("vggfeat.weights.fetch.CONNECT_TIMEOUT", 0.3)
    monkeypatch.setattr("vggfeat.weights.fetch.READ_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        held = []

        def answer():
            with contextlib.suppress(OSError):
                held.append(server.accept()[0])
                held[0].sendall(greeting)

        thread = threading.Thread(target=answer)
        thread.start()
        publish(monkeypatch, b"", folder=f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(WeightsUnavailableError, match=r"download of http://.* failed \(.*timed out"):
            W.load("imagenet")
        thread.join()
        held[0].close()
    assert not left()


def test_both_timeouts_are_used(monkeypatch):
    """A slow call is given up after CONNECT_TIMEOUT, a running download only after READ_TIMEOUT."""
    calls, reads = [], []
    create = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda a, t, *rest: calls.append(t) or create(a, t, *rest))
    monkeypatch.setattr("vggfeat.weights.fetch.READ_TIMEOUT", 7.0)
    answer = http.client.HTTPConnection.getresponse
    monkeypatch.setattr(
        http.client.HTTPConnection, "getresponse", lambda c: reads.append(c.sock.gettimeout()) or answer(c)
    )
    with serving(b"") as (url, _), pytest.raises(WeightsError, match="sha256"):
        W.fetch(f"{url}/vgg16-01234567.pth", hub())
    assert calls == [5.0]
    assert reads == [7.0]


def test_a_folder_that_cannot_be_written(monkeypatch, state):
    data = torch_bytes(dict(state))
    hub().parent.mkdir(parents=True)
    hub().write_text("a file where the folder should be")
    with serving(data) as (url, _):
        publish(monkeypatch, data, folder=url)
        with pytest.raises(WeightsUnavailableError, match=r"failed \(.*checkpoints"):
            W.load("imagenet")
    assert hub().is_file()


def test_https_uses_the_same_handler():
    """Its connections are verified TLS with our two timeouts, not urllib's own."""
    opener = urllib.request.build_opener(fetch._Handler)
    for scheme in ("http", "https"):
        handlers = opener.handle_open[scheme]
        assert [type(handler) for handler in handlers] == [fetch._Handler]
    connection = fetch._patient(http.client.HTTPSConnection)("127.0.0.1", 9, timeout=1)
    assert connection._context.check_hostname
    with pytest.raises(OSError, match="refused"):
        connection.connect()


# ── defaults, auto, random ────────────────────────────────────────────────────────────────────────────────────────────


def test_environment_names_the_default(tmp_path, monkeypatch, state):
    torch.save(dict(state), tmp_path / "mine.pth")
    monkeypatch.setenv("VGGFEAT_WEIGHTS", str(tmp_path / "mine.pth"))
    assert W.load(W.DEFAULT).label == "mine.pth"
    assert VGGFeatures(["conv1_1"]).weights == "mine.pth"
    assert VGGFeatures(["conv1_1"], weights="random").weights == "random"
    with monkeypatch.context() as patched:
        patched.setenv("VGGFEAT_WEIGHTS", "bundeld")
        for default in (W.DEFAULT, "auto"):
            with pytest.raises(
                WeightsUnavailableError, match="VGGFEAT_WEIGHTS is 'bundeld': expected imagenet, .*found none"
            ):
                W.load(default)
    ways = "give a path or set VGGFEAT_WEIGHTS_DIR to a folder that has the file, or use the weights 'bundled'"
    with pytest.raises(WeightsUnavailableError, match=f"imagenet weights for vgg16 are unavailable.*{ways}"):
        W.load("imagenet")  # said outright, it is not the default
    monkeypatch.delenv("VGGFEAT_WEIGHTS")
    with pytest.raises(WeightsUnavailableError, match="imagenet weights for vgg16 are unavailable"):
        W.load(W.DEFAULT)


def test_the_environment_may_name_oxfords_file(tmp_path, monkeypatch, state):
    torch.save(dict(state), tmp_path / "w.pth")
    monkeypatch.setenv("HOME", str(tmp_path))
    for told in ("caffe:~/w.pth", f"caffe:{tmp_path / 'w.pth'}"):
        monkeypatch.setenv("VGGFEAT_WEIGHTS", told)
        for asked in (W.DEFAULT, "auto"):
            assert W.load(asked).std == W.CAFFE.std


def test_paths_may_begin_at_home(tmp_path, monkeypatch, net, state):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file(dict(state), tmp_path / "w.safetensors", {"vggfeat": '{"size": 32}'})
    assert_same(W.load("~/w.safetensors"), net)
    assert W.run_metadata("~/w.safetensors") == {"size": 32}
    data = torch_bytes(dict(state))
    entry = publish(monkeypatch, data)
    (tmp_path / entry.filename).write_bytes(data)
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", "~")
    assert W.find("imagenet") == tmp_path / entry.filename


def test_auto(monkeypatch, net, state):
    loaded = W.load("auto", "vgg11")
    assert loaded.label.startswith("random (imagenet weights for vgg11 are unavailable")
    assert torch.equal(loaded.state["features.3.weight"], W.load("random", "vgg11").state["features.3.weight"])
    label = W.load("auto", Arch("C", channels=scaled(2))).label
    assert label.startswith("random (imagenet weights for vgg16-c are unavailable)")
    for arch in (None, "vgg19"):
        assert W.load("auto", arch).label.startswith("bundled (imagenet weights for vgg1")
    data = torch_bytes(dict(state))
    with serving(data) as (url, _):
        publish(monkeypatch, data, folder=url)
        assert_same(W.load("auto"), net)


def test_channels_are_read_off_a_file(tmp_path):
    """Of every block that the file reaches; what is not there is in proportion to the first."""
    state = W.load("random", Arch("E", head=None, channels=(4, 6, 10, 7, 9))).state
    assert W.load(state).arch == Arch("E", head=None, channels=(4, 6, 10, 7, 9))
    until_pool2 = {key: value for key, value in state.items() if int(key.split(".")[1]) < 10}
    assert W.load(until_pool2, "vgg19").arch.channels == (4, 6, 16, 32, 32)
    assert VGGFeatures(["relu2_2"], weights=until_pool2)(images(32))["relu2_2"].shape[1:] == (6, 16, 16)
    with pytest.raises(WeightsError, match="have channels 4/6/10/7/9, the network width 0.0625"):
        W.load_weights(vgg("E", width=1 / 16), state, head=False)


# ── bundled ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_bundled_weights_are_a_slim_vgg19():
    assert W.BUNDLED.stat().st_size <= 8_000_000
    with safe_open(W.BUNDLED, "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}
    loaded = W.load("bundled")
    assert (loaded.arch.name, loaded.arch.head, loaded.label) == ("vgg19", None, "bundled")
    assert loaded.arch == W.load("bundled", "vgg19").arch and max(loaded.arch.channels) < 256
    loaded.require(["pool5"])
    assert sorted(loaded.state) == sorted(
        f"features.{layer.index}.{part}" for layer in loaded.arch.convs for part in ("weight", "bias")
    )
    with pytest.raises(WeightsError, match="bundled belong to vgg19, not to vgg16"):
        VGGFeatures(["conv1_1"], arch="vgg16", weights="bundled")


def test_bundled_weights_see_pictures(monkeypatch):
    """Every layer answers, none with silence or an explosion, and neighbouring layers differ."""
    monkeypatch.setenv("VGGFEAT_WEIGHTS", "bundled")
    names = [f"relu{block}_1" for block in range(1, 6)]
    taps = VGGFeatures(names)(pink_noise(96, 0) / 6 + 0.5)
    for name, value in taps.items():
        assert 1e-2 < value.square().mean().sqrt() < 1e2, name
        assert 0.05 < (value > 0).float().mean() < 0.95, name
    loss = PerceptualLoss(["relu5_4"])
    assert loss(images(64), images(64).flip(3)) > 0


def pink_noise(side, seed):
    """Pictures whose spectrum falls as 1/f, mean 0 and variance 1, made by Fourier transform."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.fft.fftfreq(side)
    radius = (f[:, None] ** 2 + f[None, :] ** 2).sqrt()
    radius[0, 0] = float("inf")
    x = torch.fft.ifft2(torch.fft.fft2(torch.randn(8, 3, side, side, generator=generator)) / radius).real
    return (x - x.mean()) / x.std()


@pytest.mark.parametrize("name", ["vgg16", "vgg19_bn", "vgg11-lrn"])
def test_random_weights_are_calibrated(name):
    arch = Arch(parse(name).config, parse(name).batch_norm, channels=scaled(16))
    loaded = W.load("random", arch)
    assert loaded.arch == replace(arch, head=None)
    loaded.require([arch.layers[-1].name])
    net = W.load_weights(vgg(name, 3, width=0.25).eval(), "random")
    with torch.no_grad():
        taps = net.taps(pink_noise(96, 7), [layer.name for layer in arch.convs])
    for layer, value in taps.items():
        assert abs(float(value.mean())) < 0.15, layer
        assert 0.7 < float(value.std()) < 1.4, layer
        assert float(value.mean((0, 2, 3)).abs().mean()) < 0.3, layer


def test_random_weights_are_always_the_same():
    first = W.load("random", Arch("D", channels=scaled(4)))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    with torch.device("meta"):  # nor does a default device matter, or anyone's random numbers move
        second = W.load("random", Arch("D", channels=scaled(4)))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.key == second.key
    assert first.key != W.load("random", Arch("D", channels=scaled(8))).key
    assert all(torch.equal(value, second.state[key]) for key, value in first.state.items())


# ── into a network ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_load_weights(net, state):
    other = small(seed=4)
    assert W.load_weights(other, state) is other
    x = images(32)
    assert torch.equal(other(x), net(x))
    assert all(p.requires_grad for p in other.parameters())


def test_load_weights_without_the_head(net, state):
    other = small(seed=4, num_classes=9)
    head = other.classifier[6].weight.detach().clone()
    with pytest.raises(
        WeightsError, match=r"a paper head for 5 classes, the network a paper head for 9; load_weights\("
    ):
        W.load_weights(other, state)
    W.load_weights(other, state, head=False)
    assert torch.equal(other.classifier[6].weight, head)
    assert torch.equal(other.features(images(32)), net.features(images(32)))
    with pytest.raises(WeightsError, match="have no classifier, the network a paper head for 5"):
        W.load_weights(small(), {key: value for key, value in state.items() if key.startswith("features.")})


def test_a_network_has_the_channels_of_its_weights(state):
    arch = Arch("E", head="slim", num_classes=3, channels=(4, 6, 10, 7, 9))
    uneven = VGG(arch).state_dict()
    net = vgg("E", 3, weights=uneven, head="slim")
    assert net.arch == arch and all(torch.equal(value, uneven[key]) for key, value in net.state_dict().items())
    assert vgg("D", 5, weights=state).arch.width == 1 / 16
    found = cam(images(32)[:1], weights=uneven, size=None)
    assert 0 <= found.class_index < 3


def test_random_weights_are_the_same_under_autocast():
    arch = Arch("A", head=None, channels=scaled(4))
    with torch.autocast("cpu", torch.bfloat16):
        found = W.load("random", arch).state
    assert all(torch.equal(value, found[key]) for key, value in W.load("random", arch).state.items())


def test_auto_takes_an_architecture_as_it_takes_its_name(monkeypatch, tmp_path):
    monkeypatch.delenv("VGGFEAT_WEIGHTS", raising=False)
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", str(tmp_path))
    monkeypatch.setattr(W, "find", lambda *_, **__: (_ for _ in ()).throw(WeightsUnavailableError("offline")))
    assert W.load("auto", parse("vgg19")).label == "bundled (imagenet weights for vgg19 are unavailable)"
    assert W.load("auto", parse("vgg11")).label == "random (imagenet weights for vgg11 are unavailable)"
    monkeypatch.setattr(W, "find", lambda *_, **__: (_ for _ in ()).throw(WeightsError("other digits")))
    assert W.load("auto", "vgg19").label == "bundled (imagenet weights for vgg19 are damaged)"
    monkeypatch.setenv("VGGFEAT_WEIGHTS", "random")
    assert W.load("auto", "vgg19").label == "random"


def test_load_weights_that_do_not_fit(state):
    with pytest.raises(WeightsError, match="width 0.0625, the network width 0.125"):
        W.load_weights(small(width=1 / 8), state)
    with pytest.raises(WeightsError, match="belong to vgg16, not to vgg19"):
        W.load_weights(small("E"), state)
    with pytest.raises(WeightsError, match="do not reach pool5: missing features.10.weight"):
        W.load_weights(small(), shallow(state, 7), head=False)
    with pytest.raises(WeightsError, match="missing classifier.3.weight, classifier.3.bias"):
        W.load_weights(small(), {key: value for key, value in state.items() if "classifier.3" not in key})


@pytest.mark.parametrize("source", ["random", "auto"])
@pytest.mark.parametrize("init", ["kaiming", "paper"])
def test_a_new_network_with_random_weights(source, init):
    """All of it is of the set; a head is drawn as `init` says where the set was loaded without one."""
    torch.manual_seed(0)
    net = vgg("A", 5, weights=source, width=1 / 16, init=init, batch_norm=True).eval()
    assert not any(value.is_meta for value in net.state_dict().values())
    assert torch.isfinite(net(images(32))).all()
    again = vgg("A", 5, weights=source, width=1 / 16, init=init, batch_norm=True)
    assert torch.equal(net.classifier[3].weight, again.classifier[3].weight)
    bare = W.load("random", replace(net.arch, head=None))
    drawn = vgg("A", 5, weights=bare, width=1 / 16, init=init, batch_norm=True).classifier[3].weight
    assert drawn.std().item() == pytest.approx({"kaiming": 0.01, "paper": 0.1}[init], rel=0.05)
    assert torch.equal(
        net.features[0].weight, W.load_weights(small("A", 3, batch_norm=True), "random").features[0].weight
    )


def test_a_default_device_does_not_matter(net, state):
    with torch.device("meta"):
        other = vgg("D", 5, weights=state, width=1 / 16)
    assert torch.equal(other.eval()(images(32)), net(images(32)))


@pytest.mark.parametrize("head", ["paper", "slim"])
def test_random_weights_have_a_classifier_of_unit_scale(head):
    nets = [vgg("A", 50, weights="random", head=head, width=1 / 8) for _ in range(2)]
    for key, value in nets[0].state_dict().items():
        assert torch.equal(value, nets[1].state_dict()[key]), key
    noise = torch.zeros(16, 3, 96, 96)
    for side in (3, 6, 12, 24, 48, 96):  # as they were calibrated, by other images
        octave = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(7))
        noise += torch.nn.functional.interpolate(octave, size=96, mode="bilinear", align_corners=False)
    names = [name for name in nets[0].arch.head_names if name.startswith("fc")]
    for name, value in nets[0].eval().taps(noise / noise.std(), names).items():
        assert 0.5 < value.square().mean().sqrt() < 2, name


def test_features_of_a_classifier_of_random_weights():
    wide = VGGFeatures(["fc6", "relu7"], arch=Arch(channels=scaled(8)), weights="random")
    assert [tuple(tap.shape) for tap in wide(images(32)).values()] == [(2, 512)] * 2
    assert W.load("random", "vgg11").arch.head is None  # made where it is asked for
    state = {key: value for key, value in W.load("random", "vgg11").state.items() if key < "features.3"}
    with pytest.raises(
        WeightsError, match=r"do not reach fc8: missing features\.3.*; the deepest layer they serve is pool1"
    ):
        VGGFeatures(["fc8"], weights=state)


def test_a_network_with_weights_is_in_the_default_type():
    torch.set_default_dtype(torch.float64)
    try:
        net = vgg("A", 5, weights="random", head="slim", width=1 / 16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for value in net.parameters()} == {torch.float64}


def test_a_convention_is_folded_in_whatever_the_default_type_is(tmp_path, state):
    torch.save(dict(state), tmp_path / "w.pth")
    nets = [small("D"), small("D")]
    for net, dtype in zip(nets, (torch.float32, torch.bfloat16), strict=True):
        torch.set_default_dtype(dtype)
        try:
            W.load_weights(net, f"caffe:{tmp_path / 'w.pth'}")
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(nets[0].state_dict()[key], nets[1].state_dict()[key]) for key in state)


def test_torchvision_weights_give_torchvision_outputs(tmp_path, torchvision):
    """A file as torchvision publishes it, normalised as it says: the same numbers, to the last bit of the state."""
    torch.manual_seed(0)
    theirs = torchvision.models.vgg11(weights=None, num_classes=2).features.eval()
    state = theirs.state_dict(prefix="features.")
    torch.save(state, tmp_path / "vgg11.pth")
    x = images(48)
    with torch.no_grad():
        expected = theirs((x - MEAN) / STD)
    torch.testing.assert_close(
        VGGFeatures(["pool5"], weights=tmp_path / "vgg11.pth")(x)["pool5"], expected, rtol=1e-4, atol=1e-5
    )


def test_a_network_may_be_saved_over_the_file_it_came_from(tmp_path, state):
    """Whose tensors would else be that very file, mapped into memory."""
    path = tmp_path / "mine.pth"
    torch.save(state, path)
    net = vgg("D", 5, weights=path)
    torch.save(net.state_dict(), path)
    assert_same(W.load(path), net)


def test_state_dicts_that_are_no_weights(state):
    two = {f"student.{key}": value for key, value in state.items()} | {f"teacher.{k}": v for k, v in state.items()}
    with pytest.raises(WeightsError, match=r"hold 2 networks, under 'student\.', 'teacher\.': give"):
        W.load(two)
    with pytest.raises(WeightsError, match=r"features.0.weight has no values"):
        W.load({key: value.to("meta") for key, value in state.items()})
    with pytest.raises(WeightsError, match=r"has torch.int8 values, expected floating-point ones"):
        W.load({key: value.to(torch.int8) for key, value in state.items()})
    with pytest.raises(WeightsError, match="classifier.6.bias holds NaN"):
        vgg("D", 5, weights=state | {"classifier.6.bias": torch.full((5,), torch.nan)})
    with pytest.raises(InputError, match=r"expected a network of vggfeat.vgg, got Linear"):
        W.load_weights(torch.nn.Linear(2, 2), state)


def test_what_is_fetched_goes_to_torch_hubs_cache(tmp_path, monkeypatch, state):
    data = torch_bytes(dict(state))
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", str(tmp_path))
    with serving(data) as (url, _):
        entry = publish(monkeypatch, data, folder=url)
        assert W.find("imagenet") == hub() / entry.filename
    assert not list(tmp_path.iterdir())


def test_training_a_network_leaves_the_weights_it_came_from(state):
    loaded = W.load(dict(state))
    net = vgg("D", 5, weights=loaded)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert loaded.current_key == loaded.key
    assert all(torch.equal(loaded.state[key], value) for key, value in state.items())


def test_weights_loaded_in_inference_mode_have_a_current_key(state):
    with torch.inference_mode():
        loaded = W.load(dict(state))
    assert loaded.current_key == W.load(dict(state)).key


def test_any_change_of_the_state_makes_another_key(state):
    def change(key, value=None):
        loaded = W.load(dict(state))
        if value is not None:
            loaded.state[key] = value
        else:
            loaded.state[key].add_(1)
        assert loaded.current_key == W.load(dict(loaded.state)).key != loaded.key

    change("features.0.weight")
    change("classifier.6.bias")
    change("features.0.weight", torch.nn.Parameter(state["features.0.weight"] + 1))
    change("features.0.bias", torch.zeros(8)[::2])  # not contiguous
    change("classifier.7.bias", torch.zeros(1))
    loaded = W.load(dict(state))
    loaded.state.popitem()
    assert loaded.current_key == W.load(dict(loaded.state)).key != loaded.key


@pytest.mark.parametrize("text", ["notes of mine\n", "1a2b3c4d is what they say\n"], ids=["words", "short"])
def test_a_file_that_is_no_record_stays(tmp_path, text):
    (path := tmp_path / "w.bin").write_bytes(b"abc")
    (note := tmp_path / "w.bin.sha256").write_text(text)
    W.verify(path, "ba7816bf")
    assert note.read_text() == text and not fetch.recorded(path)


@pytest.mark.parametrize(
    "around",
    [
        lambda state: {"ema": {"decay": 0.9, "shadow": []}, "net": state},
        lambda state: {"model": {"name": "vgg"}, "net": state},
        lambda state: {"state_dict": {}, "net": state},
        lambda state: {"state_dict": state, "head.0.weight": torch.zeros(2, 2)},
        lambda state: state | {"step": torch.tensor(3), "classifier.0.weight_mask": torch.ones(2, dtype=torch.bool)},
    ],
    ids=["ema", "config", "empty", "beside", "masks"],
)
def test_what_else_a_checkpoint_holds_is_passed_over(net, state, around):
    loaded = W.load(around(dict(state)))
    assert all(torch.equal(loaded.state[key], value) for key, value in state.items()) and loaded.arch == net.arch


def test_a_checkpoint_of_others_says_nothing_of_how_it_is_tested(tmp_path, state):
    torch.save({"facts": {"size": 32}, "state_dict": dict(state)}, tmp_path / "w.pt")
    assert W.run_metadata(tmp_path / "w.pt") == {}


def test_a_name_with_a_zero_byte():
    said = r"embedded null (byte|character in path)"  # in Python's words, the second from 3.13 on
    with pytest.raises(WeightsUnavailableError, match=rf"^a\0b\.pth cannot be read: (stat: )?{said}$"):
        W.load("a\0b.pth")

"""vggfeat.analysis and its plots, commands and exercises, against VGG_FACTS, torch's own counters and the networks."""

import csv
import errno
import importlib.util
import io
import json
import math
import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from vggfeat_cli import main as vggfeat_command

import vggfeat
from vggfeat import DependencyError, InputError, compare, describe, stacked_3x3
from vggfeat.analysis import ACCURACY, PeakMemory, comparison, effective_field, measure, saved_for_backward
from vggfeat.analysis.measure import Measured, measure_net
from vggfeat.arch import BLOCKS, Arch, scaled
from vggfeat.network import VGG
from vggfeat.trunk import Plan

REPO = Path(__file__).resolve().parents[1]

# VGG_FACTS: parameters plain and with BN, G MACs, receptive field of pool5, share of the fully connected layers
TOTALS = {
    "A": (132_863_336, 132_868_840, 7.609, 150, 93.06),
    "A-LRN": (132_863_336, None, 7.609, 150, 93.06),
    "B": (133_047_848, 133_053_736, 11.308, 156, 92.93),
    "C": (133_638_952, 133_647_400, 11.771, 156, 92.52),
    "D": (138_357_544, 138_365_992, 15.470, 212, 89.36),
    "E": (143_667_240, 143_678_248, 19.632, 268, 86.06),
}
PAPER_MILLIONS = {"A": 133, "A-LRN": 133, "B": 133, "C": 134, "D": 138, "E": 144}
VGG16_FIELDS = {
    "conv1_1": 3, "conv1_2": 5, "pool1": 6,
    "conv2_1": 10, "conv2_2": 14, "pool2": 16,
    "conv3_1": 24, "conv3_2": 32, "conv3_3": 40, "pool3": 44,
    "conv4_1": 60, "conv4_2": 76, "conv4_3": 92, "pool4": 100,
    "conv5_1": 132, "conv5_2": 164, "conv5_3": 196, "pool5": 212,
    "fc6": 404,
}  # fmt: skip
# networks of every kind, and sizes, narrow enough to be run
SMALL = [
    (Arch("A", head="slim", num_classes=3, channels=scaled(4)), (32, 32)),
    (Arch("A-LRN", channels=scaled(4), num_classes=7), (48, 70)),
    (Arch("B", batch_norm=True, channels=scaled(6), num_classes=2), (45, 33)),
    (Arch("C", batch_norm=True, head="slim", channels=scaled(4)), (64, 64)),
    (Arch("D", channels=scaled(4), num_classes=10), (224, 224)),
    (Arch("E", channels=scaled(3), num_classes=10), (100, 160)),
    (Arch("A", channels=scaled(3), num_classes=2), (34, 38)),  # whose bits leave bytes half full
]
small = pytest.mark.parametrize(("arch", "size"), SMALL, ids=[f"{a.config}-{h}x{w}" for a, (h, w) in SMALL])


def on_meta(arch):
    with torch.device("meta"):
        return VGG(arch)


def rows(description):
    return {row.name: row for row in description.layers}


# ── describe: the facts ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("config", BLOCKS)
def test_totals(config):
    plain, bn, macs, field, share = TOTALS[config]
    found = describe(config)
    assert found.params == plain
    assert round(plain / 1e6) == PAPER_MILLIONS[config]
    assert found.macs / 1e9 == pytest.approx(macs, abs=5e-4)
    assert rows(found)["pool5"].receptive_field == field
    assert 100 * found.split["fc"]["params_share"] == pytest.approx(share, abs=5e-3)
    if bn is None:
        with pytest.raises(InputError, match="no batch-normalised form"):
            describe(config + "_bn")
    else:
        assert describe(config + "_bn").params == bn


def test_vgg16_split():
    split = describe("vgg16").split
    assert (split["conv"]["params"], split["fc"]["params"]) == (14_714_688, 123_642_856)
    assert [round(100 * split[kind]["params_share"], 2) for kind in ("conv", "fc")] == [10.64, 89.36]
    assert sum(row.params - row.weights for row in describe("vgg16").layers) == 13_416
    assert describe("vgg16").flops / 1e9 == pytest.approx(30.94, abs=5e-3)
    assert describe("vgg16").training_flops / 1e9 == pytest.approx(92.65, abs=5e-3)


def test_vgg16_activations():
    found = rows(describe("vgg16"))
    for name, mb in (("conv1_1", 12.85), ("pool1", 3.21), ("conv2_1", 6.42)):
        assert found[name].output_bytes / 1e6 == pytest.approx(mb, abs=5e-3)
    assert describe("vgg16").activation_bytes / 1e6 == pytest.approx(60.95, abs=5e-3)
    assert describe("vgg16").activation_bytes / 2**20 == pytest.approx(58.13, abs=5e-3)


@pytest.mark.parametrize(("name", "mb"), [("vgg16", 73.36), ("vgg16_bn", 127.56), ("vgg11", 48.87), ("vgg19", 78.57)])
def test_saved_for_backward(name, mb):
    # with BN 127.56 counts one of the two numbers that each channel's statistics are; there are two: 127.58
    assert describe(name).saved_bytes / 1e6 == pytest.approx(mb, abs=0.02 if "bn" in name else 5e-3)
    assert describe(name).index_bytes / 1e6 == pytest.approx(12.24, abs=5e-3)


def test_totals_count_what_they_name():
    plain, normalized = describe("vgg16"), describe("vgg16_bn")
    assert describe("vgg16", batch=3).index_bytes == 3 * plain.index_bytes
    assert normalized.split["conv"]["macs_share"] == pytest.approx(15.347 / 15.470, abs=1e-3)  # GMACs, of VGG_FACTS
    memory = normalized.memory
    assert memory["inference"] == memory["weights"] + normalized.peak_bytes
    assert memory["weights"] == memory["parameters"] + memory["buffers"] > memory["parameters"]
    assert memory["sgd_fixed"] == memory["weights"] + memory["parameters"]
    assert plain.to_dict()["totals"]["weights_without_biases"] == plain.params - 13_416  # 4224 + 8192 + 1000 biases
    sizes = (224, 448, 256, (448, 224), (224, 448))
    strides = [rows(describe("vgg16", input_size=size))["avgpool"].stride for size in sizes]
    assert strides == [32, 64, None, None, None]


def test_vgg16_memory():
    memory = describe("vgg16").memory
    assert memory["weights"] / 1e6 == pytest.approx(553.43, abs=5e-3)
    assert memory["weights"] / 2**20 == pytest.approx(527.8, abs=0.05)
    for name, gb in (("sgd", 1.107), ("momentum", 1.660), ("adam", 2.214)):
        assert memory[f"{name}_fixed"] / 1e9 == pytest.approx(gb, abs=5e-4)
    many = describe("vgg16", batch=10)
    assert many.memory["adam"] - memory["adam"] == 9 * describe("vgg16").saved_bytes
    assert many.memory["adam_fixed"] == memory["adam_fixed"]


def test_the_tables_have_the_figures_of_their_names():
    """Of a batch of VGG-16-BN, in MB and thousands of millions."""
    found = describe("vgg16_bn", input_size=(64, 288), batch=3)
    layers, split, memory = found.tables()
    pools = [row for row in found.layers if row.kind == "pool"]
    assert layers.title == "vgg16_bn: 1000 classes, one image of 3×64×288, float32"
    assert f"forward {found.macs * 2 / 1e9:,.2f} G FLOPs" in split.title
    assert split.rows[-1] == ("all", found.params, 1.0, found.macs, 1.0)
    expected = {
        "weights": found.memory["weights"],
        "  of which int64 max-pool indices": 3 * 8 * sum(row.output_bytes // 4 for row in pools),
        "frozen trunk saves for backward, 3 images": found.kept_bytes,
        "training with adam, fixed part": found.memory["adam_fixed"],
        "training with adam, 3 images": found.memory["adam_fixed"] + found.saved_bytes,
    }
    told = dict(memory.rows)
    assert {name: told[name] for name in expected} == expected and len({*expected.values()}) == 5
    assert found.to_dict()["input_size"] == [64, 288]


def test_vgg16_receptive_fields():
    found = rows(describe("vgg16"))
    assert {name: found[name].receptive_field for name in VGG16_FIELDS} == VGG16_FIELDS
    assert found["pool5"].stride == 32


@pytest.mark.parametrize("size", [(224, 224), (448, 416), (416, 448), (64, 640)])
def test_receptive_fields_of_the_head(size):
    """Against the gradient of each bin of the adaptive pool over the units of pool5."""
    units = torch.zeros(1, 1, *(side // 32 for side in size), requires_grad=True)
    spans = []
    for pooled in torch.nn.functional.adaptive_avg_pool2d(units, 7).flatten():
        (grad,) = torch.autograd.grad(pooled, units, retain_graph=True)
        spans += [int(places.max() - places.min()) for places in grad[0, 0].nonzero().unbind(1)]
    found = rows(describe("vgg16", input_size=size))
    assert found["avgpool"].receptive_field == 212 + 32 * max(spans)
    assert found["fc6"].receptive_field == 212 + 32 * (max(size) // 32 - 1)


def test_vgg16_for_cifar():
    paper, slim = (describe("vgg16_bn", num_classes=10, input_size=32, head=head) for head in ("paper", "slim"))
    assert (paper.params, slim.params) == (134_309_962, 14_728_266)
    assert [round(paper.split[kind]["macs"] / 1e6, 1) for kind in ("conv", "fc")] == [313.2, 119.6]
    assert rows(paper)["avgpool"].shape == (512, 7, 7) and rows(paper)["pool5"].shape == (512, 1, 1)


# ── describe: the networks ────────────────────────────────────────────────────────────────────────────────────────────


@small
def test_rows_are_those_of_the_network(arch, size):
    net, found = on_meta(arch), describe(arch, input_size=size)
    shapes = {}
    names = dict(zip([layer.name for layer in arch.layers], net.features, strict=True))
    drops = ["drop"] if arch.head == "slim" else ["drop6", "drop7"]
    head = list(arch.head_names)
    for module in net.classifier:
        names[(drops if isinstance(module, torch.nn.Dropout) else head).pop(0)] = module
    names["avgpool"] = net.avgpool
    for name, module in names.items():
        module.register_forward_hook(lambda _, __, out, name=name: shapes.update({name: tuple(out.shape[1:])}))
    net(torch.empty(1, 3, *size, device="meta"))
    assert {row.name: row.shape for row in found.layers[1:]} == shapes
    for row in found.layers[1:]:
        sizes = {name: p.numel() for name, p in names[row.name].named_parameters()}
        assert (row.params, row.weights) == (sum(sizes.values()), sizes.get("weight", 0))
    own = sum(v.numel() * v.element_size() for v in [*net.parameters(), *net.buffers()])
    assert found.memory["weights"] == own


@pytest.mark.parametrize("name", ["A", "A-LRN", "B", "C", "D", "E", "vgg16_bn"])
def test_macs_are_those_torch_counts(name):
    net, found = on_meta(describe(name).arch).eval(), describe(name)
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 224, 224, device="meta"))
    assert counter.get_total_flops() == found.flops == 2 * found.macs
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 224, 224, device="meta")).sum().backward()
    assert counter.get_total_flops() == found.training_flops


@small
def test_saved_is_what_autograd_saves(arch, size):
    """On the meta device and for real, at three images, so that what is per image and per batch cannot be confused."""
    expected = describe(arch, input_size=size, batch=3).saved_bytes
    assert saved_for_backward(on_meta(arch), torch.empty(3, 3, *size, device="meta")) == expected
    assert saved_for_backward(VGG(arch), torch.rand(3, 3, *size)) == expected


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn", "vgg11", "vgg19", "A-LRN"])
def test_saved_at_full_size(name):
    found = describe(name)
    assert saved_for_backward(on_meta(found.arch), torch.empty(1, 3, 224, 224, device="meta")) == found.saved_bytes


def test_in_place_relus_would_save_as_much(torchvision):
    with torch.device("meta"):
        net, image = torchvision.models.vgg16(), torch.empty(1, 3, 224, 224)
    assert any(getattr(module, "inplace", False) for module in net.features)
    assert saved_for_backward(net, image) == describe("vgg16").saved_bytes


@small
def test_kept_is_what_the_trunk_keeps(arch, size):
    for tap in ("pool5", "conv3_1"):
        plan = Plan(replace(arch, head=None), (tap,))
        filters = []
        for layer in (layer for layer in plan.arch.until([tap]) if layer.kind == "conv"):
            shape = (layer.channels, layer.in_channels, layer.kernel, layer.kernel)
            weight = torch.empty(shape, device="meta")
            filters += [weight, torch.empty(layer.channels, device="meta"), weight.transpose(0, 1)]
        image = torch.empty(2, 3, *size, device="meta")
        _, *kept = torch.ops.vggfeat.trunk(image, filters, plan.code, "bits")
        told = describe(arch, input_size=size).layers
        above = told[: [row.name for row in told].index(tap) + (tap == "pool5")]
        expected = image.numel() * 4 + sum(value.numel() * value.element_size() for value in kept)
        assert expected == 2 * sum(row.kept_bytes for row in above)
    assert describe(arch, input_size=size, batch=2).kept_bytes == 2 * sum(row.kept_bytes for row in told)


class Alive(TorchDispatchMode):
    """The most bytes alive at once among tensors that operations made of a network's own."""

    def __init__(self, net):
        super().__init__()
        self.now = self.peak = 0
        self.known = {value.untyped_storage()._cdata for value in [*net.parameters(), *net.buffers()]}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            storage = value.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


@small
def test_peak_of_a_forward(arch, size):
    net, image = on_meta(arch).eval(), torch.empty(2, 3, *size, device="meta")
    with torch.no_grad(), Alive(net) as alive:
        net(image)
    made = alive.peak + image.numel() * 4
    assert describe(arch, input_size=size, batch=2).peak_bytes == pytest.approx(made, rel=1e-3)


def test_without_a_head():
    found = describe("vgg16", head=None)
    assert found.layers[-1].name == "pool5" and found.params == 14_714_688 and "fc" not in found.split
    assert saved_for_backward(on_meta(Arch()).features, torch.empty(1, 3, 224, 224, device="meta")) == found.saved_bytes


# ── describe: as it is shown ──────────────────────────────────────────────────────────────────────────────────────────


def test_formats():
    found = describe("vgg16_bn", batch=2, input_size=(64, 96), num_classes=10)
    data = json.loads(found.to_json())
    assert data == found.to_dict()
    assert data["totals"]["params"] == found.params and data["memory"]["saved_bytes"] == found.saved_bytes
    assert data["input_size"] == [64, 96] and len(data["layers"]) == len(found.layers)
    table = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["name"] for row in table] == [row.name for row in found.layers]
    assert sum(int(row["macs"]) for row in table) == found.macs
    text = str(found)
    assert "conv1_1  64×64×96" in text and "batch norm" in text and "training with adam, 2 images" in text
    lines = text.split("\n\n")[0].splitlines()[1:]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    for block in found.to_markdown().split("**\n\n")[1:]:
        bars = [line.count("|") for line in block.splitlines() if line.startswith("|")]
        assert len(bars) > 2 and len(set(bars)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"arch": "vgg15"}, "did you mean vgg1"),
        ({"arch": "vgg16", "input_size": (31, 40)}, "images of 40×31 are too small for pool5: at least 32 pixels"),
        ({"arch": "vgg16", "batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"arch": "vgg16", "batch": 2.5}, "batch must be a whole number of at least 1, got 2.5"),
        ({"arch": "vgg16", "num_classes": 0}, "num_classes must be a whole number of at least 1"),
        ({"arch": "vgg16", "head": "huge"}, "unknown head 'huge'"),
        ({"arch": "vgg16", "width": 0}, "width must be a positive number"),
    ],
)
def test_describe_says_what_is_wrong(words, message):
    with pytest.raises(InputError, match=message):
        describe(**words)


def test_no_torch_and_no_time():
    code = """
import sys, time
import vggfeat
start = time.perf_counter()
for name in ("A", "A-LRN", "B", "C", "D", "E", "vgg16_bn"):
    str(vggfeat.describe(name))
vggfeat.compare(["vgg11", "vgg16", "vgg19_bn", "resnet50", "efficientnet_b0"]).to_json()
str(vggfeat.stacked_3x3(3))
print(time.perf_counter() - start, "torch" in sys.modules, "matplotlib" in sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    assert loaded == ["False", "False"] and float(seconds) < 1


# ── compare ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_compare_vggs():
    slim = Arch(head="slim", num_classes=10)
    found = compare(["vgg16", "C", slim])
    assert [net.name for net in found.nets] == ["vgg16", "vgg16-c", "vgg16 slim"]
    vgg16 = found.nets[0]
    assert (vgg16.params, vgg16.macs) == (describe("D").params, describe("D").macs)
    assert vgg16.published == {"IMAGENET1K_V1": (71.592, 90.382)}
    assert not found.nets[1].published and not found.nets[2].published and not found.machine
    again = compare(["D", "vgg16", "VGG16", Arch(), "E", "vgg19_bn", "vgg19"])
    assert [net.name for net in again.nets] == ["vgg16", "vgg19", "vgg19_bn"]
    assert not compare(["vgg16"], input_size=32).nets[0].published  # the accuracy is of 224 pixels and 1000 classes
    assert not compare(["vgg16"], num_classes=10).nets[0].published
    assert json.loads(found.to_json())["nets"][0]["flops"] == 2 * vgg16.macs
    assert "71.59" in str(found) and "| vgg16-c |" in found.to_markdown()


def test_every_network_that_was_counted_has_its_year():
    """The chapter's three, one whose family's name begins with another's, and no family that nobody is of."""
    nets = {name: compare([name]).nets[0].year for name in comparison._counted()}
    assert all(isinstance(year, int) for year in nets.values())
    assert [compare([name]).nets[0].year for name in ("vgg16", "A-LRN")] == [2014, 2014]
    assert (nets["resnet50"], nets["efficientnet_b0"], nets["wide_resnet50_2"]) == (2015, 2019, 2016)
    assert all(any(name.startswith(family) for name in (*nets, "vgg16")) for family in comparison.YEARS)
    found = compare(["vgg16", "resnet50"])
    assert "2015" in str(found) and [net["year"] for net in found.to_dict()["nets"]] == [2014, 2015]


def test_published_accuracies(torchvision):
    for name, score in ACCURACY.items():
        weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
        metrics = weights.meta["_metrics"]["ImageNet-1K"]
        assert score == (metrics["acc@1"], metrics["acc@5"])


def test_compare_torchvision(torchvision):
    resnet, efficient, ours = compare(["resnet50", "efficientnet_b0", "vgg11_bn"]).nets
    assert resnet.macs / 1e9 == pytest.approx(4.089, abs=5e-4)
    assert efficient.macs / 1e9 == pytest.approx(0.386, abs=5e-4)
    assert (resnet.params, efficient.params) == (25_557_032, 5_288_548)
    assert {name: top1 for name, (top1, _) in resnet.published.items()} == {
        "IMAGENET1K_V1": 76.130,
        "IMAGENET1K_V2": 80.858,
    }
    assert efficient.published["IMAGENET1K_V1"][0] == 77.692
    (table,) = compare(["resnet50"]).tables()
    shown = dict(zip([column.key for column in table.columns], table.cells()[0], strict=True))
    assert [shown[key] for key in ("top1", "top5", "best_top1")] == ["76.13", "92.86", "80.86"]
    # the same network counted as one of torchvision's, by running it
    name, look, _ = comparison._uncounted("vgg11_bn", 1000, None)
    assert look() == ours and name == "vgg11_bn"


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "alexnet", "densenet121"])
def test_what_was_counted_is_what_is_there(torchvision, name):
    assert comparison._counted()[name] == comparison._uncounted(name, 1000, None)[1]()
    small = compare([name], input_size=64).nets[0]  # counted on the spot, with another size and without an accuracy
    assert 0 < small.macs < compare([name]).nets[0].macs / 4 and not small.published


@pytest.mark.slow
def test_every_network_was_counted(torchvision):
    from tests import counted

    assert {name: comparison._uncounted(name, 1000, None)[1]() for name in counted.names()} == comparison._counted()


@pytest.mark.parametrize("name", ["regnet_y_400mf", "swin_t"])  # widths computed with tensors; attention
def test_compare_agrees_with_what_torchvision_publishes(torchvision, name):
    net = comparison._uncounted(name, 1000, None)[1]()
    meta = next(iter(torchvision.models.get_model_weights(name))).meta
    assert net.params == meta["num_params"]
    assert net.macs / 1e9 == pytest.approx(meta["_ops"], abs=1e-3)


def test_auxiliary_heads_do_not_count(torchvision):
    net = comparison._uncounted("googlenet", 1000, None)[1]()
    meta = torchvision.models.get_model_weights("googlenet")["IMAGENET1K_V1"].meta
    assert net.params == meta["num_params"]
    assert net.macs / 1e9 == pytest.approx(meta["_ops"], abs=1e-3)
    with torch.device("meta"):
        whole = torchvision.models.inception_v3(init_weights=False)
    aside = sum(value.numel() for value in whole.AuxLogits.parameters())  # which this one's published count includes
    found = comparison._uncounted("inception_v3", 1000, None)[1]().params
    assert found == torchvision.models.Inception_V3_Weights.DEFAULT.meta["num_params"] - aside


def test_networks_are_measured_as_asked(monkeypatch):
    asked = []

    def measured(build, *given):
        asked.append((*given[:2], given[3], torch.is_grad_enabled()))
        return Measured(0.25, 8.0, None, 2.0, None)

    monkeypatch.setattr(comparison, "measure_net", measured)
    with torch.no_grad():  # of the caller; training needs gradients
        found = compare(["vgg11"], input_size=64, measure=True, batch=5, device="cpu", seconds=0.125)
    assert asked == [(64, 5, 0.125, True)]
    (table,) = found.tables()
    assert "measured with 5 images (latency: 1) on " in table.title and "250.0" in table.cells()[0]

    def fails(*given):
        raise ValueError("something else")

    monkeypatch.setattr(comparison, "measure_net", fails)
    with pytest.raises(ValueError, match="^something else$"):
        compare(["vgg11"], measure=True, device="cpu")


def test_compare_says_what_is_wrong(torchvision):
    with pytest.raises(InputError, match="nothing to compare"):
        compare([])
    with pytest.raises(InputError, match="did you mean .*resnet50"):
        compare(["vgg16", "resnet55"])
    with pytest.raises(InputError, match="unknown network") as info:
        compare(["nothing like it"])
    offered = str(info.value)
    assert all(f"{name}, " in offered for name in ("vgg11-lrn", "vgg16-c_bn", "vgg19_bn"))
    assert "vgg11-lrn_bn" not in offered  # there is none
    with pytest.raises(InputError, match="batch must be a whole number of at least 1"):
        compare(["vgg16"], batch=0)
    for network in ("vgg16", "resnet18"):
        for size in (0, 224.5, "a"):
            with pytest.raises(InputError, match="input_size must be a whole number"):
                compare([network], input_size=size)
    with pytest.raises(InputError, match="cannot take images of 5×5"):
        compare(["alexnet"], input_size=5)
    with pytest.raises(InputError, match="unknown device 'nonsense': choose auto, cpu, cuda"):
        compare([Arch("A", head="slim", channels=scaled(2))], measure=True, device="nonsense")
    with pytest.raises(InputError, match=r"resnet18 cannot be trained on 1 image of 32×32 .*: raise batch"):
        compare(["resnet18"], input_size=32, measure=True, batch=1, device="cpu", seconds=0)


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    assert compare(["vgg16", "vgg19_bn"]).nets[1].params == 143_678_248
    assert compare(["resnet50"]).nets[0].params == 25_557_032  # counted before
    with pytest.raises(DependencyError, match="'resnet50' is no VGG .* torchvision") as info:
        compare(["vgg16", "resnet50"], num_classes=10)
    assert "\n" not in str(info.value)


def test_measured():
    told = []
    arch = Arch("A", head="slim", num_classes=2, channels=scaled(8))
    found = compare([arch], input_size=32, measure=True, batch=4, device="cpu", seconds=0.01, callback=told.append)
    measured = found.nets[0].measured
    assert told == ["vgg11 slim ×0.125"]
    assert measured.latency > 0 and measured.throughput > 0 and measured.train_throughput > 0
    assert "torch" in found.machine and "latency ms" in str(found)


RESIDENT = os.access("/proc/self/clear_refs", os.W_OK)


def test_what_is_measured(monkeypatch):
    """Images a second of runs that take so long, and memory of at least the weights and their gradients."""
    seconds = iter([0.5, 0.25, 1.0])
    monkeypatch.setattr("vggfeat.analysis.measure._seconds", lambda run, *_: (run(), next(seconds))[1])
    net = compare([Arch("A", head="slim")], input_size=32, measure=True, batch=4, device="cpu").nets[0]
    measured = net.measured
    assert (measured.latency, measured.throughput, measured.train_throughput) == (0.5, 16, 4)
    if RESIDENT:
        assert measured.memory >= 0.9 * 4 * net.params and measured.train_memory >= 0.9 * 2 * 4 * net.params


@pytest.mark.skipif(not RESIDENT, reason="resident memory is read on Linux")
def test_peak_memory():
    gauge = PeakMemory(torch.device("cpu"))
    torch.ones(50_000_000).sum()
    assert gauge.read() == pytest.approx(200e6, rel=0.2)
    gauge.reset()
    assert gauge.read() < 100e6


@pytest.mark.gpu
def test_measured_on_a_gpu():
    """What the architecture says that a forward takes is what it takes there, but for the workspace."""
    net = compare(["vgg16"], measure=True, batch=8, device="cuda", seconds=0.2).nets[0]
    told = describe("vgg16", batch=8).memory
    assert told["inference"] <= net.measured.memory
    assert told["sgd"] * 0.9 <= net.measured.train_memory


# ── the 3×3 argument ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_stacked(n):
    found = stacked_3x3(n)
    stack = torch.nn.Sequential(*(torch.nn.Conv2d(1, 1, 3, bias=False) for _ in range(n))).double()
    single = torch.nn.Conv2d(1, 1, 2 * n + 1, bias=False)
    image = torch.rand(1, 1, 2 * n + 1, 2 * n + 1, dtype=torch.double, requires_grad=True)
    stack(image).sum().backward()
    assert (image.grad != 0).all() and found.receptive_field == 2 * n + 1
    assert found.stacked_params == sum(p.numel() for p in stack.parameters())
    assert found.single_params == single.weight.numel()
    assert found.nonlinearities == n
    assert found.saving == 1 - found.stacked_params / found.single_params


def test_three_against_seven():
    found = stacked_3x3(3)
    assert (found.stacked_params, found.single_params, round(100 * found.saving)) == (27, 49, 45)
    assert len(json.loads(found.to_json())["stacks"]) == 3 and "7×7" in str(found)
    assert stacked_3x3(50).receptive_field == 101
    for n, said in ((0, "a whole number of at least 1, got 0"), (2.5, "a whole number"), (51, "at most 50, got 51")):
        with pytest.raises(InputError, match=f"n must be {said}"):
            stacked_3x3(n)


# ── receptive fields ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def narrow():
    torch.manual_seed(0)
    return vggfeat.vgg16(width=0.25, head="slim", num_classes=2).state_dict()


@pytest.mark.parametrize("layer", ["conv1_1", "relu1_2", "pool1", "conv2_2", "pool2", "conv3_3", "pool3"])
def test_measured_field_is_the_theoretical_one(narrow, layer):
    found = effective_field(layer, weights=narrow, samples=4)
    assert found.theoretical == VGG16_FIELDS[layer.replace("relu", "conv")]
    assert found.support == (found.theoretical,) * 2
    assert found.gradient.shape == (found.theoretical,) * 2 and found.gradient.max() == 1
    assert found.effective == float((found.gradient > math.erfc(2**0.5)).sum()) ** 0.5  # 4.55 %


@pytest.mark.parametrize(("arch", "layer"), [("vgg16", "conv3_3"), ("vgg11", "conv4_2")])
def test_measured_field_of_full_width(arch, layer):
    """Where convolutions by tiles leave traces of rounding around what a unit depends on."""
    found = effective_field(layer, arch, weights="random", samples=4)
    assert found.support == (found.theoretical,) * 2


def test_measured_field_is_the_gradient(narrow):
    """The same by ordinary autograd through the network itself."""
    net = vggfeat.vgg16(width=0.25, head="slim", num_classes=2, weights=narrow)
    found = effective_field("conv2_1", weights=narrow, samples=1, seed=3)
    side = 2 * (2 * math.ceil(10 / 4) + 1)
    generator = torch.Generator().manual_seed(3)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    middle = side // 2 // 2
    expected = torch.zeros(side, side)
    for _ in range(13):  # 128 / 10 times the samples
        image = torch.rand(1, 3, side, side, generator=generator).requires_grad_()
        net.taps((image - mean) / std, ["conv2_1"])["conv2_1"][0, :, middle, middle].sum().backward()
        expected += image.grad[0].abs().mean(0)
    start = (side - 10) // 2
    assert expected.sum() == pytest.approx(float(expected[start : start + 10, start : start + 10].sum()))
    inner = (expected / expected.max())[start : start + 10, start : start + 10]
    torch.testing.assert_close(found.gradient, inner, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_where_they_are_off(narrow, mode):
    wanted = effective_field("conv2_1", weights=narrow, samples=1)
    with mode():
        found = effective_field("conv2_1", weights=narrow, samples=1)
        measured = compare(["vgg11"], num_classes=2, input_size=32, measure=True, batch=2, seconds=0.01)
    assert torch.equal(found.gradient, wanted.gradient)
    assert measured.nets[0].measured.train_throughput > 0


def test_effective_field_says_what_is_wrong(narrow):
    with pytest.raises(InputError, match="unknown layer 'conv9_1'"):
        effective_field("conv9_1", weights=narrow)
    with pytest.raises(InputError, match="samples must be a whole number of at least 1"):
        effective_field("conv1_1", weights=narrow, samples=0)


# ── plots ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}


def plots(narrow):
    content = REPO / "examples" / "content.jpg"
    nets = compare(["vgg11", "vgg16", "vgg19_bn"])
    return {
        "compare": lambda path: vggfeat.plot_comparison(nets, path),
        "parameters": lambda path: vggfeat.plot_parameters([describe("A"), describe("D", head="slim")], path),
        "stacked": lambda path: vggfeat.plot_stacked(stacked_3x3(3), path),
        "fields": lambda path: vggfeat.plot_receptive_fields(
            content, "vgg16", ["conv2_2", "conv1_2", "pool2"], path, weights="random", samples=1
        ),
        "squares": lambda path: vggfeat.plot_receptive_fields(content, "E", ["pool5"], path, samples=0),
    }


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("compare", ".png"), ("compare", ".svg"), ("parameters", ".pdf"), ("stacked", ".png"), ("fields", ".png"),
     ("squares", ".PDF")],
)  # fmt: skip
def test_plots(narrow, tmp_path, name, suffix):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    path = plots(narrow)[name](tmp_path / f"picture{suffix}")
    assert path.read_bytes().startswith(MAGIC[suffix.lower()])
    assert os.listdir(tmp_path) == [path.name]
    assert ("matplotlib.pyplot" in sys.modules) == loaded and dict(matplotlib.rcParams) == before
    with pytest.raises(InputError, match="already exists"):
        plots(narrow)[name](path)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved."""
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr("vggfeat.plots._save", lambda figure, path, overwrite: (figures.append(figure), path)[1])
    return figures


def test_plot_of_parameters(drawn, tmp_path):
    vggfeat.plot_parameters([describe("A"), describe("D", head="slim")], tmp_path / "a.png")
    params, macs = drawn[0].axes
    assert [label.get_text() for label in params.get_yticklabels()] == ["vgg11", "vgg16 slim"]
    assert (params.get_xlabel(), macs.get_xlabel()) == ("million parameters", "GMACs per image")
    assert [text.get_text() for text in params.texts] == ["132.9", "15.2"]
    for axes, expected in (  # of fc6 to fc8, 123,633,664 weights and as many MACs, with 9192 biases
        (params, {"convolutions": [9.220, 14.715], "fully connected": [123.643, 0.513]}),
        (macs, {"convolutions": [7.485, 15.347], "fully connected": [0.124, 0.001]}),
    ):
        widths = {group.get_label(): [bar.get_width() for bar in group] for group in axes.containers}
        assert widths.keys() == expected.keys()
        for what, values in expected.items():
            assert widths[what] == pytest.approx(values, abs=1e-3)
        totals = [float(text.get_text()) for text in axes.texts]
        assert totals == pytest.approx([sum(pair) for pair in zip(*expected.values(), strict=True)], rel=5e-3)
        convs, fcs = axes.containers
        assert [bar.get_x() for bar in fcs] == pytest.approx([bar.get_width() for bar in convs])  # stacked


def test_plot_of_stacked_convolutions(drawn, tmp_path):
    for n in (3, 12):
        vggfeat.plot_stacked(stacked_3x3(n), tmp_path / "a.png")
    section, costs = drawn[0].axes
    assert section.get_title() == "Receptive field of 3 stacked 3×3 convolutions: 7×7"
    assert drawn[1].axes[0].get_title() == "Receptive field of the last 6 of 12 stacked 3×3 convolutions: 13×13"
    single, stacked = costs.lines[:2]
    assert single.get_label().startswith("one ") and stacked.get_label().startswith("n stacked ")
    assert [*single.get_xdata()] == [*stacked.get_xdata()] == [3, 5, 7]
    assert [*single.get_ydata()] == [9, 25, 49] and [*stacked.get_ydata()] == [9, 18, 27]
    assert {text.get_text(): text.xy for text in costs.texts} == {"−28%": (5, 18), "−45%": (7, 27)}
    cells = [patch for patch in section.patches if patch.get_facecolor()[:3] != (1, 1, 1)]
    middles = {(round(patch.get_x() + 0.45), round(patch.get_y() + 0.2)) for patch in cells}
    assert middles == {(x, -depth) for depth in range(4) for x in range(-depth, depth + 1)}  # the output on top
    vggfeat.plot_stacked(stacked_3x3(1), tmp_path / "a.png")
    assert drawn[2].axes[0].get_title() == "Receptive field of 1 stacked 3×3 convolution: 3×3"
    assert [*drawn[2].axes[1].lines[0].get_ydata()] == [9, 25]  # a single point is no curve


def test_plot_of_a_comparison(drawn, tmp_path):
    vggfeat.plot_comparison(compare(["vgg16", "resnet50"]), tmp_path / "a.png")
    (axes,) = drawn[0].axes
    points = {tuple(round(float(v), 3) for v in each.get_offsets()[0]): each for each in axes.collections}
    vgg, old, new = (15.470, 71.592), (4.089, 76.130), (4.089, 80.858)  # the last is a ring
    assert points.keys() == {vgg, old, new} and not len(points[new].get_facecolor())
    assert axes.get_xlabel() == "GMACs per image"


def test_plot_of_receptive_fields(drawn, tmp_path, narrow):
    content = REPO / "examples" / "content.jpg"  # 512×384
    vggfeat.plot_receptive_fields(content, None, ["conv3_3", "pool2"], tmp_path / "a.png", weights=narrow, samples=1)
    picture, *panels = drawn[0].axes[:3]
    fields = [effective_field(name, weights=narrow, samples=1) for name in ("pool2", "conv3_3")]
    sides = [patch.get_width() for patch in picture.patches]
    assert sides == [16, 16, 40, 40, pytest.approx(fields[1].effective)]  # full lines on black, and one dotted
    for patch in picture.patches:
        middle = patch.get_x() + patch.get_width() / 2, patch.get_y() + patch.get_height() / 2
        assert middle == pytest.approx((255.5, 191.5))
    for axes, field in zip(panels, fields, strict=True):
        assert torch.equal(torch.from_numpy(axes.images[0].get_array().data), field.gradient)
        assert axes.get_title() == f"{field.layer}: {field.theoretical} px, {field.effective:.0f} effective"


def test_discs_of_a_comparison_have_the_area_of_the_parameters_and_their_names(drawn, tmp_path):
    names = ["vgg16", "resnet50", "vgg11"]
    nets = [replace(net, measured=SimpleNamespace(latency=0.002 * net.macs / 1e9)) for net in compare(names).nets]
    vggfeat.plot_comparison(replace(compare(names), nets=tuple(nets), machine="Some CPU"), tmp_path / "a.png")
    costs, times = drawn[0].axes
    assert times.get_xlabel() == "forward of one image, ms\nSome CPU"
    for axes, factor in ((costs, 1), (times, 2)):
        for net in nets:
            place = (factor * net.macs / 1e9, next(iter(net.published.values()))[0])
            disc = next(each for each in axes.collections if tuple(each.get_offsets()[0]) == pytest.approx(place))
            assert disc.get_sizes()[0] / axes.collections[0].get_sizes()[0] == pytest.approx(
                net.params / nets[0].params
            )
            assert tuple(disc.get_facecolor()[0, :3]) == pytest.approx(
                (0, 114 / 255, 178 / 255) if "vgg" in net.name else (213 / 255, 94 / 255, 0)
            )
            (label,) = [each for each in axes.texts if each.get_text() == net.name]
            assert label.xy == pytest.approx(place)


def test_a_plot_of_parameters_replaces_another_where_that_is_asked_for(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a.svg").write_text("old")
    with pytest.raises(InputError, match="already exists"):
        vggfeat.plot_parameters([describe("A")], tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text() == "old"
    vggfeat.plot_parameters([describe("A")], tmp_path / "a.svg", overwrite=True)
    assert (tmp_path / "a.svg").read_bytes().startswith(MAGIC[".svg"])


def test_two_descriptions_of_one_network_are_told_apart_by_their_images(drawn, tmp_path):
    vggfeat.plot_parameters([describe("A", input_size=(64, 96)), describe("A"), describe("D")], tmp_path / "a.png")
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert labels == ["vgg11, 96×64", "vgg11, 224×224", "vgg16"]
    low, high = drawn[0].axes[0].get_ylim()
    assert low > high  # the first is on top


def test_a_picture_under_its_fields_is_upright_and_named_by_width_and_height(drawn, tmp_path, narrow):
    content = REPO / "examples" / "content.jpg"  # 512×384
    vggfeat.plot_receptive_fields(content, None, ["conv3_3", "pool2"], tmp_path / "a.png", samples=0)
    (axes,) = drawn[0].axes
    assert axes.get_xlim() == (-0.5, 511.5) and axes.get_ylim() == (383.5, -0.5)
    assert drawn[0].get_suptitle() == "Receptive fields of vgg16 on a 512×384 image"
    texts, handles = ([*each] for each in (drawn[0].legends[0].get_texts(), drawn[0].legends[0].legend_handles))
    assert [text.get_text() for text in texts] == ["pool2: 16 px", "conv3_3: 40 px"]
    assert [each.get_edgecolor() for each in handles] == [axes.patches[i].get_edgecolor() for i in (1, 3)]
    vggfeat.plot_receptive_fields(content, None, None, tmp_path / "a.png", weights=narrow, samples=1)
    picture, *panels = drawn[1].axes
    named = [text.get_text().split(":")[0] for text in drawn[1].subfigs[0].legends[0].get_texts()]
    assert named == [axes.get_title().split(":")[0] for axes in panels if axes.get_title()]
    assert named == ["conv1_2", "conv2_2", "conv3_3", "conv4_3", "pool5"]
    for text, axes in zip(drawn[1].subfigs[0].legends[0].legend_handles, panels, strict=False):
        assert text.get_edgecolor() == axes.patches[0].get_edgecolor()


@pytest.mark.parametrize(("width", "height"), [(20, 16), (1, 2000), (2000, 1)])
def test_fields_over_small_and_narrow_pictures(tmp_path, width, height):
    """pool5 of vgg16 sees 212 pixels: there is room around the picture for its square, in its colour."""
    pytest.importorskip("matplotlib")
    picture = Image.new("RGB", (width, height), "white")
    path = vggfeat.plot_receptive_fields(picture, "vgg16", ["pool5"], tmp_path / "a.png", samples=0)
    with Image.open(path) as drawn:
        pixels = torch.frombuffer(bytearray(drawn.convert("RGB").tobytes()), dtype=torch.uint8)
        square = (pixels.view(drawn.height, drawn.width, 3) == torch.tensor([240, 228, 66])).all(2)
        assert max(drawn.size) < 3000
    tall, wide = int(square.sum(0).max()), int(square.sum(1).max())  # the longest line down and across
    assert wide == pytest.approx(tall, rel=0.05) and tall > 50


def test_plots_say_what_is_wrong(narrow, tmp_path):
    pytest.importorskip("matplotlib")
    content = REPO / "examples" / "content.jpg"
    with pytest.raises(InputError, match="ends in .png, .pdf, .svg"):
        vggfeat.plot_stacked(stacked_3x3(2), tmp_path / "a.jpg")
    with pytest.raises(InputError, match="found none; create it first"):
        vggfeat.plot_stacked(stacked_3x3(2), tmp_path / "no" / "a.png")
    with pytest.raises(InputError, match="two networks with a published accuracy"):
        vggfeat.plot_comparison(compare(["vgg16", "C"]), tmp_path / "a.png")
    with pytest.raises(InputError, match="unknown layer 'conv9'"):
        vggfeat.plot_receptive_fields(content, "vgg16", ["conv9"], tmp_path / "a.png")
    with pytest.raises(vggfeat.ImageError, match="nowhere.jpg"):
        vggfeat.plot_receptive_fields(tmp_path / "nowhere.jpg", "vgg16", ["conv1_1"], tmp_path / "a.png")
    assert not os.listdir(tmp_path)


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DependencyError, match=r"pip install 'vggfeat\[plot\]'"):
        vggfeat.plot_stacked(stacked_3x3(2), tmp_path / "a.png")
    assert not os.listdir(tmp_path)


# ── commands ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Run `vggfeat` in an empty folder: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["vggfeat", *map(str, args)])
        with pytest.raises(SystemExit) as info:
            vggfeat_command.main()
        return info.value.code, *capsys.readouterr()

    return run


def test_describe_command(call, tmp_path):
    assert call("describe", "vgg16") == (0, f"{describe('vgg16')}\n", "")
    words = ("--size", "64x96", "--classes", 10, "--head", "slim", "--width", 0.5, "--batch", 4, "--format", "json")
    status, out, _ = call("describe", "D_bn", *words, "-o", "report.json")
    expected = describe("vgg16_bn", input_size=(64, 96), num_classes=10, head="slim", width=0.5, batch=4)
    assert (status, out) == (0, "report.json\n")
    assert json.loads((tmp_path / "report.json").read_text()) == expected.to_dict()
    status, _, err = call("describe", "D", "-o", "report.json")
    assert status == 2 and "already exists; pass --overwrite" in err
    assert call("describe", "D", "--head", "none", "--format", "csv", "-o", "report.json", "--overwrite")[0] == 0
    assert (tmp_path / "report.json").read_text().startswith("name,shape")
    assert call("describe", "A", "--format", "markdown")[1] == describe("A").to_markdown() + "\n"
    assert call("describe", "A", "--json")[1] == describe("A").to_json() + "\n"
    for suffix, text in (
        (".md", describe("A").to_markdown()),
        (".CSV", describe("A").to_csv()),
        (".json", describe("A").to_json()),
    ):
        name = f"a{suffix}"
        assert call("describe", "A", "-o", name) == (0, f"{name}\n", "")
        assert Path(name).read_text() == text.rstrip("\n") + "\n"
    assert call("describe", "A", "--size", "64×96")[1] == f"{describe('A', input_size=(64, 96))}\n"
    assert sorted(os.listdir(tmp_path)) == ["a.CSV", "a.json", "a.md", "report.json"]


def test_a_report_that_cannot_be_written_is_printed(call, tmp_path, monkeypatch):
    """It may have taken hours to measure."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, out, err = call("stacked", 4, "-o", "report.csv")
    assert (status, out) == (1, stacked_3x3(4).to_csv())
    assert err.startswith("vggfeat: cannot write report.csv: No space left on device")
    assert call("stacked", 4, "-o", "report.csv")[0] == 0
    assert call("stacked", 4, "-o", "report.csv")[:2] == call("describe", "A", "-o", "report.csv")[:2] == (2, "")


def test_compare_and_stacked_commands(call, tmp_path):
    assert call("compare", "vgg11", "E_bn") == (0, f"{compare(['vgg11', 'vgg19_bn'])}\n", "")
    assert call("stacked", 4, "--format", "csv") == (0, stacked_3x3(4).to_csv(), "")
    code, _, err = call("compare", "vgg11", "--size", 0)
    assert code == 2 and "--size must be a whole number of at least 1, got 0" in err
    pytest.importorskip("matplotlib")
    assert call("stacked", 2, "--plot", "stack.svg")[0] == 0
    assert call("compare", "vgg11", "vgg19", "--plot", "cost.png", "-o", "table.txt")[:2] == (0, "table.txt\n")
    content = REPO / "examples" / "content.jpg"
    words = ("--layers", "conv1_1,pool1", "--weights", "random", "--samples", 1)
    assert call("fields", content, "-o", "fields.png", *words)[:2] == (0, "fields.png\n")
    assert sorted(os.listdir(tmp_path)) == ["cost.png", "fields.png", "stack.svg", "table.txt"]


def test_compare_is_told_how(call, monkeypatch):
    words = ("--size", 64, "--classes", 7, "--json")
    assert call("compare", "vgg11", *words)[1] == compare(["vgg11"], input_size=64, num_classes=7).to_json() + "\n"
    told = {}
    monkeypatch.setattr(
        vggfeat, "compare", lambda names, **options: told.update(options, names=names) or stacked_3x3(1)
    )
    assert call("compare", "--measure", "--batch", 3, "--device", "cpu")[0] == 0
    told["callback"]("vgg16")
    assert told.pop("callback") and told == {
        "names": ("vgg16", "resnet50", "efficientnet_b0"),
        "num_classes": 1000, "input_size": None, "measure": True, "batch": 3, "device": "cpu",
    }  # fmt: skip


def test_fields_are_told_how(call, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    told = []
    monkeypatch.setattr(
        "vggfeat.plots.plot_receptive_fields", lambda *args, **options: told.append((args[1:], options)) or args[3]
    )
    content = tmp_path / "content.png"
    Image.new("RGB", (40, 40)).save(content)
    assert (
        call("fields", content, "-o", "a.png", "--arch", "vgg11", "--layers", "conv1_1,pool2", "--samples", 0)[0] == 0
    )
    assert told == [(("vgg11", ("conv1_1", "pool2"), "a.png"), {"samples": 0, "overwrite": False})]
    _, _, err = call("fields", content, "-o", "a.png", "--weights", "bundled", "--overwrite")
    assert err.startswith("weights: bundled") and told[1][1]["weights"].label in err and told[1][1]["overwrite"]
    before = content.read_bytes()
    code, _, err = call("fields", content, "-o", content, "--overwrite")
    assert code == 2 and "one of the files that are read" in err and content.read_bytes() == before


def test_plots_are_replaced_where_that_is_asked_for(call):
    pytest.importorskip("matplotlib")
    content = REPO / "examples" / "content.jpg"
    for words in (
        ("stacked", "--plot", "a.png"),
        ("compare", "vgg11", "vgg13", "--plot", "a.png"),
        ("fields", content, "--layers", "pool1", "--samples", 0, "-o", "a.png"),
    ):
        Path("a.png").write_bytes(b"old")
        code, _, err = call(*words)
        assert code == 2 and "already exists" in err and Path("a.png").read_bytes() == b"old"
        code, out, _ = call(*words, "--overwrite")
        assert code == 0 and Path("a.png").read_bytes().startswith(MAGIC[".png"])
        assert words[0] != "stacked" or out == f"{stacked_3x3(3)}\n"


def test_a_report_whose_name_was_taken_meanwhile_is_printed(call, monkeypatch):
    monkeypatch.setattr(vggfeat, "stacked_3x3", lambda n: (Path("r.csv").write_text("theirs"), stacked_3x3(n))[1])
    code, out, err = call("stacked", 4, "-o", "r.csv")
    assert (code, out) == (2, stacked_3x3(4).to_csv()) and "already exists" in err
    assert Path("r.csv").read_text() == "theirs"


@pytest.mark.parametrize(
    "words",
    [
        ("describe", "vgg17"),
        ("describe", "vgg16", "--size", "big"),
        ("describe", "vgg16", "--size", "8"),
        ("describe", "vgg16", "--head", "huge"),
        ("describe", "vgg16", "-o", "no/where.txt"),
        ("compare", "vgg16", "resnet5000"),
        ("compare", "vgg16", "--batch", "4"),
        ("compare", "vgg16", "--device", "cpu"),
        ("compare", "vgg16", "vgg11", "--plot", "plot.jpg"),
        ("compare", "vgg16", "--plot", "plot.png", "-o", "table.txt"),
        ("compare", "vgg16", "--plot", "plot.png", "--measure"),
        ("describe", "vgg16", "--head", "none", "--classes", "7"),
        ("fields", REPO / "examples" / "content.jpg", "-o", "a.png", "--samples", "0", "--weights", "none.pth"),
        ("stacked", "0"),
        ("stacked", "many"),
        ("fields", "nowhere.jpg", "-o", "a.png"),
    ],
)
def test_bad_input_is_one_line_and_no_file(call, tmp_path, words):
    status, out, err = call(*words)
    assert (status, out) == (2, "") and err.count("\n") == 1 and err.startswith("vggfeat: ")
    assert not os.listdir(tmp_path)


# ── the chapter's exercises ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def exercise(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    return importlib.import_module


def picture(tmp_path):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    return tmp_path / "picture.png"


def test_exercise_1(exercise, tmp_path, capsys):
    exercise("exercise1_architectures").main(picture(tmp_path))
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if line.startswith("C ")]
    assert row.split()[1:] == ["64×2", "128×2", "256×3", "512×3", "512×3", "16", "133,638,952", "92.5%", "28.1/9.4"]
    assert "vgg16 to vgg19: 3 more convolutions, 5.31 M more parameters (3.8%)" in out


def test_exercise_4(exercise, tmp_path, capsys, monkeypatch):
    content = REPO / "examples" / "content.jpg"
    layers = ("conv1_2", "conv2_1")
    plot, draw, told = picture(tmp_path), vggfeat.plot_receptive_fields, {"samples": 2}
    monkeypatch.setattr(
        vggfeat, "plot_receptive_fields", lambda *args, **words: (told.update(words), draw(*args, **words))[1]
    )
    exercise("exercise4_receptive_field").main(content, plot, "random", "vgg19", layers, 3)
    assert "10×10 px" in capsys.readouterr().out
    assert not plot or told["samples"] == 3


def test_exercise_6(exercise, capsys):
    found = exercise("exercise6_checkpointing").main(size=32, batch=4, width=0.125, repeats=2)
    assert found["same"] and found["counted"] == 2
    assert found["checkpointed"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-4)
    assert found["checkpointed"]["kept"] * 5 < found["plain"]["kept"]
    assert "running statistics equal" in capsys.readouterr().out


def test_exercise_7(exercise, tmp_path, capsys):
    exercise("exercise7_slim").main(picture(tmp_path))
    out = capsys.readouterr().out
    assert "134,309,962" in out and "14,728,266" in out


def test_other_classes_are_counted_and_have_no_accuracy(torchvision):
    (ours,) = compare(["squeezenet1_1"], num_classes=10).nets
    assert ours.params == sum(p.numel() for p in torchvision.models.squeezenet1_1(num_classes=10).parameters())
    assert not ours.published


def test_latency_is_that_of_one_image():
    seen = []

    class Net(torch.nn.Linear):
        def forward(self, x):
            seen.append((self.training, len(x)))
            return super().forward(x.mean((2, 3)))

    measure_net(lambda: Net(3, 2), 8, 5, torch.device("cpu"), 0.0)
    assert seen == [(False, 1)] * 4 + [(False, 5)] * 4 + [(True, 5)] * 4


def test_memory_is_that_of_one_kind_of_run_and_each_step_has_gradients_of_its_own(monkeypatch):
    """The peak is forgotten before the batch's forward and before training; a step adds to no other's gradient."""
    done, before = [], []
    gauge = SimpleNamespace(reset=lambda: done.append("reset"), read=lambda: done.append("read"))
    monkeypatch.setattr(measure, "PeakMemory", lambda device: gauge)
    monkeypatch.setattr(measure, "_seconds", lambda run, *_: (done.append("run"), run(), run(), 1.0)[-1])

    class Net(torch.nn.Linear):
        def forward(self, x):
            before.append((self.training, self.weight.grad is None, torch.is_inference_mode_enabled()))
            return super().forward(x.mean((2, 3)))

    measure_net(lambda: Net(3, 2), 8, 5, torch.device("cpu"), 0.0)
    assert done == ["run", "reset", "run", "read", "reset", "run", "read"]
    assert before == [(False, True, True)] * 4 + [(True, True, False)] * 2


def test_measured_field_is_as_high_as_it_is_wide(narrow):
    """Not where only the middle column of each kernel is left: then 5 pixels of one column count."""
    middle = torch.tensor([0.0, 1.0, 0.0])
    upright = {name: value * middle if value.ndim == 4 else value for name, value in narrow.items()}
    assert effective_field("conv1_2", weights=upright, samples=1).support == (5, 1)
    flat = {name: value * middle[:, None] if value.ndim == 4 else value for name, value in narrow.items()}
    assert effective_field("conv1_2", weights=flat, samples=1).support == (1, 5)


@pytest.mark.parametrize(("layer", "images"), [("conv1_1", 2 * 16), ("conv3_3", 6), ("conv5_3", 2)])
def test_a_small_field_is_measured_with_more_images(narrow, monkeypatch, layer, images):
    """128 pixels' worth of each sample, but at most 16 times as many, and no fewer than asked for."""
    run, seen = vggfeat.VGGFeatures.forward, []
    monkeypatch.setattr(vggfeat.VGGFeatures, "forward", lambda self, x: seen.append(len(x)) or run(self, x))
    effective_field(layer, weights=narrow, samples=2)
    assert seen == [1] * images  # 128 / 40 · 2 = 6.4; 128 / 196 · 2 = 1.3


def test_a_field_without_a_gradient_is_an_error(narrow):
    with pytest.raises(InputError, match="no gradient reaches the image from the middle of relu1_1: try more samples"):
        effective_field("relu1_1", weights={name: 0 * value for name, value in narrow.items()}, samples=1)


@pytest.mark.parametrize(("budget", "runs"), [(0.0, 3), (28.0, 3), (29.0, 4), (61.0, 6)])
def test_time_is_the_median_after_a_warm_up(monkeypatch, budget, runs):
    """At least three times, and until they make up the budget."""
    each = [100.0, 5.0, 1.0, 22.0, 3.0, 29.0, 7.0]
    clock = iter([moment for i, took in enumerate(each) for moment in (1000 * i, 1000 * i + took)])
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    done = []
    found = measure._seconds(lambda: done.append(1), torch.device("cpu"), budget)
    assert len(done) == 1 + runs
    assert found == {3: 5, 4: 4, 6: 6}[runs]


def test_the_machine_is_named_with_its_threads(monkeypatch):
    device = torch.device("cpu")
    text = "processor\t: 0\nmodel name\t: Some CPU @ 2.00GHz\nflags\t\t: fpu\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert measure.machine(device) == f"Some CPU @ 2.00GHz, 6 threads, torch {torch.__version__}"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: Path("/nowhere/at/all").open())  # as on other systems
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert measure.machine(device) == f"arm64, 6 threads, torch {torch.__version__}"


def test_memory_is_counted_in_units_of_1024_bytes_from_where_it_began(monkeypatch):
    peaks = iter([1000, 1500])
    status = "VmPeak:\t 90000 kB\nVmHWM:\t {} kB\nVmRSS:\t 7 kB\n"
    monkeypatch.setattr(Path, "write_text", lambda *_: None)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: status.format(next(peaks)))
    monkeypatch.setattr(sys, "platform", "linux")
    assert PeakMemory(torch.device("cpu")).read() == 500 * 1024


def test_memory_that_cannot_be_told_is_none(monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", forbidden)  # as some containers do
    assert PeakMemory(torch.device("cpu")).read() is None
    monkeypatch.undo()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert PeakMemory(torch.device("cpu")).read() is None

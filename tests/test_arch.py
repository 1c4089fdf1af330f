"""vggfeat.arch against the paper's Table 1 and figures worked out by hand (VGG_FACTS)."""

import numpy
import pytest
import torch

from vggfeat.analysis import describe
from vggfeat.arch import ARCHS, BLOCKS, Arch, channels_at, parse, scaled
from vggfeat.errors import InputError
from vggfeat.network import vgg

# the paper's Table 1, typed from the paper: channels of each 3×3 convolution, "1" marks a 1×1 one, M a pool
TABLE = {
    "A": "64 M 128 M 256 256 M 512 512 M 512 512 M",
    "A-LRN": "64 L M 128 M 256 256 M 512 512 M 512 512 M",
    "B": "64 64 M 128 128 M 256 256 M 512 512 M 512 512 M",
    "C": "64 64 M 128 128 M 256 256 256/1 M 512 512 512/1 M 512 512 512/1 M",
    "D": "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    "E": "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
}
# total parameters at 1000 classes: plain, with BN
PARAMS = {
    "A": (132_863_336, 132_868_840),
    "A-LRN": (132_863_336, None),
    "B": (133_047_848, 133_053_736),
    "C": (133_638_952, 133_647_400),
    "D": (138_357_544, 138_365_992),
    "E": (143_667_240, 143_678_248),
}
FINAL_FIELD = {"A": 150, "A-LRN": 150, "B": 156, "C": 156, "D": 212, "E": 268}
VGG16_FIELD = {
    "conv1_1": 3, "conv1_2": 5, "pool1": 6,
    "conv2_1": 10, "conv2_2": 14, "pool2": 16,
    "conv3_1": 24, "conv3_2": 32, "conv3_3": 40, "pool3": 44,
    "conv4_1": 60, "conv4_2": 76, "conv4_3": 92, "pool4": 100,
    "conv5_1": 132, "conv5_2": 164, "conv5_3": 196, "pool5": 212,
}  # fmt: skip


def count(net):
    return sum(p.numel() for p in net.parameters())


def on_meta(*args, **options):
    with torch.device("meta"):
        return vgg(*args, **options)


@pytest.mark.parametrize("config", BLOCKS)
def test_layers_are_those_of_table_1(config):
    told = []
    for layer in Arch(config).layers:
        if layer.kind == "conv":
            told.append(f"{layer.channels}" + "/1" * (layer.kernel == 1))
        elif layer.kind != "relu":
            told.append({"pool": "M", "lrn": "L"}[layer.kind])
    assert " ".join(told) == TABLE[config]


@pytest.mark.parametrize("config", BLOCKS)
def test_batch_norm_and_relu_follow_each_convolution(config):
    kinds = [layer.kind for layer in Arch(config).layers]
    assert all(kinds[i + 1] == "relu" for i, kind in enumerate(kinds) if kind == "conv")
    if config != "A-LRN":
        kinds = [layer.kind for layer in Arch(config, batch_norm=True).layers]
        assert all(kinds[i + 1 : i + 3] == ["bn", "relu"] for i, kind in enumerate(kinds) if kind == "conv")


@pytest.mark.parametrize("bn", [False, True])
def test_vgg16_receptive_fields(bn):
    arch = Arch("D", batch_norm=bn)
    assert {name: arch.layer(name).receptive_field for name in VGG16_FIELD} == VGG16_FIELD
    assert arch.layer("relu4_2").receptive_field == 76  # element-wise layers see no further
    if bn:
        assert arch.layer("bn4_2").receptive_field == 76


@pytest.mark.parametrize(("config", "field"), FINAL_FIELD.items())
def test_final_receptive_field(config, field):
    assert Arch(config).layers[-1].receptive_field == field


@pytest.mark.parametrize("name", ["conv2_2", "pool2", "conv3_3"])
def test_receptive_field_is_what_the_gradient_touches(name):
    """Independent of any formula: the pixels that one output's gradient can reach."""
    arch = Arch("D", channels=scaled(1), head=None)
    x = torch.zeros(1, 1, 96, 96, dtype=torch.float64, requires_grad=True)
    y = x
    for layer in arch.until([name]):
        if layer.kind == "conv":  # all-positive filters let nothing cancel; average pools reach as far as max pools do
            y = torch.nn.functional.conv2d(
                y, torch.ones(1, 1, layer.kernel, layer.kernel, dtype=torch.float64), padding=1
            )
        elif layer.kind == "pool":
            y = torch.nn.functional.avg_pool2d(y, 2)
    y[0, 0, y.shape[2] // 2, y.shape[3] // 2].backward()
    reached = (x.grad[0, 0] != 0).any(0).nonzero()
    assert int(reached.max() - reached.min()) + 1 == arch.layer(name).receptive_field
    assert 96 // y.shape[2] == arch.layer(name).stride


def test_strides_are_in_image_pixels():
    arch = Arch("E")
    for block, stride in enumerate((1, 2, 4, 8, 16), start=1):
        assert arch.layer(f"conv{block}_1").stride == arch.layer(f"relu{block}_2").stride == stride
        assert arch.layer(f"pool{block}").stride == 2 * stride


@pytest.mark.parametrize(("config", "plain", "bn"), [(config, *numbers) for config, numbers in PARAMS.items()])
def test_parameter_counts(config, plain, bn):
    assert count(on_meta(config)) == plain
    if bn is None:
        with pytest.raises(InputError, match="A-LRN has no batch-normalised form"):
            on_meta(config, batch_norm=True)
    else:
        assert count(on_meta(config, batch_norm=True)) == bn


def test_parameter_split_and_heads():
    net = on_meta("D")
    assert count(net.features) == 14_714_688
    assert count(net.classifier) == 123_642_856
    assert count(on_meta("D", 10, batch_norm=True)) == 134_309_962
    assert count(on_meta("D", 10, batch_norm=True, head="slim")) == 14_728_266


@pytest.mark.parametrize(
    ("name", "config", "bn"),
    [
        ("vgg11", "A", False),
        ("vgg11-lrn", "A-LRN", False),
        ("vgg13", "B", False),
        ("vgg16-c", "C", False),
        ("vgg16", "D", False),
        ("vgg19", "E", False),
        ("VGG16", "D", False),
        ("vgg16_bn", "D", True),
        ("VGG19_BN", "E", True),
        ("vgg16-c_bn", "C", True),
        ("A", "A", False),
        ("A-LRN", "A-LRN", False),
        ("a-lrn", "A-LRN", False),
        ("e", "E", False),
        ("D_bn", "D", True),
    ],
)
def test_parse(name, config, bn):
    arch = parse(name)
    assert (arch.config, arch.batch_norm) == (config, bn)
    assert parse(arch.name) == arch
    assert parse(arch) is arch


def test_every_arch_has_a_name():
    assert sorted(ARCHS.values()) == sorted(BLOCKS)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("vgg61", "did you mean .*vgg16"),
        ("vgg-19", "did you mean vgg19"),
        ("resnet50", "choose from vgg11, vgg11-lrn, vgg13, vgg16-c, vgg16, vgg19, A, A-LRN, B, C, D, E"),
        ("A-LRN_bn", "no batch-normalised form"),
        ("", "choose from"),
    ],
)
def test_unknown_arch(name, hint):
    with pytest.raises(InputError, match=hint):
        parse(name)


def test_arch_of_another_type():
    with pytest.raises(InputError, match="a name such as 'vgg16', got int"):
        parse(16)


def test_numpy_s_numbers_are_numbers():
    arch = Arch(num_classes=numpy.int64(7))
    assert type(arch.num_classes) is int and arch == Arch(num_classes=7)
    assert channels_at(numpy.float32(0.25)) == channels_at(0.25)
    sizes = (numpy.int64(64), numpy.array([64, 96]), [64, 96])
    found = [(each.height, each.width) for each in (describe("A", input_size=size) for size in sizes)]
    assert found == [(64, 64), (64, 96), (64, 96)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": "F"}, "unknown VGG configuration 'F'"),
        ({"head": "fat"}, r"choose from paper, slim \(or None for no classifier\)"),
        ({"channels": (0, 2, 4, 8, 8)}, "channels of block 1 must be a whole number of at least 1, got 0"),
        ({"channels": (8, 8, 8, 8, 8.5)}, "channels of block 5 must be a whole number of at least 1, got 8.5"),
        ({"num_classes": 0}, "num_classes must be a whole number of at least 1, got 0"),
    ],
)
def test_impossible_arch(options, message):
    with pytest.raises(InputError, match=message):
        Arch(**options)


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        (Arch("D"), "bn1_1"),
        (Arch("D"), "conv3_4"),
        (Arch("A"), "lrn1_1"),
        (Arch("A"), "conv1_2"),
        (Arch("D", head="slim"), "fc7"),
        (Arch("D"), "fc"),
        (Arch("D", head=None), "fc6"),
    ],
)
def test_layer_that_this_network_lacks(arch, name):
    with pytest.raises(InputError, match=rf"{arch.name} has no layer '{name}'; it has conv1_1, .*pool5"):
        arch.check(["conv1_1", name])


@pytest.mark.parametrize(("name", "near"), [("conv33", "conv3_3"), ("relu_3_1", "relu3_1"), ("Pool5", "pool5")])
def test_unknown_layer_gives_the_nearest(name, near):
    with pytest.raises(InputError, match=f"unknown layer '{name}': did you mean .*{near}"):
        Arch("D").check([name])


def test_unknown_layer_of_another_type():
    with pytest.raises(InputError, match="unknown layer 3"):
        Arch("D").check([3])


def test_layer_refuses_the_head():
    with pytest.raises(InputError, match="fc7 is one of the head's layers"):
        Arch("D").layer("fc7")


def test_names_and_until():
    arch = Arch("A")
    assert arch.names[:6] == ("conv1_1", "relu1_1", "pool1", "conv2_1", "relu2_1", "pool2")
    assert arch.names[-6:] == ("pool5", "fc6", "relu6", "fc7", "relu7", "fc8")
    assert Arch("A", head="slim").names[-2:] == ("pool5", "fc")
    assert [layer.name for layer in arch.until(["relu2_1", "conv1_1"])] == list(arch.names[:5])
    assert arch.until(["relu6"]) == arch.layers
    assert [layer.index for layer in arch.layers] == list(range(len(arch.layers)))


@pytest.mark.parametrize(("width", "unit"), [(1, 64), (0.5, 32), (0.25, 16), (2, 128), (0.1, 6), (0.001, 1)])
def test_width(width, unit):
    assert channels_at(width) == (unit, 2 * unit, 4 * unit, 8 * unit, 8 * unit)
    arch = Arch("D", channels=scaled(unit))
    assert arch.convs[-1].channels == 8 * unit
    assert arch.hidden == 64 * unit
    assert arch.width == unit / 64


def test_channels_of_each_block():
    arch = Arch("E", head=None, channels=(3, 5, 8, 13, 21))
    assert arch.width is None
    assert [arch.layer(f"conv{block}_1").channels for block in range(1, 6)] == [3, 5, 8, 13, 21]
    assert [arch.layer(f"conv{block}_1").in_channels for block in range(1, 6)] == [3, 3, 5, 8, 13]
    assert Arch("E", channels=scaled(16)) == Arch("E", channels=(16, 32, 64, 128, 128))
    for wrong in ((3, 5, 8, 13), [3, 5, 8, 13, 21], 64):
        with pytest.raises(InputError, match="tuple of five counts"):
            Arch("E", channels=wrong)


@pytest.mark.parametrize("width", [0, -1, float("inf"), float("nan")])
def test_impossible_width(width):
    with pytest.raises(InputError, match="width must be a positive number"):
        channels_at(width)

"""The chapter's exercises that train or paint (2, 8, 9) and what they share, on small inputs."""

import importlib
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import vggfeat
from vggfeat.arch import parse

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = {"limit": 1500, "epochs": 4, "batch": 32, "width": 0.125}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def shared(example):
    return example("short_run")


@pytest.fixture
def script(example, monkeypatch, capsys):
    """Runs a file as the command line does: exit status, stdout, stderr."""

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


def picture(tmp_path):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return None
    return str(tmp_path / "picture.png")


def zipped(data, path):
    """The images as `part/<class>/NNNN.png`, class after class."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in data.labels.argsort(stable=True).tolist():
            flat = data.pixels[number].flatten().tolist()
            image = Image.frombytes("RGB", data.pixels.shape[2:0:-1], bytes(flat))
            with archive.open(f"part/{data.labels[number]}/{number:04}.png", "w") as file:
                image.save(file, "PNG")
    return path


def test_zips_or_some_of_them(shared, tmp_path):
    made = shared.gratings(40, 0)
    path = zipped(made, tmp_path / "made.zip")
    order = made.labels.argsort(stable=True)
    for found in shared.read([path, path], 0):
        assert found.classes == list("0123456789")
        assert torch.equal(found.pixels, made.pixels[order]) and torch.equal(found.labels, made.labels[order])
    some, _ = shared.read([path, path], 12)
    assert len(some) == 12 and some.classes == list("0123456789")
    for image, label in zip(some.pixels, some.labels, strict=True):
        (where,) = (made.pixels == image).all((1, 2, 3)).nonzero()
        assert made.labels[where] == label


def test_gratings(shared):
    one, same, other = (shared.gratings(20, seed) for seed in (0, 0, 1))
    assert torch.equal(one.pixels, same.pixels) and not torch.equal(one.pixels, other.pixels)
    assert one.pixels.shape == (20, 32, 32, 3) and one.pixels.dtype == torch.uint8
    assert len(one.classes) == 10 and one.labels.bincount().tolist() == [2] * 10


def test_a_run_is_the_same_again(shared):
    train, test = shared.gratings(64, 0), shared.gratings(32, 1)
    histories = []
    for _ in range(2):
        torch.manual_seed(0)
        net = vggfeat.vgg11(10, batch_norm=True, head="slim", width=0.125)
        histories.append(shared.fit("again", net, train, test, 2, 0.05, 32))
    for one, two in zip(*histories, strict=True):
        assert one.train_loss == pytest.approx(two.train_loss, rel=1e-4)


def test_exercise_2_batch_norm_converges_faster(example, tmp_path, capsys):
    file = picture(tmp_path)
    runs = example("exercise2_batch_norm").main(**SMALL, plot=file)
    plain, bn = runs["plain"], runs["with BN"]
    assert all(b.train_loss < p.train_loss for p, b in zip(plain[1:], bn[1:], strict=True))
    assert bn[-1].test_accuracy > 0.3 > 0.2 > plain[-1].test_accuracy
    out = capsys.readouterr().out
    assert "The plain network is still about at chance, 10%." in out
    if file:
        assert Path(file).stat().st_size > 1000 and file in out


def test_exercise_2_on_zips(example, shared, tmp_path, capsys):
    zips = [str(zipped(shared.gratings(40, seed), tmp_path / f"{seed}.zip")) for seed in (0, 1)]
    example("exercise2_batch_norm").main(*zips, limit=30, epochs=1, batch=10, width=0.125)
    assert "30 images of 10 classes" in capsys.readouterr().out


def test_exercise_2_takes_either_name_of_a_network(example, monkeypatch, capsys):
    module, made, vgg = example("exercise2_batch_norm"), [], vggfeat.vgg
    monkeypatch.setattr(vggfeat, "vgg", lambda *args, **options: made.append(vgg(*args, **options)) or made[-1])
    module.main(arch="vgg13_bn", limit=20, epochs=1, batch=10, width=0.0625)
    assert [net.arch.name for net in made] == ["vgg13", "vgg13_bn"]
    assert capsys.readouterr().out.startswith("vgg13 ×0.0625")


def test_exercise_2_without_a_batch_normalised_form(script):
    code, out, err = script("exercise2_batch_norm", "--arch", "A-LRN")
    assert (code, out, err.count("\n")) == (2, "", 1) and "has no batch-normalised form" in err


def test_exercise_8(example, tmp_path, capsys):
    result = example("exercise8_style_transfer").main(
        picture=str(tmp_path / "p.png"), size=48, steps=5, weights="random"
    )
    out = capsys.readouterr().out
    assert result.history[-1]["total"] < result.history[0]["total"]
    assert "at first step  at last step" in out
    assert f"{result.history[0]['total']:.4f}" in out and f"{result.losses['total']:.4f}" in out
    with Image.open(tmp_path / "p.png") as image:
        assert image.size == (48, 36)


def test_exercise_9(example, torchvision, tmp_path, capsys):
    file = picture(tmp_path)
    module = example("exercise9_vgg_vs_resnet")
    found = module.main(limit=200, epochs=2, batch=20, width=0.125, plot=file)
    out = capsys.readouterr().out
    for params, macs, (history,) in found.values():
        assert f"{params:,} {macs / 1e6:8.1f}" in out and history[-1].train_loss < history[0].train_loss
    assert [*found] == ["VGG-16", "ResNet-14"]
    net = module.resnet((2, 2, 2, 2), 10, 1)
    whole = torchvision.models.resnet18(num_classes=10)
    stem = 64 * 3 * (7 * 7 - 3 * 3)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in whole.parameters()) - stem == 11_173_962
    vgg = vggfeat.describe("vgg16_bn", num_classes=10, input_size=32, head="slim", width=0.125)
    assert found["VGG-16"][:2] == (vgg.params, vgg.macs)


def test_exercise_9_at_several_depths_and_seeds(example, torchvision, capsys):
    module = example("exercise9_vgg_vs_resnet")
    found = module.main(nets=("vgg11", "vgg19"), limit=60, epochs=1, batch=20, width=0.0625, seeds=2)
    assert [*found] == ["VGG-11", "ResNet-10", "VGG-19", "ResNet-18"]
    out = capsys.readouterr().out
    assert "2 seeds" in out and " ± " in out and "still about at chance, 10%" in out
    for arch, blocks in module.RESNETS.items():
        net = module.resnet(blocks, 10, 0.25)
        convs = sum(isinstance(each, torch.nn.Conv2d) and each.kernel_size == (3, 3) for each in net.modules())
        assert abs(convs - len(parse(arch).convs)) <= 1


def test_exercise_9_at_the_narrowest(example, torchvision):
    module = example("exercise9_vgg_vs_resnet")
    assert module.resnet((1, 1, 1, 1), 10, 0.001)[0].out_channels == parse("vgg11").layers[0].channels // 64 == 1


def test_exercise_9_says_that_torchvision_is_broken(script, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    code, out, err = script("exercise9_vgg_vs_resnet")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "torchvision does not work here" in err and "install the torchvision that belongs to your torch" in err


@pytest.mark.parametrize("name", ["exercise2_batch_norm", "exercise9_vgg_vs_resnet"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing.zip", "missing.zip"], "no images at missing.zip"),
        ([EXAMPLES / "content.jpg"] * 2, "no zip, or a damaged one"),
        (["one.zip"], "expected two zips, TRAIN.zip and TEST.zip, or none for made-up images; got 1"),
        (["--epochs", "0"], "at least one epoch"),
        (["--epochs", "some"], "invalid int value"),
        (["--limit", "-1"], "--limit must be at least 0"),
        (["--plot", "nowhere/p.png"], "nowhere"),
    ],
)
def test_bad_input_is_one_line(script, request, name, words, message):
    if "resnet" in name:
        request.getfixturevalue("torchvision")
    code, out, err = script(name, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"{name}.py: ") and message in err


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("exercise4_receptive_field", ["--layers", "conv1_1,conv9_1"], "unknown layer 'conv9_1'"),
        ("exercise4_receptive_field", ["--layers", "conv1_1,fc8"], "vgg19 has no layer 'fc8'"),
        ("exercise4_receptive_field", ["--samples", "0"], "samples must be a whole number of at least 1, got 0"),
        ("exercise6_checkpointing", ["--size", "5"], "size must be a whole number of at least 32, got 5"),
        ("exercise6_checkpointing", ["--batch", "-1"], "batch must be a whole number of at least 1, got -1"),
        ("exercise6_checkpointing", ["--repeats", "0"], "repeats must be a whole number of at least 1, got 0"),
        ("exercise9_vgg_vs_resnet", ["--nets", ","], "no network asked for: name at least one"),
    ],
)
def test_numbers_and_names_are_checked_before_the_table(script, name, words, message):
    code, out, err = script(name, *words)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_help_of_an_exercise(script):
    code, out, err = script("exercise4_receptive_field", "--help")
    assert (code, err) == (0, "") and "default: content.jpg" in out and "default: 4" in out
    assert "None" not in out and str(EXAMPLES) not in out


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
@pytest.mark.parametrize("unbuffered", ["1", ""])  # it notices at the first line, or at the end
def test_a_reader_that_goes_away_hears_of_no_trouble(unbuffered):
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, EXAMPLES / "exercise1_architectures.py"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, env=environment, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_exercise_8_missing_file(script, tmp_path):
    code, out, err = script("exercise8_style_transfer", "--content", "gone.jpg", "--picture", tmp_path / "p.png")
    assert (code, out, err.count("\n")) == (2, "", 1) and "gone.jpg" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.data
def test_exercises_on_cifar10(example, test_data, torchvision):
    zips = [test_data / f"cifar10-{part}.zip" for part in ("train", "test")]
    if missing := [path for path in zips if not path.exists()]:
        pytest.skip(f"no {missing[0]}")
    runs = example("exercise2_batch_norm").main(*zips, limit=5000, epochs=3)
    assert runs["with BN"][-1].test_accuracy > max(0.4, runs["plain"][-1].test_accuracy)
    for _, _, (history,) in example("exercise9_vgg_vs_resnet").main(*zips, limit=2000, epochs=2).values():
        assert history[-1].test_accuracy > 0.25

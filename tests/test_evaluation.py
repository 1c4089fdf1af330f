"""How classifiers are tested: views, sums and what cannot be tested."""

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import time
from dataclasses import replace

import pictures
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vggfeat
from vggfeat.errors import InputError, RunError, WeightsError
from vggfeat.tables import apart, short
from vggfeat.training.batches import split_holdout
from vggfeat.training.config import Views
from vggfeat.training.data import ImageSet, load_images
from vggfeat.training.evaluation import Evaluation, _crops, _held_out, _metrics
from vggfeat.weights import IMAGENET

ONE = {"precision": "float32", "device": "cpu"}


def made(classes=3, head="slim", arch="vgg11", **options):
    torch.manual_seed(0)
    net = vggfeat.vgg(arch, num_classes=classes, head=head, width=options.pop("width", 0.125), **options).eval()
    with torch.no_grad():  # scores that differ between images
        list(net.classifier.children())[-1].weight.mul_(30)
    return net


def images(count=10, height=32, width=32, classes=3):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)
    from PIL import Image

    def read(i):
        return Image.fromarray(pixels[i].numpy())

    return ImageSet(
        "made", list("abcdefgh")[:classes], torch.arange(count) % classes, [str(i) for i in range(count)], read, pixels
    )


def prepared(pixels):
    """The plainest normalisation, (N,3,H,W)."""
    x = pixels.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET.mean, IMAGENET.std))
    return (x - mean) / std


def expected(net, crops, labels):
    """Loss and top-1 of averaged probabilities of the views."""
    with torch.no_grad():
        scores = torch.stack([net(crop).softmax(1) for crop in crops]).mean(0)
    return F.nll_loss(scores.log(), labels).item(), (scores.argmax(1) == labels).float().mean().item()


def check(found, net, crops, data, views):
    loss, top1 = expected(net, crops, data.labels)
    assert found.loss == pytest.approx(loss, rel=1e-4) and found.top1 == pytest.approx(top1)
    assert found.views == views == len(crops) and found.images == len(data)


def test_one_crop():
    net, data = made(), images(height=40, width=44)
    crop = prepared(data.pixels)[:, :, 4:36, 6:38]
    check(vggfeat.evaluate(net, data, Views(size=32), batch_size=3, **ONE), net, [crop], data, 1)


def test_flip():
    net, data = made(), images()
    x = prepared(data.pixels)
    check(vggfeat.evaluate(net, data, Views(flip=True), **ONE), net, [x, x.flip(3)], data, 2)


def test_grid_reaches_the_borders():
    net, data = made(), images(height=40, width=48)
    x = prepared(data.pixels)
    crops = [x[:, :, t : t + 32, s : s + 32] for t in (0, 4, 8) for s in (0, 8, 16)]
    check(vggfeat.evaluate(net, data, Views(size=32, grid=3), **ONE), net, crops, data, 9)
    assert vggfeat.evaluate(net, data, Views(size=32, grid=5, flip=True), **ONE).views == 50  # the paper's


def test_scales():
    net, data = made(), images(height=40, width=60)
    crops = []
    for scale in (32, 48):
        small = [data.read(i).resize((round(60 * scale / 40), scale), 2) for i in range(len(data))]
        x = prepared(
            torch.stack([torch.frombuffer(bytearray(s.tobytes()), dtype=torch.uint8).view(scale, -1, 3) for s in small])
        )
        top, left = (scale - 32) // 2, (x.shape[3] - 32) // 2
        crops.append(x[:, :, top : top + 32, left : left + 32])
    check(vggfeat.evaluate(net, data, Views(size=32, scales=(32, 48)), workers=0, **ONE), net, crops, data, 2)


@pytest.mark.parametrize("head", ["slim", "paper"])
def test_dense_wants_what_five_pools_leave_something_of(head):
    net = vggfeat.vgg11(3, width=0.125, head=head)
    with pytest.raises(InputError, match=r"40×31 are too small: at least 32 pixels"):
        net.dense(torch.zeros(1, 3, 31, 40))


def test_dense_slim_is_the_whole_image():
    net, data = made(), images(height=64, width=96)
    check(vggfeat.evaluate(net, data, Views(dense=True), **ONE), net, [prepared(data.pixels)], data, 1)


def test_dense_is_the_mean_over_windows_of_the_last_pool():
    """With the paper's head: its fully connected layers at every 7×7 window of the last pool, averaged over space."""
    net, data = made(head="paper", width=1 / 32, dropout=0.0), images(count=2, height=288, width=256)
    x = prepared(data.pixels)
    with torch.no_grad():
        last = net.features(x)  # (2,16,9,8)
        windows = [net.classifier(last[:, :, t : t + 7, s : s + 7].flatten(1)) for t in range(3) for s in range(2)]
        scores = torch.stack(windows).mean(0)
        assert net.dense(x).shape == (2, 3, 3, 2)
    torch.testing.assert_close(net.dense(x).mean((2, 3)), scores, rtol=1e-4, atol=1e-5)
    found = vggfeat.evaluate(net, data, Views(dense=True), **ONE)
    assert found.loss == pytest.approx(F.cross_entropy(scores, data.labels).item(), rel=1e-4)
    torch.testing.assert_close(
        net.dense(x[:, :, :224, :224])[:, :, 0, 0], net(x[:, :, :224, :224]), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(InputError, match=r"at least 224×224, as scales \(--scales\) make them"):
        vggfeat.evaluate(net, images(), Views(dense=True), **ONE)
    assert vggfeat.evaluate(net, images(count=2), Views(scales=(224,), dense=True), workers=0, **ONE).images == 2


def test_figures_by_hand():
    labels = torch.tensor([0, 0, 1, 2, 2, 2])
    scores = torch.tensor([
        [0.50, 0.20, 0.05, 0.05, 0.10, 0.10],
        [0.10, 0.60, 0.10, 0.10, 0.05, 0.05],
        [0.20, 0.25, 0.15, 0.15, 0.15, 0.10],
        [0.20, 0.20, 0.01, 0.20, 0.19, 0.20],
        [0.00, 0.10, 0.90, 0.00, 0.00, 0.00],
        [0.50, 0.10, 0.20, 0.10, 0.05, 0.05],
    ])  # fmt: skip
    found = _metrics(labels, scores, list("uvwxyz"), 1, ["x.png"])
    assert found.top1 == pytest.approx(3 / 6) and found.top5 == pytest.approx(5 / 6)
    assert found.confusion[0] == [1, 1, 0, 0, 0, 0] and sum(found.confusion[2]) == 3 and found.confusion[2][2] == 1
    assert found.by_class == [0.5, 1.0, pytest.approx(1 / 3), None, None, None]
    logs = torch.tensor([0.5, 0.1, 0.25, 0.01, 0.9, 0.2]).log()
    assert found.loss == pytest.approx(-logs.mean().item())
    text = str(found)
    assert "50.00 %" in text and "83.33 %" in text and "not readable" in text
    assert json.loads(found.to_json())["confusion"][0][:2] == [1, 1]
    assert found.to_csv().splitlines()[1:3] == ["u,2,0.5,v (1)", "v,1,1.0,"]


def test_top5_needs_more_than_five_classes():
    assert _metrics(torch.tensor([0]), torch.tensor([[0.6, 0.4]]), ["a", "b"], 1, []).top5 is None


def test_a_network_is_left_as_it_was():
    net = made(arch="vgg11_bn").train()
    net.features[1].eval()  # a frozen one
    before = {key: (value.clone(), value.stride()) for key, value in net.state_dict().items()}
    vggfeat.evaluate(net, images(), **ONE)
    assert net.training and net.features[0].training and not net.features[1].training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key][0]) and value.stride() == before[key][1]


def test_bfloat16_is_near():
    net, data = made(), images(count=64)
    exact, rough = (vggfeat.evaluate(net, data, precision=p, device="cpu") for p in ("float32", "bfloat16"))
    assert rough.loss == pytest.approx(exact.loss, rel=0.02)


def test_published_weights_are_normalised_as_they_were_trained(torchvision, tmp_path):
    """A file of torchvision's gives what torchvision's own network and preset give."""
    torch.manual_seed(0)
    eighth = [size if size == "M" else size // 8 for size in torchvision.models.vgg.cfgs["A"]]
    other = torchvision.models.VGG(torchvision.models.vgg.make_layers(eighth, batch_norm=True), init_weights=False)
    other.classifier = nn.Sequential(
        nn.Linear(64 * 49, 512),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Identity(),
        nn.Linear(512, 3),
    )
    other.eval()
    path = tmp_path / "weights.pth"
    torch.save(other.state_dict(), path)
    data = images(count=4, height=64, width=64)
    found = vggfeat.evaluate(path, data, **ONE)
    with torch.no_grad():
        scores = other(prepared(data.pixels))
    assert found.loss == pytest.approx(F.cross_entropy(scores, data.labels).item(), rel=1e-4)


@pytest.fixture
def folder(tmp_path):
    return pictures.folder(tmp_path / "set", pictures.tree(3))


def test_labels_tell_classes_apart():
    assert apart(["cat", "dog"]) == ["cat", "dog"]
    ends = apart(["pneumonia_bacterial_left", "pneumonia_bacterial_right"])
    assert ends == ["…onia_bacterial_left", "…nia_bacterial_right"]
    same = apart(["a" * 30, "a" * 30, "b"])
    assert len(set(same)) == 3 and same[2] == "b" and all(len(each) <= 20 for each in same)


def test_labels_are_cut_where_they_are_too_long():
    assert short("a" * 20) == "a" * 20 and short("a" * 21) == "a" * 19 + "…"
    assert short("two\nlines  of\tit", 60) == "two lines of it"
    same = apart(["a" * 30, "a" * 30], 10)
    assert same == ["0: " + "a" * 5 + "…", "1: " + "a" * 5 + "…"]


def test_reports_are_markdown_in_notebooks_and_text_at_a_prompt():
    report = Evaluation(5, 1.0, 0.6, None, ["cat", "bee"], [[2, 1], [0, 2]], 1)
    assert report._repr_markdown_() == report.to_markdown() and repr(report) == str(report)
    blocks = report.to_markdown().split("\n\n")
    assert blocks[1].splitlines()[1].startswith("| :-- | --: |")  # the classes' names to the left, numbers to the right
    with pytest.raises(ValueError, match="not JSON compliant"):  # which has no NaN
        replace(report, loss=math.nan).to_json()
    assert len(blocks) == 2 * len(report.tables()) and report.to_csv() == report.tables()[0].csv()


def test_class_counts_must_fit(folder):
    with pytest.raises(InputError, match="has 3 classes, the network 4"):
        vggfeat.evaluate(made(4), folder, **ONE)
    for other in ("bee", "cow"):
        shutil.rmtree(folder / other)
    with pytest.raises(InputError, match="has one class, ant, the network 4"):
        vggfeat.evaluate(made(4), folder, **ONE)


def test_class_names_must_fit(folder, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "w.safetensors"
    state = {key: value.contiguous() for key, value in made().state_dict().items()}
    save_file(state, path, {"vggfeat": json.dumps({"classes": ["ant", "cow", "bee"]})})
    with pytest.raises(InputError, match="class 1 is 'bee' in .* and 'cow' in the weights"):
        vggfeat.evaluate(path, folder, **ONE)
    save_file(state, path, {"vggfeat": json.dumps({"classes": ["ant", "bee", "cow"]})})
    assert vggfeat.evaluate(path, folder, **ONE).images == 9


def test_weights_without_a_classifier(folder):
    with pytest.raises(WeightsError, match="no classifier"):
        vggfeat.evaluate("bundled", folder, **ONE)
    with pytest.raises(WeightsError, match="no weights at nowhere.pth"):
        vggfeat.evaluate("nowhere.pth", folder, **ONE)


def test_weights_that_are_not_numbers(folder):
    net = made()
    with torch.no_grad():
        net.classifier[1].bias[0] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        vggfeat.evaluate(net, folder, **ONE)


def test_images_that_are_too_small(folder):
    with pytest.raises(InputError, match="smaller than size 64"):
        vggfeat.evaluate(made(), folder, Views(size=64), **ONE)
    with pytest.raises(InputError, match="are 60×40, smaller than size 41"):  # width and height
        vggfeat.evaluate(made(), images(height=40, width=60), Views(size=41), **ONE)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_of_several_sizes_one_of_them_damaged(tmp_path, workers):
    files = pictures.tree(3, width=40, height=36) | {
        "bee/wide.png": pictures.encoded(pictures.picture("bee", 9, 60, 36))
    }
    good, _ = load_images(pictures.folder(tmp_path / "good", files))
    assert good.pixels is None
    views = Views(size=32, scales=(36,))
    whole = vggfeat.evaluate(made(), good, views, workers=workers, **ONE)
    assert whole.images == 10
    files["cow/1.png"] = files["cow/1.png"][:70]
    bad = pictures.folder(tmp_path / "bad", files)
    before = set(multiprocessing.active_children())
    with pytest.raises((InputError, RunError), match=r"cow/1\.png.*--bad-images skip") as info:
        vggfeat.evaluate(made(), bad, views, workers=workers, **ONE)
    assert set(multiprocessing.active_children()) == before and info  # whose traceback holds what the test held
    found = vggfeat.evaluate(made(), bad, views, workers=workers, bad_images="skip", **ONE)
    assert found.images == 9 and found.skipped == ["cow/1.png"]
    lost = [[b - a for a, b in zip(x, y, strict=True)] for x, y in zip(found.confusion, whole.confusion, strict=True)]
    assert [sum(row) for row in lost] == [0, 0, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"grid": 0}, "grid must be a whole number of at least 1, got 0"),
        ({"size": 8}, "size must be a whole number of at least 32, got 8"),
        ({"scales": ()}, r"at least 32 pixels, got \(\)"),
        ({"scales": (64, 16)}, r"at least 32 pixels, got \(64, 16\)"),
        ({"dense": True, "grid": 2}, "leave grid at 1"),
        ({"dense": True, "size": 224}, r"not at crops of size: scales \(--scales\) resize images"),
    ],
)
def test_views_that_cannot_be(options, said):
    with pytest.raises(InputError, match=said):
        Views(**options)


def test_a_head_that_was_replaced():
    net, data = made(classes=5), images(classes=3)
    net.classifier[-1] = nn.Linear(net.classifier[-1].in_features, 3)
    report = vggfeat.evaluate(net, data, **ONE)
    assert report.loss == pytest.approx(expected(net, [prepared(data.pixels)], data.labels)[0], rel=1e-5)
    with pytest.raises(InputError, match="made has 2 classes, the network 3: test it on the classes"):
        vggfeat.evaluate(net, images(classes=2), **ONE)


def test_a_classifier_of_another_shape_is_not_called_none():
    state = made().state_dict()
    state |= {"classifier.0.weight": torch.rand(7, 64), "classifier.3.weight": torch.rand(3, 7)}
    del state["classifier.1.weight"]
    with pytest.raises(WeightsError, match=r"another shape than VGG's \(classifier.0.weight has \(7, 64\)\): give"):
        vggfeat.evaluate(state, images(), **ONE)


def test_a_class_whose_name_has_two_lines():
    report = Evaluation(2, 1.0, 0.5, None, ["new\nline", "b"], [[1, 0], [1, 0]], 1)
    assert "| new line |" in report.to_markdown() and "\nnew line " in str(report)


def test_classes_with_a_bar_in_a_markdown_table():
    report = Evaluation(5, 1.0, 0.6, None, ["cat|dog", "bee"], [[2, 1], [1, 1]], 1)
    (row,) = [line for line in report.to_markdown().splitlines() if line.startswith("| cat")]
    assert [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] == [r"cat\|dog", "3", "66.67 %", "bee (1)"]


def test_wide_letters_take_two_columns_and_a_plot_without_them_no_warning(tmp_path):
    report = Evaluation(5, 1.0, 0.6, None, ["車", "bee"], [[2, 1], [1, 1]], 1)
    lines = str(report).splitlines()
    assert lines[2].startswith("車    ") and lines[3].startswith("bee    ")  # as wide as "class" and a gap
    pytest.importorskip("matplotlib")
    assert vggfeat.plot_confusion(report, tmp_path / "c.png").stat().st_size > 1000  # warnings are errors in tests


def test_grids_reach_the_borders():
    x = torch.arange(43 * 47.0).view(1, 1, 43, 47)
    crops = [*_crops(x, 32, 4, "")]
    assert len(crops) == 16 and torch.equal(crops[0], x[..., :32, :32]) and torch.equal(crops[-1], x[..., -32:, -32:])
    assert [int(crop[0, 0, 0, 0]) % 47 for crop in crops[:4]] == [0, 5, 10, 15]


def test_metrics_at_their_limits():
    found = _metrics(torch.tensor([1]), torch.tensor([[1.0, 0.0]]), ["a", "b"], 1, [])
    assert 80 < found.loss < 100  # of the smallest number there is, not of 0
    for classes, top5 in ((5, None), (6, 1.0)):
        scores = torch.full((1, classes), 1 / classes)
        assert _metrics(torch.tensor([0]), scores, [*map(str, range(classes))], 1, []).top5 == top5


def test_confusions_are_shares_of_the_true_class(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("vggfeat.plots._save", lambda figure, path, overwrite: drawn.append(figure))
    report = Evaluation(14, 1.0, 11 / 14, None, ["ant", "bee"], [[8, 2], [1, 3]], 1)
    vggfeat.plot_confusion(report, tmp_path / "c.png")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().tolist() == [[80, 20], [25, 75]]
    written = {text.get_position(): round(float(text.get_text())) for text in axes.texts}
    assert written == {(0, 0): 80, (1, 0): 20, (0, 1): 25, (1, 1): 75}
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [each.get_text() for each in labels] == ["ant", "bee"]
    assert axes.get_title() == "14 images, top-1 78.57 %"
    colors = {text.get_position(): text.get_color() for text in axes.texts}
    assert colors == {(0, 0): "white", (1, 0): "black", (0, 1): "black", (1, 1): "white"}  # on blue, and on pale


def test_classes_without_images_are_grey_and_those_of_a_long_list_numbers(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr("vggfeat.plots._save", lambda figure, path, overwrite: drawn.append(figure))
    vggfeat.plot_confusion(Evaluation(2, 1.0, 0.5, None, ["a", "b"], [[1, 1], [0, 0]], 1), tmp_path / "c.png")
    axes = drawn[0].axes[0]
    assert axes.images[0].get_array().mask.tolist() == [[False, False], [True, True]] and len(axes.texts) == 2
    assert axes.get_title() == "2 images, top-1 50.00 %; grey: 1 row without images"
    for n in (60, 61):
        diagonal = [[int(i == j) for j in range(n)] for i in range(n)]
        names = [f"class {i}" for i in range(n)]
        vggfeat.plot_confusion(Evaluation(n, 1.0, 1.0, 1.0, names, diagonal, 1), tmp_path / "c.png")
        axes = drawn[-1].axes[0]
        assert ([each.get_text() for each in axes.get_yticklabels()] == names) == (n == 60) and not axes.texts
        assert axes.get_ylabel() == ("true class" if n == 60 else "true class, in the order of the report, from 0")


def test_a_picture_of_confusions(tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    for n in (3, 40):
        confusion = torch.randint(0, 9, (n, n), generator=torch.Generator().manual_seed(0)).tolist()
        report = Evaluation(n, 1.0, 0.5, None, [f"class {i}" for i in range(n)], confusion, 1)
        path = vggfeat.plot_confusion(report, tmp_path / f"{n}.png")
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("RGB").getcolors(100000)) > 50
    path.write_bytes(b"old")
    with pytest.raises(InputError, match="already exists"):
        vggfeat.plot_confusion(report, path)
    assert path.read_bytes() == b"old"
    vggfeat.plot_confusion(report, path, overwrite=True)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Views(scales=256), r"scales must be a tuple, got 256: write \(256,\)"),
        (lambda: Views(scales="256, 384"), r"scales must be a tuple, got '256, 384': write \('256', '384'\)"),
        (lambda: Views(scales={256: 1}), r"scales must be a tuple, got {256: 1}: write the values alone, in order"),
        (lambda: Views(grid=2.5), "grid must be a whole number"),
        (lambda: Views(size="32"), "size must be a whole number"),
        (lambda: vggfeat.evaluate(made(), images(), {"flip": True}), "views must be a Views"),
        (lambda: vggfeat.evaluate(made(), images(), workers=-1), "workers must be a whole number of at least 0"),
        (lambda: vggfeat.evaluate(made(), images(), precision="float16"), "unknown precision 'float16'"),
        (lambda: vggfeat.evaluate(made(), images(), bad_images="ignore"), "unknown bad_images 'ignore'"),
        (lambda: vggfeat.evaluate(made(), images(), batch_size=0), "batch_size must be a whole number of at least 1"),
        (lambda: vggfeat.evaluate(made(), images(height=16, width=16)), "at 16 pixels are smaller than 32"),
        (lambda: vggfeat.evaluate(made(), 3), "data is a path, or an ImageSet"),
        (lambda: vggfeat.train(images(), config="fast"), r'config must be a TrainConfig, such as recipe\("fast"\)'),
        (lambda: vggfeat.train(None), "data is a path, or an ImageSet"),
    ],
)
def test_what_python_may_hand_over(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.skipif(os.name == "nt", reason="no such signal there")
def test_a_process_that_is_killed_is_an_error_that_says_so(tmp_path):
    data, _ = load_images(pictures.folder(tmp_path / "set", pictures.tree(3, width=40, height=36)))
    net, before = made(), set(multiprocessing.active_children())

    def kill(*_):
        (process,) = set(multiprocessing.active_children()) - before
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(5)  # torch raises before

    net.features[0].register_forward_hook(kill)
    with pytest.raises(RunError, match="a process that reads images was ended.*set workers lower"):
        vggfeat.evaluate(net, data, Views(size=32, scales=(34,)), workers=1, batch_size=2, **ONE)


def test_images_behind_a_damaged_one_keep_their_classes(tmp_path):
    files = pictures.tree(3, width=40, height=36) | {
        "bee/wide.png": pictures.encoded(pictures.picture("bee", 9, 60, 36))
    }
    files["ant/1.png"] = files["ant/1.png"][:70]
    bad, views = pictures.folder(tmp_path / "bad", files), Views(size=32, scales=(36,))
    found = vggfeat.evaluate(made(), bad, views, bad_images="skip", workers=0, **ONE)
    assert [sum(row) for row in found.confusion] == [2, 4, 3] and found.skipped == ["ant/1.png"]


def test_a_damaged_image_of_a_set_that_fits_into_memory(folder):
    (folder / "ant" / "1.png").write_bytes((folder / "ant" / "1.png").read_bytes()[:70])
    found = vggfeat.evaluate(made(), folder, bad_images="skip", **ONE)
    assert found.images == 8 and found.skipped == ["ant/1.png"]


def test_no_image_can_be_read(tmp_path):
    files = pictures.tree(1, width=40, height=36) | {"bee/w.png": pictures.encoded(pictures.picture("bee", 9, 60, 36))}
    data, _ = load_images(pictures.folder(tmp_path / "set", files))
    pictures.folder(tmp_path / "set", dict.fromkeys(files, b"gone"))
    with pytest.raises(RunError, match="no image of .* could be read"):
        vggfeat.evaluate(made(), data, Views(size=32, scales=(36,)), bad_images="skip", workers=0, **ONE)


def test_files_of_other_sizes_are_told_where_sizes_are_known(folder):
    data, _ = load_images(folder)
    rest = split_holdout(data, 0.5, 0)[1]
    for sizes, said in ((rest.sizes, ""), (None, ""), ("other", ", by the names of its files, whose sizes differ")):
        found = _held_out(data, 0.5, 0, rest.digest, "elsewhere", sizes)
        assert found.names == rest.names and found.label == f"{folder}, what was held out{said}"


def test_crops_begin_at_the_nearest_pixel():
    places = torch.arange(35.0).expand(35, 35)
    image = torch.stack([places.T, places, places])[None]
    for grid, starts in ((1, [1]), (2, [0, 3]), (3, [0, 2, 3])):
        found = [tuple(crop[0, :2, 0, 0].tolist()) for crop in _crops(image, 32, grid, "ramp")]
        assert found == [(top, left) for top in starts for left in starts]

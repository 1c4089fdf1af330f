"""The commands, as a person at a terminal meets them: exit status, what is on which stream, which files remain.

Most tests call `main()` in this process, because each new one would import torch; what a process alone can show (a real
Ctrl-C, what `--help` imports) starts one.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import click
import pictures
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from vggfeat_cli import learn, main as vggfeat_command, run, style as vggstyle_command
from vggfeat_cli.reports import finish_report

import vggfeat
from vggfeat import StyleConfig, weights
from vggfeat.image import FORMATS, open_image, read_settings, save_image, to_pil
from vggfeat.tables import Report
from vggfeat.training.evaluation import Evaluation
from vggfeat.training.folder import Epoch
from vggfeat.training.loop import TrainResult, TrainStep
from vggfeat.transfer import stylize as stylize_module
from vggfeat.transfer.objective import Objective

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A file with a VGG-19 an eighth as wide."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(vggfeat.vgg19(width=0.125, head="slim").state_dict(), path)
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with content.jpg and style.png in it."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "here"
    folder.mkdir()
    for name, width in (("content.jpg", 64), ("style.png", 48)):
        picture = to_pil(torch.rand(1, 3, 6, 8, generator=generator)).resize((width, 48), Image.Resampling.BICUBIC)
        picture.save(folder / name)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command's `main()`: (exit status, stdout, stderr)."""

    def run(module, *args):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, args)])
        with pytest.raises(SystemExit) as info:
            module.main()
        return info.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def quick(tiny):
    """Flags of a run that takes a fraction of a second."""
    flags = {"weights": tiny, "size": 40, "start-size": 40, "steps": 4, "device": "cpu", "precision": "float32"}
    flags |= {"style-layers": "relu1_1,relu2_1", "content-layers": "relu2_2"}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def vggstyle(call, quick):
    """`vggstyle` with the quick flags before the given words."""
    return lambda *args: call(vggstyle_command, *quick, *args)


def one_line(err, name="vggstyle"):
    assert err.startswith(f"{name}: ") and err.endswith("\n") and err.count("\n") == 1 and "\r" not in err, repr(err)
    return err


# ── vggstyle: what it writes ──────────────────────────────────────────────────────────────────────────────────────────


def test_names_the_output_after_its_inputs_and_never_overwrites(vggstyle, folder):
    for expected in ("content-style.png", "content-style-2.png", "content-style-3.png"):
        code, out, err = vggstyle("content.jpg", "style.png")
        assert (code, out) == (0, f"{expected}\n")
        assert "tiny.safetensors" in err and "40×30, 4 steps" in err and "vgg19 in float32" in err
        with Image.open(folder / expected) as picture:
            assert (picture.size, picture.mode) == ((40, 30), "RGB")
    before = (folder / "content-style.png").stat().st_mtime_ns
    assert vggstyle("content.jpg", "style.png", "--overwrite")[:2] == (0, "content-style.png\n")
    assert (folder / "content-style.png").stat().st_mtime_ns > before
    assert len(list(folder.iterdir())) == 5


def test_names_the_output_after_all_styles_in_the_working_folder(vggstyle, folder):
    (folder / "in").mkdir()
    os.rename("style.png", "in/a b.ü.png")
    assert vggstyle("content.jpg", "in/a b.ü.png", "content.jpg", "--style-blend", "2,1")[:2] == (
        0,
        "content-a b.ü-content.png\n",
    )
    assert (folder / "content-a b.ü-content.png").is_file()


def test_an_existing_output_is_safe(vggstyle, folder):
    Path("out.png").write_bytes(b"precious")
    code, out, err = vggstyle("content.jpg", "style.png", "-o", "out.png")
    assert (code, out) == (2, "") and "--overwrite" in one_line(err)
    assert Path("out.png").read_bytes() == b"precious"
    assert vggstyle("content.jpg", "style.png", "-o", "out.png", "--overwrite")[:2] == (0, "out.png\n")
    with Image.open("out.png") as picture:
        assert picture.size == (40, 30)


@pytest.mark.parametrize("suffix", FORMATS)
def test_settings_travel_in_every_format(vggstyle, folder, suffix):
    with Image.open("style.png") as picture:
        picture.convert("RGB").save(f"painting{suffix}")
    code, out, _ = vggstyle("content.jpg", f"painting{suffix}", "--seed", "7", "-o", f"out{suffix}")
    assert (code, out) == (0, f"out{suffix}\n")
    settings = read_settings(f"out{suffix}")
    assert settings["config"]["seed"] == 7 and settings["config"]["style_layers"] == ["relu1_1", "relu2_1"]
    assert settings["losses"].keys() == {"total", "style", "content", "tv"} and settings["steps"] == 4
    StyleConfig(**settings["config"])


def test_json_is_all_there_is_on_stdout(vggstyle, folder, tiny):
    code, out, err = vggstyle("content.jpg", "style.png", "--json", "--tv-weight", "0.5", "--quiet")
    summary = json.loads(out)
    assert code == 0 and "content-style.png" not in err
    assert (summary["output"], summary["content"], summary["style"]) == (
        "content-style.png",
        "content.jpg",
        ["style.png"],
    )
    assert (summary["width"], summary["height"], summary["interrupted"], summary["arch"]) == (40, 30, False, "vgg19")
    assert summary["config"].keys() == {field.name for field in dataclasses.fields(StyleConfig)}
    assert (summary["config"]["tv_weight"], summary["config"]["weights"]) == (0.5, tiny)
    losses = summary["losses"]
    assert losses["total"] == pytest.approx(losses["style"] + losses["content"] + losses["tv"])
    assert losses.items() <= (read_settings("content-style.png") or {})["losses"].items()


def test_pictures_on_the_way(vggstyle, folder):
    words = ("content.jpg", "style.png", "--start-size", "20", "--save-every", "2", "-o", "out.jpg")
    assert vggstyle(*words)[:2] == (0, "out.jpg\n")
    sizes = {"out-1-0002.jpg": (20, 15), "out-2-0002.jpg": (40, 30), "out-2-0004.jpg": (40, 30)}
    assert {path.name for path in folder.glob("out*")} == {"out.jpg", *sizes}
    pictures = {}
    for name, size in sizes.items():
        with Image.open(name) as picture:
            assert picture.size == size
            pictures[name] = picture.tobytes()
    assert pictures["out-2-0002.jpg"] != pictures["out-2-0004.jpg"]
    assert vggstyle(*words, "--overwrite")[0] == 0 and len(list(folder.glob("out*"))) == 4
    os.remove("out.jpg")
    assert vggstyle(*words)[0] == 0 and Path("out-1-0002-2.jpg").is_file()  # nothing is replaced
    assert "--save-every" in one_line(vggstyle(*PAIR, "--save-every", "0")[2])


def test_pictures_on_the_way_replace_nothing_that_is_read(vggstyle, folder):
    os.rename("content.jpg", "out-1-0002.jpg")
    before = Path("out-1-0002.jpg").read_bytes()
    words = ("out-1-0002.jpg", "style.png", "--save-every", "2", "-o", "out.jpg", "--overwrite")
    assert vggstyle(*words)[:2] == (0, "out.jpg\n")
    assert Path("out-1-0002.jpg").read_bytes() == before and Path("out-1-0002-2.jpg").is_file()
    words = (*words, "--start-size", "20", "--checkpoint", "out-2-0002.jpg")
    assert vggstyle(*words)[0] == 0 and Path("out-2-0002-2.jpg").is_file() and not Path("out-2-0002.jpg").exists()


def test_pictures_on_the_way_that_cannot_be_written(vggstyle, folder):
    name = "a" * 249 + ".jpg"
    code, out, err = vggstyle(*PAIR, "--save-every", "1", "-o", name)
    assert (code, out) == (0, f"{name}\n") and Path(name).is_file()
    assert err.count("File name too long; choose another name; no more pictures along the way") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_full_stdout_does_not_hide_the_picture(vggstyle, folder, monkeypatch, more):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code, _, err = vggstyle(*PAIR, "--quiet", "--checkpoint", "run.pt", *more)
        with contextlib.suppress(OSError):  # what is left to write
            full.close()
    assert code == 1 and Path("content-style.png").is_file() and not Path("run.pt").exists()
    said = "vggstyle: cannot print to stdout: No space left on device; the picture is in content-style.png"
    assert err.splitlines()[-1] == said


def test_a_log_has_a_line_for_each_scale_and_quiet_has_none(vggstyle, folder):
    loud, quiet = (vggstyle(*PAIR, "--start-size", "20", *more)[2] for more in ([], ["--quiet"]))
    assert re.findall("^scale .*$", loud, re.MULTILINE) == ["scale 1/2 20×15, 2 steps", "scale 2/2 40×30, 4 steps"]
    assert "scale" not in quiet and "\r" not in loud + quiet
    assert loud.count("weights: ") == 1 and "resuming" not in loud


def test_the_bar_shows_how_far_it_is_and_the_terms_that_count(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    losses = {"total": 0.5, "style": 0.5, "content": 0.0, "tv": 0.0}
    with vggstyle_command._Bar(disable=False) as bar:
        for step in (1, 2, 3):
            bar(vggfeat.StyleStep(1, 1, step, 4, 40, 30, losses, 1.0, step / 4, "tiny.safetensors", lambda: None))
            assert (bar.bar.n, bar.bar.postfix) == (step / 4, "total 0.5 style 0.5")
    for disable in (False, True):  # --quiet, on a terminal too
        with vggstyle_command._Bar(disable) as bar:
            assert bar.bar.disable is disable


# ── vggstyle: flags ───────────────────────────────────────────────────────────────────────────────────────────────────

OWN_FLAGS = {"checkpoint", "save_every", "output", "overwrite", "as_json", "quiet", "help", "version"}


def parsed(*words):
    context = vggstyle_command.command.make_context("vggstyle", ["content.jpg", "style.png", *words])
    fields = {field.name for field in dataclasses.fields(StyleConfig)}
    return StyleConfig(**{name: value for name, value in context.params.items() if name in fields})


def test_every_setting_is_a_flag_and_no_flag_is_more():
    command = vggstyle_command.command
    options = {p.name: p for p in command.params if isinstance(p, click.Option) and p.name not in OWN_FLAGS}
    assert [*options] == [field.name for field in dataclasses.fields(StyleConfig)]  # in this order, which --help shows
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    for name, option in options.items():
        assert option.opts == ["--" + name.replace("_", "-")] and option.help
        value = getattr(StyleConfig(), name)
        shown = f"{option.help} [default: {','.join(value) if isinstance(value, tuple) else value}"
        assert (shown in text) == (value is not None and value is not False)
    assert parsed() == StyleConfig()


def test_every_flag_sets_its_setting():
    words = {
        **{"size": "300", "steps": "3", "start_size": "33", "seed": "5", "arch": "vgg16", "device": "cpu"},
        **{"weights": "caffe", "init": "noise", "style_weight": "2.5", "content_weight": "0.25", "tv_weight": "0.125"},
        **{"style_scale": "1.5", "learning_rate": "0.5", "style_blend": "2,1", "tile": "256"},
        **{"style_layers": "relu1_1, conv2_2", "content_layers": "conv4_2", "style_layer_weights": "1,0.5"},
        **{"content_layer_weights": "3", "keep_color": None},
        **{
            name: next(c for c in choices if c != getattr(StyleConfig(), name))
            for name, choices in StyleConfig.CHOICES.items()
        },
    }
    assert words.keys() == {field.name for field in dataclasses.fields(StyleConfig)}
    flags = [[f"--{name.replace('_', '-')}", *([value] if value else [])] for name, value in words.items()]
    config = parsed(*sum(flags, []))
    default = StyleConfig()
    for name, value in words.items():
        got = getattr(config, name)
        assert got != getattr(default, name)
        if isinstance(got, tuple):
            assert [str(item) for item in got] == [str(type(got[0])(part.strip())) for part in value.split(",")]
        elif got is not True:
            assert got == type(got)(value)


# ── vggstyle: bad input ───────────────────────────────────────────────────────────────────────────────────────────────

PAIR = ["content.jpg", "style.png"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "CONTENT"),
        (["content.jpg"], "STYLE"),
        (["missing.jpg", "style.png"], "missing.jpg: expected an image file"),
        (["content.jpg", "missing.png"], "missing.png: expected an image file"),
        (["text.jpg", "style.png"], "text.jpg: expected an image"),
        (["empty.png", "style.png"], "an empty file"),
        (["cut.jpg", "style.png"], "cut.jpg: expected a whole image"),
        ([".", "style.png"], "got a folder"),
        ([*PAIR, "--bogus", "3"], "--bogus"),
        ([*PAIR, "--style-layers", "relu1_1,relu9_9"], "relu9_9"),
        ([*PAIR, "--style-layers", ","], "no style layer"),
        ([*PAIR, "--style-layers", "conv1_1,conv1_1"], "twice"),
        ([*PAIR, "--content-layers", "rleu2_2"], "did you mean relu2_2"),
        ([*PAIR, "--style-layer-weights", "1,2,3"], "3 numbers for 2 layers"),
        ([*PAIR, "--style-layer-weights", "1,x"], "1,x"),
        ([*PAIR, "--style-blend", "1,2"], "2 numbers for 1"),
        ([*PAIR, "--weights", "missing.pth"], "missing.pth"),
        ([*PAIR, "--weights", "imagnet"], "did you mean imagenet"),
        ([*PAIR, "--weights", "text.jpg"], "text.jpg"),
        ([*PAIR, "--weights", "imagenet"], "VGGFEAT_WEIGHTS_DIR"),
        ([*PAIR, "--arch", "vgg99"], "vgg99"),
        ([*PAIR, "--arch", "vgg11"], "vgg11"),  # the file's is vgg19
        ([*PAIR, "--size", "0"], "size must be a whole number of at least 1, got 0"),
        ([*PAIR, "--size", "1"], "too small"),
        ([*PAIR, "--size", "big"], "big"),
        ([*PAIR, "--steps", "-1"], "steps"),
        ([*PAIR, "--seed", "-1"], "seed"),
        ([*PAIR, "--content-weight", "-1"], "--content-weight must be"),
        ([*PAIR, "--style-scale", "nan"], "--style-scale must be"),
        ([*PAIR, "--pooling", "mean"], "'max', 'average', 'l2'"),
        ([*PAIR, "--device", "nonsense"], "nonsense"),
        ([*PAIR, "--init", "missing.png"], "missing.png"),
        ([*PAIR, "-o", "nowhere/out.png"], "nowhere"),
        ([*PAIR, "-o", "out.bmp"], ".png, .jpg"),
        ([*PAIR, "-o", "out"], ".png, .jpg"),
        ([*PAIR, "-o", "folder.png"], "expected a file name, got a folder"),
        ([*PAIR, "-o", "."], "expected a file name, got a folder"),
        ([*PAIR, "-o", "/dev/null"], "expected a file, found a device or a pipe"),
        ([*PAIR, "-o", "content.jpg"], "one of the files that are read"),
        ([*PAIR, "-o", "text.jpg"], "it already exists; pass --overwrite or another name"),
        ([*PAIR, "--style-scale", "1e9"], "at most 100, got 1000000000.0"),
        ([*PAIR, "--learning-rate", "1"], "--learning-rate is Adam's: leave it out, or choose --optimizer adam"),
        (
            [*PAIR, "--style-weight", "0", "--content-weight", "0"],
            "--style-weight, --content-weight and --tv-weight are",
        ),
        (["phone.heic", "style.png"], "got HEIC; convert it to JPEG"),
        ([*PAIR, "-o", "x" * 300 + ".png"], "too long"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(vggstyle, folder, args, says):
    Path("text.jpg").write_text("no picture\n")
    Path("phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    Path("empty.png").touch()
    Path("cut.jpg").write_bytes(Path("content.jpg").read_bytes()[:600])
    Path("folder.png").mkdir()
    before = sorted(folder.iterdir())
    code, out, err = vggstyle(*args)
    assert (code, out) == (2, "") and says in one_line(err)
    assert sorted(folder.iterdir()) == before


# ── vggstyle: trouble on the way ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB"), "out of memory. Tried to allocate"),
        (MemoryError(), "MemoryError: no details are known"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (ValueError("x" * 9999), "ValueError: " + "x" * 300 + "\n"),
    ],
    ids=["cuda", "memory", "disk", "long"],
)
def test_a_failure_while_running_is_one_line_and_status_1(vggstyle, folder, monkeypatch, error, says):
    def fail(*_):
        raise error

    monkeypatch.setattr(Objective, "value_and_grad", fail)
    code, out, err = vggstyle(*PAIR)
    assert (code, out) == (1, "") and says in one_line(err)
    assert len(list(folder.iterdir())) == 2


def test_nan_from_the_start_is_one_line_and_status_1(vggstyle, folder, monkeypatch):
    value_and_grad = Objective.value_and_grad

    def spoilt(self, image):
        total, terms, grad = value_and_grad(self, image)
        return total * math.nan, terms, grad

    monkeypatch.setattr(Objective, "value_and_grad", spoilt)
    code, out, err = vggstyle(*PAIR)
    assert (code, out) == (1, "") and "nan at the start" in one_line(err)
    assert len(list(folder.iterdir())) == 2


def test_a_lack_of_memory_saves_the_picture_of_a_coarser_scale_with_status_1(vggstyle, folder, monkeypatch):
    value_and_grad = Objective.value_and_grad

    def lacking(self, image):
        if image.shape[3] == 40:
            raise MemoryError("no room")
        return value_and_grad(self, image)

    monkeypatch.setattr(Objective, "value_and_grad", lacking)
    code, out, err = vggstyle(*PAIR, "--start-size", "20", "--checkpoint", "run.pt")
    assert (code, out) == (1, "content-style.png\n") and Path("run.pt").exists()  # for when there is more memory
    said = "not enough memory for 40×30: no room; the picture is that of a coarser scale: lower --size or --tile"
    assert err.splitlines()[-1] == f"vggstyle: {said}"
    with Image.open("content-style.png") as picture:
        assert picture.size == (40, 30)


@pytest.mark.parametrize("trouble", ["folder gone", "name taken"])
def test_a_picture_that_cannot_be_saved_is_rescued(vggstyle, folder, tmp_path, monkeypatch, trouble):
    Path("out").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    stylize = stylize_module.stylize

    def meanwhile(*args, **kwargs):
        result = stylize(*args, **kwargs)
        Path("out").rmdir() if trouble == "folder gone" else Path("out/new.jpg").write_bytes(b"precious")
        return result

    monkeypatch.setattr(vggfeat, "stylize", meanwhile)
    Path(tmp_path / "tmp" / "new.png").write_bytes(b"another's")
    words = ("--start-size", "20", "--checkpoint", "run.pt", "-o", "out/new.jpg", "--quiet")
    code, out, err = vggstyle(*PAIR, *words)
    rescued = tmp_path / "tmp" / "new-2.png"
    assert code == 1 and out == f"{rescued}\n" and Path("run.pt").exists()  # until the picture is where it should be
    assert "already exists: the picture is" not in err
    last = err.splitlines()[-1]
    assert last.startswith("vggstyle: cannot write out/new.jpg") and last.endswith(f"the picture is in {rescued}")
    with Image.open(rescued) as picture:
        assert picture.size == (40, 30)
    assert trouble == "folder gone" or Path("out/new.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_two_at_once_the_second_takes_the_next_number(vggstyle, folder, monkeypatch, overwrite):
    stylize, name = stylize_module.stylize, f"{Path(PAIR[0]).stem}-{Path(PAIR[1]).stem}"
    Path(f"{name}.png").write_bytes(b"before")

    def meanwhile(*args, **kwargs):
        result = stylize(*args, **kwargs)
        Path(f"{name}-2.png").write_bytes(b"another's")
        return result

    monkeypatch.setattr(vggfeat, "stylize", meanwhile)
    code, out, _ = vggstyle(*PAIR, "--quiet", *["--overwrite"] * overwrite)
    assert (code, out) == (0, f"{name}.png\n" if overwrite else f"{name}-3.png\n")
    assert Path(f"{name}-2.png").read_bytes() == b"another's"
    assert (Path(f"{name}.png").read_bytes() == b"before") is not overwrite
    with Image.open(out.strip()) as picture:
        assert picture.size == (40, 30)


def test_a_name_that_is_taken_while_the_picture_is_written(folder, monkeypatch):
    monkeypatch.setattr(run, "ignore_termination", lambda: None)  # which would be for good

    class Picture:
        def save(self, path, *, overwrite=False):
            taken = path.exists() or not path.name.endswith("-3.png")
            if taken:
                path.touch()
                raise vggfeat.ImageError("it already exists")
            return path

    assert run.Target(None, "a.png", False).save(Picture()) == (Path("a-3.png"), "")


def told_in_third_step(monkeypatch, number):
    """Have the signal come while the objective is evaluated for the third time; the evaluations so far."""
    value_and_grad, calls = Objective.value_and_grad, []

    def interrupted(self, image):
        calls.append(image)
        if len(calls) == 3:
            signal.raise_signal(number)
        return value_and_grad(self, image)

    monkeypatch.setattr(Objective, "value_and_grad", interrupted)
    return calls


def test_ctrl_c_saves_and_says_so(vggstyle, folder, monkeypatch, real_signals):
    told_in_third_step(monkeypatch, signal.SIGINT)
    code, out, err = vggstyle(*PAIR, "--json", "--quiet")
    summary = json.loads(out)
    assert (code, summary["interrupted"], summary["steps"]) == (130, True, 2)
    assert "interrupted" in err.splitlines()[-1] and "Traceback" not in err
    assert (read_settings(summary["output"]) or {})["interrupted"]


def test_ctrl_c_that_is_swallowed_is_heard_at_the_next_occasion(vggstyle, folder, monkeypatch, real_signals):
    """Python raises nothing out of a finalizer, wherever the signal comes."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: swallowed.append(1))
    loading, swallowed = stylize_module.load, []

    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(stylize_module, "load", lambda *given, **more: (Dying(), loading(*given, **more))[1])
    code, out, err = vggstyle(*PAIR)
    assert swallowed and (code, out) == (130, "content-style.png\n") and "interrupted" in err.splitlines()[-1]
    assert (read_settings("content-style.png") or {})["interrupted"]
    monkeypatch.setattr(stylize_module, "load", loading)
    assert vggstyle(*PAIR)[0] == 0


def test_ctrl_c_before_the_first_step_is_one_line(vggstyle, folder, monkeypatch, real_signals):
    monkeypatch.setattr(stylize_module, "load", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    code, out, err = vggstyle(*PAIR)
    assert (code, out) == (130, "") and "interrupted" in one_line(err.lstrip("\n"))
    assert len(list(folder.iterdir())) == 2


def test_ctrl_c_that_click_does_not_see_is_one_line(vggstyle, monkeypatch):
    """As at the very end, while the handlers are put back."""

    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(vggstyle_command.command, "main", interrupted)
    code, out, err = vggstyle()
    assert (code, out) == (130, "") and "interrupted" in one_line(err)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("when", ["running", "putting together", "saving"])
def test_to_be_told_to_end_again_costs_nothing(vggstyle, folder, monkeypatch, real_signals, name, when):
    number = getattr(signal, name, signal.SIGINT)
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, number)}
    place = {"running": "value_and_grad", "putting together": "terms"}.get(when)
    value_and_grad, terms, calls = Objective.value_and_grad, Objective.terms, []

    def told():
        if len(calls) >= 3 or when != "running":  # and from then on
            signal.raise_signal(number)

    def evaluated(self, image):
        calls.append(image)
        told() if place == "value_and_grad" else None
        return value_and_grad(self, image)

    def final(self, image):
        if not image.requires_grad:
            told() if when != "saving" else None
        return terms(self, image)

    monkeypatch.setattr(Objective, "value_and_grad", evaluated)
    monkeypatch.setattr(Objective, "terms", final)
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: [signal.raise_signal(number), fsync(file)])
    code, out, err = vggstyle(*PAIR, "--quiet")
    assert (code, out) == (0 if when == "saving" else 130, "content-style.png\n"), err
    with Image.open("content-style.png") as picture:
        picture.load()
    assert len(calls) == (3 if when == "running" else 4) and len(list(folder.iterdir())) == 3
    assert before == {each: signal.getsignal(each) for each in before}


def test_a_run_goes_on_from_its_checkpoint(vggstyle, folder, monkeypatch, real_signals):
    whole = vggstyle(*PAIR, "-o", "whole.png", "--quiet")
    calls = told_in_third_step(monkeypatch, signal.SIGTERM)
    code, _, err = vggstyle(*PAIR, "--checkpoint", "run.pt")
    assert code == 130 and err.splitlines()[-1].endswith("; the same command resumes from run.pt")
    code, out, err = vggstyle(*PAIR, "--checkpoint", "run.pt")
    assert (code, out) == (0, "content-style.png\n") and "resuming after step 2 of scale 1/1" in err
    assert len(calls) == 3 + 2 and whole[0] == 0
    with Image.open("content-style.png") as ours, Image.open("whole.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()
    assert not Path("run.pt").exists()
    code, out, err = vggstyle(*PAIR, "--checkpoint", "content.jpg")
    assert (code, out) == (2, "") and "one of the files that are read" in one_line(err)


def test_a_run_goes_on_from_the_end_of_a_scale(vggstyle, folder, monkeypatch, real_signals):
    """Which is not told as a step 0."""
    told_in_third_step(monkeypatch, signal.SIGTERM)  # the first scale has two
    command = (*PAIR, "--start-size", "20", "--checkpoint", "run.pt")
    assert vggstyle(*command)[0] == 130
    code, _, err = vggstyle(*command)
    assert code == 0 and "resuming after scale 1/2\n" in err and "step 0" not in err


def test_the_same_command_with_an_output_goes_on(vggstyle, folder, monkeypatch, real_signals):
    """The picture so far gives way to the finished one."""
    told_in_third_step(monkeypatch, signal.SIGTERM)
    command = (*PAIR, "--checkpoint", "run.pt", "-o", "o.png")
    assert vggstyle(*command)[0] == 130
    assert read_settings("o.png")["interrupted"]
    os.utime("o.png", ns=(0, Path("run.pt").stat().st_mtime_ns))  # as where files have their time in whole seconds
    code, out, err = vggstyle(*command)
    assert (code, out) == (0, "o.png\n") and "resuming after step 2" in err and "already exists" not in err
    assert not read_settings("o.png")["interrupted"]
    assert not Path("run.pt").exists() and not Path("o-2.png").exists()
    before = Path("o.png").read_bytes()
    code, out, err = vggstyle(*command)  # now there is nothing to go on from
    assert (code, out) == (2, "") and "o.png: it already exists" in one_line(err)
    assert Path("o.png").read_bytes() == before


@pytest.mark.parametrize("what", ["something else", "a finished picture", "other settings", "before the checkpoint"])
def test_another_picture_in_the_place_of_a_resumed_run_stays(vggstyle, folder, monkeypatch, real_signals, what):
    told_in_third_step(monkeypatch, signal.SIGTERM)
    command = (*PAIR, "--checkpoint", "run.pt", "-o", "o.png")
    assert vggstyle(*command)[0] == 130
    settings = read_settings("o.png")
    picture = open_image("o.png")
    if what == "something else":
        Path("o.png").write_bytes(b"mine")
    elif what == "before the checkpoint":
        os.utime("o.png", ns=(0, Path("run.pt").stat().st_mtime_ns - 1))
    else:
        changed = (
            {"interrupted": False} if what == "a finished picture" else {"config": settings["config"] | {"seed": 5}}
        )
        save_image(picture, "o.png", settings=settings | changed, overwrite=True)
    before = Path("o.png").read_bytes()
    code, out, err = vggstyle(*command)
    assert (code, out) == (0, "o-2.png\n") and "o.png already exists: the picture is o-2.png" in err
    assert Path("o.png").read_bytes() == before and not Path("run.pt").exists()


def test_a_picture_that_comes_while_a_resumed_run_goes_on_stays(vggstyle, folder, monkeypatch, real_signals):
    told_in_third_step(monkeypatch, signal.SIGTERM)
    command = (*PAIR, "--checkpoint", "run.pt", "-o", "o.png")
    assert vggstyle(*command)[0] == 130
    terms = Objective.terms

    def saved(self, image):
        Path("o.png").write_bytes(b"mine")
        return terms(self, image)

    monkeypatch.setattr(Objective, "terms", saved)
    code, out, err = vggstyle(*command)
    assert (code, out) == (0, "o-2.png\n") and "o.png already exists: the picture is o-2.png" in err
    assert Path("o.png").read_bytes() == b"mine"


@pytest.mark.filterwarnings("default")
def test_a_checkpoint_that_could_not_be_written_is_not_promised(vggstyle, folder, monkeypatch, real_signals):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stylize_module.checkpoints, "write", full)
    told_in_third_step(monkeypatch, signal.SIGTERM)
    code, _, err = vggstyle(*PAIR, "--checkpoint", "run.pt")
    assert code == 130 and "cannot write checkpoint run.pt: No space left on device" in err
    assert err.splitlines()[-1] == "vggstyle: interrupted; this is the best picture so far"


@pytest.mark.parametrize(
    "words",
    [
        ["-o", "x.png", "--checkpoint", "x.png"],
        ["-o", "x.png", "--checkpoint", "./sub/../x.png"],
        ["--checkpoint", "content-style.png"],
    ],
)
def test_a_checkpoint_is_not_the_picture(vggstyle, folder, words):
    Path("sub").mkdir()
    code, out, err = vggstyle(*PAIR, *words)
    assert (code, out) == (2, "") and "give them two names" in one_line(err)
    assert sorted(each.name for each in folder.iterdir()) == ["content.jpg", "style.png", "sub"]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_what_nohup_ignores_stays_ignored(vggstyle, folder, monkeypatch):
    value_and_grad = Objective.value_and_grad

    def told(self, image):
        signal.raise_signal(signal.SIGHUP)
        return value_and_grad(self, image)

    monkeypatch.setattr(Objective, "value_and_grad", told)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert vggstyle(*PAIR, "--quiet")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line_with_flags(vggstyle, folder):
    shown = warnings.showwarning
    code, _, err = vggstyle(*PAIR, "--optimizer", "adam", "--learning-rate", "100", "--steps", "3")
    assert code == 0 and err.splitlines()[-2] == (
        "vggstyle: no step improved on the picture to begin with, which is what is returned: lower --learning-rate"
    )
    assert warnings.showwarning is shown


def test_a_warning_of_another_package_is_shown_as_python_shows_it(vggstyle, folder, monkeypatch):
    loading = stylize_module.load

    def load(*given, **more):
        warnings.warn("of its own", stacklevel=1)
        return loading(*given, **more)

    monkeypatch.setattr(stylize_module, "load", load)
    with pytest.warns(UserWarning, match="of its own"):
        code, _, err = vggstyle(*PAIR)
    assert code == 0 and "of its own" not in err


def test_a_stream_that_the_caller_closed_costs_no_picture(vggstyle, folder, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    code, out, _ = vggstyle(*PAIR)
    sys.stderr.close()  # which stands for it since
    assert (code, out) == (0, "content-style.png\n") and Path("content-style.png").is_file()


def test_messages_to_a_closed_stream_are_unheard():
    with io.StringIO() as stream:
        unheard = run._Unheard(stream)
        assert unheard.write("heard") == 5 and stream.getvalue() == "heard"
    assert unheard.write("unheard") == 7
    unheard.flush()


def test_a_name_that_the_terminal_cannot_show_costs_no_picture(vggstyle, folder, monkeypatch):
    with io.TextIOWrapper(io.BytesIO(), encoding="cp1252") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        code, _, err = vggstyle(*PAIR, "-o", "中.png")
        stdout.flush()
        assert (code, stdout.buffer.getvalue().split()) == (0, [b"?.png"]) and Path("中.png").is_file(), err


def test_pictures_that_are_read_are_not_replaced(vggstyle, folder):
    before = [Path(name).read_bytes() for name in PAIR]
    for words in (
        (*PAIR, "-o", "style.png"),
        (*PAIR, "-o", "./content.jpg"),
        ("style.png", "style.png", "--init", "content.jpg", "-o", "content.jpg"),
    ):
        code, out, err = vggstyle(*words, "--overwrite")
        assert (code, out) == (2, "") and "one of the files that are read" in one_line(err)
    assert before == [Path(name).read_bytes() for name in PAIR]
    Path("content").mkdir()  # the default of --init is no folder of that name
    for output in ("content/out.png", "content/out.png"):
        assert vggstyle(*PAIR, "-o", output, "--overwrite", "--checkpoint", "content/run.pt")[0] == 0


# ── processes of their own ────────────────────────────────────────────────────────────────────────────────────────────


def environment():
    paths = [str(REPO), str(REPO / "cli"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path), "PYTHONIOENCODING": "utf-8"}


@pytest.mark.skipif(os.name == "nt", reason="a terminal, and SIGINT to another process")
def test_a_real_ctrl_c_and_the_progress_bar(folder, quick):
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from vggfeat_cli.style import main; main()"
    flags = [*quick, "--start-size", "20", "--steps", "200000"]  # click takes the last of a flag given twice
    termios = pytest.importorskip("termios")
    terminal, stderr = os.openpty()
    termios.tcsetwinsize(stderr, (24, 120))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *PAIR, *flags],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
    )
    os.close(stderr)
    seen, told, deadline = b"", False, time.monotonic() + 120
    try:
        while time.monotonic() < deadline:
            if b" step " in seen and not told:
                time.sleep(0.3)
                process.send_signal(signal.SIGINT)
                told = True
            if select.select([terminal], [], [], 1)[0]:
                try:
                    seen += os.read(terminal, 4096)
                except OSError:  # the other end is closed
                    break
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        os.close(terminal)
    text = seen.decode().replace("\r\n", "\n")
    assert process.returncode == 130 and "Traceback" not in text
    assert out == b"content-style.png\n" and "interrupted" in text.splitlines()[-1]
    # scale 1/3 20×15 step 5/100000   0% |          | 00:00<12:34, total 0.3 style 0.2 content 0.1
    number = r"\d\S*"
    assert re.search(
        rf"scale 1/\d 20×15 step \d+/100000 +\d+% \|.*\| [\d:]+<[\d:]+, total {number} style {number} content {number}",
        text,
    )
    with Image.open("content-style.png") as picture:
        picture.load()
        assert picture.size == (40, 30)
    assert len(list(folder.iterdir())) == 3


def test_the_list_of_commands_fits_a_terminal():
    for words, count in ([], 13), (["weights"], 3):
        text = CliRunner().invoke(vggfeat_command.command, [*words, "--help"], env={"COLUMNS": "80"}).output
        listed = text.partition("Commands:\n")[2].splitlines()
        assert len(listed) == count and all(line.endswith(".") and not line.endswith("...") for line in listed)


def test_help_answers_without_torch():
    code = """
import sys
for module, *args in (("style", "--help"), ("style", "-h"), ("style", "--version"),
                      ("main", "--help"), ("main", "weights", "--help"), ("style",), ("main",)):
    sys.argv = ["command", *args]
    try:
        getattr(__import__(f"vggfeat_cli.{module}"), module).main()
    except SystemExit as end:
        print("status", end.code, *args)
print(sorted({"torch", "torchvision", "PIL", "kornia", "numpy"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[-1] == "[]", done
    assert [line for line in lines if line.startswith("status")] == [
        *("status 0 --help", "status 0 -h", "status 0 --version", "status 0 --help", "status 0 weights --help"),
        *("status 2", "status 2"),
    ]
    for field in dataclasses.fields(StyleConfig):
        assert f"--{field.name.replace('_', '-')}" in done.stdout
    assert f"version {vggfeat.__version__}" in done.stdout
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["vggstyle", "vggfeat"]


# ── vggfeat weights ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def vgg(call):
    return lambda *args: call(vggfeat_command, *args)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A published file in VGGFEAT_WEIGHTS_DIR, under the name that `fetch imagenet vgg11` looks for."""
    data = b"the numbers"
    digest = hashlib.sha256(data).hexdigest()
    entry = weights.Published(f"http://127.0.0.1:9/vgg11-{digest[:8]}.pth", weights.IMAGENET, "free")
    for module in (weights, weights.sets):
        monkeypatch.setattr(module, "SETS", {"imagenet": {"vgg11": entry}})
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", str(tmp_path))
    path = tmp_path / entry.filename
    path.write_bytes(data)
    return path, digest


def test_weights_list(vgg, published):
    code, out, err = vgg("weights", "list")
    assert (code, err) == (0, "") and str(published[0]) in out and "free" in out and "random" in out
    assert re.search(rf"^bundled +vgg19 +.* {re.escape(str(weights.BUNDLED))} ", out, re.MULTILINE)


def test_weights_list_where_there_is_nothing(vgg):
    code, out, _ = vgg("weights", "list")
    assert code == 0
    for name, group in weights.SETS.items():
        for arch, entry in group.items():
            assert re.search(rf"^{name} +{arch} +{re.escape(entry.filename)} +- ", out, re.MULTILINE)


def test_weights_fetch(vgg, published):
    assert vgg("weights", "fetch", "imagenet", "vgg11")[:2] == (0, f"{published[0]}\n")
    for args, says in (
        (["imagenet", "vgg12"], "did you mean"),
        (["imagenet", "vgg16"], "choose from vgg11"),
        (["imagnet"], "did you mean imagenet"),
        ([], "NAME"),
    ):
        code, out, err = vgg("weights", "fetch", *args)
        assert (code, out) == (2, "") and says in one_line(err, "vggfeat")


def test_weights_fetch_is_of_vgg16_where_none_is_named(vgg, monkeypatch):
    monkeypatch.setattr(weights, "find", lambda *asked: "/".join(asked))
    assert vgg("weights", "fetch", "caffe") == (0, "caffe/vgg16\n", "")


def test_weights_fetch_without_a_network(vgg, tmp_path, monkeypatch):
    monkeypatch.setenv("VGGFEAT_WEIGHTS_DIR", str(tmp_path))
    code, out, err = vgg("weights", "fetch", "imagenet", "vgg16")
    assert (code, out) == (2, "") and "VGGFEAT_WEIGHTS_DIR" in one_line(err, "vggfeat")
    assert not list(tmp_path.iterdir())
    assert not [*Path(torch.hub.get_dir()).rglob("*.p*")]


def test_weights_verify(vgg, published, tmp_path):
    path, digest = published
    for args in ([], [path]):
        assert vgg("weights", "verify", *args) == (0, f"{digest}  {path}\n", "")
    path.write_bytes(b"other numbers")
    for args in ([], [path]):
        code, out, err = vgg("weights", "verify", *args)
        assert (code, out) == (1, "") and path.name in one_line(err, "vggfeat")
    code, out, err = vgg("weights", "verify", path, tmp_path / "missing.pth")
    assert (code, out) == (2, "") and "missing.pth" in one_line(err, "vggfeat")
    mine, noted = tmp_path / "mine.pth", tmp_path / "noted.pth"
    mine.write_bytes(b"mine")
    noted.write_bytes(b"mine")
    note = tmp_path / "noted.pth.sha256"
    ours = hashlib.sha256(b"mine").hexdigest()
    for text, good in (("a note of my own\n", True), (f"{ours}  noted.pth\n", True), (f"{digest}  noted.pth\n", False)):
        note.write_text(text)
        code, out, err = vgg("weights", "verify", path, noted, mine)  # the bad ones stop nothing
        nothing = "  (nothing is published or recorded to compare it with)"
        assert (code, out.split("\n")[-2]) == (1, f"{ours}  {mine}{nothing}") and path.name in err.splitlines()[0]
        assert (str(noted) in out) == good and (f"{noted} was changed since" in err) != good
        assert note.read_text() == text and "delete both" not in err
    assert not (tmp_path / "mine.pth.sha256").exists()
    noted.unlink()
    path.unlink()
    assert vgg("weights", "verify")[0] == 0


@pytest.mark.parametrize("args", [[], ["weights"], ["wieghts"], ["weights", "lsit"], ["weights", "list", "--bogus"]])
def test_unknown_subcommands_are_one_line(vgg, args):
    code, out, err = vgg(*args)
    assert (code, out) == (2, "") and "--help" in one_line(err, "vggfeat")


def test_ctrl_c_while_fetching(vgg, monkeypatch, real_signals):
    monkeypatch.setattr(weights, "find", lambda *_: signal.raise_signal(signal.SIGINT))
    code, out, err = vgg("weights", "fetch", "imagenet")
    assert (code, out) == (130, "") and "interrupted" in one_line(err.lstrip("\n"), "vggfeat")


# ── vggfeat train, vggfeat evaluate ───────────────────────────────────────────────────────────────────────────────────

SMALL = ["--arch=vgg11_bn", "--width=0.125", "--batch-size=8", "--epochs=2", "--warmup=0.5", "--lr=0.02", "--ema=0.8"]
SMALL += ["--precision=float32"]


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """The working folder, with set.zip in it."""
    files = {f"train/{name}": content for name, content in pictures.tree(8).items()}
    files |= {f"test/{name}": content for name, content in pictures.tree(4, offset=50).items()}
    pictures.zipped(tmp_path / "set.zip", files)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_train_and_evaluate(vgg, labelled):
    pytest.importorskip("matplotlib")
    code, out, err = vgg("train", "set.zip", *SMALL, "--plot", "curves.png")
    assert (code, out) == (0, "vgg11_bn-fast\n")
    lines = err.splitlines()
    assert lines[0].startswith("recipe fast: ") and "lr=0.02" in lines[0] and "label_smoothing=0.1" in lines[0]
    assert "24 images of 3 classes at 32 px, in memory; 12 for the test (set.zip/test)\n" in err
    assert [line.split("  ")[0] for line in lines if line.startswith("epoch ")] == ["epoch 1/2", "epoch 2/2"]
    assert lines[-1].startswith("test accuracy ")
    code, out, err = vgg(
        "evaluate", "vgg11_bn-fast", "set.zip", "--precision=float32", "--format", "json", "--plot", "confusion.png"
    )
    found = json.loads(out)
    assert (code, err, found["images"]) == (0, "", 12)
    assert f"test accuracy {100 * found['top1']:.2f} %" == lines[-1].removesuffix(" after 2 epochs")
    for name in ("curves.png", "confusion.png"):
        with Image.open(name) as image:
            assert min(image.size) > 300
    assert vgg("train", "set.zip", *SMALL, "--quiet")[1] == "vgg11_bn-fast-2\n"  # the first run stays
    code, out, err = vgg("train", "set.zip", *SMALL, "-o", "vgg11_bn-fast", "--resume", "--json", "--quiet")
    summary = json.loads(out)
    assert code == 0 and summary["folder"] == "vgg11_bn-fast" and len(summary["history"]) == 2
    assert summary["history"][-1]["test_accuracy"] == found["top1"] and summary["config"]["batch_size"] == 8


def test_an_evaluation_replaces_nothing_that_it_reads(vgg, labelled):
    save_file(vggfeat.vgg11(3, width=0.125, head="slim").state_dict(), "w.safetensors")
    assert vgg("train", "set.zip", *SMALL, "--epochs=1", "-o", "run", "--quiet")[0] == 0
    pictures.folder(labelled / "data", pictures.tree(2))
    for read, data, output in (
        ("w.safetensors", "set.zip", "set.zip"),
        ("w.safetensors", "set.zip", "./w.safetensors"),
        ("caffe:w.safetensors", "set.zip", "w.safetensors"),
        ("run", "set.zip", "run/weights.safetensors"),
        ("w.safetensors", "data", "data/ant/0.png"),
    ):
        before = Path(output).read_bytes()
        code, out, err = vgg("evaluate", read, data, "-o", output, "--overwrite")
        assert (code, out) == (2, "") and "it is one of the files" in one_line(err, "vggfeat")
        assert Path(output).read_bytes() == before
    Path("mine.md").touch()
    code, _, err = vgg("evaluate", "gone.pth", "set.zip", "-o", "mine.md")  # which is seen before there is any work
    assert code == 2 and "mine.md: it already exists" in one_line(err, "vggfeat")


def test_a_size_of_nothing_is_not_the_default(vgg, labelled):
    save_file(vggfeat.vgg11(3, width=0.125, head="slim").state_dict(), "w.safetensors")
    pictures.folder(labelled / "data", pictures.tree(1))
    command = ["cam", "data/ant/0.png", "--weights", "w.safetensors", "-o", "cam.png"]
    code, out, err = vgg(*command, "--size", "0")
    assert (code, out) == (2, "") and "at least 1, got 0" in one_line(err, "vggfeat") and not Path("cam.png").exists()
    assert vgg(*command)[:2] == (0, "cam.png\n")


@pytest.mark.parametrize("command", [["compare", "vgg16"], ["evaluate", "w.safetensors", "set.zip"]])
def test_a_report_and_its_plot_have_two_names(vgg, labelled, command):
    pytest.importorskip("matplotlib")
    code, out, err = vgg(*command, "--plot", "p.png", "-o", "./p.png", "--overwrite")
    assert (code, out) == (2, "") and "give them two names" in one_line(err, "vggfeat")
    assert not Path("p.png").exists()


def test_a_run_is_not_written_among_its_images(vgg, labelled):
    pictures.folder(labelled / "data", pictures.tree(8))
    for folder in ("data/run", "data", "./data/../data/run"):
        code, out, err = vgg("train", "data", *SMALL, "-o", folder)
        assert (code, out) == (2, "") and "inside the images' folder" in one_line(err, "vggfeat")
    assert sorted(each.name for each in (labelled / "data").iterdir()) == ["ant", "bee", "cow"]
    code, out, _ = vgg("train", "data", *SMALL, "--epochs=1", "--quiet", "-o", "data/.run")  # which nobody looks at
    assert (code, out) == (0, "data/.run\n") and vgg("evaluate", "data/.run", "data")[0] == 0


def test_a_recipe_s_flag_can_be_taken_back(vgg, labelled):
    code, _, err = vgg(
        "train", "set.zip", *SMALL, "--recipe=chapter", "--no-decay-all", "--epochs=1", "--resize=32", "--quiet"
    )
    assert code == 0 and "decay_all=False" in err and "resize=(32,)" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "nowhere"], "no images at nowhere"),
        (["train", "set.zip"], "fewer than --batch-size 500: lower --batch-size, for instance to"),
        (["train", "set.zip", "--resume"], "--output"),
        (["train", "set.zip", "--lr", "-1"], "lr must be a positive number"),
        (["train", "set.zip", "--lr", "much"], "--lr"),
        (["train", "set.zip", "--recipe", "fats"], "chapter"),
        (["train", "set.zip", "--device", "cuda:97"], "cannot be used here"),
        (["train", "set.zip", "--batch-size=8", "--weights", "gone.pth"], "no weights at gone.pth"),
        (["train", "set.zip", "--batch-size=8", "--weights", "bundled", "--freeze", "conv9_1"], "conv9_1"),
        (["train", "set.zip", "--batch-size=8", "--size=64"], "smaller than size 64"),
        (["train", "set.zip", "--plot", "gone/x.png"], "expected a folder at gone"),
        (["train", "set.zip", "-o", "set.zip"], "already exists"),
        (["train", "broken.zip"], "no zip, or a damaged one"),
        (["evaluate", "gone.pth", "set.zip"], "no weights at gone.pth"),
        (["evaluate", "bundled", "set.zip"], "no classifier"),
        (["evaluate", "w.safetensors", "set.zip"], "has 3 classes, the network 5"),
        (["evaluate", "w.safetensors", "nowhere"], "no images at nowhere"),
        (["evaluate", "w.safetensors", "set.zip", "--grid", "0"], "grid"),
        (["evaluate", "w.safetensors", "set.zip", "--plot", "x.gif"], ".gif"),
        (["evaluate", "w.safetensors"], "DATA"),
        (["evaluate", "begun", "set.zip"], "resume its training with --resume, or name a checkpoint, such as begun/"),
    ],
)
def test_what_cannot_be_trained_or_tested_is_one_line(vgg, labelled, words, says):
    Path("broken.zip").write_bytes(b"PK\x03\x04 and nothing")
    save_file(vggfeat.vgg11(5, width=0.125, head="slim").state_dict(), "w.safetensors")
    Path("begun/checkpoints").mkdir(parents=True)
    Path("begun/checkpoints/step-000000001.pt").touch()
    before = sorted(labelled.iterdir())
    code, out, err = vgg(*words)
    assert (code, out) == (2, "") and says in one_line(err, "vggfeat")
    assert sorted(labelled.iterdir()) == before


def test_ctrl_c_while_training_can_be_gone_on_from(vgg, labelled, monkeypatch, real_signals):
    from vggfeat.training import loop

    real, count = loop._Run._step, [0]

    def step(run, batch):
        count[0] += 1
        if count[0] == 2:
            signal.raise_signal(signal.SIGINT)
        return real(run, batch)

    monkeypatch.setattr(loop._Run, "_step", step)
    code, out, err = vgg("train", "set.zip", *SMALL, "-o", "run", "--quiet")
    assert (code, out) == (130, "run\n") and "interrupted" in err.splitlines()[-1] and "--resume" in err
    assert count == [2] and not Path("run/weights.safetensors").exists()
    assert vgg("train", "set.zip", *SMALL, "-o", "run", "--resume", "--quiet")[0] == 0
    assert count == [6] and Path("run/weights.safetensors").exists()


def test_a_run_from_weights_is_called_after_them(vgg, labelled):
    save_file(vggfeat.vgg11(3, width=0.125, head="slim").state_dict(), "mine.safetensors")
    words = ["--weights=mine.safetensors", "--batch-size=8", "--epochs=1", "--precision=float32", "--quiet"]
    assert vgg("train", "set.zip", *words)[:2] == (0, "mine-fast\n")


def test_what_is_said_of_a_run_that_ended_early(vgg, labelled, monkeypatch):
    words = ("train", "set.zip", *SMALL, "-o", "run", "--test", "more.zip", "--json", "--plot", "curves.png")
    result, given = TrainResult(None, [], None, Path("run"), True, []), {}
    monkeypatch.setattr(vggfeat, "train", lambda data, config, **options: given.update(options, data=data) or result)
    code, out, err = vgg(*words)
    rest = {"data": "set.zip", "test": "more.zip", "folder": Path("run"), "resume": False}
    assert {name: given[name] for name in rest} == rest
    found = json.loads(out)
    assert code == 130 and (found["folder"], found["interrupted"], found["history"]) == ("run", True, [])
    assert "--resume goes on" in one_line(err, "vggfeat train") and not Path("curves.png").exists()

    def again(*_, **__):
        raise KeyboardInterrupt  # the second, at once

    monkeypatch.setattr(vggfeat, "train", again)
    for rest in ("nothing was written", "--resume continues from what was saved in run"):
        code, out, err = vgg(*words)
        assert (code, out) == (130, "") and one_line(err, "vggfeat train").endswith(f"interrupted; {rest}\n")
        Path("run").mkdir(exist_ok=True)


@pytest.mark.parametrize("quiet", [True, False])
def test_a_finished_epoch_is_a_line_and_the_bar_counts_epochs(quiet):
    moved, lines = [], []
    bar = SimpleNamespace(
        n=1.25,
        set_description_str=lambda text, refresh: lines.append(text),
        set_postfix_str=lambda text, refresh: lines.append(text),
        update=moved.append,
        write=lambda text, file: lines.append(text),
    )
    done = Epoch(2, 0.01, 0.5, 0.75, 1.0, 0.25, None, 3.0, 8.0, 2)
    learn._tell(bar, quiet, TrainStep(2, 5, 3, 4, 0.5, 0.01, None))
    learn._tell(bar, quiet, TrainStep(2, 5, 4, 4, 0.25, 0.001, None, done))
    assert moved == [0.5, 0.75]  # from a quarter of the second epoch to three, and to its end
    assert lines[:2] == ["epoch 2/5 step 3/4", "loss 0.5000 lr 0.01"]
    rest = ["epoch 2/5  loss 0.5000  train 75.00 %  test 25.00 %  3 s  8 images/s  2 images left out"]
    assert lines[2:] == ["epoch 2/5 step 4/4", "loss 0.2500 lr 0.001", *rest * (not quiet)]


def test_every_flag_of_an_evaluation_is_handed_on(vgg, labelled, monkeypatch):
    pytest.importorskip("matplotlib")
    report, given = Evaluation(3, 0.5, 1.0, None, ["a", "b"], [[2, 0], [0, 1]], 1), {}
    monkeypatch.setattr(vggfeat, "evaluate", lambda *args, **options: given.update(options, args=args) or report)
    flags = ["--size=48", "--scales=64,80", "--grid=3", "--flip", "--arch=vgg11", "--batch-size=7", "--workers=0"]
    flags += ["--precision=bfloat16", "--device=cpu", "--bad-images=skip", "--format=json", "--plot=c.png"]
    Path("c.png").touch()
    assert vgg("evaluate", "w.pth", "set.zip", *flags)[0] == 2  # the picture is there
    code, out, _ = vgg("evaluate", "w.pth", "set.zip", *flags, "--overwrite")
    assert code == 0 and json.loads(out)["top1"] == 1 and Path("c.png").stat().st_size > 1000
    views = vggfeat.Views(size=48, scales=(64, 80), grid=3, flip=True)
    assert given.pop("args") == ("w.pth", "set.zip", views)
    assert given == {"arch": "vgg11", "batch_size": 7, "workers": 0, "precision": "bfloat16", "device": "cpu",
                     "bad_images": "skip"}  # fmt: skip


def test_plots_are_not_put_among_the_images(vgg, labelled):
    pytest.importorskip("matplotlib")
    tree, test = Path("tree"), Path("tested")
    for place, count in ((tree, 4), (test, 2)):
        pictures.folder(place, pictures.tree(count))
    before = {path: path.read_bytes() for path in [*tree.rglob("*.png"), *test.rglob("*.png")]}
    image = str(next(tree.rglob("*.png")))
    for plot, *more in (
        (image,),
        (image, "--overwrite"),
        ("tree/ant/curves.png",),
        ("tested/ant/curves.png", "--test", "tested"),
        ("set.zip", "--overwrite"),
    ):
        data = "set.zip" if plot == "set.zip" else "tree"
        code, out, err = vgg("train", data, *SMALL, "-o", "run", "--plot", plot, *more)
        says = "is one" if Path(plot).exists() else "would be one"
        if plot != "set.zip":  # whose name is refused before
            assert f"it {says} of the files that are read" in one_line(err, "vggfeat")
        assert (code, out) == (2, "") and not Path("run").exists()
    assert vgg("train", "tree", *SMALL, "-o", "run", "--plot", "tree/curves.png", "--quiet")[0] == 0  # in no class
    code, _, err = vgg("evaluate", "run", "tested", "--plot", "tested/bee/c.png", "-o", "r.md")
    assert code == 2 and "would be one of the files that are read" in err and not Path("r.md").exists()
    now = {path: path.read_bytes() for path in [*tree.glob("*/*.png"), *test.rglob("*.png")]}
    assert now == before


def test_a_run_that_goes_on_leaves_other_plots_alone(vgg, labelled):
    pytest.importorskip("matplotlib")
    Path("curves.png").write_bytes(b"of another run")
    words = ("train", "set.zip", *SMALL, "-o", "run", "--quiet", "--plot", "curves.png")
    code, _, err = vgg(*words)
    assert code == 2 and "curves.png: it already exists; pass --overwrite" in err
    assert vgg(*words[:-2])[0] == 0
    code, _, err = vgg(*words, "--resume")
    assert code == 0 and "curves.png already exists: the plot is curves-2.png" in err
    assert Path("curves.png").read_bytes() == b"of another run" and Path("curves-2.png").stat().st_size > 5000
    assert vgg(*words, "--resume", "--overwrite")[0] == 0 and Path("curves.png").stat().st_size > 5000


@pytest.mark.parametrize(("encoding", "raw"), [("cp1252", False), ("utf-8", True)])
def test_json_on_a_terminal_of_another_encoding(encoding, raw):
    """It has escapes where the stream is not of UTF-8, as JSON has to be; nothing is lost."""
    code = "import sys; from vggfeat.tables import Report; from vggfeat_cli.reports import finish_report\n"
    code += "class R(Report):\n    def to_dict(self): return {'class': 'äpfel 中'}\n"
    code += "finish_report(R.__new__(R), 'json', None, False)"
    env = environment() | {"PYTHONIOENCODING": encoding}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True, timeout=60).stdout
    assert json.loads(out.decode("utf-8")) == {"class": "äpfel 中"} and ("中" in out.decode("utf-8")) == raw


def test_a_report_in_a_file_takes_names_of_any_bytes(tmp_path):
    class Odd(Report):
        def to_markdown(self):
            return "a\udcff.png\n"  # as Python reads the name of a file that is not of UTF-8

    finish_report(Odd.__new__(Odd), None, str(tmp_path / "r.MD"), False)
    assert (tmp_path / "r.MD").read_bytes() == b"a?.png\n"


def test_json_goes_to_a_stream_of_no_encoding():
    class Plain(Report):
        def to_dict(self):
            return {"class": "中"}

    with contextlib.redirect_stdout(io.StringIO()) as stream:
        finish_report(Plain.__new__(Plain), "json", None, False)
    assert json.loads(stream.getvalue()) == {"class": "中"}


def test_paths_in_messages_keep_their_names():
    said = r"cannot write C:\runs\batch_size\log.csv or /runs/batch_size: batch_size"
    assert (
        run._with_flags(said, vggfeat_command.command)
        == r"cannot write C:\runs\batch_size\log.csv or /runs/batch_size: --batch-size"
    )


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
def test_a_reader_of_the_messages_that_goes_away_costs_no_picture(tmp_path):
    pictures = [str(REPO / "examples" / name) for name in ("content.jpg", "style.jpg")]
    words = [*pictures, "--size", "48", "--steps", "6", "--weights", "bundled", "-o", str(tmp_path / "p.png")]
    assert unheard("style", words) == 0
    assert (tmp_path / "p.png").stat().st_size > 500


@pytest.mark.skipif(os.name == "nt", reason="pipes break otherwise there")
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # for which click writes elsewhere
def test_a_reader_of_the_messages_that_goes_away_ends_no_run(labelled, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    assert unheard("main", ["train", "set.zip", *SMALL, "-o", "run"]) == 0
    assert len(Path("run/log.csv").read_text().splitlines()) == 3
    assert unheard("main", ["dream", "--weights", "random", "--layer", "conv1_2", "--steps=2", "--size=32"]) == 0
    assert unheard("main", ["dream", "--layer", "nothing"]) == 2


def unheard(module, words):
    """The exit status of a command whose stderr nobody reads any more."""
    read, write = os.pipe()
    code = f"from vggfeat_cli.{module} import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *words], stderr=write, stdout=subprocess.DEVNULL)
    os.close(write)
    os.close(read)
    return process.wait(timeout=120)

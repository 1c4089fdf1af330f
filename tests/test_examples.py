"""The shipped pictures, the script that makes them, and everything in the README that can be run or followed."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageStat
from vggfeat_cli import style as vggstyle_command

from vggfeat.image import read_settings

REPO = Path(__file__).resolve().parents[1]
EXAMPLES = REPO / "examples"
README = (REPO / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"^```python\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)]
SHIPPED = ("content.jpg", "style.jpg")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_pictures_are_small(name):
    assert (EXAMPLES / name).stat().st_size < 150_000
    with Image.open(EXAMPLES / name) as picture:
        assert (picture.format, picture.mode) == ("JPEG", "RGB") and max(picture.size) <= 512


def test_the_script_makes_the_shipped_pictures(tmp_path):
    pytest.importorskip("numpy")
    done = subprocess.run(
        [sys.executable, EXAMPLES / "make_images.py", tmp_path / "made"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == sorted(SHIPPED)
    for name in SHIPPED:
        with Image.open(tmp_path / "made" / name) as made, Image.open(EXAMPLES / name) as shipped:
            assert made.size == shipped.size
            # the noise comes from a seed, but JPEG encoders and drawing differ a little between releases of Pillow
            assert max(ImageStat.Stat(ImageChops.difference(made, shipped)).mean) < 4


@pytest.mark.parametrize(
    ("word", "code", "says"),
    [
        ("--help", 0, "--overwrite"),
        ("--hepl", 2, "unrecognized arguments: --hepl"),
        (".", 2, "style.jpg already exists; pass --overwrite"),
        ("style.jpg", 2, "cannot make the folder style.jpg"),
    ],
)
def test_the_script_that_makes_pictures_replaces_none(word, code, says, tmp_path, monkeypatch, capsys):
    pytest.importorskip("numpy")
    monkeypatch.chdir(tmp_path)
    Path("style.jpg").write_text("mine")
    monkeypatch.setattr(sys, "argv", ["make_images.py", word])
    with pytest.raises(SystemExit) as info:
        runpy.run_path(str(EXAMPLES / "make_images.py"), run_name="__main__")
    assert info.value.code == code and says in "".join(capsys.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["style.jpg"] and Path("style.jpg").read_text() == "mine"


def test_vggstyle_on_the_shipped_pictures_without_a_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [*(str(EXAMPLES / name) for name in SHIPPED), "--size", "48", "--start-size", "32", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["vggstyle", *words])
    with pytest.raises(SystemExit) as info:
        vggstyle_command.main()
    out, err = capsys.readouterr()
    assert (info.value.code, out) == (0, "content-style.png\n")
    assert "weights: bundled (imagenet weights for vgg19 are unavailable" in err
    with Image.open("content-style.png") as picture:
        assert picture.size == (48, 36)
    assert (read_settings("content-style.png") or {})["config"]["weights"] == "auto"


def test_the_readme_has_a_start_for_each_reader():
    assert len(BLOCKS) >= 3, "README.md needs a ```python block for each of its three readers"
    for name in ("PerceptualLoss", "stylize", "vgg16"):
        assert any(name in block for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{n}" for n in range(1, len(BLOCKS) + 1)])
def test_the_readme_runs_as_written(block, tmp_path, monkeypatch):
    """Except a block that begins with `# not run`; the pictures of examples/ are there, weights the bundled ones."""
    if block.startswith("# not run"):
        pytest.skip("says so itself")
    (tmp_path / "examples").mkdir()
    for name in SHIPPED:
        shutil.copy(EXAMPLES / name, tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VGGFEAT_WEIGHTS", "bundled")
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_the_readme_points_to_files_that_are_there():
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link}
    links |= set(re.findall(r"\bexamples/[\w./-]*\w", README))
    missing = sorted(link for link in links if link and not os.path.exists(REPO / link))
    assert not missing

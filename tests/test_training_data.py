"""What `vggfeat.training.data` reads, and the batches made of it."""

import hashlib
import math
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import tarfile
import warnings
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy
import pictures
import pytest
import torch
from PIL import Image

import vggfeat
from vggfeat.errors import ImageError, InputError, RunError
from vggfeat.training import batches as batches_module, data as data_module, readers as readers_module
from vggfeat.training.batches import Batches, normalised, scale_for, seeded, split_holdout
from vggfeat.training.cifar import read_cifar
from vggfeat.training.config import TrainConfig
from vggfeat.training.data import ImageSet, hashed, load_images, load_test_images
from vggfeat.training.distributed import World
from vggfeat.training.readers import Readers, ScaledImages
from vggfeat.weights import IMAGENET

CPU = torch.device("cpu")

# ── sources ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("where", ["folder", "around", "archive"])
def test_cifar_as_published(tmp_path, classes, version, where):
    name = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    parts, names = pictures.cifar(tmp_path / name, classes, version)
    path = {"folder": tmp_path / name, "around": tmp_path}.get(where) or pictures.archived(
        tmp_path / f"{name}.tar.gz", tmp_path / name
    )
    for found, (pixels, labels) in zip(load_images(path), parts, strict=True):
        assert found.classes == names and found.labels.tolist() == labels
        assert numpy.array_equal(found.pixels.permute(0, 3, 1, 2).reshape(-1, 3072).numpy(), pixels)
        assert numpy.array_equal(numpy.asarray(found.read(2)).transpose(2, 0, 1).ravel(), pixels[2])


def placed(kind, path, files):
    """The files in a folder, or in a zip beside it."""
    return pictures.folder(path, files) if kind == "folder" else pictures.zipped(path.with_suffix(".zip"), files)


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    pictures.cifar(tmp_path / "c")
    (tmp_path / "c" / "data_batch_3").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(InputError, match="not allowed"):
        load_images(tmp_path / "c")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "labels"])
def test_damaged_cifar_is_a_message(tmp_path, damage):
    pictures.cifar(tmp_path / "c", version="binary")
    file = tmp_path / "c" / "data_batch_2.bin"
    content = {"cut": file.read_bytes()[:-7], "empty": b"", "labels": b"\xff" + file.read_bytes()[1:]}[damage]
    file.write_bytes(content)
    with pytest.raises(InputError, match="CIFAR|whole number"):
        load_images(tmp_path / "c")


def test_cifar_whose_labels_do_not_fit_is_refused(tmp_path):
    pictures.cifar(tmp_path / "c", version="binary")
    file = tmp_path / "c" / "data_batch_2.bin"
    file.write_bytes(bytes([10]) + file.read_bytes()[1:])  # one more than the last of ten
    with pytest.raises(InputError, match="not CIFAR as published"):
        load_images(tmp_path / "c")
    pictures.cifar(tmp_path / "p")
    file = tmp_path / "p" / "data_batch_2"
    batch = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(batch | {b"labels": batch[b"labels"][:-1]}, protocol=2))
    with pytest.raises(InputError, match="29 labels"):
        load_images(tmp_path / "p")


def test_cifar_without_class_names_numbers_them(tmp_path):
    ((_, labels), (_, others)), _ = pictures.cifar(tmp_path / "c", version="binary")
    (tmp_path / "c" / "batches.meta.txt").unlink()
    train, test = read_cifar(tmp_path / "c")
    assert train.labels.tolist() == labels and test.labels.tolist() == others
    assert train.classes == [str(i) for i in range(max(labels) + 1)]


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("version", ["python", "binary"])
def test_cifar_without_one_of_its_files_says_which(tmp_path, classes, version):
    pictures.cifar(tmp_path / "c", classes, version)
    names = {10: ["data_batch_3", "test_batch"], 100: ["train", "test"]}[classes]
    names = [name + ".bin" for name in names] if version == "binary" else [*names, "batches.meta", "meta"]
    for gone in names:
        file = tmp_path / "c" / gone
        if not file.exists():
            continue
        content = file.read_bytes()
        file.unlink()
        with pytest.raises(InputError, match=f"is CIFAR without {gone}: fetch it again"):
            load_images(tmp_path / "c")
        file.write_bytes(content)


def test_class_folders_beside_files_called_as_cifars_are_class_folders(tmp_path):
    path = pictures.folder(tmp_path / "set", pictures.tree(2) | {"test": b"-", "meta": b"-", "data_batch_1": b"-"})
    assert len(load_images(path)[0]) == 6


def test_a_name_that_is_twice_in_a_zip_is_one_image(tmp_path):
    path = pictures.zipped(tmp_path / "set.zip", pictures.tree(2))
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, about the second
        for name, content in pictures.tree(2).items():
            archive.writestr(name, content)
    found, _ = load_images(path)
    assert len(found) == len({*found.names}) == 6


def test_images_too_large_for_memory_are_a_message():
    def read(number):
        raise MemoryError

    with pytest.raises(RunError, match="not enough memory for the images"):
        list(Readers(ScaledImages(read), 0).read([[(0, None)]]))


def test_an_empty_path_is_no_folder():
    with pytest.raises(InputError, match="no images at an empty path"):
        load_images("")


@pytest.mark.parametrize("kind", ["folder", "zip", "zip in folders"])
def test_class_folders(tmp_path, kind):
    picture = pictures.encoded(pictures.picture("bee", 9))
    files = pictures.tree(3) | {"bee/sub/deep.jfif": picture, "bee/notes.txt": b"-"}
    if kind == "folder":
        path = pictures.folder(tmp_path / "set", files | {".hidden/x.png": b"-"})
    else:
        before = "caltech/images/" if "in" in kind else ""
        named = {before + name: content for name, content in files.items()} | {"cover.png": picture}  # of no class
        path = pictures.zipped(tmp_path / "set.zip", named | {"__MACOSX/ant/._0.png": b"-"})
    found, test = load_images(path)
    assert test is None
    assert found.classes == ["ant", "bee", "cow"]
    assert found.labels.bincount().tolist() == [3, 4, 3]
    assert found.others == ["bee/notes.txt"] + ["cover.png"] * (kind == "zip")
    assert found.pixels.shape == (10, 32, 32, 3)
    for i in (0, 4, 9):
        assert numpy.array_equal(found.pixels[i].numpy(), numpy.asarray(found.read(i)))
    number = found.names.index("cow/1.png")
    assert numpy.array_equal(found.pixels[number].numpy(), numpy.asarray(pictures.picture("cow", 201)))


@pytest.mark.parametrize("second", ["test", "val"])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_train_and_test_in_one(tmp_path, kind, second):
    files = {f"train/{k}": v for k, v in pictures.tree(3).items()}
    files |= {f"{second}/{k}": v for k, v in pictures.tree(2, offset=50).items()}
    path = placed(kind, tmp_path / "s", files)
    train, test = load_images(path)
    assert (len(train), len(test)) == (9, 6)
    assert numpy.array_equal(test.pixels[0].numpy(), numpy.asarray(pictures.picture("ant", 50)))


def test_two_places(tmp_path):
    train, test = load_images(
        pictures.folder(tmp_path / "a", pictures.tree(3)), pictures.zipped(tmp_path / "b.zip", pictures.tree(1))
    )
    assert (len(train), len(test)) == (9, 3)


def test_a_split_by_other_names(tmp_path):
    files = {f"Train/{k}": v for k, v in pictures.tree(2).items()} | {
        f"Test/{k}": v for k, v in pictures.tree(1).items()
    }
    train, test = load_images(pictures.folder(tmp_path / "s", files))
    assert (len(train), len(test)) == (6, 3)
    pictures.folder(tmp_path / "s", {"Meta/0.png": pictures.encoded(pictures.picture("ant", 0))})
    with pytest.raises(
        InputError, match="has Meta, Test, Train, with folders in Test, Train alone: expected class folders"
    ):
        load_images(tmp_path / "s")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_split_in_three(tmp_path, kind):
    """What is tested during training is not what is tested at the end."""
    sizes = {"train": 3, "valid": 1, "Test": 2}
    files = {f"{part}/{k}": v for part, count in sizes.items() for k, v in pictures.tree(count).items()}
    path = placed(kind, tmp_path / "s", files)
    train, during = load_images(path)
    assert (len(train), len(during), len(load_test_images(path))) == (9, 3, 6)
    assert during.label == f"{path}/valid" and during.classes == train.classes == ["ant", "bee", "cow"]


@pytest.mark.parametrize(
    ("parts", "flat"),
    [
        (["train", "extra"], []),
        (["train"], ["test"]),  # images without labels
        (["train", "val"], ["test"]),
        (["val", "test"], []),
        (["train", "val", "valid"], []),
        (["train", "test", "testing"], []),
        (["train", "training", "test"], []),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_parts_do_not_pass_for_classes(tmp_path, parts, flat, kind):
    files = {f"top/{part}/{k}": v for part in parts for k, v in pictures.tree(1).items()}
    files |= {f"top/{part}/0.png": pictures.encoded(pictures.picture("ant", 0)) for part in flat}
    path = placed(kind, tmp_path / "s", files)
    alone = path / "top" / parts[0] if kind == "folder" else f"top/{parts[0]} unpacked"
    said = f"has {', '.join(sorted(parts + flat))}" + f", with folders in {', '.join(parts)} alone" * bool(flat)
    for load in (load_images, load_test_images):
        with pytest.raises(InputError, match=f"{said}: .* such as {re.escape(str(alone))} "):
            load(path)


def test_folders_without_images_are_no_parts(tmp_path):
    """Nor do they make a class a folder of classes."""
    files = {f"{part}/{k}": v for part in ("train", "test") for k, v in pictures.tree(1).items()}
    beside = {"val/ant/notes.txt": b"", "annotations/a.json": b""}
    train, test = load_images(pictures.folder(tmp_path / "s", files | beside))
    assert (len(train), len(test), test.label) == (3, 3, f"{tmp_path / 's'}/test")
    files = {name.replace("ant", "train"): content for name, content in pictures.tree(1).items()}
    train, test = load_images(pictures.folder(tmp_path / "t", files | {"train/meta/info.json": b""}))
    assert (train.classes, test) == (["bee", "cow", "train"], None)


def test_a_test_set_given_is_read_instead_of_ones_own(tmp_path):
    files = {f"train/{k}": v for k, v in pictures.tree(2).items()} | {f"val/{k}": b"no image" for k in pictures.tree(1)}
    train, test = load_images(pictures.folder(tmp_path / "a", files), pictures.folder(tmp_path / "b", pictures.tree(1)))
    assert (len(train), len(test)) == (6, 3)


def test_sets_can_be_sent_to_other_processes(tmp_path):
    files = pictures.tree(3) | {"ant/1.png": b"no image"}
    pictures.cifar(tmp_path / "c")
    for found in (
        load_images(pictures.folder(tmp_path / "s", files), bad_images="skip")[0],
        load_images(tmp_path / "c")[0],
    ):
        part = found.subset(torch.tensor([1, 3]))
        copy = pickle.loads(pickle.dumps(part))
        assert numpy.array_equal(numpy.asarray(copy.read(1)), numpy.asarray(found.read(3)))


def test_a_test_set_of_other_classes_is_refused(tmp_path):
    other = {name.replace("cow", "cat"): content for name, content in pictures.tree(1).items()}
    with pytest.raises(InputError, match="3 classes.*not in both: cat, cow"):
        load_images(pictures.folder(tmp_path / "a", pictures.tree(1)), pictures.folder(tmp_path / "b", other))


def test_nothing_there(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no images at"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="expected class folders"):
        load_images(tmp_path / "empty")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(InputError, match="no zip, or a damaged one"):
        load_images(tmp_path / "text.zip")
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.add(tmp_path / "text.zip", "test/ant.png")
    monkeypatch.setattr(tarfile.TarFile, "extractfile", None)  # of a file that may be of any size
    with pytest.raises(InputError, match="a tar without CIFAR's files, or a damaged one"):
        load_images(tmp_path / "other.tar")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_class_without_an_image_is_named(tmp_path, kind):
    files = pictures.tree(2)
    if kind == "folder":
        path = pictures.folder(tmp_path / "s", files)
        (path / "dodo").mkdir()
    else:
        path = pictures.zipped(tmp_path / "s.zip", files)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("dodo/", "")
    with pytest.raises(InputError, match="without an image: dodo"):
        load_images(path)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_unreadable_images_are_named_and_counted(tmp_path, kind):
    files = pictures.tree(3)
    files["ant/1.png"] = files["ant/1.png"][:60]
    files["cow/0.png"] = b"no image"
    path = placed(kind, tmp_path / "s", files)
    with pytest.raises(InputError, match=r"2 of 9 images cannot be read: .*ant/1\.png.*cow/0\.png.*--bad-images skip"):
        load_images(path)
    found, _ = load_images(path, bad_images="skip")
    assert found.skipped == {"ant/1.png": 0, "cow/0.png": 2}
    assert len(found) == len(found.names) == 7 and found.labels.bincount().tolist() == [2, 3, 2]
    number = found.names.index("ant/2.png")
    assert numpy.array_equal(found.pixels[number].numpy(), numpy.asarray(found.read(number)))
    assert numpy.array_equal(found.pixels[number].numpy(), numpy.asarray(pictures.picture("ant", 2)))


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_images_that_vanish_are_unreadable_images(tmp_path, kind):
    path = tmp_path / "set"
    pictures.folder(path, pictures.tree(2)) if kind == "folder" else pictures.zipped(path, pictures.tree(2))
    images, _ = load_images(path)
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(ImageError, match="set"):
        pickle.loads(pickle.dumps(images.read))(0)  # as in another process


class Killed(torch.utils.data.Dataset):
    """Ends whoever reads it, as where memory runs out."""

    def __getitem__(self, i):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="SIGKILL")
def test_a_worker_that_is_killed_is_an_error_that_says_so(tmp_path):
    with pytest.raises(RunError, match="a process that reads images was ended.*set workers lower"):
        list(Readers(Killed(), 1).read([[0], [1]]))


class Readings(torch.utils.data.Dataset):
    """Who reads an item, and which."""

    def __getitem__(self, i):
        return os.getpid(), i


@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & {*multiprocessing.get_all_start_methods()}))
def test_processes_that_read_stay_until_they_are_ended(method, monkeypatch):
    """A plan that is given up half way, of which more was read than was taken, leaves nothing to the next."""
    monkeypatch.setattr(readers_module, "_start_method", lambda: method)
    before, readers = set(multiprocessing.active_children()), Readers(Readings(), 2)
    assert set(multiprocessing.active_children()) == before
    first = [item for batch in readers.read([[i, i + 100] for i in range(20)]) for item in batch]
    given_up = readers.read([[i] for i in range(200, 220)])
    assert next(given_up)[0][1] == 200
    second = [item for batch in readers.read([[i] for i in range(300, 320)]) for item in batch]
    assert [i for _, i in first] == [number for i in range(20) for number in (i, i + 100)]
    assert [i for _, i in second] == [*range(300, 320)]
    processes = set(multiprocessing.active_children()) - before
    assert len(processes) == 2
    assert {process for process, _ in first} == {process for process, _ in second} == {each.pid for each in processes}
    readers.close()
    assert set(multiprocessing.active_children()) == before


def test_a_subset_by_numbers_and_by_a_mask(tmp_path):
    images, _ = load_images(pictures.folder(tmp_path, pictures.tree(3)))
    by_mask, by_number = images.subset(images.labels == 1), images.subset(torch.tensor([3, 4, 5]))
    assert by_mask.names == by_number.names == images.names[3:6] and torch.equal(by_mask.pixels, by_number.pixels)
    assert by_mask.read(2).tobytes() == images.read(5).tobytes() and by_mask.labels.tolist() == [1, 1, 1]


def test_a_damaged_zip_entry_is_an_unreadable_image(tmp_path):
    path = pictures.zipped(tmp_path / "s.zip", pictures.tree(2))
    content = bytearray(path.read_bytes())
    content[200] ^= 255  # in the first image, so that its checksum fails
    path.write_bytes(bytes(content))
    with pytest.raises(InputError, match="1 of 6 images cannot be read: .*ant/0.png: damaged in the archive"):
        load_images(path)


def test_a_class_of_which_nothing_can_be_read(tmp_path):
    files = pictures.tree(1) | {"bee/0.png": b"no image"}
    with pytest.raises(InputError, match="class bee"):
        load_images(pictures.folder(tmp_path / "s", files), bad_images="skip")


@pytest.mark.parametrize("kind", [pictures.folder, pictures.zipped])
def test_many_images_are_read_by_several_processes(tmp_path, kind, monkeypatch):
    """To the same set, and without drawing from the global generator."""
    files = pictures.tree(70)
    files["bee/33.png"] = b"no image"
    path, before = kind(tmp_path / "s", files), torch.get_rng_state()
    alone, _ = load_images(path, bad_images="skip")
    monkeypatch.setattr(data_module, "ALONE", 5)
    monkeypatch.setattr(data_module, "processes", lambda: 2)
    readers = []
    monkeypatch.setattr(data_module, "Readers", lambda *given: readers.append(given[1]) or Readers(*given))
    several, _ = load_images(path, bad_images="skip")
    assert readers == [2]
    assert several.skipped == alone.skipped == {"bee/33.png": 1} and several.names == alone.names
    assert torch.equal(several.pixels, alone.pixels) and len(alone.pixels) == 3 * 70 - 1
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(InputError, match=r"1 of 210 images cannot be read: .*bee/33.png"):
        load_images(path)
    pictures.folder(tmp_path / "more", pictures.tree(70) | {"cow/9.png": pictures.encoded(Image.new("RGB", (40, 36)))})
    assert load_images(tmp_path / "more")[0].pixels is None


def test_an_error_while_processes_read_ends_the_program():
    """They ignore the signal that Python ends them with."""
    code = """
import torch
from vggfeat.training.readers import Readers
class Numbers(torch.utils.data.Dataset):
    def __getitem__(self, i): return i
items = Readers(Numbers(), 2).read([[i] for i in range(1000)])
assert next(items) == [0]
raise RuntimeError("the items are still held")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and ended.stderr.strip().endswith("RuntimeError: the items are still held")


def test_images_of_several_sizes_stay_on_disk(tmp_path):
    files = pictures.tree(2) | {"ant/wide.png": pictures.encoded(pictures.picture("ant", 7, width=50))}
    path = pictures.folder(tmp_path / "s", files)
    assert load_images(path)[0].pixels is None
    assert load_images(path, resize=(32, 40))[0].pixels is None
    square = pictures.folder(tmp_path / "t", pictures.tree(2, width=64, height=64))
    assert load_images(square, resize=(40,))[0].pixels.shape == (6, 40, 40, 3)


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def ramp():
    """Twelve images whose pixel says where it is: red the row, green the column, blue the number of the image."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    pixels = torch.stack([torch.stack([rows, columns, torch.full_like(rows, i)], -1) for i in range(12)])
    labels = torch.arange(12) % 3
    from vggfeat.training.data import ImageSet

    return ImageSet("ramp", ["a", "b", "c"], labels, [str(i) for i in range(12)], None, pixels.byte())


def raw(images):
    """Back from normalised to 0..255, (n,H,W,3)."""
    mean, std = (torch.tensor(v) for v in (IMAGENET.mean, IMAGENET.std))
    return ((images.permute(0, 2, 3, 1) * std + mean) * 255).round().long()


def epoch(images, number=0, size=32, first=0, rank=0, world=1, **changes):
    config = TrainConfig(**{"batch_size": 4, "flip": "none", "pad": 0} | changes)
    return list(Batches(images, config, size, World(CPU, rank, world)).epoch(number, first))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_is_mixed_in_comes_before_it(ramp, world):
    """torchvision mixes each image with the one before it, the first with the last of the part, over all processes."""
    whole = [parts for parts in epoch(ramp, batch_size=8, accumulate=2, pad=4, cutout=8)]
    for rank in range(world):
        mixed = epoch(ramp, batch_size=8, accumulate=2, pad=4, cutout=8, rank=rank, world=world, mixup=0.5)
        for parts, all_parts in zip(mixed, whole, strict=True):
            for part, everything in zip(parts, all_parts, strict=True):
                size = 4 // world
                places = [(rank * size + i) % 4 for i in range(-(world > 1), size)]
                assert torch.equal(part.images, everything.images[places])
                assert torch.equal(part.labels, everything.labels[places])


def test_normalised_as_torchvision(torchvision):
    pixels = torch.randint(0, 256, (2, 5, 6, 3), dtype=torch.uint8)
    scaled = pixels.permute(0, 3, 1, 2).float() / 255
    expected = torchvision.transforms.functional.normalize(scaled, IMAGENET.mean, IMAGENET.std)
    torch.testing.assert_close(normalised(pixels), expected)


def test_kernels_get_the_convention_where_the_pixels_are(ramp, monkeypatch):
    """The device "cuda" is another one after `torch.cuda.set_device`, and what is kept by that name is on the first."""
    asked = []
    kernels = SimpleNamespace(crops=lambda pixels, drawn, size, *rest: torch.zeros(drawn.shape[1], 3, size, size))
    batches = Batches(ramp, TrainConfig(batch_size=4), 32, World(CPU))
    batches.kernels, batches.pixels = kernels, batches.pixels.to("meta")  # which stands for a device with a number
    monkeypatch.setattr(batches_module, "_convention", lambda device: asked.append(device.type) or (None, None))
    next(batches.epoch(0))
    assert asked == ["meta"]


def test_an_epoch_is_every_image_once(ramp):
    batches = [parts[0] for parts in epoch(ramp)]
    assert [b.images.shape for b in batches] == [(4, 3, 32, 32)] * 3
    assert all(b.images.is_contiguous(memory_format=torch.channels_last) for b in batches)
    numbers = torch.cat([raw(b.images)[:, 0, 0, 2] for b in batches])
    assert sorted(numbers.tolist()) == list(range(12))
    assert torch.equal(torch.cat([b.labels for b in batches]), numbers % 3)
    assert numbers.tolist() != torch.cat([raw(p[0].images)[:, 0, 0, 2] for p in epoch(ramp, 1)]).tolist()


def test_crops_are_windows_of_the_padded_image(ramp):
    seen = set()
    for number in range(6):
        for (batch,) in epoch(ramp, number, pad=4):
            for image in raw(batch.images):
                top, left = image[16, 16, 0] - 16, image[16, 16, 1] - 16
                seen.add(int(top))
                blue = image[16, 16, 2]
                full = torch.nn.functional.pad(ramp.pixels[blue].permute(2, 0, 1).long(), (4,) * 4, value=-1)
                window = full[:, top + 4 : top + 36, left + 4 : left + 36].permute(1, 2, 0)
                grey = torch.tensor(IMAGENET.mean).mul(255).round().long()
                assert torch.equal(image, torch.where(window < 0, grey, window))
    assert seen == set(range(-4, 5))


def test_reflected_padding_is_torchs(ramp):
    for (batch,) in epoch(ramp, pad=4, pad_mode="reflect"):
        for image in raw(batch.images):
            whole = ramp.pixels[int(image[0, 0, 2])].permute(2, 0, 1).float()
            full = torch.nn.functional.pad(whole[None], (4,) * 4, mode="reflect")[0].permute(1, 2, 0).long()
            found = [
                (top, left)
                for top in range(9)
                for left in range(9)
                if torch.equal(full[top : top + 32, left : left + 32], image)
            ]
            assert found


def test_smaller_crops(ramp):
    for (batch,) in epoch(ramp, size=20):
        for image in raw(batch.images):
            assert image.shape == (20, 20, 3)
            assert torch.equal(image[:, 0, 0] - image[0, 0, 0], torch.arange(20))
    with pytest.raises(InputError, match="smaller than size 64"):
        epoch(ramp, size=64)


def mirrored(images):
    return (raw(images)[:, 0, 0, 1] > raw(images)[:, 0, 31, 1]).tolist()


def test_random_flips_mirror_about_half(ramp):
    found = [
        m for number in range(40) for (batch,) in epoch(ramp, number, flip="random") for m in mirrored(batch.images)
    ]
    assert 0.4 < sum(found) / len(found) < 0.6


def test_alternating_flips_mirror_every_second_epoch(ramp):
    by_epoch = []
    for number in range(3):
        turned = {}
        for (batch,) in epoch(ramp, number, flip="alternating"):
            turned |= dict(zip(raw(batch.images)[:, 0, 0, 2].tolist(), mirrored(batch.images), strict=True))
        by_epoch.append([turned[i] for i in range(12)])
    assert by_epoch[0] == by_epoch[2] == [not turn for turn in by_epoch[1]]
    assert 0 < sum(by_epoch[0]) < 12


def test_cutout_blanks_a_square(ramp):
    sizes = set()
    for number in range(4):
        for (batch,) in epoch(ramp, number, cutout=8):
            for image in batch.images:
                blank = (image == 0).all(0)
                rows, columns = blank.any(1).nonzero(), blank.any(0).nonzero()
                height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
                assert blank.sum() == height * width <= 64
                sizes.add(int(height))
    assert max(sizes) == 8 and min(sizes) < 8  # at the border it is cut
    cut = set()  # where
    for number in range(40):
        for (batch,) in epoch(ramp, number, cutout=8):
            for rows in (batch.images == 0).all(1).any(2):
                if rows.sum() < 8:
                    cut.add("top" if rows[0] else "bottom" if rows[-1] else "elsewhere")
    assert cut == {"top", "bottom"}


def test_padding_is_the_mean_colour_from_files_too(tmp_path):
    images, _ = load_images(pictures.folder(tmp_path, pictures.tree(4)))
    images.pixels = None
    seen = False
    for number in range(4):
        for (batch,) in epoch(images, number, pad=4, resize=(32,), workers=0):
            edges = batch.images[:, :, 0]
            padded = edges.abs().amax((1, 2)) < 0.02
            assert (edges[~padded].abs().amax((1, 2)) > 0.2).all()
            seen |= bool(padded.any())
    assert seen
    assert scale_for(224) == 256  # as published networks were tested


@pytest.mark.parametrize("in_memory", [True, False])
def test_trivialaugment_alters_each_image_before_it_is_a_batch(tmp_path, monkeypatch, torchvision, in_memory):
    from torchvision.transforms import v2

    made = pictures.folder(tmp_path, pictures.tree(4))
    images, _ = load_images(made)
    if not in_memory:
        images.pixels = None
    options = {"resize": None if in_memory else (32,), "workers": 0}
    plain = torch.cat([raw(b.images) for (b,) in epoch(images, **options)])
    state = torch.get_rng_state()
    several = [
        torch.cat([raw(b.images) for (b,) in epoch(images, number, augment="trivialaugment", **options)])
        for number in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), state)  # which is the caller's
    assert torch.equal(several[0], several[1])
    changed = (several[0] != plain).flatten(1).any(1)
    assert changed.sum() > 4  # one operation is none, others may be of strength 0
    sets = [{tuple(image.flatten().tolist()) for image in each} for each in several[1:]]
    assert len(sets[0] & sets[1]) < 4

    monkeypatch.setattr(v2.TrivialAugmentWide, "forward", lambda self, x: v2.functional.invert(x))
    inverted = torch.cat([raw(b.images) for (b,) in epoch(images, augment="trivialaugment", **options)])
    assert torch.equal(inverted, 255 - plain)


@pytest.fixture(params=["none", "trivialaugment"])
def options(request):
    """Every augmentation there is."""
    if request.param != "none":
        request.getfixturevalue("torchvision")
    return {"pad": 4, "flip": "random", "cutout": 4, "augment": request.param}


def test_accumulation_parts_the_same_batch(ramp, options):
    for (whole,), parts in zip(epoch(ramp, **options), epoch(ramp, accumulate=2, **options), strict=True):
        assert [len(p.labels) for p in parts] == [2, 2]
        assert torch.equal(torch.cat([p.images for p in parts]), whole.images)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_part_the_same_batch(ramp, options, world):
    parts = [epoch(ramp, rank=rank, world=world, **options) for rank in range(world)]
    for step, (whole,) in enumerate(epoch(ramp, **options)):
        assert torch.equal(torch.cat([part[step][0].images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part[step][0].labels for part in parts]), whole.labels)


def test_going_on_in_the_middle_of_an_epoch(ramp, options):
    whole = epoch(ramp, 3, **options)
    rest = epoch(ramp, 3, first=2, **options)
    assert len(rest) == 1 and torch.equal(rest[0][0].images, whole[2][0].images)


def test_seeds(ramp):
    def images(**changes):
        return torch.cat([b.images for (b,) in epoch(ramp, pad=4, flip="random", **changes)])

    assert torch.equal(images(), images())
    assert not torch.equal(images(), images(seed=1))
    streams = {
        tuple(torch.rand(3, generator=seeded(*n)).tolist()) for n in [(0,), (1,), (0, 0), (0, 1), (1, 0), (2, -1)]
    }
    assert len(streams) == 6


def test_batches_that_cannot_be(ramp):
    with pytest.raises(InputError, match="12 images, fewer than batch_size 16"):
        epoch(ramp, batch_size=16)
    with pytest.raises(InputError, match="is not divisible by 3"):
        epoch(ramp, world=3)


@pytest.fixture
def mixed(tmp_path):
    """Images of two sizes, so that they are read in every epoch."""
    files = pictures.tree(4, width=48, height=40) | {
        "ant/tall.png": pictures.encoded(pictures.picture("ant", 7, 40, 60))
    }
    return files, tmp_path / "s"


@pytest.mark.parametrize("workers", [0, 2])
def test_images_read_in_every_epoch(mixed, workers, torchvision):
    found, _ = load_images(pictures.folder(mixed[1], mixed[0]))
    options = {"resize": (32, 36), "pad": 2, "flip": "random", "workers": workers}
    batches = epoch(found, size=32, **options)
    assert [b.images.shape for (b,) in batches] == [(4, 3, 32, 32)] * 3
    again = epoch(found, size=32, first=1, **options | {"workers": 0})
    assert torch.equal(again[0][0].images, batches[1][0].images)  # whoever reads them, and wherever it begins
    for (batch,) in batches:  # each class has its colour
        strongest = raw(batch.images).float().mean((1, 2)).argmax(1)
        assert torch.equal(strongest, batch.labels)


def test_an_image_that_fails_on_the_way(mixed, torchvision):
    files = mixed[0] | {"cow/1.png": b"no image"}
    found, _ = load_images(pictures.folder(mixed[1], files), bad_images="skip")
    options = {"resize": (32,), "workers": 0, "batch_size": 13}
    with pytest.raises(RunError, match=r"cow/1\.png.*--bad-images skip"):
        epoch(found, **options)
    config = TrainConfig(flip="none", pad=0, bad_images="skip", **options)
    batches = Batches(found, config, 32, World(CPU))
    ((batch,),) = batches.epoch(0)
    assert len(batches.skipped) == 1 and "cow/1.png" in next(iter(batches.skipped))
    assert len(batch.labels) == 13  # another in its place


def test_batches_with_images_that_fail_do_not_depend_on_processes(mixed, torchvision):
    files = mixed[0] | {"cow/1.png": b"no image", "ant/0.png": b"nor this"}
    found, _ = load_images(pictures.folder(mixed[1], files), bad_images="skip")
    options = {"bad_images": "skip", "resize": (32, 36), "workers": 0, "batch_size": 12, "flip": "alternating"}
    ((whole,),) = epoch(found, **options)
    for name in ("images", "labels"):
        parts = [getattr(epoch(found, rank=rank, world=2, **options)[0][0], name) for rank in (0, 1)]
        assert torch.equal(torch.cat(parts), getattr(whole, name))


def test_images_are_brought_to_just_the_size_of_crops(tmp_path, torchvision):
    sides = [(49, 60), (98, 131), (161, 103), (197, 206), (32, 50), (40, 33)]  # 32 / 49 * 49 is a little less than 32
    files = {f"ant/{i}.png": pictures.encoded(pictures.picture("ant", i, *side)) for i, side in enumerate(sides)}
    images, _ = load_images(pictures.folder(tmp_path, files))
    ((batch,),) = epoch(images, resize=(32,), pad=0, workers=0, batch_size=len(sides))
    assert batch.images.shape == (len(sides), 3, 32, 32)


def test_every_scale_of_a_range_is_drawn(mixed, torchvision, monkeypatch):
    """Of resize=(32, 36) both ends, too: scale jittering, section 3.1 of the paper."""
    drawn, real = [], batches_module.scaled
    monkeypatch.setattr(batches_module, "scaled", lambda image, side: (drawn.append(side), real(image, side))[1])
    found, _ = load_images(pictures.folder(mixed[1], mixed[0]))
    for number in range(8):
        epoch(found, number, resize=(32, 36), workers=0)
    assert set(drawn) == {32, 33, 34, 35, 36}


def test_a_whole_class_that_cannot_be_read_is_left_out(mixed, torchvision):
    files = mixed[0] | {name: b"no image" for name in mixed[0] if name.startswith("bee/")}
    found, _ = load_images(pictures.folder(mixed[1], files), bad_images="skip")
    ((batch,),) = epoch(found, bad_images="skip", resize=(32,), workers=0, batch_size=13)
    assert set(batch.labels.tolist()) == {0, 2}


def test_a_set_that_cannot_be_read_any_more(mixed, torchvision, monkeypatch):
    found, _ = load_images(pictures.folder(mixed[1], mixed[0]))
    for path in mixed[1].rglob("*.png"):
        path.write_bytes(b"gone")
    with pytest.raises(RunError, match=r"of 1000 images drawn none can be read, such as .*\.png"):
        epoch(found, bad_images="skip", resize=(32,), workers=0)


def test_a_class_of_one_image_is_trained_on(tmp_path):
    from vggfeat.training.batches import split_holdout

    files = {
        name: content for name, content in pictures.tree(5).items() if name.startswith("ant") or name == "bee/0.png"
    }
    images, _ = load_images(pictures.folder(tmp_path, files))
    train, test = split_holdout(images, 0.6, 0)
    assert sorted(train.labels.tolist()) == [0, 0, 1] and test.labels.tolist() == [0, 0, 0]


def test_a_split_set_is_the_whole(tmp_path):
    from vggfeat.training.batches import split_holdout

    found, _ = load_images(pictures.folder(tmp_path / "s", pictures.tree(8)))
    train, test = split_holdout(found, 0.25, 0)
    assert (len(train), len(test)) == (18, 6)
    assert test.labels.bincount().tolist() == [2, 2, 2]
    assert sorted([*train.names, *test.names]) == sorted(found.names)
    for part in (train, test):
        i = 3
        assert numpy.array_equal(part.pixels[i].numpy(), numpy.asarray(part.read(i)))
        assert part.names[i].startswith(found.classes[part.labels[i]])


def test_a_split_that_leaves_nothing_to_train_on(tmp_path):
    from vggfeat.training.batches import split_holdout

    files = {name: content for name, content in pictures.tree(2).items()}
    name = next(name for name in files if name.startswith("bee/"))
    found, _ = load_images(pictures.folder(tmp_path / "s", files | {name: b"junk"}), bad_images="skip")
    for seed in range(8):  # of which some hold out the good image
        try:
            train, _ = split_holdout(found, 0.5, seed)
        except InputError as error:
            assert "holdout 0.5 leaves no image of class bee that can be read to train on: lower it" in str(error)
            break
        assert set(train.labels.tolist()) == {0, 1, 2}
    else:
        pytest.fail("no seed held it out")


@pytest.mark.parametrize("bad", ["bee/3.png", "ant/0.png", "cow/7.png"])
def test_a_split_does_not_depend_on_what_can_be_read(tmp_path, bad):
    from vggfeat.training.batches import split_holdout

    whole, _ = load_images(pictures.folder(tmp_path / "s", pictures.tree(8)))
    parts = split_holdout(whole, 0.25, 0)
    (tmp_path / "s" / bad).write_bytes(b"no image")
    found, _ = load_images(tmp_path / "s", bad_images="skip")
    for part, less in zip(parts, split_holdout(found, 0.25, 0), strict=True):
        assert less.names == [name for name in part.names if name != bad]
        assert [*less.skipped] == [bad] * (bad in part.names) and less.digest == part.digest


def test_settings_that_cannot_be():
    for changes, said in (
        ({"epochs": 0}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"optimizer": "sdg"}, "did you mean sgd"),
        ({"batch_size": 10, "accumulate": 3}, "not divisible"),
        ({"warmup": 20.0}, "warmup"),
        ({"size": 16}, "size"),
        ({"resize": (64, 32)}, "resize"),
        ({"resize": (27, 64), "pad": 2, "size": 32}, "resize 27 with pad 2 is smaller than size 32"),
        ({"seed": 2**63}, "seed"),
        ({"lr": math.inf}, "lr must be a positive number"),
        ({"freeze": "conv1_1"}, "freeze needs weights"),
        ({"new_head": True}, "new_head needs weights"),
        ({"weights": "bundled", "width": 0.5}, "width"),
        ({"dropout": 1.0}, "dropout"),
        ({"label_smoothing": float("nan")}, "label_smoothing"),
        ({"nesterov": True, "optimizer": "adam"}, "nesterov"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"arch": "vgg17"}, "vgg17"),
    ):
        with pytest.raises(InputError, match=said):
            TrainConfig(**changes)
    TrainConfig(resize=(28,), pad=2, size=32, seed=2**63 - 1, warmup=19.9)  # which just fit
    with pytest.raises(InputError, match="did you mean fast"):
        vggfeat.recipe("fats")
    with pytest.raises(InputError, match="did you mean epochs"):
        vggfeat.recipe("fast", epoch=3)


def test_recipes_say_what_chapter_and_paper_say():
    chapter = vggfeat.recipe("chapter")
    assert (chapter.optimizer, chapter.lr, chapter.weight_decay, chapter.batch_size) == ("adam", 1e-3, 5e-4, 64)
    assert (chapter.epochs, chapter.schedule, chapter.step_size, chapter.gamma) == (100, "step", 30, 0.1)
    assert (chapter.pad, chapter.flip, chapter.head, chapter.dropout) == (4, "random", "paper", 0.5)
    paper = vggfeat.recipe("paper")
    assert (paper.optimizer, paper.lr, paper.momentum, paper.weight_decay) == ("sgd", 1e-2, 0.9, 5e-4)
    assert (paper.batch_size, paper.epochs, paper.dropout, paper.gamma) == (256, 74, 0.5, 0.1)
    assert (paper.head, paper.pad, paper.schedule, paper.flip) == ("paper", 0, "step", "random")
    assert chapter.decay_all and paper.decay_all  # neither knows of exceptions
    assert (paper.epochs - 1) // paper.step_size == 3  # the rate is divided three times
    assert vggfeat.recipe("paper", epochs=3).epochs == 3


def test_steps_are_shorter_without_batch_normalisation():
    archs = (None, "vgg16_bn", "A-LRN", "vgg11", "vgg13", "vgg16", "vgg19")
    fast = {arch: vggfeat.recipe("fast", arch=arch).lr for arch in archs}
    assert fast[None] == fast["vgg16_bn"] > fast["vgg11"] == fast["A-LRN"] == 0.02
    assert fast["vgg11"] > fast["vgg13"] > fast["vgg16"] == 0.0076 > fast["vgg19"] == 0.005  # as 1 / layers²
    assert vggfeat.recipe("fast", arch="vgg16", lr=0.3).lr == 0.3
    assert vggfeat.recipe("paper", arch="vgg16").lr == vggfeat.recipe("paper", arch="vgg16_bn").lr


def test_pictures_are_what_they_are_called():
    assert isinstance(pictures.picture("ant", 0), Image.Image)
    assert not numpy.array_equal(numpy.asarray(pictures.picture("ant", 0)), numpy.asarray(pictures.picture("ant", 1)))


def test_a_set_in_memory_is_brought_to_size(tmp_path):
    source = pictures.folder(tmp_path / "a", pictures.tree(3))
    images, _ = load_images(source)
    large, _ = load_images(images, resize=(64,))
    again, _ = load_images(source, resize=(64,))
    assert large.pixels.shape[1:3] == (64, 64) and torch.equal(large.pixels, again.pixels)
    assert images.pixels.shape[1:3] == (32, 32)  # the one that was given stays as it is


def test_every_step_and_epoch_draws_anew(ramp):
    """Where crops begin, and which images are mirrored: never the same for the places of two batches."""
    crops = [
        (raw(batch.images)[:, 16, 16, :2] - 16).tolist()
        for number in range(3)
        for (batch,) in epoch(ramp, number, pad=4)
    ]
    assert all(crops.count(each) == 1 for each in crops)
    turns = [[mirrored(batch.images) for (batch,) in epoch(ramp, number, flip="random")] for number in range(3)]
    assert all(each != [each[0]] * 3 for each in turns) and turns[0] != turns[1]


def test_scales_that_no_crop_fits_are_refused(mixed, torchvision):
    found, _ = load_images(pictures.folder(mixed[1], mixed[0]))
    with pytest.raises(InputError, match="resize 31 with pad 0 is smaller than size 32"):
        epoch(found, resize=(31,))


def numbered(count=12, classes=3, read=None):
    pixels = torch.zeros(count, 32, 32, 3, dtype=torch.uint8)
    pixels[..., 2] = torch.arange(count, dtype=torch.uint8)[:, None, None]
    labels = torch.arange(count) % classes
    return ImageSet("ramp", [str(i) for i in range(classes)], labels, [str(i) for i in range(count)], read, pixels)


def test_a_holdout_is_the_nearest_number_of_each_class():
    train, test = split_holdout(numbered(38, 2), 0.1, 0)  # 0.1 · 19 = 1.9
    assert test.labels.bincount().tolist() == [2, 2] and len(train) == 34


def test_other_files_are_of_the_training_part_alone(tmp_path):
    found, _ = load_images(pictures.folder(tmp_path, pictures.tree(8) | {"ant/notes.txt": b"x"}))
    train, test = split_holdout(found, 0.25, 0)
    assert (train.others, test.others) == (["ant/notes.txt"], [])


def test_random_operations_differ_between_epochs_and_seeds(monkeypatch, torchvision):
    """TrivialAugment draws its operations, and which images share one, anew in every epoch."""
    from torchvision.transforms import v2

    drawn, groups = [], []

    def forward(self, x):
        drawn.append(int(torch.randint(1 << 30, ())))
        groups.append(frozenset(x[:, 2, 0, 0].tolist()))
        return x

    monkeypatch.setattr(v2.TrivialAugmentWide, "forward", forward)
    monkeypatch.setattr(batches_module, "OPERATIONS", 4)
    for seed, number in ((0, 0), (0, 1), (1, 0)):
        epoch(numbered(), number, augment="trivialaugment", seed=seed)
    assert len(drawn) == len({*drawn}) == 12
    assert {*groups[:4]} != {*groups[4:8]} and {*groups[:4]} != {*groups[8:]}


def _read(batches, epoch):
    order = torch.arange(12).view(3, 4)
    read = list(batches._read(batches.readers, order, epoch, range(3)))
    return torch.cat([numbers for numbers, _ in read]), torch.cat([crops for _, crops in read])


def test_an_image_that_is_read_is_cropped_elsewhere_in_another_epoch_and_by_another_seed(torchvision):
    """Of a set that is read from files: red is the row that a crop begins with, green the column."""
    from PIL import Image

    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    whole = Image.fromarray(torch.stack([rows, columns, rows], -1).byte().numpy())
    images = numbered(read=lambda i: whole)
    images.pixels = None
    corners = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        config = TrainConfig(batch_size=4, flip="none", pad=0, resize=(64,), workers=0, seed=seed)
        numbers, crops = _read(Batches(images, config, 32, World(CPU)), epoch)
        corners.append({int(n): tuple(c[:2, 0, 0].tolist()) for n, c in zip(numbers, crops, strict=True)})
    assert all(len({*each.values()}) > 8 for each in corners)  # of one epoch
    for other in corners[1:]:
        assert sum(corners[0][n] == other[n] for n in range(12)) < 3  # one in 33² by chance


def test_padding_may_make_up_for_a_small_scale(tmp_path, torchvision):
    images, _ = load_images(pictures.folder(tmp_path, pictures.tree(4)))
    images.pixels = None
    config = TrainConfig(batch_size=4, flip="none", pad=2, resize=(28,), workers=0)
    batches = list(Batches(images, config, 32, World(CPU)).epoch(0))
    assert [part.images.shape for (part,) in batches] == [(4, 3, 32, 32)] * 3


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"),
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("TRAIN", "eval"),
        ("train2017", "val2017"),
        ("Train Set 2017", "val_images_2"),
        ("train-images", "Validation Images"),
    ],
)
def test_folders_for_training_and_test_by_their_usual_names(tmp_path, train, test):
    files = {f"{train}/{name}": content for name, content in pictures.tree(2).items()}
    files |= {f"{test}/{name}": content for name, content in pictures.tree(1).items()}
    first, second = load_images(pictures.folder(tmp_path / "s", files))
    assert (len(first), len(second), first.classes) == (6, 3, ["ant", "bee", "cow"])
    more = files | {f"test_more/{name}": content for name, content in pictures.tree(1).items()}
    with pytest.raises(InputError, match=r"and to train, another as test=FOLDER, --test FOLDER"):
        load_images(pictures.folder(tmp_path / "t", more))


def test_classes_may_be_called_like_one_of_them(tmp_path):
    files = {
        f"{kind}/{i}.png": pictures.encoded(pictures.picture("ant", i)) for kind in ("train", "plane") for i in (1, 2)
    }
    first, second = load_images(pictures.folder(tmp_path / "s", files))
    assert first.classes == ["plane", "train"] and second is None
    files = {name.replace("plane", "test set"): content for name, content in files.items()}
    first, second = load_images(pictures.folder(tmp_path / "t", files))
    assert first.classes == ["test set", "train"] and second is None


# ── what tells sets apart, and how much is read ───────────────────────────────────────────────────────────────────────


def test_the_default_side_is_the_shorter_one(tmp_path):
    for width, height in ((40, 24), (24, 40)):
        files = pictures.tree(1, width=width, height=height)
        assert load_images(pictures.folder(tmp_path / f"{width}", files))[0].side == 24


def test_a_digest_is_a_hash_of_sorted_names_and_labels():
    """Names may be of any bytes; what was left out counts."""
    images = replace(numbered(2), names=["b", "\udcff"], skipped={"a": 2})
    assert images.digest == hashlib.sha256(b"a\0002\nb\0000\n\xff\0001\n").hexdigest()


def test_sizes_are_those_of_files_spread_over_the_set(monkeypatch):
    monkeypatch.setattr(data_module, "SIZES", 3)
    images = replace(numbered(6), size_of=int, skipped={"6": 0})  # each file as large as its name says
    assert images.sizes == hashed("0\n3\n6\n")
    assert replace(images, skipped={}).sizes == hashed("0\n2\n4\n")
    assert images.subset(torch.tensor([2, 1])).sizes == hashed("1\n2\n")
    assert numbered().sizes is None


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_sizes_are_those_of_unpacked_files(tmp_path, kind):
    files = {f"ant/{i}.png": pictures.encoded(Image.new("RGB", (100 + i, 100))) + bytes(1000) for i in range(3)}
    path = pictures.folder(tmp_path / "s", files)
    if kind == "zip":
        path = tmp_path / "s.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    images, _ = load_images(path)
    assert images.sizes == hashed("".join(f"{len(content)}\n" for content in files.values()))
    assert images.size_of("ant/3.png") == -1  # which never was there
    sent = pickle.dumps(images)
    del images  # and with it the open zip
    path.rename(tmp_path / "elsewhere")
    assert pickle.loads(sent).sizes == hashed("-1\n" * 3)


def test_of_a_place_for_the_test_set_its_test_part_is_taken(tmp_path):
    """And the rest is not read; both sets are brought to size."""
    train = pictures.folder(tmp_path / "a", pictures.tree(3))
    files = {f"test/{name}": content for name, content in pictures.tree(2, offset=50).items()}
    both = pictures.folder(tmp_path / "b", files | {f"train/{name}": b"no image" for name in pictures.tree(4)})
    _, test = load_images(train, both, resize=(16,))
    assert len(test) == 6 and test.pixels.shape[1:3] == (16, 16)
    assert load_test_images(both).names == test.names


def test_what_was_left_out_stays_so_at_another_size(tmp_path):
    files = pictures.tree(2) | {"bee/bad.png": b"no image"}
    images, _ = load_images(pictures.folder(tmp_path, files), bad_images="skip")
    assert load_images(images, resize=(16,))[0].skipped == {"bee/bad.png": 1}


def test_of_many_unreadable_images_five_are_named(tmp_path):
    path = pictures.folder(tmp_path, dict.fromkeys(pictures.tree(2), b"no image"))
    for bad_images in ("fail", "skip"):  # where nothing is left
        with pytest.raises(InputError, match=r"6 of 6 images cannot be read: .*cow/0\.png.* …; fix") as info:
            load_images(path, bad_images=bad_images)
        assert "cow/1.png" not in str(info.value)


def test_images_are_scaled_as_by_torchvision(torchvision):
    image = pictures.picture("ant", 0, 90, 60)
    expected = torchvision.transforms.functional.resize(image, 40)  # bilinear
    assert readers_module.scaled(image, 40).tobytes() == expected.tobytes() and expected.size == (60, 40)


@pytest.mark.parametrize(
    ("threads", "cpus", "method", "daemon", "expected"),
    [
        (16, 16, "fork", False, 8),
        (16, 6, "fork", False, 6),
        (4, 16, "fork", False, 4),
        (3, 16, "fork", False, 0),
        (16, 16, "spawn", False, 0),
        (16, 16, "fork", True, 0),  # which may have no children
    ],
)
def test_how_many_processes_read(monkeypatch, threads, cpus, method, daemon, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    monkeypatch.setattr(readers_module, "_start_method", lambda: method)
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(daemon=daemon))
    assert readers_module.processes() == expected


# ── what is drawn ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_seeds_are_mixed_by_splitmix64():
    """Whose first values from 0 and from 1234567 are published."""
    assert seeded(0).initial_seed() == 0xE220A8397B1DCDAF % 2**63
    assert seeded(1234567).initial_seed() == 6457827717110365317


@pytest.mark.parametrize(
    ("drawn", "changes"),
    [
        (lambda images: raw(images)[:, 16, 16, 2].tolist(), {}),  # the order
        (lambda images: raw(images)[:, 16, 16, :2].tolist(), {"pad": 4}),
        (mirrored, {"flip": "random"}),
        (
            lambda images: torch.tensor(mirrored(images))[raw(images)[:, 0, 0, 2].argsort()].tolist(),
            {"flip": "alternating"},
        ),
        (lambda images: (images == 0).all(1).tolist(), {"cutout": 8}),
    ],
    ids=["order", "crops", "random flips", "alternating flips", "cutout"],
)
def test_the_seed_decides_all_that_is_drawn(ramp, drawn, changes):
    first, again, other = (
        drawn(torch.cat([batch.images for (batch,) in epoch(ramp, seed=seed, **changes)])) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_holdout_is_drawn_by_the_seed():
    first, again, other = (split_holdout(numbered(60), 0.25, seed)[1].names for seed in (0, 0, 1))
    assert first == again != other


def test_a_holdout_of_nothing_is_refused():
    with pytest.raises(InputError, match=r"holdout 0.1 of 12 images sets aside no image: raise it"):
        split_holdout(numbered(), 0.1, 0)  # 0.1 · 4 of each class


@pytest.mark.parametrize(("accumulate", "fewer"), [(1, 6), (4, 4), (8, 8)])
def test_a_batch_size_that_fits_is_an_eighth_of_the_images(accumulate, fewer):
    """And divisible as it has to be."""
    with pytest.raises(InputError, match=f"50 images, fewer than batch_size 64: .* to {fewer}$"):
        epoch(numbered(50), batch_size=64, accumulate=accumulate)


def test_parts_are_of_each_process():
    with pytest.raises(InputError, match=r"batch_size 4 is not divisible by 8 \(processes × accumulate\)"):
        epoch(numbered(), accumulate=4, world=2)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("pad_mode", ["zeros", "reflect"])
@pytest.mark.parametrize(("height", "width"), [(24, 40), (40, 24)])
def test_crops_of_images_that_are_not_square(height, width, pad_mode, in_memory, request):
    """Windows of what torch pads, each of them in time."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    pixels = torch.stack([rows, columns, rows], -1).byte().repeat(12, 1, 1, 1)
    images = replace(numbered(), pixels=pixels, read=data_module._Pixels(pixels))
    mode = {"zeros": "constant", "reflect": "reflect"}[pad_mode]
    whole = torch.nn.functional.pad(normalised(pixels[:1]), (4,) * 4, mode)
    options = {"pad": 4, "pad_mode": pad_mode}
    if not in_memory:
        request.getfixturevalue("torchvision")
        images.pixels, options = None, options | {"resize": (24,), "workers": 0}
    (whole,), tops, lefts = raw(whole), set(), set()
    for number in range(20):
        for (batch,) in epoch(images, number, size=20, **options):
            for image in raw(batch.images):
                top, left = (image[10, 10, :2] - 6).tolist()
                assert torch.equal(image, whole[top : top + 20, left : left + 20])
                tops.add(top)
                lefts.add(left)
    assert tops == {*range(height - 11)} and lefts == {*range(width - 11)}
    options["resize"] = None if in_memory else (24,)
    said = f"images of {width}×{height} with pad 0 are" if in_memory else "resize 24 with pad 0 is"
    with pytest.raises(InputError, match=f"{said} smaller than size 32"):
        epoch(images, **options | {"pad": 0})


@pytest.mark.parametrize("side", [1, 3, 8])
def test_a_blank_square_may_be_around_any_pixel(ramp, side):
    """As far as it is inside the image: `side // 2` pixels before that one, the others behind it."""
    starts = [middle - side // 2 for middle in range(32)]
    expected = {(max(0, start), min(32, start + side)) for start in starts}
    rows, columns = set(), set()
    for number in range(40):
        for (batch,) in epoch(ramp, number, cutout=side):
            for blank in (batch.images == 0).all(1):
                for found, lines in ((rows, blank.any(1)), (columns, blank.any(0))):
                    found.add((int(lines.nonzero()[0]), int(lines.nonzero()[-1]) + 1))
    assert rows == columns == expected


def test_images_read_one_by_one_are_brought_to_8_7_of_the_crops(mixed, torchvision, monkeypatch):
    drawn, real = set(), batches_module.scaled
    monkeypatch.setattr(batches_module, "scaled", lambda image, side: (drawn.add(side), real(image, side))[1])
    found, _ = load_images(pictures.folder(mixed[1], mixed[0]))
    epoch(found, size=28, workers=0)
    assert drawn == {32}

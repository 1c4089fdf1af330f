"""Images with labels: CIFAR as it is published, folders of class folders, and zips of them read in place."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import itertools
import math
import os
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vggfeat.devices import ASSUMED_MEMORY, total_memory
from vggfeat.errors import ImageError, InputError
from vggfeat.files import PathLike
from vggfeat.image import SUFFIXES, open_image
from vggfeat.training.cifar import cifar_files, missing_files, read_cifar
from vggfeat.training.readers import Readers, ScaledImages, processes

TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev")
TEST = ("test", "testing", "eval", "evaluation")
LEAVE_OUT = "leave such images out with bad_images='skip' (--bad-images skip)"
NAMED = 5  # images, classes or folders that a message names at most
SIZES = 1000  # files whose sizes are looked at, at most
ALONE = 2000  # images that are read by one process: so many take half a second


@dataclass
class ImageSet:
    """Images with labels.

    Attributes:
        label: what a person calls it.
        classes: their names, in the order of the labels.
        labels: (N,) int64.
        names: of the images, for messages.
        read: gives image number i, RGB.
        pixels: (N,H,W,3) uint8 where all of them are in memory, else None.
        skipped: of those that could not be read and were left out, the label by name.
        others: files that were left out: in class folders without an image suffix, or with one beside these folders.
        size_of: gives the size in bytes of the file of that name, where there are files.
    """

    label: str
    classes: list[str]
    labels: Tensor = field(repr=False)
    names: Sequence[str] = field(repr=False)
    read: Callable[[int], Image.Image] = field(repr=False)
    pixels: Tensor | None = field(default=None, repr=False)
    skipped: dict[str, int] = field(default_factory=dict, repr=False)
    others: list[str] = field(default_factory=list, repr=False)
    size_of: Callable[[str], int] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def side(self) -> int:
        """Default side of square crops: the images' own where they are in memory, else 224."""
        return 224 if self.pixels is None else min(self.pixels.shape[1:3])

    @property
    def everything(self) -> list[tuple[str, int, int]]:
        """Name, label and number of all images, sorted; those that were left out have the number -1."""
        read = zip(self.names, self.labels.tolist(), range(len(self)), strict=True)
        return sorted([*read, *((name, label, -1) for name, label in self.skipped.items())])

    @property
    def digest(self) -> str:
        """A hash of names and labels, to tell sets apart, whether all of their images can be read or not."""
        return hashed("".join(f"{name}\0{label}\n" for name, label, _ in self.everything))

    @property
    def sizes(self) -> str | None:
        """A hash of the sizes of some files, None without any: names such as 0001.png are those of many sets."""
        if self.size_of is None:
            return None
        names = sorted({*self.names, *self.skipped})
        return hashed("".join(f"{self.size_of(name)}\n" for name in names[:: math.ceil(len(names) / SIZES) or 1]))

    def subset(self, chosen: Tensor) -> ImageSet:
        """The images of these numbers, or where a mask (N,) is True."""
        chosen = chosen.nonzero().flatten() if chosen.dtype == torch.bool else chosen
        numbers = chosen.tolist()
        return ImageSet(
            self.label,
            self.classes,
            self.labels[chosen],
            [self.names[i] for i in numbers],
            _Some(self.read, numbers),
            None if self.pixels is None else self.pixels[chosen],
            size_of=self.size_of,
        )


def hashed(text: str) -> str:
    """The sha256 of a text, which may be a file's name of any bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


# ── sources ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_images(
    data: PathLike | ImageSet,
    test: PathLike | ImageSet | None = None,
    *,
    resize: tuple[int, ...] | None = None,
    bad_images: str = "fail",
) -> tuple[ImageSet, ImageSet | None]:
    """Read the training set and, where there is one, the test set.

    Args:
        data: CIFAR-10 or CIFAR-100 as published (the folder or the .tar.gz, Python's or the binary version); a folder
            of class folders, or a zip of one, read in place; or either of them with such folders in it, `train` or
            `training`, and `val`, `valid`, `validation` or `dev`, or `test`, `testing`, `eval` or `evaluation`, also as
            in `Train_Set` and `val2017`. Where it has all three, the test set here is the one for validation.
            A set that was read already is passed on.
        test: the same for the test set, instead of one that `data` may hold.
        resize: shorter side that the images are brought to, in pixels, one number or a range; a range is drawn from in
            every epoch, so that the set is not kept in memory.
        bad_images: `fail` or `skip`.

    Returns:
        The training set, and the test set or None.

    Raises:
        InputError: nothing there, no image, a class without one, other classes in the test set, or, with
            `bad_images="fail"`, images that cannot be read, named and counted.
    """
    train, *rest = _load(data, resize, bad_images, slice(2 if test is None else 1))
    if test is not None:
        rest = _load(test, resize, bad_images, slice(-1, None))
    tested = rest[0] if rest else None
    if tested is not None and tested.classes != train.classes:
        odd = sorted(set(tested.classes) ^ set(train.classes))
        raise InputError(
            f"{tested.label} has {len(tested.classes)} classes, {train.label} {len(train.classes)}; "
            f"not in both: {', '.join(odd[:NAMED])}"
        )
    return train, tested


def load_test_images(data: PathLike | ImageSet, *, bad_images: str = "fail") -> ImageSet:
    """The test set of what `load_images` knows, else the one for validation, else all of it; the rest is not read."""
    return _load(data, None, bad_images, slice(-1, None))[0]


def _load(data: PathLike | ImageSet, resize: tuple[int, ...] | None, bad_images: str, wanted: slice) -> list[ImageSet]:
    """The sets for training, validation and test, as far as there are and they are wanted."""
    if isinstance(data, ImageSet):
        if resize is not None:
            _read_into_memory(data := copy.copy(data), resize, bad_images)
        return [data]
    if not isinstance(data, str | os.PathLike):
        raise InputError(f"data is a path, or an ImageSet of vggfeat.load_images, got {type(data).__name__}")
    path = Path(data)
    if not os.fspath(data) or not os.path.exists(path):
        raise InputError(
            f"no images at {os.fspath(data) or 'an empty path'}: give a folder of class folders, a zip of one, or "
            "CIFAR's folder or .tar.gz"
        )
    sets = []
    for part in read_cifar(path):
        names = [f"image {i}" for i in range(len(part.pixels))]
        sets.append(ImageSet(part.label, part.classes, part.labels, names, _Pixels(part.pixels), part.pixels))
    try:
        sets = sets[wanted] or [_class_folders(path, part) for part in _parts(path)[wanted]]
    except InputError as error:
        if lacking := missing_files(path):
            raise InputError(f"{path} is CIFAR without {', '.join(lacking)}: fetch it again") from error
        raise
    for each in sets:
        _read_into_memory(each, resize, bad_images)
    return sets


@dataclass(frozen=True)
class _Tree:
    """What is under a folder or in a zip: paths with slashes, of files and of folders."""

    path: Path
    prefix: str
    files: list[str]
    folders: list[str]


def _parts(path: Path) -> list[_Tree]:
    """The folder of class folders at `path`, or those in it for training, validation and test, in this order."""
    if path.is_dir():
        files, folders = [], []
        for here, below, names in os.walk(path, followlinks=True):
            root = Path(here).relative_to(path)
            around = {os.path.realpath(path / each) for each in root.parents} if root.parts else set()
            if os.path.realpath(here) in around:  # a link to a folder around it
                below.clear()
                continue
            files += [(root / name).as_posix() for name in names]
            folders += [(root / name).as_posix() for name in below]
    else:
        try:
            with zipfile.ZipFile(path) as archive:
                names = [*dict.fromkeys(archive.namelist())]  # a name may be there twice: the last one counts
        except (OSError, zipfile.BadZipFile) as error:
            kind = "a tar without CIFAR's files" if os.path.isfile(path) and tarfile.is_tarfile(path) else "no zip"
            what = getattr(error, "strerror", None) or f"{kind}, or a damaged one"
            raise InputError(f"cannot read {path}: {what}; give a folder of class folders, or a zip of one") from error
        files = [name for name in names if not name.endswith("/")]
        folders = [name.rstrip("/") for name in names if name.endswith("/")]
    tree = _stripped(_Tree(path, "", sorted(filter(_visible, files)), sorted(filter(_visible, folders))))
    images = [name for name in tree.files if name.lower().endswith(SUFFIXES)]
    tops = {name.split("/")[0] for name in images if "/" in name}
    deep = {name.split("/")[0] for name in images if name.count("/") > 1}  # in others there are no class folders
    parts = [[name for name in sorted(deep) if _purpose(name) in words] for words in (TRAIN, VALIDATION, TEST)]
    if not any(parts):
        return [tree]
    named = [*itertools.chain(*parts)]
    if tops != {*named} or not parts[0] or len(named) == 1 or any(len(each) > 1 for each in parts):
        found = ", ".join(sorted(tops)[:NAMED]) + " …" * (len(tops) > NAMED)
        alone = path / tree.prefix / named[0] if path.is_dir() else f"{tree.prefix}{named[0]} unpacked"
        only = "" if tops == deep else f", with folders in {', '.join(sorted(deep))} alone"
        raise InputError(
            f"{path} has {found}{only}: expected class folders, or folders of them named train and val, train and "
            f"test, or all three; give one alone, such as {alone} (and to train, another as test=FOLDER, --test "
            "FOLDER), or rename the class if that is one"
        )
    return [_stripped(_under(tree, name)) for name in named]


def _purpose(folder: str) -> str:
    """What a folder is for, such as `train` for Train, train_set, train-images, train2017."""
    letters = re.sub("[^a-z]", "", folder.lower())
    return re.sub("(set|images|data)$", "", letters)


def would_hold(source: Path, folder: Path) -> bool:
    """Whether `folder` is one of those searched for images in `source`."""
    source, folder = source.resolve(), folder.resolve()
    if not source.is_dir() or not folder.is_relative_to(source) or cifar_files(source):
        return False
    return folder == source or _visible(folder.relative_to(source).as_posix())


def _visible(name: str) -> bool:
    parts = name.split("/")
    return not any(part.startswith((".", "__MACOSX")) for part in parts)


def _under(tree: _Tree, folder: str) -> _Tree:
    files, folders = (
        [n[len(folder) + 1 :] for n in names if n.startswith(folder + "/")] for names in (tree.files, tree.folders)
    )
    return _Tree(tree.path, f"{tree.prefix}{folder}/", files, folders)


def _stripped(tree: _Tree) -> _Tree:
    """The tree without the folders that hold nothing but one folder of folders, such as an archive's own name."""
    while True:
        images = [name for name in tree.files if name.lower().endswith(SUFFIXES) and "/" in name]
        tops = {name.split("/")[0] for name in images}
        if len(tops) != 1 or any(name.count("/") < 2 for name in images):
            return tree
        tree = _under(tree, tops.pop())


def _class_folders(path: Path, tree: _Tree) -> ImageSet:
    names = [name for name in tree.files if name.lower().endswith(SUFFIXES) and "/" in name]
    classes = sorted({name.split("/")[0] for name in names})
    if not names:
        raise InputError(
            f"no images in {path}/{tree.prefix}: expected class folders with {', '.join(SUFFIXES)} files in them"
        )
    empty = sorted({name.split("/")[0] for name in tree.folders} - set(classes))
    if empty:
        raise InputError(
            f"{path}: {len(empty)} class folder(s) without an image: {', '.join(empty[:NAMED])}; "
            f"fill or remove {'it' if len(empty) == 1 else 'them'}"
        )
    number = {name: i for i, name in enumerate(classes)}
    labels = torch.tensor([number[name.split("/")[0]] for name in names], device="cpu")
    others = [name for name in tree.files if ("/" in name) != name.lower().endswith(SUFFIXES)]
    read = _Reader(path, tree.prefix, names)
    return ImageSet(
        f"{path}/{tree.prefix}".rstrip("/"), classes, labels, names, read, others=others, size_of=read.size_of
    )


class _Reader:
    """Reads image number i of a folder or a zip; in a worker process, too."""

    def __init__(self, path: Path, prefix: str, names: list[str]) -> None:
        self.path, self.prefix, self.names = path, prefix, names
        self.in_folder = path.is_dir()  # asked once: it may vanish
        self.archive: zipfile.ZipFile | None = None
        self.owner = 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"archive": None, "owner": 0}

    def __call__(self, i: int) -> Image.Image:
        name = self.prefix + self.names[i]
        if self.in_folder:
            return open_image(self.path / name)
        archive = self._opened()
        try:
            content = archive.read(name)
        except Exception as error:  # a damaged entry is a BadZipFile, zlib.error, EOFError, NotImplementedError, …
            raise ImageError(f"{self.path}/{name}: damaged in the archive ({error})") from error
        return open_image(self.path / name, io.BytesIO(content))

    def size_of(self, name: str) -> int:
        """The size of a file in bytes, as it is outside the zip; -1 where it cannot be told."""
        try:
            if self.in_folder:
                return os.stat(self.path / (self.prefix + name)).st_size
            return self._opened().getinfo(self.prefix + name).file_size
        except (OSError, KeyError, ImageError):
            return -1

    def _opened(self) -> zipfile.ZipFile:
        if self.archive is None or self.owner != os.getpid():  # a forked process shares the file's position
            try:
                self.archive, self.owner = zipfile.ZipFile(self.path), os.getpid()
            except (OSError, zipfile.BadZipFile) as error:
                raise ImageError(f"{self.path} can no longer be read: {error}") from error
        return self.archive


def _read_into_memory(images: ImageSet, resize: tuple[int, ...] | None, bad_images: str) -> None:
    """Bring a set into memory, in place, if its images have one size and take at most a quarter of the memory."""
    if images.pixels is not None and resize is None:
        return
    images.pixels = None
    if resize is not None and len(resize) > 1:
        return  # each epoch needs another size
    good: list[int] = []
    bad: list[tuple[int, str]] = []
    store = torch.empty(0, device="cpu")
    for i, pixels in enumerate(_read_all(images, None if resize is None else resize[0])):
        if isinstance(pixels, str):
            bad.append((i, pixels))
            continue
        if not good:
            if pixels.size * len(images) > (total_memory(torch.device("cpu")) or 2 * ASSUMED_MEMORY) // 4:
                return
            store = torch.empty(len(images), *pixels.shape, dtype=torch.uint8, device="cpu")
        elif pixels.shape != store.shape[1:]:
            return
        store.numpy()[len(good)] = pixels  # torch's copy would take threads from the processes that read
        good.append(i)
    if bad and (bad_images == "fail" or not good):
        named = "; ".join(message for _, message in bad[:NAMED])
        raise InputError(
            f"{len(bad)} of {len(images)} images cannot be read: {named}{' …' * (len(bad) > NAMED)}; "
            f"fix or remove them, or {LEAVE_OUT}"
        )
    # a new one, since a copy of the set shares the old
    images.skipped = images.skipped | {images.names[i]: int(images.labels[i]) for i, _ in bad}
    if bad:
        images.read = _Some(images.read, good)
        images.labels, images.names = images.labels[torch.tensor(good, device="cpu")], [images.names[i] for i in good]
        if lost := set(range(len(images.classes))) - set(images.labels.tolist()):
            name = images.classes[min(lost)]
            raise InputError(f"class {name} of {images.label} has no image that can be read")
    images.pixels = store[: len(good)]


def _read_all(images: ImageSet, shorter: int | None) -> Iterator[Any]:
    """All images in turn, (H,W,3) uint8 of NumPy, or what is wrong with one; many of them by several processes."""
    whole = ScaledImages(images.read)
    items = [(i, shorter) for i in range(len(images))]
    yield from map(whole.__getitem__, items[:ALONE])
    if len(images) > ALONE:
        plan = [items[i : i + 32] for i in range(ALONE, len(images), 32)]
        with contextlib.closing(Readers(whole, processes())) as readers:
            yield from itertools.chain.from_iterable(readers.read(plan))


@dataclass(frozen=True)
class _Some:
    """Reads image number i of those chosen; a class, so that it can be pickled for workers, like the next."""

    read: Callable[[int], Image.Image]
    numbers: list[int]

    def __call__(self, i: int) -> Image.Image:
        return self.read(self.numbers[i])


@dataclass(frozen=True)
class _Pixels:
    """Image number i of (N,H,W,3) uint8."""

    images: Tensor

    def __call__(self, i: int) -> Image.Image:
        return Image.fromarray(self.images[i].numpy())

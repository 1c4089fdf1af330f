"""CIFAR-10 and CIFAR-100 as they are published: the folder or the .tar.gz, Python's pickles or the binary version."""

from __future__ import annotations

import codecs
import functools
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from vggfeat.errors import InputError

SETS = ("train", "test")

# by version: files of the training set, of the test set, of the class names, and where names and labels are. In the
# binary version the label is the last byte before an image's 3072: CIFAR-100 has the coarse one before it.
_TEN = [f"data_batch_{i}" for i in range(1, 6)]
_BINARY = (
    ([name + ".bin" for name in _TEN], ["test_batch.bin"], "batches.meta.txt", 1),
    (["train.bin"], ["test.bin"], "fine_label_names.txt", 2),
)
_PYTHON = (
    (_TEN, ["test_batch"], "batches.meta", b"label_names", b"labels"),
    (["train"], ["test"], "meta", b"fine_label_names", b"fine_labels"),
)
_NAMES = {name for train, test, meta, *_ in (*_BINARY, *_PYTHON) for name in (*train, *test, meta)}
_Part = tuple[Tensor, list[int]]  # (N,3072) uint8, labels


@dataclass(frozen=True)
class CifarSet:
    """The training set or the test set.

    Attributes:
        label: what a person calls it.
        classes: their names, in the order of the labels.
        labels: (N,) int64.
        pixels: (N,32,32,3) uint8.
    """

    label: str
    classes: list[str]
    labels: Tensor
    pixels: Tensor


def read_cifar(path: Path) -> list[CifarSet]:
    """The training and the test set at `path`: CIFAR's folder, the folder around it, or the .tar.gz; else nothing.

    Raises:
        InputError: it is there, but damaged.
    """
    files = cifar_files(path)
    for train, test, meta, head in _BINARY:
        if {*train, *test} <= files.keys():
            names = files[meta]().decode(errors="replace").split() if meta in files else None
            parts = [_joined([_binary(name, files[name](), head) for name in part]) for part in (train, test)]
            return [_set(f"{path}, {what}", *part, names) for what, part in zip(SETS, parts, strict=True)]
    for train, test, meta, names_key, labels_key in _PYTHON:
        if {*train, *test, meta} <= files.keys():
            try:
                names = [name.decode() for name in _unpickled(files[meta]())[names_key]]
                parts = [_joined([_batch(_unpickled(files[name]()), labels_key) for name in p]) for p in (train, test)]
            except Exception as error:  # a damaged pickle fails in every way there is
                raise InputError(f"{path} is damaged or not CIFAR as published: {error}") from error
            return [_set(f"{path}, {what}", *part, names) for what, part in zip(SETS, parts, strict=True)]
    return []


def missing_files(path: Path) -> list[str]:
    """Which of CIFAR's files are not at `path` while others are; empty where it is something else."""
    there = cifar_files(path).keys()
    versions = [(*train, *test, meta) for train, test, meta, *_ in (*_BINARY, *_PYTHON)]
    nearest = max(versions, key=lambda names: len(there & {*names}))
    optional = {meta for _, _, meta, _ in _BINARY}
    few = len(there & {*nearest}) < 2
    return [] if few else [name for name in nearest if name not in there and name not in optional]


def cifar_files(path: Path) -> dict[str, Callable[[], bytes]]:
    """A reader for each of CIFAR's files, by its bare name; none where it is something else."""
    if path.is_dir():
        for folder in (path, *(below for below in sorted(path.glob("cifar-10*")) if below.is_dir())):
            found = {file.name: file.read_bytes for file in folder.iterdir() if file.is_file()}
            if len(_NAMES & found.keys()) > 1:
                return found
        return {}
    if not path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return {}
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in _NAMES and (file := archive.extractfile(member)):  # others may be of any size
                    contents[name] = file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}; fetch it again") from error
    return {name: functools.partial(bytes, content) for name, content in contents.items()}


def _joined(parts: list[_Part]) -> _Part:
    return torch.cat([pixels for pixels, _ in parts]), [label for _, labels in parts for label in labels]


def _binary(name: str, content: bytes, head: int) -> _Part:
    if not content or len(content) % (head + 3072):
        raise InputError(
            f"CIFAR's {name}: {len(content)} bytes are no whole number of images of {head + 3072}; fetch it again"
        )
    rows = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, head + 3072)
    return rows[:, head:], rows[:, head - 1].tolist()


class _Unpickler(pickle.Unpickler):
    """Reads NumPy arrays, texts and numbers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        import numpy

        allowed: dict[str, Any] = {"encode": codecs.encode, "ndarray": numpy.ndarray, "dtype": numpy.dtype}
        allowed["_reconstruct"] = numpy.empty(0).__reduce__()[0]
        if module in ("_codecs", "numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not allowed")


def _unpickled(content: bytes) -> Any:
    return _Unpickler(io.BytesIO(content), encoding="bytes").load()


def _batch(batch: Any, labels_key: bytes) -> _Part:
    return torch.from_numpy(batch[b"data"]).view(-1, 3072), [int(label) for label in batch[labels_key]]


def _set(label: str, pixels: Tensor, labels: list[int], names: list[str] | None) -> CifarSet:
    classes = names or [str(i) for i in range(max(labels) + 1)]
    if len(pixels) != len(labels) or not all(0 <= each < len(classes) for each in labels):
        given = f"{len(labels)} labels up to {max(labels, default=0)}, {len(classes)} class names"
        raise InputError(f"{label} is not CIFAR as published: {len(pixels)} images, {given}")
    images = pixels.view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous()
    return CifarSet(label, classes, torch.tensor(labels, device="cpu"), images)

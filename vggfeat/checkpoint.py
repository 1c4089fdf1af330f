"""Checkpoints: what a run would need to go on, written whole or not at all, checked when it is read."""

from __future__ import annotations

import contextlib
import errno
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from vggfeat.devices import lacks_memory
from vggfeat.errors import RunError, first_line
from vggfeat.files import new_file, remove_leftovers

KEPT = 2  # the older one in case the newest is damaged
# what keeps an intact file from being read; damage shows as other errors, EINVAL and EIO included
TRANSIENT = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT)


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state of tensors and plain values, in place of one that is there.

    Raises:
        OSError: it cannot be written, as on a full disk; what is there stays.
    """
    try:
        with new_file(path, overwrite=True) as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's wrapper of its writer's error
        cause = error.__context__
        known = (cause.errno, cause.strerror) if isinstance(cause, OSError) else (0, first_line(error))
        raise OSError(*known) from error


def read(path: Path, needed: Collection[str]) -> dict[str, Any]:
    """A state that is whole: the checksums of all parts fit, and nothing is unpickled that could run code.

    Raises:
        RunError: it cannot be read now, for a reason that may pass.
        Exception: of any kind: flipped bits can make zip and pickle readers raise anything.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if part := archive.testzip():
                raise zipfile.BadZipFile(f"checksum of {part} does not match")
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if lacks_memory(error):
            raise RunError(f"cannot read {path}: there is not enough memory") from error
        if isinstance(error, OSError) and error.errno in TRANSIENT:
            raise RunError(f"cannot read {path}: {error.strerror}") from error
        raise
    if missing := set(needed) - state.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return state


def save(folder: Path, steps: int, state: Mapping[str, Any]) -> Path:
    """Write the state after so many steps of a run to its folder, and remove all but the newest two.

    Raises:
        RunError: it cannot be written, as on a full disk; those that are there stay.
    """
    path = folder / f"step-{steps:09d}.pt"
    try:
        folder.mkdir(exist_ok=True)
        write(path, state)
    except OSError as error:
        kept = saved(folder)
        rest = f"the run can go on from {kept[0]}" if kept else "there is no earlier one"
        raise RunError(f"cannot write checkpoint {path}: {error.strerror}; free some space; {rest}") from error
    for old in saved(folder)[KEPT:]:
        with contextlib.suppress(OSError):  # another program has it open: the next time, then
            old.unlink()
    return path


def newest(folder: Path, needed: Collection[str]) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest state of a folder that is whole, None where there is none, and what was wrong with newer ones.

    The caller holds the folder's lock: files half written are a killed run's, and removed. Damaged ones are renamed,
    once an intact one is found.

    Raises:
        RunError: one cannot be read, for a reason that may pass.
    """
    wrong: dict[Path, str] = {}
    remove_leftovers(folder, 0)
    for path in saved(folder):
        try:
            state = read(path, needed)
        except RunError:
            raise
        except Exception as error:
            wrong[path] = f"{path} is damaged ({first_line(error)})"
        else:
            for damaged in wrong:
                with contextlib.suppress(OSError):  # kept for a look at it, no more
                    damaged.replace(damaged.with_suffix(".damaged"))
            return state, list(wrong.values())
    return None, list(wrong.values())


def saved(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    return sorted(folder.glob(f"step-{'?' * 9}.pt"), reverse=True)

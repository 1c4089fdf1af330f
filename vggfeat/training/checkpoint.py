"""Checkpoints: written whole or not at all, checked when they are read, the newest good one found."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vggfeat.errors import RunError, first_line
from vggfeat.files import TEMPORARY, new_file

__all__ = ["newest", "save"]

KEPT = 2  # the one before the newest is for the case that the newest is damaged


def save(folder: Path, steps: int, state: Mapping[str, Any]) -> Path:
    """Write the state after so many steps of the run, and remove all but the newest two checkpoints.

    Raises:
        RunError: it cannot be written, as on a full disk; those that are there stay.
    """
    path = folder / f"step-{steps:09d}.pt"
    try:
        folder.mkdir(exist_ok=True)
        with new_file(path, overwrite=True) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch reports what its writer ran into as a RuntimeError
        kept = _files(folder)
        cause = error if isinstance(error, OSError) else error.__context__  # what torch's writer ran into
        reason = getattr(cause, "strerror", None) or first_line(error)
        rest = f"the run can go on from {kept[0]}" if kept else "there is no earlier one"
        raise RunError(f"cannot write checkpoint {path}: {reason}; free some space; {rest}") from error
    for old in _files(folder)[KEPT:]:
        old.unlink()
    return path


def newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest checkpoint that is whole, None where there is none, and what was wrong with newer ones.

    Checksums of all parts are compared, and nothing is unpickled that could run code. What a kill left half written is
    removed; what is damaged is given another name, once there is something better.

    Raises:
        RunError: one cannot be read, for a reason that may pass.
    """
    wrong: dict[Path, str] = {}
    for rest in folder.glob(TEMPORARY):
        rest.unlink()
    for path in _files(folder):
        try:
            with zipfile.ZipFile(path) as archive:
                if part := archive.testzip():
                    raise zipfile.BadZipFile(f"checksum of {part} does not fit")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if missing := {"config", "classes", "images", "net"} - state.keys():
                raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        except PermissionError as error:
            raise RunError(f"cannot read {path}: {error.strerror}") from error
        except Exception as error:  # flipped bits come out of the readers of zips and pickles as errors of any kind
            wrong[path] = f"{path} is damaged ({first_line(error)})"
        else:
            for damaged in wrong:
                damaged.rename(damaged.with_suffix(".damaged"))
            return state, list(wrong.values())
    return None, list(wrong.values())


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"step-{'?' * 9}.pt"), reverse=True)

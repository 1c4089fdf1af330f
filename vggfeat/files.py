"""Files that get their name whole or not at all, and the look beforehand whether one can be written. No torch."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vggfeat.errors import InputError

__all__ = ["TEMPORARY", "check_path", "free_name", "new_file", "taken"]

TEMPORARY = ".vggfeat-*.tmp"  # what a file is called while it is being written


def check_path(
    path: str | os.PathLike[str],
    suffixes: Collection[str] = (),
    *,
    overwrite: bool = False,
    error: type[InputError] = InputError,
) -> Path:
    """`path`, once it is clear that a file can be written there: to be called before any long work.

    Args:
        path: where to.
        suffixes: those that will do; none means any.
        overwrite: replace a file that is already there.
        error: what to raise.

    Raises:
        InputError: unknown suffix, no writable folder, a folder of that name, or a file that must not be replaced.
    """
    path = Path(path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise error(f"cannot write {path}: expected a name that ends in {', '.join(suffixes)}, got {path.suffix!r}")
    if not os.path.isdir(path.parent):
        raise error(f"cannot write {path}: expected a folder at {path.parent}, found none; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise error(f"cannot write {path}: the folder {path.parent} is not writable; choose another")
    if os.path.isdir(path):
        raise error(f"cannot write {path}: expected a file name, got a folder; name a file in it")
    try:
        os.lstat(path)  # unlike exists(), sees a dangling link, and reports a name that is too long
    except FileNotFoundError:
        return path
    except OSError as failure:
        raise error(f"cannot write {path}: {failure.strerror}; choose another name") from failure
    if not overwrite:
        raise error(taken(path))
    return path


def free_name(path: Path) -> Path:
    """`path` itself where nothing is there yet, else the first free one of name-2.png, name-3.png and so on."""
    names = itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def taken(path: Path) -> str:
    """What to say of a name that must not be replaced."""
    return f"cannot write {path}: it already exists; pass --overwrite (overwrite=True) or another name"


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A file to write to, which is synced and takes its name when the block ends well, and is gone when it does not.

    Raises:
        FileExistsError: the name is taken by now and must not be.
        OSError: it cannot be written.
    """
    temporary = path.with_name(
        TEMPORARY.replace("*", secrets.token_hex(8))
    )  # a link or a rename needs the same file system
    try:
        with open(temporary, "x+b") as file:  # not tempfile, whose files are 0600 whatever the umask says
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path, overwrite: bool) -> None:
    """Give a finished file its name in one step; FileExistsError if that is taken and may not be replaced."""
    if not overwrite:
        try:
            os.link(temporary, path)  # fails where the name is taken, which a rename would not
            return
        except FileExistsError:
            raise
        except (OSError, AttributeError, NotImplementedError):  # no hard links here: leave a short gap in the check
            if os.path.lexists(path):
                raise FileExistsError(path) from None
    os.replace(temporary, path)

"""Files that appear whole or not at all, and the check beforehand whether one can be written. No torch."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vggfeat.errors import InputError, RunError, warn

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]

DAY = 86400  # seconds
TEMPORARY = ".vggfeat-*.tmp"  # what a file is called while it is being written


def check_path(
    path: PathLike,
    suffixes: Collection[str] = (),
    *,
    overwrite: bool = False,
    inputs: Iterable[PathLike] = (),
    error: type[InputError] = InputError,
) -> Path:
    """`path`, after checking that a file can be written there: call it before any long work.

    Args:
        path: where to.
        suffixes: those allowed; none means any.
        overwrite: replace an existing file; for a link, the file that it leads to.
        inputs: files that are read, which are never replaced; for a folder, all that are in it, and what would be in
            one of its folders.
        error: what to raise.

    Raises:
        InputError: unknown suffix, no writable folder, a folder of that name, or a file that must not be replaced.
    """
    if not os.fspath(path):
        raise error("cannot write: expected a file name, got an empty one")
    path = Path(path)
    if any(same_file(path, each) or _is_among(path, each) for each in inputs):
        is_one = "is" if os.path.exists(path) else "would be"
        raise error(f"cannot write {path}: it {is_one} one of the files that are read; choose another name")
    if os.path.isdir(path):
        raise error(f"cannot write {path}: expected a file name, got a folder; name a file in it")
    if os.path.exists(path) and not os.path.isfile(path):
        raise error(f"cannot write {path}: expected a file, found a device or a pipe; choose another name")
    if suffixes and path.suffix.lower() not in suffixes:
        raise error(f"cannot write {path}: expected a name that ends in {', '.join(suffixes)}, got {path.suffix!r}")
    if not os.path.isdir(path.parent):
        raise error(f"cannot write {path}: expected a folder at {path.parent}, found none; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise error(f"cannot write {path}: the folder {path.parent} is not writable; choose another")
    try:
        os.lstat(path)  # unlike exists(), sees a dangling link, and reports a name that is too long
    except FileNotFoundError:
        return path
    except (OSError, ValueError) as failure:  # the second is of a name with a zero byte
        reason = getattr(failure, "strerror", failure)
        raise error(f"cannot write {path}: {reason}; choose another name") from failure
    if not overwrite:
        raise error(taken(path))
    place = _led_to(path)
    if place != path and not os.access(place.parent, os.W_OK | os.X_OK):
        raise error(f"cannot write {path}: the folder {place.parent} that it leads to is not writable; choose another")
    if os.path.exists(place) and not os.access(place, os.W_OK):
        raise error(f"cannot write {path}: it is protected against writing; choose another name")
    return path


def free_name(path: PathLike) -> Path:
    """`path` itself where nothing is there yet, else the first free one of name-2.png, name-3.png and so on."""
    path = Path(path)
    names = itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(name))


def same_file(path: PathLike, other: PathLike) -> bool:
    """Whether two names mean one file, existing or not."""
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):  # one of them is not there, or no name at all
        with contextlib.suppress(OSError, ValueError):
            return os.path.normcase(os.path.realpath(path)) == os.path.normcase(os.path.realpath(other))
        return False


def _is_among(path: Path, folder: PathLike) -> bool:
    """Whether a file is anywhere in a folder, or, where it does not exist, would be in a folder of that."""
    try:  # unlike resolve(), lets links lead in a circle
        place, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    except (OSError, ValueError):  # one of them is no name at all
        return False
    if not os.path.isdir(folder) or not place.is_relative_to(folder):
        return False
    return os.path.exists(place) or place.parent != folder


def _led_to(path: Path) -> Path:
    """The place that a link leads to; any other path as it is."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def taken(path: Path) -> str:
    """What to say of a name that must not be replaced."""
    return f"cannot write {path}: it already exists; pass --overwrite (overwrite=True) or another name"


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[IO[bytes]]:
    """A file to write to, which is synced and takes its name if the block succeeds, and is removed if it fails.

    A replaced file's permissions are kept; a link stays, and what it leads to is replaced.

    Raises:
        FileExistsError: the name is taken by now and must not be.
        OSError: it cannot be written.
    """
    path = _led_to(path) if overwrite else path
    # beside it, since a link or a rename needs the same file system
    temporary = path.with_name(TEMPORARY.replace("*", secrets.token_hex(8)))
    try:
        with open(temporary, "x+b") as file:  # not tempfile, whose files are 0600 whatever the umask says
            yield file
            file.flush()
            os.fsync(file.fileno())
        _publish(temporary, path, overwrite)
    finally:
        with contextlib.suppress(OSError):  # where another program has it open, on Windows; the file is what counts
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, age: int) -> None:
    """Remove what processes that were killed while they wrote to a folder left so many seconds ago; for 0 any time."""
    for each in folder.glob(TEMPORARY):
        with contextlib.suppress(OSError):
            if not age or time.time() - each.stat().st_mtime > age:
                each.unlink()


@contextmanager
def written(path: Path, *, overwrite: bool = False, hint: str = "") -> Iterator[IO[bytes]]:
    """A file to write to, which takes the name `path` once all went well; errors say what to do by `hint`, if given.

    Raises:
        InputError: the name is taken by now and must not be.
        RunError: the file cannot be written.
    """
    try:
        with new_file(path, overwrite=overwrite) as file:
            yield file
    except FileExistsError as error:
        raise InputError(taken(path)) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = hint or ("make room there" if full else "choose another place")
        raise RunError(f"cannot write {path}: {error.strerror or error}; {hint}") from error


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
    else:
        with contextlib.suppress(OSError):
            shutil.copymode(path, temporary)
    os.replace(temporary, path)


@contextmanager
def locked(folder: Path, waiting: str = "") -> Iterator[None]:
    """An advisory lock on a folder, as far as the system has locks; a process that dies releases it.

    Args:
        folder: which exists.
        waiting: warn with this, and wait, where another has it; without, that is an error.

    Raises:
        InputError: another one has it.
    """
    if fcntl is None:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if not waiting:
                    raise InputError(f"another process is using {folder}: wait for it, or choose another") from error
                warn(waiting)
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)  # forked children share it
        os.close(file)

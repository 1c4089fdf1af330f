"""What both commands share: starting, ending, and losing nothing in between."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import click

from vggfeat.errors import ImageError, RunError, VGGFeatError
from vggfeat.signals import ignore_termination, interrupt, on_termination, raise_swallowed

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
# out of memory on either kind of device is a RuntimeError
UNFORESEEN = (ImportError, MemoryError, OSError, OverflowError, RuntimeError, ValueError)


def finish(command: click.Command) -> None:
    """Run a command and exit: 0, or one line on stderr and 2 for bad input, 1 for a failure, 130 after Ctrl-C."""
    name = command.name or "vggfeat"
    for closed in ("stdout", "stderr"):
        if getattr(sys, closed) is None:  # closed by the caller: nobody reads it
            setattr(sys, closed, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")  # × and → are not in every code page
    with contextlib.redirect_stderr(_Unheard(sys.stderr)), warnings.catch_warnings():
        warnings.showwarning = functools.partial(_warn, name, command, warnings.showwarning)
        _finish(command, name)


def _finish(command: click.Command, name: str) -> None:
    try:
        with on_termination(interrupt):
            code = command.main(prog_name=name, standalone_mode=False)
    except click.UsageError as error:
        fail(name, f"{error.format_message()} (see {error.ctx.command_path if error.ctx else name} --help)", BAD_INPUT)
    except click.ClickException as error:
        fail(name, error.format_message(), BAD_INPUT)
    except (KeyboardInterrupt, click.Abort):
        fail(name, "interrupted, nothing was written", INTERRUPTED)
    except RunError as error:
        fail(name, _with_flags(str(error), command), FAILED)
    except VGGFeatError as error:
        fail(name, _with_flags(str(error), command), BAD_INPUT)
    except UNFORESEEN as error:
        said = " ".join(str(error).split())[:300] or "no details are known"
        fail(name, f"{type(error).__name__}: {said}", FAILED)
    sys.exit(code or 0)


def _warn(name: str, command: click.Command, otherwise: Callable[..., None], *warning: Any, **more: Any) -> None:
    """The library's warnings as one line: which line of ours led to them says nothing to who types commands."""
    message, _, place, *_ = warning
    if Path(place).parent == Path(__file__).parent:
        click.echo(f"{name}: {_with_flags(' '.join(str(message).split()), command)}", err=True)
    else:
        otherwise(*warning, **more)


class _Unheard:
    """stderr, whose reader may leave (`2>&1 | head`): no reason to end a run, or to lose its result."""

    buffer = None  # or else click would write to the stream's own where that is not of UTF-8

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def progress_bar(total: float, quiet: bool, named: bool = False) -> Any:
    """tqdm's bar on a terminal's stderr, of floating-point progress; `named` shows a description and figures, too."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            raise_swallowed()
            return super().update(n)

    shape = "{percentage:3.0f}% |{bar:10}| {elapsed}<{remaining}"
    shape = "{desc} " + shape + "{postfix}" if named else shape
    hidden = quiet or not sys.stderr.isatty()
    return Bar(total=float(total), bar_format=shape, disable=hidden, leave=False)


def _with_flags(message: str, command: click.Command) -> str:
    """A message of the library's with the commands' flags in place of the arguments: --batch-size for batch_size."""
    commands = [command]
    for each in commands:
        commands += each.commands.values() if isinstance(each, click.Group) else ()
    flags = {param.name: max(param.opts, key=len) for each in commands for param in each.params if param.name}
    names = "|".join(name for name in flags if "_" in name and flags[name].startswith("--"))
    message = re.sub(r"(--[a-z-]+) \(\w+='?\w+'?\)|\w+='?\w+'? \((--[a-z-]+(?: \w+)?)\)", r"\1\2", message)
    return re.sub(rf"(?<![\w/\\.'=-])({names})(?![\w/\\.'=])", lambda found: flags[found[0]], message)


class _Picture(Protocol):
    def save(self, path: Path, *, overwrite: bool = False) -> Path: ...


@dataclass(frozen=True)
class Target:
    """Where a command's picture goes.

    Attributes:
        output: where the user wants it; None leaves it to the command.
        name: the command's own choice, numbered where that is taken.
        overwrite: replace an existing file.
    """

    output: str | None
    name: str
    overwrite: bool

    def path(self) -> Path:
        """As of now: of two commands at once, the second to end takes the next number."""
        from vggfeat.files import free_name

        if self.output is not None:
            return Path(self.output)
        return Path(self.name) if self.overwrite else free_name(self.name)

    def save(self, picture: _Picture) -> tuple[Path, str]:
        """Write the picture there, or elsewhere rather than lose it; returns where, and what went wrong."""
        from vggfeat.files import free_name

        ignore_termination()  # saving takes a moment and must not be interrupted
        path = self.path()
        try:
            return picture.save(path, overwrite=self.overwrite), ""
        except ImageError as error:
            if path != self.path():  # taken while it was written
                return self.save(picture)
            rescue = free_name(Path(tempfile.gettempdir()) / (path.stem + ".png"))
            return picture.save(rescue), str(error)


def print_result(text: str) -> str:
    """Print what a command is asked for on stdout, once its picture is safe; returns what went wrong."""
    try:
        click.echo(text)
    except OSError as error:  # nobody reads it, or its disk is full
        return f"cannot print to stdout: {error.strerror}"
    return ""


def keep_memory() -> None:
    """Have glibc keep freed memory: large tensors otherwise come from the system page by page at every step."""
    trim_threshold, mmap_max = -1, -4  # glibc's malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library, or none
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def fail(name: str, message: str, code: int) -> None:
    """Print one line on stderr and exit with this status."""
    click.echo(f"{name}: {' '.join(message.split())}", err=True)
    sys.exit(code)

"""Every error that vggfeat raises on purpose, and the checks that raise the commonest.

    VGGFeatError
    ├── InputError            (ValueError)   a bad argument, tensor, layer name or option
    │   └── ImageError                       a picture that cannot be read or written
    ├── WeightsError                         weights that are damaged, foreign or too shallow
    │   └── WeightsUnavailableError          weights that are not here and cannot be fetched
    ├── DependencyError       (ImportError)  an optional or broken package
    └── RunError              (RuntimeError) a run that failed on good input

Each message says what was expected, what came, and what to try. The commands turn all of them into one line on stderr.
"""

from __future__ import annotations

import difflib
import importlib
import operator
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "DependencyError",
    "ImageError",
    "InputError",
    "RunError",
    "VGGFeatError",
    "WeightsError",
    "WeightsUnavailableError",
]


class VGGFeatError(Exception):
    """Base of every error that vggfeat raises on purpose."""


class InputError(VGGFeatError, ValueError):
    """An argument, a tensor, a layer name or an option that cannot be used."""


class ImageError(InputError):
    """A picture that cannot be read or written."""


class WeightsError(VGGFeatError):
    """Weights that are damaged, tampered with, of another network, or too shallow."""


class WeightsUnavailableError(WeightsError):
    """Weights that are not on this machine and could not be fetched."""


class DependencyError(VGGFeatError, ImportError):
    """A package that is missing or does not work in this installation."""


class RunError(VGGFeatError, RuntimeError):
    """A run that failed on good input."""


MANY = 70  # choices that a message names at most; a network has nearly as many layers


def check_choice(what: str, value: object, choices: Iterable[str], or_else: str = "") -> None:
    """Check that a value is one of `choices`.

    Raises:
        InputError: it is not; the message names the nearest, and `or_else`, what else there is.
    """
    choices = list(choices)
    if not (isinstance(value, str) and value in choices):
        raise InputError(f"unknown {what} {value!r}: {nearest(value, choices)}{or_else}")


def nearest(name: object, choices: Iterable[str], usual: Iterable[str] | None = None) -> str:
    """The end of an error message: the nearest of `choices`, or all of them, or the usual ones, if none is near."""
    choices = list(choices)
    close = [choice for choice in choices if _letters(choice) == _letters(name)]
    close = close or [choice for choice in choices if len(str(name)) > 2 and choice.startswith(str(name))][:3]
    close = close or difflib.get_close_matches(str(name), choices, n=3, cutoff=0.6)
    choices = list(usual or choices)
    rest = "" if len(choices) <= MANY else f", … ({len(choices)} in all)"
    return f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(choices[:MANY])}{rest}"


def _letters(name: object) -> str:
    """A name as far as it matters in comparing: VGG-16 and vgg_16 are vgg16."""
    return str(name).lower().translate(str.maketrans("", "", "-_ "))


def counted(number: int, noun: str) -> str:
    """A number of things in words: 1 image, 2 images."""
    return f"{number} {noun}{'s' * (number != 1)}"


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A setting as an int, NumPy's included.

    Raises:
        InputError: it is no whole number, or too small.
    """
    try:
        number = operator.index(value)
    except TypeError as error:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value!r}") from error
    if number < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {number}")
    return number


_quiet_lock = threading.RLock()
_quiet_inside = 0  # how many threads are
_QUIET = ("ignore", None, Warning, re.compile(r"(PIL|torch)(\.|$)"), 0)  # as `warnings` keeps a filter


@contextmanager
def quiet() -> Iterator[None]:
    """While any thread is inside, Pillow and torch warn of nothing in the whole process: no caller could act on it.

    `catch_warnings` serves one thread only: of two that overlap, the last to leave restores what the first had set.
    """
    global _quiet_inside
    with _quiet_lock:
        if not _quiet_inside:
            warnings.filters.insert(0, _QUIET)  # type: ignore[attr-defined]
        _quiet_inside += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_inside -= 1
            if not _quiet_inside:
                _aloud()


def _aloud() -> None:
    while _QUIET in warnings.filters:
        warnings.filters.remove(_QUIET)  # type: ignore[attr-defined]


def _reset_after_fork() -> None:
    """A forked child has only the thread that forked."""
    global _quiet_lock, _quiet_inside
    _quiet_lock, _quiet_inside = threading.RLock(), 0
    _aloud()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_after_fork)


def optional(module: str, otherwise: str) -> Any:
    """A module of a package that may be missing or broken, such as one built for another torch.

    Raises:
        DependencyError: it cannot be imported; the message is `otherwise`, and why.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError, AttributeError, ValueError) as error:  # the last of one built for another NumPy
        raise DependencyError(f"{otherwise} ({first_line(error)})") from error


_INSIDE = ("vggfeat", "torch", "contextlib")  # the last turns contexts into decorators


def warn(message: str) -> None:
    """Warn at the line of the user's code that led here: the nearest frame that is neither ours nor torch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def first_line(error: BaseException) -> str:
    """What another library's exception says, short enough for a message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]

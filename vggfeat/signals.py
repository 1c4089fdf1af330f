"""The signals that ask a program to end: Ctrl-C, a polite request, a terminal that goes. No torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["ignore_endings", "on_ending"]


def _asking() -> list[signal.Signals]:
    """Those signals, but for any that whoever started the program wants ignored, as `nohup` does."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def on_ending(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals so, and afterwards as before; other threads than the main one get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in _asking()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set


def ignore_endings() -> None:
    """Ignore them from here on, but inside of `on_ending` no longer than that."""
    if threading.current_thread() is threading.main_thread():
        for number in _asking():
            signal.signal(number, signal.SIG_IGN)

"""The signals that ask a program to end: Ctrl-C, SIGTERM, a terminal that closes. No torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def _termination_signals() -> list[signal.Signals]:
    """Those signals, except any that the program was started to ignore, as by `nohup`."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def on_termination(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals with `handle` inside the block; threads other than the main one get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in _termination_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set


def ignore_termination() -> None:
    """Ignore these signals from here on; inside `on_termination`, until it ends."""
    if threading.current_thread() is threading.main_thread():
        for number in _termination_signals():
            signal.signal(number, signal.SIG_IGN)

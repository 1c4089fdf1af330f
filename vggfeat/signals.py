"""The signals that ask a program to end: Ctrl-C, SIGTERM, a terminal that closes. No torch."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_asked = False  # to end, by `interrupt`


def interrupt(number: int, frame: FrameType | None) -> None:
    """A handler: Ctrl-C, once; what is saved then must not be lost to a second one.

    Raises:
        KeyboardInterrupt: always; where it is swallowed, as in a finalizer, `raise_swallowed` raises it again.
    """
    global _asked
    _asked = True
    ignore_termination()
    raise KeyboardInterrupt


def raise_swallowed() -> None:
    """Raise what `interrupt` raised and what was nevertheless swallowed; called where work goes on.

    Raises:
        KeyboardInterrupt: that.
    """
    if _asked:
        raise KeyboardInterrupt


def _termination_signals() -> list[signal.Signals]:
    """Those signals, except any that the program was started to ignore, as by `nohup`."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last on Windows
    known = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in known if signal.getsignal(number) is not signal.SIG_IGN]


@contextmanager
def on_termination(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals with `handle` inside the block; threads other than the main one get none."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    raise_swallowed()
    before = {number: signal.signal(number, handle) for number in _termination_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set
        if handle is interrupt:
            _asked = False


def ignore_termination() -> None:
    """Ignore these signals from here on; inside `on_termination`, until it ends."""
    if threading.current_thread() is threading.main_thread():
        for number in _termination_signals():
            signal.signal(number, signal.SIG_IGN)

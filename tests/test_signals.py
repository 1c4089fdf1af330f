"""vggfeat.signals: what `tests/test_cli.py` does not meet on the way."""

import contextlib
import signal
import threading

import pytest

from vggfeat import signals
from vggfeat.signals import ignore_termination, interrupt, on_termination, raise_swallowed


def test_ctrl_c_that_was_swallowed_is_heard_before_the_next_block(real_signals):
    with on_termination(interrupt):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), on_termination(lambda number, frame: None):
            pytest.fail("begun")
    raise_swallowed()  # no more: that program is over


def test_a_handler_that_python_did_not_set_gives_way_to_the_systems(monkeypatch):
    """`signal.signal` tells None of it, and takes no None."""
    calls = []
    monkeypatch.setattr(signals.signal, "signal", lambda *given: calls.append(given))
    with on_termination(interrupt):
        begun = [number for number, _ in calls]
        calls.clear()
    assert begun and calls == [(number, signal.SIG_DFL) for number in begun]


def test_other_threads_leave_signals_alone(real_signals):
    """Python lets the main thread alone set handlers."""
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with on_termination(interrupt):
            ignore_termination()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]

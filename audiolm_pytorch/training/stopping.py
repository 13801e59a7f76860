"""The one place where SIGTERM, SIGHUP and Ctrl-C end a training, after the current unit of work."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from audiolm_pytorch.saving.text import logger_named

__all__ = ["STOP_SIGNALS", "StopRequest", "end_by_signal", "stop_signals"]

# SIGHUP arrives when the terminal is closed; Windows does not have it.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]

logger = logger_named(__name__)


class StopRequest:
    """The number of the first signal in a `stop_signals` block, or 0; a second signal raises.

    A second SIGHUP does not raise: a closed terminal sends it from the shell and from the kernel.
    """

    def __init__(self, at_once: bool) -> None:
        self.number = 0
        self._at_once = at_once

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Store the signal; this method is the signal handler."""
        if self._at_once or (self.number and signal.Signals(number).name != "SIGHUP"):
            end_by_signal(number, "")
        self.number = self.number or number

    def end_if_requested(self, place: str) -> None:
        """Call `end_by_signal` if a signal has arrived; `place` names the finished work, e.g. "after epoch 3"."""
        if self.number:
            end_by_signal(self.number, place)


def end_by_signal(number: int, place: str) -> None:
    """Raise KeyboardInterrupt after SIGINT; log other signals, and raise SystemExit (SIGTERM: 143, SIGHUP: 129)."""
    message = f"stopped by {signal.Signals(number).name} {place}".rstrip()
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message)
    logger.warning("%s", message)
    raise SystemExit(128 + number)


@contextmanager
def stop_signals(at_once: bool = False) -> Iterator[StopRequest]:
    """Receive SIGTERM, SIGHUP and SIGINT (Ctrl-C) in a `with` block; then the handlers of the caller are active again.

    The work in the block calls `end_if_requested` where it can end without a loss. With `at_once`, a signal ends the
    block immediately. Signals that the caller ignores stay ignored. Only the main thread can receive signals; in other
    threads this block changes nothing.
    """
    request = StopRequest(at_once)
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, request)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

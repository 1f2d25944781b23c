"""SIGTERM and SIGINT end a run at the next step boundary, after a save."""

import signal
import threading
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """Raised where work stops early because somebody wants the process to end."""


class Interruption:
    """While entered, remembers the first signal; as before afterwards.

    A second SIGINT means now: KeyboardInterrupt, nothing saved. Outside the main thread, where
    Python allows no handlers, signals do what they did.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Interrupted once a signal has come."""
        if self.received is not None:
            raise Interrupted

    def leave(self) -> NoReturn:
        """End the process as the signal would have: exit code 143, or KeyboardInterrupt (130)."""
        assert self.received is not None
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number)

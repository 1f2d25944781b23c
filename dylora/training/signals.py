"""SIGTERM and SIGINT end a run at the next step boundary, after a save."""

import signal
import threading
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor

from dylora.training.distributed import ALONE, Processes

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """Raised where work stops early because somebody wants the process to end."""


class Interruption:
    """While entered, maybe more than once, remembers the first signal; as before afterwards.

    A second SIGINT means now: KeyboardInterrupt, nothing saved. Outside the main thread, where
    Python allows no handlers, signals do what they did. Of several processes all leave at the same
    place: a signal counts from when all have heard of it, at the end of a step or in `check`.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self._processes = processes
        self._noted: signal.Signals | None = None  # in this process
        self._agreed: signal.Signals | None = None  # of several
        self._before: list[dict[signal.Signals, Any]] = []  # handlers, one by one as entered

    def __enter__(self) -> "Interruption":
        numbers = SIGNALS if threading.current_thread() is threading.main_thread() else ()
        self._before.append({number: signal.signal(number, self._note) for number in numbers})
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.pop().items():
            signal.signal(number, handler)

    @property
    def received(self) -> signal.Signals | None:
        """The signal that ends the run; of several processes the same in all."""
        return self._noted if self._processes.size == 1 else self._agreed

    def votes(self, like: Tensor) -> Tensor:
        """Which of SIGNALS this process has noted, [2], to be added up over all of them.

        Filled on the device: a copy to it would wait.
        """
        return torch.stack([like.new_full((), float(self._noted == one)) for one in SIGNALS])

    def settle(self, votes: list[float]) -> None:
        """What has come in any process, by the sum of `votes`, counts from here on in all."""
        heard = [one for one, count in zip(SIGNALS, votes, strict=True) if count > 0]
        self._agreed = self._agreed or next(iter(heard), None)

    def check(self) -> None:
        """Raises Interrupted once a signal has come; every process calls it at the same place."""
        if self.received is None and self._processes.size > 1:
            (votes,) = self._processes.add_up([self.votes(torch.zeros(()))])
            self.settle(votes.tolist())
        if self.received is not None:
            raise Interrupted

    def check_here(self) -> None:
        """`check` for what this process does alone: the others do not hear of it."""
        if self._noted is not None:
            raise Interrupted

    def leave(self) -> NoReturn:
        """End the process as the signal would have: exit code 143, or KeyboardInterrupt (130)."""
        assert self.received is not None
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.received)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._noted = self._noted or signal.Signals(number)

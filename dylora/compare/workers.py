"""Runs of a comparison, one after another or in several processes at once."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch

from dylora.run_config import RunConfig

RunAll = Callable[..., Iterator[Any]]
SAVING_SECONDS = 60  # that a run has for it when its parent is gone


@contextmanager
def workers(processes: int) -> Iterator[RunAll]:
    """Gives `run_all(function, runs, *arguments)`, whose results come in the order of the runs.

    With more than one process the threads of this one are divided among them. However it is left,
    a signal included, the others are told to stop by SIGTERM, at which a training saves itself.
    """
    if processes == 1:
        yield lambda function, runs, *rest: (function(run, *rest) for run in runs)
        return
    threads = max(1, torch.get_num_threads() // processes)
    context = multiprocessing.get_context("spawn")  # threads of this process do not survive a fork
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    pool = ProcessPoolExecutor(processes, context, _begin, (threads,))

    def run_all(
        function: Callable[..., Any], runs: Sequence[RunConfig], *rest: Any
    ) -> Iterator[Any]:
        return pool.map(function, runs, *([value] * len(runs) for value in rest))

    try:
        yield run_all
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process of the comparison was killed, perhaps for want of memory: give fewer "
            "--processes; what is trained is kept"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while left := multiprocessing.active_children():  # one may begin a run that was queued
            for process in left:
                process.terminate()
                process.join(1)
        signal.signal(signal.SIGTERM, before)


def _begin(threads: int) -> None:
    """In a new process."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and this process would train on, or wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    for _ in range(SAVING_SECONDS):
        os.kill(os.getpid(), signal.SIGTERM)  # at the first a training saves itself
        time.sleep(1)
    os._exit(128 + signal.SIGTERM)

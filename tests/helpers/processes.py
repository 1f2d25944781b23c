"""Functions that run in several processes at once, as torchrun would start them."""

import contextlib
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

# Children are forked from a process that has imported everything and computed nothing.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dylora.training.loop", "parallel_runs"])


def in_processes(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """What `work(*args)` gives in each of `size` processes: its result, or what it raised.

    `work` is of a module that children can import, and its result can be pickled.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        end, theirs = _CONTEXT.Pipe(duplex=False)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
        child = _CONTEXT.Process(target=_run, args=(theirs, names, work, args))
        child.start()
        theirs.close()
        children.append((child, end))
    results = []
    for child, end in children:
        with contextlib.suppress(EOFError):  # it was killed
            results.append(pickle.loads(end.recv_bytes()) if end.poll(180) else TimeoutError())
        child.join(20)
        if child.is_alive():
            child.kill()
            child.join()
    return results


def results_of(size: int, work: Callable[..., Any], *args: Any) -> list[Any]:
    """The results; raises what was raised in a process, with where."""
    found = in_processes(size, work, *args)
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


def _run(end: Any, names: dict[str, int], work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        found = work(*args)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        found = error
    end.send_bytes(pickle.dumps(found))

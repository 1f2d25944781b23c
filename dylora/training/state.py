"""The state of a run besides its model: taken, checked as a stranger's, and put back.

A checkpoint's files may be anybody's. Each value must be of the kind that the run itself has there:
generators read beyond their state, and schedules fail hours later, where one is not.
"""

import dataclasses
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from dylora.bounded import is_number, is_whole_number, read_json, shown
from dylora.losses import Fractions
from dylora.storage.tensor_files import is_plain
from dylora.training.setup import Progress


def random_state() -> dict[str, Any]:
    """The state of every generator, in types that torch.load(weights_only=True) reads."""
    version, words, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype("int64")),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))


def check_random_state(file: Path, found: Any) -> None:
    """Raises ValueError for what is no state of these generators.

    numpy takes a position outside of its words, and reads there.
    """
    ours = random_state()
    ours["cuda"] = ours["python"][2] = None  # another machine's devices; a number kept or not
    cuda = found.get("cuda") if isinstance(found, dict) else None
    if not isinstance(cuda, list) or any(
        not is_plain(state, torch.uint8) or state.ndim != 1 or len(state) > 1 << 20
        for state in cuda
    ):
        raise ValueError(f"{file}: cuda is {shown(cuda)}, no list of states")
    require_same_form(file, "", {**found, "cuda": None}, ours)
    version, words, _ = found["python"]
    name, keys, position, has_gauss, _ = found["numpy"]
    right = {
        "python": version == ours["python"][0]
        and all(is_whole_number(word, 0, 2**32 - 1) for word in words)
        and words[-1] < len(words),
        "numpy": name == ours["numpy"][0]
        and is_whole_number(position, 0, len(keys))
        and is_whole_number(has_gauss, 0, 1)
        and bool(((keys >= 0) & (keys < 2**32)).all()),
    }
    for generator, fits in right.items():
        if not fits:
            raise ValueError(f"{file}: {generator} is no state of that generator")


def read_progress(file: Path, sites: int, experts: int) -> dict[str, Any]:
    """trainer_state.json: the fields of Progress, and `steps`.

    Raises ValueError naming a field that is missing or cannot be what it is.
    """
    state = read_json(file, infinite=True)  # before the first evaluation, the best loss is infinite
    require_keys(file, "", state, ("steps", *(item.name for item in dataclasses.fields(Progress))))
    fractions = state["fractions"]
    checks = {
        "steps": is_whole_number(state["steps"], 1),
        "best_loss": is_number(state["best_loss"], -math.inf, math.inf),
        "best_step": state["best_step"] is None or is_whole_number(state["best_step"]),
        "evaluation_due": type(state["evaluation_due"]) is bool,
        "benchmark_due": type(state["benchmark_due"]) is bool,
        "fractions": fractions is None
        or (
            isinstance(fractions, dict)
            and fractions.keys() == set(Fractions._fields)
            and all(_are_shares(rows, sites, experts) for rows in fractions.values())
        ),
        "sampler": isinstance(state["sampler"], dict),
    }
    for name, value in state.items():
        if not checks.get(name, is_whole_number(value)):
            raise ValueError(f"{file}: {name} is {shown(value)}, which it cannot be")
    for name, value in state["sampler"].items():
        if name in ("seed", "epoch", "position") and not is_whole_number(value):
            raise ValueError(f"{file}: sampler.{name} is {shown(value)}, no whole number")
    return state


def require_same_form(file: Path, where: str, found: Any, ours: Any) -> None:
    """Raises ValueError unless `found` has the keys, lengths, types and shapes of our own state.

    Of numbers the kind does not matter, and infinity is one; what is unset with us may be set.
    """
    name = where.removesuffix(".")
    if isinstance(ours, dict):
        require_keys(file, where, found, ours)
        for key, value in ours.items():
            require_same_form(file, f"{where}{key}.", found[key], value)
    elif isinstance(ours, list):
        if not isinstance(found, list) or len(found) != len(ours):
            raise ValueError(f"{file}: {name} is {shown(found)}, no list of {len(ours)}")
        for index, value in enumerate(ours):
            require_same_form(file, f"{where}{index}.", found[index], value)
    elif isinstance(ours, Tensor):
        if not is_plain(found, ours.dtype) or found.shape != ours.shape:
            raise ValueError(f"{file}: {name} is no {ours.dtype} of shape {list(ours.shape)}")
    elif ours is None or type(ours) in (int, float):
        if not (ours is found is None or is_number(found, -math.inf, math.inf)):
            raise ValueError(f"{file}: {name} is {shown(found)}, no number")
    elif type(found) is not type(ours):
        raise ValueError(f"{file}: {name} is {shown(found)}, not of type {type(ours).__name__}")


def require_keys(file: Path, where: str, found: Any, expected: Iterable[str]) -> None:
    """Raises ValueError naming the first piece of state that a file lacks, or that is not ours."""
    expected = set(expected)
    if not isinstance(found, dict):
        name = where.removesuffix(".") or "the file"
        raise ValueError(
            f"{file}: {name} holds a {type(found).__name__}, but must hold {sorted(expected)}"
        )
    for key in sorted(expected - found.keys()):
        raise ValueError(
            f"{file}: {where}{key} is missing: the run cannot continue exactly without it"
        )
    for key in found.keys() - expected:
        raise ValueError(f"{file}: {where}{shown(key)} is nothing that this run has")


def _are_shares(rows: Any, height: int, width: int) -> bool:
    """Whether these are `height` rows of at most `width` shares: an expert may have come since."""
    return (
        isinstance(rows, list)
        and len(rows) == height
        and all(
            isinstance(row, list)
            and len(row) == len(rows[0]) <= width
            and all(is_number(share, 0, 1 + 1e-4) for share in row)
            for row in rows
        )
    )

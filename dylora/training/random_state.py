"""The states of all random generators of a run."""

import random
from pathlib import Path
from typing import Any

import numpy
import torch

from dylora.fields import is_whole_number, shown
from dylora.storage.tensors import is_plain
from dylora.training.trainer_state import require_same_form


def random_state() -> dict[str, Any]:
    """The state of every generator, in types that torch.load(weights_only=True) reads."""
    version, words, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state()
    name, keys, *rest = numpy_state  # position, whether a number is kept, and that number
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(keys.astype("int64")), *rest],
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

"""What kind of folder this is: our checkpoint, one of an older version, PEFT adapters, or none."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from dylora.storage.peft_config import CONFIG_FILE
from dylora.storage.peft_format import OLD_WEIGHTS_FILE, WEIGHTS_FILE
from dylora.storage.safe_io import read_json
from dylora.storage.schema import ADAPTERS

STATE = "dylo_moe_state"
_WHOLE_MODEL = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin")
_WHOLE_MODEL += ("pytorch_model-*.bin", "model.safetensors.index.json")
Kind = Literal["adapter", "adapters", "mixture", "older mixture", "whole model"]


class Found(NamedTuple):
    """What a folder holds, by its files."""

    kind: Kind
    what: str  # in words, to stand after "is"
    adapters: list[Path]  # folders of adapters, in the order of their numbers
    routers: Sequence[Path] = ()  # files of an older mixture's router, the first the best
    notes: Sequence[str] = ()  # what is there and is not read


# What a folder holds


def detect_format(folder: Path) -> Found | None:
    """What `folder` holds, by its files; None for nothing that is known here.

    Raises FileNotFoundError when there is no such folder.
    """
    if not folder.is_dir():
        reason = "is not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{folder} {reason}")
    whole = sorted({path.name for name in _WHOLE_MODEL for path in folder.glob(name)})
    unread = [f"the whole model in {folder / whole[0]} is not read"] if whole else []
    if _is_adapter(folder):
        beside = " beside a whole model" if whole else ""
        return Found("adapter", f"a PEFT adapter{beside}", [folder], notes=unread)
    root = folder.parent if folder.name == ADAPTERS else folder
    within = _adapters_in(root / ADAPTERS) or _adapters_in(folder)
    if (root / ADAPTERS).is_dir() and _is_ours(root):
        return Found("mixture", "a mixture of dylora's", within)
    routers = [root / STATE / "router.pt", root.parent / STATE / "router.pt"]
    routers = [path for path in (root / "router.safetensors", *routers) if path.exists()]
    states = [path for path in (root / STATE, root.parent / STATE) if path.is_dir()]
    if within:
        library = [path / "skill_library.pt" for path in states]
        why = "not read, as no threshold can be made of it: add the skills again from their rows"
        unread += [f"the skill library {path} is {why}" for path in library if path.exists()]
        if states or routers:
            what = f"an older mixture of {len(within)} experts"
            return Found("older mixture", what, within, routers, unread)
        return Found("adapters", f"a folder of {len(within)} PEFT adapters", within, [], unread)
    if whole:
        what = f"a whole model ({whole[0]}) without adapters, which cannot be taken apart again"
        return Found("whole model", what, [])
    return None


def find_adapters(folder: Path) -> Found:
    """What `detect_format` finds. Raises ValueError where that is no adapter, saying what to do."""
    found = detect_format(folder)
    pickled = sorted([*folder.glob("expert_*.pt"), *folder.glob(f"{ADAPTERS}/expert_*.pt")])
    if found is None and pickled:
        raise ValueError(
            f"{pickled[0]} is a pickle without an {CONFIG_FILE}, so nothing says its alpha: save "
            "the adapter with peft's save_pretrained"
        )
    if found is None:
        raise ValueError(
            f"{folder} holds no adapter: there is neither {CONFIG_FILE} nor {ADAPTERS}/ in it, nor "
            "folders with the former"
        )
    if not found.adapters:
        raise ValueError(
            f"{folder} is {found.what}: give the adapters it was merged from, or use it as the base"
            if found.kind == "whole model"
            else f"{folder} is {found.what}, but has no adapters"
        )
    return found


def refuse_foreign(folder: Path) -> None:
    """Raises ValueError where a folder holds what only an import can read, saying how."""
    found = detect_format(folder) if folder.is_dir() else None
    if found is not None and found.kind != "mixture":
        how = f": run.py import --adapters {folder}, or load_peft_experts" if found.adapters else ""
        raise ValueError(f"{folder} is {found.what}, not a mixture of dylora's{how}")


def _is_ours(root: Path) -> bool:
    """Whether it is a mixture of dylora's, its manifest lost perhaps."""
    if (root / "manifest.json").exists():
        return True
    try:
        return "format_version" in read_json(root / "config.json")
    except (ValueError, OSError):
        return False


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE))


def _adapters_in(folder: Path) -> list[Path]:
    """Subfolders that are adapters, expert_2 before expert_10.

    peft's save_pretrained puts a named adapter into a folder of that name, so that
    expert_0/expert_0 is found as well.
    """
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        for candidate in (path, path / path.name):
            if candidate.is_dir() and _is_adapter(candidate):
                found.append(candidate)
                break
    return sorted(found, key=lambda path: [_number(p) for p in re.split(r"(\d+)", path.name)])


def _number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (-1, text)

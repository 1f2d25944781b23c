"""A folder of files that is opened once: verified, described, and read through one object.

Each file is hashed once, when the folder is opened; whoever is handed the object reads without
hashing again.
"""

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dylora.config import MoELoraConfig
from dylora.fields import shown
from dylora.storage.detect import Found, find_adapters, refuse_foreign
from dylora.storage.folders import checkpoints, latest_checkpoint
from dylora.storage.hub import local_folder
from dylora.storage.manifest import LOADED, MANIFEST, entries, verify
from dylora.storage.peft_format import PeftAdapter, read_adapter, read_stock_adapter
from dylora.storage.safe_io import read_bytes, read_json
from dylora.storage.schema import (
    ADAPTERS,
    ROUTER_FILE,
    SHIFTS_FILE,
    checked_training,
    read_config,
    read_description,
)
from dylora.storage.tensors import MAX_HEADER, read_pickled, read_tensors

if TYPE_CHECKING:
    from dylora.base_models import BaseSpec

BEST_FILE = "best.json"  # of a run's folder: names the checkpoint of the lowest validation loss
_NAME = re.compile(r"checkpoint-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """A mixture's folder whose files are as they were written."""

    path: Path
    description: dict[str, Any]  # config.json, checked against the other files
    states: Mapping[str, tuple[int, int]]  # file -> size and time of its last change, when opened
    damaged: Sequence[Path] = ()  # of its run, found not to verify when it was looked for
    allow_other_base: bool = False  # whether it may be put on a base that it was not trained on

    @classmethod
    def open(
        cls,
        path: "str | Path | Checkpoint",
        report: Callable[[str], None] = lambda line: None,
        *,
        revision: str | None = None,
        allow_other_base: bool = False,
    ) -> "Checkpoint":
        """Verify a folder written by `save_pretrained` or by training, and read its description.

        path: or a run's folder, which stands for its best checkpoint, or the newest that verifies
            where none is named the best; `report` is told which one it is.
        revision: of a path that is user/name, a repository of the hub.
        allow_other_base: let it be put on another base than it was trained on.

        Raises FileNotFoundError for a folder that does not exist; ValueError, naming the file, for
        one that is not whole, of another format, or larger than its files bear out.
        """
        if isinstance(path, Checkpoint):
            return path
        folder = local_folder(path, revision)
        if not (folder / MANIFEST).exists() and checkpoints(folder):
            found = cls._open_run(folder, report)
        else:
            refuse_foreign(folder)
            verify(folder)
            found = cls.of_verified(folder)
        return replace(found, allow_other_base=allow_other_base)

    @classmethod
    def latest(cls, run_folder: Path, report: Callable[[str], None]) -> "Checkpoint":
        """The newest checkpoint of a run that verifies; says which newer ones it skipped and why.

        Raises FileNotFoundError when there is none.
        """
        return cls.of_verified(*latest_checkpoint(run_folder, report))

    @classmethod
    def of_verified(cls, folder: Path, damaged: Sequence[Path] = ()) -> "Checkpoint":
        """A folder that `verify` has just found whole."""
        return cls(folder, read_description(folder), _states(folder), damaged)

    @classmethod
    def _open_run(cls, run_folder: Path, report: Callable[[str], None]) -> "Checkpoint":
        file, best = run_folder / BEST_FILE, None
        if file.exists():
            name = read_json(file).get("checkpoint")
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(
                    f"{file}: checkpoint is {shown(name)}, but must be the name of a checkpoint"
                )
            best = run_folder / name
        folder, damaged = latest_checkpoint(run_folder, report, first=best)
        report(f"checkpoint: {folder}, the {'best' if folder == best else 'newest'} of the run")
        return cls.of_verified(folder, damaged)

    @property
    def file(self) -> Path:
        """Where the description stands, for errors."""
        return self.path / "config.json"

    @property
    def config(self) -> MoELoraConfig:
        return read_config(self.file, self.description["moe"])

    @property
    def experts(self) -> list[dict[str, Any]]:
        """The table of experts, retired ones among them."""
        return self.description["experts"]

    @property
    def live(self) -> list[bool]:
        """Which experts are not retired."""
        return [record["state"] != "retired" for record in self.experts]

    @property
    def identity(self) -> str:
        """SHA-256 of the manifest, which has the hashes of all other files."""
        return hashlib.sha256(read_bytes(self.path / MANIFEST, MAX_HEADER)).hexdigest()

    def adapter(self, expert: int) -> PeftAdapter:
        """An expert that is not retired. Raises ValueError for values that are not finite."""
        return read_adapter(self.path / ADAPTERS / self.experts[expert]["name"])

    def router_tensors(self) -> dict[str, Tensor]:
        """router.safetensors: routers, maturity and fixed weights, by name."""
        return read_tensors(self.path / ROUTER_FILE)

    def bias_shifts(self) -> dict[str, Tensor]:
        """<path of a module>/<expert's name, or all> -> the shift of its bias [O]."""
        file = self.path / SHIFTS_FILE
        return read_tensors(file) if file.exists() else {}

    def base_spec(self, base: str | None = None, **options: Any) -> "BaseSpec":
        """The base that a user names, or else the one that the checkpoint does.

        options: see `dylora.base_models.LoadOptions`; stored as in training by default.

        Raises ValueError where none is named, and for a name that is not followed.
        """
        from dylora.base_models import BaseSpec  # it imports transformers, which takes seconds

        kept, revision = self.description["base_model_name_or_path"], None
        if base is None and kept is None:
            raise ValueError(f"{self.file} names no base model: give one as base= or --base")
        if base in (None, kept):
            revision = self.description["base_revision"]
        options["quantization"] = options.get("quantization") or self.description["quantization"]
        named_by = self.file if base is None else None
        return BaseSpec.resolve(base or kept, revision, named_by=named_by, **options)

    @property
    def base_fingerprint(self) -> dict[str, Any]:
        """Of the base in training; empty where the checkpoint is older than fingerprints."""
        return self.description.get("base_fingerprint", {})

    def check_base(self, fingerprint: Mapping[str, Any]) -> None:
        """Raises ValueError where a base or tokenizer is not that of the training.

        fingerprint: see `dylora.base_fingerprint.fingerprint`; what it leaves out is not compared.
        """
        from dylora.base_fingerprint import base_differences

        differences = base_differences(fingerprint, self.base_fingerprint)
        if differences and not self.allow_other_base:
            raise ValueError(
                f"{self.file} was written for another base ({'; '.join(differences)}): give that "
                "base, or allow_other_base=True (--allow_other_base) if you mean this one"
            )

    def tokenizer(self, spec: "BaseSpec") -> Any:
        """The base's tokenizer. Raises ValueError for another vocabulary than in training."""
        from dylora.base_fingerprint import tokenizer_fingerprint

        tokenizer = spec.tokenizer()
        if self.base_fingerprint.get("tokenizer"):  # of 256,000 words it takes a moment
            self.check_base({"tokenizer": tokenizer_fingerprint(tokenizer)})
        return tokenizer

    def changed(self) -> list[str]:
        """Files that have changed, gone or come since the folder was opened, by size and time."""
        now = _states(self.path)
        names = self.states.keys() | now.keys()
        return sorted(name for name in names if self.states.get(name) != now.get(name))


@dataclass(frozen=True)
class AdapterFolder:
    """A folder with adapters that were made elsewhere, or with those of a mixture."""

    path: Path
    found: Found

    @classmethod
    def open(cls, path: str | Path) -> "AdapterFolder":
        """See what a folder holds, and verify what has a manifest.

        Raises FileNotFoundError for a folder that does not exist; ValueError for one without
        adapters, saying what to do, and for one whose files are not as they were written.
        """
        folder = local_folder(path)
        if not (folder / MANIFEST).exists() and checkpoints(folder):
            folder = Checkpoint.open(folder).path
        found = find_adapters(folder)
        if found.kind == "mixture":
            verify(found.adapters[0].parents[1])
        for folder in found.adapters:
            if (folder / MANIFEST).exists():
                verify(folder)
        return cls(folder, found)

    def adapters(self) -> list[PeftAdapter]:
        """The adapters, in the order of their numbers. Raises as `read_stock_adapter`."""
        return [read_stock_adapter(folder) for folder in self.found.adapters]

    def training_record(self) -> dict[str, Any] | None:
        """What a mixture of ours was trained on. Raises ValueError where that is no record."""
        if self.found.kind != "mixture":
            return None
        folder = self.found.adapters[0].parents[1]
        return checked_training(folder, read_json(folder / "config.json").get("training"))

    def gate(self) -> tuple[Tensor, Tensor] | None:
        """Weight [E, D] and bias [E] of an older mixture's router; None where it is no such thing.

        Its router.pt is a state dict, or has one under gate_state_dict. Raises ValueError for a
        file that holds more than tensors and plain values.
        """
        file = self.found.routers[0]
        state: Any = read_tensors(file) if file.suffix == ".safetensors" else read_pickled(file)
        state = state.get("gate_state_dict", state)
        name = "gate." if "gate.weight" in state else ""
        weight = state.get(f"{name}weight") if isinstance(state, dict) else None
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            return None
        bias = state.get(f"{name}bias", weight.new_zeros(len(weight)))
        if not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]:
            return None
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(f"{file}: {name}weight holds values that are not finite")
        return weight, bias


def _states(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of every file that a loader or a manifest names."""
    listed = read_json(folder / MANIFEST)["files"] if (folder / MANIFEST).exists() else {}
    found = {}
    for path in entries(folder):
        name = path.relative_to(folder).as_posix()
        if path.name in LOADED or name == MANIFEST or name in listed:
            about = os.stat(path)
            found[name] = (about.st_size, about.st_mtime_ns)
    return found

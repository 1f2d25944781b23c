"""One adapter in PEFT's own files: adapter_config.json and adapter_model.safetensors.

One strict reader with two policies: `read_adapter` for the files that this package writes, and
`read_stock_adapter` for those of others.

The layout was checked against peft 0.21: keys sorted, float32 tensors whatever the base is,
GPT-2's Conv1D not transposed but marked by fan_in_fan_out.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from dylora.config import ends_with
from dylora.fields import shown
from dylora.storage.model_card import CARD, adapter_card
from dylora.storage.peft_config import CONFIG_FILE, PLAIN_NAME, rank_of, read_config, scaling_of
from dylora.storage.peft_types import PEFT_TYPES, PeftType
from dylora.storage.tensors import Header, read_headers, read_pickled, read_tensors

WEIGHTS_FILE, OLD_WEIGHTS_FILE = "adapter_model.safetensors", "adapter_model.bin"
MAGNITUDE = "lora_magnitude_vector"
_PREFIX = "base_model.model."
_NAME = r"(?:\.(?P<name>(?!weight$)[^.]+))?"  # of the adapter, as some tools write it
_MATRIX = {
    name: re.compile(
        rf"(?P<path>.+)\.(?P<slot>{'|'.join(kind.matrices)}){_NAME}{re.escape(kind.suffix)}"
    )
    for name, kind in PEFT_TYPES.items()
}
_MAGNITUDE = re.compile(rf"(?P<path>.+)\.lora_magnitude_vector{_NAME}(?:\.weight)?")
_BIAS = re.compile(r"(?P<path>.+?)(?:\.base_layer)?\.bias")


class PeftAdapter(NamedTuple):
    """An adapter on its way to or from disk."""

    config: dict[str, Any]  # adapter_config.json
    # Path of a projection -> its matrices, by `PEFT_TYPES`: of a LoRA A [r, D], B [O, r].
    weights: dict[str, tuple[Tensor, ...]]
    magnitudes: Mapping[str, Tensor] = MappingProxyType({})  # DoRA: path of a projection -> [O]
    # Trained biases, the base's included: path of a module -> [O].
    biases: Mapping[str, Tensor] = MappingProxyType({})
    folder: Path = Path()  # where it was read

    @property
    def type(self) -> str:
        """The adapter type by PEFT's name."""
        return self.config["peft_type"]

    @property
    def base(self) -> str | None:
        """The base that it says it was made for."""
        return self.config.get("base_model_name_or_path")

    @property
    def targets(self) -> list[str] | None:
        """target_modules where they are names; None for a pattern or a keyword of peft's."""
        targets = self.config.get("target_modules")
        return targets if isinstance(targets, list) else None

    def excludes(self, path: str) -> bool:
        """Whether a name in exclude_modules leaves a module out."""
        names = self.config.get("exclude_modules")
        return isinstance(names, list) and any(ends_with(path, name) for name in names)

    def rank(self, path: str) -> int:
        return rank_of(self.config, path)

    def scale(self, path: str) -> float:
        return scaling_of(self.config, path)

    def tensors(self, path: str) -> dict[str, Tensor]:
        """Those of one projection by PEFT's names, without a bias."""
        own = dict(zip(PEFT_TYPES[self.type].matrices, self.weights[path], strict=True))
        return own | ({MAGNITUDE: self.magnitudes[path]} if path in self.magnitudes else {})

    def delta_weight(self, path: str, like: Tensor) -> Tensor:
        """What it adds to a projection's weight, [O, D], on the device and in the precision of
        `like`; of a DoRA, before its magnitudes."""
        matrices = [matrix.to(like) for matrix in self.weights[path]]
        return self.scale(path) * PEFT_TYPES[self.type].product(*matrices)


def write_adapter(folder: Path, adapter: PeftAdapter) -> None:
    """Write both files into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    kind, tensors = PEFT_TYPES[adapter.type], {}
    for path, matrices in adapter.weights.items():
        for name, matrix in zip(kind.matrices, matrices, strict=True):
            tensors[f"{_PREFIX}{path}.{name}{kind.suffix}"] = matrix
    for path, magnitude in adapter.magnitudes.items():
        tensors[f"{_PREFIX}{path}.{MAGNITUDE}"] = magnitude
    for path, bias in adapter.biases.items():
        adapted = ".base_layer" if path in adapter.weights else ""
        tensors[f"{_PREFIX}{path}{adapted}.bias"] = bias
    tensors = {key: value.float().cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")
    (folder / CARD).write_text(adapter_card(adapter.config), encoding="utf-8")


def read_adapter(folder: Path) -> PeftAdapter:
    """Read a LoRA exactly as `write_adapter` and peft's save_pretrained write one.

    Raises ValueError, naming the file and what is wrong, for anything that is not a LoRA or DoRA
    with or without biases: unknown keys, one matrix without the other, ranks that differ from the
    configuration's, values that are not finite. FileNotFoundError for a missing file.
    """
    config = read_config(folder / CONFIG_FILE, stock=False)
    file = folder / WEIGHTS_FILE
    _sort_tensors(file, config, read_headers(file), stock=False)  # before anything is allocated
    return _sort_adapter(file, config, read_tensors(file), stock=False)


def read_stock_adapter(folder: Path) -> PeftAdapter:
    """Read a LoRA in the forms that peft reads: safetensors or the older adapter_model.bin, keys
    with the adapter's name or without, patterns for target_modules.

    Which projections are adapted is read off the tensors, and the configuration is held against
    them. Names in rank_pattern and alpha_pattern are regular expressions in peft; here they are the
    last words of a path, or all of it after a `^`, and nothing from a file is run as an expression.

    Raises as `read_adapter`, and for options that make more of it than its tensors say or that are
    not known; biases may be those of the adapted projections alone.
    """
    config = read_config(folder / CONFIG_FILE, stock=True)
    file, old = folder / WEIGHTS_FILE, folder / OLD_WEIGHTS_FILE
    if file.exists() or not old.exists():  # as in peft, safetensors where there are both
        tensors = read_tensors(file)
    else:
        file, tensors = old, read_pickled(old)
    adapter = _sort_adapter(file, config, tensors, stock=True)
    _check_targets(file, adapter)
    return adapter


def read_ranks(folder: Path) -> dict[str, int]:
    """The rank of every projection of an adapter, from its headers alone. Raises as `read_adapter`
    for all but the values."""
    file, config = folder / WEIGHTS_FILE, read_config(folder / CONFIG_FILE, stock=False)
    found = _sort_tensors(file, config, read_headers(file), stock=False)
    kind = PEFT_TYPES[config["peft_type"]]
    return {path: _sizes(kind, matrices)[0] for path, matrices in found.halves.items()}


# Its two files


class _Sorted(NamedTuple):
    """The tensors of an adapter, or their headers, by what they are."""

    halves: dict[str, dict[str, Any]]  # path -> the matrices by name
    magnitudes: dict[str, Any]
    biases: dict[str, Any]


def _sort_adapter(
    file: Path, config: dict[str, Any], tensors: Mapping[str, Any], *, stock: bool
) -> PeftAdapter:
    plain = {key: _to_float32(file, key, tensor) for key, tensor in tensors.items()}
    found = _sort_tensors(file, config, plain, stock=stock)
    names = PEFT_TYPES[config["peft_type"]].matrices
    weights = {path: tuple(own[name] for name in names) for path, own in found.halves.items()}
    return PeftAdapter(config, weights, found.magnitudes, found.biases, file.parent)


def _sort_tensors(
    file: Path,
    config: dict[str, Any],
    tensors: Mapping[str, Tensor] | Mapping[str, Header],
    *,
    stock: bool,
) -> _Sorted:
    """Raises ValueError for a tensor that is no part of the LoRA `config` names, or misses one."""
    if not tensors:
        raise ValueError(f"{file}: holds no tensors")
    found, names = _Sorted({}, {}, {}), set()
    for key, tensor in tensors.items():
        inner = key.removeprefix(_PREFIX)
        if not key.startswith(_PREFIX) or not PLAIN_NAME.fullmatch(inner):
            raise ValueError(f"{file}: {shown(key)} is not {_PREFIX}<path of a tensor>")
        dimensions, home, slot = 1, None, ""
        if match := _MATRIX[config["peft_type"]].fullmatch(inner):
            home, slot = found.halves.setdefault(match["path"], {}), match["slot"]
            dimensions = 2
        elif (match := _MAGNITUDE.fullmatch(inner)) and config.get("use_dora"):
            home, slot = found.magnitudes, match["path"]
        elif (match := _BIAS.fullmatch(inner)) and config.get("bias", "none") != "none":
            home, slot = found.biases, match["path"]
        name = match.groupdict().get("name") if match else None
        if home is None or match is None or (name is not None and not stock):
            raise ValueError(
                f"{file}: {shown(key)} is not a part of the adapter its configuration names"
            )
        if len(tensor.shape) != dimensions:
            shape = list(tensor.shape)
            raise ValueError(f"{file}: {shown(key)} has shape {shape}, not {dimensions} dimensions")
        if slot in home:
            raise ValueError(f"{file}: {shown(key)} appears twice, with and without a name")
        if home is not found.biases:
            names.add(name)
        home[slot] = tensor
    if len(names) > 1:
        listed = ", ".join(sorted(map(str, names)))
        raise ValueError(f"{file} holds several adapters ({listed}): save each by itself")
    _check_halves(file, config, found)
    return found


def _check_halves(file: Path, config: dict[str, Any], found: _Sorted) -> None:
    """Every projection has all matrices, of its rank and of one width each way, and magnitudes
    where the config says so."""
    kind = PEFT_TYPES[config["peft_type"]]
    for path, own in found.halves.items():
        if own.keys() != kind.matrices.keys():
            raise ValueError(f"{file}: {path} has {' and '.join(sorted(own))} alone")
        rank = rank_of(config, path)
        if _sizes(kind, own)[0] != rank:
            shapes = " and ".join(f"{name} {list(own[name].shape)}" for name in kind.matrices)
            raise ValueError(f"{file}: {path} has {shapes}, but the rank is {rank}")
    if config.get("use_dora"):
        for path in sorted(found.halves.keys() ^ found.magnitudes.keys()):
            raise ValueError(f"{file}: {path} has a DoRA magnitude or matrices alone")
    for what, vectors in (("DoRA magnitude", found.magnitudes), ("bias", found.biases)):
        for path in found.halves.keys() & vectors.keys():
            if vectors[path].shape[0] != _sizes(kind, found.halves[path])[2]:
                raise ValueError(f"{file}: {path} has a {what} of another width than B")


def _sizes(kind: PeftType, matrices: Mapping[str, Any]) -> tuple[int, int, int]:
    """r, D and O of the matrices of a projection; 0 where they differ."""
    sizes: dict[str, set[int]] = {}
    for name, axes in kind.matrices.items():
        for axis, size in zip(axes.split(), matrices[name].shape, strict=True):
            sizes.setdefault(axis, set()).add(size)
    r, D, O = (found.pop() if len(found := sizes[axis]) == 1 else 0 for axis in "rdo")  # noqa: E741
    return (0 if 0 in (D, O) else r), D, O


def _to_float32(file: Path, key: str, tensor: Any) -> Tensor:
    """Raises ValueError for what is no plain, finite tensor of a trained LoRA."""
    tensor = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        raise ValueError(f"{file}: {shown(key)} is no plain, dense tensor")
    if "lora_embedding_" in key:
        raise ValueError(
            f"{file}: {shown(key)} adapts an embedding; only projections can be routed"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{file}: {shown(key)} holds {tensor.dtype}, not floating-point numbers")
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f"{file}: {shown(key)} holds values that are not finite")
    return tensor


def _check_targets(file: Path, adapter: PeftAdapter) -> None:
    """Where target_modules are names: no tensor without one, and none without a tensor."""
    config_file = adapter.folder / CONFIG_FILE
    if not adapter.weights:
        names = " and ".join(PEFT_TYPES[adapter.type].matrices)
        raise ValueError(f"{file}: holds no {names}")
    for path in sorted(adapter.biases.keys() - adapter.weights.keys()):
        raise ValueError(f"{file}: {path} has a bias, but is not adapted")
    for path in adapter.weights:
        if adapter.excludes(path):
            raise ValueError(f"{file}: {path} is one of the exclude_modules of {config_file}")
        if adapter.targets is not None and not any(ends_with(path, n) for n in adapter.targets):
            raise ValueError(f"{file}: {path} is none of the target_modules of {config_file}")
    for name in adapter.targets or ():
        if not any(ends_with(path, name) for path in adapter.weights):
            raise ValueError(
                f"{config_file}: target_modules names {name!r}, but {file} has none of that name"
            )


def portable_form(adapter: PeftAdapter) -> PeftAdapter:
    """The form every reader agrees on: scale inside B, lora_alpha == r, one rank, no rslora.

    Raises ValueError for DoRA and for trained biases, which vLLM and llama.cpp refuse.
    """
    if adapter.type != "LORA":
        raise ValueError(
            f"a {adapter.type} expert has no portable form: vLLM and llama.cpp read plain LoRA"
        )
    if adapter.magnitudes:
        raise ValueError("a DoRA expert has no portable form: vLLM and llama.cpp read plain LoRA")
    if adapter.biases:
        raise ValueError("an expert with trained biases has no portable form: export it as it is")
    changes = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    weights = {p: (A, B * scaling_of(adapter.config, p)) for p, (A, B) in adapter.weights.items()}
    rank = max(len(A) for A, _ in weights.values())
    return of_rank(PeftAdapter(adapter.config | changes, weights), rank)


def of_rank(adapter: PeftAdapter, rank: int) -> PeftAdapter:
    """An adapter whose B has the scale inside, with A and B filled up with zeros to a rank."""
    weights = {
        path: (F.pad(A, (0, 0, 0, rank - len(A))), F.pad(B, (0, rank - len(A))))
        for path, (A, B) in adapter.weights.items()
    }
    return adapter._replace(
        config=adapter.config | {"r": rank, "lora_alpha": rank}, weights=weights
    )

"""One LoRA in PEFT's own files: adapter_config.json and adapter_model.safetensors.

The layout was checked against peft 0.21: keys sorted, float32 tensors whatever the base is,
GPT-2's Conv1D not transposed but marked by fan_in_fan_out.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from dylora.config import LARGEST, MAX_ALPHA, matching
from dylora.fields import is_number, is_whole_number, shown
from dylora.storage.safe_io import read_json
from dylora.storage.tensors import Header, read_headers, read_tensors

CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<path>.+)\.lora_(?P<matrix>[AB])\.weight")
_PLAIN_NAME = re.compile(r"[\w.-]+")
_NAMING = ("target_modules", "exclude_modules", "layers_pattern")  # peft matches texts as regexes
_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out")
_MAGNITUDE = ".lora_magnitude_vector"
_ADAPTED_BIAS, _BIAS = ".base_layer.bias", ".bias"


# Settings with which peft computes something else from the same A and B, without a word.
_MORE_THAN_LORA = ("layer_replication", "alora_invocation_tokens")
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base


class PeftAdapter(NamedTuple):
    """A LoRA on its way to or from disk."""

    config: dict[str, Any]  # adapter_config.json
    weights: dict[str, tuple[Tensor, Tensor]]  # path of a projection -> A [r, D], B [O, r]
    magnitudes: Mapping[str, Tensor] = MappingProxyType({})  # DoRA: path of a projection -> [O]
    # Trained biases, the base's included: path of a module -> [O].
    biases: Mapping[str, Tensor] = MappingProxyType({})


def adapter_config(
    *,
    r: int,
    lora_alpha: float,
    target_modules: list[str],
    base_model: str | None,
    revision: str | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    bias: str = "none",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """The content of adapter_config.json: every key that peft, vLLM or llama.cpp looks at."""
    whole = int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha
    return {
        "alpha_pattern": alpha_pattern or {},
        "base_model_name_or_path": base_model,
        "bias": bias,
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": whole,
        "lora_dropout": lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern or {},
        "revision": revision,
        "target_modules": sorted(target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": use_dora,
        "use_rslora": use_rslora,
    }


def write_adapter(folder: Path, adapter: PeftAdapter) -> None:
    """Write both files into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (A, B) in adapter.weights.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = A
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = B
    for path, magnitude in adapter.magnitudes.items():
        tensors[f"{_PREFIX}{path}{_MAGNITUDE}"] = magnitude
    for path, bias in adapter.biases.items():
        tensors[f"{_PREFIX}{path}{_ADAPTED_BIAS if path in adapter.weights else _BIAS}"] = bias
    tensors = {key: value.float().cpu().contiguous() for key, value in tensors.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")


def read_adapter(folder: Path) -> PeftAdapter:
    """Read a LoRA strictly.

    Raises ValueError, naming the file and what is wrong, for anything that is not a LoRA or DoRA
    with or without biases: unknown keys, one matrix without the other, ranks that differ from the
    configuration's, values that are not finite. FileNotFoundError for a missing file.
    """
    config = read_adapter_config(folder)
    file = folder / WEIGHTS_FILE
    _sort_tensors(file, config, read_headers(file))  # before anything is allocated
    found = _sort_tensors(file, config, read_tensors(file))
    for key, tensor in found.by_key.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key!r} holds values that are not finite")
    weights = {path: (pair["A"], pair["B"]) for path, pair in found.halves.items()}
    return PeftAdapter(config, weights, found.magnitudes, found.biases)


def read_shapes(folder: Path) -> dict[str, tuple[int, int, int]]:
    """r, D and O of every projection of a LoRA, from its headers alone. Raises as `read_adapter`
    for all but the values."""
    file = folder / WEIGHTS_FILE
    found = _sort_tensors(file, read_adapter_config(folder), read_headers(file))
    return {path: (*p["A"].shape, p["B"].shape[0]) for path, p in found.halves.items()}


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """adapter_config.json, if it describes a LoRA that `read_adapter` reads. Raises likewise."""
    file = folder / CONFIG_FILE
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {shown(config.get('peft_type'))}, not LORA")
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in config:
            raise ValueError(f"{file}: {key!r} is missing")
    for key, is_right, rule in (
        ("r", _is_rank, f"a whole number from 1 to {LARGEST:,}"),
        ("lora_alpha", _is_alpha, f"a number above 0 and at most {MAX_ALPHA:,.0f}"),
    ):
        if not is_right(config[key]):
            raise ValueError(f"{file}: {key} is {shown(config[key])}, but must be {rule}")
    for key, is_right in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(is_right, pattern.values())):
            raise ValueError(
                f"{file}: {key} {shown(pattern)} does not map names to numbers as "
                f"{'r' if is_right is _is_rank else 'lora_alpha'} may have"
            )
        _require_plain(file, key, pattern)
    for key in _NAMING:
        names = config.get(key)
        if names is not None:
            _require_plain(file, key, [names] if isinstance(names, str) else names)
    for key in _FLAGS:
        if type(config.get(key, False)) is not bool:
            raise ValueError(f"{file}: {key} is {shown(config[key])}, but must be true or false")
    if config.get("bias", "none") not in ("none", "lora_only", "all"):
        raise ValueError(f"{file}: bias {shown(config['bias'])} is not known")
    for key in ("modules_to_save", *_MORE_THAN_LORA):
        if config.get(key):
            raise ValueError(f"{file}: {key} is not supported yet")
    if config.get("kasa_config") is not None:  # peft acts on an empty one, too
        raise ValueError(f"{file}: kasa_config is not supported yet")
    if (init := config.get("init_lora_weights", True)) not in _HARMLESS_INITS:
        raise ValueError(f"{file}: init_lora_weights {shown(init)} changes the base")
    return config


class _Sorted(NamedTuple):
    """The tensors of an adapter, or their headers, by what they are."""

    by_key: Mapping[str, Any]
    halves: dict[str, dict[str, Any]]  # path -> A and B
    magnitudes: dict[str, Any]
    biases: dict[str, Any]


def _sort_tensors(
    file: Path, config: dict[str, Any], tensors: Mapping[str, Tensor] | Mapping[str, Header]
) -> _Sorted:
    """Raises ValueError for a tensor that is no part of the LoRA `config` names, or misses one."""
    if not tensors:
        raise ValueError(f"{file}: holds no tensors")
    found = _Sorted(tensors, {}, {}, {})
    for key, tensor in tensors.items():
        name, dimensions = key.removeprefix(_PREFIX), len(tensor.shape)
        match = _MATRIX.fullmatch(name)
        if not key.startswith(_PREFIX) or not _PLAIN_NAME.fullmatch(name):
            raise ValueError(f"{file}: {shown(key)} is not {_PREFIX}<path of a tensor>")
        if match is not None and dimensions == 2:
            found.halves.setdefault(match["path"], {})[match["matrix"]] = tensor
        elif name.endswith(_MAGNITUDE) and dimensions == 1 and config.get("use_dora"):
            found.magnitudes[name.removesuffix(_MAGNITUDE)] = tensor
        elif name.endswith(_BIAS) and dimensions == 1 and config.get("bias", "none") != "none":
            path = name.removesuffix(_ADAPTED_BIAS).removesuffix(_BIAS)
            if path in found.biases:
                raise ValueError(f"{file}: {path} has two biases")
            found.biases[path] = tensor
        else:
            raise ValueError(
                f"{file}: {shown(key)} is not a part of the LoRA its configuration names"
            )
    for path, pair in found.halves.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{file}: {path} has lora_{next(iter(pair))} alone")
        rank = rank_of(config, path)
        if not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            raise ValueError(
                f"{file}: {path} has A {list(pair['A'].shape)} and B {list(pair['B'].shape)}, "
                f"but the rank is {rank}"
            )
    if config.get("use_dora"):
        for path in found.halves.keys() ^ found.magnitudes.keys():
            raise ValueError(f"{file}: {path} has a DoRA magnitude or matrices alone")
        for path, magnitude in found.magnitudes.items():
            if magnitude.shape[0] != found.halves[path]["B"].shape[0]:
                raise ValueError(f"{file}: {path} has a DoRA magnitude of another width than B")
    return found


def _is_rank(value: Any) -> bool:
    return is_whole_number(value, 1, LARGEST)


def _is_alpha(value: Any) -> bool:
    return is_number(value, 0, MAX_ALPHA) and value > 0


def _require_plain(file: Path, key: str, names: Any) -> None:
    """Raises ValueError for a regular expression: one can hang, and peft would follow it."""
    if not isinstance(names, list | dict):
        raise ValueError(f"{file}: {key} is {shown(names)}, but must be a list of names")
    for name in names:
        if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
            raise ValueError(
                f"{file}: {key} names {shown(name)}, which is no plain name; regular expressions "
                "are not read: write the words at the end of a path"
            )


def portable_form(adapter: PeftAdapter) -> PeftAdapter:
    """The form every reader agrees on: scale inside B, lora_alpha == r, one rank, no rslora.

    Smaller ranks are filled up with zeros. Raises ValueError for DoRA and for trained biases, which
    vLLM and llama.cpp refuse.
    """
    config = adapter.config
    if adapter.magnitudes:
        raise ValueError("a DoRA expert has no portable form: vLLM and llama.cpp read plain LoRA")
    if adapter.biases:
        raise ValueError("an expert with trained biases has no portable form: export it as it is")
    widest = max(len(A) for A, _ in adapter.weights.values())
    weights = {}
    for path, (A, B) in adapter.weights.items():
        missing = widest - len(A)
        scaled = B * scaling_of(config, path)
        weights[path] = (F.pad(A, (0, 0, 0, missing)), F.pad(scaled, (0, missing)))
    changes = {"r": widest, "lora_alpha": widest, "use_rslora": False}
    return PeftAdapter(config | changes | {"rank_pattern": {}, "alpha_pattern": {}}, weights)


def rank_of(config: dict[str, Any], path: str) -> int:
    """The rank at a projection: of the first name in rank_pattern that ends its path, else r."""
    return matching(config.get("rank_pattern"), path, config["r"])


def scaling_of(config: dict[str, Any], path: str = "") -> float:
    """alpha / r, or alpha / sqrt(r) with rslora, at a projection."""
    rank = rank_of(config, path)
    alpha = matching(config.get("alpha_pattern"), path, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)

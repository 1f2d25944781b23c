"""One LoRA in PEFT's own files: adapter_config.json and adapter_model.safetensors.

The layout was checked against peft 0.21: keys sorted, float32 tensors whatever the base is,
GPT-2's Conv1D not transposed but marked by fan_in_fan_out.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(?P<path>.+)\.lora_(?P<matrix>[AB])\.weight")
_PLAIN_NAME = re.compile(r"[\w.]+")
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
    config = read_json(folder / CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        found = config.get("peft_type")
        raise ValueError(f"{folder / CONFIG_FILE}: peft_type is {found!r}, not LORA")
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in config:
            raise ValueError(f"{folder / CONFIG_FILE}: {key!r} is missing")
    r, alpha = config["r"], config["lora_alpha"]
    if not isinstance(r, int) or r < 1:
        raise ValueError(f"{folder / CONFIG_FILE}: r is {r!r}, but must be a whole number above 0")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ValueError(f"{folder / CONFIG_FILE}: lora_alpha is {alpha!r}, but must be a number")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        kind = int if key == "rank_pattern" else int | float
        if not isinstance(pattern, dict) or not all(
            isinstance(value, kind) and 0 < value < math.inf for value in pattern.values()
        ):
            raise ValueError(
                f"{folder / CONFIG_FILE}: {key} {pattern!r} does not map names to numbers above 0"
            )
        for name in pattern:
            if not _PLAIN_NAME.fullmatch(name):
                raise ValueError(
                    f"{folder / CONFIG_FILE}: {key} names {name!r}, a regular expression; "
                    "only the words at the end of a path are read"
                )
    if config.get("bias", "none") not in ("none", "lora_only", "all"):
        raise ValueError(f"{folder / CONFIG_FILE}: bias {config['bias']!r} is not known")
    for key in ("modules_to_save", *_MORE_THAN_LORA):
        if config.get(key):
            raise ValueError(f"{folder / CONFIG_FILE}: {key} is not supported yet")
    if config.get("kasa_config") is not None:  # peft acts on an empty one, too
        raise ValueError(f"{folder / CONFIG_FILE}: kasa_config is not supported yet")
    if (init := config.get("init_lora_weights", True)) not in _HARMLESS_INITS:
        raise ValueError(f"{folder / CONFIG_FILE}: init_lora_weights {init!r} changes the base")
    file = folder / WEIGHTS_FILE
    tensors = read_tensors(file)
    if not tensors:
        raise ValueError(f"{file}: holds no tensors")
    halves: dict[str, dict[str, Tensor]] = {}
    magnitudes, biases = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        match = _MATRIX.fullmatch(name)
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key!r} holds values that are not finite")
        if match is not None and tensor.ndim == 2 and key.startswith(_PREFIX):
            halves.setdefault(match["path"], {})[match["matrix"]] = tensor
        elif name.endswith(_MAGNITUDE) and tensor.ndim == 1 and config.get("use_dora"):
            magnitudes[name.removesuffix(_MAGNITUDE)] = tensor
        elif name.endswith(_BIAS) and tensor.ndim == 1 and config.get("bias", "none") != "none":
            biases[name.removesuffix(_ADAPTED_BIAS).removesuffix(_BIAS)] = tensor
        else:
            raise ValueError(f"{file}: {key!r} is not a part of the LoRA its configuration names")
    weights = {}
    for path, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{file}: {path} has lora_{next(iter(pair))} alone")
        rank = rank_of(config, path)
        if not pair["A"].shape[0] == pair["B"].shape[1] == rank:
            raise ValueError(
                f"{file}: {path} has A {list(pair['A'].shape)} and B {list(pair['B'].shape)}, "
                f"but the rank is {rank}"
            )
        weights[path] = (pair["A"], pair["B"])
    if config.get("use_dora"):
        for path in weights.keys() ^ magnitudes.keys():
            raise ValueError(f"{file}: {path} has a DoRA magnitude or matrices alone")
    return PeftAdapter(config, weights, magnitudes, biases)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError that names the file; FileNotFoundError when missing."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{file} does not exist") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: not a JSON object")
    return content


def read_tensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file. Raises ValueError that names the file; FileNotFoundError when missing."""
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error


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
    return _matching(config.get("rank_pattern"), path, config["r"])


def scaling_of(config: dict[str, Any], path: str = "") -> float:
    """alpha / r, or alpha / sqrt(r) with rslora, at a projection."""
    rank = rank_of(config, path)
    alpha = _matching(config.get("alpha_pattern"), path, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _matching(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """PEFT reads the names as regular expressions; plain ones are the last words of a path."""
    found = (v for name, v in (pattern or {}).items() if f".{path}".endswith(f".{name}"))
    return next(found, default)

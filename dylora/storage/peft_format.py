"""One LoRA in PEFT's own files: adapter_config.json and adapter_model.safetensors.

The layout was checked against peft 0.21: keys sorted, float32 tensors whatever the base is,
GPT-2's Conv1D not transposed but marked by fan_in_fan_out.
"""

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE, OLD_WEIGHTS_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<matrix>[AB])\.weight")


# Settings with which peft computes something else from the same A and B, without a word.
_MORE_THAN_LORA = ("layer_replication", "alora_invocation_tokens")
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base


class PeftAdapter(NamedTuple):
    """A LoRA on its way to or from disk."""

    config: dict[str, Any]  # adapter_config.json
    weights: dict[str, tuple[Tensor, Tensor]]  # path of a projection -> A [r, D], B [O, r]


def adapter_config(
    *,
    r: int,
    lora_alpha: float,
    target_modules: list[str],
    base_model: str | None,
    revision: str | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    fan_in_fan_out: bool = False,
) -> dict[str, Any]:
    """The content of adapter_config.json: every key that peft, vLLM or llama.cpp looks at."""
    whole = int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "none",
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
        "rank_pattern": {},
        "revision": revision,
        "target_modules": sorted(target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": use_rslora,
    }


def write_adapter(folder: Path, adapter: PeftAdapter) -> None:
    """Write both files into `folder`, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, (A, B) in adapter.weights.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = A.float().cpu().contiguous()
        tensors[f"base_model.model.{path}.lora_B.weight"] = B.float().cpu().contiguous()
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(adapter.config, indent=2, sort_keys=True) + "\n")


def read_adapter(folder: Path) -> PeftAdapter:
    """Read a LoRA strictly.

    Raises ValueError, naming the file and what is wrong, for anything that is not a plain LoRA:
    other keys than lora_A and lora_B, one without the other, ranks that differ from the
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
    for key in ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", *_MORE_THAN_LORA):
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
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or tensor.ndim != 2:
            raise ValueError(f"{file}: {key!r} is not a LoRA matrix")
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key!r} holds values that are not finite")
        halves.setdefault(match["path"], {})[match["matrix"]] = tensor
    weights = {}
    for path, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{file}: {path} has lora_{next(iter(pair))} alone")
        if not pair["A"].shape[0] == pair["B"].shape[1] == config["r"]:
            raise ValueError(
                f"{file}: {path} has A {list(pair['A'].shape)} and B {list(pair['B'].shape)}, "
                f"but the rank is {config['r']}"
            )
        weights[path] = (pair["A"], pair["B"])
    return PeftAdapter(config, weights)


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


def fold_scale(adapter: PeftAdapter, scaling: float) -> PeftAdapter:
    """The portable form: scale inside B, lora_alpha == r, rslora off. Every reader then agrees."""
    weights = {path: (A, B * scaling) for path, (A, B) in adapter.weights.items()}
    config = adapter.config | {"lora_alpha": adapter.config["r"], "use_rslora": False}
    return PeftAdapter(config, weights)


def scaling_of(config: dict[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rslora."""
    rank = config["r"]
    return config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)

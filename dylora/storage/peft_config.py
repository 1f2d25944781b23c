"""adapter_config.json of an adapter: written, read strictly, and what it says of a projection."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dylora.config import LARGEST, MAX_ALPHA, ends_with
from dylora.fields import is_number, is_whole_number, shown
from dylora.storage.peft_types import PEFT_TYPES
from dylora.storage.safe_io import read_json

CONFIG_FILE = "adapter_config.json"
PLAIN_NAME = re.compile(r"[\w.-]+")
_FLAGS = ("use_rslora", "use_dora", "fan_in_fan_out")
# Options with which peft computes something else from the same A and B, without a word.
_MORE_THAN_LORA = (
    *("modules_to_save", "layer_replication", "alora_invocation_tokens", "trainable_token_indices"),
    *("target_parameters", "megatron_config", "arrow_config", "velora_config"),
    *("monteclora_config", "lora_bias", "use_qalora", "use_bdlora"),
)
# Options that are read here, or that say nothing of what the tensors compute.
_KNOWN = {
    *("peft_type", "task_type", "r", "rank_pattern", "alpha_pattern", "modules_to_save"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"),
}
_KNOWN_OF_LORA = {
    *("kasa_config", "megatron_core", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *_MORE_THAN_LORA,
}
_WRITTEN = {  # an adapter of ours, but for what `adapter_config` is given
    **dict.fromkeys(("layers_pattern", "layers_to_transform", "modules_to_save", "revision")),
    "alpha_pattern": {},
    "inference_mode": True,
    "rank_pattern": {},
    "task_type": "CAUSAL_LM",
}
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base


_SIZES: Any = (  # of r and alpha: their pattern, what a value must be, and that in words
    (
        "rank_pattern",
        lambda value: is_whole_number(value, 1, LARGEST),
        f"a whole number from 1 to {LARGEST:,}",
    ),
    (
        "alpha_pattern",
        lambda value: is_number(value, 0, MAX_ALPHA) and value > 0,
        f"a number above 0 and at most {MAX_ALPHA:,.0f}",
    ),
)


def adapter_config(peft_type: str = "LORA", **settings: Any) -> dict[str, Any]:
    """The content of adapter_config.json: every key that peft, vLLM or llama.cpp looks at.

    settings: r, lora_alpha, target_modules and what else is not as by default.
    """
    kind = PEFT_TYPES[peft_type]
    config = _WRITTEN | kind.settings | {"peft_type": peft_type} | settings
    alpha = config.pop("lora_alpha")
    config[kind.alpha] = int(alpha) if float(alpha).is_integer() else alpha
    return config | {"target_modules": sorted(config["target_modules"])}


def read_config(file: Path, *, stock: bool) -> dict[str, Any]:
    """adapter_config.json, if it describes an adapter that is read here: one of ours, or with
    `stock` one of peft's. Raises ValueError, naming the key, FileNotFoundError if it is missing."""
    config = read_json(file)
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPES:
        raise ValueError(f"{file}: peft_type is {shown(peft_type)}, not {' or '.join(PEFT_TYPES)}")
    kind = PEFT_TYPES[peft_type]
    for key in ("r", kind.alpha, *(() if stock else ("target_modules",))):
        if key not in config:
            raise ValueError(f"{file}: {key!r} is missing, and its value cannot be guessed")
    for key, (pattern_key, is_right, rule) in zip(("r", kind.alpha), _SIZES, strict=True):
        if not is_right(config[key]):
            raise ValueError(f"{file}: {key} is {shown(config[key])}, but must be {rule}")
        pattern = config.get(pattern_key) or {}
        if not isinstance(pattern, dict) or not all(map(is_right, pattern.values())):
            raise ValueError(
                f"{file}: {pattern_key} {shown(pattern)} does not map names to {rule} each"
            )
        _require_plain(file, pattern_key, list(map(_without_ends, pattern) if stock else pattern))
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        names = config.get(key)
        if names is not None and not (stock and isinstance(names, str)):  # it is not run
            _require_plain(file, key, names)
    for key in _FLAGS:
        if config.get(key) is not None and type(config[key]) is not bool:
            raise ValueError(f"{file}: {key} is {shown(config[key])}, but must be true or false")
    bias = config.get("bias", "none")
    if bias not in ("none", "lora_only") and (stock or bias != "all"):
        reason = "changes biases that no gate could undo" if bias == "all" else "is not known"
        raise ValueError(f"{file}: bias {shown(bias)} {reason}")
    more = [key for key in _MORE_THAN_LORA if config.get(key)]
    if config.get("kasa_config") is not None:  # peft acts on an empty one, too
        more.append("kasa_config")
    for key in more:
        raise ValueError(f"{file}: {key} is not supported: it makes more of it than a LoRA")
    init = config.get("init_lora_weights", True)
    if not any(init is known or init == known for known in _HARMLESS_INITS):
        raise ValueError(
            f"{file}: init_lora_weights {shown(init)} changes the base: let peft convert the "
            "adapter (path_initial_model_for_weight_conversion)"
        )
    base = config.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{file}: base_model_name_or_path is {shown(base)}, but must be a name")
    _check_known(file, config)
    return config


def _check_known(file: Path, config: dict[str, Any]) -> None:
    """Raises ValueError for an option that may change what the adapter computes."""
    kind = PEFT_TYPES[config["peft_type"]]
    known = _KNOWN | kind.settings.keys() | {kind.alpha}
    known |= _KNOWN_OF_LORA if config["peft_type"] == "LORA" else set()
    for key in sorted(config.keys() - known):  # an unset one does nothing
        if config[key] is not None and config[key] is not False:
            raise ValueError(
                f"{file}: {shown(key)} is {shown(config[key])}, which is not known: remove it "
                "if it does not change what the adapter computes"
            )


def rank_of(config: Mapping[str, Any], path: str) -> int:
    """The rank at a projection: of the first name in rank_pattern that fits its path, else r."""
    return _first_match(config.get("rank_pattern"), path, config["r"])


def alpha_of(config: Mapping[str, Any], path: str) -> float:
    """The numerator of the scale at a projection, likewise."""
    usual = config[PEFT_TYPES[config.get("peft_type", "LORA")].alpha]
    return float(_first_match(config.get("alpha_pattern"), path, usual))


def scaling_of(config: Mapping[str, Any], path: str = "") -> float:
    """alpha / r, or alpha / sqrt(r) with rslora, at a projection."""
    rank = rank_of(config, path)
    return alpha_of(config, path) / (rank**0.5 if config.get("use_rslora") else rank)


def _without_ends(name: Any) -> Any:
    """A name of a pattern without what marks its ends, and with plain dots."""
    if not isinstance(name, str):
        return name
    return name.removeprefix("^").removesuffix("$").replace("\\.", ".")


def _first_match(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first name that fits a path: its last words, or after ^ all of it."""
    for name, value in (pattern or {}).items():
        plain = _without_ends(name)
        if path == plain or (not name.startswith("^") and ends_with(path, plain)):
            return value
    return default


def _require_plain(file: Path, key: str, names: Any) -> None:
    """Raises ValueError for a regular expression: one can hang, and peft would follow it."""
    if not isinstance(names, list | dict):
        raise ValueError(f"{file}: {key} is {shown(names)}, but must be a list of names")
    for name in names:
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise ValueError(
                f"{file}: {key} names {shown(name)}, which is no plain name; regular expressions "
                "are not run: write the words at the end of a path"
            )

"""Adapters and checkpoints made elsewhere: what a folder holds, and a strict reader.

`detect_format` looks at names of files, and into a config.json. `read_foreign_adapter` takes a
stock PEFT LoRA in the forms in use, and no other: safetensors or the older adapter_model.bin, keys
with the adapter's name or without, other ranks and alphas for some projections, DoRA, biases of
kind lora_only; checked against peft 0.21. Which projections are adapted is read off the tensors,
and the configuration is checked against them. Names in rank_pattern and alpha_pattern are regular
expressions in peft; here they are the last words of a path, or all of it after a `^`, and nothing
from a file is ever run as an expression.
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dylora.storage.peft_format import CONFIG_FILE, OLD_WEIGHTS_FILE, WEIGHTS_FILE
from dylora.storage.safe_io import read_json
from dylora.storage.tensors import read_state, read_tensors

_PREFIX = "base_model.model."
_NAME = r"(?:\.(?P<name>[^.]+))?"  # peft keeps the adapter's name in memory, and some tools on disk
_MATRIX = re.compile(rf"(?P<path>.+)\.lora_(?P<matrix>[AB]){_NAME}\.weight")
_MAGNITUDE = re.compile(rf"(?P<path>.+)\.lora_magnitude_vector{_NAME}(?:\.weight)?")
_BIAS = re.compile(r"(?P<path>.+?)(?:\.base_layer)?\.bias")
_PLAIN = re.compile(r"[\w.-]+")
# Settings with which peft computes something else from the same A and B.
_MORE_THAN_LORA = (
    *("modules_to_save", "layer_replication", "alora_invocation_tokens", "trainable_token_indices"),
    *("target_parameters", "megatron_config", "arrow_config", "velora_config"),
    *("monteclora_config", "lora_bias", "use_qalora", "use_bdlora"),
)
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base
_WHOLE_MODEL = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin")
_WHOLE_MODEL += ("pytorch_model-*.bin", "model.safetensors.index.json")


class ForeignAdapter(NamedTuple):
    """A LoRA as it was made elsewhere; all tensors float32."""

    folder: Path
    config: dict[str, Any]  # adapter_config.json
    weights: dict[str, tuple[Tensor, Tensor]]  # path of a projection -> A [r, D], B [O, r]
    ranks: dict[str, int]  # path -> r
    alphas: dict[str, float]  # path -> alpha
    magnitudes: dict[str, Tensor]  # DoRA: path -> [O]
    biases: dict[str, Tensor]  # lora_only: path -> [O], the base's included

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def base(self) -> str | None:
        """The base that it says it was made for."""
        return self.config.get("base_model_name_or_path")

    @property
    def targets(self) -> list[str] | None:
        """target_modules where they are names; None for a pattern or a keyword of peft's."""
        targets = self.config.get("target_modules")
        return targets if isinstance(targets, list) else None

    def scale(self, path: str) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora."""
        rank = self.ranks[path]
        return self.alphas[path] / (rank**0.5 if self.config.get("use_rslora") else rank)


def _number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (-1, text)


def _absent(folder: Path) -> str:
    return f"{folder} does not exist"


# Reading an adapter


def read_foreign_adapter(folder: Path) -> ForeignAdapter:
    """Read a stock PEFT LoRA strictly.

    Raises ValueError, naming file and key, for what is no LoRA, for settings that make more of it
    than A and B say, for tensors that the configuration does not name or that do not fit it, and
    for values that are not finite; FileNotFoundError for a missing file.
    """
    file = folder / CONFIG_FILE
    config = read_json(file)
    _check_config(file, config)
    source, tensors = _read_weights(folder)
    halves: dict[str, dict[str, Tensor]] = {}
    magnitudes: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    names: set[str | None] = set()
    for key, tensor in tensors.items():
        tensor = _checked(source, key, tensor)
        inner = key.removeprefix(_PREFIX)
        name, dimensions = None, 1
        home: dict[str, Tensor]
        if match := _MATRIX.fullmatch(inner):
            home, slot = halves.setdefault(match["path"], {}), match["matrix"]
            name, dimensions = match["name"], 2
        elif (match := _MAGNITUDE.fullmatch(inner)) and config.get("use_dora"):
            home, slot, name = magnitudes, match["path"], match["name"]
        elif (match := _BIAS.fullmatch(inner)) and config.get("bias", "none") == "lora_only":
            home, slot = biases, match["path"]
        else:
            raise ValueError(f"{source}: {key!r} is not a part of the LoRA that {file} describes")
        if slot in home:
            raise ValueError(f"{source}: {key!r} stands there twice, with and without a name")
        if tensor.ndim != dimensions:
            shape = list(tensor.shape)
            raise ValueError(
                f"{source}: {key!r} has the shape {shape}, not {dimensions} dimensions"
            )
        if home is not biases:
            names.add(name)
        home[slot] = tensor
    if len(names) > 1:
        shown = ", ".join(sorted(str(name) for name in names))
        raise ValueError(f"{source} holds several adapters ({shown}): save each by itself")
    weights = {}
    for path, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{source}: {path} has lora_{next(iter(pair))} alone")
        weights[path] = (pair["A"], pair["B"])
    ranks = {path: _of(config.get("rank_pattern"), path, config["r"]) for path in weights}
    for path, (A, B) in weights.items():
        if not len(A) == B.shape[1] == ranks[path]:
            raise ValueError(
                f"{source}: {path} has A {list(A.shape)} and B {list(B.shape)}, but {file} gives "
                f"it the rank {ranks[path]}"
            )
    alphas = {
        path: float(_of(config.get("alpha_pattern"), path, config["lora_alpha"]))
        for path in weights
    }
    adapter = ForeignAdapter(folder, config, weights, ranks, alphas, magnitudes, biases)
    _check_targets(file, source, adapter)
    return adapter


def _read_weights(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The tensors, of safetensors where there are both forms, as in peft."""
    file, old = folder / WEIGHTS_FILE, folder / OLD_WEIGHTS_FILE
    if file.exists() or not old.exists():
        tensors = read_tensors(file)
    else:
        file, tensors = old, read_pickled(old)
    if not tensors:
        raise ValueError(f"{file}: holds no tensors")
    return file, tensors


def read_pickled(file: Path) -> dict[str, Any]:
    """A dictionary that torch.save wrote, read within the bounds of `read_state`.

    Raises ValueError for a file that holds more than dense tensors and plain values.
    """
    try:
        content = read_state(file)
    except ValueError as error:
        reason = str(error.__cause__ or error).split("\n", 1)[0]
        raise ValueError(f"{file}: not a file of plain tensors ({reason})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{file}: holds a {type(content).__name__}, not tensors by name")
    return content


def _checked(file: Path, key: str, tensor: Any) -> Tensor:
    """The tensor in float32. Raises ValueError for what is none, or not a trained LoRA's."""
    if isinstance(tensor, nn.Parameter):
        tensor = tensor.data
    if type(tensor) is not Tensor or tensor.layout != torch.strided:
        raise ValueError(f"{file}: {key!r} is no plain, dense tensor")
    if not key.startswith(_PREFIX):
        raise ValueError(f"{file}: {key!r} does not begin with {_PREFIX!r}, as PEFT's keys do")
    if "lora_embedding_" in key:
        raise ValueError(f"{file}: {key!r} adapts an embedding; only projections can be routed")
    if not tensor.is_floating_point():
        raise ValueError(f"{file}: {key!r} holds {tensor.dtype}, not numbers with a fraction")
    tensor = tensor.float()
    if not tensor.isfinite().all():
        raise ValueError(f"{file}: {key!r} holds values that are not finite")
    return tensor


def _check_config(file: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}, not LORA")
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise ValueError(f"{file}: {key!r} is missing, and its value cannot be guessed")
    if not _is_rank(config["r"]):
        raise ValueError(f"{file}: r is {config['r']!r}, but must be a whole number above 0")
    if not _is_alpha(config["lora_alpha"]):
        shown = config["lora_alpha"]
        raise ValueError(f"{file}: lora_alpha is {shown!r}, but must be a number above 0")
    for key, fits in (("rank_pattern", _is_rank), ("alpha_pattern", _is_alpha)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(fits, pattern.values())):
            raise ValueError(f"{file}: {key} {pattern!r} does not map names to numbers above 0")
        for name in pattern:
            if not _PLAIN.fullmatch(_plain(name)):
                raise ValueError(
                    f"{file}: {key} names {name!r}, a regular expression, and none from a file is "
                    "run: write the paths of the projections instead"
                )
    if (bias := config.get("bias", "none")) not in ("none", "lora_only"):
        what = "changes biases that no gate could take back" if bias == "all" else "is not known"
        raise ValueError(f"{file}: bias {bias!r} {what}")
    for key in _MORE_THAN_LORA:
        if config.get(key):
            raise ValueError(f"{file}: {key} makes more of it than a LoRA of A and B")
    if config.get("kasa_config") is not None:  # peft acts on an empty one, too
        raise ValueError(f"{file}: kasa_config makes more of it than a LoRA of A and B")
    init = config.get("init_lora_weights", True)
    if not any(init is known or init == known for known in _HARMLESS_INITS):
        raise ValueError(
            f"{file}: init_lora_weights {init!r} changes the base: let peft convert the adapter "
            "(path_initial_model_for_weight_conversion)"
        )
    base, targets = config.get("base_model_name_or_path"), config.get("target_modules")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{file}: base_model_name_or_path is {base!r}, but must be a name")
    if isinstance(targets, list) and not all(isinstance(name, str) for name in targets):
        raise ValueError(f"{file}: target_modules {targets!r} are not all names")


def _check_targets(file: Path, source: Path, adapter: ForeignAdapter) -> None:
    """Where target_modules are names: no tensor without one, and none without a tensor."""
    weights = adapter.weights
    if not weights:
        raise ValueError(f"{source}: holds no lora_A and lora_B")
    if adapter.targets is not None:
        for path in weights:
            if not any(_ends(path, name) for name in adapter.targets):
                raise ValueError(f"{source}: {path} is none of the target_modules of {file}")
        for name in adapter.targets:
            if not any(_ends(path, name) for path in weights):
                raise ValueError(f"{file}: target_modules names {name!r}, but {source} has none")
    if adapter.config.get("use_dora"):
        for path in sorted(weights.keys() ^ adapter.magnitudes.keys()):
            raise ValueError(f"{source}: {path} has a DoRA magnitude or matrices alone")
    for path in sorted(adapter.biases.keys() - weights.keys()):
        raise ValueError(f"{source}: {path} has a bias, but is not adapted")
    for path, (_, B) in weights.items():
        for kind in (adapter.magnitudes, adapter.biases):
            if path in kind and len(kind[path]) != len(B):
                raise ValueError(
                    f"{source}: {path} has {len(B)} outputs, but a vector of {len(kind[path])}"
                )


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_alpha(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value < math.inf


def _plain(name: str) -> str:
    """A name of a pattern without what marks its ends, and with plain dots."""
    return name.removeprefix("^").removesuffix("$").replace("\\.", ".")


def _of(pattern: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first name that fits a path: its last words, or after ^ all of it."""
    for name, value in (pattern or {}).items():
        if path == _plain(name) or (not name.startswith("^") and _ends(path, _plain(name))):
            return value
    return default


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")

"""config.json of a mixture, believed only as far as its files bear it out.

Whatever decides how much memory a mixture takes (how many experts, of which ranks, how wide the
routers) is held against the headers of the folder's own files. A mixture that is built from a
checked description is therefore as large as its files, or as its base demands.
"""

import warnings
from pathlib import Path
from typing import Any, get_args

from dylora.config import LARGEST, MAX_ALPHA, MoELoraConfig, Quantization, matching
from dylora.fields import is_name, is_number, is_whole_number, shown
from dylora.storage.peft_format import read_shapes
from dylora.storage.safe_io import require_keys
from dylora.storage.tensors import Header, read_headers

ADAPTERS, ROUTER_FILE = "peft_adapters", "router.safetensors"
# The shifts of trained biases as they are: an adapter holds base + shift, which rounds.
SHIFTS_FILE = "bias_shifts.safetensors"
FORMAT_VERSION = 2  # of a mixture's config.json
MAX_FILLING = 64  # a stack is as wide as its widest expert: so many times what its files hold
STATES = ("active", "frozen", "retired")
_MATURITY = ("maturity", "evidence", "fast", "slow", "born")


def check_description(folder: Path, description: dict[str, Any]) -> None:
    """Raises ValueError naming config.json, or the file it does not fit, and the key."""
    file = folder / "config.json"
    version = description.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {shown(version)}; this version reads {FORMAT_VERSION}"
        )
    if "base_fingerprint" in description:
        require_keys(file, "base_fingerprint.", description["base_fingerprint"], _FINGERPRINT)
    require_keys(file, "", description, _KEYS, optional=("base_fingerprint",))
    config = read_config(file, description["moe"])
    _check_table(file, description["experts"], config)
    _check_training(file, description["training"])
    _check_routers(folder / ROUTER_FILE, description, config)
    for record in description["experts"]:
        if record["state"] != "retired":
            _check_adapter(folder / ADAPTERS / record["name"], record, description, config)


# Its parts


def _is_text(value: Any) -> bool:
    return value is None or is_name(value)


def _is_revision(value: Any) -> bool:
    if value is None:
        return True
    return is_name(value, 200) and value[0] != "/" and ".." not in value.split("/")


def _are_paths(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_name, value)) and len(set(value)) == len(value)


_KEYS = {
    "format_version": lambda value: type(value) is int,
    "base_model_name_or_path": _is_text,
    "base_revision": _is_revision,
    "quantization": lambda value: value in get_args(Quantization),
    "moe": lambda value: isinstance(value, dict),
    "sites": _are_paths,
    "projections": _are_paths,
    "experts": lambda value: isinstance(value, list) and 1 <= len(value) <= LARGEST,
    "training": lambda value: isinstance(value, dict),
}
_FINGERPRINT = {  # an optional key: checkpoints had none before
    **dict.fromkeys(
        ("vocabulary", "layers", "width"), lambda value: value is None or is_whole_number(value)
    ),
    "dtype": is_name,
    **dict.fromkeys(("embedding", "projections", "rotary", "tokenizer"), _is_text),
}
RECORD = {  # a row of the table of experts
    "name": is_name,
    "rank": lambda value: is_whole_number(value, 1, LARGEST),
    "alpha": lambda value: is_number(value, 0, MAX_ALPHA) and value > 0,
    "state": lambda value: value in STATES,
    "takes_part": lambda value: type(value) is bool,
    "skill": _is_text,
    "steps": is_whole_number,
    "stack": lambda value: is_whole_number(value, -1),
    "history": lambda value: isinstance(value, list) and all(isinstance(x, dict) for x in value),
    "maturity": lambda value: is_number(value, 0, 1),
}


def read_config(file: Path, values: dict[str, Any]) -> MoELoraConfig:
    """`moe` of a config.json. Raises ValueError naming the field."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that do nothing: the model's to give
            return MoELoraConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: moe: {error}") from error


def _check_table(file: Path, records: list[Any], config: MoELoraConfig) -> None:
    previous = None
    stacks: list[list[int]] = []  # ranks of those that lie in one tensor
    for index, record in enumerate(records):
        where = f"experts[{index}]."
        require_keys(file, where, record, RECORD)
        if record["name"] != f"expert_{index}":
            raise ValueError(
                f"{file}: {where}name is {shown(record['name'])}, but must be expert_{index}"
            )
        if record["state"] == "retired":
            if record["takes_part"]:
                raise ValueError(f"{file}: {where}takes_part is true, but the expert is retired")
            previous = None
            continue
        if config.share_A and record["rank"] != config.r:
            raise ValueError(
                f"{file}: {where}rank is {record['rank']}, but with share_A it is r ({config.r})"
            )
        trained = record["state"] == "active" and record["takes_part"]
        if previous == (record["stack"], not trained):
            raise ValueError(
                f"{file}: {where}stack is {record['stack']} as of the expert before, but only one "
                "of them is trained"
            )
        if previous != (record["stack"], trained):
            stacks.append([])
        stacks[-1].append(record["rank"])
        previous = (record["stack"], trained)
    filled = sum(len(ranks) * max(ranks) for ranks in stacks)
    if filled > MAX_FILLING * sum(map(sum, stacks)):
        raise ValueError(
            f"{file}: experts: one stack holds ranks so different that it would take more than "
            f"{MAX_FILLING} times their memory"
        )
    if not any(record["takes_part"] for record in records):
        raise ValueError(f"{file}: experts: none of them takes part")
    if config.expert_count > len(records):
        raise ValueError(
            f"{file}: moe.num_experts is {config.num_experts}, but experts lists {len(records)}"
        )
    if not config.use_moe_routing and len(records) != 1:
        raise ValueError(f"{file}: experts lists {len(records)}, but nothing routes between them")


def _check_training(file: Path, training: dict[str, Any]) -> None:
    """What is read of it: numbers, and the data it was trained on."""
    for key in ("step", "targets", "seed"):
        if not is_whole_number(training.get(key, 0)):
            raise ValueError(f"{file}: training.{key} is {shown(training[key])}, no whole number")
    data = training.get("data", {})
    sources = data.get("sources", []) if isinstance(data, dict) else None
    if not isinstance(sources, list):
        raise ValueError(f"{file}: training.data is no object with a list of sources")
    for index, source in enumerate(sources):
        where = f"training.data.sources[{index}]"
        if not (
            isinstance(source, dict)
            and is_name(source.get("name"))
            and _is_text(source.get("split_scheme"))
            and is_whole_number(source.get("training_rows", 0))
        ):
            raise ValueError(
                f"{file}: {where} is {shown(source)}, but must have a name; split_scheme is a text "
                "and training_rows a number"
            )
        tasks = source.get("task_ids", [])
        if not (isinstance(tasks, list) and all(map(is_whole_number, tasks))):
            raise ValueError(f"{file}: {where}.task_ids is {shown(tasks)}, which is invalid")


# Against the headers of the other files


def _check_routers(file: Path, description: dict[str, Any], config: MoELoraConfig) -> None:
    """Every router has a row an expert, and the hidden width that the configuration names."""
    headers = read_headers(file)
    experts = len(description["experts"])
    for name in (*(f"maturity.{part}" for part in _MATURITY), "fixed_weights"):
        _require_shape(file, headers, name, [experts])
    hidden, sites = config.router_hidden_size, description["sites"]
    if not config.use_moe_routing or config.router_type == "fixed":
        sites = []
    elif config.router_scope == "shared":
        sites = sites[:1]
    for site in sites:
        _require_shape(file, headers, f"router.{site}.outer.weight", [experts, hidden])
        _require_shape(file, headers, f"router.{site}.outer.bias", [experts])
        if hidden is not None:
            _require_shape(file, headers, f"router.{site}.inner.weight", [hidden, None])
            _require_shape(file, headers, f"router.{site}.inner.bias", [hidden])


def _require_shape(
    file: Path, headers: dict[str, Header], name: str, wanted: list[int | None]
) -> None:
    if name not in headers:
        raise ValueError(f"{file}: {name} is missing")
    found = headers[name].shape
    if len(found) != len(wanted) or any(
        w is not None and w != f for w, f in zip(wanted, found, strict=True)
    ):
        shape = [size or "any" for size in wanted]
        raise ValueError(f"{file}: {name} has shape {list(found)}, but config.json means {shape}")


def _check_adapter(
    source: Path, record: dict[str, Any], description: dict[str, Any], config: MoELoraConfig
) -> None:
    """An expert has exactly the projections that are listed, of the rank that is."""
    shapes = read_shapes(source)
    for path in description["projections"]:
        if path not in shapes:
            raise ValueError(f"{source}: {path} is missing")
        rank = matching(config.rank_pattern, path, record["rank"])
        if shapes[path][0] != rank:
            raise ValueError(
                f"{source}: {path} has rank {shapes[path][0]}, but config.json means {rank}"
            )
    for path in shapes.keys() - set(description["projections"]):
        raise ValueError(f"{source}: {path} is none of the projections in config.json")

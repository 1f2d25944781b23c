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
from dylora.routing.maturity import fields_in
from dylora.routing.router import Shape, router_class
from dylora.storage.peft_format import read_ranks
from dylora.storage.safe_io import read_json, require_keys
from dylora.storage.tensors import read_headers
from dylora.storage.text_hashes import read_hashes

ADAPTERS, ROUTER_FILE = "peft_adapters", "router.safetensors"
# The shifts of trained biases as they are: an adapter holds base + shift, which rounds.
SHIFTS_FILE = "bias_shifts.safetensors"
SKILLS_FILE = "skill_library.safetensors"  # where the mixture has a skill library
EXPORT_FILE = "dylora_export.json"  # what an exported mixture or merged model was made of
FORMAT_VERSION = 2  # of a mixture's config.json
MAX_TEMPLATE = 256 << 10  # characters of a chat template; those of the hub have up to 20 KiB
FIXED_WEIGHTS = "fixed_weights"  # [E] in the routers' file, of router_type fixed
STATES = ("active", "frozen", "retired")


def read_description(folder: Path) -> dict[str, Any]:
    """config.json, with the keys of today, and `text_hashes` in its training record.

    Raises ValueError naming it, or the file it does not fit, and the key.
    """
    file = folder / "config.json"
    description = read_json(file)
    version = description.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format_version {shown(version)}; this version reads {FORMAT_VERSION}"
        )
    require_keys(file, "", description, _KEYS, {"base_fingerprint": lambda value: True})
    if "base_fingerprint" in description:
        require_keys(file, "base_fingerprint.", description["base_fingerprint"], _FINGERPRINT)
    config = read_config(file, description["moe"])
    description["experts"] = [current_keys(record) for record in description["experts"]]
    _check_table(file, description["experts"], config)
    description["training"] = checked_training(folder, description["training"])
    _check_routers(folder / ROUTER_FILE, description, config)
    for record in description["experts"]:
        if record["state"] != "retired":
            source = folder / ADAPTERS / record["name"]
            _check_adapter(source, record["rank"], description["projections"], config)
    return description


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
_SOURCE = {  # what is read of a data set
    "name": is_name,
    "split_scheme": _is_text,
    "training_rows": is_whole_number,
    "task_ids": lambda value: isinstance(value, list) and all(map(is_whole_number, value)),
    "text_hashes": lambda value: isinstance(value, str),
}
RECORD = {  # a row of the table of experts
    "name": is_name,
    "rank": lambda value: is_whole_number(value, 1, LARGEST),
    "alpha": lambda value: is_number(value, 0, MAX_ALPHA) and value > 0,
    "state": lambda value: value in STATES,
    "enabled": lambda value: type(value) is bool,
    "skill": _is_text,
    "steps": is_whole_number,
    "stack": lambda value: is_whole_number(value, -1),
    "history": lambda value: isinstance(value, list) and all(isinstance(x, dict) for x in value),
    "maturity": lambda value: is_number(value, 0, 1),
}


def current_keys(record: Any) -> Any:
    """A row of the table of experts, whose keys may be those of an earlier version."""
    if isinstance(record, dict) and "takes_part" in record and "enabled" not in record:
        record = {"enabled" if k == "takes_part" else k: value for k, value in record.items()}
    return record


def read_config(file: Path, values: dict[str, Any]) -> MoELoraConfig:
    """`moe` of a config.json. Raises ValueError naming the field.

    What an earlier version did not write has the value that it meant then.
    """
    if values.get("use_moe_routing", True):
        values = {"gate_scale": "sum_to_one"} | values
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of settings that do nothing: the model's to give
            return MoELoraConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{file}: moe: {error}") from error


def _check_table(file: Path, records: list[Any], config: MoELoraConfig) -> None:
    for index, record in enumerate(records):
        require_keys(file, f"experts[{index}].", record, RECORD)
        name, rank, retired = record["name"], record["rank"], record["state"] == "retired"
        before = records[index - 1] if index else {"state": "retired"}
        split = not retired and before["state"] != "retired" and before["stack"] == record["stack"]
        refused = {
            f"name is {shown(name)}, but must be expert_{index}": name != f"expert_{index}",
            "enabled is true, but the expert is retired": retired and record["enabled"],
            f"rank is {rank}, but with share_A it is r ({config.r})": (
                not retired and config.share_A and rank != config.r
            ),
            f"stack is {record['stack']} as of the expert before, but only one of them is "
            "trained": split and _is_trained(before) != _is_trained(record),
        }
        _refuse(file, f"experts[{index}].", refused)
    live = [record for record in records if record["state"] != "retired"]
    count = len(records)
    refused = {
        "experts: none of them is enabled": not any(record["enabled"] for record in live),
        f"moe.num_experts is {config.num_experts}, but experts lists {count}": (
            config.expert_count > count
        ),
        f"experts lists {count}, but nothing routes between them": (
            not config.use_moe_routing and count != 1
        ),
    }
    _refuse(file, "", refused)


def _is_trained(record: dict[str, Any]) -> bool:
    return record["state"] == "active" and record["enabled"]


def _refuse(file: Path, where: str, refused: dict[str, bool]) -> None:
    """Raises ValueError with the first of the texts that is true."""
    for text, is_so in refused.items():
        if is_so:
            raise ValueError(f"{file}: {where}{text}")


def checked_training(folder: Path, training: Any) -> dict[str, Any]:
    """The training record of a folder's config.json, with the hashes that lie beside it.

    Raises ValueError naming the file, and the key, where it is none.
    """
    _check_training(folder / "config.json", training)
    hashes = read_hashes(folder)
    return training | {"text_hashes": hashes} if hashes else training


def _check_training(file: Path, training: Any, at: str = "training") -> None:
    """What is read of it, and of the records that it continues: numbers and data."""
    if not isinstance(training, dict):
        raise ValueError(f"{file}: {at} is {shown(training)}, not an object")
    numbers = {key: training.get(key, 0) for key in ("step", "targets", "seed")}
    require_keys(file, f"{at}.", numbers, dict.fromkeys(numbers, is_whole_number))
    if not isinstance(hashes := training.get("text_hashes", ""), str):
        raise ValueError(f"{file}: {at}.text_hashes is {shown(hashes)}, not a text")
    earlier = training.get("earlier", [])
    if not isinstance(earlier, list):
        raise ValueError(f"{file}: {at}.earlier is {shown(earlier)}, not a list")
    for index, record in enumerate(earlier):
        _check_training(file, record, f"{at}.earlier[{index}]")
    data = training.get("data", {})
    sources = data.get("sources", []) if isinstance(data, dict) else None
    if not isinstance(sources, list):
        raise ValueError(f"{file}: {at}.data is no object with a list of sources")
    template = data.get("prompt")
    if not (template is None or (isinstance(template, str) and len(template) <= MAX_TEMPLATE)):
        raise ValueError(f"{file}: {at}.data.prompt is {shown(template)}, which is no template")
    for index, source in enumerate(sources):
        read = source
        if isinstance(source, dict):
            read = {key: source[key] for key in _SOURCE.keys() & source.keys()}
        where = f"{at}.data.sources[{index}]."
        require_keys(file, where, read, {"name": is_name}, _SOURCE)


# Against the headers of the other files


def _check_routers(file: Path, description: dict[str, Any], config: MoELoraConfig) -> None:
    """Every router has the tensors of its kind for these experts; widths are the base's."""
    experts, sites = len(description["experts"]), description["sites"]
    headers = read_headers(file)
    wanted: dict[str, Shape] = {f"maturity.{part}": [experts] for part in fields_in(headers)}
    wanted[FIXED_WEIGHTS] = [experts]
    if config.is_learned:
        spec = router_class(config).state_spec(config, experts)
        for site in sites if config.router_scope == "site" else sites[:1]:
            wanted |= {f"router.{site}.{name}": shape for name, shape in spec.items()}
    for name, sizes in wanted.items():
        if name not in headers:
            raise ValueError(f"{file}: {name} is missing")
        found = headers[name].shape
        if len(found) != len(sizes) or any(
            size not in (None, other) for size, other in zip(sizes, found, strict=True)
        ):
            shape = [size or "any" for size in sizes]
            raise ValueError(
                f"{file}: {name} has shape {list(found)}, but config.json means {shape}"
            )


def _check_adapter(source: Path, rank: int, paths: list[str], config: MoELoraConfig) -> None:
    """An expert has exactly the projections that are listed, of the rank that is."""
    ranks = read_ranks(source)
    for path in paths:
        if path not in ranks:
            raise ValueError(f"{source}: {path} is missing")
        expected = matching(config.rank_pattern, path, rank)
        if ranks[path] != expected:
            raise ValueError(
                f"{source}: {path} has rank {ranks[path]}, but config.json means {expected}"
            )
    for path in ranks.keys() - set(paths):
        raise ValueError(f"{source}: {path} is none of the projections in config.json")

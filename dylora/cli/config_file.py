"""A run's YAML file to `RunConfig`, with errors that name file, key and remedy.

The file is read strictly (no duplicate keys, no unknown ones), overrides such as
`train.learning_rate=1e-4` are laid over it, and `fields.build` makes the dataclasses of it. Paths
inside a config are relative to the working directory.
"""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

import yaml

from dylora.cli.hints import unknown_key
from dylora.fields import FieldError, UnknownKey, build, closest, field_types, join, shown
from dylora.run_config import RunConfig
from dylora.storage.safe_io import read_bytes, read_json, require_followable

T = TypeVar("T")
COMMAND_LINE = "command line"
SHIPPED = Path(__file__).parents[1] / "configs"  # they come with the package
MAX_BYTES = 128 << 10  # of a config: reading as much takes a second
MAX_BRACKETS = 100  # open at a time; the parser takes a second for a few thousand
MAX_NODES = 20_000  # of its tree, with every alias written out
# In YAML 1.1 a float needs a dot, so that 1e-4 is a string.
FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


def load_run_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a YAML file describes.

    With train.init_from, what neither the file nor an override says of the mixture and its base is
    as that checkpoint has it.

    Args:
        path: the file; none: the overrides are all there is.
        overrides: settings that win over the file: `train.seed=1`, or as on the command line
            `--train.seed=1` or `--train.seed`, `1`. An item of a list goes by its index or its
            name: `data.sources.0.path=rows.jsonl`, `data.sources.mbpp.path=rows.jsonl`.

    Raises ValueError in one line for everything that is wrong with the settings, and
    FileNotFoundError for a file that is not there.
    """
    file_tree, given = read_tree(RunConfig, path, overrides)
    tree, checkpoint = _over_checkpoint(given)

    def origin(key: str) -> str:
        """What to name in an error about `key`: the file, or what changed it since."""
        parts = _key_parts(key)
        if _look_up(given, parts) is not _look_up(tree, parts):
            return str(checkpoint)
        in_file = path is not None and _look_up(file_tree, parts) is _look_up(given, parts)
        return str(path) if in_file else COMMAND_LINE

    return build_config(RunConfig, tree, origin)


def read_tree(
    cls: type, path: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The raw settings of a file for the dataclass `cls`: as they stand there, and overridden."""
    file_tree = given = {} if path is None else _read_yaml(find_config(path))
    for key, text in split_overrides(overrides):
        given = _overridden(given, cls, _key_parts(key), text)
    return file_tree, given


def find_config(path: str | Path) -> Path:
    """A file, or one of those that come with the package, by its name or as it is called there:
    quickstart, configs/quickstart.yaml. Raises FileNotFoundError for what is neither."""
    file = Path(path)
    if file.exists():
        return file
    name = file.as_posix().removeprefix("configs/").removesuffix(".yaml")
    files = sorted(SHIPPED.rglob("*.yaml"))
    shipped = {one.relative_to(SHIPPED).with_suffix("").as_posix(): one for one in files}
    if name not in shipped:
        near = closest(name, list(shipped))
        raise FileNotFoundError(
            f"{path}: no such file" + (f"; did you mean {near}?" if near else "")
        )
    return shipped[name]


def build_config(cls: type[T], tree: dict[str, Any], origin: Callable[[str], str]) -> T:
    """The dataclass that raw settings describe; an error begins with the `origin` of its key."""
    try:
        return build(cls, tree, parse=parse_text)
    except UnknownKey as error:
        text = unknown_key(error.key, error.siblings)
        raise ValueError(f"{origin(error.key)}: {text}") from None
    except FieldError as error:
        raise ValueError(f"{origin(error.key)}: {error}") from None


def split_overrides(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """Key and text of `key=value`, `--key=value` and `--key`, `value`."""
    pairs, queue = [], list(tokens)
    while queue:
        key, equals, text = queue.pop(0).partition("=")
        if not equals:
            if not key.startswith("--") or not queue or queue[0].startswith("--"):
                raise ValueError(f"{COMMAND_LINE}: {key} needs a value: {key} VALUE")
            text = queue.pop(0)
        pairs.append((key.removeprefix("--"), text))
    return pairs


def parse_text(text: str) -> Any:
    """The value that a text on the command line or in YAML writes. Raises ValueError."""
    return float(text) if FLOAT.fullmatch(text.strip()) else _parse_yaml(text, "text")


# Reading


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, and aliases that stand for too much."""

    def get_single_node(self) -> yaml.Node | None:
        """The tree, refused while it is still small: ten lines of aliases can stand for 10^9."""
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            _count_nodes(root, {})
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue
            if key_node.value in lines:
                problem = f"duplicate key {key_node.value}, first in line {lines[key_node.value]}"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            lines[key_node.value] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping; raises in one line that names the file and, where known, the line."""
    try:
        text = read_bytes(path, MAX_BYTES).decode()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error.reason})") from error
    tree = _parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        what = "is empty" if tree is None else f"is a {type(tree).__name__}"
        raise ValueError(f"{path}: must hold sections such as 'train:', but {what}")
    return tree


def _parse_yaml(text: str, where: str) -> Any:
    depth = 0
    for bracket in re.findall(r"[][{}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > MAX_BRACKETS:
            raise ValueError(f"{where}: more than {MAX_BRACKETS} brackets in one another")
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ValueError(f"{where}{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # of a date or number that is none
        raise ValueError(f"{where}: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"{where}: too many lists and mappings in one another") from error


def _count_nodes(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a tree stands for, each alias written out. Raises ValueError for too many,
    and for one that holds itself."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.MarkedYAMLError(None, None, "an alias of itself", node.start_mark)
        return known[id(node)]
    known[id(node)] = 0  # under way
    parts = [] if isinstance(node, yaml.ScalarNode) else node.value
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in parts for part in pair]
    count = 1 + sum(_count_nodes(part, known) for part in parts)
    if count > MAX_NODES:
        what = f"its aliases stand for more than {MAX_NODES:,} values"
        raise yaml.MarkedYAMLError(None, None, what, node.start_mark)
    known[id(node)] = count
    return count


# Beginning with a checkpoint


def _over_checkpoint(tree: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """The settings laid over those of the checkpoint in train.init_from, and its config.json.

    From there come the mixture, and the base by name, revision and quantization. A run's folder
    becomes that of its best checkpoint; a repository of the hub stays a name.
    Raises FileNotFoundError or ValueError where that file does not say.
    """
    train = tree.get("train")
    given = train.get("init_from") if isinstance(train, dict) else None
    if not isinstance(given, str):
        return tree, None
    from dylora.storage.checkpoint import Checkpoint  # it imports torch, which takes seconds
    from dylora.storage.hub import local_folder
    from dylora.storage.schema import read_config

    try:
        folder = local_folder(given)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"train.init_from: {error}") from None
    if not (folder / "config.json").exists() and any(folder.glob("checkpoint-*")):
        folder = Checkpoint.open(folder, partial(print, file=sys.stderr)).path
    if Path(given).is_dir() and folder != Path(given):
        tree = {**tree, "train": {**tree["train"], "init_from": str(folder)}}
    file = folder / "config.json"
    try:
        description = read_json(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} does not exist: train.init_from is {given!r}") from None
    if not isinstance(description.get("moe"), dict):
        raise ValueError(f"{file} describes no mixture: train.init_from is {given!r}")
    name, own = description.get("base_model_name_or_path"), tree.get("model")
    own_base = own.get("base") if isinstance(own, dict) else None
    base = {"base": name, "quantization": description.get("quantization")}
    if own_base in (None, name):  # else the revision is of another base
        base["revision"] = description.get("base_revision")
    if own_base is None and isinstance(name, str):
        require_followable(name, file)
    moe = read_config(file, description["moe"]).to_dict()
    under = {"moe": moe, "model": {k: v for k, v in base.items() if v is not None}}
    for section, below in under.items():
        above = tree.get(section)
        if above is None or isinstance(above, dict):  # else its own error comes
            tree = {**tree, section: {**below, **(above or {})}}
    return tree, file


# Overriding


def _overridden(value: Any, annotation: Any, parts: list[str], text: str, path: str = "") -> Any:
    """The raw `value` at `path`, with `text` where `parts` leads."""
    if not parts:
        if is_dataclass(annotation):
            raise ValueError(f"{COMMAND_LINE}: {path} has fields; set one of them: --{path}.FIELD")
        return None if text == "null" and NoneType in get_args(annotation) else text
    name, rest = parts[0], parts[1:]
    if is_dataclass(annotation):
        hints, renamed = field_types(annotation), getattr(annotation, "RENAMED", {})  # type: ignore
        name = next((word for word in (name, name.replace("-", "_")) if word in hints), name)
        name = renamed.get(name) or name
        if name not in hints:
            key = ".".join([path, *parts] if path else parts)
            raise ValueError(f"{COMMAND_LINE}: {unknown_key(key, list(hints))}")
        fields_ = {renamed.get(key) or key: item for key, item in _mapping(value, path).items()}
        inner = _overridden(fields_.get(name), hints[name], rest, text, join(path, name))
        return {**fields_, name: inner}
    if get_origin(annotation) is list and is_dataclass(get_args(annotation)[0]):
        items = list(value) if isinstance(value, list) else []
        index = _index_of(items, name, path)
        item_type = get_args(annotation)[0]
        items[index] = _overridden(items[index], item_type, rest, text, f"{path}[{index}]")
        return items
    if get_origin(annotation) is dict:
        return {**_mapping(value, path), ".".join(parts): text}
    raise ValueError(f"{COMMAND_LINE}: {path} has no fields, so there is no {path}.{name}")


def _key_parts(key: str) -> list[str]:
    return re.sub(r"\[([^]]*)\]", r".\1", key).split(".")


def _look_up(tree: Any, parts: list[str]) -> Any:
    """The raw value that `parts` leads to, or what it is inside of; None where there is none."""
    for part in parts:
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and part.isdecimal() and int(part) < len(tree):
            tree = tree[int(part)]
    return tree


def _index_of(items: list[Any], part: str, path: str) -> int:
    """An item's index, given by itself or by the item's name."""
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return names.index(part)
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    given = ", ".join(f"{index} ({name})" for index, name in enumerate(names)) or "none"
    raise ValueError(f"{COMMAND_LINE}: {path} has no item {part}, only {given}")


def _mapping(value: Any, path: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        given = f"{path} is {shown(value)} in the file"
        raise ValueError(f"{COMMAND_LINE}: {given}, so it has no fields")
    return value or {}

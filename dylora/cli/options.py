"""Options of commands: each is a field of a dataclass, whose type and docstring are its help."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, get_args, get_origin

from dylora.cli.config_file import COMMAND_LINE, parse_text, split_overrides
from dylora.cli.hints import unknown_key
from dylora.fields import (
    FieldError,
    build,
    closest,
    default_of,
    describe_type,
    field_docs,
    field_types,
    option,
)
from dylora.run_config import RunConfig, SourceConfig

if TYPE_CHECKING:
    from dylora.storage.checkpoint import Checkpoint

T = TypeVar("T")
METAVARS = {str: "TEXT", int: "N", float: "X", bool: "true|false", Literal: "WORD"}
METAVARS |= {list: "A,B,...", tuple: "A,B,...", dict: "KEY=VALUE,..."}


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    config: str = option(metavar="FILE")
    """YAML file of the run. The command line overrides its fields, in any order; an item of
    data.sources goes by its index or name. Relative paths in the file are relative to the working
    directory."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    checkpoint: str = option(metavar="DIR")
    """Folder of a checkpoint, or of a run, which stands for its best one."""
    allow_other_base: bool = False
    """Use the checkpoint on a base or with a tokenizer that it was not trained with."""

    def source(self) -> "str | Checkpoint":
        """What a command opens: the folder, or a checkpoint that allows other bases."""
        if not self.allow_other_base:
            return self.checkpoint
        from dylora.evaluation.loading import note
        from dylora.storage.checkpoint import Checkpoint

        return Checkpoint.open(self.checkpoint, note, allow_other_base=True)


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    base: str | None = None
    """Base model to use instead of the checkpoint's own."""


class Parser(argparse.ArgumentParser):
    """argparse, with a wrong word as a ValueError."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read_options(cls: type[T], tokens: Sequence[str]) -> tuple[T, list[str]]:
    """A command's options, and the overrides of config fields between them.

    Raises ValueError in one line for whatever is wrong with either.
    """
    own, overrides = _split(cls, tokens)
    given = vars(option_parser(cls).parse_args(own))
    try:
        return build(cls, given, parse=parse_text), overrides
    except FieldError as error:
        name = re.split(r"\W", error.key)[0]  # also of an item of a list
        item = next(item for item in fields(cls) if item.name == name)  # type: ignore[arg-type]
        form = item.metadata.get("metavar")
        hint = f" ({form})" if form and "must be" in error.problem else ""
        raise ValueError(flag_of(item) + error.problem + hint) from None


def option_parser(cls: type, name: str = "") -> Parser:
    """What reads a command's own words, and explains them."""
    required = [item for item in fields(cls) if default_of(item) is MISSING]
    words = [f"{flag_of(item)} {_value_words(cls, item)['metavar']}" for item in required]
    words += ["[--section.key VALUE ...]"] if takes_config(cls) else []
    parser = Parser(
        usage=" ".join(["run.py", name, *words, "[OPTIONS]"]),
        description=cls.__doc__,
        add_help=False,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("options")
    for item in fields(cls):
        kept: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS}
        if field_types(cls)[item.name] is bool:
            meaning = field_docs(cls)[item.name].replace("%", "%%")
            group.add_argument(flag_of(item), action="store_true", help=meaning, **kept)
        else:
            kept |= _value_words(cls, item)
            group.add_argument(flag_of(item), help=_help(cls, item), **kept)
    return parser


def config_help() -> str:
    """Every field of a config with its type, default and meaning."""
    parser = Parser(usage=argparse.SUPPRESS, add_help=False)
    sections = {"": RunConfig}
    for name, kind in field_types(RunConfig).items():
        if is_dataclass(kind):
            sections[name] = kind  # type: ignore[assignment]
        if name == "data":
            sections["data.sources.N"] = SourceConfig  # type: ignore[assignment]
    for path, cls in sections.items():
        title = (cls.__doc__ or "").partition("\n")[0].rstrip(".:")
        group = parser.add_argument_group(title)
        for item in fields(cls):
            if not is_dataclass(field_types(cls)[item.name]):
                key = f"--{path}.{item.name}" if path else f"--{item.name}"
                group.add_argument(key, help=_help(cls, item), **_value_words(cls, item))
    return parser.format_help()


def flag_of(item: "Field[Any]") -> str:
    """The option's spelling, with underscores; dashes are read as those."""
    return "--" + item.metadata.get("flag", item.name)


def takes_config(cls: type) -> bool:
    """Whether a command reads a config, and so takes overrides of its fields."""
    return "config" in field_types(cls)


def _split(cls: type, tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """The command's own options, and the overrides of config fields, wherever they stand."""
    known = {flag_of(item) for item in fields(cls)}
    sections = set(field_types(RunConfig))
    own: list[str] = []
    overrides: list[str] = []
    queue = list(tokens)
    while queue:
        token = queue.pop(0)
        written, equals, text = token.partition("=")
        name = written.replace("-", "_").replace("__", "--", 1)
        if not token.startswith("--") or name in known:
            own.append(f"{name}{equals}{text}" if token.startswith("--") else token)
            continue
        key = written.removeprefix("--")
        near = closest(name, known, cutoff=0.8)
        if not takes_config(cls) or (near and name[2:].split(".")[0] not in sections):
            hint = f"did you mean {near}?" if near else f"valid are {', '.join(sorted(known))}"
            raise ValueError(f"{COMMAND_LINE}: unknown option {written}; {hint}")
        if name[2:].split(".")[0].split("[")[0] not in sections:
            raise ValueError(f"{COMMAND_LINE}: {unknown_key(key, list(field_types(RunConfig)))}")
        overrides.append(token)
        if not equals and queue and not queue[0].startswith("--"):
            overrides.append(queue.pop(0))
    split_overrides(overrides)
    return own, overrides


def _value_words(cls: type, item: "Field[Any]") -> dict[str, Any]:
    """How argparse shows and takes the value of an option."""
    kind = field_types(cls)[item.name]
    parts = [part for part in get_args(kind) if part is not NoneType]
    kind = kind if get_origin(kind) in METAVARS else parts[0] if parts else kind
    words = {"metavar": item.metadata.get("metavar", METAVARS.get(get_origin(kind) or kind))}
    return words | ({"nargs": item.metadata["nargs"]} if "nargs" in item.metadata else {})


def _help(cls: type, item: "Field[Any]") -> str:
    """Meaning, type and default, the default as YAML writes it."""
    default = default_of(item)
    words = {None: "null", True: "true", False: "false"}
    shown = words[default] if default is None or isinstance(default, bool) else default
    shown = list(default) if isinstance(default, tuple) else shown
    told = "required" if default is MISSING else f"default: {shown}"
    text = f"{field_docs(cls)[item.name]} ({describe_type(field_types(cls)[item.name])}; {told})"
    return text.replace("%", "%%")

"""Options of commands: each is a field of a dataclass, whose type and docstring are its help."""

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args, get_origin

from dylora.cli.config_file import COMMAND_LINE, parse_text
from dylora.cli.hints import unknown_key
from dylora.config import Quantization, RoutingMode
from dylora.fields import (
    FieldError,
    build,
    check_fields,
    closest,
    default_of,
    describe_type,
    field_docs,
    field_types,
    join,
    nearest,
    option,
)
from dylora.run_config import RunConfig

if TYPE_CHECKING:
    from dylora.serving.answering import Sampling
    from dylora.serving.engine import Speaker
    from dylora.storage.checkpoint import Checkpoint

T = TypeVar("T")
METAVARS = {str: "TEXT", int: "N", float: "X", bool: "true|false", Literal: "WORD"}
METAVARS |= {list: "A,B,...", tuple: "A,B,...", dict: "KEY=VALUE,..."}
INDENT = " " * 24  # of an option's meaning in the help


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    CONFIG: ClassVar[type] = RunConfig  # what the file describes

    config: str = option(metavar="FILE")
    """YAML file of the run, or the name of one that comes along, such as quickstart. The command
    line overrides its fields, in any order; an item of data.sources goes by its index or name.
    Relative paths in the file are relative to the working directory."""


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    checkpoint: str = option(metavar="DIR")
    """Folder of a checkpoint, or of a run, which stands for its best one; or a repository of the
    hub, user/name."""
    allow_other_base: bool = False
    """Use the checkpoint on a base or with a tokenizer that it was not trained with."""
    checkpoint_revision: str | None = None
    """Commit, tag or branch of a checkpoint on the hub."""

    def source(self) -> "str | Checkpoint":
        """What a command opens: the folder, or a checkpoint that allows other bases."""
        if not self.allow_other_base and self.checkpoint_revision is None:
            return self.checkpoint
        from dylora.evaluation.loading import note
        from dylora.storage.checkpoint import Checkpoint

        return Checkpoint.open(
            self.checkpoint,
            note,
            revision=self.checkpoint_revision,
            allow_other_base=self.allow_other_base,
        )


@dataclass(frozen=True, kw_only=True)
class RoutingOptions:
    """How a checkpoint routes, where that shall be another way than in training."""

    top_k_experts: int | None = option(None, least=1, flag="routing.top_k_experts")
    """Mature experts that a token keeps, instead of the checkpoint's number."""
    router_temperature: float | None = option(None, above=0, flag="routing.router_temperature")
    """Divides the routers' logits, instead of the checkpoint's temperature."""
    routing_mode: RoutingMode | None = option(None, flag="routing.routing_mode")
    """Force dense or sparse mixing, or follow the experts' maturity."""
    routing_experts: list[int] | None = option(None, least=0, flag="routing.experts")
    """Mix these experts alone, by number."""
    routing_weights: list[float] | None = option(None, least=0, flag="routing.weights")
    """Constant gates, one an expert, instead of the routers' decisions."""

    def routing(self) -> dict[str, Any]:
        """What is given, as `change_routing` takes it. Raises ValueError for a contradiction."""
        given = {
            "top_k": self.top_k_experts,
            "temperature": self.router_temperature,
            "mode": self.routing_mode,
            "experts": self.routing_experts,
            "weights": self.routing_weights,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if "weights" in given and len(given) > 1:
            raise ValueError("--routing.weights are all of the routing: give them alone")
        return given


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How answers are drawn."""

    max_new_tokens: int = option(256, least=1)
    """Most tokens of an answer."""
    temperature: float = option(0.0, least=0)
    """0: the likeliest token each time."""
    top_p: float = option(1.0, above=0, most=1)
    """Draw from the fewest likeliest tokens whose probabilities reach it."""
    seed: int | None = None
    """Of the draws; none: another one each time."""

    def __post_init__(self) -> None:
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError("--top_p needs a --temperature: at 0 nothing is drawn")

    def sampling(self) -> "Sampling":
        """How tokens are drawn."""
        from dylora.serving.answering import Sampling

        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """How a checkpoint that answers is loaded."""

    device: str = "auto"
    """auto: cuda when there is one, else cpu; or a torch device."""
    quantization: Quantization | None = None
    """How the base is stored, by default as in training: see model.quantization."""
    template: str | None = None
    """Put what is asked into this template, as data.template names it; none: that of training."""


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    base: str | None = None
    """Base model to use instead of the checkpoint's own."""


@dataclass(frozen=True, kw_only=True)
class SpeakerOptions(RoutingOptions, BaseOptions, DeviceOptions, CheckpointOptions):
    """A mixture that answers."""

    def speaker(self) -> "Speaker":
        """The mixture that these options name, loaded. Raises as `Speaker.open`."""
        from dylora.serving.engine import Speaker

        return Speaker.open(
            self.source(),
            self.base,
            device=self.device,
            quantization=self.quantization,
            routing=self.routing(),
            template=self.template,
        )


def check_out(out: str | None) -> None:
    """Raises ValueError unless the file that a command will write can be in its folder."""
    if out is not None and (not Path(out).parent.is_dir() or Path(out).is_dir()):
        raise ValueError(f"--out is {out!r}, but must be a file in a folder that exists")


def read_options(cls: type[T], tokens: Sequence[str]) -> tuple[T, list[str]]:
    """A command's options, and the overrides of config fields between them, as KEY=VALUE.

    Raises ValueError in one line for whatever is wrong with either.
    """
    given, overrides = _split(cls, list(tokens))
    try:
        options = build(cls, given, parse=parse_text)
        check_fields(options)
    except FieldError as error:
        name = re.split(r"\W", error.key)[0]  # also of an item of a list
        item = next(item for item in fields(cls) if item.name == name)  # type: ignore[arg-type]
        form = item.metadata.get("metavar")
        if "positional" in item.metadata and "is missing" in error.problem:
            raise ValueError(
                f"{(form or item.name).split()[0]} is missing: {item.name} to read"
            ) from None
        hint = f" ({form})" if form and "must be" in error.problem else ""
        raise ValueError(flag_of(item) + error.problem + hint) from None
    return options, overrides


def command_help(cls: type, name: str) -> str:
    """A command's usage, and every option with its meaning."""
    required = [item for item in fields(cls) if default_of(item) is MISSING]
    words = [f"{_written(item)} {_metavar(cls, item)}".strip() for item in required]
    words += ["[--section.key VALUE ...]"] if takes_config(cls) else []
    usage = " ".join(["usage: dylora", name, *words, "[OPTIONS]"])
    rows = []
    for item in fields(cls):
        is_flag = field_types(cls)[item.name] is bool
        meaning = field_docs(cls)[item.name] if is_flag else _meaning(cls, item)
        rows.append(_row(_written(item), "" if is_flag else _metavar(cls, item), meaning))
    return "\n".join([usage, "", cls.__doc__ or "", "", "options:", *rows, ""])


def config_help(cls: type = ConfigOptions) -> str:
    """The fields of a config that act on a command, with type, default and meaning."""
    return "\n".join(_section_help(config_of(cls), "", getattr(cls, "ACTING", ("",))))


def _section_help(section: type, path: str, acting: tuple[str, ...]) -> list[str]:
    """Lines for the fields of a section of a config, then for the sections in it."""
    rows, lines = [], []
    for item in fields(section):
        kind, key = field_types(section)[item.name], join(path, item.name)
        part = get_args(kind)[0] if get_origin(kind) is list else kind
        if key.startswith(acting) and not is_dataclass(kind):
            rows.append(_row(f"--{key}", _metavar(section, item), _meaning(section, item)))
        if is_dataclass(part) and isinstance(part, type):
            lines += _section_help(part, key if part is kind else f"{key}.N", acting)
    title = (section.__doc__ or "").partition("\n")[0].rstrip(".:") + ":"
    return [*([title, *rows, ""] if rows else []), *lines]


def flag_of(item: "Field[Any]") -> str:
    """The option's spelling, with underscores; dashes are read as those."""
    return "--" + item.metadata.get("flag", item.name)


def _written(item: "Field[Any]") -> str:
    """How an option is written before its value: a positional one has no flag."""
    return "" if "positional" in item.metadata else flag_of(item)


def takes_config(cls: type) -> bool:
    """Whether a command reads a config, and so takes overrides of its fields."""
    return "config" in field_types(cls)


def config_of(cls: type) -> type:
    """The dataclass that a command's config describes."""
    return getattr(cls, "CONFIG", RunConfig)


def _split(cls: type, tokens: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The command's own options by their fields' names, and the overrides of config fields."""
    known = {flag_of(item): item for item in fields(cls)}
    own, overrides = {}, []
    for item in [item for item in fields(cls) if "positional" in item.metadata]:
        count = 0
        while count < len(tokens) and not tokens[count].startswith("--"):
            count += 1
        if count and "many" in item.metadata:
            own[item.name], tokens = tokens[:count], tokens[count:]
        elif count:
            own[item.name], *tokens = tokens
    for written, values in _group(tokens):
        name = written.replace("-", "_").replace("__", "--", 1)
        if name in (old_flags := getattr(cls, "OLD_FLAGS", {})):
            key, fixed = old_flags[name]
            values = values if fixed is None else [fixed, *values]
            print(f"note: {name} sets {key} to {' '.join(values)}", file=sys.stderr)
            name = written = f"--{key}"
        if name.startswith("--moe.") and issubclass(cls, RoutingOptions):
            name = name.replace("moe", "routing", 1)
        if name not in known:
            _require_field(cls, written, name, list(known))
        item = known.get(name)
        is_flag = item is not None and field_types(cls)[item.name] is bool
        many = item is not None and "many" in item.metadata
        if not values and not is_flag:
            raise ValueError(f"{COMMAND_LINE}: {written} needs a value: {written} VALUE")
        if len(values) > (0 if is_flag else 1) and not many:
            raise ValueError(f"{COMMAND_LINE}: {values[-1]} belongs to no option")
        if item is None:
            overrides.append(f"{written.removeprefix('--')}={values[0]}")
        elif many:
            own[item.name] = [*own.get(item.name, []), *values]
        elif item.name in own and "," in _metavar(cls, item):
            own[item.name] = f"{own[item.name]},{values[0]}"
        else:
            own[item.name] = is_flag or values[0]
    return own, overrides


def _group(tokens: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Every option with the values that are given to it."""
    groups: list[tuple[str, list[str]]] = []
    for token in tokens:
        if token.startswith("--"):
            written, equals, text = token.partition("=")
            groups.append((written, [text] if equals else []))
        elif groups:
            groups[-1][1].append(token)
        else:
            raise ValueError(f"{COMMAND_LINE}: {token} belongs to no option")
    return groups


def _require_field(cls: type, written: str, name: str, known: list[str]) -> None:
    """Raises ValueError unless what is no option of the command may be a field of a config."""
    section = re.split(r"[.\[]", name[2:])[0]
    if section == "routing" and written.startswith("--moe"):
        able = "can be changed: " + ", ".join(flag for flag in known if "--routing." in flag)
        raise ValueError(f"{COMMAND_LINE}: the checkpoint decides {written}; {able}")
    if section == "routing" and not issubclass(cls, RoutingOptions):
        where = "evaluate, benchmark and generate; a config has the section moe"
        raise ValueError(f"{COMMAND_LINE}: {written} is an option of {where}")
    sections = field_types(config_of(cls))
    near = section == "routing" or closest(name, known, cutoff=0.8)
    if not takes_config(cls) or (near and section not in sections):
        raise ValueError(f"{COMMAND_LINE}: unknown option {written}{nearest(name, known)}")
    if section not in sections:
        raise ValueError(f"{COMMAND_LINE}: {unknown_key(written[2:], list(sections))}")


def _metavar(cls: type, item: "Field[Any]") -> str:
    """The word that stands for an option's value in the help."""
    kind = field_types(cls)[item.name]
    parts = [part for part in get_args(kind) if part is not NoneType]
    kind = kind if get_origin(kind) in METAVARS else parts[0] if parts else kind
    return item.metadata.get("metavar", METAVARS.get(get_origin(kind) or kind))


def _meaning(cls: type, item: "Field[Any]") -> str:
    """Meaning, type and default, the default as YAML writes it."""
    default = default_of(item)
    shown = default if default is MISSING or isinstance(default, str) else json.dumps(default)
    told = "required" if default is MISSING else f"default: {shown}"
    return f"{field_docs(cls)[item.name]} ({describe_type(field_types(cls)[item.name])}; {told})"


def _row(flag: str, value: str, meaning: str) -> str:
    """An option of the help: its form, and its meaning below."""
    width = max(shutil.get_terminal_size().columns - 2, 60)
    lines = textwrap.wrap(meaning, width - len(INDENT), break_on_hyphens=False)
    head = " ".join(word for word in ("  " + flag, value) if word)
    return "\n".join([head, *(INDENT + line for line in lines)])

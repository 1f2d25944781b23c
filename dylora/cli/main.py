"""The command line: which words of it go where, and how errors are told.

jsonargparse declares the options (`commands.py`) and explains every field of a config. What a user
got wrong is one line on stderr and exit code 2; a traceback means a fault of ours.
"""

import argparse
import difflib
import logging
import os
import re
import sys
from dataclasses import fields, is_dataclass

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from dylora.cli.config_file import COMMAND_LINE, all_keys, split_overrides
from dylora.cli.registry import COMMANDS
from dylora.run_config import RunConfig, SourceConfig

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 1 when a check of validate fails; 2 for a user's error; 130 when interrupted.
    """
    tokens = sys.argv[1:] if argv is None else list(argv)
    for noisy in ("torchao", "torch.utils._pytree"):  # transformers imports torchao if it can,
        logging.getLogger(noisy).setLevel(logging.ERROR)  # which then lists what it lacks
    show_traceback = "--traceback" in tokens or os.environ.get("DYLORA_TRACEBACK") == "1"
    try:
        _dispatch([token for token in tokens if token != "--traceback"])
    except SystemExit as stop:  # --help, or a check that failed
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (*USER_ERRORS, ArgumentError) as error:
        if show_traceback:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


# Options


def _dispatch(tokens: list[str]) -> None:
    parser, commands = _parsers()
    if not tokens or tokens[0] in ("-h", "--help"):
        parser.print_help(sys.stdout if tokens else sys.stderr)
        raise SystemExit(0 if tokens else 2)
    name = tokens[0]
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(commands)}"
        raise ValueError(f"unknown command {name}; {hint}")
    command = commands[name]
    if "-h" in tokens or "--help" in tokens:
        command.print_help()
        if _takes_config(command):
            print("\n" + _config_help())
        return
    own, overrides = _split_options(tokens[1:], command)
    COMMANDS[name].run(command.parse_args(own), overrides)


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(
        prog="run.py",
        usage="run.py COMMAND [OPTIONS]",
        description="Mixtures of LoRA experts on a frozen language model.",
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    commands = {}
    for name, (_, add_options, description) in COMMANDS.items():
        command = ArgumentParser(
            description=description,
            allow_abbrev=False,
            print_config=None,  # the option of that name is ours
        )
        command.add_argument(
            "--traceback",
            action="store_true",
            help="Show where an error arose, like DYLORA_TRACEBACK=1.",
        )
        subcommands.add_subcommand(name, command, help=description)
        command.prog = f"run.py {name}"
        add_options(command)
        commands[name] = command
    return parser, commands


def _config_help() -> str:
    """Every field of a config with its type, default and meaning, as jsonargparse reads them."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    sections = {
        item.name: item.type
        for item in fields(RunConfig)
        if isinstance(item.type, type) and is_dataclass(item.type)
    }
    parser = ArgumentParser(usage=argparse.SUPPRESS, add_help=False)
    parser.add_class_arguments(RunConfig, skip=set(sections))
    for name, section in sections.items():
        parser.add_class_arguments(section, name)
        if name == "data":
            parser.add_class_arguments(SourceConfig, "data.sources.N")
    for action in parser._actions:
        # What jsonargparse offers besides a field's own option is not part of our commands.
        action.option_strings = [option for option in action.option_strings if option[-1] != "+"]
        if action.dest in (*sections, "data.sources.N") or action.dest.endswith(".help"):
            action.help = argparse.SUPPRESS
    return parser.format_help()


def _split_options(tokens: list[str], command: ArgumentParser) -> tuple[list[str], list[str]]:
    """The command's own options, and the overrides of config fields, wherever they stand."""
    own_options = set(command._option_string_actions)
    own: list[str] = []
    overrides: list[str] = []
    queue = list(tokens)
    while queue:
        token = queue.pop(0)
        option = token.partition("=")[0]
        if not option.startswith("--") or option in own_options:
            own.append(token)
            continue
        key = option.removeprefix("--")
        near = difflib.get_close_matches(option, own_options, n=1, cutoff=0.8)
        if not _takes_config(command) or (near and key not in all_keys()):
            hint = f"did you mean {near[0]}?" if near else f"valid are {_listed(own_options)}"
            raise ValueError(f"{COMMAND_LINE}: unknown option {option}; {hint}")
        overrides.append(token)
        if "=" not in token and queue and not queue[0].startswith("--"):
            overrides.append(queue.pop(0))
    split_overrides(overrides)
    return own, overrides


def _takes_config(command: ArgumentParser) -> bool:
    return "--config" in command._option_string_actions


def _listed(options: set[str]) -> str:
    return ", ".join(sorted(options - {"-h", "--help"}))


def _one_line(error: Exception) -> str:
    """The message without line breaks, and jsonargparse's in the words of the other errors."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    form = r"""Parser key "(.+?)": Expected a <class '(.+?)'>\. Got value: (.+)"""
    return re.sub(form, r"--\1 is '\3', but must be of type \2", text)

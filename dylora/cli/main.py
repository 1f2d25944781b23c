"""The command line: which words of it go where, and how errors are told.

What a user got wrong is one line on stderr and exit code 2; a traceback means a fault of ours.
"""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from dylora.cli import benchmark, evaluate, export, generate, import_, info, train, validate
from dylora.cli.options import config_help, option_parser, read_options, takes_config
from dylora.fields import closest

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError)
OPENING = """\
usage: run.py COMMAND [OPTIONS]

Mixtures of LoRA experts on a frozen language model.

commands:
"""
CLOSING = """
run.py COMMAND --help explains a command and all of its options; --traceback, or DYLORA_TRACEBACK=1,
shows where an error arose.
"""


class Command(NamedTuple):
    """One command."""

    run: Callable[[Any, list[str]], None]  # its options, and overrides of config fields
    options: type  # a dataclass whose docstring says what the command does


COMMANDS = {
    "train": Command(train.run, train.TrainOptions),
    "evaluate": Command(evaluate.run, evaluate.EvaluateOptions),
    "benchmark": Command(benchmark.run, benchmark.BenchmarkCommand),
    "generate": Command(generate.run, generate.GenerateOptions),
    "validate": Command(validate.run, validate.ValidateOptions),
    "export": Command(export.run, export.ExportOptions),
    "import": Command(import_.run, import_.ImportOptions),
    "info": Command(info.run, info.InfoOptions),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 1 when a check of validate fails; 2 for a user's error; 130 when interrupted.
    """
    tokens = sys.argv[1:] if argv is None else list(argv)
    for noisy in ("torchao", "torch.utils._pytree"):  # transformers imports torchao if it can,
        logging.getLogger(noisy).setLevel(logging.ERROR)  # which then lists what it lacks
    show_traceback = "--traceback" in tokens or os.environ.get("DYLORA_TRACEBACK") == "1"
    try:
        return _dispatch([token for token in tokens if token != "--traceback"])
    except SystemExit as stop:  # a check that failed
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read our lines, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except USER_ERRORS as error:
        if show_traceback:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2


def _dispatch(tokens: list[str]) -> int:
    if not tokens or tokens[0] in ("-h", "--help"):
        print(_overview(), end="", file=sys.stdout if tokens else sys.stderr)
        return 0 if tokens else 2
    name = tokens[0]
    if name not in COMMANDS:
        near = closest(name, COMMANDS)
        hint = f"did you mean {near}?" if near else f"valid are {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {name}; {hint}")
    command = COMMANDS[name]
    if "-h" in tokens or "--help" in tokens:
        print(option_parser(command.options, name).format_help())
        if takes_config(command.options):
            print(config_help())
        return 0
    command.run(*read_options(command.options, tokens[1:]))
    return 0


def _overview() -> str:
    """The commands, each with what it does."""
    lines = [f"  {name:10} {command.options.__doc__}\n" for name, command in COMMANDS.items()]
    return OPENING + "".join(lines) + CLOSING


def _one_line(error: Exception) -> str:
    """The message without line breaks."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())

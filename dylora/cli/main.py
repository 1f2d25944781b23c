"""The command line: which words of it go where, and how errors are told.

What a user got wrong is one line on stderr and exit code 2; a traceback means a fault of ours.
"""

import logging
import os
import platform
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from dylora.cli import (
    benchmark,
    chat,
    compare,
    evaluate,
    export,
    generate,
    import_,
    info,
    init,
    learn,
    plot,
    push,
    report,
    serve,
    submit,
    train,
    validate,
)
from dylora.cli.options import command_help, config_help, read_options, takes_config
from dylora.fields import nearest

USER_ERRORS = (ValueError, OSError)  # OSError: of files, folders and disks
NOISY = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""transformers imports these if it can, and they then list what they lack."""
MAX_LINE = 1000  # characters of an error
OPENING = """\
usage: dylora COMMAND [OPTIONS]

Mixtures of LoRA experts on a frozen language model.

commands:
"""
CLOSING = """
dylora COMMAND --help explains a command and all of its options; --traceback, or DYLORA_TRACEBACK=1,
shows where an error arose.
"""


class Command(NamedTuple):
    """One command."""

    run: Callable[[Any, list[str]], None]  # its options, and overrides of config fields
    options: type  # a dataclass whose docstring says what the command does


COMMANDS = {
    "init": Command(init.run, init.InitOptions),
    "train": Command(train.run, train.TrainOptions),
    "learn": Command(learn.run, learn.LearnOptions),
    "submit": Command(submit.run, submit.SubmitOptions),
    "compare": Command(compare.run, compare.CompareOptions),
    "report": Command(report.run, report.ReportOptions),
    "plot": Command(plot.run, plot.PlotOptions),
    "evaluate": Command(evaluate.run, evaluate.EvaluateOptions),
    "benchmark": Command(benchmark.run, benchmark.BenchmarkCommand),
    "generate": Command(generate.run, generate.GenerateOptions),
    "chat": Command(chat.run, chat.ChatOptions),
    "serve": Command(serve.run, serve.ServeOptions),
    "validate": Command(validate.run, validate.ValidateOptions),
    "export": Command(export.run, export.ExportOptions),
    "import": Command(import_.run, import_.ImportOptions),
    "info": Command(info.run, info.InfoOptions),
    "push": Command(push.run, push.PushOptions),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0; 1 when a check of validate fails; 2 for a user's error; 130 when interrupted.
    """
    tokens = sys.argv[1:] if argv is None else list(argv)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)
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
        rows = [f"  {name:10} {one.options.__doc__}\n" for name, one in COMMANDS.items()]
        print(OPENING, *rows, CLOSING, sep="", end="", file=sys.stdout if tokens else sys.stderr)
        return 0 if tokens else 2
    if tokens == ["--version"]:
        print(version_line())
        return 0
    name = tokens[0]
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name}{nearest(name, list(COMMANDS))}")
    command = COMMANDS[name]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and (name != "train" or "--check" in tokens):
        what = f"{name} --check" if name == "train" else name
        raise ValueError(f"{what} runs in one process: start it without torchrun")
    if "-h" in tokens or "--help" in tokens:
        print(command_help(command.options, name))
        if takes_config(command.options):
            print(config_help(command.options))
        return 0
    command.run(*read_options(command.options, tokens[1:]))
    return 0


def version_line() -> str:
    """dylora's version, and those of what it stands on."""
    from importlib import metadata

    found = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers"))
    version = sys.modules["dylora"].__version__
    return f"dylora {version} ({found}, Python {platform.python_version()})"


def _one_line(error: Exception) -> str:
    """The message without line breaks; of a long one the beginning and the end, the remedy."""
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.filename}: {error.strerror}"
    text = " ".join(text.split())
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - 300]} … {text[-296:]}"

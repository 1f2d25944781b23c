"""The command line: which commands there are, their options, and how errors are told.

jsonargparse declares the options and explains every field of a config. What a user got wrong is
one line on stderr and exit code 2; a traceback means a fault of ours. The modules that do the work
are imported inside each command, so that help and errors come at once.
"""

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dylora.config import Quantization, RunConfig, SourceConfig, dump_run_config
from dylora.config_file import (
    COMMAND_LINE,
    all_keys,
    load_run_config,
    split_overrides,
)

USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError)
CONFIG_USAGE = "--config FILE [--section.key VALUE ...]"


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


# Commands


def _train(options: Namespace, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(dump_run_config(config), end="")
        return
    from dylora.evaluation.report import report_run
    from dylora.training.loop import train

    report_run(train(config, options.resume_from_checkpoint))


def _evaluate(options: Namespace, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(dump_run_config(config), end="")
        return
    from dylora.evaluation.evaluate import evaluate_checkpoint

    evaluate_checkpoint(config, options.checkpoint)


def _benchmark(options: Namespace, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    files = dict(_pair(item) for item in _items(options.task_files))
    from dylora.evaluation.benchmark import BenchmarkOptions, benchmark_checkpoint

    if not all(item.isdecimal() for item in _items(options.k)):
        raise ValueError(f"--k is {options.k!r}, but must be numbers with commas between")
    chosen = BenchmarkOptions(
        tasks=tuple(_items(options.tasks)),
        files=files,
        split=options.split,
        limit=options.limit,
        samples=options.samples,
        k=tuple(int(item) for item in _items(options.k)),
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        include_trained=options.include_trained,
        unsafe=options.unsafe_exec,
        workers=options.workers,
    )
    out = options.out or Path(config.output_dir, config.name, "benchmark")
    benchmark_checkpoint(config, options.checkpoint, chosen, Path(out))


def _items(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


def _pair(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals:
        raise ValueError(f"--task_files has {text!r}, but each item must be SUITE=FILE")
    return name, file


def _generate(options: Namespace, overrides: list[str]) -> None:
    if options.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {options.max_new_tokens}, but must be at least 1")
    if not options.temperature >= 0:  # also refuses nan
        raise ValueError(f"--temperature is {options.temperature}, but must be at least 0")
    from dylora.evaluation.generate import generate_text

    generate_text(
        options.checkpoint,
        options.prompt,
        options.base,
        options.max_new_tokens,
        options.temperature,
        options.raw,
        options.show_routing,
        options.quantization,
    )


def _validate(options: Namespace, overrides: list[str]) -> None:
    from dylora.evaluation.validate import validate_checkpoint

    report = validate_checkpoint(
        options.checkpoint,
        options.base,
        options.device,
        options.dtype,
        options.tokens,
        options.out,
    )
    if not report.passed:
        raise SystemExit(1)


def _export(options: Namespace, overrides: list[str]) -> None:
    from dylora.storage.export import export_checkpoint

    if options.expert != "all" and not options.expert.isdecimal():
        raise ValueError(f"--expert is {options.expert!r}, but must be all or an expert's number")
    for folder in export_checkpoint(
        options.checkpoint, options.out, options.expert, options.portable
    ):
        print(folder)


def _info(options: Namespace, overrides: list[str]) -> None:
    if (options.checkpoint is None) == (options.config is None):
        raise ValueError("info needs either --checkpoint DIR or --config FILE")
    if options.config is not None:
        print(dump_run_config(load_run_config(options.config, overrides)), end="")
        return
    if overrides:
        raise ValueError(f"{COMMAND_LINE}: {overrides[0]} changes a config, and there is none")
    from dylora.evaluation.info import print_info

    print_info(options.checkpoint)


COMMANDS: dict[str, tuple[Callable[[Namespace, list[str]], None], str]] = {
    "train": (_train, "Train the experts that a config describes."),
    "evaluate": (_evaluate, "Loss and perplexity of a checkpoint on each of a config's data sets."),
    "benchmark": (_benchmark, "pass@k of the base and a checkpoint on published suites."),
    "generate": (_generate, "Continue a prompt with a checkpoint."),
    "validate": (_validate, "Check on this machine that a checkpoint computes what it should."),
    "export": (_export, "Write experts of a checkpoint as PEFT adapters."),
    "info": (_info, "What a checkpoint holds, or the settings that a config amounts to."),
}


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
    COMMANDS[name][0](command.parse_args(own), overrides)


def _parsers() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(
        prog="run.py",
        usage="run.py COMMAND [OPTIONS]",
        description="Mixtures of LoRA experts on a frozen language model.",
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(dest="command", required=True)
    commands = {}
    for name, (_, description) in COMMANDS.items():
        commands[name] = ArgumentParser(
            description=description,
            allow_abbrev=False,
            print_config=None,  # the option of that name is ours
        )
        commands[name].add_argument(
            "--traceback",
            action="store_true",
            help="Show where an error arose, like DYLORA_TRACEBACK=1.",
        )
        subcommands.add_subcommand(name, commands[name], help=description)
        commands[name].prog = f"run.py {name}"
    for name in ("train", "evaluate", "benchmark", "info"):
        commands[name].add_argument(
            "--config",
            required=name != "info",
            metavar="FILE",
            help="YAML file of the run. The command line overrides its fields, in any order; an "
            "item of data.sources goes by its index or name. Relative paths in the file are "
            "relative to the working directory.",
        )
    for name in ("train", "evaluate"):
        commands[name].add_argument(
            "--print_config", action="store_true", help="Print the resolved config and stop."
        )
    for name in ("evaluate", "benchmark", "generate", "validate", "export", "info"):
        commands[name].add_argument(
            "--checkpoint", metavar="DIR", required=name != "info", help="Folder of a checkpoint."
        )

    commands["train"].usage = f"run.py train {CONFIG_USAGE} [--resume_from_checkpoint latest|DIR]"
    commands["train"].add_argument(
        "--resume_from_checkpoint",
        metavar="latest|DIR",
        help="Go on from this folder, or from the latest of the run.",
    )

    commands["evaluate"].usage = f"run.py evaluate {CONFIG_USAGE} --checkpoint DIR"

    _add_benchmark_options(commands["benchmark"])

    generate = commands["generate"]
    generate.usage = "run.py generate --checkpoint DIR --prompt TEXT [OPTIONS]"
    generate.add_argument("--prompt", required=True, help="The instruction, or the text itself.")
    generate.add_argument("--base", help="Base model to use instead of the checkpoint's own.")
    generate.add_argument("--max_new_tokens", type=int, default=128, help="Most tokens to add.")
    generate.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token each time."
    )
    generate.add_argument(
        "--raw", action="store_true", help="Continue the prompt as it stands, without a template."
    )
    generate.add_argument(
        "--show_routing", action="store_true", help="Show which experts each token used."
    )
    generate.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        help="How the base is stored, by default as in training: see model.quantization.",
    )

    validate = commands["validate"]
    validate.usage = "run.py validate --checkpoint DIR [OPTIONS]"
    validate.add_argument("--base", help="Base model to use instead of the checkpoint's own.")
    validate.add_argument(
        "--device", default="auto", help="auto takes a GPU where there is one; or a torch device."
    )
    validate.add_argument(
        "--dtype",
        default="float32",
        help="Precision of the base: float32, bfloat16 or float16.",
    )
    validate.add_argument("--tokens", type=int, default=64, help="Length of the texts it runs on.")
    validate.add_argument("--out", metavar="FILE", help="File that gets the report as JSON.")

    export = commands["export"]
    export.usage = "run.py export --checkpoint DIR --out DIR [--expert all|N] [--portable]"
    export.add_argument(
        "--out", metavar="DIR", required=True, help="Folder that gets one folder per expert."
    )
    export.add_argument("--expert", default="all", help="all, or an expert's number.")
    export.add_argument(
        "--portable",
        action="store_true",
        help="Fold the scale into the tensors, for readers that ignore rslora and alpha.",
    )

    commands["info"].usage = f"run.py info --checkpoint DIR | {CONFIG_USAGE}"
    return parser, commands


def _add_benchmark_options(command: ArgumentParser) -> None:
    command.usage = f"run.py benchmark {CONFIG_USAGE} --checkpoint DIR --tasks NAMES [OPTIONS]"
    command.add_argument(
        "--tasks",
        required=True,
        help="mbpp, mbpp_sanitized, humaneval, humaneval+; commas between.",
    )
    command.add_argument(
        "--task_files",
        default="",
        metavar="SUITE=FILE,...",
        help="Read a suite from a file in its original format instead of the hub.",
    )
    command.add_argument("--split", default="test", help="Of MBPP's published splits, or all.")
    command.add_argument("--limit", type=int, help="Only the first so many tasks of each suite.")
    command.add_argument("--samples", type=int, default=1, help="Programs for each task.")
    command.add_argument("--k", default="1", help="The k of pass@k; commas between.")
    command.add_argument("--temperature", type=float, default=0.0, help="0: greedy.")
    command.add_argument("--top_p", type=float, default=1.0, help="Share of likely tokens kept.")
    command.add_argument("--max_new_tokens", type=int, default=512, help="Most tokens to add.")
    command.add_argument("--seed", type=int, default=0, help="Of the samples and the intervals.")
    command.add_argument(
        "--include-trained",
        action="store_true",
        help="Score tasks that the checkpoint was trained on, too; the results say so.",
    )
    command.add_argument(
        "--unsafe-exec",
        action="store_true",
        help="Run the model's programs without protection. Only in a machine you can lose.",
    )
    command.add_argument("--workers", type=int, default=2, help="Programs run side by side.")
    command.add_argument(
        "--out", metavar="DIR", help="Default: benchmark/ in the folder of the config's run."
    )


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

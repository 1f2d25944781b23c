"""Commands on a run and its model: train, evaluate, benchmark, generate."""

from pathlib import Path
from typing import get_args

from jsonargparse import ArgumentParser, Namespace

from dylora.commands.shared import (
    CONFIG_USAGE,
    add_base,
    add_checkpoint,
    add_config,
    add_print_config,
    split_items,
)
from dylora.config import Quantization
from dylora.config_file import load_run_config
from dylora.run_config import dump_run_config

# train


def add_train(command: ArgumentParser) -> None:
    command.usage = f"run.py train {CONFIG_USAGE} [--resume_from_checkpoint latest|DIR]"
    add_config(command)
    add_print_config(command)
    command.add_argument(
        "--resume_from_checkpoint",
        metavar="latest|DIR",
        help="Go on from this folder, or from the latest of the run.",
    )


def train(options: Namespace, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(dump_run_config(config), end="")
        return
    from dylora.evaluation.report import report_run
    from dylora.training.loop import train

    report_run(train(config, options.resume_from_checkpoint))


# evaluate


def add_evaluate(command: ArgumentParser) -> None:
    command.usage = f"run.py evaluate {CONFIG_USAGE} --checkpoint DIR"
    add_config(command)
    add_print_config(command)
    add_checkpoint(command)


def evaluate(options: Namespace, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(dump_run_config(config), end="")
        return
    from dylora.evaluation.evaluate import evaluate_checkpoint

    evaluate_checkpoint(config, options.checkpoint)


# benchmark


def add_benchmark(command: ArgumentParser) -> None:
    command.usage = f"run.py benchmark {CONFIG_USAGE} --checkpoint DIR --tasks NAMES [OPTIONS]"
    add_config(command)
    add_checkpoint(command)
    command.add_argument(
        "--tasks",
        required=True,
        help="mbpp, mbpp_sanitized, mbpp+, humaneval, humaneval+, skills or one of them as "
        "skills/sql; commas between.",
    )
    command.add_argument(
        "--task_files",
        default="",
        metavar="SUITE=FILE,...",
        help="Read a suite from a file in its original format instead of the hub.",
    )
    command.add_argument("--split", default="test", help="Of MBPP's published splits, or all.")
    command.add_argument(
        "--shots", type=int, default=0, help="Solved tasks before each question of MBPP: 0 or 3."
    )
    command.add_argument("--limit", type=int, help="Only the first so many tasks of each suite.")
    command.add_argument("--samples", type=int, default=1, help="Programs for each task.")
    command.add_argument("--k", default="1", help="The k of pass@k; commas between.")
    command.add_argument("--temperature", type=float, default=0.0, help="0: greedy.")
    command.add_argument("--top_p", type=float, default=1.0, help="Share of likely tokens kept.")
    command.add_argument(
        "--max_new_tokens", type=int, help="Most tokens to add; default 512, and 64 for skills."
    )
    command.add_argument("--seed", type=int, default=0, help="Of the samples and the intervals.")
    command.add_argument(
        "--include-trained",
        action="store_true",
        help="Score tasks that the checkpoint was trained on, too; the results say so.",
    )
    command.add_argument(
        "--sandbox",
        choices=("auto", "landlock", "bubblewrap"),
        default="auto",
        help="What keeps programs from files; auto takes the first that works here.",
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


def benchmark(options: Namespace, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    files = dict(_pair(item) for item in split_items(options.task_files))
    from dylora.evaluation.benchmark import BenchmarkOptions, benchmark_checkpoint, expand_tasks

    if not all(item.isdecimal() for item in split_items(options.k)):
        raise ValueError(f"--k is {options.k!r}, but must be numbers with commas between")
    chosen = BenchmarkOptions(
        tasks=expand_tasks(split_items(options.tasks)),
        files=files,
        split=options.split,
        shots=options.shots,
        limit=options.limit,
        samples=options.samples,
        k=tuple(int(item) for item in split_items(options.k)),
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        include_trained=options.include_trained,
        sandbox=options.sandbox,
        unsafe=options.unsafe_exec,
        workers=options.workers,
    )
    out = options.out or Path(config.output_dir, config.name, "benchmark")
    benchmark_checkpoint(config, options.checkpoint, chosen, Path(out))


def _pair(text: str) -> tuple[str, str]:
    name, equals, file = text.partition("=")
    if not equals:
        raise ValueError(f"--task_files has {text!r}, but each item must be SUITE=FILE")
    return name, file


# generate


def add_generate(command: ArgumentParser) -> None:
    command.usage = "run.py generate --checkpoint DIR --prompt TEXT [OPTIONS]"
    add_checkpoint(command)
    command.add_argument("--prompt", required=True, help="The instruction, or the text itself.")
    add_base(command)
    command.add_argument("--max_new_tokens", type=int, default=128, help="Most tokens to add.")
    command.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token each time."
    )
    command.add_argument(
        "--raw", action="store_true", help="Continue the prompt as it stands, without a template."
    )
    command.add_argument(
        "--show_routing", action="store_true", help="Show which experts each token used."
    )
    command.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        help="How the base is stored, by default as in training: see model.quantization.",
    )


def generate(options: Namespace, overrides: list[str]) -> None:
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

"""`run.py benchmark`."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from dylora.cli.config_file import load_run_config
from dylora.cli.options import CONFIG_USAGE, add_checkpoint, add_config, split_items

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
    from dylora.evaluation.passk.benchmark import benchmark_checkpoint
    from dylora.evaluation.passk.options import BenchmarkOptions, expand_tasks

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

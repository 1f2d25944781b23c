"""`run.py benchmark`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from dylora.cli.config_file import load_run_config
from dylora.cli.options import CheckpointOptions, ConfigOptions
from dylora.fields import check_fields, option


@dataclass(frozen=True, kw_only=True)
class BenchmarkCommand(CheckpointOptions, ConfigOptions):
    """pass@k of the base and a checkpoint on published suites, and on the embedded skills."""

    tasks: tuple[str, ...] = option(metavar="SUITE,...")
    """mbpp, mbpp_sanitized, mbpp+, humaneval, humaneval+, skills or one of them as skills/sql;
    commas between."""
    files: dict[str, str] = option({}, flag="task_files", metavar="SUITE=FILE,...")
    """Read a suite from a file in its original format instead of the hub."""
    split: str = "test"
    """Of MBPP's published splits, or all."""
    shots: int = 0
    """Solved tasks before each question of MBPP: 0 or 3."""
    limit: int | None = option(None, least=1)
    """Only the first so many tasks of each suite."""
    samples: int = option(1, least=1)
    """Programs for each task."""
    k: tuple[int, ...] = option((1,), metavar="K,...")
    """The k of pass@k; commas between."""
    temperature: float = option(0.0, least=0)
    """0: greedy."""
    top_p: float = option(1.0, above=0, most=1)
    """Share of likely tokens kept."""
    max_new_tokens: int | None = option(None, least=1)
    """Most tokens to add; by default 512, and 64 for skills."""
    seed: int = 0
    """Of the samples and the intervals."""
    include_trained: bool = False
    """Score tasks that the checkpoint was trained on, too; the results say so."""
    sandbox: Literal["auto", "landlock", "bubblewrap"] = "auto"
    """What keeps programs from files; auto takes the first that works here."""
    unsafe: bool = option(False, flag="unsafe_exec")
    """Run the model's programs without protection. Only in a machine you can lose."""
    workers: int = option(2, least=1)
    """Programs run side by side."""
    out: str | None = option(None, metavar="DIR")
    """By default benchmark/ in the folder of the config's run."""

    def __post_init__(self) -> None:
        check_fields(self)


def run(options: BenchmarkCommand, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    from dylora.evaluation.passk.benchmark import benchmark_checkpoint
    from dylora.evaluation.passk.options import BenchmarkOptions, expand_tasks

    chosen = {item.name: getattr(options, item.name) for item in fields(BenchmarkOptions)}
    chosen["tasks"] = expand_tasks(options.tasks)
    out = Path(options.out or Path(config.output_dir, config.name, "benchmark"))
    benchmark_checkpoint(config, options.checkpoint, BenchmarkOptions(**chosen), out)

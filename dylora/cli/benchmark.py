"""`run.py benchmark`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from dylora.cli.config_file import load_run_config
from dylora.cli.options import CheckpointOptions, ConfigOptions, RoutingOptions
from dylora.evaluation.passk.options import BenchmarkOptions
from dylora.fields import option


@dataclass(frozen=True, kw_only=True)
class BenchmarkCommand(BenchmarkOptions, RoutingOptions, CheckpointOptions, ConfigOptions):
    """pass@k of the base and a checkpoint on published suites, and on the embedded skills."""

    ACTING: ClassVar = ("name", "output_dir", "model.", "eval.batch_size")
    """Fields of a config that have an effect."""

    out: str | None = option(None, metavar="DIR")
    """By default benchmark/ in the folder of the config's run."""


def run(options: BenchmarkCommand, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    from dylora.evaluation.passk.benchmark import benchmark_checkpoint

    chosen = {item.name: getattr(options, item.name) for item in fields(BenchmarkOptions)}
    out = Path(options.out or Path(config.output_dir, config.name, "benchmark"))
    asked = BenchmarkOptions(**chosen)
    benchmark_checkpoint(config, options.source(), asked, out, options.routing())

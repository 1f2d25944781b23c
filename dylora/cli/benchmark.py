"""`run.py benchmark`."""

from dataclasses import dataclass, fields
from pathlib import Path

from dylora.cli.config_file import load_run_config, routing_changes
from dylora.cli.options import CheckpointOptions, ConfigOptions
from dylora.evaluation.passk.options import BenchmarkOptions
from dylora.fields import option


@dataclass(frozen=True, kw_only=True)
class BenchmarkCommand(BenchmarkOptions, CheckpointOptions, ConfigOptions):
    """pass@k of the base and a checkpoint on published suites, and on the embedded skills."""

    out: str | None = option(None, metavar="DIR")
    """By default benchmark/ in the folder of the config's run."""


def run(options: BenchmarkCommand, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    routing = routing_changes(config, overrides)
    from dylora.evaluation.passk.benchmark import benchmark_checkpoint

    chosen = {item.name: getattr(options, item.name) for item in fields(BenchmarkOptions)}
    out = Path(options.out or Path(config.output_dir, config.name, "benchmark"))
    benchmark_checkpoint(config, options.source(), BenchmarkOptions(**chosen), out, routing)

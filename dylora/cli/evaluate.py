"""`run.py evaluate`."""

from dataclasses import dataclass

from dylora.cli.config_file import load_run_config
from dylora.cli.options import CheckpointOptions, ConfigOptions
from dylora.run_config import dump_run_config


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(CheckpointOptions, ConfigOptions):
    """Loss and perplexity of a checkpoint on each of a config's data sets."""

    print_config: bool = False
    """Print the resolved config and stop."""


def run(options: EvaluateOptions, overrides: list[str]) -> None:
    config = load_run_config(options.config, overrides)
    if options.print_config:
        print(dump_run_config(config), end="")
        return
    from dylora.evaluation.evaluate import evaluate_checkpoint

    evaluate_checkpoint(config, options.checkpoint)

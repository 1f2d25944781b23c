"""`run.py evaluate`."""

from jsonargparse import ArgumentParser, Namespace

from dylora.cli.config_file import load_run_config
from dylora.cli.options import CONFIG_USAGE, add_checkpoint, add_config, add_print_config
from dylora.run_config import dump_run_config

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

"""`run.py train`."""

from jsonargparse import ArgumentParser, Namespace

from dylora.cli.config_file import load_run_config
from dylora.cli.options import CONFIG_USAGE, add_config, add_print_config
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

"""`run.py info`."""

from jsonargparse import ArgumentParser, Namespace

from dylora.cli.config_file import COMMAND_LINE, load_run_config
from dylora.cli.options import CONFIG_USAGE, add_config
from dylora.run_config import dump_run_config

# info


def add_info(command: ArgumentParser) -> None:
    command.usage = f"run.py info --checkpoint DIR | {CONFIG_USAGE}"
    add_config(command, required=False)
    command.add_argument(
        "--checkpoint", metavar="DIR", help="Folder of a checkpoint, an export or a PEFT adapter."
    )


def info(options: Namespace, overrides: list[str]) -> None:
    if (options.checkpoint is None) == (options.config is None):
        raise ValueError("info needs either --checkpoint DIR or --config FILE")
    if options.config is not None:
        print(dump_run_config(load_run_config(options.config, overrides)), end="")
        return
    if overrides:
        raise ValueError(f"{COMMAND_LINE}: {overrides[0]} changes a config, and there is none")
    from dylora.evaluation.info import print_info

    print_info(options.checkpoint)

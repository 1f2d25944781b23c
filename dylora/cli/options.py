"""Options of several commands."""

from jsonargparse import ArgumentParser

CONFIG_USAGE = "--config FILE [--section.key VALUE ...]"


def add_config(command: ArgumentParser, *, required: bool = True) -> None:
    command.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="YAML file of the run. The command line overrides its fields, in any order; an "
        "item of data.sources goes by its index or name. Relative paths in the file are "
        "relative to the working directory.",
    )


def add_print_config(command: ArgumentParser) -> None:
    command.add_argument(
        "--print_config", action="store_true", help="Print the resolved config and stop."
    )


def add_checkpoint(command: ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="Folder of a checkpoint."
    )


def add_base(command: ArgumentParser) -> None:
    command.add_argument("--base", help="Base model to use instead of the checkpoint's own.")


def split_items(text: str) -> list[str]:
    """The parts of a list with commas between."""
    return [item.strip() for item in text.split(",") if item.strip()]

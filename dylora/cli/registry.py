"""The commands of run.py: for each its options, and the function that carries it out.

The modules that do the work are imported inside each command, so that help and errors come at once.
"""

from collections.abc import Callable
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace

from dylora.cli import benchmark, evaluate, export, generate, import_, info, train, validate


class Command(NamedTuple):
    """One command."""

    run: Callable[[Namespace, list[str]], None]  # its options, and overrides of config fields
    add_options: Callable[[ArgumentParser], None]
    description: str


COMMANDS = {
    "train": Command(train.train, train.add_train, "Train the experts that a config describes."),
    "evaluate": Command(
        evaluate.evaluate,
        evaluate.add_evaluate,
        "Loss and perplexity of a checkpoint on each of a config's data sets.",
    ),
    "benchmark": Command(
        benchmark.benchmark,
        benchmark.add_benchmark,
        "pass@k of the base and a checkpoint on published suites, and on the embedded skills.",
    ),
    "generate": Command(
        generate.generate, generate.add_generate, "Continue a prompt with a checkpoint."
    ),
    "validate": Command(
        validate.validate,
        validate.add_validate,
        "Check on this machine that a checkpoint computes what it should.",
    ),
    "export": Command(
        export.export,
        export.add_export,
        "Write experts as PEFT adapters, a mixture as one, or a model with either inside.",
    ),
    "import": Command(
        import_.import_, import_.add_import, "Make PEFT LoRA adapters the experts of one mixture."
    ),
    "info": Command(
        info.info,
        info.add_info,
        "What a checkpoint holds, or the settings that a config amounts to.",
    ),
}

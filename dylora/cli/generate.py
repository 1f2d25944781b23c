"""`run.py generate`."""

from typing import get_args

from jsonargparse import ArgumentParser, Namespace

from dylora.cli.options import add_base, add_checkpoint
from dylora.config import Quantization

# generate


def add_generate(command: ArgumentParser) -> None:
    command.usage = "run.py generate --checkpoint DIR --prompt TEXT [OPTIONS]"
    add_checkpoint(command)
    command.add_argument("--prompt", required=True, help="The instruction, or the text itself.")
    add_base(command)
    command.add_argument("--max_new_tokens", type=int, default=128, help="Most tokens to add.")
    command.add_argument(
        "--temperature", type=float, default=0.0, help="0: the likeliest token each time."
    )
    command.add_argument(
        "--raw", action="store_true", help="Continue the prompt as it stands, without a template."
    )
    command.add_argument(
        "--show_routing", action="store_true", help="Show which experts each token used."
    )
    command.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        help="How the base is stored, by default as in training: see model.quantization.",
    )


def generate(options: Namespace, overrides: list[str]) -> None:
    if options.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {options.max_new_tokens}, but must be at least 1")
    if not options.temperature >= 0:  # also refuses nan
        raise ValueError(f"--temperature is {options.temperature}, but must be at least 0")
    from dylora.evaluation.generate import generate_text

    generate_text(
        options.checkpoint,
        options.prompt,
        options.base,
        options.max_new_tokens,
        options.temperature,
        options.raw,
        options.show_routing,
        options.quantization,
    )

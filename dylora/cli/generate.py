"""`run.py generate`."""

from dataclasses import dataclass

from dylora.cli.options import BaseOptions, CheckpointOptions
from dylora.config import Quantization
from dylora.fields import check_fields, option


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(BaseOptions, CheckpointOptions):
    """Continue a prompt with a checkpoint."""

    prompt: str
    """The instruction, or the text itself."""
    max_new_tokens: int = option(128, least=1)
    """Most tokens to add."""
    temperature: float = option(0.0, least=0)
    """0: the likeliest token each time."""
    raw: bool = False
    """Continue the prompt as it stands, without a template."""
    show_routing: bool = False
    """Show which experts each token used."""
    quantization: Quantization | None = None
    """How the base is stored, by default as in training: see model.quantization."""

    def __post_init__(self) -> None:
        check_fields(self)


def run(options: GenerateOptions, overrides: list[str]) -> None:
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

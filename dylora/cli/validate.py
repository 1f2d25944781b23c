"""`run.py validate`."""

from dataclasses import dataclass

from dylora.cli.options import BaseOptions, CheckpointOptions
from dylora.fields import option
from dylora.run_config import Precision


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(BaseOptions, CheckpointOptions):
    """Check on this machine that a checkpoint computes what it should."""

    device: str = "auto"
    """auto takes a GPU where there is one; or a torch device."""
    dtype: Precision = "float32"
    """Precision of the base."""
    tokens: int = 64
    """Length of the texts it runs on."""
    out: str | None = option(None, metavar="FILE")
    """File that gets the report as JSON."""


def run(options: ValidateOptions, overrides: list[str]) -> None:
    from dylora.evaluation.validate.run import validate_checkpoint

    report = validate_checkpoint(
        options.source(), options.base, options.device, options.dtype, options.tokens, options.out
    )
    if not report.passed:
        raise SystemExit(1)

"""`run.py validate`."""

from jsonargparse import ArgumentParser, Namespace

from dylora.cli.options import add_base, add_checkpoint

# validate


def add_validate(command: ArgumentParser) -> None:
    command.usage = "run.py validate --checkpoint DIR [OPTIONS]"
    add_checkpoint(command)
    add_base(command)
    command.add_argument(
        "--device", default="auto", help="auto takes a GPU where there is one; or a torch device."
    )
    command.add_argument(
        "--dtype",
        default="float32",
        help="Precision of the base: float32, bfloat16 or float16.",
    )
    command.add_argument("--tokens", type=int, default=64, help="Length of the texts it runs on.")
    command.add_argument("--out", metavar="FILE", help="File that gets the report as JSON.")


def validate(options: Namespace, overrides: list[str]) -> None:
    from dylora.evaluation.validate.run import validate_checkpoint

    report = validate_checkpoint(
        options.checkpoint,
        options.base,
        options.device,
        options.dtype,
        options.tokens,
        options.out,
    )
    if not report.passed:
        raise SystemExit(1)

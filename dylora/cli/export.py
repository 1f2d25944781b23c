"""`run.py export`."""

from typing import get_args

from jsonargparse import ArgumentParser, Namespace

from dylora.cli.options import add_base, add_checkpoint, split_items
from dylora.config import Quantization
from dylora.run_config import Precision

# export


def add_export(command: ArgumentParser) -> None:
    command.usage = (
        "run.py export --checkpoint DIR --out DIR [--expert all|N] [--portable] | "
        "--mixture --weights W | --merge [--expert N | --weights W]"
    )
    add_checkpoint(command)
    command.add_argument(
        "--out",
        metavar="DIR",
        required=True,
        help="Folder that gets one folder per expert, or becomes the one that is written.",
    )
    command.add_argument("--expert", help="all (without --merge the default), or a number.")
    command.add_argument(
        "--portable",
        action="store_true",
        help="Fold the scale into the tensors, for readers that ignore rslora and alpha.",
    )
    command.add_argument(
        "--mixture", action="store_true", help="Write a mixture of constant weights as one LoRA."
    )
    command.add_argument(
        "--merge",
        action="store_true",
        help="Write a plain model with an expert, or a mixture of constant weights, inside.",
    )
    command.add_argument(
        "--weights",
        metavar="W,W,...|measured",
        help="One weight an expert; measured: each site's mean gates over --text. By default those "
        "of router_type fixed.",
    )
    command.add_argument(
        "--text",
        metavar="FILE",
        help="Text (.txt, or rows with text or with instruction and output in .jsonl) on which to "
        "measure weights, and what a constant mixture loses against routing.",
    )
    command.add_argument("--text_tokens", type=int, default=16384, help="Most tokens of it.")
    add_base(command)
    command.add_argument("--base_name", help="What adapter_config.json shall name as the base.")
    command.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *get_args(Precision)),
        help="Precision of the base that is merged or measured; auto: as it is stored.",
    )
    command.add_argument(
        "--quantization",
        choices=get_args(Quantization),
        help="How the base is stored, by default as in training: see model.quantization.",
    )
    command.add_argument(
        "--dequantize", action="store_true", help="With --merge: make a quantised base whole."
    )


def export(options: Namespace, overrides: list[str]) -> None:
    form = "mixture" if options.mixture else "merged" if options.merge else "experts"
    _check_export(options, form)
    weights = options.weights
    if weights is not None and weights != "measured":
        weights = [_number(item, "--weights") for item in split_items(weights)]
    from dylora.evaluation.export import ExportOptions, run_export

    run_export(
        ExportOptions(
            checkpoint=options.checkpoint,
            out=options.out,
            form=form,
            expert=options.expert,
            weights=weights,
            text=options.text,
            text_tokens=options.text_tokens,
            portable=options.portable,
            dequantize=options.dequantize,
            base=options.base,
            base_name=options.base_name,
            dtype=options.dtype,
            quantization=options.quantization,
        )
    )


def _check_export(options: Namespace, form: str) -> None:
    """Raises ValueError for options that do not go together."""
    expert, weights = options.expert, options.weights
    if options.mixture and options.merge:
        raise ValueError("--mixture writes an adapter and --merge a model: give one of them")
    if expert is not None and expert != "all" and not expert.isdecimal():
        raise ValueError(f"--expert is {expert!r}, but must be all or an expert's number")
    if form == "experts" and (weights or options.text):
        raise ValueError("--weights and --text need --mixture or --merge")
    if form == "mixture" and expert is not None:
        raise ValueError("--mixture takes all experts: give their --weights instead of --expert")
    if form == "merged" and expert == "all":
        raise ValueError("--merge takes one --expert, or the --weights of a mixture, not all")
    if form == "merged" and options.portable:
        raise ValueError("--portable is a form of adapters, and --merge writes a model")
    if expert is not None and (weights or options.text):
        raise ValueError("--expert and --weights exclude each other, and --text belongs to weights")
    if weights == "measured" and options.text is None:
        raise ValueError("--weights measured needs a --text FILE to measure on")
    if options.dequantize and form != "merged":
        raise ValueError("--dequantize needs --merge")
    if options.base_name and form == "merged":
        raise ValueError("--base_name is a field of adapters, and --merge writes a model")
    if options.text_tokens < 2:
        raise ValueError(f"--text_tokens is {options.text_tokens}, but must be at least 2")


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option} has {text!r}, but each item must be a number") from None

"""Commands on checkpoints and adapters: validate, export, import, info."""

from pathlib import Path
from typing import get_args

from jsonargparse import ArgumentParser, Namespace

from dylora.commands.shared import CONFIG_USAGE, add_base, add_checkpoint, add_config, split_items
from dylora.config import Quantization
from dylora.config_file import COMMAND_LINE, load_run_config, split_overrides
from dylora.run_config import Precision, dump_run_config

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
    from dylora.evaluation.validate import validate_checkpoint

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


# import


def add_import(command: ArgumentParser) -> None:
    command.usage = (
        "run.py import --adapters DIR [DIR ...] --out DIR --base NAME "
        "[--moe.KEY VALUE ...] [OPTIONS]"
    )
    command.add_argument(
        "--adapters",
        metavar="DIR",
        nargs="+",
        required=True,
        help="Folders of PEFT LoRA adapters, or of checkpoints that hold some.",
    )
    command.add_argument("--out", metavar="DIR", required=True, help="Folder of the new mixture.")
    command.add_argument(
        "--base", help="Base model by name or folder; what the adapters name is never followed."
    )
    command.add_argument("--revision", help="Commit, tag or branch of the base on the hub.")
    command.add_argument(
        "--router_init",
        choices=("learned", "arrow"),
        default="learned",
        help="arrow: route by what each adapter changes most, without any training.",
    )
    command.add_argument(
        "--trainable",
        action="store_true",
        help="Let training change the experts, too; without it, it trains the routers alone.",
    )
    command.add_argument(
        "--dtype",
        choices=get_args(Precision),
        default="float32",
        help="Precision in which the base is read; the experts are float32 always.",
    )
    command.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file whose section moe says how the mixture routes; --moe.KEY goes before it.",
    )


def import_(options: Namespace, overrides: list[str]) -> None:
    moe = None
    for key, _ in split_overrides(overrides):
        if not key.startswith("moe."):
            raise ValueError(f"{COMMAND_LINE}: --{key} is no setting of the mixture (--moe.KEY)")
    if options.config is not None or overrides:
        moe = load_run_config(options.config, overrides).moe
    import torch

    from dylora.imported import load_peft_experts

    out = Path(options.out).resolve()
    for folder in map(Path, options.adapters):
        if out in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(f"--out {options.out} would replace {folder}: name another folder")
    model = load_peft_experts(
        options.base,
        options.adapters,
        moe,
        router_init=options.router_init,
        freeze=not options.trainable,
        revision=options.revision,
        dtype=getattr(torch, options.dtype),
        report=lambda line: print(f"note: {line}"),
    )
    model.save_pretrained(options.out)
    print(model.experts)
    print(model.size_message(Path(options.out)))


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

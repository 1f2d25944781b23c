"""`run.py import`."""

from pathlib import Path
from typing import get_args

from jsonargparse import ArgumentParser, Namespace

from dylora.cli.config_file import COMMAND_LINE, load_run_config, split_overrides
from dylora.run_config import Precision

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

    from dylora.integrations.peft_import import load_peft_experts

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

"""`run.py import`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dylora.cli.config_file import COMMAND_LINE, load_run_config, read_tree
from dylora.config import MoELoraConfig
from dylora.fields import option
from dylora.run_config import Precision, RunConfig

# Settings that --router_init arrow brings along.
BY_PROTOTYPES = {"router_logits": "absolute", "gate_scale": "sum_to_one"}


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Make PEFT LoRA adapters the experts of one mixture."""

    adapters: list[str] = option(metavar="DIR", many=True)
    """Folders of PEFT LoRA adapters, or of checkpoints that hold some."""
    out: str = option(metavar="DIR")
    """Folder of the new mixture."""
    overwrite: bool = False
    """Replace an earlier mixture in --out; a training checkpoint never is."""
    base: str | None = None
    """Base model by name or folder; what the adapters name is never followed."""
    revision: str | None = None
    """Commit, tag or branch of the base on the hub."""
    router_init: Literal["learned", "arrow"] = "learned"
    """arrow: route by what each adapter changes most, without any training."""
    trainable: bool = False
    """Let training change the experts, too; without it, it trains the routers alone."""
    dtype: Precision = "float32"
    """Precision in which the base is read; the experts are float32 always."""
    config: str | None = option(None, metavar="FILE")
    """YAML file whose section moe says how the mixture routes; --moe.KEY goes before it."""


def run(options: ImportOptions, overrides: list[str]) -> None:
    for key in [word.partition("=")[0] for word in overrides]:
        if not key.startswith("moe."):
            raise ValueError(f"{COMMAND_LINE}: --{key} is no setting of the mixture (--moe.KEY)")
    moe = mixture_config(options, overrides) if options.config or overrides else None
    import torch

    from dylora.integrations.peft_import import load_peft_experts
    from dylora.storage.folders import check_place

    out = Path(options.out).resolve()
    for folder in map(Path, options.adapters):
        if out in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(f"--out {options.out} would replace {folder}: name another folder")
    check_place(out, overwrite=options.overwrite, over_mixture=True)
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
    model.save_pretrained(options.out, options.overwrite)
    print(model.experts)
    print(model.size_message(Path(options.out)))


def mixture_config(options: ImportOptions, overrides: list[str]) -> MoELoraConfig:
    """What a user says of the mixture, for as many experts as there are adapters.

    Raises ValueError for what does not fit them, or the routing by prototypes.
    """
    from dylora.storage.checkpoint import AdapterFolder

    said = read_tree(RunConfig, options.config, overrides)[1].get("moe") or {}
    if "num_experts" not in said:
        count = sum(len(AdapterFolder.open(one).found.adapters) for one in options.adapters)
        # One is refused as such, with what to do.
        overrides = [f"moe.num_experts={count}", *overrides] if count > 1 else overrides
    moe = load_run_config(options.config, overrides).moe
    for name, value in BY_PROTOTYPES.items() if options.router_init == "arrow" else ():
        if name in said and getattr(moe, name) != value:
            raise ValueError(
                f"moe.{name} is {getattr(moe, name)!r}, but --router_init arrow routes with "
                f"{value!r}: leave it out"
            )
    return moe

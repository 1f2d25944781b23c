"""Experts of a checkpoint as PEFT adapters of their own."""

from pathlib import Path

from dylora.storage.checkpoint import read_description, write_folder
from dylora.storage.peft_format import (
    PeftAdapter,
    fold_scale,
    read_adapter,
    scaling_of,
    write_adapter,
)

ADAPTERS = "peft_adapters"


def export_checkpoint(
    checkpoint: str | Path, out: str | Path, expert: str = "all", portable: bool = False
) -> list[Path]:
    """Write experts as folders that PEFT, vLLM or llama.cpp can load.

    Args:
        checkpoint: a folder written by `save_pretrained` or by training; verified first.
        out: gets one folder `expert_<i>` each.
        expert: an index, or all.
        portable: fold the scale into B and set lora_alpha = r, so that readers that ignore
            rslora agree too; exact up to float32 rounding.

    Returns the folders. Raises ValueError for an expert that is not there.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    experts = [entry["name"] for entry in read_description(checkpoint)["experts"]]
    if expert != "all":
        name = f"expert_{expert}"
        if name not in experts:
            raise ValueError(f"{checkpoint} has no {name}, only {', '.join(experts)}")
        experts = [name]
    written = []
    for name in experts:
        adapter = read_adapter(checkpoint / ADAPTERS / name)
        if portable:
            adapter = fold_scale(adapter, scaling_of(adapter.config))
        write_folder(out / name, _writer(adapter))
        written.append(out / name)
    return written


def _writer(adapter: PeftAdapter):
    return lambda folder: write_adapter(folder, adapter)

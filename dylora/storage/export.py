"""Experts of a checkpoint as PEFT adapters of their own."""

from pathlib import Path

from dylora.storage.checkpoint import read_description, write_folder
from dylora.storage.description import ADAPTERS
from dylora.storage.peft_format import PeftAdapter, portable_form, read_adapter, write_adapter


def export_checkpoint(
    checkpoint: str | Path, out: str | Path, expert: str = "all", portable: bool = False
) -> list[Path]:
    """Write experts as folders that PEFT, vLLM or llama.cpp can load.

    Args:
        checkpoint: a folder written by `save_pretrained` or by training; verified first.
        out: gets one folder `expert_<i>` each.
        expert: an index, or all.
        portable: fold the scale into B and set lora_alpha = r, so that readers that ignore
            rslora or patterns agree too; exact up to float32 rounding.

    Returns the folders. Raises ValueError for an expert that is not there, retired, or without a
    portable form; nothing is written then.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    table = read_description(checkpoint)["experts"]
    experts = [entry["name"] for entry in table if entry["state"] != "retired"]
    if expert != "all":
        name = f"expert_{expert}"
        if name not in experts:
            raise ValueError(f"{checkpoint} has no {name}, only {', '.join(experts)}")
        experts = [name]
    adapters = [read_adapter(checkpoint / ADAPTERS / name) for name in experts]
    if portable:
        adapters = [portable_form(adapter) for adapter in adapters]
    for name, adapter in zip(experts, adapters, strict=True):
        write_folder(out / name, _writer(adapter))
    return [out / name for name in experts]


def _writer(adapter: PeftAdapter):
    return lambda folder: write_adapter(folder, adapter)

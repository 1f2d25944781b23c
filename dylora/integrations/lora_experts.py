"""The experts of a mixture to PEFT's files and back, by their numbers."""

from pathlib import Path

from dylora.integrations.peft_export import export_peft
from dylora.model import DyLoRA_MoE
from dylora.model_io import fill_expert
from dylora.rollback import restoring_values, without_autograd
from dylora.storage.checkpoint import AdapterFolder


def save_lora_experts(
    model: DyLoRA_MoE, folder: str | Path, *, overwrite: bool = False
) -> list[Path]:
    """Write every expert that is not retired as a PEFT adapter expert_<i>; see `export_peft`."""
    return export_peft(model, folder, overwrite=overwrite)


@without_autograd
def load_lora_experts(model: DyLoRA_MoE, folder: str | Path) -> list[int]:
    """Give experts the values of the adapters expert_<i> of a folder; the others stay as they are.

    Routers, maturity and moments stay. For adapters made elsewhere see `load_peft_experts`.

    Returns the numbers of the experts. Raises ValueError or FileNotFoundError, and changes nothing,
    for adapters of another type, rank, scale or set of projections than the expert of their number,
    for numbers that are none of an expert, with share_A for another A unless every expert is there,
    and where biases are trained: adapters round them.
    """
    mixture, experts = model.mixture, model.experts
    if mixture.config.bias != "none":
        raise ValueError(
            "adapters hold trained biases rounded, with those of the base: load a checkpoint by "
            "DyLoRA_MoE.from_pretrained"
        )
    numbers = {experts[expert].name: expert for expert in experts.live}
    read = AdapterFolder.open(folder).adapters()
    for adapter in read:
        if adapter.folder.name not in numbers:
            raise ValueError(f"{adapter.folder} is none of {', '.join(numbers)}")
    loaded = [numbers[adapter.folder.name] for adapter in read]
    with restoring_values(mixture, loaded):
        for expert, adapter in zip(loaded, read, strict=True):
            fill_expert(mixture, expert, adapter, adapter.folder)
    return loaded

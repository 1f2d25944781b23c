"""Experts of a live model, or of a checkpoint, as PEFT adapters."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylora.integrations.folder_export import (
    chosen_names,
    export_checkpoint,
    export_checkpoint_mixture,
    joined_adapter,
    write_experts,
    write_mixture,
)
from dylora.integrations.site_weights import Weights, by_projection
from dylora.integrations.static_weights import static_weights
from dylora.model_io import bias_shifts, expert_adapter

if TYPE_CHECKING:
    from dylora.model import DyLoRA_MoE


def export_peft(
    model: "DyLoRA_MoE | str | Path",
    folder: str | Path,
    expert: str | int = "all",
    portable: bool = False,
    base_name: str | None = None,
) -> list[Path]:
    """Write experts of a model or a checkpoint as PEFT adapters, one folder each.

    See `export_checkpoint` for the arguments, what is returned and what is raised.
    """
    if isinstance(model, str | Path):
        return export_checkpoint(model, folder, expert, portable, base_name)
    live = [model.experts[index].name for index in model.experts.live]
    names = chosen_names(live, expert, "the model")
    adapters = {name: expert_adapter(model, int(name.removeprefix("expert_"))) for name in names}
    return write_experts(Path(folder), adapters, portable, base_name)


def export_mixture(
    model: "DyLoRA_MoE | str | Path",
    folder: str | Path,
    weights: Weights | None = None,
    base_name: str | None = None,
    **record: Any,
) -> Path:
    """Write a mixture of constant weights as one PEFT adapter of rank Σ r.

    Args:
        model: or a checkpoint's folder, whose base is not loaded; it needs weights.
        weights: one an expert, [E], or one a site and expert, [N, E]; used as gates, as they are.
            None: those of router_type fixed.
        record: more to keep in dylora_export.json.

    Raises ValueError for weights that do not fit, for DoRA experts, and where routing depends on
    the token and no weights are given; FileExistsError where something else is in the way.
    """
    if isinstance(model, str | Path):
        if weights is None:
            raise ValueError("a mixture from a checkpoint's folder needs weights")
        return export_checkpoint_mixture(model, folder, weights, base_name, record)
    weights_NE = static_weights(model, weights=weights)
    live = [row.state != "retired" for row in model.experts.table]
    adapters = {
        model.experts[index].name: expert_adapter(model, index) for index in model.experts.live
    }
    sites, paths = model.site_names, list(model.mixture.adapters)
    adapter = joined_adapter(
        adapters, by_projection(weights_NE, live, sites, paths), bias_shifts(model)
    )
    names = list(adapters)
    return write_mixture(Path(folder), adapter, names, sites, weights_NE, base_name, record)

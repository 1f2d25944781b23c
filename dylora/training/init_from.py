"""A run that begins with the experts, routers and maturity of a checkpoint."""

from pathlib import Path
from typing import Any

from dylora.model import DyLoRA_MoE
from dylora.model_io import load_model
from dylora.routing.maturity import ExpertMaturity
from dylora.storage.checkpoint import Checkpoint

# Settings of a mixture that say how it is trained and mixed, not of what form its tensors are.
FREE_SETTINGS = {
    *("top_k_experts", "router_temperature", "router_noise", "routing_mode", "lora_dropout"),
    *("router_aux_loss_coef", "router_switch_loss_coef", "router_z_loss_coef", "freeze_A"),
    *("load_balance_loss_type", "expert_capacity_factor", "expert_dropout", "maturity_mode"),
    *("maturity_tau", "maturity_rho", "maturity_s", "maturity_fast", "maturity_slow"),
    *("maturity_threshold", "maturity_schedule", "init_lora_weights", "router_type"),
    "gate_scale",
}


def init_from_checkpoint(model: DyLoRA_MoE, folder: str | Path, train_experts: bool | None) -> None:
    """Give a model the experts, routers and maturity of a checkpoint, for a run of its own.

    folder: or user/name on the hub.
    Moments, schedule, counters, place in the data and the averages behind maturity begin afresh.
    Raises ValueError, naming the setting, where the checkpoint is of another form.
    """
    checkpoint = Checkpoint.open(folder)
    ours = model.config.to_dict()
    for name, theirs in checkpoint.config.to_dict().items():
        if name not in FREE_SETTINGS and ours.get(name) != theirs:
            raise ValueError(
                f"moe.{name} is {ours.get(name)!r}, but train.init_from {folder} has {theirs!r}, "
                "and its tensors are made for that"
            )
    load_model(model.experts, checkpoint)
    checkpoint.check_base(model.base_fingerprint)
    fresh = ExpertMaturity.create(len(model.experts))
    model.set_maturity(fresh._replace(maturity=model.maturity.maturity))
    if train_experts is not None:
        live = model.experts.live
        model.experts.unfreeze(*live) if train_experts else model.experts.freeze(*live)
    model.training_record["earlier"] = past_of(checkpoint.description["training"])


def past_of(training_record: dict[str, Any]) -> list[dict[str, Any]]:
    """The training records of all runs before the next one, the last one among them; those of what
    an earlier one began with stand before it."""
    past = [one for run in training_record.get("earlier", []) for one in past_of(run)]
    own = {name: value for name, value in training_record.items() if name != "earlier"}
    return [*past, *([own] if own else [])]

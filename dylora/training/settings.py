"""Which settings may differ between a run and the checkpoint that it continues."""

import dataclasses
import json
from typing import Any

from dylora.fields import join, shown
from dylora.run_config import RunConfig, TrainConfig
from dylora.storage.checkpoint import Checkpoint

# A changed setting is taken, and said, if it stands here; any other is refused by its name. Whether
# the base and the rows are still the same is asked of themselves, not of their names.
TAKEN = {
    "model": {"base", "revision", "device", "dtype", "attn_implementation"},
    "data": {"sources", "cache"},
    "train": {
        *("learning_rate", "router_learning_rate", "weight_decay", "warmup_steps"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing"),
        *("epochs", "max_steps", "batch_size", "gradient_accumulation_steps"),
        *("save_steps", "save_total_limit", "max_nonfinite_steps", "early_stopping_patience"),
        *("gradient_checkpointing", "deterministic", "parallel", "process_timeout"),
    },
}


def recorded_settings(config: RunConfig) -> dict[str, Any]:
    """The sections that a checkpoint records beside its mixture's settings, in JSON types."""
    sections = {name: dataclasses.asdict(getattr(config, name)) for name in TAKEN}
    return json.loads(json.dumps(sections))


def find_changes(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """A line for each changed setting that is taken. Raises ValueError for one that is not.

    A checkpoint of an earlier version records the settings of its mixture alone.
    """
    folder, saved = checkpoint.path, checkpoint.description["training"].get("settings")
    recorded = saved if isinstance(saved, dict) else {}
    stored = {
        "moe": checkpoint.config.to_dict(),
        "model": {"quantization": checkpoint.description["quantization"]},
    }
    lines = []
    if saved is None:
        lines = [f"note: {folder} does not record the settings of its run: they are not compared"]
    for section, ours in (recorded_settings(config) | {"moe": config.moe.to_dict()}).items():
        theirs = recorded.get(section, {})
        if not isinstance(theirs, dict):
            raise ValueError(f"{folder}: training.settings.{section} is {shown(theirs)}")
        theirs = theirs | stored.get(section, {})
        for name, value in ours.items():
            key, before = join(section, name), theirs.get(name, value)
            if value == before:
                continue
            if name not in TAKEN.get(section, ()):
                raise ValueError(
                    f"{folder} was trained with {key} = {shown(before)}, this run has "
                    f"{shown(value)}: set it back, or begin another run from there with "
                    "train.init_from"
                )
            now = f"is {shown(value)} from here on, it was {shown(before)}"
            lines.append(f"note: {key} {'is written otherwise' if key == 'data.sources' else now}")
    return lines


def rates_of_checkpoint(config: TrainConfig, checkpoint: Checkpoint) -> TrainConfig:
    """The configuration with the learning rates that a checkpoint's run began with."""
    saved = checkpoint.description["training"].get("settings")
    names = ("learning_rate", "router_learning_rate")
    if saved is None:
        return config
    try:
        return dataclasses.replace(config, **{name: saved["train"][name] for name in names})
    except (KeyError, ValueError) as error:
        raise ValueError(f"{checkpoint.path}: training.settings.train: {error}") from error


def data_difference(theirs: dict[str, Any], ours: dict[str, Any]) -> str | None:
    """What differs between the data of two provenances, in words; None for the same.

    Where the rows lie does not matter. Their order does, since they are drawn by their place; a
    checkpoint of an earlier version does not record it.
    """
    found, wanted = (json.loads(json.dumps(provenance)) for provenance in (theirs, ours))
    for one, other in zip(found.get("sources", []), wanted.get("sources", []), strict=False):
        for key in ("path", "revision", "text_hashes"):
            one.pop(key, None)
            other.pop(key, None)
        if "order_sha256" not in one:
            other.pop("order_sha256", None)
        if one != other:
            same_rows = one.get("training_sha256") == other.get("training_sha256")
            what = "its rows in another order" if same_rows else "other rows"
            return f"source {shown(other.get('name'))} has {what}"
    return None if found == wanted else "this run names other sources or limits"

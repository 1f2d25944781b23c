"""A checkpoint on its base, as a run's settings want it."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from dylora.base_models import BaseSpec, choose_device
from dylora.model import DyLoRA_MoE
from dylora.run_config import ModelConfig
from dylora.storage.checkpoint import Checkpoint


def note(line: str) -> None:
    """A line beside a command's results."""
    print(line, file=sys.stderr)


def base_of(config: ModelConfig) -> BaseSpec:
    """The base of a run. Raises ValueError for a device that is not there."""
    return BaseSpec.resolve(
        config.base,
        config.revision,
        dtype=getattr(torch, config.dtype),
        device=choose_device(config.device),
        attn_implementation=config.attn_implementation,
        quantization=config.quantization,
    )


def load_checkpoint(
    checkpoint: str | Checkpoint, config: ModelConfig, routing: Mapping[str, Any] | None = None
) -> DyLoRA_MoE:
    """The mixture in evaluation mode, its routing changed by the arguments of `set_routing`.

    Raises ValueError or FileNotFoundError for a base or a checkpoint that does not load.
    """
    model = DyLoRA_MoE.from_pretrained(Checkpoint.open(checkpoint, note), base_of(config)).eval()
    if routing:
        model.set_routing(**routing)
    return model

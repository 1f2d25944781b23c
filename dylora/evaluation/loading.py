"""A checkpoint on its base, as a run's settings want it."""

import sys

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


def load_checkpoint(checkpoint: str | Checkpoint, config: ModelConfig) -> DyLoRA_MoE:
    """The mixture in evaluation mode.

    Raises ValueError or FileNotFoundError for a base or a checkpoint that does not load.
    """
    return DyLoRA_MoE.from_pretrained(Checkpoint.open(checkpoint, note), base_of(config)).eval()

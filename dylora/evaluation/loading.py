"""A checkpoint on its base, as a run's settings want it."""

import torch

from dylora.base_models import choose_device
from dylora.model import DyLoRA_MoE
from dylora.run_config import ModelConfig


def load_checkpoint(checkpoint: str, config: ModelConfig) -> DyLoRA_MoE:
    """The mixture in evaluation mode.

    Raises ValueError or FileNotFoundError for a base or a checkpoint that does not load.
    """
    model = DyLoRA_MoE.from_pretrained(
        checkpoint,
        config.base,
        dtype=getattr(torch, config.dtype),
        device=choose_device(config.device),
        attn_implementation=config.attn_implementation,
        quantization=config.quantization,
    )
    return model.eval()

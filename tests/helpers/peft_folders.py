"""Adapters as people bring them: made, randomised and saved by peft itself."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel


def make_adapter(
    base: PreTrainedModel,
    folder: Path,
    *,
    seed: int = 0,
    name: str | None = "some/base",
    safe: bool = True,
    **settings: Any,
) -> PeftModel:
    """A LoRA of random A, B, biases and magnitudes in `folder`; returns peft's model with it."""
    settings = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings
    settings.setdefault("target_modules", ["q_proj", "v_proj"])
    settings["fan_in_fan_out"] = base.config.model_type == "gpt2"
    own = copy.deepcopy(base)
    own.name_or_path = own.config.name_or_path = name or ""
    model = get_peft_model(own, LoraConfig(**settings)).eval()
    draw = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.add_(0.15 * noise)
    # Without save_embedding_layers peft looks the base up on the hub.
    model.save_pretrained(folder, safe_serialization=safe, save_embedding_layers=False)
    return model

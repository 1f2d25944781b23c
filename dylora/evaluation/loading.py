"""A checkpoint on its base, as a run's settings want it; the text of its tokens."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.base_models import BaseSpec, choose_device
from dylora.integrations.static_weights import site_weights
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
        device=choose_device(config.device, "device"),
        attn_implementation=config.attn_implementation,
        quantization=config.quantization,
    )


def load_checkpoint(
    checkpoint: str | Checkpoint, config: ModelConfig, routing: Mapping[str, Any] | None = None
) -> DyLoRA_MoE:
    """The mixture in evaluation mode; routing: arguments of `change_routing`.

    Raises ValueError or FileNotFoundError for a base or a checkpoint that does not load.
    """
    model = DyLoRA_MoE.from_pretrained(Checkpoint.open(checkpoint, note), base_of(config)).eval()
    change_routing(model, **(routing or {}))
    return model


def change_routing(
    model: DyLoRA_MoE,
    *,
    experts: list[int] | None = None,
    weights: list[float] | None = None,
    **settings: Any,
) -> None:
    """Route in another way than in training, from the next pass on.

    experts: the numbers of those enabled; weights: constant gates, one an expert; settings:
    as in `set_routing`. Raises ValueError for what does not fit the mixture.
    """
    mixture = model.mixture
    if settings:
        model.set_routing(**settings)
    if experts is not None:
        model.experts.set_active_expert(*experts)
    if weights is not None:
        live = [row.state != "retired" for row in mixture.table]
        weights_NE = site_weights(weights, len(mixture.blocks), live)
        model.detach_router()
        mixture.state.fixed_weights_E.copy_(weights_NE[0])


def decode_after(
    tokenizer: PreTrainedTokenizerBase, context: Sequence[int], ids: Sequence[int]
) -> str:
    """The text that ids add to that of the context before them.

    Alone they can have another: tokenizers like Llama 2's drop the space that a text begins with.
    """

    def decode(tokens: Sequence[int]) -> str:
        # Spaces before punctuation are part of a program.
        return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    return decode([*context, *ids])[len(decode(context)) :]

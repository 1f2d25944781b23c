"""Tiny random bases, mixtures of randomised experts on them, and peft to hold their files against.

Weights are large (deviation 0.1), so that an expert moves logits by far more than the tolerances.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from dylora import DyLoRA_MoE, ExpertMaturity, MoELoraConfig

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES = {
    "llama": ("LlamaConfig", _SIZES | {"num_key_value_heads": 2}),
    "gemma": ("GemmaConfig", _SIZES | {"num_key_value_heads": 1, "head_dim": 16}),
    "qwen3": ("Qwen3Config", _SIZES | {"num_key_value_heads": 2, "head_dim": 12}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        | {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "phi3": ("Phi3Config", _SIZES | {"num_key_value_heads": 2}),
    "falcon": ("FalconConfig", _SIZES | {"ffn_hidden_size": 48}),
}


@pytest.fixture(scope="session")
def tiny_base() -> Callable[..., PreTrainedModel]:
    """A random causal LM of a family; the same one at every call with the same arguments."""

    def build(family: str, **changes: Any) -> PreTrainedModel:
        config_class, sizes = _FAMILIES[family]
        config = getattr(transformers, config_class)(**(sizes | changes))
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return transformers.AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture(scope="session")
def mixture_on() -> Callable[..., DyLoRA_MoE]:
    """A mixture on a copy of `base` whose experts, routers and maturity are all random, B too."""

    def build(base: PreTrainedModel, **settings: Any) -> DyLoRA_MoE:
        settings = {"r": 3, "lora_alpha": 5, "num_experts": 2} | settings
        model = DyLoRA_MoE.from_base(copy.deepcopy(base), MoELoraConfig(**settings)).eval()
        draw = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for _, parameter in [*model.expert_parameters(), *model.router_parameters()]:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=draw))
        state = torch.rand(5, model.config.expert_count, generator=draw, dtype=torch.float64)
        model.set_maturity(ExpertMaturity(*state))
        return model

    return build


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """Input ids [2, 9] that all tiny bases know."""
    return torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def one_hot(tokens: Tensor) -> Callable[[int], Tensor]:
    """Routing weights [B, E] that give expert `expert` of two everything."""

    def build(expert: int) -> Tensor:
        weights = torch.zeros(tokens.shape[0], 2)
        weights[:, expert] = 1
        return weights

    return build


@pytest.fixture(scope="session")
def in_peft() -> Callable[..., PeftModel]:
    """An adapter folder loaded by peft on a copy of `base`; any warning of peft's is an error."""

    def load(base: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ignore_peft_asking_for_checkpointing()
            return PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=name).eval()

    return load


def ignore_peft_asking_for_checkpointing() -> None:
    """peft 0.21 reads an attribute that transformers 5.23 deprecates."""
    warnings.filterwarnings(
        "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
    )

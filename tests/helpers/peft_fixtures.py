"""Tiny random bases, mixtures of randomised experts on them, and peft to hold their files against.

Weights are large (deviation 0.1), so that an expert moves logits by far more than the tolerances.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dylora import DyLoRA_MoE, ExpertMaturity, MoELoraConfig
from families import FAMILIES


@pytest.fixture(scope="session")
def tiny_base(random_base) -> Callable[..., PreTrainedModel]:
    """A random causal LM of a family; the same one at every call with the same arguments."""

    def build(family: str, **changes: Any) -> PreTrainedModel:
        _, config_class, sizes, *_ = FAMILIES[family]
        return random_base(config_class, **(sizes | {"initializer_range": 0.1} | changes))

    return build


@pytest.fixture(scope="session")
def mixture_on() -> Callable[..., DyLoRA_MoE]:
    """A mixture on a copy of `base` whose experts, routers and maturity are all random, B too."""

    def build(base: PreTrainedModel, **settings: Any) -> DyLoRA_MoE:
        settings = {"r": 3, "lora_alpha": 5, "num_experts": 2} | settings
        model = DyLoRA_MoE.from_base(copy.deepcopy(base), MoELoraConfig(**settings)).eval()
        draw = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for _, parameter in [*model.named_expert_parameters(), *model.router_parameters()]:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=draw))
        experts, fields = model.config.expert_count, len(ExpertMaturity._fields)
        model.set_maturity(
            ExpertMaturity(*torch.rand(fields, experts, generator=draw, dtype=torch.float64))
        )
        return model

    return build


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """Input ids [2, 9] that all tiny bases know."""
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def one_hot(tokens: Tensor) -> Callable[[int], Tensor]:
    """Routing weights [B, E] that give expert `expert` of two everything."""

    def build(expert: int) -> Tensor:
        weights = torch.zeros(tokens.shape[0], 2)
        weights[:, expert] = 1
        return weights

    return build

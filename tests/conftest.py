"""Tiny random bases and mixtures on them, built in milliseconds and the same at every run."""

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

from dylora import DyLoRA_MoE, MoELoraConfig
from families import COMMON, FAMILIES
from peft_fixtures import mixture_on, one_hot, tiny_base, tokens  # noqa: F401 - fixtures
from run_fixtures import (  # noqa: F401 - fixtures
    base_folder,
    make_config,
    make_tokenizer,
    rows_file,
    shared_config,
    spaced_tokenizer,
    tokenizer,
)

torch.set_num_threads(1)  # the models are too small to share

VOCABULARY = COMMON["vocab_size"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def random_base() -> Callable[..., PreTrainedModel]:
    """A random causal LM from the name of its configuration class; equal calls, equal weights."""

    def build(config_class: str, **sizes: Any) -> PreTrainedModel:
        config = getattr(transformers, config_class)(**sizes)
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return transformers.AutoModelForCausalLM.from_config(config).eval()

    return build


@pytest.fixture(scope="session")
def llama(random_base) -> Callable[..., PreTrainedModel]:
    """A Llama of two layers with grouped-query attention: four query heads, two key heads."""
    return lambda **changes: random_base("LlamaConfig", **(FAMILIES["llama"].sizes | changes))


@pytest.fixture(scope="session")
def gpt2(random_base) -> Callable[..., PreTrainedModel]:
    """A GPT-2 of two layers, whose projections are Conv1D."""
    return lambda **changes: random_base("GPT2Config", **(FAMILIES["gpt2"].sizes | changes))


@pytest.fixture(scope="session")
def mixture(llama) -> Callable[..., DyLoRA_MoE]:
    """A mixture in evaluation mode whose experts and routers are random, B too, unless `fresh`.

    `base` is copied; none is a tiny Llama. `maturity` holds one value an expert, by default three
    different ones, so that the gate is neither dense nor sparse.
    """

    def build(
        base: PreTrainedModel | None = None,
        *,
        fresh: bool = False,
        maturity: list[float] | None = None,
        **settings: Any,
    ) -> DyLoRA_MoE:
        base = llama() if base is None else copy.deepcopy(base)
        experts = 3 if settings.get("use_moe_routing", True) else 1
        config = MoELoraConfig(**{"r": 2, "lora_alpha": 4, "num_experts": experts} | settings)
        with torch.random.fork_rng():
            torch.manual_seed(11)
            model = DyLoRA_MoE.from_base(base, config).eval()
        if fresh:
            return model
        draw = torch.Generator().manual_seed(13)
        with torch.no_grad():
            for name, parameter in model.named_expert_parameters():
                if name.endswith("lora_B"):
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))
            for _, parameter in model.router_parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw))
        if maturity is None:
            maturity = [(1.0, 0.0, 0.6)[expert % 3] for expert in range(config.expert_count)]
        state = model.maturity._replace(maturity=torch.tensor(maturity, dtype=torch.float64))
        model.set_maturity(state)
        return model

    return build


@pytest.fixture(scope="session")
def ids() -> Tensor:
    """Input ids [2, 7] without padding, BOS or EOS."""
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="session")
def in_peft() -> Callable[..., PeftModel]:
    """An adapter folder loaded by peft on a copy of `base`; any warning of peft's is an error."""

    def load(base: PreTrainedModel, folder: Path, name: str = "default") -> PeftModel:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # peft 0.21 reads an attribute that transformers 5.23 deprecates.
            warnings.filterwarnings(
                "ignore",
                message="`is_gradient_checkpointing` is deprecated",
                category=FutureWarning,
            )
            return PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name=name).eval()

    return load

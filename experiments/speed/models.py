"""The bases and contenders of the speed benchmark; random weights, B never 0."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, PreTrainedModel

from dylora import DyLoRA_MoE, MoELoraConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def small(layers: int = 8, vocabulary: int = 4096) -> LlamaConfig:
    """Hidden 512, eight heads."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )


def codegemma(layers: int = 18, vocabulary: int = 256_000) -> GemmaConfig:
    """The shape of google/codegemma-2b: one key head, a head of 256 numbers, an MLP of 16,384."""
    return GemmaConfig(
        vocab_size=vocabulary,
        hidden_size=2048,
        intermediate_size=16_384,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    )


def build(config: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A random frozen base."""
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return base.requires_grad_(False).eval()


def randomise(model: nn.Module) -> None:
    """B is 0 in a fresh adapter, which could make a product look cheaper than it is."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def mixture(base: PreTrainedModel, experts: int, *, mature: bool = False, **settings) -> DyLoRA_MoE:
    """Ours on a copy of the base, in evaluation mode (dropout plays no part here)."""
    settings = {"r": 16, "top_k_experts": 2, "expert_capacity_factor": None} | settings
    config = MoELoraConfig(num_experts=experts, **settings)
    model = DyLoRA_MoE.from_base(copy.deepcopy(base), config)
    randomise(model)
    if mature:
        ripe = torch.ones(experts, dtype=torch.float64)
        model.set_maturity(model.maturity._replace(maturity=ripe))
    return model


def peft_lora(base: PreTrainedModel, rank: int, adapters: int = 1, *, dora: bool = False) -> Any:
    """One peft LoRA, or several of the same rank that are all active, applied in peft's loop."""
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, use_dora=dora)
    names = [f"expert_{index}" for index in range(adapters)]
    model = peft.get_peft_model(copy.deepcopy(base), settings, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, settings)
    model.base_model.set_adapter(names)
    randomise(model)
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    return model


def peft_xlora(base: PreTrainedModel, rank: int, adapters: int) -> Any:
    """peft's X-LoRA over `adapters` LoRAs of one rank, its classifier trained and the LoRAs too."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for index in range(adapters):
            one = peft_lora(base, rank)
            paths[str(index)] = str(Path(folder) / str(index))
            one.save_pretrained(paths[str(index)], selected_adapters=["expert_0"])
            paths[str(index)] = str(Path(folder) / str(index) / "expert_0")
        settings = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=base.config.hidden_size,
            adapters=paths,
            use_trainable_adapters=True,
        )
        model = copy.deepcopy(base)
        model.config.use_cache = False
        return peft.get_peft_model(model, settings)


def with_peft(ways: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    """Contenders that need peft, built; without it none, said aloud."""
    built = {}
    for name, build in ways.items():
        try:
            built[name] = build()
        except ImportError as error:
            print(f"left out {name}: {error}")
    return built


def n_pass_step(model: DyLoRA_MoE, ids: Tensor) -> Tensor:
    """The N-pass way: a pass of the base for every expert, logits mixed; one train step's loss."""
    experts = len(model.experts)
    mixed: Any = 0
    for expert in range(experts):
        one_hot = torch.eye(experts, device=ids.device)[[expert] * len(ids)]
        mixed = mixed + model(ids, routing_weights=one_hot).logits / experts
    return nn.functional.cross_entropy(mixed[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward and backward; gradients are let go."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        loss().backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def floor_step(base: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """The frozen base, forward and backward to its inputs: what any adapter has to pay."""
    embed: Any = base.get_input_embeddings()

    def step() -> None:
        inputs = embed(ids).detach().requires_grad_()
        base(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()

    return step


def quiet() -> None:
    """peft's and transformers' warnings do not belong into a table."""
    warnings.filterwarnings("ignore")

"""Every causal family that the installed transformers knows, as a tiny random model of its class.

Each goes through the checks below, and docs/families.md has a row for the outcome:

    python tests/helpers/every_family.py            # every row anew, in minutes
    python tests/helpers/every_family.py llama gpt2   # the rows of some

`test_every_family.py` holds the rows to what the checks find. Sizes are set where a configuration
has a field of that name; what a family needs besides stands in NEEDS.
"""

import copy
import logging
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.adapters.trace import is_projection
from families import document

DOCUMENT = Path(__file__).parents[2] / "docs" / "families.md"
TITLE = "## Every causal family of transformers"
Check = Callable[[PreTrainedModel, DyLoRA_MoE], bool]
NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LENGTH, PROMPT = 10, 6
CLOSE = 1e-4  # largest difference of logits, as a share of the largest logit
VOCABULARY = 40
SIZES = (
    {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    | dict.fromkeys(("initializer_range", "init_std"), 0.2)
    | dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "n_ctx"), 32)
    | dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "n_inner", "dff"), 40)
    | dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 40)
    | dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2)
    | dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    | dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4)
    | dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    | {"num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 4}
    | dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 64)
    | dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4)
    | dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2)
    | dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16)
    | dict.fromkeys(("n_group", "topk_group", "n_groups", "first_k_dense_replace"), 1)
    | {"q_lora_rank": 8, "kv_lora_rank": 8, "v_head_dim": 8}
    | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    | {"mamba_d_state": 8, "state_size": 8, "conv_kernel": 4, "time_step_rank": 4}
    | {"ssm_state_size": 8}
)
# Fields that are set though their default is None, or that some classes compute.
UNSET = (
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
    "q_lora_rank",
)
DROP = object()  # a field that keeps its default
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4}
LINEAR |= {"linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
SHARED_KV = {"num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2}
SHARED_KV |= {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY}
SHARED_KV |= {"hidden_size_per_layer_input": 4}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
QSA = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
QSA |= {"indexer_budget": 4, "indexer_compress_ratio": 2}
DECODER = {"is_decoder": True}
NEEDS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": DECODER | {"attention_type": "original_full"},
    "camembert": DECODER,
    "cohere_compass_text": SLIDING
    | {"rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE)},
    "data2vec-text": DECODER,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v4": {
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "num_key_value_heads": 1,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
    },
    "dots1": {"n_shared_experts": 1},
    "electra": DECODER,
    "ernie": DECODER,
    "falcon": {"head_dim": DROP},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": SHARED_KV | {"laurel_rank": 4},
    "gemma4_text": SHARED_KV | {"global_head_dim": 16},
    "gemma4_unified_text": SLIDING | {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 2,
    },
    "bailing_hybrid": {"layer_group_size": 2, "num_expert_group": 1},
    "lfm2": CONVOLUTION,
    "lfm2_moe": CONVOLUTION,
    "lfm3": CONVOLUTION,
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "megatron-bert": DECODER,
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
    },
    "prophetnet": DECODER
    | {"num_hidden_layers": DROP, "num_encoder_layers": 2, "num_decoder_layers": 2, "ngram": 1}
    | {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "qwen3_5.text_config": LINEAR,
    "qwen3_5_moe.text_config": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "qwen4_exp.text_config": LINEAR | QSA,
    "qwen4_exp_text": LINEAR | QSA,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": DECODER | {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "rembert": DECODER,
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": DECODER,
    "roformer": DECODER,
    "xlm": {"causal": True, "emb_dim": 32, "n_words": VOCABULARY},
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xlnet": {"max_position_embeddings": DROP},
    "xlstm": {"v_head_dim": DROP},
    "xmod": DECODER | {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_ngroups": 1,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "num_mem_blocks": 1,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Families of which no tiny model can be made here, and why.
NOT_BUILT = {
    "blt": "no small sizes were found that fit together in its four models",
    "dots3_note": "the model of dots3_note_text, with settings for 42 single layers",
    "gemma3n": "its image tower needs timm",
    "gemma4_assistant": "drafts for a larger model, from whose states it starts",
    "gemma4_unified_assistant": "drafts for a larger model, from whose states it starts",
}


def tiny_base(name: str) -> PreTrainedModel:
    """A random causal LM of the family, frozen, in evaluation mode; equal calls, equal weights.

    What a fresh model has at 0 is random, too: Zaya's temperatures would hide queries and keys.
    """
    kind = CONFIG_MAPPING[name]
    default = kind()
    settings: dict[str, Any] = _settings(name, default)
    for part in kind.sub_configs:
        if getattr(default, part, None) is not None:
            settings.setdefault(part, _settings(f"{name}.{part}", getattr(default, part)))
    config = kind(**settings)
    auto: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    if not isinstance(config, auto.config_class):  # of Musicgen, its decoder's
        parts = [getattr(config, part) for part in kind.sub_configs]
        config = next((part for part in parts if isinstance(part, auto.config_class)), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        base = auto._from_config(config).eval().requires_grad_(False)
        for parameter in base.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return base


def _settings(name: str, config: Any) -> dict[str, Any]:
    """What of SIZES this configuration has a field for, and what it needs besides."""
    latent = _has(config, "qk_rope_head_dim")  # as many keys as queries, and no head_dim
    known = {
        key: value
        for key, value in SIZES.items()
        if key not in config.attribute_map and _has(config, key)
    }
    other = {"head_dim": DROP, "num_key_value_heads": 4} if latent else {}
    settings = known | {key: other[key] for key in other if key in known} | NEEDS.get(name, {})
    return {key: value for key, value in settings.items() if value is not DROP}


def _has(config: Any, key: str) -> bool:
    try:
        value = getattr(config, key)
    except (AttributeError, RuntimeError) as error:  # of some classes it may differ by layer
        return "per-layer" in str(error)
    return value is not None or key in UNSET


def mixture_on(base: PreTrainedModel) -> DyLoRA_MoE:
    """A mixture of two fresh experts on a copy of `base`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        settings = MoELoraConfig(r=2, lora_alpha=4, num_experts=2)
        return DyLoRA_MoE.from_base(copy.deepcopy(base), settings).eval()


@torch.no_grad()
def randomise(model: DyLoRA_MoE) -> None:
    """Other experts, B too, and other routers."""
    draw = torch.Generator().manual_seed(13)
    for _, parameter in [*model.named_expert_parameters(), *model.router_parameters()]:
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=draw))


def ids() -> Tensor:
    """Input ids [2, 10] without special tokens."""
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(4))


def differ(actual: Tensor, expected: Tensor) -> bool:
    """Whether the largest difference is more than rounding."""
    return bool((actual - expected).abs().max() > CLOSE * expected.abs().max())


def only(expert: int) -> Tensor:
    """Routing weights [B, E] of one expert of two."""
    return torch.eye(2)[[expert] * 2]


# The checks, of a base and a mixture on a copy of it. The first two want fresh experts.


@torch.no_grad()
def identity(base: PreTrainedModel, model: DyLoRA_MoE) -> bool:
    """Fresh experts change no bit of the logits."""
    return torch.equal(model(ids()).logits, base(ids(), use_cache=False).logits)


def learning(base: PreTrainedModel, model: DyLoRA_MoE) -> bool:
    """A and B of every expert, and all routers, move within two steps of the task's loss."""
    before = {name: p.clone() for name, p in model.named_expert_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids(), labels=ids()).lm_loss.backward()
        optimizer.step()
    experts = [p != before[name] for name, p in model.named_expert_parameters()]
    routers = [p.grad for _, p in model.router_parameters()]
    return all(bool(moved.flatten(1).any(1).all()) for moved in experts) and all(
        grad is not None and bool(grad.any()) for grad in routers
    )


@torch.no_grad()
def one_hot(base: PreTrainedModel, model: DyLoRA_MoE) -> bool:
    """One expert alone is the base with W + s·B·A written into its weights."""
    for expert in range(2):
        merged = copy.deepcopy(base)
        for path, (A, B) in model.expert_weights(expert).items():
            projection: Any = merged.get_submodule(path)
            update = 2 * B @ A  # alpha / r
            projection.weight += update.T if isinstance(projection, Conv1D) else update
        alone = model(ids(), routing_weights=only(expert)).logits
        if differ(alone, merged(ids(), use_cache=False).logits):
            return False
    return True


@torch.no_grad()
def causality(base: PreTrainedModel, model: DyLoRA_MoE) -> bool:
    """No logit depends on a later token."""
    before = model(ids()).logits
    for changed in (1, LENGTH // 2, LENGTH - 1):
        other = ids()
        other[:, changed] = 3 + (other[:, changed] + 5) % (VOCABULARY - 3)
        if differ(model(other).logits[:, :changed], before[:, :changed]):
            return False
    return True


def decoding(base: PreTrainedModel, model: DyLoRA_MoE) -> bool:
    """A prompt, then a token at a time with the cache, as all at once."""
    return decodes(model.base)


@torch.no_grad()
def decodes(base: PreTrainedModel) -> bool:
    """`decoding`, of a base or of a mixture's."""
    prompt, rest = ids()[:, :PROMPT], ids()[:, PROMPT:]
    output = base(prompt, use_cache=True)
    steps = [output.logits]
    for token in rest.split(1, dim=1):
        output = base(token, past_key_values=output.past_key_values, use_cache=True)
        steps.append(output.logits)
    return not differ(torch.cat(steps, 1), base(ids(), use_cache=False).logits)


@torch.no_grad()
def export(base: PreTrainedModel, model: DyLoRA_MoE) -> bool:
    """peft loads a saved expert and computes the same."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, overwrite=True)
        place = Path(folder, "peft_adapters", "expert_1")
        adapted = PeftModel.from_pretrained(copy.deepcopy(base), place).eval()
        logits = adapted(input_ids=ids(), use_cache=False).logits
    return not differ(logits, model(ids(), routing_weights=only(1)).logits)


CHECKS = (identity, learning, one_hot, causality, decoding, export)
# Why a check fails that the base alone would pass.
REASONS = {
    ("zamba", "one_hot"): "two layers share a weight, which cannot hold the updates of both",
    ("reformer", "learning"): "its reversible layers run without a graph, which is refused",
}


# The table


def row(name: str) -> str:
    """What comes of a family, as a row of the table."""
    if name in NOT_BUILT:
        return f"| {name} | | | not tried: {NOT_BUILT[name]} |"
    base = tiny_base(name)
    try:
        model = mixture_on(base)
    except ValueError as error:
        return f"| {name} | | | refused: {re.split('[;:] ', str(error))[0]} |"
    adapted: dict[str, dict[str, None]] = {}
    left: dict[str, dict[str, None]] = {}
    for block in model.site_names:
        kind = block.rstrip(".0123456789").rpartition(".")[2]
        for path, module in base.get_submodule(block).named_children():
            if is_projection(module):
                found = adapted if f"{block}.{path}" in model.mixture.adapters else left
                found.setdefault(kind, {})[path] = None
    failed = [reason for check in CHECKS if (reason := _failure(check, name, base, model))]
    cells = (name, _shown(adapted), _shown(left), "; ".join(failed) or "all hold")
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def _failure(check: Check, name: str, base: PreTrainedModel, model: DyLoRA_MoE) -> str:
    """What does not hold, and why; nothing where it does."""
    if check is one_hot:  # from here on with experts that change something
        randomise(model)
    if _holds(check, base, model):
        return ""
    if check is decoding and not _holds(lambda base, model: decodes(base), base, model):
        return "all but decoding, which the base alone does not do either"
    return f"all but {check.__name__}: {REASONS[name, check.__name__]}"


def _holds(check: Check, base: PreTrainedModel, model: DyLoRA_MoE) -> bool:
    """Some families raise where others differ: without a cache, or without a graph."""
    try:
        return check(base, model)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False


def _shown(found: dict[str, dict[str, None]]) -> str:
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in found.items())


def rows_of(text: str) -> dict[str, str]:
    """Family -> its row in a text of docs/families.md."""
    lines = text.partition(TITLE)[2].splitlines()
    names = set(NAMES)
    return {name: line for line in lines if (name := line.split(" | ")[0].lstrip("| ")) in names}


def page(rows: dict[str, str]) -> str:
    """The text of docs/families.md."""
    meanings = [f"| {check.__name__} | {(check.__doc__ or '').strip()} |" for check in CHECKS]
    return "\n".join(
        [
            document() + f"\n{TITLE} {transformers.__version__}",
            "",
            "Each is a tiny random model of its class, of which two experts were made. *Left* are",
            "the projections of an adapted block that stay as they are: gates and the like, which",
            "`target_modules` can name, and those that do not map tokens one by one. Experts of a",
            "base that are one tensor are no projections, and refused when they are named. Written",
            "by `python tests/helpers/every_family.py`; the slow tests hold every row.",
            "",
            "| family | adapted | left | what holds |",
            "|---|---|---|---|",
            *(rows[name] for name in NAMES if name in rows),
            "",
            "| what | meaning |",
            "|---|---|",
            *meanings,
            "",
        ]
    )


if __name__ == "__main__":
    logging.disable()
    warnings.simplefilter("ignore")
    found = rows_of(DOCUMENT.read_text(encoding="utf-8"))
    for family in sys.argv[1:] or NAMES:
        print(family, file=sys.stderr)
        found[family] = row(family)
        DOCUMENT.write_text(page(found), encoding="utf-8")

"""What other readers of PEFT adapters refuse, and what they read differently without a word.

Facts from their sources, read in 2026:
- vLLM 0.27: lora/peft_helper.py (scale, what is refused), lora/utils.py (names of tensors),
  config/lora.py (ranks); its GPT-2 does not support LoRA at all.
- SGLang: srt/lora/lora_config.py and lora_manager.py (patterns, DoRA), lora.py (the scale),
  utils.py (names of projections; a model of its own may know more).
- llama.cpp: convert_lora_to_gguf.py (names of tensors; lora_alpha is all it keeps of the
  configuration), conversion of GPT-2 (transposes what is Conv1D), src/llama-adapter.h (the scale is
  alpha over the rank of each tensor).
Whether a reader has LoRA for an architecture at all stands in its own list of models.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from dylora.storage.peft_config import scaling_of

READERS = ("vLLM", "SGLang", "llama.cpp")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
VLLM_DEFAULT_RANK = 16
SGLANG_PROJECTIONS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "in_proj", "in_proj_qkv", "in_proj_z"),
    *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "embed_tokens", "lm_head"),
}
_A, _B = ".lora_A.weight", ".lora_B.weight"
_PREFIX = "base_model.model."


class Incompatibility(NamedTuple):
    """One thing that a reader does not do as PEFT does."""

    reader: str  # one of READERS
    kind: str  # refuses; misreads: loads it and computes something else; needs: an option of it
    what: str


def find_incompatibilities(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[Incompatibility]:
    """What each of READERS would refuse, misread or need, in their order; empty: nothing.

    config: of adapter_config.json; tensors: of adapter_model.safetensors, by their names there.
    """
    if config["peft_type"] != "LORA":
        return [Incompatibility(name, "refuses", config["peft_type"]) for name in READERS]
    As = {
        name.removesuffix(_A).removeprefix(_PREFIX): t for name, t in tensors.items() if _A in name
    }
    ranks = {path: len(A) for path, A in As.items()}
    others = [name for name in tensors if not name.endswith((_A, _B))]
    return [
        *_vllm(dict(config), ranks, others),
        *_sglang(dict(config), ranks),
        *_llama_cpp(dict(config), ranks, others),
    ]


def _vllm(
    config: dict[str, Any], ranks: dict[str, int], others: list[str]
) -> list[Incompatibility]:
    found = []
    if config.get("use_dora"):
        found.append(Incompatibility("vLLM", "refuses", "DoRA"))
    if config.get("bias", "none") != "none":
        found.append(Incompatibility("vLLM", "refuses", f"trained biases (bias {config['bias']})"))
    if config.get("modules_to_save"):
        found.append(Incompatibility("vLLM", "refuses", "modules_to_save"))
    if others and not found:
        found.append(
            Incompatibility("vLLM", "refuses", f"tensors besides lora_A, lora_B: {others[0]}")
        )
    if config.get("fan_in_fan_out"):
        found.append(Incompatibility("vLLM", "refuses", "LoRA on GPT-2"))
    r, alpha = config["r"], config["lora_alpha"]
    scale = float(alpha / (r**0.5 if config.get("use_rslora") else r))
    found += _other_scales("vLLM", "one scale for all", config, dict.fromkeys(ranks, scale))
    rank = max([r, *ranks.values()])
    if rank > VLLM_RANKS[-1]:
        found.append(Incompatibility("vLLM", "refuses", f"rank {rank}: at most {VLLM_RANKS[-1]}"))
    elif rank > VLLM_DEFAULT_RANK:
        allowed = next(value for value in VLLM_RANKS if value >= rank)
        found.append(Incompatibility("vLLM", "needs", f"--max-lora-rank {allowed}"))
    return found


def _sglang(config: dict[str, Any], ranks: dict[str, int]) -> list[Incompatibility]:
    found = []
    r, alpha = config["r"], config["lora_alpha"]
    if config.get("use_dora"):
        found.append(Incompatibility("SGLang", "refuses", "DoRA"))
    for name, usual in (("rank_pattern", r), ("alpha_pattern", alpha)):
        if any(value != usual for value in (config.get(name) or {}).values()):
            found.append(Incompatibility("SGLang", "refuses", name))
    if config.get("bias", "none") != "none":
        found.append(
            Incompatibility("SGLang", "misreads", f"no trained biases (bias {config['bias']})")
        )
    names = {path.rpartition(".")[2] for path in ranks} - SGLANG_PROJECTIONS
    if names:
        found.append(Incompatibility("SGLang", "refuses", f"LoRA on {', '.join(sorted(names))}"))
    if not found:
        scales = dict.fromkeys(ranks, float(alpha / r))
        found += _other_scales("SGLang", "alpha / r for all", config, scales)
    return found


def _llama_cpp(
    config: dict[str, Any], ranks: dict[str, int], others: list[str]
) -> list[Incompatibility]:
    found = []
    if others:
        what = f"tensors besides lora_A, lora_B: {others[0]}"
        found.append(Incompatibility("llama.cpp", "refuses", what))
    if config.get("fan_in_fan_out"):
        what = "A and B of GPT-2's Conv1D are transposed like its weights"
        found.append(Incompatibility("llama.cpp", "misreads", what))
    scales = {path: config["lora_alpha"] / rank for path, rank in ranks.items()}
    return found + _other_scales("llama.cpp", "alpha / rank of the tensor", config, scales)


def _other_scales(
    reader: str, rule: str, config: dict[str, Any], scales: Mapping[str, float]
) -> list[Incompatibility]:
    """A complaint where a reader's scales are not those of PEFT."""
    wrong = {
        path: scale / scaling_of(config, path)
        for path, scale in scales.items()
        if abs(scale / scaling_of(config, path) - 1) > 1e-6
    }
    if not wrong:
        return []
    path, factor = max(wrong.items(), key=lambda item: abs(item[1] - 1))
    what = f"the scale ({rule}): {factor:.3g} times PEFT's at {path}, {len(wrong)} of {len(scales)}"
    return [Incompatibility(reader, "misreads", what)]

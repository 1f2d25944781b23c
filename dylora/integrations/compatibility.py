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
    ranks = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): len(tensor)
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    beside = [n for n in tensors if not n.endswith((".lora_A.weight", ".lora_B.weight"))]
    others = f"tensors besides lora_A, lora_B: {beside[0]}" if beside else None
    r: int = config["r"]
    alpha: float = config["lora_alpha"]
    bias = config.get("bias", "none")
    dora = "DoRA" if config.get("use_dora") else None
    biased = f"trained biases (bias {bias})" if bias != "none" else None
    saved = "modules_to_save" if config.get("modules_to_save") else None
    conv = config.get("fan_in_fan_out")
    unknown = {path.rpartition(".")[2] for path in ranks} - SGLANG_PROJECTIONS
    rank = max([r, *ranks.values()])
    allowed = next((value for value in VLLM_RANKS if value >= rank), None)
    one_scale = alpha / (r**0.5 if config.get("use_rslora") else r)
    vllm = (
        *(("refuses", dora), ("refuses", biased), ("refuses", saved)),
        ("refuses", None if dora or biased or saved else others),
        ("refuses", "LoRA on GPT-2" if conv else None),
        ("misreads", _other_scales("one scale for all", config, dict.fromkeys(ranks, one_scale))),
        ("refuses", None if allowed else f"rank {rank}: at most {VLLM_RANKS[-1]}"),
        ("needs", f"--max-lora-rank {allowed}" if allowed and rank > VLLM_DEFAULT_RANK else None),
    )
    sglang = (
        ("refuses", dora),
        ("refuses", "rank_pattern" if _varies(config.get("rank_pattern"), r) else None),
        ("refuses", "alpha_pattern" if _varies(config.get("alpha_pattern"), alpha) else None),
        ("misreads", biased and f"no {biased}"),
        ("refuses", f"LoRA on {', '.join(sorted(unknown))}" if unknown else None),
    )
    if not any(what for _, what in sglang):
        scales = dict.fromkeys(ranks, alpha / r)
        sglang = (("misreads", _other_scales("alpha / r for all", config, scales)),)
    scales = {path: alpha / own for path, own in ranks.items()}
    transposed = "A and B of GPT-2's Conv1D are transposed like its weights" if conv else None
    llama_cpp = (
        *(("refuses", others), ("misreads", transposed)),
        ("misreads", _other_scales("alpha / rank of the tensor", config, scales)),
    )
    return [
        Incompatibility(reader, kind, what)
        for reader, said in zip(READERS, (vllm, sglang, llama_cpp), strict=True)
        for kind, what in said
        if what
    ]


def _varies(pattern: Mapping[str, float] | None, usual: float) -> bool:
    return any(value != usual for value in (pattern or {}).values())


def _other_scales(rule: str, config: Mapping[str, Any], scales: Mapping[str, float]) -> str | None:
    """Where a reader's scales, by `rule`, are not those of PEFT."""
    wrong = {
        path: scale / scaling_of(config, path)
        for path, scale in scales.items()
        if abs(scale / scaling_of(config, path) - 1) > 1e-6
    }
    if not wrong:
        return None
    path, factor = max(wrong.items(), key=lambda item: abs(item[1] - 1))
    return f"the scale ({rule}): {factor:.3g} times PEFT's at {path}, {len(wrong)} of {len(scales)}"

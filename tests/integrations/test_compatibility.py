"""What is said of other readers follows their sources' rules."""

import pytest
import torch

from dylora.integrations.compatibility import VLLM_RANKS, find_incompatibilities
from dylora.storage.peft_config import adapter_config

Q = "base_model.model.model.layers.0.self_attn.q_proj"
OUT = "base_model.model.model.layers.0.self_attn.o_proj"


def said(extra=(), ranks=(4, 4), **settings):
    """The complaints about an adapter of q_proj and o_proj."""
    defaults = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "o_proj"],
        "base_model_name_or_path": "b",
    }
    tensors = {}
    for path, rank in zip((Q, OUT), ranks, strict=True):
        tensors[f"{path}.lora_A.weight"] = torch.ones(rank, 6)
        tensors[f"{path}.lora_B.weight"] = torch.ones(6, rank)
    tensors |= {name: torch.ones(6) for name in extra}
    return find_incompatibilities(adapter_config(**(defaults | settings)), tensors)


def kinds(*args, **settings):
    return {(complaint.reader, complaint.kind) for complaint in said(*args, **settings)}


def test_a_plain_adapter_suits_every_reader():
    assert said() == []


def test_rslora_is_known_to_vllm_alone():
    assert kinds(use_rslora=True) == {("SGLang", "misreads"), ("llama.cpp", "misreads")}
    [_, complaint] = said(use_rslora=True)
    assert "0.5 times PEFT's" in complaint.what  # alpha / 4 instead of alpha / 2
    assert "2 of 2" in complaint.what


def test_a_rank_pattern_suits_llama_cpp_which_reads_the_rank_off_the_tensor():
    pattern = {"rank_pattern": {"o_proj": 2}}
    assert kinds(ranks=(4, 2), **pattern) == {("vLLM", "misreads"), ("SGLang", "refuses")}


def test_an_alpha_pattern_suits_none():
    assert kinds(alpha_pattern={"o_proj": 3}) == {
        ("vLLM", "misreads"),
        ("SGLang", "refuses"),
        ("llama.cpp", "misreads"),
    }


def test_a_pattern_that_changes_nothing_is_no_matter():
    assert said(alpha_pattern={"o_proj": 8}, rank_pattern={"q_proj": 4}) == []


def test_dora_is_refused_by_all():
    found = kinds([f"{Q}.lora_magnitude_vector"], use_dora=True)
    assert found == {("vLLM", "refuses"), ("SGLang", "refuses"), ("llama.cpp", "refuses")}


def test_trained_biases_suit_none():
    found = kinds([f"{Q}.base_layer.bias"], bias="lora_only")
    assert found == {("vLLM", "refuses"), ("SGLang", "misreads"), ("llama.cpp", "refuses")}


def test_other_tensors_stop_vllm_and_llama_cpp():
    found = kinds(["base_model.model.lm_head.weight"])
    assert found == {("vLLM", "refuses"), ("llama.cpp", "refuses")}


def test_gpt2_is_transposed_by_llama_cpp_and_without_lora_in_vllm():
    found = kinds(fan_in_fan_out=True)
    assert found == {("vLLM", "refuses"), ("llama.cpp", "misreads")}


def test_sglang_knows_some_projections_only():
    tensors = {
        f"base_model.model.h.0.attn.Wqkv.lora_{m}.weight": torch.ones(4, 4) for m in ("A", "B")
    }
    config = adapter_config(r=4, lora_alpha=4, target_modules=["Wqkv"], base_model_name_or_path="b")
    assert [tuple(c) for c in find_incompatibilities(config, tensors)] == [
        ("SGLang", "refuses", "LoRA on Wqkv")
    ]


@pytest.mark.parametrize(("rank", "allowed"), [(17, 32), (64, 64), (257, 320), (512, 512)])
def test_vllm_needs_to_be_told_of_ranks_above_16(rank, allowed):
    assert allowed in VLLM_RANKS
    found = said(ranks=(rank, rank), r=rank, lora_alpha=rank)
    assert found == [("vLLM", "needs", f"--max-lora-rank {allowed}")]


def test_vllm_refuses_ranks_above_512():
    assert kinds(ranks=(513, 513), r=513, lora_alpha=513) == {("vLLM", "refuses")}


def test_vllm_needs_room_for_the_largest_rank_of_a_pattern():
    found = said(ranks=(4, 40), rank_pattern={"o_proj": 40}, alpha_pattern={"o_proj": 80})
    assert ("vLLM", "needs", "--max-lora-rank 64") in found

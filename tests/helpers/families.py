"""The families of models that the code is held to, each as a tiny random configuration.

The one table of families: `test_families.py` puts every family through every check, other tests
take single ones from here, and `docs/families.md` begins with it (see `every_family.py`).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

WINDOW = 4  # of every family that slides one; shorter than the sequences of the tests
# Wide initial weights: an expert, a router or a changed token moves logits far beyond tolerances.
COMMON = {
    "vocab_size": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
MODERN = COMMON | {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = MODERN | {"num_key_value_heads": 2}
GPT2 = COMMON | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
FALCON = COMMON | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_hidden_size": 40,
}
OPT = COMMON | {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 40,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
}
GEMMA = GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
# Layers 3 and 4 use the keys and values of 1 and 2, so they have no k_proj and no v_proj.
SHARED_KV = GROUPED | {
    "num_hidden_layers": 4,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "layer_types": SLIDING_THEN_FULL * 2,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 40,
    "hidden_size_per_layer_input": 4,
}
LINEAR_ATTENTION = {
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
SPLIT = ["q_proj", "k_proj", "v_proj", "o_proj"]
SPLIT_OUT = ["q_proj", "k_proj", "v_proj", "out_proj"]
FUSED = ["query_key_value", "dense"]


class Family(NamedTuple):
    """One row of the table."""

    title: str
    config_class: str  # of transformers
    sizes: dict[str, Any]
    projections: list[list[str]]  # found in the attention block of each layer
    trait: str = ""  # what is special about its attention
    but: Mapping[str, str] = {}  # a check that does not hold -> why


FAMILIES = {
    "llama": Family("Llama", "LlamaConfig", GROUPED, [SPLIT] * 2, "grouped queries"),
    "llama_tied": Family(
        "Llama, tied",
        "LlamaConfig",
        GROUPED | {"tie_word_embeddings": True},
        [SPLIT] * 2,
        "tied embeddings",
    ),
    "gemma": Family(
        "Gemma",
        "GemmaConfig",
        GROUPED | {"head_dim": 16, "num_key_value_heads": 1},
        [SPLIT] * 2,
        "one key head, tied embeddings",
    ),
    "gemma2": Family(
        "Gemma 2",
        "Gemma2Config",
        GEMMA | {"layer_types": SLIDING_THEN_FULL},
        [SPLIT] * 2,
        "every other layer slides, soft caps",
    ),
    "gemma3": Family(
        "Gemma 3",
        "Gemma3TextConfig",
        GEMMA | {"layer_types": SLIDING_THEN_FULL},
        [SPLIT] * 2,
        "sliding layers with a rotary base of their own",
    ),
    "gemma3_vision": Family(
        "Gemma 3 with a vision tower",
        "Gemma3Config",
        {
            "text_config": GEMMA | {"layer_types": SLIDING_THEN_FULL},
            "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
        },
        [SPLIT] * 2,
        "text alone",
    ),
    "gemma3n": Family(
        "Gemma 3n",
        "Gemma3nTextConfig",
        SHARED_KV | {"laurel_rank": 4},
        [SPLIT, SPLIT, ["q_proj", "o_proj"], ["q_proj", "o_proj"]],
        "later layers use earlier keys and values; sliding",
    ),
    "gemma4": Family(
        "Gemma 4",
        "Gemma4TextConfig",
        SHARED_KV | {"global_head_dim": 16},
        [SPLIT, SPLIT, ["q_proj", "o_proj"], ["q_proj", "o_proj"]],
        "later layers use earlier keys and values; sliding",
    ),
    "gemma4_k_is_v": Family(
        "Gemma 4, keys as values",
        "Gemma4TextConfig",
        SHARED_KV
        | {"global_head_dim": 16, "num_kv_shared_layers": 0, "num_hidden_layers": 2}
        | {"layer_types": SLIDING_THEN_FULL, "attention_k_eq_v": True},
        [SPLIT, ["q_proj", "k_proj", "o_proj"]],
        "full layers have no v_proj; sliding",
    ),
    "llama4": Family(
        "Llama 4",
        "Llama4TextConfig",
        GROUPED
        | {"head_dim": 8, "intermediate_size_mlp": 40, "attention_chunk_size": WINDOW}
        | {"num_local_experts": 4, "interleave_moe_layer_step": 2},
        [SPLIT] * 2,
        "attends within chunks; its own experts stay as they are",
    ),
    "mistral": Family(
        "Mistral",
        "MistralConfig",
        GROUPED | {"sliding_window": WINDOW},
        [SPLIT] * 2,
        "every layer slides",
    ),
    "mixtral": Family(
        "Mixtral",
        "MixtralConfig",
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
        [SPLIT] * 2,
        "its own experts stay as they are",
    ),
    "qwen2": Family("Qwen2", "Qwen2Config", GROUPED, [SPLIT] * 2, "biases on q, k, v"),
    "qwen2_sliding": Family(
        "Qwen2, sliding",
        "Qwen2Config",
        GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        [SPLIT] * 2,
        "the second layer slides",
    ),
    "qwen3": Family(
        "Qwen3", "Qwen3Config", GROUPED | {"head_dim": 12}, [SPLIT] * 2, "normed queries and keys"
    ),
    "qwen3_moe": Family(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        GROUPED
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        [SPLIT] * 2,
        "its own experts stay as they are",
    ),
    "phi": Family("Phi", "PhiConfig", MODERN, [["q_proj", "k_proj", "v_proj", "dense"]] * 2),
    "phi3": Family(
        "Phi-3",
        "Phi3Config",
        GROUPED | {"sliding_window": WINDOW},
        [["qkv_proj", "o_proj"]] * 2,
        "fused qkv, every layer slides",
    ),
    "gpt2": Family("GPT-2", "GPT2Config", GPT2, [["c_attn", "c_proj"]] * 2, "Conv1D"),
    "gpt_bigcode": Family(
        "GPT-BigCode",
        "GPTBigCodeConfig",
        GPT2,
        [["c_attn", "c_proj"]] * 2,
        "one key head in a fused projection",
    ),
    "gpt_neo": Family(
        "GPT-Neo",
        "GPTNeoConfig",
        COMMON
        | {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 32}
        | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        [SPLIT_OUT] * 2,
        "the second layer slides",
    ),
    "gpt_neox": Family("GPT-NeoX", "GPTNeoXConfig", MODERN, [FUSED] * 2, "fused qkv"),
    "gptj": Family("GPT-J", "GPTJConfig", GPT2 | {"rotary_dim": 4}, [SPLIT_OUT] * 2),
    "codegen": Family(
        "CodeGen",
        "CodeGenConfig",
        GPT2 | {"rotary_dim": 4},
        [["qkv_proj", "out_proj"]] * 2,
        "fused qkv",
    ),
    "falcon": Family("Falcon", "FalconConfig", FALCON, [FUSED] * 2, "fused qkv, one key head"),
    "falcon_new": Family(
        "Falcon, new architecture",
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
        [FUSED] * 2,
        "fused and grouped qkv, parallel norms",
    ),
    "falcon_alibi": Family(
        "Falcon, RW",
        "FalconConfig",
        FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
        [FUSED] * 2,
        "fused qkv, ALiBi",
    ),
    "falcon_h1": Family(
        "Falcon-H1",
        "FalconH1Config",
        GROUPED
        | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
        | {"mamba_n_groups": 1},
        [SPLIT] * 2,
        "beside Mamba, which stays as it is",
    ),
    "bloom": Family(
        "BLOOM",
        "BloomConfig",
        COMMON | {"hidden_size": 32, "n_layer": 2, "n_head": 4},
        [FUSED] * 2,
        "fused qkv, ALiBi",
    ),
    "mpt": Family(
        "MPT",
        "MptConfig",
        COMMON | {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32},
        [["Wqkv", "out_proj"]] * 2,
        "fused qkv, ALiBi",
    ),
    "opt": Family("OPT", "OPTConfig", OPT, [SPLIT_OUT] * 2),
    "opt_post_norm": Family(
        "OPT-350m",
        "OPTConfig",
        OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
        [SPLIT_OUT] * 2,
        "norms after attention, narrow embeddings",
    ),
    "starcoder2": Family(
        "StarCoder2",
        "Starcoder2Config",
        GROUPED | {"sliding_window": WINDOW},
        [SPLIT] * 2,
        "every layer slides",
    ),
    "olmo2": Family("OLMo 2", "Olmo2Config", GROUPED, [SPLIT] * 2, "norms after attention"),
    "olmo3": Family(
        "OLMo 3",
        "Olmo3Config",
        GROUPED | {"sliding_window": WINDOW},
        [SPLIT] * 2,
        "every layer slides",
    ),
    "granite": Family("Granite", "GraniteConfig", GROUPED, [SPLIT] * 2, "scaled residuals"),
    "cohere": Family(
        "Cohere",
        "CohereConfig",
        GROUPED | {"logit_scale": 1.0},
        [SPLIT] * 2,
        "attention beside the MLP",
    ),
    "cohere2": Family(
        "Cohere 2",
        "Cohere2Config",
        GROUPED | {"logit_scale": 1.0, "sliding_window": WINDOW},
        [SPLIT] * 2,
        "every layer slides",
    ),
    "glm4": Family("GLM-4", "Glm4Config", GROUPED | {"head_dim": 8}, [SPLIT] * 2),
    "stablelm": Family("StableLM", "StableLmConfig", GROUPED, [SPLIT] * 2),
    "lfm2": Family(
        "LFM2",
        "Lfm2Config",
        GROUPED | {"layer_types": ["conv", "full_attention"]},
        [SPLIT_OUT],
        "between convolutions, which stay as they are",
    ),
    "smollm3": Family(
        "SmolLM3",
        "SmolLM3Config",
        GROUPED | {"no_rope_layer_interval": 2},
        [SPLIT] * 2,
        "every other layer without positions",
    ),
    "gpt_oss": Family(
        "GPT-OSS",
        "GptOssConfig",
        GROUPED
        | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"sliding_window": WINDOW, "layer_types": SLIDING_THEN_FULL},
        [SPLIT] * 2,
        "sinks, sliding; its own experts stay as they are",
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3",
        "DeepseekV3Config",
        GROUPED
        | {
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
        }
        | {"v_head_dim": 8, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2}
        | {"topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        [["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]] * 2,
        "latent keys and values",
    ),
    "qwen3_next": Family(
        "Qwen3-Next",
        "Qwen3NextConfig",
        GROUPED
        | LINEAR_ATTENTION
        | {"num_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
        [["in_proj_qkvz", "in_proj_ba", "out_proj"], SPLIT],
        "linear attention in the first layer",
    ),
    "qwen3_5": Family(
        "Qwen3.5",
        "Qwen3_5TextConfig",
        GROUPED | LINEAR_ATTENTION,
        [["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"], SPLIT],
        "linear attention in the first layer",
    ),
}


class Check(NamedTuple):
    """One column of the table."""

    test: str  # the function of test_families.py
    meaning: str


CHECKS = {
    "sites": Check(
        "test_the_attention_projections_are_found_and_nothing_else",
        "exactly the projections named are adapted, without `target_modules`",
    ),
    "identity": Check(
        "test_a_fresh_mixture_has_the_logits_of_its_base_bit_for_bit",
        "fresh experts change no bit of the logits",
    ),
    "one-hot": Check(
        "test_one_hot_weights_are_that_expert_merged_into_the_base",
        "one-hot `routing_weights` give the base with `W + s·B·A` written into its weights",
    ),
    "cache": Check(
        "test_cached_steps_have_the_logits_of_the_full_pass",
        "a prompt, then token by token with the KV cache, beyond any window",
    ),
    "generate": Check(
        "test_generate_has_the_logits_of_the_full_pass", "`generate`, a router at every site"
    ),
    "shared router": Check(
        "test_generate_with_a_shared_router_has_the_logits_of_the_full_pass",
        "`generate`, `router_scope: shared`",
    ),
    "padding": Check(
        "test_padding_on_either_side_leaves_logits_as_they_are",
        "left and right padding give the logits of the sequence alone",
    ),
    "causality": Check(
        "test_a_token_changes_no_logit_before_it", "no bit of a logit depends on a later token"
    ),
    "learning": Check(
        "test_every_expert_and_every_router_learns",
        "A and B of every expert and all routers move within two steps",
    ),
    "export": Check(
        "test_an_exported_expert_has_the_same_logits_in_peft",
        "peft loads every saved expert without a warning and computes the same",
    ),
    "unload": Check(
        "test_unload_restores_the_base_bit_for_bit",
        "names, weights, ties and logits of the base come back",
    ),
}
# What is outside the table, and what happens instead.
OTHERS = {
    "`kv_b_proj` of latent attention (DeepSeek, MiniCPM3, …)": "refused as a target: it expands "
    "the cached latents of all past tokens at every step, and their gates are gone by then",
    "BLOOM with `slow_but_exact` and `pretraining_tp` above 1": "refused: it reads weights past "
    "its projections, so that their updates would be lost",
    "cross-attention (GPT-2 with `add_cross_attention`, Mllama)": "left as it is: a pass over text "
    "alone does not run it; refused as a target",
    "towers for images and sound": "likewise; only the language model is adapted",
    "the experts of a mixture-of-experts base, one tensor of three axes (GPT-OSS, Mixtral, "
    "Qwen3-MoE)": "refused as a target in one line; shared experts, which are projections, can be "
    "named",
    "a projection that does not map tokens one by one (DeepSeek-V4's `o_a_proj`)": "left as it is, "
    "which is said; refused as a target",
    "an indexer, which gives numbers of tokens (DeepSeek-V3.2, DeepSeek-V4)": "left as it is",
    "a base whose tokens see later ones (BERT without `is_decoder`)": "refused",
    "a base that cannot compute six tokens of text": "refused with the reason",
    "models without queries and keys (Mamba, RWKV), or whose are no projections (XLNet)": "refused "
    "with the names that `target_modules` could take",
}


def document() -> str:
    """The first part of docs/families.md."""
    reasons = [reason for family in FAMILIES.values() for reason in family.but.values()]
    notes = list(dict.fromkeys(reasons))
    lines = [
        "# Families of models",
        "",
        "Each row is a tiny random model of transformers that `tests/test_families.py` puts",
        "through every check; where no bits are spoken of, logits agree to 2e-5 of the largest.",
        "Written by `python tests/helpers/every_family.py`; a test holds it to the table there.",
        "",
        f"| family | adapted | attention | {' | '.join(CHECKS)} |",
        "|" + "---|" * (3 + len(CHECKS)),
    ]
    for family in FAMILIES.values():
        found = dict.fromkeys(name for layer in family.projections for name in layer)
        marks = [
            f"no ({notes.index(family.but[check]) + 1})" if check in family.but else "yes"
            for check in CHECKS
        ]
        cells = [family.title, ", ".join(found), family.trait, *marks]
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    lines += ["", "## The checks", "", "| check | what holds |", "|---|---|"]
    lines += [f"| {name} | {check.meaning} |" for name, check in CHECKS.items()]
    lines += ["", "## What is not in the table", "", "| what | what happens |", "|---|---|"]
    lines += [f"| {what} | {happens} |" for what, happens in OTHERS.items()]
    return "\n".join(lines) + "\n"

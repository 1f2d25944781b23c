"""A pass of six tokens shows which projections are adapted, and which cannot be."""

import copy
import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.adapters import inject
from dylora.adapters.trace import decoder_of, trace_base
from dylora.storage.manifest import MANIFEST, write_manifest
from every_family import decodes, tiny_base
from families import FAMILIES, SPLIT

MLP = ["gate_proj", "up_proj", "down_proj"]


def adapted(model):
    """Block without numbers -> the names of its projections that are adapted."""
    found = {}
    for path in model.mixture.adapters:
        block, _, name = path.rpartition(".")
        words = ".".join(part for part in block.split(".") if not part.isdigit())
        found.setdefault(words, set()).add(name)
    return found


def state_of(base):
    """What a pass could leave behind."""
    return (
        {name: tensor.clone() for name, tensor in base.state_dict().items()},
        {name: module.training for name, module in base.named_modules()},
        {name: p.requires_grad for name, p in base.named_parameters()},
        sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in base.modules()),
    )


# What is found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nemotron_h", {"model.layers.mixer": {*SPLIT}}),
        ("modernbert-decoder", {"model.layers.attn": {"q_proj", "k_proj", "v_proj", "Wo"}}),
        ("recurrent_gemma", {"model.layers.temporal_block": {*SPLIT}}),
        ("ctrl", {"transformer.h.multi_head_attention": {"Wq", "Wk", "Wv", "dense"}}),
        ("bert", {"bert.encoder.layer.attention.self": {"query", "key", "value"}}),
    ],
)
def test_queries_keys_and_values_of_whatever_name_are_adapted_with_their_output(name, expected):
    assert adapted(DyLoRA_MoE.from_base(tiny_base(name), MoELoraConfig(r=2))) == expected


@pytest.mark.parametrize(
    ("name", "block", "names"),
    [
        ("git", "git.encoder.layer.attention.self", {"query", "key", "value"}),
        ("phi4_multimodal", "model.layers.self_attn", {"qkv_proj", "o_proj"}),
    ],
)
def test_a_tower_inside_the_decoder_is_left_as_it_is(name, block, names):
    base = tiny_base(name)
    towers = [path for path, _ in base.named_modules() if path.endswith(".q_proj")]
    assert towers  # of images and sound
    assert adapted(DyLoRA_MoE.from_base(base, MoELoraConfig(r=2))) == {block: names}


def test_an_indexer_is_left_as_it_is_beside_its_attention():
    model = DyLoRA_MoE.from_base(tiny_base("deepseek_v4"), MoELoraConfig(r=2))
    expected = {"q_a_proj", "q_b_proj", "kv_proj", "o_b_proj"}
    assert adapted(model) == {"model.layers.self_attn": expected}
    inside = [path for path, _ in model.base.named_modules() if ".indexer." in path]
    assert {"q_b_proj", "kv_proj"} <= {path.rpartition(".")[2] for path in inside}


def test_layers_without_keys_of_their_own_are_adapted_as_those_that_have_them(random_base):
    _, config_class, sizes, *_ = FAMILIES["gemma4"]
    model = DyLoRA_MoE.from_base(random_base(config_class, **sizes), MoELoraConfig(r=2))
    assert model.site_names == [f"model.layers.{layer}.self_attn" for layer in range(4)]


@pytest.mark.parametrize("name", ["falcon_h1", "bamba", "qwen2_moe"])
def test_the_first_block_is_the_first_that_runs(name):
    """In these an MLP is registered before the mixer, or within the MLP that calls it."""
    config = MoELoraConfig(r=2, target_modules=[*SPLIT, *MLP], router_scope="shared")
    if name == "qwen2_moe":
        config = replace(config, target_modules=[*MLP, "shared_expert_gate"])
    model = DyLoRA_MoE.from_base(tiny_base(name), config)
    ran = []
    for path in model.site_names:
        block = model.base.get_submodule(path)
        block.register_forward_pre_hook(lambda *_, path=path: ran.append(path))
    routing = model(torch.arange(3, 12)[None]).routing
    assert ran == model.site_names
    assert routing.statistics is not None
    assert torch.equal(routing.gates, routing.gates[:, :, :1].expand_as(routing.gates))


def test_a_checkpoint_whose_blocks_are_in_another_order_is_loaded_by_it(tmp_path, monkeypatch):
    config = MoELoraConfig(r=2, target_modules=[*SPLIT, *MLP], router_scope="shared")
    found = inject.find_targets
    backwards = lambda *given: list(reversed(found(*given)))  # noqa: E731
    base, ids = tiny_base("falcon_h1"), torch.arange(3, 12)[None]
    with monkeypatch.context() as patched:
        patched.setattr(inject, "find_targets", backwards)
        model = DyLoRA_MoE.from_base(copy.deepcopy(base), config).eval()
    with torch.no_grad():
        for _, parameter in model.own_parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base)
    assert again.site_names == model.site_names
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_block_that_is_adapted_in_part_is_said_in_one_line(caplog):
    DyLoRA_MoE.from_base(tiny_base("afmoe"), MoELoraConfig(r=2))
    (record,) = [record for record in caplog.records if record.name == "dylora"]
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "2 of 2 blocks are adapted in part, model.layers.0.self_attn among them: gate_proj stays "
        "as it is"
    )


@pytest.mark.parametrize("settings", [{"exclude_modules": ["o_proj"]}, {"target_modules": SPLIT}])
def test_what_a_user_leaves_out_is_not_said(settings, llama, caplog):
    DyLoRA_MoE.from_base(llama(), MoELoraConfig(r=2, **settings))
    assert [record for record in caplog.records if record.name == "dylora"] == []


def test_a_checkpoint_is_loaded_by_its_own_list_of_projections(
    mixture, llama, tmp_path, monkeypatch
):
    mixture(target_modules=["v_proj", "up_proj"]).save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(inject, "find_targets", None)
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", llama())
    assert {path.rpartition(".")[2] for path in again.mixture.adapters} == {"v_proj", "up_proj"}


def test_a_checkpoint_older_than_fingerprints_is_loaded_by_what_is_found(mixture, llama, tmp_path):
    """Nothing else would tell that a base has more layers than it was trained on."""
    mixture().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    description = json.loads(file.read_text())
    del description["base_fingerprint"]
    file.write_text(json.dumps(description))
    (tmp_path / MANIFEST).unlink()
    write_manifest(tmp_path)
    DyLoRA_MoE.from_pretrained(tmp_path, llama())
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.k_proj is missing"):
        DyLoRA_MoE.from_pretrained(tmp_path, llama(num_hidden_layers=3))


def test_a_router_is_as_wide_as_what_enters_its_block():
    """Zamba's attention gets the hidden state beside the embedding."""
    model = DyLoRA_MoE.from_base(tiny_base("zamba2"), MoELoraConfig(r=2))
    assert [block.width for block in model.mixture.blocks] == [64]
    assert decodes(model.base)


# The pass


@pytest.mark.parametrize("training", [True, False])
def test_the_pass_leaves_the_base_as_it_was(training, llama):
    base = llama(attention_dropout=0.5).train(training)
    base.model.layers[0].mlp.train(not training)
    before, random = state_of(base), torch.get_rng_state()
    trace_base(base)
    after = state_of(base)
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
    assert after[1:] == before[1:]
    assert torch.equal(torch.get_rng_state(), random)


def test_an_error_in_the_pass_leaves_the_base_as_it_was(llama):
    base = llama().train()
    base.model.layers[1].mlp.forward = None
    before = state_of(base)[1:]
    with pytest.raises(ValueError, match="cannot compute 2 x 3 tokens of text: TypeError"):
        trace_base(base)
    assert state_of(base)[1:] == before


@pytest.mark.parametrize("name", ["modernbert-decoder", "mllama", "opt", "git"])
def test_the_decoder_is_the_innermost_model_that_holds_the_layers(name):
    model = DyLoRA_MoE.from_base(tiny_base(name), MoELoraConfig(r=2, router_scope="shared"))
    decoder = decoder_of(model.base, model.site_names)
    path = {"mllama": "model", "opt": "model.decoder", "git": "git"}.get(name, "model")
    assert decoder is model.base.get_submodule(path)
    before = len(decoder._forward_pre_hooks)
    model.unload()
    assert before - len(decoder._forward_pre_hooks) == 1


# What is refused


def test_a_base_whose_tokens_see_later_ones_is_refused():
    base = tiny_base("bert")
    base.config.is_decoder = False
    for module in base.modules():
        for name in ("is_decoder", "is_causal"):
            if hasattr(module, name):
                setattr(module, name, False)
    with pytest.raises(ValueError, match=r"BertLMHeadModel is not causal: .*is_decoder=True"):
        DyLoRA_MoE.from_base(base, MoELoraConfig(r=2))


def test_a_base_that_wants_more_than_text_is_refused_in_one_line():
    base = tiny_base("xmod")
    base.config.default_language = None
    with pytest.raises(
        ValueError, match=r"^XmodForCausalLM cannot compute .*: Input language"
    ) as raised:
        DyLoRA_MoE.from_base(base, MoELoraConfig(r=2))
    assert "\n" not in str(raised.value)


def test_a_target_that_a_pass_over_text_does_not_run_is_refused(gpt2):
    base = gpt2(add_cross_attention=True)
    with pytest.raises(ValueError, match=r"h\.0\.crossattention\.q_attn is not run by a pass over"):
        DyLoRA_MoE.from_base(base, MoELoraConfig(target_modules=["q_attn"]))


def test_a_target_that_does_not_map_tokens_one_by_one_is_refused():
    with pytest.raises(ValueError, match=r"self_attn\.o_a_proj does not map the tokens of a pass"):
        DyLoRA_MoE.from_base(tiny_base("deepseek_v4"), MoELoraConfig(target_modules=["o_a_proj"]))


def test_an_axis_that_is_not_the_batch_is_no_token(llama):
    """[S, B, D] has as many rows as [B, S, D], in another order."""
    base = llama()

    class Turned(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner.down_proj(self.inner.up_proj(x).transpose(0, 1)).transpose(0, 1)

    base.model.layers[0].mlp = Turned(base.model.layers[0].mlp)
    with pytest.raises(ValueError, match=r"mlp\.inner\.down_proj does not map the tokens"):
        DyLoRA_MoE.from_base(base, MoELoraConfig(target_modules=["0.mlp.inner.down_proj"]))


# Mixtures of experts as bases


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_next", "llama4_text", "deepseek_v3"])
def test_shared_experts_whose_input_is_flattened_are_adapted(name):
    base = tiny_base(name)
    ends = tuple(f"{word}.{name}" for word in ("shared_expert", "shared_experts") for name in MLP)
    shared = [path for path, _ in base.named_modules() if path.endswith(ends)]
    assert shared
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(r=2, target_modules=shared)).eval()
    with torch.no_grad():
        for _, parameter in [*model.named_expert_parameters(), *model.router_parameters()]:
            parameter.normal_(std=0.2)
    assert decodes(model.base)
    assert model(torch.arange(3, 12)[None]).routing.gates.shape[:2] == (1, 9)


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_experts_of_the_base_in_one_tensor_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match="'down_proj' holds all experts of the base in one tensor"):
        DyLoRA_MoE.from_base(tiny_base(name), MoELoraConfig(target_modules=["down_proj"]))

"""What is merged into a base computes what was routed, and is an ordinary model."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dylora.adapters.dora import weight_OD
from families import FAMILIES

FEW = ("llama", "llama_tied", "gemma", "gpt2", "gpt_neox", "phi3")  # tied, Conv1D, fused
SHARES = (0.5, 0.2, 0.4)  # not 1 in sum: gates need not be


@pytest.fixture
def on(random_base, mixture):
    """A mixture of three random experts on a tiny base of a family, biases among them."""

    def build(family: str, dtype: torch.dtype = torch.float32, **settings):
        _, config_class, sizes, *_ = FAMILIES[family]
        base = random_base(config_class, **(sizes | {"initializer_range": 0.1}))
        model = mixture(base.to(dtype), **({"r": 3, "lora_alpha": 5} | settings))
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in model.named_expert_parameters():
                if name.endswith(("magnitude", "bias", "shift")):
                    parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
        return model

    return build


@torch.no_grad()
def routed(model, ids, weights):
    """Logits with constant weights, after a check that they do anything at all."""
    weights = torch.as_tensor(weights)
    weights = weights.expand(*ids.shape, -1, -1) if weights.ndim == 2 else weights.expand(2, -1)
    logits = model(ids, routing_weights=weights).logits
    with model.disable_adapters():
        assert (logits - model(ids).logits).abs().max() > 0.1
    return logits


@torch.no_grad()
def reloaded(base, ids, folder):
    base.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


@pytest.mark.parametrize("family", FEW)
def test_a_merged_expert_has_its_logits_when_loaded_again(family, on, ids, tmp_path):
    model = on(family, use_rslora=True)
    expected = routed(model, ids, (0.0, 1.0, 0.0))
    base = model.merge_and_unload(expert=1)
    assert (reloaded(base, ids, tmp_path) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", FEW)
def test_a_merged_mixture_has_the_logits_of_its_weights(family, on, ids, tmp_path):
    model = on(
        family, expert_ranks=[2, 3, 1], alpha_pattern={FAMILIES[family].projections[0][0]: 7}
    )
    expected = routed(model, ids, SHARES)
    base = model.merge_and_unload(weights=SHARES)
    assert (reloaded(base, ids, tmp_path) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"use_dora": True}),
        ("gpt2", {"use_dora": True}),
        ("qwen2", {"bias": "lora_only"}),
        ("gpt2", {"bias": "all"}),
        ("llama", {"share_A": True}),
    ],
)
def test_what_no_single_lora_could_say_can_still_be_merged(family, settings, on, ids, tmp_path):
    model = on(family, **settings)
    expected = routed(model, ids, SHARES)
    base = model.merge_and_unload(weights=SHARES)
    assert (reloaded(base, ids, tmp_path) - expected).abs().max() < 1e-5


def test_a_row_of_zeros_stays_with_dora(on, ids):
    model = on("llama", use_dora=True)
    path = next(iter(model.mixture.adapters))
    stack = model.mixture.adapters[path].stacks[0]
    with torch.no_grad():
        model.base.get_submodule(path).weight[0] = 0
        stack.lora_B[..., 0] = 0
        stack.lora_magnitude[..., 0] = 0
    expected = routed(model, ids, SHARES)
    base = model.merge_and_unload(weights=SHARES)
    assert (base(ids).logits - expected).abs().max() < 1e-5


def test_weights_may_differ_from_site_to_site(on, ids):
    model = on("llama")
    weights = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.1, 0.9]])
    expected = routed(model, ids, weights)
    assert (model.merge_and_unload(weights=weights)(ids).logits - expected).abs().max() < 1e-5


def test_a_bf16_weight_is_rounded_once(on):
    model = on("llama", torch.bfloat16)
    path = "model.layers.0.self_attn.q_proj"
    exact = model.base.get_submodule(path).weight.double()
    for expert, share in enumerate(SHARES):
        A, B = model.expert_weights(expert)[path]
        exact = exact + share * (5 / 3) * B.double() @ A.double()
    merged = model.merge_and_unload(weights=SHARES).get_submodule(path).weight
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.bfloat16())


def test_tied_embeddings_stay_tied(on, ids, tmp_path):
    base = on("llama_tied").merge_and_unload(expert=0)
    assert base.lm_head.weight is base.model.embed_tokens.weight
    base.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_only_the_projections_change(on):
    model = on("llama")
    before = copy.deepcopy(model).unload().state_dict()
    paths = {f"{path}.weight" for path in model.mixture.adapters}
    after = model.merge_and_unload(expert=2).state_dict()
    assert after.keys() == before.keys()
    assert {name for name in before if not torch.equal(before[name], after[name])} == paths


def test_conv1d_is_written_the_way_it_lies(on):
    model = on("gpt2")
    path = next(path for path in model.mixture.adapters if path.endswith("c_attn"))
    before = weight_OD(model.base.get_submodule(path)).clone()
    A, B = model.expert_weights(0)[path]
    after = weight_OD(model.merge_and_unload(expert=0).get_submodule(path))
    torch.testing.assert_close(after, before + (5 / 3) * B @ A)


# What cannot be merged


def test_routing_by_token_is_refused_and_says_what_to_do(on, ids):
    model = on("llama")
    before = model(ids).logits
    with pytest.raises(ValueError, match="name one expert, give weights, or measure"):
        model.merge_and_unload()
    assert torch.equal(model(ids).logits, before)


def test_fixed_routing_needs_no_weights(on, ids):
    model = on("llama", router_type="fixed", fixed_routing_weights=list(SHARES))
    expected = model(ids).logits
    assert (model.merge_and_unload()(ids).logits - expected).abs().max() < 1e-5


def test_a_plain_lora_needs_no_expert(on, ids):
    model = on("llama", use_moe_routing=False, num_experts=1)
    expected = model(ids).logits
    assert (model.merge_and_unload()(ids).logits - expected).abs().max() < 1e-5


def test_a_retired_expert_has_no_weight(on, ids):
    model = on("llama")
    model.experts.retire(1)
    with pytest.raises(ValueError, match="expert_1 is retired: its weight must be 0"):
        model.merge_and_unload(weights=SHARES)
    with pytest.raises(ValueError, match="no expert 1, only"):
        model.merge_and_unload(expert=1)
    weights = (0.6, 0.0, 0.4)
    expected = routed(model, ids, weights)
    assert (model.merge_and_unload(weights=weights)(ids).logits - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.5), "one value for each of the 3 experts"),
        ((0.5, -0.5, 1.0), "finite and at least 0"),
        ((0.5, float("nan"), 1.0), "finite and at least 0"),
        ((0.0, 0.0, 0.0), "all weights are 0"),
    ],
)
def test_weights_that_cannot_be_gates_are_refused(weights, message, on):
    with pytest.raises(ValueError, match=message):
        on("llama").merge_and_unload(weights=weights)


def test_an_expert_and_weights_at_once_are_refused(on):
    with pytest.raises(ValueError, match="not both"):
        on("llama").merge_and_unload(expert=0, weights=SHARES)


def test_a_weight_that_another_module_shares_is_refused(llama, mixture):
    base = llama()
    first, second = (layer.self_attn for layer in base.model.layers)
    second.q_proj.weight = first.q_proj.weight
    with pytest.raises(ValueError, match="q_proj is tied to that of another module"):
        mixture(base).merge_and_unload(expert=0)

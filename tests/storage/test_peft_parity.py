"""What peft computes from our files is what we compute: experts, plain LoRA, constant mixtures."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from dylora.storage.peft_config import adapter_config, scaling_of
from dylora.storage.peft_format import PeftAdapter, read_adapter, write_adapter

FAMILIES = ("llama", "gemma", "qwen3", "gpt2", "gpt_neox", "phi3", "falcon")
# RMSNorm and rotary embeddings work in float32 even in a float64 model; LayerNorm does not.
FLOAT64_TOLERANCE = {"gpt2": 1e-12, "falcon": 1e-12, "gpt_neox": 1e-12}
# peft reads `is_gradient_checkpointing`, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def lora_paths(peft_model):
    """Paths of the modules that peft has adapted, as the base calls them."""
    modules = peft_model.base_model.model.named_modules()
    return [path for path, module in modules if isinstance(module, LoraLayer)]


@torch.no_grad()
def difference(mixture, weights, peft_model, tokens):
    """Largest difference of logits, after a check that the adapter does anything at all."""
    ours = mixture(tokens, routing_weights=weights).logits
    with mixture.disable_adapters():
        base = mixture(tokens).logits
    assert (ours - base).abs().max() > 0.1, "an adapter without effect proves nothing"
    return (ours - peft_model(tokens).logits).abs().max().item()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_hot_routing_equals_that_expert_in_peft(
    family, use_rslora, tiny_base, mixture_on, in_peft, one_hot, tokens, tmp_path
):
    base = tiny_base(family)
    mixture = mixture_on(base, use_rslora=use_rslora)
    mixture.save_pretrained(tmp_path / "saved")
    for expert in (0, 1):
        adapted = in_peft(base, tmp_path / "saved" / "peft_adapters" / f"expert_{expert}")
        assert difference(mixture, one_hot(expert), adapted, tokens) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_one_hot_routing_equals_that_expert_in_peft_in_float64(
    family, tiny_base, mixture_on, in_peft, one_hot, tokens, tmp_path
):
    base = tiny_base(family).double()
    mixture = mixture_on(base, r=4, lora_alpha=6, use_rslora=True)  # a scale of exactly 3
    mixture.save_pretrained(tmp_path / "saved")
    adapted = in_peft(base, tmp_path / "saved" / "peft_adapters" / "expert_1")
    assert difference(mixture, one_hot(1), adapted, tokens) < FLOAT64_TOLERANCE.get(family, 1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adapts_the_projections_that_we_adapt(
    family, tiny_base, mixture_on, in_peft, tmp_path
):
    base = tiny_base(family)
    mixture = mixture_on(base)
    mixture.save_pretrained(tmp_path / "saved")
    adapted = in_peft(base, tmp_path / "saved" / "peft_adapters" / "expert_0")
    assert lora_paths(adapted) == list(mixture.mixture.adapters)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"layers_to_transform": [1]}),
        ("llama", {"target_modules": ["q_proj", "down_proj"]}),
        ("llama", {"exclude_modules": ["0.self_attn.q_proj"]}),
        ("gpt2", {"target_modules": ["c_proj"]}),
        ("gpt2", {"target_modules": ["mlp.c_proj"]}),
    ],
)
def test_peft_adapts_a_selection_of_projections_as_we_do(
    family, settings, tiny_base, mixture_on, in_peft, tmp_path
):
    base = tiny_base(family)
    mixture = mixture_on(base, **settings)
    mixture.save_pretrained(tmp_path / "saved")
    adapted = in_peft(base, tmp_path / "saved" / "peft_adapters" / "expert_0")
    assert lora_paths(adapted) == list(mixture.mixture.adapters)


def test_layers_one_and_eleven_are_told_apart(tiny_base, mixture_on, in_peft, tmp_path):
    base = tiny_base("llama", num_hidden_layers=12)
    mixture = mixture_on(base, layers_to_transform=[1])
    mixture.save_pretrained(tmp_path / "saved")
    adapted = in_peft(base, tmp_path / "saved" / "peft_adapters" / "expert_0")
    assert lora_paths(adapted) == list(mixture.mixture.adapters)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_finds_every_tensor_and_no_other(family, tiny_base, mixture_on, in_peft, tmp_path):
    base = tiny_base(family)
    mixture_on(base).save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / "peft_adapters"
    adapted = in_peft(base, folder / "expert_0", "expert_0")
    result = adapted.load_adapter(folder / "expert_1", adapter_name="expert_1")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def test_experts_live_side_by_side_in_one_peft_model(
    tiny_base, mixture_on, in_peft, one_hot, tokens, tmp_path
):
    base = tiny_base("llama")
    mixture = mixture_on(base)
    mixture.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / "peft_adapters"
    adapted = in_peft(base, folder / "expert_0", "expert_0")
    adapted.load_adapter(folder / "expert_1", adapter_name="expert_1")
    for expert in (1, 0):
        adapted.set_adapter(f"expert_{expert}")
        assert difference(mixture, one_hot(expert), adapted, tokens) < 1e-5


def test_transformers_loads_base_and_expert_from_the_adapter_folder(
    tiny_base, mixture_on, one_hot, tokens, tmp_path
):
    tiny_base("llama").save_pretrained(tmp_path / "base")
    mixture = mixture_on(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    mixture.save_pretrained(tmp_path / "saved")
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "saved/peft_adapters/expert_1")
    assert difference(mixture, one_hot(1), adapted, tokens) < 1e-5


# Plain LoRA, trained


def plain_pair(base, mixture_on, use_rslora):
    """The same plain LoRA by us and by peft, same A and B, on the same base in float64."""
    ours = mixture_on(base, use_moe_routing=False, num_experts=1, use_rslora=use_rslora)
    settings = LoraConfig(
        r=ours.config.r,
        lora_alpha=ours.config.lora_alpha,
        use_rslora=use_rslora,
        target_modules=list(ours.mixture.adapters),
        fan_in_fan_out=base.config.model_type == "gpt2",
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(copy.deepcopy(base), settings, autocast_adapter_dtype=False)
    with torch.no_grad():
        for path, (A, B) in ours.expert_weights(0).items():
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
    return ours, theirs


def labels_for(tokens):
    labels = tokens.clone()
    labels[0, :4] = -100
    return labels


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_plain_lora_has_the_loss_of_peft(family, use_rslora, tiny_base, mixture_on, tokens):
    ours, theirs = plain_pair(tiny_base(family), mixture_on, use_rslora)
    labels = labels_for(tokens)
    expected = theirs(tokens, labels=labels).loss
    torch.testing.assert_close(ours(tokens, labels=labels).loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_plain_lora_has_the_gradients_of_peft(family, use_rslora, tiny_base, mixture_on, tokens):
    ours, theirs = plain_pair(tiny_base(family), mixture_on, use_rslora)
    labels = labels_for(tokens)
    ours(tokens, labels=labels).loss.backward()
    theirs(tokens, labels=labels).loss.backward()
    for path, adapter in ours.mixture.adapters.items():
        layer = theirs.base_model.model.get_submodule(path)
        for grad, expected in (
            (adapter.stacks[0].lora_A.grad[0], layer.lora_A["default"].weight.grad),
            (adapter.stacks[0].lora_B.grad[0].T, layer.lora_B["default"].weight.grad),
        ):
            assert expected.abs().max() > 1e-3, path
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


def test_a_plain_lora_trains_as_in_peft(tiny_base, mixture_on, tokens):
    ours, theirs = plain_pair(tiny_base("llama"), mixture_on, use_rslora=False)
    losses = []
    for model in (ours, theirs):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        seen = []
        for _ in range(6):
            loss = model(tokens, labels=tokens).loss
            seen.append(loss.item())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(seen)
    assert losses[0][-1] < losses[0][0] - 0.1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


# Constant mixtures


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_constant_mixture_is_one_lora_of_the_summed_rank_in_peft(
    family, use_rslora, tiny_base, mixture_on, in_peft, tokens, tmp_path
):
    base = tiny_base(family)
    mixture = mixture_on(base, use_rslora=use_rslora)
    mixture.save_pretrained(tmp_path / "saved")
    shares = (0.3, 0.7)
    experts = [
        read_adapter(tmp_path / "saved" / "peft_adapters" / f"expert_{expert}") for expert in (0, 1)
    ]
    factors = [w * scaling_of(e.config) for w, e in zip(shares, experts, strict=True)]
    concat = {}
    for path in experts[0].weights:
        pairs = [expert.weights[path] for expert in experts]
        A = torch.cat([s * pair[0] for s, pair in zip(factors, pairs, strict=True)], dim=0)
        B = torch.cat([pair[1] for pair in pairs], dim=1)
        concat[path] = (A, B)
    first = experts[0].config
    config = adapter_config(
        r=6,
        lora_alpha=6,
        target_modules=first["target_modules"],
        base_model_name_or_path=None,
        fan_in_fan_out=first["fan_in_fan_out"],
    )
    write_adapter(tmp_path / "joined", PeftAdapter(config, concat))
    weights = torch.tensor([shares, shares])
    adapted = in_peft(base, tmp_path / "joined")
    assert difference(mixture, weights, adapted, tokens) < 1e-5

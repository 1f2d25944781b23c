"""A mixture answers as transformers' and PEFT's models do."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.utils import ModelOutput

from dylora import DyLoRA_MoE, MoELoraConfig

# peft 0.21 reads an attribute that transformers 5.23 deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
]


def test_its_outputs_are_those_of_transformers(mixture, ids):
    model = mixture()
    output = model(ids, labels=ids, use_cache=True, output_hidden_states=True)
    assert isinstance(output, ModelOutput)
    assert output["logits"] is output.logits
    assert output[0] is output.loss
    theirs = model.base(ids, use_cache=True, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], theirs.hidden_states[-1])
    following = model(ids[:, :1], past_key_values=output.past_key_values)
    whole = model(torch.cat([ids, ids[:, :1]], 1))
    torch.testing.assert_close(following.logits[:, -1], whole.logits[:, -1])
    assert model(ids).past_key_values is None
    assert model(ids).loss is None


def test_attentions_are_passed_on(llama, ids):
    base = llama(attn_implementation="eager")
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=2, r=2))
    assert [tuple(a.shape) for a in model(ids, output_attentions=True).attentions] == [
        (2, 4, 7, 7)
    ] * 2


def test_embeddings_give_what_their_ids_give(mixture, ids):
    model = mixture()
    embedded = model.get_input_embeddings()(ids)
    by_ids, by_embeddings = model(ids, labels=ids), model(inputs_embeds=embedded, labels=ids)
    torch.testing.assert_close(by_embeddings.logits, by_ids.logits)
    torch.testing.assert_close(by_embeddings.loss, by_ids.loss)
    weights = torch.tensor([[0.2, 0.3, 0.5]]).expand(2, -1)
    torch.testing.assert_close(
        model(inputs_embeds=embedded, routing_weights=weights).logits,
        model(ids, routing_weights=weights).logits,
    )


def test_it_has_the_attributes_of_a_transformers_model(mixture):
    model = mixture()
    base = model.base
    assert (model.device, model.dtype) == (base.device, base.dtype)
    assert model.num_parameters() == sum(p.numel() for p in base.parameters())
    assert model.num_parameters(only_trainable=True) == model.count_parameters()[0]
    assert model.get_output_embeddings() is base.lm_head
    assert model.generation_config is base.generation_config
    model.generation_config = transformers.GenerationConfig(max_new_tokens=3)
    assert base.generation_config.max_new_tokens == 3


def test_trainable_parameters_are_printed_as_peft_prints_them(llama, mixture, capsys):
    model = mixture(llama(), use_moe_routing=False)
    model.print_trainable_parameters()
    ours = capsys.readouterr().out
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    theirs = get_peft_model(llama(), LoraConfig(r=2, target_modules=names))
    theirs.print_trainable_parameters()
    assert ours == capsys.readouterr().out
    assert model.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def test_pefts_verbs_mean_the_same(mixture, ids):
    model = mixture()
    with model.disable_adapter():
        assert model(ids).routing is None
    assert model.get_base_model() is model.base
    model.set_adapter("expert_1")
    assert [row.enabled for row in model.experts.table] == [False, True, False]
    model.set_adapter(["expert_0", 2])
    assert [row.enabled for row in model.experts.table] == [True, False, True]
    with pytest.raises(ValueError, match="no expert 'sql': there are expert_0, expert_1, expert_2"):
        model.set_adapter("sql")


def test_checkpointing_by_the_methods_of_transformers_gives_the_same_gradients(mixture, ids):
    gradients = []
    for enable in ("", "enable_checkpointing", "gradient_checkpointing_enable"):
        model = mixture().train()
        if enable:
            getattr(model, enable)()
            assert model.base.is_activation_checkpointing
        own = [p for _, p in model.own_parameters()]
        gradients.append(torch.autograd.grad(model(ids, labels=ids).loss, own))
    for plain, ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(plain, ours)
        assert torch.equal(plain, theirs)


def test_the_old_name_of_the_named_parameters_of_experts_is_deprecated(mixture):
    model = mixture()
    with pytest.warns(FutureWarning, match=r"use named_expert_parameters\(\)"):
        found = list(model.expert_parameters())
    assert [name for name, _ in found] == [name for name, _ in model.named_expert_parameters()]


# Making one


def test_from_base_takes_fields_of_the_configuration():
    model = DyLoRA_MoE.from_base("tiny-code-llama", r=2, num_experts=3, dtype="bfloat16")
    assert (model.config, model.dtype) == (MoELoraConfig(r=2, num_experts=3), torch.bfloat16)
    config = MoELoraConfig(r=2, num_experts=3)
    model = DyLoRA_MoE.from_base("tiny-code-llama", config, r=4, dtype="auto")
    assert (model.config.r, model.config.num_experts) == (4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_expert": 3}, "no option 'num_expert'; did you mean 'num_experts'"),
        ({"dtype": "float99"}, "dtype is 'float99', but must be one of torch"),
        ({"device": "cpu", "device_map": "auto"}, "both given: leave out device"),
        ({"r": 0}, "r is 0"),
    ],
)
def test_a_wrong_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        DyLoRA_MoE.from_base("tiny-code-llama", **options)


def test_how_to_load_is_refused_for_a_base_that_is_loaded(llama, mixture, tmp_path):
    with pytest.raises(ValueError, match="dtype is given, but the base is a model"):
        DyLoRA_MoE.from_base(llama(), dtype=torch.bfloat16)
    mixture().save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="device is given, but the base is a model"):
        DyLoRA_MoE.from_pretrained(tmp_path / "saved", llama(), device="cpu")


DISK = {"model.layers.0": "disk"} | dict.fromkeys(
    ("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
)


@pytest.mark.parametrize("device_map", ["cpu", "auto", DISK], ids=["cpu", "auto", "disk"])
def test_a_base_that_is_placed_by_a_device_map_trains_generates_and_loads(
    llama, ids, tmp_path, device_map
):
    llama().save_pretrained(tmp_path / "base")
    results = []
    for options in ({}, {"device_map": device_map, "offload_folder": tmp_path / "offloaded"}):
        torch.manual_seed(5)
        model = DyLoRA_MoE.from_base(str(tmp_path / "base"), r=2, num_experts=3, **options)
        for _, parameter in model.own_parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(tmp_path / f"saved{len(results)}")
        with torch.no_grad():
            again = DyLoRA_MoE.from_pretrained(tmp_path / f"saved{len(results)}", **options)
            logits = again(ids).logits
            assert torch.equal(logits, model(ids).logits)
        tokens = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        gradients = [parameter.grad for _, parameter in model.own_parameters()]
        results.append([logits, tokens, *gradients])
    assert any(p.is_meta for p in model.base.parameters()) == (device_map is DISK)
    assert not any(p.is_meta for _, p in model.own_parameters())
    for plain, placed in zip(*results, strict=True):
        torch.testing.assert_close(placed, plain)


def test_all_linear_adapts_what_peft_adapts(llama, gpt2):
    for base in (llama(), gpt2()):
        theirs = get_peft_model(
            type(base)(base.config), LoraConfig(r=2, target_modules="all-linear")
        )
        expected = {
            name.removeprefix("base_model.model.").partition(".lora_A")[0]
            for name, _ in theirs.named_parameters()
            if "lora_A" in name
        }
        model = DyLoRA_MoE.from_base(base, r=2, num_experts=2, target_modules="all-linear")
        assert set(model.mixture.adapters) == expected


def test_targets_may_be_a_set(llama):
    model = DyLoRA_MoE.from_base(llama(), r=2, target_modules={"v_proj", "q_proj"})
    assert model.config.target_modules == ["q_proj", "v_proj"]
    assert len(model.mixture.adapters) == 4

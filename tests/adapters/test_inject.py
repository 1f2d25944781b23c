"""Which projections are found, what is put on them, and that it comes off without a trace."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.adapters.projection import StackedLoRA
from dylora.adapters.targets import find_targets, shortest_targets
from dylora.adapters.trace import trace_base
from families import SPLIT


def targets_of(base, **settings):
    return find_targets(base, MoELoraConfig(**settings), trace_base(base))


def hooks_of(base):
    """Paths of the modules with hooks, and how many they have."""
    return {
        path: (len(module._forward_pre_hooks), len(module._forward_hooks))
        for path, module in base.named_modules()
        if module._forward_pre_hooks or module._forward_hooks
    }


# Selection


def test_attention_projections_are_found_and_nothing_else(llama):
    assert {path.split(".", 3)[3] for path in targets_of(llama())} == {
        f"self_attn.{name}" for name in SPLIT
    }


def test_the_mlp_of_gpt2_is_left_alone_though_its_projection_is_called_alike(gpt2):
    assert not [path for path in targets_of(gpt2()) if "mlp" in path]


def test_target_modules_choose_by_the_end_of_the_path(llama):
    chosen = targets_of(llama(), target_modules=["q_proj", "1.mlp.up_proj"])
    assert chosen == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_a_target_is_whole_words_of_the_path(llama):
    with pytest.raises(ValueError, match="'proj' matches nothing"):
        targets_of(llama(), target_modules=["proj"])


def test_exclude_modules_take_away_by_the_end_of_the_path(llama):
    chosen = targets_of(llama(), exclude_modules=["o_proj", "0.self_attn.q_proj"])
    assert [path[len("model.layers.") :] for path in chosen] == [
        *("0.self_attn.k_proj", "0.self_attn.v_proj"),
        *("1.self_attn.q_proj", "1.self_attn.k_proj", "1.self_attn.v_proj"),
    ]


def test_layers_to_transform_choose_layers(llama):
    chosen = targets_of(llama(num_hidden_layers=3), layers_to_transform=[0, 2])
    assert sorted({int(path.split(".")[2]) for path in chosen}) == [0, 2]


def test_a_target_that_matches_nothing_is_an_error_naming_the_nearest(llama):
    with pytest.raises(ValueError, match=r"'q_porj' matches nothing; did you mean 'q_proj'\?"):
        targets_of(llama(), target_modules=["v_proj", "q_porj"])


def test_an_exclusion_that_matches_nothing_is_an_error_naming_the_nearest(llama):
    with pytest.raises(ValueError, match=r"exclude_modules: 'q_porj' .*did you mean 'q_proj'\?"):
        targets_of(llama(), exclude_modules=["q_porj"])


def test_a_layer_that_does_not_exist_is_an_error(llama):
    with pytest.raises(ValueError, match=r"layers_to_transform: layers \[2, 7\] adapt nothing"):
        targets_of(llama(), layers_to_transform=[0, 2, 7])


def test_nothing_to_adapt_is_an_error_that_lists_candidates(llama):
    with pytest.raises(ValueError, match="set target_modules to some of down_proj, gate_proj"):
        targets_of(llama(), exclude_modules=SPLIT)


def test_a_projection_outside_any_block_is_an_error(llama):
    with pytest.raises(ValueError, match=r"'lm_head'.* lie at the root"):
        DyLoRA_MoE.from_base(llama(), MoELoraConfig(target_modules=["lm_head"]))


def test_an_error_of_selection_leaves_the_base_as_it_was(llama):
    base = llama()
    with pytest.raises(ValueError, match="matches nothing"):
        DyLoRA_MoE.from_base(base, MoELoraConfig(target_modules=["nothing"]))
    assert not hooks_of(base)
    assert all(parameter.requires_grad for parameter in base.parameters())


# What is put on


def test_attention_and_mlp_are_sites_of_their_own(mixture):
    model = mixture(target_modules=["q_proj", "v_proj", "down_proj"])
    assert model.site_names == [
        *("model.layers.0.self_attn", "model.layers.0.mlp"),
        *("model.layers.1.self_attn", "model.layers.1.mlp"),
    ]


def test_an_mlp_site_routes_on_the_hidden_state_that_enters_it(mixture, ids):
    model = mixture(target_modules=["down_proj"], routing_mode="dense")
    entering = []
    mlp = model.base.get_submodule("model.layers.0.mlp")
    mlp.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
    routing = model(ids).routing
    expected = (mlp.dylora_router.score(entering[0]) / 2.0).softmax(-1)
    assert torch.equal(routing.gates[:, :, 0], expected)


def test_only_experts_and_routers_are_trainable(mixture):
    model = mixture(fresh=True)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    ours = [*model.named_expert_parameters(), *model.router_parameters()]
    assert trainable == {id(parameter) for _, parameter in ours}


def test_the_base_keeps_its_class_and_parameter_names(llama):
    base = llama()
    names, kind = dict(base.named_parameters()), type(base)
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(r=2))
    kept = {name: p for name, p in model.base.named_parameters() if "dylora" not in name}
    assert {name: id(p) for name, p in kept.items()} == {n: id(p) for n, p in names.items()}
    assert type(model.base) is kind


def test_experts_are_as_wide_as_their_projection(mixture, llama):
    model = mixture(target_modules=["q_proj", "k_proj", "down_proj"])
    shapes = {
        path.rpartition(".")[2]: (
            tuple(adapter.stacks[0].lora_A.shape),
            tuple(adapter.stacks[0].lora_B.shape),
        )
        for path, adapter in model.mixture.adapters.items()
    }
    assert shapes == {
        "q_proj": ((3, 2, 32), (3, 2, 32)),
        "k_proj": ((3, 2, 32), (3, 2, 16)),  # two key heads of four
        "down_proj": ((3, 2, 40), (3, 2, 32)),
    }


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4 / 9), (True, 4 / 3)])
def test_scale_is_alpha_over_the_rank_or_its_root(mixture, use_rslora, scale):
    model = mixture(r=9, lora_alpha=4, use_rslora=use_rslora)
    for adapter in model.mixture.adapters.values():
        torch.testing.assert_close(adapter.stacks[0].scaling_E, torch.full((3,), scale))


def test_shared_scope_has_one_router_at_the_first_site(mixture):
    names = [name for name, _ in mixture(router_scope="shared").router_parameters()]
    assert {name.rpartition(".outer")[0] for name in names} == {"model.layers.0.self_attn"}


def test_shared_scope_gives_every_site_the_gates_of_the_first(mixture, ids):
    routing = mixture(router_scope="shared")(ids).routing
    assert torch.equal(routing.gates[:, :, 1], routing.gates[:, :, 0])


def test_site_scope_gives_every_site_gates_of_its_own(mixture, ids):
    routing = mixture()(ids).routing
    assert (routing.gates[:, :, 1] != routing.gates[:, :, 0]).any()


def test_fixed_routing_is_uniform_by_default(mixture, ids):
    gates = mixture(router_type="fixed")(ids).routing.gates
    torch.testing.assert_close(gates, torch.full((2, 7, 2, 3), 1 / 3))


def test_fixed_routing_takes_the_given_weights(mixture, ids):
    gates = mixture(router_type="fixed", fixed_routing_weights=[0.5, 0.0, 0.25])(ids).routing.gates
    assert torch.equal(gates, torch.tensor([0.5, 0.0, 0.25]).expand(2, 7, 2, 3))


def test_fixed_routing_has_no_routers(mixture):
    assert not list(mixture(router_type="fixed").router_parameters())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluating"])
def test_what_is_added_is_in_the_mode_of_its_base(llama, training):
    """Else dropout is on in a model whose base was handed over in evaluation mode."""
    base = llama().train(training)
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(r=2, lora_dropout=0.5))
    added = [module for name, module in base.named_modules() if "dylora" in name]
    assert {module.training for module in [model, *added]} == {training}


# Plain LoRA


def plain(base, **settings):
    return DyLoRA_MoE.from_base(
        base, MoELoraConfig(use_moe_routing=False, r=2, lora_alpha=4, **settings)
    ).eval()


def test_without_routing_one_expert_is_built_and_no_router(llama):
    model = plain(llama())
    assert {len(p) for _, p in model.named_expert_parameters()} == {1}
    assert not list(model.router_parameters())


def test_without_routing_the_model_is_the_base_with_merged_weights(llama, ids):
    model, merged = plain(llama()), llama()
    with torch.no_grad():
        for path, adapter in model.mixture.adapters.items():
            nn.init.normal_(adapter.stacks[0].lora_B, std=0.2)
            merged.get_submodule(path).weight += (
                2.0 * adapter.stacks[0].lora_B[0].T @ adapter.stacks[0].lora_A[0]
            )
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
    assert (model(ids).logits - llama()(ids).logits).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:use_moe_routing is false:UserWarning")
def test_without_routing_fixed_weights_do_nothing(llama, ids):
    settings = {"router_type": "fixed", "num_experts": 2, "fixed_routing_weights": [0.3, 0.7]}
    assert torch.equal(plain(llama(), **settings)(ids).routing.gates, torch.ones(2, 7, 2, 1))


# Taking it off


def test_unload_restores_modules_hooks_and_parameter_names(llama):
    base = llama()
    before = (
        [(path, type(module)) for path, module in base.named_modules()],
        list(base.state_dict()),
    )
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(r=2))
    assert hooks_of(base)
    after = model.unload()
    assert after is base
    assert not hooks_of(base)
    modules = [(path, type(module)) for path, module in base.named_modules()]
    assert (modules, list(base.state_dict())) == before


def test_unload_restores_the_methods_of_the_base(llama, tmp_path):
    base = llama()
    attributes = set(vars(base))
    DyLoRA_MoE.from_base(base, MoELoraConfig(r=2)).unload().save_pretrained(tmp_path)
    assert set(vars(base)) == attributes


def test_unload_restores_logits_bit_for_bit_after_training(llama, mixture, ids):
    base = llama()
    before = base(ids).logits
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(r=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    assert (model(ids).logits - before).abs().max() > 0.1
    assert torch.equal(model.unload()(ids).logits, before)


def test_an_unloaded_base_can_be_injected_again(mixture, ids):
    base = mixture().unload()
    assert torch.equal(mixture(base, fresh=True)(ids).logits, base(ids).logits)


def test_a_second_injection_is_refused(mixture):
    with pytest.raises(ValueError, match="already carries adapters"):
        DyLoRA_MoE.from_base(mixture().base, MoELoraConfig(r=2))


def test_a_refused_second_injection_leaves_the_first_as_it_was(mixture, ids):
    model = mixture()
    before, hooks = model(ids).logits, hooks_of(model.base)
    with pytest.raises(ValueError, match="already carries adapters"):
        DyLoRA_MoE.from_base(model.base, MoELoraConfig(r=2))
    assert hooks_of(model.base) == hooks
    assert torch.equal(model(ids).logits, before)


# Copies


def test_a_copy_of_an_injected_base_reads_its_own_sites(mixture, ids):
    model = mixture()
    before = model(ids).logits.detach()
    with torch.no_grad():
        model(ids)
        other = copy.deepcopy(model.base)
        for module in other.modules():
            if isinstance(module, StackedLoRA):
                module.stacks[0].lora_B.zero_()
        other(ids.flip(0))
    assert torch.equal(model(ids).logits, before)
    with model.disable_adapters():
        unadapted = model.base(ids).logits
    assert torch.equal(other(ids).logits, unadapted)


def test_a_copy_computes_what_the_original_computes(mixture, ids):
    model = mixture()
    assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_unloading_a_copy_leaves_the_original_adapted(mixture, ids):
    model = mixture()
    expected = model(ids).logits.detach()
    with torch.no_grad():
        model(ids)
    other = copy.deepcopy(model)
    assert not hooks_of(other.unload())
    assert torch.equal(model(ids).logits, expected)


def test_a_model_can_be_copied_after_a_pass_with_gradient(mixture, ids):
    """The decision that a site still holds is part of a graph, which cannot be copied."""
    model = mixture()
    expected = model(ids, labels=ids).logits
    assert torch.equal(copy.deepcopy(model)(ids).logits, expected)


# PEFT's names of what is adapted


def matched(base, targets):
    """What PEFT adapts: projections whose path is a target or ends with it."""
    return [
        path
        for path, module in base.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if any(path == target or path.endswith("." + target) for target in targets)
    ]


def test_shortest_targets_of_llama_are_the_names_of_its_projections(llama):
    base = llama()
    assert shortest_targets(base, targets_of(base)) == sorted(SPLIT)


def test_shortest_targets_of_gpt2_do_not_catch_its_mlp(gpt2):
    base = gpt2()
    assert shortest_targets(base, targets_of(base)) == ["attn.c_proj", "c_attn"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["0.attn.c_proj"]},
        {"target_modules": ["mlp.c_proj", "c_attn"]},
        {"target_modules": ["h.1.mlp.c_fc"]},
        {"target_modules": ["c_proj"], "exclude_modules": ["11.mlp.c_proj"]},
    ],
)
def test_shortest_targets_name_exactly_the_chosen_projections(gpt2, settings):
    base = gpt2(n_layer=12)  # layer 1 and layer 11 end alike
    chosen = targets_of(base, **settings)
    assert matched(base, shortest_targets(base, chosen)) == chosen


def test_shortest_targets_are_the_same_once_adapters_are_on(gpt2, mixture):
    model = mixture(gpt2())
    assert shortest_targets(model.base, list(model.mixture.adapters)) == ["attn.c_proj", "c_attn"]


# What a base may be


def test_an_encoder_decoder_is_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    base = T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes))
    with pytest.raises(ValueError, match="is an encoder and a decoder"):
        DyLoRA_MoE.from_base(base, MoELoraConfig(target_modules=["q"]))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_base_with_layers_of_peft_is_refused_and_unchanged(llama, ids):
    from peft import LoraConfig, get_peft_model

    base = llama()
    get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    before = list(base.state_dict())
    with pytest.raises(ValueError, match="is a layer of PEFT: give the model without"):
        DyLoRA_MoE.from_base(base, MoELoraConfig())
    assert list(base.state_dict()) == before


def test_the_output_of_a_mamba_block_is_refused(random_base):
    sizes = {"hidden_size": 32, "vocab_size": 64, "num_hidden_layers": 2, "num_heads": 8}
    sizes |= {"head_dim": 8, "n_groups": 1, "state_size": 8, "expand": 2}
    base = random_base("Mamba2Config", **sizes)
    with pytest.raises(ValueError, match="is the output of a Mamba block"):
        DyLoRA_MoE.from_base(base, MoELoraConfig(target_modules=["out_proj"]))


MOE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
MOE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}


def test_experts_of_a_base_in_one_tensor_are_refused_by_name(random_base):
    base = random_base("MixtralConfig", **MOE, num_local_experts=4)
    with pytest.raises(ValueError, match="'gate_up_proj' holds all experts of the base in one"):
        DyLoRA_MoE.from_base(base, MoELoraConfig(target_modules=["gate_up_proj"]))


SHARED = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


def test_shared_experts_whose_tokens_lie_in_one_row_are_routed_by_sequence(random_base, ids):
    base = random_base("Qwen2MoeConfig", **MOE, **SHARED)
    targets = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=3, target_modules=targets)).eval()
    for name, parameter in model.named_expert_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.2)
    output = model(ids, labels=ids)
    assert output.routing.gates.shape == (*ids.shape, 2, 3)
    output.loss.backward()
    rows = torch.cat([model(row[None]).logits for row in ids])
    torch.testing.assert_close(output.logits, rows)
    assert all(p.grad is not None for _, p in model.own_parameters())


@pytest.fixture
def nested(random_base):
    """A mixture of which some blocks lie in others: the shared expert in the MLP with its gate."""
    base = random_base("Qwen2MoeConfig", **MOE, **SHARED)
    config = MoELoraConfig(num_experts=3, r=2, target_modules="all-linear")
    model = DyLoRA_MoE.from_base(base, config).eval()
    assert "model.layers.0.mlp.shared_expert_gate" in model.mixture.adapters
    for name, parameter in model.named_expert_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_a_block_within_another_leaves_a_pass_of_that_to_it(nested, ids):
    seen, mlp = [], nested.base.model.layers[0].mlp
    handle = mlp.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    nested(ids)
    handle.remove()
    [(x, expected)] = seen
    torch.testing.assert_close(mlp(x), expected)
    assert nested.mixture.state.current() is None


def test_a_block_within_another_is_recomputed_by_a_checkpoint_of_somebody_else(nested, ids):
    gradients, layer = [], nested.base.model.layers[0]
    forward = layer.forward
    for _ in range(2):
        nested(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for _, p in nested.own_parameters()])
        nested.zero_grad()
        layer.forward = partial(checkpoint, forward, use_reentrant=False)
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)

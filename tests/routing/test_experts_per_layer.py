"""Layers with different numbers of experts (MoLA): the formula, PEFT, files, losses, refusals."""

import copy
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.evaluation.loading import change_routing
from dylora.evaluation.validate.reference import loop_logits
from dylora.integrations.peft_export import export_mixture
from dylora.routing.losses import BatchTotals
from dylora.routing.metrics import routing_metrics
from dylora.run_config import TrainConfig
from dylora.storage.manifest import write_manifest
from dylora.training.optim import build_optimizer
from dylora.training.validation import SetScore, active_parameters

COUNTS = [2, 4]  # of the two layers of the base
LAYERS = {"num_experts": 4, "experts_per_layer": COUNTS}


@pytest.fixture(params=["dense", "sparse", "maturity"])
def model(request, mixture):
    maturity = [1.0, 0.0, 0.6, 1.0]
    return mixture(maturity=maturity, routing_mode=request.param, **LAYERS)


def gates_of(model, ids):
    return model.get_routing_weights(ids)  # [B, S, N, E]


def test_a_layer_has_the_first_of_the_experts_and_trains_nothing_for_the_others(mixture):
    model, every = mixture(**LAYERS), mixture(num_experts=4)
    for path, adapter in model.mixture.adapters.items():
        count = COUNTS[int(path.split(".")[2])]
        assert [list(stack.experts) for stack in adapter.stacks] == [list(range(count))]
    sizes = [
        sum(p.numel() for n, p in m.named_expert_parameters() if p.requires_grad)
        for m in (model, every)
    ]
    assert sizes[0] == sizes[1] * sum(COUNTS) / 8  # both layers are of one size


def test_logits_are_those_of_the_formula_and_absent_experts_have_no_gate(model, ids):
    gates = gates_of(model, ids)
    assert not gates[:, :, 0, 2:].any()
    assert gates[:, :, 1].bool().any(0).any(0).all()
    expected = loop_logits(model, ids, gates)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_gates_are_the_softmax_over_the_experts_that_a_layer_has(mixture, ids):
    model = mixture(routing_mode="dense", **LAYERS)
    seen = {}

    def keep(module, args, kwargs):
        seen["x"] = args[0] if args else kwargs["hidden_states"]

    block = model.mixture.blocks[0]
    handle = model.base.get_submodule(block.name).register_forward_pre_hook(keep, with_kwargs=True)
    gates = gates_of(model, ids)[:, :, 0]
    handle.remove()
    weight, bias = block.router.outer.weight[:2], block.router.outer.bias[:2]
    expected = ((seen["x"] @ weight.T + bias) / model.config.router_temperature).softmax(-1)
    torch.testing.assert_close(gates[..., :2], expected)


def test_values_and_gradients_are_those_of_a_full_mixture_that_never_chooses_the_absent(
    mixture, ids
):
    settings = {"load_balance_loss_type": "none", "router_z_loss_coef": 0.1, "num_experts": 4}
    model = mixture(experts_per_layer=COUNTS, **settings).train()
    full = mixture(**settings).train()
    with torch.no_grad():
        for (name, own), (_, other) in zip(
            model.router_parameters(), full.router_parameters(), strict=True
        ):
            other.copy_(own)
            if name.endswith("bias") and "layers.0" in name:
                other[2:] = -1e6
        for path, adapter in model.mixture.adapters.items():
            for name, parameter in adapter.stacks[0].named_parameters():
                getattr(full.mixture.adapters[path].stacks[0], name)[: len(parameter)] = parameter
    losses = [m(ids, labels=ids).loss for m in (model, full)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for path, adapter in model.mixture.adapters.items():
        for name, parameter in adapter.stacks[0].named_parameters():
            other = getattr(full.mixture.adapters[path].stacks[0], name).grad
            assert parameter.grad.any()
            torch.testing.assert_close(parameter.grad, other[: len(parameter)])
    for (_, own), (_, other) in zip(
        model.router_parameters(), full.router_parameters(), strict=True
    ):
        torch.testing.assert_close(own.grad, other.grad)


def test_generation_with_a_cache_is_that_without(model, ids):
    given = {"max_new_tokens": 6, "do_sample": False}
    answers = [model.generate(ids, use_cache=cached, **given) for cached in (True, False)]
    assert torch.equal(*answers)


def test_an_even_routing_has_a_balance_loss_of_one(mixture, ids):
    model = mixture(fresh=True, routing_mode="dense", **LAYERS).train()
    for _, parameter in model.router_parameters():
        torch.nn.init.zeros_(parameter)
    # Σ f P times the experts of the block, whatever f is: with ties the first have it all.
    assert model(ids, labels=ids).aux_loss.item() == pytest.approx(1)


def test_before_the_first_step_fractions_are_even_over_those_that_a_layer_has(mixture):
    fractions = mixture(fresh=True, **LAYERS).carried_fractions()["aux_loss"]
    assert fractions.tolist() == [[0.5, 0.5, 0, 0], [0.25] * 4]


def test_capacity_counts_the_experts_of_the_layer(mixture, ids):
    settings = {"router_type": "learned", "top_k_experts": 1, "expert_capacity_factor": 1.0}
    model = mixture(**LAYERS, **settings).train()
    held = (gates_of(model, ids) > 0).sum((0, 1))  # [N, E] tokens
    assert held[0, :2].max() <= 7  # ceil(14 / 2)
    assert held[1].max() <= 4  # ceil(14 / 4)
    assert held[0].max() > 4


def test_an_expert_that_a_layer_has_not_is_not_dead_there(mixture, ids):
    model = mixture(routing_mode="dense", **LAYERS)
    found = model(ids, labels=ids).routing.statistics
    metrics = routing_metrics(found, ["low", "high"], model.mixture.active_NE)
    assert metrics["router/dead_experts/low"] == 0


def test_an_expert_alone_leaves_a_layer_that_has_it_not_to_the_base(mixture, ids):
    model = mixture(**LAYERS)
    model.experts.activate(3)
    gates = gates_of(model, ids)
    assert not gates[:, :, 0].any()
    assert (gates[:, :, 1] == torch.tensor([0.0, 0, 0, 1])).all()
    torch.testing.assert_close(
        model(ids).logits, loop_logits(model, ids, gates), atol=1e-5, rtol=1e-4
    )


def test_a_checkpoint_comes_back_and_peft_reads_each_expert(mixture, llama, in_peft, ids, tmp_path):
    base = llama()
    model = mixture(base, **LAYERS)
    model.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=copy.deepcopy(base)).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert [list(s.experts) for s in again.mixture.blocks[0].adapters["q_proj"].stacks] == [[0, 1]]
    for expert in range(4):
        model.experts.activate(expert)
        stock = in_peft(base, tmp_path / "saved" / "peft_adapters" / f"expert_{expert}")
        ours = model(ids).logits
        torch.testing.assert_close(stock(ids).logits, ours, atol=1e-5, rtol=1e-4)
    weights = [0.5, 0.25, 0.125, 0.125]
    model.experts.activate_all_experts()
    export_mixture(model, tmp_path / "one", weights=weights)
    stock = in_peft(base, tmp_path / "one")
    gates = torch.tensor(weights).expand(2, 7, 2, 4) * model.mixture.active_NE
    torch.testing.assert_close(
        stock(ids).logits, loop_logits(model, ids, gates), atol=1e-4, rtol=1e-4
    )


def test_an_update_where_the_layer_has_no_such_expert_is_refused(mixture, tmp_path, llama):
    base = llama()
    mixture(base, **LAYERS).save_pretrained(tmp_path)
    file = tmp_path / "peft_adapters" / "expert_3" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "layers.0.self_attn.q_proj.lora_B" in n)
    assert not tensors[name].any()
    save_file(tensors | {name: tensors[name] + 1}, file)
    (tmp_path / "manifest.json").unlink()
    write_manifest(tmp_path)
    said = "q_proj has 2 experts by experts_per_layer, so that the update of expert 3 must be 0"
    with pytest.raises(ValueError, match=said):
        DyLoRA_MoE.from_pretrained(tmp_path, base=base)


def test_experts_are_frozen_trained_and_retired_with_their_moments(mixture, ids):
    model = mixture(**LAYERS).train()
    optimizer = build_optimizer(model, TrainConfig(learning_rate=1e-2))
    model.experts.attach_optimizer(optimizer)

    def step():
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    model.experts.freeze(2)
    before = model.mixture.expert_weights(2)
    before = {path: [tensor.clone() for tensor in own] for path, own in before.items()}
    step()
    for path, own in model.mixture.expert_weights(2).items():
        assert all(map(torch.equal, own, before[path])), path
    model.experts.unfreeze(2)
    model.experts.retire(0)
    step()
    held = [list(s.experts) for s in model.mixture.blocks[0].adapters["q_proj"].stacks]
    assert held == [[1]]
    with pytest.raises(ValueError, match=r"the last expert at .*layers\.0.* cannot be retired"):
        model.experts.retire(1)


def test_stacks_are_neither_split_nor_replaced_without_need(mixture):
    model = mixture(**LAYERS)
    before = [id(parameter) for _, parameter in model.named_expert_parameters()]
    model.experts.activate_all_experts()
    assert [id(parameter) for _, parameter in model.named_expert_parameters()] == before
    model.experts.attach_optimizer(build_optimizer(model, TrainConfig()))
    model.experts.freeze(3)
    model.experts.unfreeze(3)
    for block, count in zip(model.mixture.blocks, COUNTS, strict=True):
        stacks = block.adapters["q_proj"].stacks
        assert [list(stack.experts) for stack in stacks] == [list(range(count))]


def test_usage_matures_experts_of_even_routing_together(mixture, ids):
    settings = {"maturity_mode": "usage", "routing_mode": "dense", "maturity": [0.0] * 4}
    model = mixture(**settings, **LAYERS).train()
    for _, parameter in model.router_parameters():
        torch.nn.init.zeros_(parameter)
    for step in range(1, 4):
        model.observe(model(ids, labels=ids), ids, step=step, steps=40)
    maturity = model.maturity.maturity
    assert 0 < maturity[0] < 1
    torch.testing.assert_close(maturity, maturity[:1].expand(4))


@pytest.mark.parametrize(
    "settings",
    [
        {"shared_experts": 1, "top_k_experts": 1},
        {"expert_ranks": [3, 1, 2, 2]},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_it_goes_with_other_options(mixture, llama, ids, tmp_path, settings):
    base = llama()
    model = mixture(base, **LAYERS, **settings)
    gates = gates_of(model, ids)
    assert (gates > 0).any(0).any(0)[:, 3].tolist() == [
        layer == 1 for layer in (int(name.split(".")[2]) for name in model.site_names)
    ]
    logits = model(ids).logits
    torch.testing.assert_close(logits, loop_logits(model, ids, gates), atol=1e-5, rtol=1e-4)
    model.save_pretrained(tmp_path)
    assert torch.equal(DyLoRA_MoE.from_pretrained(tmp_path, base=base)(ids).logits, logits)


def test_without_routers_a_layer_gives_what_it_has_the_weight_of_one_of_all(mixture, ids):
    model = mixture(**LAYERS)
    model.detach_router()
    gates = gates_of(model, ids)
    assert gates[0, 0].tolist() == [[0.25, 0.25, 0, 0], [0.25] * 4]


@pytest.mark.parametrize(
    "weights", [[1, 0, 0, 1], [0.25] * 4, [0, 0, 0.5, 0.5], [0.2, 0.3, 0.5, 1]]
)
def test_constant_weights_are_the_mixture_that_they_are_merged_to(mixture, ids, weights):
    model = mixture(**LAYERS)
    merged = copy.deepcopy(model).merge_and_unload(weights=weights)
    change_routing(model, weights=weights)
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, atol=1e-5, rtol=1e-4)


def test_active_parameters_are_added_up_by_layer(mixture, ids):
    model = mixture(router_type="learned", **LAYERS)
    score = SetScore(1.0, 7, None, torch.tensor([2.0, 2.0]))
    matrices = sum(p.numel() for _, p in model.named_expert_parameters())
    routers = sum(p.numel() for _, p in model.router_parameters())
    used = matrices / sum(COUNTS) * 4  # two experts in each of two layers of one size
    assert active_parameters(model, {"rows": score}) == pytest.approx(routers + used)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"experts_per_layer": [4, 5]}, r"from shared_experts \+ top_k_experts \(2\) to num_exp"),
        ({"experts_per_layer": [1, 4]}, r"from shared_experts \+ top_k_experts \(2\) to num_exp"),
        ({"experts_per_layer": [2, 3]}, "which one has"),
        ({"experts_per_layer": COUNTS, "router_scope": "shared"}, "router_scope"),
        ({"experts_per_layer": COUNTS, "use_dora": True}, "use_dora"),
        ({"experts_per_layer": COUNTS, "router_type": "threshold"}, "router_type"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        MoELoraConfig(num_experts=4, **settings)


def test_as_many_numbers_as_adapted_layers_are_asked_for(mixture):
    said = "experts_per_layer has 3 numbers, but 2 layers are adapted"
    with pytest.raises(ValueError, match=re.escape(said)):
        mixture(num_experts=4, experts_per_layer=[2, 3, 4])


@pytest.mark.parametrize("change", ["create_expert", "merge"])
def test_no_expert_is_created_or_merged(mixture, change):
    model = mixture(**LAYERS)
    given = (0, 1) if change == "merge" else ()
    with pytest.raises(ValueError, match="experts_per_layer says which layer has which"):
        getattr(model.experts, change)(*given)


def test_without_routing_it_does_nothing_and_a_step_is_that_without_it(mixture, ids):
    with pytest.warns(UserWarning, match="these settings do nothing: experts_per_layer"):
        config = MoELoraConfig(use_moe_routing=False, **LAYERS)
    plain = mixture(use_moe_routing=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = mixture(use_moe_routing=False, **LAYERS)
    assert not config.layers_differ
    losses = []
    for one in (plain, model):
        output = one(ids, labels=ids, totals=BatchTotals(fractions=one.carried_fractions()))
        one.observe(output, ids, steps=2)
        losses.append(output.loss)
    assert torch.equal(*losses)

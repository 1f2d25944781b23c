"""LoHa experts: the formula, PEFT's own LoHa, and everything that is done with experts."""

import copy
import json
import warnings

import pytest
import torch
from peft import LoHaConfig, get_peft_model
from safetensors.torch import load_file

import oracles
from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.adapters import loha
from dylora.adapters.block import RoutedBlock
from dylora.adapters.stack import equal_runs
from dylora.integrations.peft_export import export_mixture, export_peft
from dylora.integrations.peft_import import load_peft_experts
from dylora.routing.state import RoutingState
from dylora.run_config import TrainConfig
from dylora.storage.peft_format import read_adapter
from dylora.training.optim import build_optimizer, load_state_by_name, state_by_name
from updates import delta_weight

D, O, E, R = 12, 10, 3, 2  # noqa: E741 - the letters of the design
NAMES = loha.LoHaStack.NAMES


@pytest.fixture
def hada(mixture):
    """A mixture of random LoHa experts on a copy of a base."""

    def build(base=None, *, fresh=False, **settings):
        settings = {"adapter_type": "loha", "r": 3, "lora_alpha": 6} | settings
        model = mixture(base, fresh=fresh, **settings)
        draw = torch.Generator().manual_seed(17)
        with torch.no_grad():
            for _, adapter in model.mixture.adapters.items() if not fresh else ():
                for stack in adapter.stacks:
                    for rows in stack.hada_w2_b:
                        rows.copy_(0.3 * torch.randn(rows.shape, generator=draw))
        return model

    return build


def random_adapter(rank=R, ranks=None):
    """The experts of one projection in float64, random in all matrices, with unequal scales."""
    config = MoELoraConfig(
        num_experts=E, top_k_experts=1, r=rank, lora_alpha=4, adapter_type="loha"
    )
    block = RoutedBlock("block", 0, RoutingState(E), D)
    adapter = loha.StackedLoHa(block, "block.q", D, O, config)
    ranks, alphas = ranks or [rank] * E, [1.0, 2.0, 5.0]
    for run in equal_runs(ranks):
        own = [alphas[expert] for expert in run]
        stack = adapter.create_stack(run[0], ranks[run[0]], own, torch.nn.Linear(D, O))
        adapter.stacks.append(stack)
    adapter.double()
    for stack in adapter.stacks:
        torch.nn.init.normal_(stack.hada_w2_b)
    return adapter


def inputs(tokens=4):
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(tokens, E, dtype=torch.float64, requires_grad=True)
    return x, gates


def oracle_of(adapter, x, gates):
    update = torch.zeros(len(x), O, dtype=x.dtype)
    for stack in adapter.stacks:
        matrices = [getattr(stack, name) for name in NAMES]
        update = update + oracles.loha_update(
            x, *matrices, gates[:, list(stack.experts)], stack.scaling_E
        )
    return update


@pytest.fixture(params=["low rank", "delta weights"])
def way(request, monkeypatch):
    """Either order of the products, whatever the sizes would choose."""
    chosen = request.param == "delta weights"
    monkeypatch.setattr(loha, "multiplies_delta", lambda *sizes: chosen)


def experts_in(model, expert):
    """Copies of one expert's tensors, by projection and name."""
    return {
        (path, name): tensor.clone()
        for path, adapter in model.mixture.adapters.items()
        for name, tensor in adapter.expert_tensors(expert).items()
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def train(model, optimizer, ids, steps=5):
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()


def loha_of_peft(base, folder=None, **settings):
    """A copy of a base with a LoHa that peft made, and its files in `folder`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft 0.21 reads what transformers 5.23 deprecates
        model = get_peft_model(copy.deepcopy(base), LoHaConfig(**settings)).eval()
        if folder is not None:
            model.save_pretrained(folder)
    return model


# The formula


def test_the_update_is_the_formula(way):
    adapter = random_adapter(ranks=[2, 1, 3])
    x, gates = inputs()
    expected = oracle_of(adapter, x, gates)
    assert expected.abs().min() > 0
    torch.testing.assert_close(adapter(x, gates), expected)


@pytest.mark.parametrize("ranks", [[2, 2, 2], [2, 1, 3]])
@pytest.mark.parametrize("leaf", [*NAMES, "x", "gates"])
def test_the_gradients_are_those_of_the_formula(way, leaf, ranks):
    adapter = random_adapter(ranks=ranks)
    x, gates = inputs()
    tensor = {"x": x, "gates": gates}.get(leaf)
    tensor = getattr(adapter.stacks[-1], leaf) if tensor is None else tensor
    weight = torch.randn(len(x), O, dtype=torch.float64)
    [ours] = torch.autograd.grad((adapter(x, gates) * weight).sum(), tensor)
    [expected] = torch.autograd.grad((oracle_of(adapter, x, gates) * weight).sum(), tensor)
    assert expected.abs().min() > 0
    torch.testing.assert_close(ours, expected)


def test_the_cheaper_order_of_products_is_taken():
    assert not loha.multiplies_delta(1000, 16, 2048, 2048)  # rank 256 beside 2048 · 2048 weights
    assert loha.multiplies_delta(1000, 64, 2048, 2048)
    assert not loha.multiplies_delta(1, 16, 2048, 2048)


def test_the_delta_weight_is_what_an_expert_adds():
    adapter = random_adapter()
    one_hot = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).expand(D, -1)
    columns = adapter(torch.eye(D, dtype=torch.float64), one_hot)  # [D, O]
    torch.testing.assert_close(delta_weight(adapter, 2), columns.T)


# On a base


def test_fresh_experts_change_no_bit_of_the_base(hada, llama, ids):
    base = llama()
    assert torch.equal(hada(base, fresh=True)(ids).logits, base(ids).logits)


def test_fresh_experts_are_drawn_as_those_of_peft(hada, llama):
    model = hada(llama(), fresh=True, r=4)
    [stack] = model.mixture.adapters["model.layers.0.self_attn.k_proj"].stacks
    theirs = loha_of_peft(llama(), r=4, target_modules=["k_proj"])
    layer = theirs.base_model.model.model.layers[0].self_attn.k_proj
    for name in NAMES:
        ours, peft = getattr(stack, name), getattr(layer, name)["default"]
        assert ours.abs().max() <= peft.abs().max() * 1.3 + 1e-9, name
        assert ours.abs().max() >= peft.abs().max() * 0.7, name
    assert not torch.equal(stack.hada_w1_a[0], stack.hada_w1_a[1])


@pytest.mark.parametrize("expert", range(3))
def test_a_one_hot_gate_is_pefts_loha_loaded_from_our_files(
    hada, llama, in_peft, ids, tmp_path, expert
):
    base = llama()
    model = hada(base, rank_pattern={"q_proj": 2}, expert_ranks=[3, 1, 3])
    model.save_pretrained(tmp_path)
    gates = torch.nn.functional.one_hot(torch.tensor([expert] * 2), 3).float()
    ours = model(ids, routing_weights=gates).logits
    theirs = in_peft(base, tmp_path / "peft_adapters" / f"expert_{expert}")(ids).logits
    assert (ours - base(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_files_have_the_keys_that_peft_writes(hada, llama, tmp_path):
    base = llama()
    hada(base, target_modules=["q_proj"]).save_pretrained(tmp_path / "ours")
    loha_of_peft(base, tmp_path / "theirs", r=3, target_modules=["q_proj"])
    ours = tmp_path / "ours" / "peft_adapters" / "expert_0"
    shapes = [
        {name: tensor.shape for name, tensor in load_file(f / "adapter_model.safetensors").items()}
        for f in (ours, tmp_path / "theirs")
    ]
    assert shapes[0] == shapes[1]
    kept, made = (
        json.loads((f / "adapter_config.json").read_text()) for f in (ours, tmp_path / "theirs")
    )
    assert kept["peft_type"] == made["peft_type"] == "LOHA"
    assert kept.keys() <= made.keys()


def test_a_loha_made_by_peft_is_ours_with_its_tensors(hada, llama, ids, tmp_path):
    base = llama()
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    theirs = loha_of_peft(base, tmp_path, r=3, alpha=6, target_modules=names, init_weights=False)
    files = read_adapter(tmp_path)
    model = hada(base)
    for path, adapter in model.mixture.adapters.items():
        adapter.load_expert(1, files.tensors(path))
    gates = torch.tensor([[0.0, 1.0, 0.0]] * 2)
    ours = model(ids, routing_weights=gates).logits
    assert (ours - base(ids).logits).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs(ids).logits, rtol=0, atol=1e-5)


def test_cached_decoding_equals_the_full_pass(hada, ids):
    model = hada()
    begun = model.base(ids[:, :-1], use_cache=True)
    last = model.base(ids[:, -1:], past_key_values=begun.past_key_values, use_cache=True)
    torch.testing.assert_close(last.logits[:, 0], model(ids).logits[:, -1], rtol=0, atol=1e-5)


def test_checkpointing_changes_no_gradient(hada, ids):
    model = hada().train()
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.own_parameters()}
    model.base.zero_grad()
    model.enable_checkpointing()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.own_parameters():
        torch.testing.assert_close(parameter.grad, plain[name], rtol=0, atol=1e-7)


# Training and life


def test_10_steps_are_5_and_a_resume_and_5(hada, llama, ids, tmp_path):
    settings = TrainConfig(learning_rate=0.01)
    straight = hada(llama(), fresh=True)
    optimizer = build_optimizer(straight, settings)
    train(straight, optimizer, ids, 10)

    first = hada(llama(), fresh=True)
    optimizer = build_optimizer(first, settings)
    train(first, optimizer, ids)
    first.save_pretrained(tmp_path)
    state = copy.deepcopy(state_by_name(optimizer, first))
    second = DyLoRA_MoE.from_pretrained(tmp_path, llama())
    optimizer = build_optimizer(second, settings)
    load_state_by_name(optimizer, second, state)
    train(second, optimizer, ids)
    for (name, one), (_, other) in zip(
        straight.own_parameters(), second.own_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    assert (straight(ids).logits - llama()(ids).logits).abs().max() > 0.01


def test_every_matrix_is_trained_and_decays(hada, ids):
    model = hada()
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.01, weight_decay=0.1))
    decaying = {id(p) for p in optimizer.param_groups[0]["params"]}
    before = [experts_in(model, expert) for expert in range(3)]
    assert decaying == {id(parameter) for _, parameter in model.named_expert_parameters()}
    train(model, optimizer, ids, 2)
    for expert in range(3):
        now = experts_in(model, expert)
        assert not any(torch.equal(now[key], before[expert][key]) for key in now)


def test_a_frozen_expert_stays_bit_identical(hada, ids):
    model = hada()
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.01, weight_decay=0.1))
    train(model, optimizer, ids)
    model.experts.freeze(1)
    frozen, trained = experts_in(model, 1), experts_in(model, 2)
    train(model, optimizer, ids, 20)
    assert equal(experts_in(model, 1), frozen)
    assert not equal(experts_in(model, 2), trained)


def test_an_expert_created_between_steps_leaves_the_others_and_their_moments(hada, ids):
    model = hada()
    optimizer = build_optimizer(model, TrainConfig(learning_rate=0.01))
    train(model, optimizer, ids)
    before, logits = [experts_in(model, expert) for expert in range(3)], model(ids).logits
    moments = {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_expert_parameters()
    }
    assert model.experts.create_expert(rank=5) == 3
    assert (model(ids).logits - logits).abs().max() < 1e-5
    for expert in range(3):
        assert equal(experts_in(model, expert), before[expert])
    now = dict(model.named_expert_parameters())
    for name, old in moments.items():
        assert equal(optimizer.state[now[name]], old)
    model.experts.freeze(0)  # cuts the stack
    for path, adapter in model.mixture.adapters.items():
        stack, place = adapter.stack_of(2)
        for name in NAMES:
            kept = optimizer.state[getattr(stack, name)]["exp_avg"][place]
            assert torch.equal(kept, moments[f"{path}.experts_0-2.{name}"]["exp_avg"][2])
    model.experts.set_active_expert(3)
    new = experts_in(model, 3)
    train(model, optimizer, ids, 2)
    assert not equal(experts_in(model, 3), new)


def test_a_retired_expert_leaves_compute_and_files(hada, llama, ids, tmp_path):
    model = hada()
    model.experts.retire(1)
    assert (model.get_routing_weights(ids)[..., 1] == 0).all()
    model.save_pretrained(tmp_path)
    assert [p.name for p in sorted((tmp_path / "peft_adapters").iterdir())] == [
        "expert_0",
        "expert_2",
    ]
    loaded = DyLoRA_MoE.from_pretrained(tmp_path, llama())
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_two_experts_cannot_be_merged(hada):
    model = hada()
    with pytest.raises(ValueError, match="'loha' cannot be merged"):
        model.experts.merge(0, 1)
    assert [row.state for row in model.experts.table] == ["active"] * 3


def test_an_expert_merged_into_the_base_computes_the_same(hada, ids):
    model = hada()
    expected = model(ids, routing_weights=torch.tensor([[0.2, 0.5, 0.3]] * 2)).logits
    merged = model.merge_and_unload(weights=[0.2, 0.5, 0.3])
    torch.testing.assert_close(merged(ids).logits, expected, rtol=0, atol=1e-5)


# Files and refusals


def test_an_export_is_a_loha_and_its_other_forms_are_refused(hada, llama, ids, in_peft, tmp_path):
    base = llama()
    model = hada(base)
    [_, folder, _] = export_peft(model, tmp_path / "out")
    alone = model(ids, routing_weights=torch.tensor([[0.0, 1.0, 0.0]] * 2)).logits
    torch.testing.assert_close(in_peft(base, folder)(ids).logits, alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="a LOHA expert has no portable form"):
        export_peft(model, tmp_path / "portable", portable=True)
    with pytest.raises(ValueError, match="expert_0 is a LOHA, and only a mixture of LoRAs"):
        export_mixture(model, tmp_path / "mixture", [0.2, 0.5, 0.3])
    with pytest.raises(ValueError, match="is a LOHA, and only LoRAs are imported"):
        load_peft_experts(llama(), [tmp_path / "out"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_info_names_the_type(hada, tmp_path, capsys):
    from dylora.evaluation.info import print_info

    model = hada()
    model.save_pretrained(tmp_path / "saved")
    export_peft(model, tmp_path / "out")
    print_info(str(tmp_path / "saved"))
    assert "adapters    loha" in capsys.readouterr().out
    print_info(str(tmp_path / "out" / "expert_0"))
    said = capsys.readouterr().out
    assert "LOHA        rank 3, alpha 6" in said
    assert "vLLM        refuses LOHA" in said


def test_a_description_of_another_type_than_the_files_is_refused(hada, mixture, llama, tmp_path):
    hada(r=2, lora_alpha=4).save_pretrained(tmp_path / "saved")
    adapter = tmp_path / "saved" / "peft_adapters" / "expert_0"
    mixture().save_pretrained(tmp_path / "lora")
    model = hada(r=2, lora_alpha=4)
    files = read_adapter(tmp_path / "lora" / "peft_adapters" / "expert_0")
    path = next(iter(model.mixture.adapters))
    with pytest.raises(ValueError, match=f"{path}.hada_w1_a is missing"):
        model.mixture.adapters[path].load_expert(0, files.tensors(path))
    assert read_adapter(adapter).type == "LOHA"


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"share_A": True},
        {"freeze_A": True},
        {"bias": "all"},
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_what_means_nothing_for_loha_is_refused(setting):
    [(name, _)] = setting.items()
    with pytest.raises(ValueError, match=f"^{name} is .* with adapter_type 'loha'$"):
        MoELoraConfig(adapter_type="loha", **setting)


def test_a_projection_that_pefts_loha_does_not_adapt_is_refused(gpt2):
    base = gpt2()
    with pytest.raises(ValueError, match="is a Conv1D, which PEFT's LoHa does not adapt"):
        DyLoRA_MoE.from_base(base, MoELoraConfig(adapter_type="loha"))
    assert not [name for name, _ in base.named_parameters() if "dylora" in name]


def test_a_configuration_without_the_field_is_of_lora():
    values = MoELoraConfig().to_dict()
    del values["adapter_type"]
    assert MoELoraConfig.from_dict(values).adapter_type == "lora"

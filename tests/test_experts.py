"""ExpertManager: what may change between two steps of a live run, and what must not."""

import copy
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dylora import DyLoRA_MoE, ExpertMaturity
from dylora.integrations.peft_export import export_checkpoint

SETTINGS = {
    "maturity": {},
    "top-1": {"top_k_experts": 1},
    "sparse": {"router_type": "learned"},
    "dense": {"routing_mode": "dense"},
    "fixed": {"router_type": "fixed"},
    "MLP router": {"router_hidden_size": 8},
    "shared router": {"router_scope": "shared"},
    "one A": {"share_A": True},
    "A frozen": {"freeze_A": True},
    "dora": {"use_dora": True},
    "ragged": {"expert_ranks": [1, 3, 3]},
}


@pytest.fixture(params=SETTINGS)
def model(request, mixture):
    """A random mixture of three experts, one for each kind of setting."""
    return mixture(**SETTINGS[request.param])


def adamw(model, **settings):
    """An optimizer over everything that is ours, which the experts take along."""
    parameters = [p for _, p in model.own_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, **({"weight_decay": 0.1} | settings))
    model.experts.attach_optimizer(optimizer)
    return optimizer


def train(model, optimizer, ids, steps=3):
    model.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        model.experts.count_step(step, step / steps)
    model.eval()


def rows_of(model, expert):
    """Copies of one expert's rows, by projection and kind."""
    rows = {}
    for path, adapter in model.mixture.adapters.items():
        stack, place = adapter.stack_of(expert)
        for name, parameter in stack.named_parameters():
            rows[path, name] = parameter.detach()[place].clone()
    return rows


def moments_of(model, optimizer, expert):
    """Copies of the rows of an expert's moments."""
    rows = {}
    for path, adapter in model.mixture.adapters.items():
        stack, place = adapter.stack_of(expert)
        for name, parameter in stack.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                rows[path, name, key] = value[place].clone() if value.ndim else value.clone()
    return rows


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def stacks_of(model):
    """The experts of each stack, the same at every projection."""
    found = {
        tuple(tuple(stack.experts) for stack in adapter.stacks)
        for adapter in model.mixture.adapters.values()
    }
    [layout] = found
    return layout


# Create


def test_a_new_expert_changes_no_logit_by_more_than_a_millionth(model, ids):
    exact = copy.deepcopy(model).double()
    for each, scale in ((exact, 1.0), (model, model(ids).logits.abs().max().item())):
        before = each(ids).logits
        assert each.experts.create_expert() == 3
        assert (each(ids).logits - before).abs().max() <= 1e-6 * scale


def test_a_new_expert_of_another_rank_changes_no_logit_and_no_parameter_of_others(mixture, ids):
    model = mixture().double()
    before, old = model(ids).logits, dict(model.named_expert_parameters())
    model.experts.create_expert(rank=5, alpha=2.5, skill="sql")
    assert (model(ids).logits - before).abs().max() <= 1e-6
    now = dict(model.named_expert_parameters())
    assert all(now[name] is parameter for name, parameter in old.items())
    assert model.expert_weights(3)["model.layers.0.self_attn.q_proj"][0].shape == (5, 32)
    new = model.experts[3]
    assert (new.rank, new.alpha, new.skill) == (5, 2.5, "sql")


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("hidden", [None, 8])
def test_a_new_expert_gets_at_most_its_share_of_any_token(mixture, ids, share, hidden):
    model = mixture(routing_mode="dense", router_hidden_size=hidden)
    for _, router in model.routers():
        torch.nn.init.normal_(router.outer.weight, std=3.0)  # decided routers
        torch.nn.init.normal_(router.outer.bias, std=3.0)
    model.experts.create_expert(share=share)
    given = model.get_routing_weights(ids)[..., 3]
    assert given.max() <= share * (1 + 1e-5)


def test_a_new_expert_beside_even_experts_gets_exactly_its_share(mixture, ids):
    model = mixture(routing_mode="dense")
    for _, router in model.routers():
        torch.nn.init.zeros_(router.outer.weight)
        torch.nn.init.zeros_(router.outer.bias)
    model.experts.create_expert(share=0.2)
    given = model.get_routing_weights(ids)[..., 3]
    torch.testing.assert_close(given, torch.full_like(given, 0.2))


def test_the_optimizer_comes_along_when_an_expert_is_created(model, ids):
    optimizer, began = adamw(model), stacks_of(model)
    train(model, optimizer, ids)
    old = dict(model.named_expert_parameters())
    kept = [(rows_of(model, e), moments_of(model, optimizer, e)) for e in range(3)]
    model.experts.create_expert()
    model.experts.check_optimizer()
    now = dict(model.named_expert_parameters())
    assert all(now[name] is parameter for name, parameter in old.items())
    for expert, (rows, moments) in enumerate(kept):
        assert same(rows_of(model, expert), rows)
        assert same(moments_of(model, optimizer, expert), moments)
    assert moments_of(model, optimizer, 3) == {}
    assert stacks_of(model) == (*began, (3,))


def test_the_rows_of_a_router_keep_their_moments_when_it_grows(mixture, ids):
    model = mixture()
    optimizer = adamw(model)
    train(model, optimizer, ids)
    before = {
        name: {key: value.clone() for key, value in optimizer.state[p].items()} | {"": p.clone()}
        for name, p in model.router_parameters()
    }
    model.experts.create_expert()
    for name, parameter in model.router_parameters():
        old, state = before[name], optimizer.state[parameter]
        assert torch.equal(parameter[:3], old[""])
        assert torch.equal(state["exp_avg"][:3], old["exp_avg"])
        assert torch.equal(state["exp_avg_sq"][:3], old["exp_avg_sq"])
        assert torch.equal(state["step"], old["step"])
        assert not state["exp_avg"][3].any()
        torch.testing.assert_close(state["exp_avg_sq"][3], old["exp_avg_sq"].mean(0))


def test_a_new_expert_is_trained_at_once_when_it_alone_is_enabled(mixture, ids):
    model = mixture()
    optimizer = adamw(model)
    train(model, optimizer, ids)
    number = model.experts.create_expert()
    model.experts.set_active_expert(number)
    before = model(ids, labels=ids).lm_loss
    train(model, optimizer, ids, steps=20)
    assert model(ids, labels=ids).lm_loss < before - 0.5


def test_a_plain_lora_cannot_grow(mixture):
    with pytest.raises(ValueError, match="use_moe_routing"):
        mixture(use_moe_routing=False).experts.create_expert()


@pytest.mark.parametrize("wrong", [{"rank": -1}, {"alpha": -2.0}, {"share": 0.0}, {"share": 1.0}])
def test_a_new_expert_that_makes_no_sense_is_refused(mixture, wrong):
    model = mixture()
    with pytest.raises(ValueError, match=next(iter(wrong))):
        model.experts.create_expert(**wrong)
    assert len(model.experts) == 3
    assert stacks_of(model) == ((0, 1, 2),)


def test_a_new_expert_of_odd_rank_is_refused_where_pairs_are_orthogonal(mixture):
    model = mixture(init_lora_weights="orthogonal")
    with pytest.raises(ValueError, match="rank is 3, but must be even for orthogonal values"):
        model.experts.create_expert(rank=3)
    assert model.experts.create_expert(rank=4) == 3


# Freeze


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_frozen_experts_are_bit_identical_after_200_steps(mixture, ids, kind):
    model = mixture()
    optimizer = adamw(model)
    if kind == "sgd":
        parameters = [p for _, p in model.own_parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1)
        model.experts.attach_optimizer(optimizer)
    train(model, optimizer, ids)  # so that there is momentum
    model.experts.freeze(0, 2)
    frozen, trained = [rows_of(model, expert) for expert in (0, 2)], rows_of(model, 1)
    train(model, optimizer, ids, steps=200)
    assert same(rows_of(model, 0), frozen[0])
    assert same(rows_of(model, 2), frozen[1])
    assert not any(torch.equal(trained[key], rows_of(model, 1)[key]) for key in trained)


def test_no_gradient_is_computed_for_frozen_experts(model, ids):
    optimizer = adamw(model)
    train(model, optimizer, ids)
    model.experts.freeze(1)
    optimizer.zero_grad()
    model.train()(ids, labels=ids).loss.backward()
    for adapter in model.mixture.adapters.values():
        for stack in adapter.stacks:
            gradients = {
                parameter.grad is not None
                for name, parameter in stack.named_parameters()
                if not (model.config.freeze_A and name == "lora_A")
            }
            assert gradients == {1 not in stack.experts}


def test_frozen_experts_save_their_share_of_the_backward_products(mixture, ids):
    def backward_flops(frozen):
        model = mixture(num_experts=8, maturity=[0.0] * 8)
        model.experts.freeze(*range(frozen))
        loss = model(ids, labels=ids).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        return counter.get_total_flops()

    nothing_trained = backward_flops(8)
    saved = (backward_flops(0) - backward_flops(7)) / (backward_flops(0) - nothing_trained)
    assert saved == pytest.approx(7 / 8)


def test_what_experts_share_stands_still_while_one_of_them_is_frozen(mixture, gpt2, ids):
    model = mixture(gpt2(), share_A=True, bias="all")
    shared = {
        n: p for n, p in model.named_expert_parameters() if n.endswith(("shared_A", "bias_shift"))
    }
    assert all(parameter.requires_grad for parameter in shared.values())
    model.experts.freeze(0)
    assert not any(parameter.requires_grad for parameter in shared.values())
    model.experts.unfreeze(0)
    assert all(parameter.requires_grad for parameter in shared.values())


def test_freezing_changes_no_logit(model, ids):
    before = model(ids).logits
    model.experts.freeze(1)
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)


def test_a_pause_in_training_leaves_parameters_and_moments_as_they_were(model, ids):
    optimizer, began = adamw(model), stacks_of(model)
    train(model, optimizer, ids)
    kept = [(rows_of(model, e), moments_of(model, optimizer, e)) for e in range(3)]
    model.experts.freeze(1)
    model.experts.freeze(0)
    model.experts.unfreeze(1)
    model.experts.unfreeze(0)
    model.experts.check_optimizer()
    for expert, (rows, moments) in enumerate(kept):
        assert same(rows_of(model, expert), rows)
        assert same(moments_of(model, optimizer, expert), moments)
        assert moments
    assert stacks_of(model) == began


def test_a_paused_run_goes_on_as_if_nothing_had_been(mixture, ids):
    runs = []
    for pause in (False, True):
        torch.manual_seed(0)
        model = mixture()
        optimizer = adamw(model)
        train(model, optimizer, ids)
        if pause:
            model.experts.freeze(2)
            model.experts.unfreeze(2)
        train(model, optimizer, ids)
        runs.append([p.detach() for _, p in model.own_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_experts_frozen_one_by_one_lie_in_one_stack(mixture, ids):
    model = mixture(num_experts=6, maturity=[0.0] * 6)
    optimizer = adamw(model)
    train(model, optimizer, ids)
    for expert in (0, 2, 1, 3, 4):
        model.experts.freeze(expert)
    assert stacks_of(model) == ((0, 1, 2, 3, 4), (5,))


def test_without_an_optimizer_to_take_along_stacks_are_cut_but_not_joined(mixture):
    model = mixture(num_experts=4, maturity=[0.0] * 4)
    model.experts.freeze(1)
    kept = {id(p) for _, p in model.named_expert_parameters()}
    model.experts.unfreeze(1)
    assert {id(p) for _, p in model.named_expert_parameters()} == kept
    assert stacks_of(model) == ((0,), (1,), (2, 3))


def test_an_optimizer_that_lacks_a_parameter_is_refused(mixture):
    model = mixture()
    parameters = [p for _, p in model.own_parameters()]
    with pytest.raises(ValueError, match="0 times"):
        model.experts.attach_optimizer(torch.optim.AdamW(parameters[1:]))


# Retire


def test_a_retired_expert_gets_no_gate_and_has_no_parameters(model, ids):
    optimizer = adamw(model)
    train(model, optimizer, ids)
    model.experts.retire(1)
    gates = model.get_routing_weights(ids)
    assert not gates[..., 1].any()
    assert gates.shape[-1] == 3
    assert stacks_of(model) == ((0,), (2,))
    model.experts.check_optimizer()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    ours = {id(p) for _, p in model.own_parameters()}
    assert held <= ours
    train(model, optimizer, ids)


def test_the_others_share_the_probability_of_a_retired_expert(mixture, ids):
    model = mixture(routing_mode="dense")
    before = model(ids).routing.probabilities
    model.experts.retire(0)
    after = model(ids).routing.probabilities
    expected = before[:, :, 0, 1:] / before[:, :, 0, 1:].sum(-1, keepdim=True)  # first site
    torch.testing.assert_close(after[:, :, 0, 1:], expected)


def test_fixed_weights_of_a_retired_expert_go_to_the_others(mixture, ids):
    model = mixture(router_type="fixed", fixed_routing_weights=[0.5, 0.3, 0.2])
    model.experts.retire(0)
    torch.testing.assert_close(
        model.get_routing_weights(ids)[0, 0, 0], torch.tensor([0.0, 0.6, 0.4])
    )


def test_the_last_expert_cannot_be_retired(mixture):
    model = mixture()
    model.experts.retire(0, 2)
    with pytest.raises(ValueError, match="last"):
        model.experts.retire(1)
    with pytest.raises(ValueError, match="retired"):
        model.experts.freeze(0)
    with pytest.raises(ValueError, match="no expert 7"):
        model.experts.freeze(7)


def test_retiring_the_only_enabled_one_lets_the_others_in_again(mixture, ids):
    model = mixture()
    model.experts.set_active_expert(1)
    model.experts.retire(1)
    gates = model.get_routing_weights(ids)
    torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:-1]))


def test_balance_losses_count_only_those_that_take_part(mixture, ids):
    model = mixture(num_experts=4, maturity=[0.0] * 4, load_balance_loss_type="aux_loss+switch")
    for _, router in model.routers():
        torch.nn.init.zeros_(router.outer.weight)
        torch.nn.init.zeros_(router.outer.bias)
    model.experts.retire(0, 2)
    out = model(ids, labels=ids)
    assert out.aux_loss.item() == pytest.approx(1)
    assert out.switch_loss.item() == pytest.approx(1)  # uniform: P = 1/2 each
    assert out.z_loss.item() == pytest.approx(torch.tensor(2.0).log().item() ** 2)


def test_a_retired_expert_is_in_the_history_but_not_in_files(mixture, tmp_path):
    model = mixture()
    model.experts.count_step(7, 0.5)
    model.experts.retire(1)
    model.save_pretrained(tmp_path / "saved")
    experts = json.loads((tmp_path / "saved" / "config.json").read_text())["experts"]
    assert experts[1]["state"] == "retired"
    assert experts[1]["history"] == [{"event": "retired", "step": 7}]
    folders = sorted(p.name for p in (tmp_path / "saved" / "peft_adapters").iterdir())
    assert folders == ["expert_0", "expert_2"]
    written = export_checkpoint(tmp_path / "saved", tmp_path / "out")
    assert [folder.name for folder in written] == ["expert_0", "expert_2"]
    with pytest.raises(ValueError, match="no expert_1"):
        export_checkpoint(tmp_path / "saved", tmp_path / "out", "1")


# Choose


def test_the_active_expert_has_the_whole_gate_and_is_the_only_one_trained(model, ids):
    optimizer = adamw(model)
    train(model, optimizer, ids)
    model.experts.set_active_expert(2)
    gates = model.get_routing_weights(ids)
    torch.testing.assert_close(gates, torch.eye(3)[2].expand_as(gates))
    idle = [rows_of(model, expert) for expert in (0, 1)]
    train(model, optimizer, ids, steps=10)
    assert [same(rows_of(model, e), rows) for e, rows in enumerate(idle)] == [True, True]
    assert [row.steps for row in model.experts.table] == [3, 3, 13]


def test_all_experts_take_part_again(model, ids):
    before = model(ids).logits
    model.experts.set_active_expert(0)
    assert (model(ids).logits - before).abs().max() > 1e-3
    model.experts.activate_all_experts()
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-5)


# Merge


def update_of(model, expert, path):
    """s B A of one expert, [O, D], in float64."""
    A, B = model.expert_weights(expert)[path]
    stack, place = model.mixture.adapters[path].stack_of(expert)
    return float(stack.scaling_E[place]) * B.double() @ A.double()


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_a_merge_is_the_best_update_of_its_rank_and_reports_its_error(mixture, rank):
    model = mixture(expert_alphas=[4.0, 2.0, 3.0])
    wanted = {
        path: 0.3 * update_of(model, 0, path) + 0.7 * update_of(model, 2, path)
        for path in model.mixture.adapters
    }
    report = model.experts.merge(0, 2, rank=rank, shares=(3, 7))
    assert (report.expert, report.retired, report.rank) == (0, 2, rank)
    assert report.shares == pytest.approx((0.3, 0.7))
    for path, full in wanted.items():
        kept = update_of(model, 0, path)
        assert model.expert_weights(0)[path][0].shape[0] == rank
        error = (full - kept).norm() / full.norm()
        best = torch.linalg.svdvals(full)[rank:].norm() / full.norm()
        assert report.errors[path] == pytest.approx(float(error), abs=1e-6)
        assert float(error) == pytest.approx(float(best), abs=1e-6)
    assert report.worst == max(report.errors.values())
    if rank == 4:
        assert report.worst < 1e-6


def test_merged_twins_are_one_of_them_and_have_the_probability_of_both(mixture, ids):
    model = mixture(routing_mode="dense")
    with torch.no_grad():
        for adapter in model.mixture.adapters.values():
            [stack] = adapter.stacks
            stack.lora_A[1], stack.lora_B[1] = stack.lora_A[0], stack.lora_B[0]
        for _, router in model.routers():
            router.outer.weight[1] = router.outer.weight[0]
            router.outer.bias[1] = router.outer.bias[0]
    before, gates = model(ids).logits, model.get_routing_weights(ids)
    report = model.experts.merge(0, 1)
    assert report.worst < 1e-6
    after = model.get_routing_weights(ids)
    torch.testing.assert_close(after[..., 0], gates[..., 0] + gates[..., 1])
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=1e-4)


def test_experts_with_one_A_merge_without_error(mixture):
    model = mixture(share_A=True)
    path = next(iter(model.mixture.adapters))
    wanted = 0.5 * update_of(model, 0, path) + 0.5 * update_of(model, 1, path)
    assert model.experts.merge(0, 1).worst == 0
    torch.testing.assert_close(update_of(model, 0, path), wanted, rtol=1e-5, atol=1e-6)


def test_a_merge_counts_experts_by_the_gate_mass_they_have_seen(mixture):
    model = mixture()
    mass = torch.tensor([30.0, 10.0, 5.0], dtype=torch.float64)
    model.set_maturity(model.maturity._replace(evidence=mass))
    assert model.experts.merge(0, 1).shares == (0.75, 0.25)
    assert model.maturity.evidence[0] == 40
    assert model.maturity.maturity[0] == 0  # the younger of the two


def test_training_goes_on_after_a_merge(mixture, ids):
    model = mixture()
    optimizer = adamw(model)
    train(model, optimizer, ids)
    model.experts.merge(1, 2, rank=3)
    assert moments_of(model, optimizer, 1) == {}
    assert moments_of(model, optimizer, 0)
    before = model(ids, labels=ids).loss
    train(model, optimizer, ids, steps=10)
    assert model(ids, labels=ids).loss < before
    assert (model.experts[1].rank, model.experts[2].state) == (3, "retired")


def test_merges_that_make_no_sense_are_refused(mixture):
    model = mixture()
    with pytest.raises(ValueError, match="itself"):
        model.experts.merge(1, 1)
    with pytest.raises(ValueError, match="shares"):
        model.experts.merge(0, 1, shares=(-1, 2))
    model.experts.freeze(2)
    with pytest.raises(ValueError, match="frozen"):
        model.experts.merge(0, 2)
    with pytest.raises(ValueError, match="DoRA"):
        mixture(use_dora=True).experts.merge(0, 1)


# Files and text


def test_a_pool_with_a_history_comes_back_bit_for_bit(mixture, ids, tmp_path):
    model = mixture()
    base = copy.deepcopy(mixture().unload())
    optimizer = adamw(model)
    train(model, optimizer, ids)
    model.experts.create_expert(rank=5, share=0.2)
    train(model, optimizer, ids)
    model.experts.freeze(0)
    model.experts.create_expert(alpha=9, skill="regex", share=0.1)
    model.experts.retire(1)
    train(model, optimizer, ids)
    model.set_maturity(
        ExpertMaturity(*torch.rand(len(ExpertMaturity._fields), 5, dtype=torch.float64))
    )
    model.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=base).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert stacks_of(again) == stacks_of(model)
    assert str(again.experts) == str(model.experts)
    assert again.experts.state_dict() == model.experts.state_dict()
    for (name, ours), (other, theirs) in zip(
        model.own_parameters(), again.own_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)
        assert ours.requires_grad == theirs.requires_grad


def test_the_table_says_who_is_who(mixture):
    model = mixture()
    model.experts.create_expert(skill="sql")
    model.experts.freeze(0)
    model.experts.retire(1)
    model.experts.set_active_expert(3)
    lines = str(model.experts).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["expert_0", "off"],
        ["expert_1", "retired"],
        ["expert_2", "off"],
        ["expert_3", "active"],
    ]
    assert lines[4].endswith("sql")


def test_fixed_weights_that_were_merged_come_back(mixture, ids, tmp_path):
    model = mixture(router_type="fixed", fixed_routing_weights=[0.5, 0.3, 0.2])
    base = copy.deepcopy(mixture().unload())
    model.experts.merge(0, 1)
    model.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=base).eval()
    torch.testing.assert_close(
        again.get_routing_weights(ids)[0, 0, 0], torch.tensor([0.8, 0.0, 0.2])
    )
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_nothing_of_a_router_is_trained_while_one_expert_is_enabled(mixture, ids):
    model = mixture(router_z_loss_coef=0.1).train()
    optimizer = torch.optim.AdamW([p for _, p in model.own_parameters()], lr=0.05)
    model.experts.attach_optimizer(optimizer)

    def step():
        output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return output

    assert step().z_loss > 0
    first = next(iter(model.router_parameters()))[1]
    first.requires_grad_(False)  # somebody's own wish
    before = {name: p.clone() for name, p in model.router_parameters()}
    model.experts.set_active_expert(1)
    output = step()
    torch.testing.assert_close(output.loss, output.lm_loss, rtol=0, atol=0)
    assert output.z_loss == 0
    assert all(torch.equal(before[name], p) for name, p in model.router_parameters())
    model.experts.activate_all_experts()
    assert [p.requires_grad for _, p in model.router_parameters()] == [False, True, True, True]
    step()
    assert not torch.equal(
        before["model.layers.1.self_attn.outer.bias"],
        dict(model.router_parameters())["model.layers.1.self_attn.outer.bias"],
    )


@pytest.mark.parametrize("router", ["linear", "MLP router"])
def test_a_router_that_grows_while_it_is_paused_is_trained_again(mixture, ids, router):
    model = mixture(**SETTINGS.get(router, {})).train()
    optimizer = adamw(model)
    model.experts.set_active_expert(1)
    model.experts.create_expert(share=0.2)
    before = {name: p.clone() for name, p in model.router_parameters()}
    assert all(p.requires_grad for _, p in model.router_parameters())
    model.experts.check_optimizer()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not any(torch.equal(before[name], p) for name, p in model.router_parameters())
    model.experts.set_active_expert(1)
    model.experts.activate_all_experts()
    assert all(p.requires_grad for _, p in model.router_parameters())

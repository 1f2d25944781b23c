"""The whole model: what its logits, gradients and losses equal, and what leaves them alone."""

import copy
import hashlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache

import oracles
from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.model import BatchTotals
from dylora.routing.losses import fractions_of
from dylora.routing.router import DynamicHybridRouter

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order
E, N = 3, 2  # of the mixture fixture
NEVER = 99  # a token that does not exist: generation ends at its length


def one_hot(expert, rows=2):
    return F.one_hot(torch.tensor([expert] * rows), E).float()


def gradients(model):
    """Every trainable parameter's gradient by name, zeros where there is none."""
    named = [*model.named_expert_parameters(), *model.router_parameters()]
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


def assert_same(ours, expected, **tolerance):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )


def position_ids_of(mask):
    """As generate makes them."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)


def hash_of_base(model):
    digest = hashlib.sha256()
    for name, tensor in model.base.state_dict().items():
        if "dylora" not in name:
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def train(model, ids, steps=3, rate=0.05):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


# Identity and equality


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router_type": "learned", "top_k_experts": 1},
        {"router_type": "fixed"},
        {"router_scope": "shared", "router_hidden_size": 5},
        {"target_modules": ["q_proj", "up_proj", "down_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=["default", "top_1", "fixed", "shared", "mlp"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_fresh_mixture_has_the_logits_of_its_base_bit_for_bit(
    llama, mixture, ids, settings, dtype
):
    base = llama().to(dtype)
    assert torch.equal(mixture(base, fresh=True, **settings)(ids).logits, base(ids).logits)


def loop_logits(model, base, ids):
    """What the oracle makes of the experts and routers, on an untouched copy of the base."""
    sites = []
    for site in model.mixture.blocks:
        adapters = model.mixture.adapters.items()
        experts = {
            p: (a.stacks[0].lora_A, a.stacks[0].lora_B)
            for p, a in adapters
            if p.startswith(site.name + ".")
        }
        router = site.router.outer
        sites.append(oracles.OracleSite(site.name, router.weight, router.bias, experts))
    return oracles.logits_with_experts(
        base,
        sites,
        ids,
        scaling=2.0,
        temperature=2.0,
        maturity_E=model.mixture.state.maturity_E,
        k=model.config.top_k_experts,
    )


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_logits_equal_the_loop_over_tokens_and_experts(family, top_k, request, mixture, ids):
    base = request.getfixturevalue(family)().double()
    model = mixture(base, top_k_experts=top_k)
    ours = model(ids).logits
    assert (ours - base(ids).logits).abs().max() > 0.1
    # LayerNorm works in float64; Llama's RMSNorm and rotary embedding do not
    tolerance = 1e-12 if family == "gpt2" else 1e-6
    expected = loop_logits(model, base, ids)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradients_equal_those_of_the_loop(gpt2, mixture, ids, top_k):
    base = gpt2().double()
    model = mixture(base, top_k_experts=top_k)
    named = dict([*model.named_expert_parameters(), *model.router_parameters()])
    weight, found = torch.randn(2, 7, 40, dtype=torch.float64), []
    for logits in (model(ids).logits, loop_logits(model, base, ids)):
        grads = torch.autograd.grad((logits * weight).sum(), named.values())
        found.append(dict(zip(named, grads, strict=True)))
    assert all(gradient.any() for gradient in found[1].values())
    assert_same(*found)


@pytest.mark.parametrize("expert", range(E))
def test_one_hot_routing_equals_that_expert_alone(mixture, ids, expert):
    model = mixture()
    ours = model(ids, routing_weights=one_hot(expert)).logits
    alone = mixture(use_moe_routing=False, num_experts=1)
    with torch.no_grad():
        for path, adapter in alone.mixture.adapters.items():
            adapter.stacks[0].lora_A.copy_(model.mixture.adapters[path].stacks[0].lora_A[[expert]])
            adapter.stacks[0].lora_B.copy_(model.mixture.adapters[path].stacks[0].lora_B[[expert]])
    torch.testing.assert_close(ours, alone(ids).logits, **CLOSE)


def test_one_hot_routing_does_not_see_the_other_experts(mixture, ids):
    model = mixture()
    before = model(ids, routing_weights=one_hot(1)).logits
    with torch.no_grad():
        for _, parameter in model.named_expert_parameters():
            parameter[[0, 2]] = 100.0
    assert torch.equal(model(ids, routing_weights=one_hot(1)).logits, before)


@pytest.mark.parametrize("top_k", [1, 2])
def test_permuting_experts_with_their_gates_changes_nothing(mixture, ids, top_k):
    model, order = mixture(top_k_experts=top_k), [2, 0, 1]
    expected = model(ids).logits
    with torch.no_grad():
        for _, parameter in [*model.named_expert_parameters(), *model.router_parameters()]:
            parameter.copy_(parameter[order])
    state = model.maturity
    model.set_maturity(state._replace(maturity=state.maturity[order]))
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)


def test_routing_weights_of_all_three_shapes_mean_the_same(mixture, ids):
    model, weights = mixture(), torch.rand(2, E)
    expected = model(ids, routing_weights=weights).logits
    per_token = weights[:, None].expand(2, 7, E)
    per_site = per_token[:, :, None].expand(2, 7, N, E)
    assert torch.equal(model(ids, routing_weights=per_token).logits, expected)
    assert torch.equal(model(ids, routing_weights=per_site).logits, expected)


def test_routing_weights_of_a_site_act_at_that_site(mixture, ids):
    model = mixture()
    weights = torch.zeros(2, 7, N, E)
    weights[:, :, 1] = torch.rand(2, 7, E)
    ours = model(ids, routing_weights=weights).logits
    with torch.no_grad():
        for path, adapter in model.mixture.adapters.items():
            if ".0." in path:
                adapter.stacks[0].lora_B.zero_()
    assert torch.equal(model(ids, routing_weights=weights[:, :, 1]).logits, ours)


def test_routing_weights_are_reported_as_the_gates(mixture, ids):
    weights = torch.rand(2, 7, N, E)
    assert torch.equal(mixture()(ids, routing_weights=weights).routing.gates, weights)


def test_routing_weights_get_a_gradient(mixture, ids):
    """Passed through the base's keywords they would be swallowed."""
    weights = torch.rand(2, E, requires_grad=True)
    mixture()(ids, labels=ids, routing_weights=weights).loss.backward()
    assert weights.grad.abs().min() > 0


def test_routing_weights_hold_for_one_pass(mixture, ids):
    model = mixture()
    before = model(ids).logits
    model(ids, routing_weights=one_hot(1))
    assert torch.equal(model.base(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    "shape", [(E,), (2, E + 1), (3, E), (2, 6, E), (2, 7, N + 1, E), (2, 7, E, N), (1, E)]
)
def test_routing_weights_of_another_shape_are_refused(mixture, ids, shape):
    with pytest.raises(ValueError, match=r"shape .* \[B, E\], \[B, S, E\] or \[B, S, sites, E\]"):
        mixture()(ids, routing_weights=torch.ones(shape))


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_routing_weights_that_are_no_weights_are_refused(mixture, ids, value):
    weights = torch.ones(2, E)
    weights[1, 2] = value
    with pytest.raises(ValueError, match="finite and not negative"):
        mixture()(ids, routing_weights=weights)


def test_routing_weights_of_a_retired_expert_are_refused(mixture, ids):
    model = mixture()
    model.experts.retire(1)
    with pytest.raises(ValueError, match="expert_1 is retired: its routing weights must be 0"):
        model(ids, routing_weights=torch.ones(2, E))
    with pytest.raises(ValueError, match="expert_1 is retired"):
        model.generate(ids, routing_weights=torch.eye(E)[[0, 1]], max_new_tokens=1)
    model(ids, routing_weights=torch.tensor([[1.0, 0.0, 2.0]]).expand(2, -1))


def test_refused_routing_weights_leave_no_trace(mixture, ids):
    model = mixture()
    before = model(ids).logits
    with pytest.raises(ValueError, match="not negative"):
        model(ids, routing_weights=-torch.ones(2, E))
    assert torch.equal(model(ids).logits, before)


def test_get_routing_weights_gives_the_gates_of_every_site(mixture, ids):
    model = mixture()
    gates = model.get_routing_weights(ids)
    assert gates.shape == (2, 7, N, E)
    assert torch.equal(gates, model(ids).routing.gates)


def test_evaluation_is_the_same_twice_despite_dropout_and_capacity(mixture, ids):
    model = mixture(
        lora_dropout=0.5, expert_dropout=0.5, router_type="learned", expert_capacity_factor=0.5
    )
    assert torch.equal(model(ids).logits, model(ids).logits)


# Batches, padding, caches, causality


@pytest.mark.parametrize("settings", [{}, {"router_scope": "shared"}, {"router_type": "fixed"}])
def test_a_batch_equals_its_sequences_one_by_one(mixture, settings):
    model, batch = mixture(**settings), torch.randint(3, 40, (4, 7))
    single = torch.cat([model(row[None]).logits for row in batch])
    torch.testing.assert_close(model(batch).logits, single, **CLOSE)


def padded(ids, sides):
    """Batch of ids [2, 7] with three and one padding tokens, its mask and position ids."""
    rows, masks = [], []
    for row, extra in zip(ids, (3, 1), strict=True):
        kept, padding = row[: 10 - 3 - extra], torch.zeros(3 + extra, dtype=row.dtype)
        real = torch.ones_like(kept)
        parts = [(kept, real), (padding, padding)]
        parts = parts if sides == "right" else parts[::-1]
        rows.append(torch.cat([tokens for tokens, _ in parts]))
        masks.append(torch.cat([mask for _, mask in parts]))
    mask = torch.stack(masks)
    return torch.stack(rows), mask, position_ids_of(mask)


def test_left_padding_equals_right_padding(mixture, ids):
    model, logits = mixture(), {}
    for side in ("left", "right"):
        tokens, mask, positions = padded(ids, side)
        out = model(tokens, mask, position_ids=positions)
        logits[side] = out.logits[mask.bool()]
    torch.testing.assert_close(logits["left"], logits["right"], **CLOSE)


@pytest.mark.parametrize("kind", ["aux_loss", "switch"])
def test_losses_do_not_depend_on_the_side_of_the_padding(mixture, ids, kind):
    model, losses = mixture(load_balance_loss_type=kind), {}
    for side in ("left", "right"):
        tokens, mask, positions = padded(ids, side)
        # before the first token of a left-padded row stands padding, which predicts nothing
        labels = tokens.masked_fill((mask == 0) | (positions == 0), -100)
        out = model(tokens, mask, labels, position_ids=positions)
        losses[side] = torch.stack([out.lm_loss, out.aux_loss, out.z_loss])
    torch.testing.assert_close(losses["left"], losses["right"], **CLOSE)


def test_extra_padding_does_not_change_the_losses(mixture, ids):
    model = mixture()
    plain = model(ids, torch.ones_like(ids), ids)
    longer, labels = F.pad(ids, (0, 3)), F.pad(ids, (0, 3), value=-100)
    more = model(longer, F.pad(torch.ones_like(ids), (0, 3)), labels)
    for name in ("lm_loss", "aux_loss", "z_loss"):
        torch.testing.assert_close(getattr(more, name), getattr(plain, name), **CLOSE)


@pytest.mark.parametrize("settings", [{}, {"router_scope": "shared", "top_k_experts": 1}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_cached_steps_equal_the_full_pass(family, settings, request, mixture, ids):
    model = mixture(request.getfixturevalue(family)(), **settings)
    cache, steps = DynamicCache(), []
    for t in range(ids.shape[1]):
        out = model.base(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, **CLOSE)


def test_cached_generation_equals_the_full_pass_token_by_token(mixture, ids):
    model, tokens = mixture(), ids
    for _ in range(5):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=NEVER)
    assert torch.equal(generated, tokens)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_chunk_behind_a_cache_counts_its_own_tokens(mixture, ids, chunk):
    """The mask then covers the cache as well, and is longer than the chunk."""
    model, mask, cache = mixture(), torch.ones_like(ids), DynamicCache()
    start = ids.shape[1] - chunk
    model(ids[:, :start], mask[:, :start], past_key_values=cache, use_cache=True)
    routing = model(ids[:, start:], mask, past_key_values=cache, use_cache=True).routing
    assert routing.statistics.tokens == 2 * chunk
    torch.testing.assert_close(routing.statistics.gate_NE, routing.gates.sum((0, 1)))


SCOPES = [{}, {"router_scope": "shared"}, {"target_modules": ["q_proj", "o_proj", "down_proj"]}]


@pytest.mark.parametrize("settings", SCOPES, ids=["site", "shared", "mlp"])
def test_a_changed_token_changes_nothing_before_it(mixture, ids, settings):
    model, changed = mixture(**settings), ids.clone()
    changed[:, 4] = 39 - changed[:, 4]
    before, after = model(ids), model(changed)
    assert torch.equal(before.logits[:, :4], after.logits[:, :4])
    assert torch.equal(before.routing.gates[:, :4], after.routing.gates[:, :4])
    assert (before.logits[:, 4:] != after.logits[:, 4:]).any(-1).all()


@pytest.mark.parametrize("settings", SCOPES, ids=["site", "shared", "mlp"])
def test_no_gradient_flows_from_a_position_to_a_later_token(mixture, ids, settings):
    model = mixture(**settings)
    embeddings = model.base.get_input_embeddings()(ids).requires_grad_()
    logits = model.base(inputs_embeds=embeddings, use_cache=False).logits
    [flow] = torch.autograd.grad(logits[:, 3].square().sum(), embeddings)
    assert not flow[:, 4:].any()
    assert flow[:, :4].any(-1).all()


# Gradients


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity"])
def test_router_and_A_have_no_gradient_at_first_and_have_one_after_a_step(
    mixture, ids, top_k, router_type
):
    model = mixture(
        fresh=True, top_k_experts=top_k, router_type=router_type,
        router_aux_loss_coef=0.0, router_z_loss_coef=0.0, router_temperature=1.0,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model(ids, labels=ids).loss.backward()
    first = gradients(model)
    optimizer.step()
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    second = gradients(model)
    for name in first:
        largest = [float(step[name].abs().max()) for step in (first, second)]
        if name.endswith("lora_B"):
            assert largest[0] > 0
        else:
            assert largest[0] == 0, name
            assert largest[1] > 1e-6, name


def test_training_leaves_every_base_weight_as_it_was(mixture, ids):
    model = mixture(fresh=True)
    before = hash_of_base(model)
    train(model.train(), ids)
    assert hash_of_base(model) == before


def test_training_lowers_the_loss(mixture, ids):
    model = mixture(fresh=True)
    before = model(ids, labels=ids).lm_loss.item()
    train(model, ids, steps=8)
    assert 0 < model(ids, labels=ids).lm_loss < 0.7 * before


CHECKPOINTED = {
    "site": {},
    "shared": {"router_scope": "shared"},
    "hidden": {"router_hidden_size": 5, "top_k_experts": 1},
    "override": {},
    "lora_dropout": {"lora_dropout": 0.4},
    "expert_dropout": {"expert_dropout": 0.4},
    "capacity": {"router_type": "learned", "expert_capacity_factor": 0.6},
}


@pytest.mark.parametrize("case", CHECKPOINTED)
def test_checkpointing_gives_the_same_gradients(mixture, ids, case):
    weights = torch.rand(2, 7, N, E) if case == "override" else None
    tokens, mask, _ = padded(ids, "right")
    found = {}
    for checkpointing in (False, True):
        model = mixture(router_aux_loss_coef=0.5, **CHECKPOINTED[case]).train()
        calls = []
        block = model.base.get_submodule("model.layers.0.self_attn")
        block.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        if checkpointing:
            model.base.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(5)
        out = (
            model(ids, labels=ids, routing_weights=weights)
            if case == "override"
            else model(tokens, mask, tokens.masked_fill(mask == 0, -100))
        )
        out.loss.backward()
        assert len(calls) == 1 + checkpointing
        found[checkpointing] = gradients(model)
        assert any(gradient.any() for gradient in found[checkpointing].values())
    assert_same(found[True], found[False], rtol=1e-5, atol=1e-7)


def test_checkpointing_that_loses_the_balance_loss_is_refused(mixture, ids):
    """Reentrant, it runs the routers without a graph: the value is right, the gradient gone."""
    model = mixture().train()
    base = model.base
    with pytest.raises(ValueError, match="leave out use_reentrant=True"):
        base.activation_checkpointing_enable({"use_reentrant": True})
    base.enable_input_require_grads()
    base._activation_checkpointing_enable({"use_reentrant": True})  # past the refusal
    with pytest.raises(ValueError, match="use_reentrant"):
        model(ids, labels=ids)


# Losses


def test_loss_is_the_weighted_sum_of_its_three_parts(mixture, ids):
    out = mixture(router_aux_loss_coef=0.3, router_z_loss_coef=0.7)(ids, labels=ids)
    expected = out.lm_loss + 0.3 * out.aux_loss + 0.7 * out.z_loss
    torch.testing.assert_close(out.loss, expected)
    assert min(out.lm_loss, out.aux_loss, out.z_loss) > 0.1


def test_the_z_loss_in_the_place_of_a_balance_loss_has_its_weight(mixture, ids):
    out = mixture(load_balance_loss_type="z_loss", router_aux_loss_coef=0.3)(ids, labels=ids)
    torch.testing.assert_close(out.loss, out.lm_loss + 0.3 * out.z_loss)
    assert out.aux_loss == 0
    assert min(out.lm_loss, out.z_loss) > 0.1


def test_losses_equal_the_loops_over_tokens_and_sites(mixture, ids):
    tokens, mask, positions = padded(ids, "right")
    labels = tokens.masked_fill(mask == 0, -100)
    out = mixture()(tokens, mask, labels, label_smoothing=0.1, position_ids=positions)
    real = mask.flatten().bool().tolist()
    p_TNE, z_TNE = out.routing.probabilities.flatten(0, 1), out.routing.logits.flatten(0, 1)
    aux = [oracles.balance_loss(p_TNE[:, n], real, 2, "aux_loss") for n in range(N)]
    z = [oracles.z_loss(z_TNE[:, n], real) for n in range(N)]
    assert out.lm_loss.item() == pytest.approx(oracles.lm_loss(out.logits, labels, 0.1), rel=1e-5)
    assert out.aux_loss.item() == pytest.approx(sum(aux).item() / N, rel=1e-5)
    assert out.z_loss.item() == pytest.approx(sum(z) / N, rel=1e-5)


def test_lm_loss_is_that_of_the_base(mixture, ids):
    model = mixture()
    expected = model.base(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, labels=ids).lm_loss, expected)


def test_sites_collapsed_on_different_experts_read_e_over_k(mixture, ids):
    model = mixture(top_k_experts=1)
    with torch.no_grad():
        for site in model.mixture.blocks:
            site.router.outer.weight.zero_()
            site.router.outer.bias.copy_(60.0 * F.one_hot(torch.tensor(site.index), E))
    assert model(ids, labels=ids).aux_loss.item() == pytest.approx(E)


def test_no_balance_loss_when_it_is_switched_off(mixture, ids):
    out = mixture(load_balance_loss_type="none")(ids, labels=ids)
    assert out.aux_loss == 0
    assert out.z_loss > 0


@pytest.mark.parametrize("settings", [{"router_type": "fixed"}, {"use_moe_routing": False}])
def test_what_is_not_routed_has_no_routing_losses(mixture, ids, settings):
    out = mixture(**settings)(ids, labels=ids)
    assert out.aux_loss == out.z_loss == 0
    assert torch.equal(out.loss, out.lm_loss)


def test_no_losses_without_labels(mixture, ids):
    out = mixture()(ids)
    assert (out.loss, out.lm_loss, out.aux_loss, out.switch_loss, out.z_loss) == (None,) * 5
    assert out.token_losses is None


def test_token_losses_average_to_the_lm_loss(mixture, ids):
    out = mixture()(ids, labels=ids)
    assert not out.token_losses.requires_grad
    torch.testing.assert_close(out.token_losses.sum() / 12, out.lm_loss)


@pytest.mark.parametrize("kind", ["aux_loss", "switch"])
@pytest.mark.parametrize("rows", [4, 2, 1])
def test_a_split_batch_has_the_loss_and_gradient_of_the_whole(gpt2, mixture, rows, kind):
    """1×8 = 2×4 = 4×2, with ragged rows, so that a mean of means would differ."""
    tokens = torch.randint(3, 40, (8, 7))
    lengths = torch.tensor([7, 2, 5, 7, 3, 6, 2, 4])
    mask = (torch.arange(7) < lengths[:, None]).long()
    labels = tokens.masked_fill(mask == 0, -100)
    settings = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.5}
    model = mixture(gpt2(), load_balance_loss_type=kind, **settings).double()
    whole = model(tokens, mask, labels)
    whole.loss.backward()
    expected = gradients(model)

    model.zero_grad()
    statistics = whole.routing.statistics.detach()
    totals = BatchTotals(
        target_tokens=(labels[:, 1:] != -100).sum(),
        tokens=statistics.tokens,
        fractions=fractions_of(statistics),
    )
    total = 0.0
    for part in torch.arange(8).split(rows):
        loss = model(tokens[part], mask[part], labels[part], totals=totals).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.loss.detach(), rtol=1e-12, atol=0)
    assert_same(gradients(model), expected, rtol=1e-9, atol=1e-12)


# Precision


def test_experts_stay_float32_on_a_bfloat16_base(llama, mixture, ids):
    model = mixture(llama().bfloat16())
    train(model, ids, steps=1)
    named = [*model.named_expert_parameters(), *model.router_parameters()]
    assert {parameter.dtype for _, parameter in named} == {torch.float32}
    assert {p.dtype for n, p in model.base.named_parameters() if "dylora" not in n} == {
        torch.bfloat16
    }


def test_routing_is_float32_on_a_bfloat16_base(llama, mixture, ids):
    model = mixture(llama().bfloat16())
    entering = []
    block = model.base.get_submodule(model.site_names[0])
    block.register_forward_pre_hook(
        lambda module, args, kwargs: entering.append(kwargs["hidden_states"]), with_kwargs=True
    )
    routing = model(ids).routing
    router = model.mixture.blocks[0].router
    exact = F.linear(entering[0].float(), router.outer.weight, router.outer.bias)
    assert entering[0].dtype == torch.bfloat16
    assert torch.equal(routing.logits[:, :, 0], exact)
    assert {routing.gates.dtype, routing.probabilities.dtype} == {torch.float32}


def test_a_small_step_moves_experts_of_a_bfloat16_base(llama, mixture, ids):
    """In bfloat16 most weights would not move at this rate."""
    model = mixture(llama().bfloat16())
    before = {name: p.detach().clone() for name, p in model.named_expert_parameters()}
    train(model, ids, steps=1, rate=2e-5)
    moved = [(p != before[name]).float().mean() for name, p in model.named_expert_parameters()]
    assert min(moved) > 0.95


@pytest.mark.parametrize("settings", [{}, {"router_type": "fixed"}, {"routing_mode": "sparse"}])
def test_a_model_cast_to_float64_still_runs(mixture, ids, settings):
    model = mixture(**settings)
    expected = model(ids).logits
    torch.testing.assert_close(model.double()(ids).logits.float(), expected, **CLOSE)


# Generation


def test_generation_follows_the_routing_weights_of_each_prompt(mixture, ids):
    model = mixture()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": NEVER}
    weights = torch.cat([one_hot(0, 1), one_hot(2, 1)])
    together = model.generate(ids, routing_weights=weights, **settings)
    for row in (0, 1):
        alone = model.generate(ids[[row]], routing_weights=weights[[row]], **settings)
        assert torch.equal(together[[row]], alone)
    swapped = model.generate(ids, routing_weights=weights.flip(0), **settings)
    assert (swapped != together).any(-1).all()


@pytest.mark.parametrize("returned", [1, 2])
def test_beams_follow_the_routing_weights_of_their_prompt(mixture, ids, returned):
    model = mixture()
    settings = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": returned}
    settings |= {"do_sample": False, "eos_token_id": NEVER}
    weights = torch.cat([one_hot(0, 1), one_hot(2, 1)])
    together = model.generate(ids, routing_weights=weights, **settings)
    alone = [
        model.generate(ids[[row]], routing_weights=weights[[row]], **settings) for row in (0, 1)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_returned_sequences_follow_the_routing_weights_of_their_prompt(mixture, ids):
    model = mixture()
    weights = torch.cat([one_hot(0, 1), one_hot(2, 1)])
    settings = {"max_new_tokens": 4, "eos_token_id": NEVER, "do_sample": True}
    out = model.generate(
        ids, routing_weights=weights, num_return_sequences=3, top_k=1, **settings
    )  # the best token only, so sampling has no choice
    greedy = model.generate(ids, routing_weights=weights, **settings | {"do_sample": False})
    assert torch.equal(out, greedy.repeat_interleave(3, 0))


def test_left_padded_generation_equals_each_prompt_alone(mixture, ids):
    model = mixture()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": NEVER}
    tokens, mask, _ = padded(ids, "left")
    together = model.generate(tokens, attention_mask=mask, **settings)
    for row in (0, 1):
        alone = model.generate(tokens[row][mask[row].bool()][None], **settings)
        assert torch.equal(together[row, -5:], alone[0, -5:])


def test_routing_weights_of_a_generation_end_with_it(mixture, ids):
    model = mixture()
    before = model(ids).logits
    model.generate(ids, routing_weights=one_hot(1), max_new_tokens=2)
    assert torch.equal(model(ids).logits, before)


def test_routing_weights_of_a_failed_generation_end_with_it(mixture, ids):
    model = mixture()
    before = model(ids).logits
    with pytest.raises(ValueError, match="no_such_argument"):
        model.generate(ids, routing_weights=one_hot(1), no_such_argument=1)
    assert torch.equal(model(ids).logits, before)


def test_generation_takes_one_weight_a_prompt_only(mixture, ids):
    with pytest.raises(ValueError, match=r"\[B, E\], got \[2, 7, 3\]"):
        mixture().generate(ids, routing_weights=torch.ones(2, 7, E))


@pytest.mark.parametrize("name", ["input_ids", "inputs"])
def test_generation_takes_the_prompt_by_the_names_of_transformers(mixture, ids, name):
    model = mixture()
    settings = {"routing_weights": one_hot(1), "max_new_tokens": 2, "do_sample": False}
    assert torch.equal(model.generate(**{name: ids}, **settings), model.generate(ids, **settings))


def test_the_base_generates_with_its_experts_without_the_wrapper(mixture, ids):
    model = mixture()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": NEVER}
    ours = model.base.generate(ids, **settings)
    assert torch.equal(ours, model.generate(ids, **settings))
    with model.disable_adapters():
        assert not torch.equal(model.base.generate(ids, **settings), ours)


# Switching parts off


def test_disabled_adapters_leave_the_base_bit_for_bit(llama, mixture, ids):
    model, base = mixture(), llama()
    with model.disable_adapters():
        assert torch.equal(model.base(ids).logits, base(ids).logits)
    assert (model.base(ids).logits - base(ids).logits).abs().max() > 0.1


def test_adapters_are_back_after_an_error_while_disabled(mixture, ids):
    model = mixture()
    before = model(ids).logits
    with pytest.raises(KeyError), model.disable_adapters():
        raise KeyError
    assert torch.equal(model(ids).logits, before)


def test_a_pass_with_disabled_adapters_needs_no_pass_before_it(llama, mixture, ids):
    model = mixture()
    with model.disable_adapters():
        out = model(ids, labels=ids)
    assert torch.equal(out.logits, llama()(ids).logits)


def test_a_pass_with_disabled_adapters_has_the_loss_of_the_base_alone(mixture, ids):
    """What the sites decided in the pass before is none of its business."""
    model = mixture()
    model(ids)
    with model.disable_adapters():
        out = model(ids[:1, :5], torch.ones(1, 5), ids[:1, :5])
    assert torch.equal(out.loss, out.lm_loss)


def test_a_detached_router_comes_back_bit_for_bit(mixture, ids):
    model = mixture()
    before = model(ids).logits
    model.attach_router(model.detach_router())
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("scope", ["site", "shared"])
def test_without_routers_experts_are_mixed_uniformly(mixture, ids, scope):
    model = mixture(router_scope=scope)
    model.detach_router()
    gates = model(ids).routing.gates
    torch.testing.assert_close(gates, torch.full((2, 7, N, E), 1 / E))


def test_without_shared_router_no_decision_of_an_earlier_pass_is_used(mixture, ids):
    model = mixture(router_scope="shared")
    model(ids)
    model.detach_router()
    gates = model(ids).routing.gates
    torch.testing.assert_close(gates, torch.full((2, 7, N, E), 1 / E))


@pytest.mark.parametrize("settings", [{"router_type": "fixed"}, {"use_moe_routing": False}])
def test_detaching_what_has_no_router_can_be_undone(mixture, ids, settings):
    model = mixture(**settings)
    before = model(ids).logits
    model.attach_router(model.detach_router())
    assert torch.equal(model(ids).logits, before)
    assert not list(model.router_parameters())


def test_fresh_routers_can_be_attached(mixture, ids):
    model = mixture()
    before = model(ids).routing.probabilities
    model.detach_router()
    model.attach_router()
    after = model(ids).routing.probabilities
    assert (after - before).abs().max() > 0.1


def test_fresh_routers_are_in_the_mode_of_the_model(mixture, ids):
    model = mixture(expert_dropout=0.9)
    model.detach_router()
    model.attach_router()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_routers_on_top_of_routers_are_refused(mixture):
    with pytest.raises(ValueError, match="attached already"):
        mixture().attach_router()


def test_routers_for_other_sites_are_refused(mixture):
    model = mixture()
    model.detach_router()
    foreign = nn.ModuleDict({"elsewhere": DynamicHybridRouter(32, model.config)})
    with pytest.raises(ValueError, match=r"elsewhere.*model/layers/0/self_attn"):
        model.attach_router(foreign)


@pytest.mark.parametrize(
    "settings", [{}, {"router_hidden_size": 8}, {"router_type": "threshold"}, {"top_k_experts": 1}]
)
def test_fresh_routers_have_a_row_for_every_expert_there_is(mixture, ids, settings):
    model = mixture(**settings)
    model.detach_router()
    model.experts.create_expert()
    model.attach_router()
    assert model(ids, labels=ids).routing.gates.shape == (2, 7, N, E + 1)


def test_routers_for_another_number_of_experts_are_refused(mixture, ids):
    model = mixture()
    routers = model.detach_router()
    model.experts.create_expert()
    with pytest.raises(
        ValueError, match=r"self_attn has outer.weight \[3, 32\], but there are 4 experts"
    ):
        model.attach_router(routers)
    assert not list(model.router_parameters())
    for router in routers.values():
        router.resize(4)
    model.attach_router(routers)
    assert model(ids).routing.gates.shape == (2, 7, N, E + 1)


# Files


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"router_scope": "shared", "router_hidden_size": 5},
        {"use_rslora": True, "layers_to_transform": [1]},
        {"router_type": "fixed", "fixed_routing_weights": [0.5, 0.3, 0.2]},
        {"use_moe_routing": False},
    ],
    ids=["default", "shared", "one_layer", "fixed", "plain"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_mixture_comes_back_bit_for_bit(family, settings, request, mixture, ids, tmp_path):
    base = request.getfixturevalue(family)
    model = mixture(base(), **settings)
    model.save_pretrained(tmp_path / "saved")
    back = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=base()).eval()
    assert back.config == model.config
    ours, expected = (
        dict([*m.named_expert_parameters(), *m.router_parameters()]) for m in (back, model)
    )
    assert_same(ours, expected, rtol=0, atol=0)
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_the_maturity_state_comes_back_bit_for_bit(llama, mixture, tmp_path):
    model = mixture()
    state = model.maturity._replace(
        evidence=torch.rand(E).double(), fast=torch.tensor([1.5, math.nan, 2.5]).double()
    )
    model.set_maturity(state)
    model.save_pretrained(tmp_path / "saved")
    back = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=llama())
    for ours, expected in zip(back.maturity, state, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(back.mixture.state.maturity_E, model.mixture.state.maturity_E)


def test_a_loaded_mixture_is_in_evaluation_mode(llama, mixture, ids, tmp_path):
    mixture(lora_dropout=0.5).save_pretrained(tmp_path / "saved")
    back = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=llama())
    assert torch.equal(back(ids).logits, back(ids).logits)


def test_no_base_weight_is_saved(mixture, tmp_path):
    model = mixture()
    model.save_pretrained(tmp_path / "saved")
    ours = sum(p.numel() for _, p in [*model.named_expert_parameters(), *model.router_parameters()])
    written = sum(file.stat().st_size for file in (tmp_path / "saved").rglob("*.safetensors"))
    overhead = 8000  # names and shapes
    assert written < 4 * ours + overhead


# Counting, maturity, compilation


def test_parameters_are_counted_apart(llama, mixture):
    model = mixture()
    trainable, frozen = model.count_parameters()
    assert trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert frozen == sum(p.numel() for p in llama().parameters())


def test_parameter_names_are_unique_and_the_same_every_time(mixture):
    first, second = (
        [name for name, _ in [*m.named_expert_parameters(), *m.router_parameters()]]
        for m in (mixture(), mixture())
    )
    assert first == second
    assert len(first) == len(set(first))


def test_a_mature_pool_keeps_k_experts_and_a_newborn_one_all(mixture, ids):
    active = {
        maturity: (mixture(maturity=[maturity] * E)(ids).routing.gates > 0).sum(-1).unique()
        for maturity in (0.0, 1.0)
    }
    assert active[0.0].tolist() == [E]
    assert active[1.0].tolist() == [2]


def test_setting_maturity_reaches_every_router(mixture, ids):
    model = mixture(maturity=[0.0] * E)
    before = (model(ids).routing.gates > 0).sum(-1)
    model.set_maturity(model.maturity._replace(maturity=torch.ones(E, dtype=torch.float64)))
    after = (model(ids).routing.gates > 0).sum(-1)
    assert (before == E).all()
    assert (after == 2).all()


@pytest.mark.parametrize("ranks", [None, [1, 3, 3]])
def test_the_dense_path_compiles_without_a_graph_break(ranks, mixture, ids):
    model = mixture(routing_mode="dense", expert_ranks=ranks)
    compiled = torch.compile(model.base, fullgraph=True, backend="eager")
    ours = compiled(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(ours, model(ids).logits, **CLOSE)


def test_gates_of_other_tokens_than_a_projection_sees_are_an_error_and_not_broadcast(mixture, ids):
    model = mixture()
    projection = model.base.model.layers[0].self_attn.q_proj

    def cut(module, args):
        return (args[0][:1],)

    projection.register_forward_pre_hook(cut, prepend=True)
    with pytest.raises(ValueError, match=r"q_proj got an input of shape \[1, 7, 32\]"):
        model(ids)


def test_a_projection_may_see_its_tokens_in_one_row(mixture, ids):
    model = mixture()
    expected = model(ids).logits
    projection = model.base.model.layers[0].self_attn.q_proj
    projection.register_forward_pre_hook(lambda m, args: (args[0].flatten(0, 1),), prepend=True)
    projection.register_forward_hook(lambda m, args, y: y.unflatten(0, ids.shape))
    torch.testing.assert_close(model(ids).logits, expected)


def test_a_projection_called_outside_its_block_is_refused(mixture, ids):
    model = mixture()
    model(ids)
    with pytest.raises(ValueError, match=r"q_proj was called outside model\.layers\.0\.self_attn"):
        model.base.model.layers[0].self_attn.q_proj(torch.randn(1, 3, 32))


def test_a_block_called_by_itself_routes_and_leaves_nothing(mixture, ids):
    model = mixture()
    seen = []
    layer = model.base.model.layers[0]
    layer.self_attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    layer.self_attn.register_forward_hook(lambda m, args, output: seen.append(output[0]))
    model(ids)
    (args, kwargs), expected = seen[0], seen[1]
    torch.testing.assert_close(layer.self_attn(*args, **kwargs)[0], expected)
    assert model.mixture.state.current() is None


def test_recomputed_layers_have_the_inputs_of_their_own_pass(mixture, ids):
    """Two forward passes before one backward, with other weights in the second."""
    expected = None
    for checkpointed in (False, True):
        model = mixture(router_scope="shared").train()
        if checkpointed:
            model.enable_checkpointing()
        own = model(ids, labels=ids).loss
        first = model(ids, labels=ids, routing_weights=torch.eye(3)[[0, 0]]).loss
        model(ids, routing_weights=torch.eye(3)[[2, 2]])
        (own + first).backward()
        gradients = {name: p.grad for name, p in model.own_parameters()}
        expected = expected or gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


@pytest.mark.parametrize("maturity", [[1.0, 1.0, 1.0], [1.0, 0.0, 0.6]])
def test_a_state_dict_brings_maturity_and_choice_along(mixture, ids, maturity):
    model = mixture(maturity=maturity)
    model.experts.set_active_expert(1)
    model.experts.activate_all_experts()
    other = mixture(maturity=[0.0] * 3)
    for path, adapter in other.mixture.adapters.items():  # the same stacks
        theirs = model.mixture.adapters[path].stacks
        assert len(theirs) == 3
        adapter.set_stacks([copy.deepcopy(stack) for stack in theirs])
    other.load_state_dict(model.state_dict())
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(other(ids).logits, model(ids).logits)


def test_what_a_state_dict_says_of_routing_outlasts_a_step_and_is_saved(mixture, ids, tmp_path):
    model, other = mixture(maturity=[1.0, 0.0, 0.6]), mixture(maturity=[0.0] * 3)
    for each in (model, other):
        each.experts.freeze(0, 1, 2)  # so that whoever is enabled, one stack holds them
        each.experts.set_active_expert(0, 1 if each is model else 2)
    model.experts.set_active_expert(1, 2)
    other.load_state_dict(model.state_dict())
    assert [row.enabled for row in other.experts.table] == [False, True, True]
    expected = model.maturity.maturity.float()
    assert torch.equal(other.maturity.maturity.float(), expected)
    assert other.maturity.maturity.dtype == torch.float64
    other.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", mixture().unload()).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    output = other(ids, labels=ids)
    other.observe(output, ids, steps=1000)
    assert (other.mixture.state.maturity_E - expected).abs().max() < 0.1


def test_a_state_dict_that_says_nothing_new_of_routing_leaves_it_as_exact_as_it_is(mixture):
    model = mixture(maturity=[0.1, 0.2, 0.3])
    before = model.maturity
    model.load_state_dict(model.state_dict())
    assert model.maturity is before


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_computed_backwards_below_the_first_adapted_layer(
    checkpointing, mixture, llama, ids
):
    model = mixture(llama(num_hidden_layers=3), layers_to_transform=[2]).train()
    if checkpointing:
        model.enable_checkpointing()
    has_graph = []
    for layer in model.base.model.layers:
        layer.register_forward_hook(
            lambda module, args, output: has_graph.append(
                (output[0] if isinstance(output, tuple) else output).requires_grad
            )
        )
    model(ids, labels=ids)
    assert has_graph == [False, False, True]


# What a caller's defaults and placement change


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_experts_and_routers_are_float32_whatever_torchs_default_is(llama, ids, dtype):
    torch.set_default_dtype(dtype)
    try:
        model = DyLoRA_MoE.from_base(llama(), MoELoraConfig(num_experts=3, r=2))
        model.experts.create_expert()
        model.detach_router()
        model.attach_router()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for _, p in model.own_parameters()} == {torch.float32}
    assert model.mixture.state.maturity_E.dtype == torch.float32


def test_a_default_device_of_the_caller_does_not_reach_the_experts(llama):
    base = llama()
    with torch.device("meta"):
        model = DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=3, r=2))
        model.experts.create_expert()
    assert {p.device.type for _, p in model.own_parameters()} == {"cpu"}


def test_a_base_without_weights_is_refused(llama):
    with pytest.raises(ValueError, match="has no weights"):
        DyLoRA_MoE.from_base(llama().to("meta"), MoELoraConfig(num_experts=3, r=2))


def test_experts_of_an_offloaded_base_lie_where_it_is_computed(llama, mixture, ids):
    from accelerate import cpu_offload

    expected = mixture(fresh=True)(ids).logits
    base = llama()
    cpu_offload(base, execution_device=torch.device("cpu"))
    assert base.model.layers[0].self_attn.q_proj.weight.device.type == "meta"
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=3, r=2)).eval()
    assert {p.device.type for _, p in model.own_parameters()} == {"cpu"}
    torch.testing.assert_close(model(ids).logits, expected)


def test_routing_weights_go_with_embeddings_as_with_ids(mixture, ids):
    model, weights = mixture(), torch.eye(3)[[1, 2]]
    embeddings = model.base.get_input_embeddings()(ids)
    expected = model(ids, routing_weights=weights).logits
    found = model(None, inputs_embeds=embeddings, routing_weights=weights).logits
    torch.testing.assert_close(found, expected)
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    new = model.generate(inputs_embeds=embeddings, routing_weights=weights, **options)
    whole = model.generate(ids, routing_weights=weights, **options)
    assert torch.equal(new, whole[:, ids.shape[1] :])
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model.generate(routing_weights=weights, max_new_tokens=1)

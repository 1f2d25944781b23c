"""From hidden states to gates: top-k, the maturity-aware gate, dropout, capacity, overrides."""

import math
from itertools import pairwise

import pytest
import torch

import oracles
from dylora import DynamicHybridRouter, MoELoraConfig
from dylora.routing import losses
from dylora.routing.gating import (
    cap_tokens,
    drop_experts,
    expand_override,
    maturity_gates,
    top_k_mask,
)
from dylora.routing.state import Pass, RoutingState

E = 4
SCALES = KEEP, SUM = "keep_size", "sum_to_one"
MATURITIES = {
    "newborn": [0.0, 0.0, 0.0, 0.0],
    "mature": [1.0, 1.0, 1.0, 1.0],
    "mixed": [1.0, 0.3, 0.0, 0.8],
    "one_newborn": [1.0, 1.0, 0.0, 1.0],
}


def random_probabilities(tokens=30, experts=E):
    return (2 * torch.randn(tokens, experts, dtype=torch.float64)).softmax(-1)


def as_maturity(values):
    return torch.tensor(values, dtype=torch.float64)


# The gate


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("maturity", MATURITIES.values(), ids=MATURITIES)
def test_gate_equals_the_formula_token_by_token(maturity, top_k, scale):
    p, m = random_probabilities(), as_maturity(maturity)
    expected = oracles.maturity_gate(p, m, top_k, scale)
    torch.testing.assert_close(maturity_gates(p, m, top_k, scale), expected)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("maturity", MATURITIES.values(), ids=MATURITIES)
def test_gate_has_the_gradient_of_the_formula(maturity, top_k, scale):
    p, m = random_probabilities().requires_grad_(), as_maturity(maturity)
    weight = torch.randn(p.shape, dtype=p.dtype)
    [ours] = torch.autograd.grad((maturity_gates(p, m, top_k, scale) * weight).sum(), p)
    formula = oracles.maturity_gate(p, m, top_k, scale)
    [expected] = torch.autograd.grad((formula * weight).sum(), p)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("experts", [4, 8, 33])
def test_ties_go_to_the_lowest_index(experts):
    equal = torch.full((5, experts), 1 / experts)
    chosen = top_k_mask(equal, 2)
    assert chosen.nonzero()[:, 1].tolist() == [0, 1] * 5


def test_ties_below_the_best_go_to_the_lowest_index():
    assert top_k_mask(torch.tensor([0.1, 0.2, 0.5, 0.2]), 2).tolist() == [False, True, True, False]


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_exactly_k_experts_are_chosen(top_k):
    assert (top_k_mask(random_probabilities(), top_k).sum(-1) == top_k).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_newborn_experts_are_mixed_densely(top_k, scale):
    p, m = random_probabilities(), as_maturity(MATURITIES["newborn"])
    torch.testing.assert_close(maturity_gates(p, m, top_k, scale), p)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_an_update_of_orthogonal_experts_keeps_its_size_when_they_become_sparse(top_k):
    p, updates = random_probabilities(experts=6), torch.linalg.qr(torch.randn(6, 6).double()).Q
    dense, sparse = p @ updates, maturity_gates(p, torch.ones(6), top_k, "keep_size") @ updates
    torch.testing.assert_close(sparse.norm(dim=-1), dense.norm(dim=-1))
    grown = maturity_gates(p, torch.ones(6), top_k, "sum_to_one") @ updates
    assert (grown.norm(dim=-1) > 1.1 * dense.norm(dim=-1)).any() or top_k == 1


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_gate_of_a_single_expert_is_exactly_1(top_k, scale):
    """As in a plain LoRA, in every precision."""
    for dtype in (torch.float32, torch.bfloat16):
        one = torch.ones(5, 1, dtype=dtype)
        assert torch.equal(maturity_gates(one, torch.ones(1, dtype=dtype), top_k, scale), one)


@pytest.mark.parametrize("top_k", [2, 3])
def test_mature_gate_is_the_softmax_over_the_k_chosen_logits(top_k):
    logits = torch.randn(20, E, dtype=torch.float64)
    gates = maturity_gates(logits.softmax(-1), as_maturity(MATURITIES["mature"]), top_k, SUM)
    for logits_E, gates_E in zip(logits, gates, strict=True):
        chosen = oracles.top_k(logits_E.tolist(), top_k)
        expected = torch.zeros(E, dtype=torch.float64)
        expected[chosen] = logits_E[chosen].softmax(-1)
        torch.testing.assert_close(gates_E, expected)


def test_mature_top_1_gate_is_the_raw_probability():
    p = random_probabilities()
    gates = maturity_gates(p, as_maturity(MATURITIES["mature"]), 1, SUM)
    assert torch.equal(gates.max(-1).values, p.max(-1).values)
    assert ((gates > 0).sum(-1) == 1).all()


@pytest.mark.parametrize("maturity", MATURITIES.values(), ids=MATURITIES)
def test_gates_sum_to_one_from_top_2_on(maturity):
    sums = maturity_gates(random_probabilities(), as_maturity(maturity), 2, SUM).sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("newborn", range(E))
def test_a_newborn_among_mature_experts_costs_one_extra_expert(newborn, top_k):
    maturity = [float(expert != newborn) for expert in range(E)]
    gates = maturity_gates(random_probabilities(), as_maturity(maturity), top_k, KEEP)
    assert ((gates > 0).sum(-1) == top_k + 1).all()
    assert (gates[:, newborn] > 0).all()


@pytest.mark.parametrize("top_k", [1, 2])
def test_gate_of_permuted_experts_is_the_permuted_gate(top_k):
    p, m = random_probabilities(), as_maturity(MATURITIES["mixed"])
    order = torch.tensor([3, 1, 0, 2])
    permuted = maturity_gates(p[:, order], m[order], top_k, KEEP)
    torch.testing.assert_close(permuted, maturity_gates(p, m, top_k, KEEP)[:, order])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_gate_moves_continuously_as_all_experts_mature_together(top_k, scale):
    p, steps = random_probabilities(), 400
    path = [
        maturity_gates(p, torch.full((E,), step / steps, dtype=torch.float64), top_k, scale)
        for step in range(steps + 1)
    ]
    largest_step = max(float((b - a).abs().max()) for a, b in pairwise(path))
    assert (path[-1] - path[0]).abs().max() > 0.1
    assert largest_step < 5 / steps


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_top_k_gate_teaches_the_router(top_k, scale):
    """A renormalised top-1 gate would be the constant 1 and have no gradient."""
    logits = torch.randn(6, E, dtype=torch.float64, requires_grad=True)
    gates = maturity_gates(logits.softmax(-1), as_maturity(MATURITIES["mature"]), top_k, scale)
    (gates * torch.randn(6, E, dtype=torch.float64)).sum().backward()
    assert logits.grad.abs().amax(-1).min() > 1e-3


# Dropout of experts


def test_expert_dropout_keeps_at_least_one_expert():
    p = random_probabilities(5 * 200).view(200, 5, E)
    kept = drop_experts(p, 0.95) > 0
    assert (kept.sum(-1) >= 1).all()
    assert (kept.sum(-1) == 1).float().mean() > 0.5  # so the rule has been at work


def test_expert_dropout_keeps_an_expert_at_the_rate_it_says():
    p = torch.full((20_000, 2, 3), 1 / 3)
    share = (drop_experts(p, 0.7)[:, 0] > 0).float().mean(0)
    expected = torch.full((3,), 1 - 0.7 + 0.7**3 / 3)
    torch.testing.assert_close(share, expected, rtol=0, atol=0.015)


def test_expert_dropout_does_not_look_at_the_tokens():
    p = random_probabilities(5 * 40).view(40, 5, E)
    torch.manual_seed(3)
    one = drop_experts(p, 0.9) > 0
    torch.manual_seed(3)
    assert torch.equal(drop_experts(p.roll(1, -1), 0.9) > 0, one)


def test_expert_dropout_never_keeps_an_expert_that_takes_no_part_alone():
    p = torch.tensor([0.0, 0.5, 0.5]).expand(500, 2, 3)
    torch.testing.assert_close(drop_experts(p, 0.95).sum(-1), torch.ones(500, 2))


def test_expert_dropout_renormalises():
    kept = drop_experts(random_probabilities(5 * 40).view(40, 5, E), 0.5)
    torch.testing.assert_close(kept.sum(-1), torch.ones_like(kept[..., 0]))


def test_expert_dropout_keeps_the_proportions_of_the_survivors():
    p = random_probabilities(5 * 40).view(40, 5, E)
    ratios = drop_experts(p, 0.5) / p
    highest = ratios.amax(-1, keepdim=True)
    torch.testing.assert_close(ratios, torch.where(ratios > 0, highest, 0.0))


def test_expert_dropout_is_drawn_once_a_sequence():
    kept = drop_experts(random_probabilities(5 * 40).view(40, 5, E), 0.5) > 0
    assert torch.equal(kept, kept[:, :1].expand_as(kept))
    assert len({tuple(row.tolist()) for row in kept[:, 0]}) > 1


def test_expert_dropout_drops_at_its_rate():
    p = torch.full((20_000, 1, E), 1 / E)
    share = (drop_experts(p, 0.3) == 0).float().mean(0).squeeze()
    dropped_all = 0.3**E  # then the best one, here the first, is put back
    expected = torch.tensor([0.3 - dropped_all, 0.3, 0.3, 0.3])
    torch.testing.assert_close(share, expected, atol=0.015, rtol=0)


def test_expert_dropout_leaves_the_expected_gate_of_equal_experts():
    p = torch.full((20_000, 1, E), 1 / E)
    mean = drop_experts(p, 0.3).mean(0).squeeze()
    torch.testing.assert_close(mean, torch.full((E,), 1 / E), atol=0.01, rtol=0)


# Capacity


def sparse_gates(batch=3, length=5, top_k=2):
    mature = as_maturity(MATURITIES["mature"])
    p = random_probabilities(batch * length)
    return maturity_gates(p, mature, top_k, SUM).view(batch, length, E)


def ragged_mask():
    return torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])


@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0, 1.25])
@pytest.mark.parametrize("mask", [None, ragged_mask()], ids=["full", "padded"])
def test_capacity_equals_the_loop_over_experts(factor, mask):
    gates = sparse_gates()
    real = [True] * 15 if mask is None else mask.flatten().bool().tolist()
    ours = cap_tokens(gates, 2, factor, mask).view(-1, E)[real]
    expected = oracles.capacity(gates.view(-1, E), real, 2, factor)[real]
    assert not torch.equal(expected, gates.view(-1, E)[real]) or factor > 0.5
    torch.testing.assert_close(ours, expected, atol=0, rtol=0)


@pytest.mark.parametrize("factor", [0.3, 0.5, 1.0])
def test_an_expert_never_takes_more_tokens_than_its_capacity(factor):
    gates = torch.full((2, 8, E), 0.25)  # everybody wants everything
    taken = (cap_tokens(gates, 2, factor, None) > 0).sum((0, 1))
    assert taken.tolist() == [math.ceil(factor * 2 * 16 / E)] * E


def test_padding_neither_counts_nor_takes_a_place():
    gates = sparse_gates(batch=2, length=4)
    padding = torch.full((2, 3, E), 0.9, dtype=gates.dtype)  # larger gates than any token's
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * 2)
    padded = cap_tokens(torch.cat([padding, gates], 1), 2, 0.5, mask)
    assert torch.equal(padded[:, 3:], cap_tokens(gates, 2, 0.5, None))


def test_a_mask_that_covers_a_cache_as_well_is_cut_to_the_tokens():
    gates = sparse_gates()
    past = torch.ones(3, 9, dtype=torch.long)
    ours = cap_tokens(gates, 2, 0.5, torch.cat([past, ragged_mask()], 1))
    assert torch.equal(ours, cap_tokens(gates, 2, 0.5, ragged_mask()))


def sparse_router(training=True, **settings):
    settings = {
        "router_type": "learned",
        "num_experts": E,
        "expert_capacity_factor": 0.5,
    } | settings
    return DynamicHybridRouter(8, MoELoraConfig(**settings)).train(training)


def largest_load(router, maturity=1.0):
    x = torch.randn(2, 10, 8)
    state = RoutingState(E)
    state.set_maturity(torch.full((E,), maturity))
    return int((router(x, Pass(state)).gates > 0).sum((0, 1)).max())


def test_capacity_holds_in_sparse_training():
    assert largest_load(sparse_router()) == 5  # ceil(0.5 · 2 · 20 / 4)


@pytest.mark.parametrize(
    "router",
    [
        sparse_router(training=False),
        sparse_router(expert_capacity_factor=None),
        sparse_router(router_type="learned_with_maturity"),
    ],
    ids=["evaluation", "no_limit", "maturity"],
)
def test_capacity_does_not_hold_elsewhere(router):
    assert largest_load(router) > 5


def test_capacity_of_random_gates_keeps_the_share_that_chance_allows():
    """An expert is chosen by Binomial(T, K/E) tokens, of which min(load, capacity) stay."""
    tokens, top_k, capacity, rounds = 12, 2, 6, 4000  # capacity: ceil(1 · 2 · 12 / 4)
    p = torch.rand(rounds, tokens, E)
    chosen = p * top_k_mask(p, top_k)
    kept = torch.stack([cap_tokens(gates[None], top_k, 1.0, None) for gates in chosen])
    chance = [
        math.comb(tokens, n) * (top_k / E) ** n * (1 - top_k / E) ** (tokens - n)
        for n in range(tokens + 1)
    ]
    expected = sum(min(n, capacity) * weight for n, weight in enumerate(chance))
    found = (kept > 0).float().sum((1, 2)).mean(0)
    torch.testing.assert_close(found, torch.full((E,), expected), rtol=0, atol=0.06)


def test_capacity_is_shared_by_the_experts_that_take_part():
    """Retired experts hold no tokens: counting them would drop tokens of an even routing."""
    router, x = sparse_router(expert_capacity_factor=1.0, top_k_experts=1), torch.randn(4, 50, 8)
    state = RoutingState(E)
    state.set_active([True, False, True, False])
    loads = (router(x, Pass(state)).gates > 0).sum((0, 1))
    assert loads.max() == 100  # ceil(1 · 1 · 200 / 2)
    assert loads[1] == loads[3] == 0


def test_capacity_of_a_single_expert_is_every_token():
    router, x = sparse_router(expert_capacity_factor=1.0), torch.randn(4, 50, 8)
    state = RoutingState(E)
    state.set_active([False, False, True, False])
    gates = router(x, Pass(state)).gates
    assert torch.equal(gates, torch.tensor([0.0, 0.0, 1.0, 0.0]).expand_as(gates))


# Experts that take no part

MODES = {
    "maturity": {},
    "maturity, top-1": {"top_k_experts": 1},
    "dense": {"routing_mode": "dense"},
    "sparse": {"routing_mode": "sparse"},
    "sparse, top-1": {"routing_mode": "sparse", "top_k_experts": 1},
    "dense_train_sparse_eval": {"routing_mode": "dense_train_sparse_eval"},
    "learned": {"router_type": "learned"},
    "dropout": {"expert_dropout": 0.6},
    "noise": {"router_noise": 2.0},
    "capacity": {"router_type": "learned", "expert_capacity_factor": 0.5},
}


def route_among(active, training, maturity=MATURITIES["mixed"], **settings):
    """Output of a router of E experts of which some are enabled, on 30 tokens."""
    settings = {"expert_capacity_factor": None} | settings
    torch.manual_seed(1)
    router = DynamicHybridRouter(8, MoELoraConfig(num_experts=E, **settings)).train(training)
    torch.nn.init.normal_(router.outer.bias)
    state, x = RoutingState(E), 3 * torch.randn(5, 6, 8)
    state.set_maturity(torch.tensor(maturity))
    state.set_active(active)
    return router(x.requires_grad_(), Pass(state))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("out", [[1], [0, 3]], ids=str)
def test_an_expert_that_takes_no_part_has_no_gate_in_any_mode(mode, training, out):
    active = [expert not in out for expert in range(E)]
    found = route_among(active, training, **MODES[mode])
    assert not found.probabilities[..., out].any()
    assert not found.gates[..., out].any()
    torch.testing.assert_close(found.probabilities.sum(-1), torch.ones(5, 6))
    if mode not in ("capacity", "dropout"):  # of the same length as the probabilities
        lengths = [value.norm(dim=-1) for value in (found.gates, found.probabilities)]
        torch.testing.assert_close(*lengths)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("mode", list(MODES)[:7])
@pytest.mark.parametrize("out", [0, 2])
def test_the_others_are_routed_as_if_it_had_never_been_there(mode, training, out):
    """The gate of the formula over the remaining experts, with their own logits."""
    rest = [expert for expert in range(E) if expert != out]
    found = route_among([expert != out for expert in range(E)], training, **MODES[mode])
    p = (found.logits[..., rest] / 2).softmax(-1).view(-1, E - 1)  # temperature 2
    settings = MODES[mode]
    m = as_maturity(MATURITIES["mixed"])[rest]
    if settings.get("routing_mode") == "sparse" or "router_type" in settings:
        m = torch.ones_like(m)
    if settings.get("routing_mode") == "dense_train_sparse_eval":
        m = torch.zeros_like(m) if training else torch.ones_like(m)
    if settings.get("routing_mode") == "dense":
        m = torch.zeros_like(m)
    expected = oracles.maturity_gate(p, m.to(p), settings.get("top_k_experts", 2))
    torch.testing.assert_close(found.gates[..., rest].reshape(-1, E - 1), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("maturity", MATURITIES.values(), ids=MATURITIES)
def test_the_only_enabled_expert_has_the_whole_gate_though_k_is_larger(mode, maturity):
    found = route_among([False, False, True, False], True, maturity, **MODES[mode])
    only = torch.tensor([0.0, 0.0, 1.0, 0.0]).expand_as(found.gates)
    assert torch.equal(found.probabilities, only)
    routed = found.gates.sum(-1) > 0
    assert int(routed.sum()) == (15 if mode == "capacity" else 30)  # of 30 tokens
    assert torch.equal(found.gates[routed], only[routed])


def test_more_chosen_experts_than_take_part_mix_those_that_do():
    active, settings = [True, False, False, True], {"top_k_experts": 3, "router_type": "learned"}
    found = route_among(active, False, **settings)
    assert torch.equal(found.gates > 0, torch.tensor(active).expand_as(found.gates))
    torch.testing.assert_close(found.gates, found.probabilities)


@pytest.mark.parametrize("active", [[True, False, True, True], [False, False, True, False]])
def test_the_z_loss_of_masked_logits_is_finite_and_sees_the_others_alone(active):
    found = route_among(active, True)
    statistics = losses.routing_statistics(
        *(value[:, :, None] for value in found[:3]), None, top_k=min(2, sum(active))
    )
    z_loss = losses.z_loss(statistics.squared_logsumexp_N, statistics.tokens)
    expected = found.logits[..., active].logsumexp(-1).square().mean()
    torch.testing.assert_close(z_loss, expected)
    [gradient] = torch.autograd.grad(z_loss, found.logits)
    assert gradient.isfinite().all()
    assert not gradient[..., [not enabled for enabled in active]].any()
    assert all(value.isfinite().all() for value in statistics)


# The router


def route(x, maturity=None, **settings):
    """Output of a fresh evaluating router on x [B, S, 8]."""
    training = settings.pop("training", False)
    torch.manual_seed(1)
    router = DynamicHybridRouter(8, MoELoraConfig(num_experts=E, **settings)).train(training)
    torch.nn.init.normal_(router.outer.bias)
    state = RoutingState(E)
    if maturity is not None:
        state.set_maturity(torch.tensor(maturity))
    return router, router(x, Pass(state))


def test_probabilities_are_the_softmax_of_the_logits_over_the_temperature():
    _, out = route(torch.randn(2, 3, 8), router_temperature=0.5)
    torch.testing.assert_close(out.probabilities, (out.logits * 2).softmax(-1))


def test_logits_of_a_linear_router_are_one_linear_layer():
    x = torch.randn(2, 3, 8)
    router, out = route(x)
    torch.testing.assert_close(out.logits, x @ router.outer.weight.T + router.outer.bias)


def test_a_hidden_size_makes_two_layers_with_silu_between():
    x = torch.randn(2, 3, 8)
    router, out = route(x, router_hidden_size=5)
    assert router.inner.weight.shape == (5, 8)
    torch.testing.assert_close(out.logits, router.outer(torch.nn.functional.silu(router.inner(x))))


@pytest.mark.parametrize("hidden", [None, 6])
def test_routing_of_bfloat16_states_is_computed_in_float32(hidden):
    x = torch.randn(2, 3, 8).bfloat16()
    _, out = route(x, router_hidden_size=hidden)
    _, exact = route(x.float(), router_hidden_size=hidden)
    assert {tensor.dtype for tensor in out[:3]} == {torch.float32}
    assert torch.equal(out.logits, exact.logits)


def test_autocast_does_not_reach_the_logits():
    x = torch.randn(2, 3, 8)
    _, exact = route(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, out = route(x)
    assert torch.equal(out.logits, exact.logits)


def test_router_rows_start_normal_with_half_over_the_root_of_the_width():
    router = DynamicHybridRouter(2500, MoELoraConfig(num_experts=E))
    torch.testing.assert_close(router.outer.weight.std(), torch.tensor(0.01), rtol=0.05, atol=0)
    assert router.outer.weight.abs().max() > 0.03
    assert not router.outer.bias.any()


def active(out):
    return (out.gates > 0).sum(-1).unique().tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"router_type": "learned"}, [2]),
        ({"router_type": "learned_with_maturity"}, [4]),
        ({"routing_mode": "sparse"}, [2]),
        ({"routing_mode": "dense"}, [4]),
        ({"routing_mode": "dense", "router_type": "learned"}, [4]),
        ({"routing_mode": "dense_train_sparse_eval"}, [2]),
        ({"routing_mode": "dense_train_sparse_eval", "training": True}, [4]),
    ],
)
def test_routing_mode_decides_how_many_experts_a_newborn_pool_mixes(settings, expected):
    settings = {"expert_capacity_factor": None} | settings
    assert active(route(torch.randn(2, 3, 8), **settings)[1]) == expected


def test_dense_mode_ignores_maturity():
    _, out = route(torch.randn(2, 3, 8), [1.0] * E, routing_mode="dense")
    assert torch.equal(out.gates, out.probabilities)


def test_gates_follow_the_maturity_in_the_shared_state():
    _, out = route(torch.randn(2, 3, 8), MATURITIES["mixed"], top_k_experts=1)
    expected = oracles.maturity_gate(
        out.probabilities.view(-1, E), torch.tensor(MATURITIES["mixed"]), 1
    )
    torch.testing.assert_close(out.gates.view(-1, E), expected)


def test_training_and_evaluation_route_alike_by_maturity():
    x = torch.randn(2, 3, 8)
    _, training = route(x, MATURITIES["mixed"], training=True)
    _, evaluating = route(x, MATURITIES["mixed"])
    assert torch.equal(training.gates, evaluating.gates)


def test_expert_dropout_is_for_training_only():
    x = torch.randn(4, 3, 8)
    settings = {"expert_dropout": 0.5, "routing_mode": "dense"}
    assert torch.equal(route(x, **settings)[1].gates, route(x, routing_mode="dense")[1].gates)
    assert (route(x, training=True, **settings)[1].gates == 0).any()


def test_probabilities_for_the_balance_loss_are_those_before_expert_dropout():
    x = torch.randn(4, 3, 8)
    _, dropped = route(x, training=True, expert_dropout=0.5)
    _, plain = route(x)
    assert torch.equal(dropped.probabilities, plain.probabilities)


# A caller's weights


def test_weights_of_a_sequence_hold_for_each_of_its_tokens():
    weights = torch.rand(2, E)
    gates = expand_override(weights, site=0, batch=2, length=3)
    assert torch.equal(gates, torch.stack([weights] * 3, 1))


def test_weights_of_tokens_are_taken_as_they_are():
    weights = torch.rand(2, 3, E)
    assert torch.equal(expand_override(weights, site=1, batch=2, length=3), weights)


def test_weights_of_sites_reach_their_own_site():
    weights = torch.rand(2, 3, 5, E)
    gates = expand_override(weights, site=4, batch=2, length=3)
    assert torch.equal(gates, weights[:, :, 4])


def test_fewer_weights_than_sequences_are_repeated_row_by_row():
    weights = torch.rand(2, E)
    gates = expand_override(weights, site=0, batch=6, length=1)[:, 0]
    assert torch.equal(gates, weights[[0, 0, 0, 1, 1, 1]])


# The state of a pass


def test_absolute_logits_take_a_row_for_what_it_is_up_to_its_sign():
    config = MoELoraConfig(num_experts=2, router_logits="absolute")
    router, x = DynamicHybridRouter(3, config), torch.randn(1, 5, 3)
    with torch.no_grad():
        router.outer.weight[1] = -router.outer.weight[0]
        router.outer.bias.copy_(torch.tensor([0.0, 0.25]))
    logits = router.score(x)
    assert (logits[..., 0] > 0).all()
    torch.testing.assert_close(logits[..., 1], logits[..., 0] + 0.25)


def masks_seen(model, *args, **kwargs) -> list:
    """The masks that the routers of a pass were given."""
    seen = []
    handles = [
        router.register_forward_pre_hook(lambda module, args: seen.append(args[1].token_mask))
        for _, router in model.routers()
    ]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def test_the_mask_of_a_pass_reaches_its_routers_and_not_the_next_pass(ids, mixture):
    model, mask = mixture(), torch.ones_like(ids)
    assert all(seen is mask for seen in masks_seen(model, ids, mask))
    assert masks_seen(model, ids) == [None, None]

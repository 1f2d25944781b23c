"""Threshold routing (AdaMoLE) against its formula, and in a mixture's life."""

import math

import pytest
import torch

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.routing.router import router_class
from dylora.routing.state import Pass, RoutingState
from dylora.routing.threshold import ThresholdRouter

E, D = 4, 6
SETTINGS = {"router_type": "threshold"}


def built(**settings):
    router = ThresholdRouter(D, MoELoraConfig(num_experts=E, **SETTINGS | settings)).double()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    return router.eval()


def by_hand(router, x_TD, temperature=2.0):
    """The equations, token by token and expert by expert."""
    rows = []
    for x_D in x_TD:
        scores = [
            torch.dot(w, x_D) + b
            for w, b in zip(router.outer.weight, router.outer.bias, strict=True)
        ]
        powers = [torch.exp(score / temperature) for score in scores]
        score = torch.dot(router.threshold.weight[0], x_D) + router.threshold.bias[0]
        threshold = 1 / (1 + torch.exp(-score)) / E
        kept = [torch.clamp(power / sum(powers) - threshold, min=0) for power in powers]
        rows.append(torch.stack([value / sum(kept) for value in kept]))
    return torch.stack(rows)


def test_gates_and_gradients_are_those_of_the_equations():
    router, x = built(), torch.randn(1, 9, D, dtype=torch.float64)
    found = router(x, Pass(RoutingState(E))).gates
    expected = by_hand(router, x[0])
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    parameters = list(router.parameters())
    ours = torch.autograd.grad((found[0] * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_every_token_keeps_at_least_one_expert_and_some_lose_some():
    router = built(router_temperature=0.5)
    with torch.no_grad():
        router.threshold.bias.fill_(30.0)  # the highest threshold there is
        gates = router(torch.randn(1, 500, D, dtype=torch.float64), Pass(RoutingState(E))).gates
    torch.testing.assert_close(gates.sum(-1), torch.ones(1, 500).double())
    kept = (gates > 0).sum(-1)
    assert kept.min() >= 1
    assert kept.min() < E


def test_experts_that_take_no_part_get_nothing():
    state = RoutingState(E)
    state.set_active([True, False, True, False])
    gates = built()(torch.randn(1, 50, D, dtype=torch.float64), Pass(state)).gates
    assert not gates[..., [1, 3]].any()
    torch.testing.assert_close(gates.sum(-1), torch.ones(1, 50).double())


def test_it_is_the_router_that_the_configuration_names():
    assert router_class(MoELoraConfig(**SETTINGS)) is ThresholdRouter


def test_its_parameters_are_those_of_its_specification():
    router = built(router_hidden_size=5)
    spec = ThresholdRouter.state_spec(router.config, E)
    found = {name: list(p.shape) for name, p in router.named_parameters()}
    assert found.keys() == spec.keys()
    for name, shape in spec.items():
        assert all(want in (None, size) for want, size in zip(shape, found[name], strict=True))


def test_a_mixture_trains_grows_and_comes_back_bit_for_bit(mixture, llama, ids, tmp_path):
    model = mixture(**SETTINGS)
    optimizer = torch.optim.AdamW([p for _, p in model.own_parameters()], lr=1e-2)
    model.experts.attach_optimizer(optimizer)
    losses = []
    for step in range(8):
        output = model.train()(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.lm_loss.item())
        if step == 3:
            new = model.experts.create_expert()
            assert not model.eval()(ids).routing.gates[..., new].any()
    assert losses[-1] < losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    model.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", llama())
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_modes_of_the_maturity_gate_are_refused(mode):
    with pytest.raises(ValueError, match="routing_mode is"):
        MoELoraConfig(**SETTINGS, routing_mode=mode)


def test_an_expert_that_the_first_token_does_not_choose_is_dropped_no_more_often():
    """An expert stays with probability 1 - rate + rateᴱ/E, whatever the tokens are."""
    router, rate = built(router_temperature=0.1, expert_dropout=0.5).train(), 0.5
    with torch.no_grad():
        x = torch.randn(1, 40, D, dtype=torch.float64)
        whole = router.eval()(x, Pass(RoutingState(E))).gates
        left_out = (whole[0, 0] == 0) & (whole[0] > 0).any(0)
        assert left_out.any()
        many = router.train()(x.expand(2000, -1, -1), Pass(RoutingState(E))).gates
    kept_E = (many > 0).any(1).double().mean(0)
    expected = 1 - rate + rate**E / E
    torch.testing.assert_close(kept_E, torch.full_like(kept_E, expected), atol=0.05, rtol=0)


def test_a_token_keeps_at_least_one_of_the_experts_that_dropout_leaves():
    router = built(router_temperature=0.1, expert_dropout=0.9).train()
    gates = router(torch.randn(50, 20, D, dtype=torch.float64), Pass(RoutingState(E))).gates
    torch.testing.assert_close(gates.sum(-1), torch.ones(50, 20).double())

"""Losses against loops, and what the balance losses read when routing is good or has collapsed."""

import math

import pytest
import torch
import torch.nn.functional as F

import oracles
from dylora.kernels.cross_entropy import count_targets, token_losses
from dylora.routing.losses import (
    assignment_fractions,
    balance_loss,
    fractions_of,
    routing_statistics,
    z_loss,
)

B, S, N, E, K = 3, 5, 2, 4, 2


@pytest.fixture(autouse=True)
def _float64(_seeded):
    """Exact numbers; half precision has a test of its own."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def random_routing(scale=2.0):
    """Probabilities and logits [B, S, N, E]; the probabilities serve as gates."""
    logits = scale * torch.randn(B, S, N, E)
    return logits.softmax(-1), logits


def ragged_mask():
    return torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])


def statistics_of(probabilities, logits=None, mask=None, gates=None, top_k=K):
    logits = probabilities.log() if logits is None else logits
    gates = probabilities if gates is None else gates
    return routing_statistics(gates, probabilities, logits, mask, top_k=top_k)


def balance_of(statistics, kind="aux_loss"):
    fractions = fractions_of(statistics)[kind]
    return balance_loss(statistics.probability_NE, fractions, statistics.tokens)


def collapsed(winners, sharpness=30.0):
    """Probabilities [B, S, N, E], all on the given experts of each site in equal parts."""
    logits = torch.zeros(B, S, len(winners), E)
    for site, experts in enumerate(winners):
        logits[:, :, site, experts] = sharpness
    return logits.softmax(-1)


# Cross-entropy


@pytest.fixture
def language():
    logits = torch.randn(2, 6, 9)
    labels = torch.randint(0, 9, (2, 6))
    labels[0, :3] = -100
    labels[1, -1] = -100
    return logits, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_lm_loss_equals_the_loop_over_tokens(language, smoothing):
    logits, labels = language
    ours = token_losses(logits, labels, smoothing).sum() / count_targets(labels)
    assert ours.item() == pytest.approx(oracles.lm_loss(logits, labels, smoothing), rel=1e-12)


def test_a_position_holds_the_loss_of_the_token_after_it(language):
    logits, labels = language
    ours = token_losses(logits, labels)
    assert ours[1, 2].item() == pytest.approx(-logits[1, 2].log_softmax(-1)[labels[1, 3]].item())


def test_positions_without_target_have_zero_loss_and_no_gradient(language):
    logits, labels = language
    logits.requires_grad_()
    losses = token_losses(logits, labels)
    losses.sum().backward()
    without = torch.tensor([[1, 1, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1]]).bool()
    assert not losses[without].any()
    assert not logits.grad[without].any()
    assert losses[~without].all()


def test_the_first_token_is_no_target():
    assert count_targets(torch.tensor([[5, 6, -100, 7], [5, -100, -100, -100]])) == 2


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(language):
    _, labels = language
    losses = token_losses(torch.zeros(2, 6, 9), labels)
    torch.testing.assert_close(losses[losses > 0], torch.full((7,), math.log(9)))


def test_losses_of_bfloat16_logits_are_computed_in_float32(language):
    logits, labels = language
    logits = logits.bfloat16()
    assert torch.equal(token_losses(logits, labels), token_losses(logits.float(), labels))


# Balance and z losses


@pytest.mark.parametrize("kind", ["aux_loss", "switch"])
@pytest.mark.parametrize("mask", [None, ragged_mask()], ids=["full", "padded"])
def test_balance_loss_equals_the_loop_over_tokens_and_sites(kind, mask):
    probabilities, _ = random_routing()
    real = [True] * B * S if mask is None else mask.flatten().bool().tolist()
    per_site = [
        oracles.balance_loss(probabilities[:, :, site].reshape(-1, E), real, K, kind)
        for site in range(N)
    ]
    ours = balance_of(statistics_of(probabilities, mask=mask), kind=kind)
    torch.testing.assert_close(ours, sum(per_site) / N)


@pytest.mark.parametrize("kind", ["aux_loss", "switch"])
def test_balance_loss_has_the_gradient_of_the_loop(kind):
    probabilities, _ = random_routing()
    probabilities.requires_grad_()
    [ours] = torch.autograd.grad(balance_of(statistics_of(probabilities), kind=kind), probabilities)
    per_site = [
        oracles.balance_loss(probabilities[:, :, site].reshape(-1, E), [True] * B * S, K, kind)
        for site in range(N)
    ]
    [expected] = torch.autograd.grad(sum(per_site) / N, probabilities)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", ["aux_loss", "switch"])
def test_balance_loss_is_one_when_the_probabilities_are_uniform(kind):
    uniform = torch.full((B, S, N, E), 1 / E)
    assert balance_of(statistics_of(uniform), kind=kind).item() == pytest.approx(1)


def test_balance_loss_is_one_when_the_assignments_are_uniform():
    probabilities = torch.rand(1, E, 1, E).softmax(-1)
    turns = torch.stack([probabilities[0, 0, 0].roll(turn) for turn in range(E)])[None, :, None]
    assert balance_of(statistics_of(turns)).item() == pytest.approx(1)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_e_over_k_when_collapsed_onto_k_experts(top_k):
    winners = list(range(top_k))
    loss = balance_of(statistics_of(collapsed([winners] * N), top_k=top_k))
    assert loss.item() == pytest.approx(E / top_k)


def test_switch_loss_is_e_when_collapsed_onto_one_expert():
    loss = balance_of(statistics_of(collapsed([[2]] * N)), kind="switch")
    assert loss.item() == pytest.approx(E)


def test_sites_collapsed_on_different_experts_read_as_collapsed():
    """Pooled over sites they would read 1, as if all were well."""
    probabilities = collapsed([[0], [1], [2], [3]])
    assert balance_of(statistics_of(probabilities, top_k=1)).item() == pytest.approx(E)


def test_extra_padding_does_not_change_any_statistic():
    probabilities, logits = random_routing()
    junk, junk_logits = (
        collapsed([[3]] * N)[:, :2],
        50 + torch.zeros(B, 2, N, E),
    )
    padded = statistics_of(
        torch.cat([junk, probabilities], 1),
        torch.cat([junk_logits, logits], 1),
        torch.cat([torch.zeros(B, 2), torch.ones(B, S)], 1),
    )
    for ours, expected in zip(padded, statistics_of(probabilities, logits), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("splits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["aux_loss", "switch"])
def test_balance_loss_adds_up_over_a_split_batch_with_the_whole_fractions(splits, kind):
    probabilities = torch.rand(8, S, N, E).softmax(-1).requires_grad_()
    summed = probabilities.sum((0, 1))
    fractions = fractions_of(statistics_of(probabilities.detach()))[kind]
    tokens = 8 * S
    whole = balance_loss(summed, fractions, tokens)
    parts = [
        balance_loss(part.sum((0, 1)), fractions, tokens) for part in probabilities.chunk(splits)
    ]
    [expected] = torch.autograd.grad(whole, probabilities)
    [ours] = torch.autograd.grad(sum(parts), probabilities)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(ours, expected)


def test_balance_loss_is_linear_in_the_probabilities_for_given_fractions():
    first, second = torch.rand(2, N, E)
    fractions = torch.rand(N, E)
    together = balance_loss(2 * first + 3 * second, fractions, 7)
    apart = 2 * balance_loss(first, fractions, 7) + 3 * balance_loss(second, fractions, 7)
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("kind", ["aux_loss", "switch"])
def test_balance_loss_does_not_look_at_the_gates(kind):
    """Gates after top-k would teach the chosen experts only."""
    probabilities, logits = random_routing()
    gates = probabilities.roll(1, -1)
    ours = balance_of(statistics_of(probabilities, logits, gates=gates), kind=kind)
    assert torch.equal(ours, balance_of(statistics_of(probabilities, logits), kind=kind))


def test_fractions_are_shares_of_the_assignments_of_each_site():
    fractions = assignment_fractions(torch.tensor([[2.0, 2.0, 0.0], [1.0, 3.0, 4.0]]))
    assert fractions.tolist() == [[0.5, 0.5, 0.0], [0.125, 0.375, 0.5]]


@pytest.mark.parametrize("mask", [None, ragged_mask()], ids=["full", "padded"])
def test_z_loss_equals_the_loop_over_tokens_and_sites(mask):
    probabilities, logits = random_routing()
    real = [True] * B * S if mask is None else mask.flatten().bool().tolist()
    per_site = [oracles.z_loss(logits[:, :, site].reshape(-1, E), real) for site in range(N)]
    statistics = statistics_of(probabilities, logits, mask)
    ours = z_loss(statistics.squared_logsumexp_N, statistics.tokens)
    assert ours.item() == pytest.approx(sum(per_site) / N, rel=1e-12)


# Statistics


def test_statistics_of_two_batches_add_up_to_those_of_both():
    probabilities, logits = random_routing()
    mask = ragged_mask()
    parts = [
        statistics_of(probabilities[rows], logits[rows], mask[rows])
        for rows in (slice(0, 1), slice(1, 3))
    ]
    whole = statistics_of(probabilities, logits, mask)
    for ours, expected in zip(parts[0].plus(parts[1]), whole, strict=True):
        torch.testing.assert_close(ours, expected)


def test_only_probabilities_and_logits_carry_a_gradient():
    probabilities, logits = (value.requires_grad_() for value in random_routing())
    statistics = statistics_of(probabilities, logits)
    carrying = {name for name, value in statistics._asdict().items() if value.requires_grad}
    assert carrying == {"probability_NE", "squared_logsumexp_N"}


def test_active_experts_are_those_with_a_gate():
    gates = torch.zeros(B, S, N, E)
    gates[:, :, 0, :3] = 0.2
    gates[:, :, 1, 3] = 1.0
    probabilities, logits = random_routing()
    active = statistics_of(probabilities, logits, ragged_mask(), gates=gates).active_N
    assert active.tolist() == [3 * 9, 1 * 9]


def test_gate_entropy_is_zero_for_one_expert_and_log_e_for_all_alike():
    gates = torch.zeros(B, S, N, E)
    gates[:, :, 0] = 0.1  # need not sum to 1, as with K = 1
    gates[:, :, 1, 3] = 0.4
    probabilities, logits = random_routing()
    entropy = statistics_of(probabilities, logits, gates=gates).entropy_N / (B * S)
    assert entropy.tolist() == pytest.approx([math.log(E), 0.0], abs=1e-6)


def test_gate_mass_is_summed_over_the_real_tokens():
    probabilities, logits = random_routing()
    gates = torch.rand(B, S, N, E)
    mass = statistics_of(probabilities, logits, ragged_mask(), gates=gates).gate_NE
    torch.testing.assert_close(mass, gates[ragged_mask().bool()].sum(0))


def test_assignments_count_the_top_k_of_each_token():
    probabilities, logits = random_routing()
    assigned = statistics_of(probabilities, logits, ragged_mask()).assigned_NE
    assert assigned.sum(-1).tolist() == [9 * K] * N
    best = probabilities[ragged_mask().bool()].argmax(-1)
    switch = statistics_of(probabilities, logits, ragged_mask()).first_NE
    assert torch.equal(switch, F.one_hot(best, E).sum(0).double())

"""Losses and routing statistics: pure functions of tensors.

Balance losses are taken per site and then averaged: pooled over sites, layers that have collapsed
on different experts look balanced. They are linear in the probabilities P for given fractions f,
so the loop can hold f of the whole accumulated batch fixed and split the batch as it likes.

Shape letters: B batch, S sequence, N sites, E experts, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dylora.config import BalanceLoss
from dylora.router import at_least_float32, top_k_mask


class RoutingStatistics(NamedTuple):
    """Sums over real tokens, so that those of micro-batches and ranks add up. Float32, detached
    but for the first two."""

    probability_NE: Tensor  # Σ p, differentiable
    squared_logsumexp_N: Tensor  # Σ logsumexp(logits)², differentiable
    assigned_NE: Tensor  # how often an expert is among the top-k (or the argmax)
    gate_NE: Tensor  # Σ g
    active_N: Tensor  # experts with a non-zero gate, summed over tokens
    entropy_N: Tensor  # Σ entropy of g in nats
    tokens: Tensor  # scalar

    def detach(self) -> "RoutingStatistics":
        return RoutingStatistics(*(value.detach() for value in self))

    def plus(self, other: "RoutingStatistics") -> "RoutingStatistics":
        return RoutingStatistics(*(a + b for a, b in zip(self, other, strict=True)))


def token_losses(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each position with the token that follows it, in nats.

    logits [B, S, V], labels [B, S] with -100 where nothing is to be learned -> [B, S] float32;
    position t holds the loss of label t+1, and is 0 where that is -100 and at the last position.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    losses = F.cross_entropy(
        at_least_float32(logits).flatten(0, 1),  # bf16 sums over a vocabulary lose small terms
        targets.flatten().to(logits.device),
        ignore_index=-100,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    return losses.view_as(labels)


def count_targets(labels: Tensor) -> Tensor:
    """How many positions of labels [B, S] are learned: the first has nothing before it."""
    return (labels[:, 1:] != -100).sum()


def routing_statistics(
    gates: Tensor,
    probabilities: Tensor,
    logits: Tensor,
    token_mask: Tensor | None,
    *,
    top_k: int,
    balance: BalanceLoss,
) -> RoutingStatistics:
    """Sums of [B, S, N, E] routing over the tokens where token_mask [B, S] is not 0."""
    if token_mask is None:
        mask = torch.ones(gates.shape[:2], device=gates.device, dtype=gates.dtype)
    else:
        mask = token_mask.to(gates)
    mask_BS1 = mask[..., None]
    assigned = top_k_mask(probabilities, 1 if balance == "switch" else top_k)
    detached = gates.detach()
    shares = detached / detached.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1)
    return RoutingStatistics(
        probability_NE=torch.einsum("bsne,bs->ne", probabilities, mask),
        squared_logsumexp_N=(logits.logsumexp(-1).square() * mask_BS1).sum((0, 1)),
        assigned_NE=torch.einsum("bsne,bs->ne", assigned.to(mask.dtype), mask),
        gate_NE=torch.einsum("bsne,bs->ne", detached, mask),
        active_N=((detached > 0).sum(-1) * mask_BS1).sum((0, 1)),
        entropy_N=(entropy * mask_BS1).sum((0, 1)),
        tokens=mask.sum(),
    )


def balance_loss(probability_NE: Tensor, fractions_NE: Tensor, tokens: Tensor | float) -> Tensor:
    """E · Σ_e f_e P_e per site, averaged over sites (Lepikhin et al. 2020; Fedus et al. 2021).

    Args:
        probability_NE: Σ p over the tokens; P = this / tokens.
        fractions_NE: f, assignments to e over all assignments: `assignment_fractions`.
        tokens: how many real tokens P is a mean over.

    Returns a scalar: 1 when uniform, E/K when collapsed onto K experts (E for switch).
    """
    mean_NE = probability_NE / tokens
    return probability_NE.shape[-1] * (fractions_NE * mean_NE).sum(-1).mean()


def assignment_fractions(assigned_NE: Tensor) -> Tensor:
    """f_e = assignments to e over all assignments of the site, [N, E]; no gradient."""
    return assigned_NE / assigned_NE.sum(-1, keepdim=True).clamp_min(1)


def z_loss(squared_logsumexp_N: Tensor, tokens: Tensor | float) -> Tensor:
    """Mean over tokens and sites of logsumexp(logits)² (Zoph et al. 2022): keeps logits small."""
    return (squared_logsumexp_N / tokens).mean()

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

from dylora.routing.gating import top_k_indices


class RoutingStatistics(NamedTuple):
    """Sums over real tokens, so that those of micro-batches and ranks add up. Float32, detached
    but for the first two."""

    probability_NE: Tensor  # Σ p, differentiable
    squared_logsumexp_N: Tensor  # Σ logsumexp(logits)², differentiable
    assigned_NE: Tensor  # how often an expert is among the top-k
    first_NE: Tensor  # how often it is the first of them
    gate_NE: Tensor  # Σ g
    active_N: Tensor  # experts with a non-zero gate, summed over tokens
    entropy_N: Tensor  # Σ entropy of g in nats
    tokens: Tensor  # scalar

    def detach(self) -> "RoutingStatistics":
        return RoutingStatistics(*(value.detach() for value in self))

    def plus(self, other: "RoutingStatistics") -> "RoutingStatistics":
        return RoutingStatistics(*(a + b for a, b in zip(self, other, strict=True)))


def routing_statistics(
    gates: Tensor,
    probabilities: Tensor,
    logits: Tensor,
    token_mask: Tensor | None,
    *,
    top_k: int,
) -> RoutingStatistics:
    """Sums of [B, S, N, E] routing over the tokens where token_mask [B, S] is not 0.

    top_k: K, at most the number of experts that take part.
    """
    if token_mask is None:
        mask = torch.ones(gates.shape[:2], device=gates.device, dtype=gates.dtype)
    else:
        mask = token_mask.to(gates)
    mask_BS1 = mask[..., None]
    ranked = top_k_indices(probabilities, top_k)
    nobody = torch.zeros_like(probabilities)
    assigned, first = nobody.scatter(-1, ranked, 1), nobody.scatter(-1, ranked[..., :1], 1)
    detached = gates.detach()
    shares = detached / detached.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy = -(shares * shares.clamp_min(1e-12).log()).sum(-1)
    return RoutingStatistics(
        probability_NE=torch.einsum("bsne,bs->ne", probabilities, mask),
        squared_logsumexp_N=(logits.logsumexp(-1).square() * mask_BS1).sum((0, 1)),
        assigned_NE=torch.einsum("bsne,bs->ne", assigned, mask),
        first_NE=torch.einsum("bsne,bs->ne", first, mask),
        gate_NE=torch.einsum("bsne,bs->ne", detached, mask),
        active_N=((detached > 0).sum(-1) * mask_BS1).sum((0, 1)),
        entropy_N=(entropy * mask_BS1).sum((0, 1)),
        tokens=mask.sum(),
    )


def balance_loss(
    probability_NE: Tensor, fractions_NE: Tensor, tokens: Tensor | float, experts: int | None = None
) -> Tensor:
    """E · Σ_e f_e P_e per site, averaged over sites.

    With f from the top-k this is aux_loss (GShard, Lepikhin et al. 2020), with f from the argmax
    switch (Switch Transformer, Fedus et al. 2021).

    Args:
        probability_NE: Σ p over the tokens; P = this / tokens.
        fractions_NE: f, assignments to e over all assignments: `assignment_fractions`.
        tokens: how many real tokens P is a mean over.
        experts: E, how many take part; none: all.

    Returns a scalar: 1 when uniform, E/K when collapsed onto K experts (E for switch).
    """
    mean_NE = probability_NE / tokens
    return (experts or probability_NE.shape[-1]) * (fractions_NE * mean_NE).sum(-1).mean()


class Fractions(NamedTuple):
    """f of the two balance losses, [N, E] each."""

    aux_loss: Tensor
    switch: Tensor


def fractions_of(statistics: RoutingStatistics) -> Fractions:
    """Both f from the sums of a batch."""
    return Fractions(
        assignment_fractions(statistics.assigned_NE), assignment_fractions(statistics.first_NE)
    )


def assignment_fractions(assigned_NE: Tensor) -> Tensor:
    """f_e = assignments to e over all assignments of the site, [N, E]; no gradient."""
    return assigned_NE / assigned_NE.sum(-1, keepdim=True).clamp_min(1)


def carried_fractions(fractions_NE: Tensor, active_E: Tensor) -> Tensor:
    """Fractions of an earlier step for the experts that take part now, [N, E] of now.

    Experts that are new have none, those that are out give up theirs, and the rest is scaled to 1;
    a site where nothing is left is taken as even.
    """
    grown_NE = F.pad(fractions_NE, (0, active_E.shape[0] - fractions_NE.shape[1])) * active_E
    total_N1, even_E = grown_NE.sum(-1, keepdim=True), active_E / active_E.sum()
    return torch.where(total_N1 > 0, grown_NE / total_N1.clamp_min(1e-12), even_E)


def z_loss(squared_logsumexp_N: Tensor, tokens: Tensor | float) -> Tensor:
    """Mean over tokens and sites of logsumexp(logits)² (Zoph et al. 2022): keeps logits small."""
    return (squared_logsumexp_N / tokens).mean()

"""Losses and routing statistics: pure functions of tensors.

Balance losses are taken per block and then averaged: pooled over blocks, layers that have collapsed
on different experts look balanced. They are linear in the probabilities P for given fractions f,
so the loop can hold f of the whole accumulated batch fixed and split the batch as it likes.

Shape letters: B batch, S sequence, N blocks, E experts, V vocabulary.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from dylora.config import MoELoraConfig
from dylora.kernels.cross_entropy import count_targets
from dylora.routing.gating import top_k_indices

Fractions = dict[str, Tensor]  # f of the balance losses by the keys of ASSIGNMENTS, [N, E] each


class RoutingStatistics(NamedTuple):
    """Sums over real tokens, so that those of micro-batches and ranks add up. Float32, detached
    but for the first two."""

    probability_NE: Tensor  # Σ p, differentiable
    squared_logsumexp_N: Tensor  # Σ logsumexp(logits)², differentiable
    assigned_NE: Tensor  # how often an expert is among the top-k
    first_NE: Tensor  # how often it is the first of them
    gate_NE: Tensor  # Σ g
    active_N: Tensor  # experts with a non-zero gate, summed over tokens
    entropy_N: Tensor  # Σ entropy in nats of g among routed experts
    tokens: Tensor  # scalar

    @property
    def usage_NE(self) -> Tensor:
        """Each expert's share of a block's gate sum."""
        return self.gate_NE / self.gate_NE.sum(-1, keepdim=True).clamp_min(1e-12)

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
    shared: int = 0,
) -> RoutingStatistics:
    """Sums of [B, S, N, E] routing over the tokens where token_mask [B, S] is not 0.

    top_k: K, at most the number of active experts; shared: experts at the beginning that are not
    chosen.
    """
    mask = gates.new_ones(gates.shape[:2]) if token_mask is None else token_mask.to(gates)
    mask_BS1 = mask[..., None]
    ranked = top_k_indices(probabilities, top_k)
    nobody = torch.zeros_like(probabilities)
    assigned, first = nobody.scatter(-1, ranked, 1), nobody.scatter(-1, ranked[..., :1], 1)
    detached = gates.detach()
    shares = detached[..., shared:]
    shares = shares / shares.sum(-1, keepdim=True).clamp_min(1e-12)
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
    probability_NE: Tensor,
    fractions_NE: Tensor,
    tokens: Tensor | float,
    experts: int | Tensor | None = None,
) -> Tensor:
    """E · Σ_e f_e P_e per block, averaged over blocks.

    With f from the top-k this is aux_loss (GShard, Lepikhin et al. 2020), with f from the argmax
    switch (Switch Transformer, Fedus et al. 2021). P is Σ p over this many real tokens, f as in
    `assignment_fractions`; experts: E, how many are active, or [N], how many of each block; none:
    all.
    Returns a scalar: 1 when uniform, E/K when collapsed onto K experts (E for switch).
    """
    mean_NE = probability_NE / tokens
    overlap_N = (fractions_NE * mean_NE).sum(-1)
    if isinstance(experts, Tensor):
        return (experts * overlap_N).mean()
    return (experts or probability_NE.shape[-1]) * overlap_N.mean()


def fractions_of(statistics: RoutingStatistics) -> Fractions:
    """f of every balance loss from the sums of a batch; no gradient."""
    return {name: assignment_fractions(counts(statistics)) for name, counts in ASSIGNMENTS.items()}


def assignment_fractions(assigned_NE: Tensor) -> Tensor:
    """f_e = assignments to e over all assignments of the block, [N, E]; no gradient."""
    return assigned_NE / assigned_NE.sum(-1, keepdim=True).clamp_min(1)


def carried_fractions(fractions_NE: Tensor, active: Tensor) -> Tensor:
    """Fractions of an earlier step for the experts that are active now, [E] or [N, E]; [N, E].

    Experts that are new have none, those that are out give up theirs, and the rest is scaled to 1;
    a block where nothing is left is taken as even.
    """
    grown_NE = F.pad(fractions_NE, (0, active.shape[-1] - fractions_NE.shape[1])) * active
    total_N1 = grown_NE.sum(-1, keepdim=True)
    even = active / active.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(total_N1 > 0, grown_NE / total_N1.clamp_min(1e-12), even)


def z_loss(squared_logsumexp_N: Tensor, tokens: Tensor | float) -> Tensor:
    """Mean over tokens and blocks of logsumexp(logits)² (Zoph et al. 2022): keeps logits small."""
    return (squared_logsumexp_N / tokens).mean()


# The losses by name


class BatchTotals(NamedTuple):
    """How one micro-batch counts in an accumulated batch; the default is a batch of its own."""

    target_tokens: Tensor | float | None = None  # divides the summed cross-entropy
    tokens: Tensor | float | None = None  # divides the summed probabilities and logsumexps
    fractions: Fractions | None = None  # f of the balance losses


class RoutingLoss(NamedTuple):
    """A loss of the routers, and its coefficient in the loss that is trained with."""

    # (statistics of a micro-batch, tokens and fractions of the whole batch, active experts) -> loss
    value: Callable[[RoutingStatistics, Tensor | float, Fractions, int | Tensor], Tensor]
    coefficient: Callable[[MoELoraConfig], float | None]  # None: left out, its value reads 0


# What f counts: one row for each balance loss that has fractions of its own.
ASSIGNMENTS: dict[str, Callable[[RoutingStatistics], Tensor]] = {
    "aux_loss": lambda statistics: statistics.assigned_NE,
    "switch": lambda statistics: statistics.first_NE,
}
# One row a loss. A new one needs a row here (and in ASSIGNMENTS), and its coefficient in config.py.
ROUTING_LOSSES: dict[str, RoutingLoss] = {
    "aux_loss": RoutingLoss(
        lambda now, tokens, f, E: balance_loss(now.probability_NE, f["aux_loss"], tokens, E),
        lambda config: config.router_aux_loss_coef if "aux_loss" in config.balance_losses else None,
    ),
    "switch_loss": RoutingLoss(
        lambda now, tokens, f, E: balance_loss(now.probability_NE, f["switch"], tokens, E),
        lambda config: config.switch_loss_coef if "switch" in config.balance_losses else None,
    ),
    "z_loss": RoutingLoss(
        lambda now, tokens, f, E: z_loss(now.squared_logsumexp_N, tokens),
        lambda config: config.z_loss_coef,
    ),
}


def combined_loss(
    token_losses: Tensor,
    labels: Tensor,
    statistics: RoutingStatistics | None,
    config: MoELoraConfig,
    totals: BatchTotals | None,
    experts: int | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss that is trained with, and its parts by name: lm_loss, then ROUTING_LOSSES.

    token_losses [B, S], 0 where labels [B, S] have no target; statistics: None without learned
    routing, whose losses are 0 then; experts: how many are active, or [N], of each block.
    """
    totals = totals or BatchTotals()
    target_tokens = totals.target_tokens
    if target_tokens is None:
        target_tokens = count_targets(labels).clamp_min(1)  # nothing to learn: 0, not NaN
    lm_loss = token_losses.sum() / target_tokens
    losses = {"lm_loss": lm_loss} | dict.fromkeys(ROUTING_LOSSES, lm_loss.new_zeros(()))
    if statistics is None:
        return lm_loss, losses
    parts = routing_losses(statistics, config, totals, experts)
    return add_weighted(lm_loss, parts, config), losses | parts


def routing_losses(
    statistics: RoutingStatistics,
    config: MoELoraConfig,
    totals: BatchTotals,
    experts: int | Tensor,
) -> dict[str, Tensor]:
    """Those of ROUTING_LOSSES that are trained with, by name; arguments as in `combined_loss`."""
    tokens = statistics.tokens if totals.tokens is None else totals.tokens
    fractions = totals.fractions or fractions_of(statistics)
    return {
        name: value(statistics, tokens, fractions, experts)
        for name, (value, coefficient) in ROUTING_LOSSES.items()
        if coefficient(config) is not None
    }


def add_weighted(loss: Tensor, parts: dict[str, Tensor], config: MoELoraConfig) -> Tensor:
    """`loss` and the routers' losses, each times its coefficient."""
    for name, part in parts.items():
        loss = loss + (ROUTING_LOSSES[name].coefficient(config) or 0.0) * part
    return loss


# What a step shows of the experts


class Observation(NamedTuple):
    """What passes show of the experts, summed over their tokens, so that passes add up; detached.

    `DyLoRAOutput.observation` makes it, `DyLoRA_MoE.observe` uses it.
    """

    gate_sum_E: Tensor  # over the target tokens, averaged over blocks (Shazeer's importance)
    loss_sum_E: Tensor  # gate-weighted cross-entropy, likewise
    target_tokens: Tensor  # scalar
    statistics: RoutingStatistics | None  # None without learned routing

    def plus(self, other: "Observation | None") -> "Observation":
        """Both together; with None alone."""
        if other is None:
            return self
        statistics = self.statistics
        if statistics is not None and other.statistics is not None:
            statistics = statistics.plus(other.statistics)
        return Observation(
            self.gate_sum_E + other.gate_sum_E,
            self.loss_sum_E + other.loss_sum_E,
            self.target_tokens + other.target_tokens,
            statistics,
        )


def observe_pass(
    gates: Tensor, statistics: RoutingStatistics | None, token_losses: Tensor, labels: Tensor
) -> Observation:
    """What one pass shows: gates [B, S, N, E], token_losses [B, S], labels [B, S]."""
    is_target = F.pad(labels[:, 1:] != -100, (0, 1)).to(gates.device)
    gates_BSE = reduce(gates.detach(), "b s n e -> b s e", "mean") * is_target[..., None]
    gate_sum_E = gates_BSE.sum((0, 1))
    loss_sum_E = torch.einsum("bse,bs->e", gates_BSE, token_losses.to(gates_BSE))
    found = None if statistics is None else statistics.detach()
    return Observation(gate_sum_E, loss_sum_E, is_target.sum(), found)

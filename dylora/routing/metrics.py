"""Routing as numbers; when it counts as collapsed.

Shape letters: N blocks, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dylora.routing.losses import RoutingStatistics

# Shares are of a block's gate sum without that of shared experts, which are not chosen.
DEAD_BELOW = 0.01  # an expert with less counts as dead; of many, with a tenth of an even share
COLLAPSED_ABOVE = 0.8  # a block whose leading expert has more than this counts as collapsed


def routing_metrics(
    statistics: RoutingStatistics, block_names: list[str], active_NE: Tensor, shared: int = 0
) -> dict[str, float]:
    """router/… for all blocks together, and for each: means over tokens, entropy in nats.

    top1_share is the largest share of a block's assignments; an expert that is not active is not
    dead. usage is a share of all gates; shared: experts at the beginning that are not chosen, and
    have no part in the others.
    """
    tokens = statistics.tokens.clamp_min(1)
    usage_NE, entropy_N = statistics.usage_NE.cpu(), (statistics.entropy_N / tokens).cpu()
    routed_NE = routed_shares(usage_NE, shared)
    dead_N = _dead(routed_NE, active_NE[:, shared:].cpu()).sum(-1)
    max_usage_N = routed_NE.amax(-1)
    metrics = routing_summary(statistics, active_NE, shared)
    for index, name in enumerate(block_names):
        metrics[f"router/entropy/{name}"] = entropy_N[index].item()
        metrics[f"router/max_usage/{name}"] = max_usage_N[index].item()
        metrics[f"router/dead_experts/{name}"] = float(dead_N[index])
        for expert, share in enumerate(usage_NE[index].tolist()):
            metrics[f"router/usage/{name}/{expert}"] = share
    return metrics


def routing_summary(
    statistics: RoutingStatistics, active_NE: Tensor, shared: int = 0
) -> dict[str, float]:
    """The router/… of `routing_metrics` for all blocks together."""
    tokens = statistics.tokens.clamp_min(1)
    assigned_N = statistics.assigned_NE.sum(-1).clamp_min(1)
    routed_NE = routed_shares(statistics.usage_NE.cpu(), shared)
    return {
        "router/entropy": (statistics.entropy_N / tokens).mean().item(),
        "router/max_usage": routed_NE.max().item(),
        "router/dead_experts": float(_dead(routed_NE, active_NE[:, shared:].cpu()).sum()),
        "router/top1_share": (statistics.assigned_NE.amax(-1) / assigned_N).mean().item(),
        "router/active_experts": (statistics.active_N / tokens).mean().item(),
    }


def information_metrics(
    usage_by_set: Sequence[Tensor], block_names: list[str], shared: int
) -> dict[str, float]:
    """val/information, in nats: what the routed expert of a token says about the set it is of.

    Mutual information of set and expert under the mean gates, sets counting alike: 0 where all sets
    use experts alike, log(sets) where each has experts of its own. The mean over blocks, and each.

    usage_by_set: of each set the share [N, E] of each block's gate sum; shared: experts at the
    beginning that are not chosen. Empty with fewer than two sets.
    """
    if len(usage_by_set) < 2:
        return {}
    usage_KNE = routed_shares(torch.stack(list(usage_by_set)).cpu().double(), shared)
    entropy_KN, entropy_N = entropy(usage_KNE), entropy(usage_KNE.mean(0))
    found_N = (entropy_N - entropy_KN.mean(0)).clamp_min(0)
    per_block = {
        f"val/information/{name}": value
        for name, value in zip(block_names, found_N.tolist(), strict=True)
    }
    return {"val/information": found_N.mean().item()} | per_block


def routed_shares(usage: Tensor, shared: int) -> Tensor:
    """Shares [..., E] without those of the first `shared` experts, scaled to 1; 0 where all are."""
    routed = usage[..., shared:]
    return routed / routed.sum(-1, keepdim=True).clamp_min(1e-12)


def _dead(routed_NE: Tensor, active_NE: Tensor) -> Tensor:
    """Which active experts of a block are hardly chosen, [N, E]."""
    even_N1 = 1 / active_NE.sum(-1, keepdim=True).clamp_min(1)
    return (routed_NE < (0.1 * even_N1).clamp_max(DEAD_BELOW)) & active_NE


def entropy(shares: Tensor) -> Tensor:
    """Of shares [..., E] that sum to 1, in nats, [...]."""
    return -torch.xlogy(shares, shares).sum(-1)


def find_collapses(
    counts: dict[str, int],
    usage_NE: Tensor,
    active_NE: Tensor,
    block_names: list[str],
    steps: int,
    shared: int = 0,
) -> list[str]:
    """One step's usage -> a line for every block whose routing has just been collapsed for `steps`
    steps in a row, once a run.

    Collapsed means: the largest share lies above COLLAPSED_ABOVE, or an active expert is dead.
    counts: steps in a row by block, which are brought up to date; -1 once the line was given;
    shared: experts at the beginning that are not chosen.
    """
    lines = []
    routed_NE, active_NE = routed_shares(usage_NE, shared), active_NE[:, shared:].cpu()
    dead_N = _dead(routed_NE, active_NE).sum(-1).tolist()
    for name, usage_E, active_E, dead in zip(
        block_names, routed_NE, active_NE, dead_N, strict=True
    ):
        count = int(active_E.sum())
        if count < 2:
            continue
        largest = float(usage_E[active_E].max())
        if counts.get(name) == -1:
            continue
        counts[name] = counts.get(name, 0) + 1 if largest > COLLAPSED_ABOVE or dead > 0 else 0
        if counts[name] < steps:
            continue
        counts[name] = -1
        what = f"one expert has {largest:.0%} of the gate sum"
        if largest <= COLLAPSED_ABOVE:
            what = f"{dead} of {count} experts have hardly any of it"
        lines.append(
            f"warning: routing at {name} has been collapsed for {steps} steps ({what}). Try a "
            "larger moe.router_aux_loss_coef or moe.router_temperature, or a smaller "
            "train.router_learning_rate"
        )
    return lines

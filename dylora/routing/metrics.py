"""Routing as numbers; when it counts as collapsed.

Shape letters: N blocks, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dylora.routing.losses import RoutingStatistics

DEAD_BELOW = 0.01  # an expert with less of a block's gate sum counts as dead
COLLAPSED_ABOVE = 0.8  # a block whose leading expert has more than this counts as collapsed


def routing_metrics(
    statistics: RoutingStatistics, block_names: list[str], active_NE: Tensor
) -> dict[str, float]:
    """router/… for all blocks together, and for each: means over tokens, entropy in nats.

    top1_share is the largest share of a block's assignments; an expert that is not active is not
    dead.
    """
    tokens = statistics.tokens.clamp_min(1)
    usage_NE, entropy_N = statistics.usage_NE.cpu(), (statistics.entropy_N / tokens).cpu()
    dead_N = ((usage_NE < DEAD_BELOW) & active_NE.cpu()).sum(-1)
    max_usage_N = usage_NE.amax(-1)
    metrics = routing_summary(statistics, active_NE)
    for index, name in enumerate(block_names):
        metrics[f"router/entropy/{name}"] = entropy_N[index].item()
        metrics[f"router/max_usage/{name}"] = max_usage_N[index].item()
        metrics[f"router/dead_experts/{name}"] = float(dead_N[index])
        for expert, share in enumerate(usage_NE[index].tolist()):
            metrics[f"router/usage/{name}/{expert}"] = share
    return metrics


def routing_summary(statistics: RoutingStatistics, active_NE: Tensor) -> dict[str, float]:
    """The router/… of `routing_metrics` for all blocks together."""
    tokens = statistics.tokens.clamp_min(1)
    assigned_N = statistics.assigned_NE.sum(-1).clamp_min(1)
    usage_NE = statistics.usage_NE.cpu()
    return {
        "router/entropy": (statistics.entropy_N / tokens).mean().item(),
        "router/max_usage": usage_NE.max().item(),
        "router/dead_experts": float(((usage_NE < DEAD_BELOW) & active_NE.cpu()).sum()),
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
    usage_KNE = torch.stack(list(usage_by_set))[..., shared:].cpu().double()
    usage_KNE = usage_KNE / usage_KNE.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy_KN, entropy_N = entropy(usage_KNE), entropy(usage_KNE.mean(0))
    found_N = (entropy_N - entropy_KN.mean(0)).clamp_min(0)
    per_block = {
        f"val/information/{name}": value
        for name, value in zip(block_names, found_N.tolist(), strict=True)
    }
    return {"val/information": found_N.mean().item()} | per_block


def entropy(shares: Tensor) -> Tensor:
    """Of shares [..., E] that sum to 1, in nats, [...]."""
    return -torch.xlogy(shares, shares).sum(-1)


def find_collapses(
    counts: dict[str, int],
    usage_NE: Tensor,
    active_NE: Tensor,
    block_names: list[str],
    steps: int,
) -> list[str]:
    """One step's usage -> a line for every block whose routing has just been collapsed for `steps`
    steps in a row, once a run.

    Collapsed means: the largest share of the gate sum lies above COLLAPSED_ABOVE, or an active
    expert gets less than DEAD_BELOW. counts: steps in a row by block, which are brought up to date;
    -1 once the line was given.
    """
    lines = []
    for name, all_E, active_E in zip(block_names, usage_NE, active_NE.cpu(), strict=True):
        usage_E = all_E[active_E]
        if len(usage_E) < 2:
            continue
        largest, dead = float(usage_E.max()), int((usage_E < DEAD_BELOW).sum())
        if counts.get(name) == -1:
            continue
        counts[name] = counts.get(name, 0) + 1 if largest > COLLAPSED_ABOVE or dead > 0 else 0
        if counts[name] < steps:
            continue
        counts[name] = -1
        what = f"one expert has {largest:.0%} of the gate sum"
        if largest <= COLLAPSED_ABOVE:
            what = f"{dead} of {len(usage_E)} experts have under {DEAD_BELOW:.0%} of it"
        lines.append(
            f"warning: routing at {name} has been collapsed for {steps} steps ({what}). Try a "
            "larger moe.router_aux_loss_coef or moe.router_temperature, or a smaller "
            "train.router_learning_rate"
        )
    return lines

"""Routing and experts as numbers for metrics.jsonl; when routing counts as collapsed.

Shape letters: N blocks, E experts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dylora.model import DyLoRA_MoE
from dylora.routing.losses import RoutingStatistics

DEAD_BELOW = 0.01  # an expert with less of a site's gate mass counts as dead
COLLAPSED_ABOVE = 0.8  # a site whose leading expert has more than this counts as collapsed


class RoutingSummary(NamedTuple):
    """Means over tokens, on the CPU."""

    usage_NE: Tensor  # share of the gate mass
    entropy_N: Tensor  # of the gates, in nats
    active_N: Tensor  # experts with a non-zero gate
    top1_share_N: Tensor  # largest share of the assignments


def summarize(statistics: RoutingStatistics) -> RoutingSummary:
    """Means from sums."""
    assigned_N = statistics.assigned_NE.sum(-1).clamp_min(1)
    tokens = statistics.tokens.clamp_min(1)
    return RoutingSummary(
        statistics.usage_NE.cpu(),
        (statistics.entropy_N / tokens).cpu(),
        (statistics.active_N / tokens).cpu(),
        (statistics.assigned_NE.amax(-1) / assigned_N).cpu(),
    )


def routing_metrics(
    summary: RoutingSummary, site_names: list[str], active: list[bool] | None = None
) -> dict[str, float]:
    """router/… for all sites together, and for each.

    active: which experts take part; the others have no share and are not dead. None: all.
    """
    taking_part = torch.ones_like(summary.usage_NE[0], dtype=torch.bool)
    if active is not None:
        taking_part = torch.tensor(active)
    dead_N = (summary.usage_NE[:, taking_part] < DEAD_BELOW).sum(-1)
    max_usage_N = summary.usage_NE.amax(-1)
    metrics = {
        "router/entropy": summary.entropy_N.mean().item(),
        "router/max_usage": max_usage_N.max().item(),
        "router/dead_experts": float(dead_N.sum()),
        "router/top1_share": summary.top1_share_N.mean().item(),
        "router/active_experts": summary.active_N.mean().item(),
    }
    for index, name in enumerate(site_names):
        metrics[f"router/entropy/{name}"] = summary.entropy_N[index].item()
        metrics[f"router/max_usage/{name}"] = max_usage_N[index].item()
        metrics[f"router/dead_experts/{name}"] = float(dead_N[index])
        for expert, share in enumerate(summary.usage_NE[index].tolist()):
            metrics[f"router/usage/{name}/{expert}"] = share
    return metrics


def expert_metrics(model: DyLoRA_MoE, gate_share_E: Tensor) -> dict[str, float]:
    """expert/{i}/… : maturity, gradient norm (call it before gradients are cleared), load.

    gate_share_E: share of the gate mass, averaged over sites.
    """
    squares_E = torch.zeros(len(model.experts))
    for adapter in model.mixture.adapters.values():
        for stack in adapter.stacks:
            for parameter in stack.parameters():
                if parameter.grad is not None:
                    square_E = parameter.grad.float().square().flatten(1).sum(1).cpu()
                    squares_E[list(stack.experts)] += square_E
    metrics = {}
    for expert, row in enumerate(model.experts.table):
        if row.state == "retired":
            continue
        metrics[f"expert/{expert}/maturity"] = float(model.maturity.maturity[expert])
        metrics[f"expert/{expert}/load"] = float(gate_share_E[expert])
        metrics[f"expert/{expert}/grad_norm"] = float(squares_E[expert].sqrt())
    return metrics


class CollapseDetector:
    """Says once a site when its routing has been collapsed for many steps in a row.

    Collapsed means: the largest share of the gate mass lies above COLLAPSED_ABOVE, or an expert
    that takes part gets less than DEAD_BELOW.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._count: dict[str, int] = {}
        self._told: set[str] = set()

    def observe(self, usage_NE: Tensor, active: list[bool], site_names: list[str]) -> list[str]:
        """One step's usage -> a line for every site that has just been collapsed long enough."""
        if sum(active) < 2:
            return []
        lines = []
        for name, usage_E in zip(site_names, usage_NE[:, torch.tensor(active)], strict=True):
            largest, dead = float(usage_E.max()), int((usage_E < DEAD_BELOW).sum())
            collapsed = largest > COLLAPSED_ABOVE or dead > 0
            self._count[name] = self._count.get(name, 0) + 1 if collapsed else 0
            if self._count[name] >= self.steps and name not in self._told:
                self._told.add(name)
                what = f"one expert has {largest:.0%} of the gate mass"
                if largest <= COLLAPSED_ABOVE:
                    what = f"{dead} of {len(usage_E)} experts have under {DEAD_BELOW:.0%} of it"
                lines.append(
                    f"warning: routing at {name} has been collapsed for {self.steps} steps "
                    f"({what}). Try a larger moe.router_aux_loss_coef or moe.router_temperature, "
                    "or a smaller train.router_learning_rate"
                )
        return lines

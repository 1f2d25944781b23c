"""Steps and experts as numbers for metrics.jsonl.

Shape letters: E experts.
"""

import math

import torch
from torch import Tensor

from dylora.model import DyLoRA_MoE
from dylora.training.step import StepResult


def window_row(result: StepResult) -> dict[str, float]:
    """What metrics need of a step; one that updated nothing counts for the speed alone."""
    row = {"tokens": result.tokens, "seconds": result.seconds}
    if result.nonfinite is None:
        row |= result.losses
        row |= {"grad_norm": result.grad_norm, "clip_factor": result.clip_factor}
    return row


def train_metrics(window: list[dict[str, float]], names: list[str]) -> dict[str, float]:
    """train/… : means of the window's rows, NaN where no step of it updated anything."""
    updated = [row for row in window if "loss" in row]
    return {
        f"train/{name}": sum(row[name] for row in updated) / len(updated) if updated else math.nan
        for name in names
    }


def expert_metrics(model: DyLoRA_MoE, gate_share_E: Tensor, clip_factor: float) -> dict[str, float]:
    """expert/{i}/… : maturity, its gates summed over target tokens so far, share of the step's gate
    sum, gradient norm before clipping.

    To be called while the gradients are there, multiplied by clip_factor.
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
        metrics[f"expert/{expert}/tokens"] = float(model.maturity.evidence[expert])
        metrics[f"expert/{expert}/load"] = float(gate_share_E[expert])
        metrics[f"expert/{expert}/grad_norm"] = float(squares_E[expert].sqrt() / clip_factor)
    return metrics

"""Loss and routing on held-out sets."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.data.batching import collate, to_device
from dylora.data.tokenize import TokenizedSet
from dylora.kernels import cross_entropy
from dylora.model import DyLoRA_MoE
from dylora.routing.losses import RoutingStatistics


class SetScore(NamedTuple):
    """What a set measures."""

    loss: float  # mean cross-entropy over its targets, in nats
    targets: int
    usage_NE: Tensor | None  # share of each site's gate mass, on the CPU; None without routers

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def validate(
    model: DyLoRA_MoE,
    sets: list[TokenizedSet],
    *,
    batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, SetScore]:
    """Score every set, in evaluation mode; the model's own mode is put back.

    Rows of similar length share a batch: that changes the padding, not the result. What
    `before_batch` raises ends the scoring.
    """
    device = model.device
    was_training = model.training
    model.eval()
    scores = {}
    for examples in sets:
        order = sorted(range(len(examples)), key=examples.length, reverse=True)
        loss = torch.zeros((), dtype=torch.float64, device=device)
        targets = torch.zeros((), dtype=torch.long, device=device)
        statistics: RoutingStatistics | None = None
        for begin in range(0, len(order), batch_size):
            before_batch()
            rows = [examples[index] for index in order[begin : begin + batch_size]]
            batch = to_device(collate(rows, pad_token_id), device)
            output = model(**batch, keep_logits=False)
            loss += output.token_losses.double().sum()
            targets += cross_entropy.count_targets(batch["labels"])
            found = output.routing.statistics if output.routing else None
            if found is not None:
                statistics = found if statistics is None else statistics.plus(found)
        usage = None
        if statistics is not None:
            mass_NE = statistics.gate_NE
            usage = (mass_NE / mass_NE.sum(-1, keepdim=True).clamp_min(1e-12)).cpu()
        count = int(targets)
        scores[examples.name] = SetScore(
            loss.item() / count if count else float("nan"), count, usage
        )
    model.train(was_training)
    return scores


def overall_loss(scores: dict[str, SetScore]) -> float:
    """Mean over all targets of all sets, in nats."""
    targets = sum(score.targets for score in scores.values())
    weighted = sum(score.loss * score.targets for score in scores.values() if score.targets)
    return weighted / targets if targets else float("nan")

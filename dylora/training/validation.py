"""Loss and routing on held-out sets."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.config import RoutingMode
from dylora.data.batching import collate, to_device
from dylora.data.tokenize import TokenizedSet
from dylora.kernels.common import evaluation_mode
from dylora.kernels.cross_entropy import count_targets
from dylora.model import DyLoRA_MoE
from dylora.routing.losses import RoutingStatistics
from dylora.training.distributed import ALONE, Processes

COST_ROWS = 16  # of each set, for sparse_cost


class SetScore(NamedTuple):
    """What a set measures."""

    loss: float  # mean cross-entropy over its targets, in nats
    targets: int
    usage_NE: Tensor | None  # share of each block's gate sum, on the CPU; None without routers
    active_N: Tensor | None = None  # experts with a gate at a token, their mean, likewise
    error: float = math.nan  # standard error of the loss over rows; NaN for fewer than two

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def validate(
    model: DyLoRA_MoE,
    sets: list[TokenizedSet],
    *,
    batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
    processes: Processes = ALONE,
) -> dict[str, SetScore]:
    """Score every set in evaluation mode; afterwards every module is in its own mode again.

    What `before_batch` raises ends the scoring. Processes share the batches, and have the same
    scores.
    """
    scores = {}
    with evaluation_mode(model):
        for examples in sets:
            scores[examples.name] = score_set(
                model, examples, batch_size, pad_token_id, before_batch, processes
            )
    return scores


def score_set(
    model: DyLoRA_MoE,
    examples: TokenizedSet,
    batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None],
    processes: Processes,
) -> SetScore:
    """Score one set. Rows of similar length share a batch: less padding, the same result."""
    order = sorted(range(len(examples)), key=examples.length, reverse=True)
    # Losses of tokens and targets of rows, of each batch; summed on the CPU, as MPS has no float64.
    seen: list[tuple[Tensor, Tensor]] = []
    statistics: RoutingStatistics | None = None
    begins = range(0, len(order), batch_size)
    for first in range(0, len(begins), processes.size):
        before_batch()
        mine = first + processes.rank
        counts = mine < len(begins)
        # Where none is left, the last one is run for its passes: a sharded base is gathered by all.
        begin = begins[mine if counts else -1]
        rows = [examples[index] for index in order[begin : begin + batch_size]]
        batch = to_device(collate(rows, pad_token_id), model.device)
        output = model(**batch, keep_logits=False)
        targets_B = (batch["labels"][:, 1:] != -100).sum(1)
        seen.append((output.token_losses * counts, targets_B * counts))
        found = output.routing.statistics if output.routing else None
        if found is not None:
            found = RoutingStatistics(*(value * counts for value in found))
            statistics = found if statistics is None else statistics.plus(found)
    usage_NE = active_N = None
    if statistics is not None:
        statistics = RoutingStatistics(*processes.add_up(list(statistics)))
        usage_NE = statistics.usage_NE.cpu()
        active_N = (statistics.active_N / statistics.tokens.clamp_min(1)).cpu()
    (sums,) = processes.add_up([sum_rows(seen)])
    total, count = sums[:2].tolist()
    loss = total / count if count else math.nan
    return SetScore(loss, int(count), usage_NE, active_N, ratio_error(sums, len(examples)))


def loss_of_rows(
    model: DyLoRA_MoE,
    rows: Sequence[dict[str, list[int]]],
    batch_size: int,
    pad_token_id: int,
    before_batch: Callable[[], None] = lambda: None,
) -> float:
    """Mean cross-entropy over the targets of rows in evaluation mode, in nats; NaN without any.
    What `before_batch` raises ends it."""
    total, count = 0.0, 0
    with evaluation_mode(model):
        for begin in range(0, len(rows), batch_size):
            before_batch()
            batch = to_device(collate(rows[begin : begin + batch_size], pad_token_id), model.device)
            total += float(model(**batch, keep_logits=False).token_losses.sum())
            count += int(count_targets(batch["labels"]))
    return total / count if count else math.nan


def sum_rows(seen: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Σx, Σn, Σx², Σxn and Σn² over rows of x nats on n targets, float64; `seen`: losses [B, S] and
    targets [B] of batches."""
    sums = torch.zeros(5, dtype=torch.float64)
    for losses_BS, targets_B in seen:
        losses_BS, n_B = losses_BS.cpu().double(), targets_B.cpu().double()
        x_B = losses_BS.sum(1)
        sums += torch.stack([losses_BS.sum(), n_B.sum(), x_B @ x_B, x_B @ n_B, n_B @ n_B])
    return sums


def ratio_error(sums: Tensor, rows: int) -> float:
    """The standard error of Σx / Σn over rows (Cochran 1977, Sampling Techniques, 6.4); sums: those
    of `sum_rows`. NaN for fewer than two rows."""
    total, count, xx, xn, nn = sums.tolist()
    if rows < 2 or not count:
        return math.nan
    loss = total / count
    squares = max(xx - 2 * loss * xn + loss * loss * nn, 0.0)  # Σ(x - loss·n)²
    return math.sqrt(squares * rows / (rows - 1)) / count


def sparse_cost(
    model: DyLoRA_MoE, sets: list[TokenizedSet], pad_token_id: int, batch_size: int
) -> float | None:
    """By how much the loss would grow, in nats per target token, if all experts were mature now.

    Of up to COST_ROWS rows of each set. None where maturity decides nothing, or nothing any more.
    """
    state, config = model.mixture.state, model.config
    routed = zip(state.routed_E.tolist(), state.mature, strict=True)
    immature = any(enabled and not mature for enabled, mature in routed)
    if not (config.follows_maturity and immature and any(map(len, sets))):
        return None
    losses: dict[RoutingMode, list[Tensor]] = {"maturity": [], "sparse": []}
    targets = 0
    try:
        with evaluation_mode(model):
            for examples in sets:
                every = max(1, math.ceil(len(examples) / COST_ROWS))
                rows = [examples[index] for index in range(0, len(examples), every)]
                for begin in range(0, len(rows), batch_size):
                    part = collate(rows[begin : begin + batch_size], pad_token_id)
                    batch = to_device(part, model.device)
                    targets += int(count_targets(batch["labels"]))
                    for mode, found in losses.items():
                        model.set_routing(mode=mode)
                        found.append(model(**batch, keep_logits=False).token_losses.sum().cpu())
    finally:
        model.mixture.set_config(config)
    now, then = (float(torch.stack(found).sum()) for found in losses.values())
    return (then - now) / max(targets, 1)


def overall_loss(scores: dict[str, SetScore]) -> float:
    """Mean over all targets of all sets, in nats."""
    targets = sum(score.targets for score in scores.values())
    weighted = sum(score.loss * score.targets for score in scores.values() if score.targets)
    return weighted / targets if targets else math.nan


def active_parameters(model: DyLoRA_MoE, scores: dict[str, SetScore]) -> float:
    """Of experts and routers, those that a token is multiplied with: the mean over scored tokens.

    What is not trained, such as the A of LoRA-FA, counts; a routed expert counts as the mean of
    all that its block has, a shared one always.
    """
    mixture, shared = model.mixture, model.config.shared_experts
    found = float(sum(p.numel() for _, p in mixture.own_parameters()))
    seen = [(s.active_N, s.targets) for s in scores.values() if s.active_N is not None]
    if not seen:
        return found
    targets = sum(targets for _, targets in seen)
    active_N = torch.stack([active_N * own / targets for active_N, own in seen]).sum(0)
    for block, active in zip(mixture.blocks, active_N.tolist(), strict=True):
        sizes: dict[int, float] = {}
        for stack in (stack for adapter in block.adapters.values() for stack in adapter.stacks):
            size = sum(parameter.numel() for parameter in stack.parameters())
            for expert in stack.experts:
                sizes[expert] = sizes.get(expert, 0.0) + size / len(stack.experts)
        routed = [size for expert, size in sizes.items() if expert >= shared]
        found += (active - shared) * sum(routed) / max(len(routed), 1) - sum(routed)
    return found

"""One optimizer step.

Shape letters: B batch, S sequence, N blocks, E experts.
"""

import math
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.data.batching import collate, split_by_length, to_device
from dylora.kernels import cross_entropy
from dylora.model import BatchTotals
from dylora.routing import losses, maturity
from dylora.routing.losses import Fractions, RoutingStatistics
from dylora.training.optim import FOLLOWS_VALIDATION, named_parameters
from dylora.training.run import Run


class StepResult(NamedTuple):
    """What an optimizer step measured; means over the accumulated batch."""

    loss: float
    lm_loss: float
    aux_loss: float
    switch_loss: float
    z_loss: float
    grad_norm: float
    targets: int
    tokens: int
    statistics: RoutingStatistics | None
    gate_share_E: Tensor
    trouble: str | None = None  # what was not finite; then nothing was updated


def train_step(run: Run) -> StepResult:
    """One optimizer step over an accumulated batch: forward, backward, clip, update, observe.

    When the loss or the gradients are not finite, nothing is updated but the scale of float16, and
    the result says so.
    """
    config, model = run.config, run.model
    model.train()
    device = model.device
    batches = next_batches(run)  # counted here, where nothing waits for the device
    targets = sum(int(cross_entropy.count_targets(batch["labels"])) for batch in batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    batches = [to_device(batch, device) for batch in batches]
    scale = BatchTotals(targets, tokens, _fractions(run, device))

    sums = torch.zeros(5, device=device)  # the losses: they add up under one scale
    gate_sum_E = torch.zeros(len(model.experts), device=device)
    loss_sum_E = torch.zeros_like(gate_sum_E)
    statistics: RoutingStatistics | None = None
    for batch in batches:
        smoothing = config.train.label_smoothing
        output = model(**batch, label_smoothing=smoothing, scale=scale, keep_logits=False)
        run.scaler.scale(output.loss).backward()
        sums += torch.stack(output[:5]).detach()
        mass, loss_mass = expert_gate_sums(
            output.routing.gates, output.token_losses, batch["labels"]
        )
        gate_sum_E, loss_sum_E = gate_sum_E + mass, loss_sum_E + loss_mass
        if (found := output.routing.statistics) is not None:
            found = found.detach()
            statistics = found if statistics is None else statistics.plus(found)

    run.scaler.unscale_(run.optimizer)
    parameters = [p for p in named_parameters(model).values() if p.requires_grad]
    limit = config.train.max_grad_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    measured = [sums, grad_norm[None], gate_sum_E, loss_sum_E]
    if statistics is not None:
        fractions = losses.fractions_of(statistics)
        measured += [part.flatten() for part in fractions]
    # The one time a step waits for the device: what is not finite must not be applied, and maturity
    # decides how the next step is computed.
    read = torch.cat(measured).cpu().split([len(part) for part in measured])
    loss, lm_loss, aux_loss, switch_loss, z_loss = read[0].tolist()
    [grad_norm], gate_sum_E, loss_sum_E = read[1].tolist(), *read[2:4]
    gate_share_E = gate_sum_E / gate_sum_E.sum().clamp_min(1e-12)
    parts = (loss, lm_loss, aux_loss, switch_loss, z_loss, grad_norm)
    result = StepResult(*parts, targets, tokens, statistics, gate_share_E)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        run.scaler.update()
        return result._replace(trouble="gradient" if math.isfinite(loss) else "loss")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if config.train.lr_scheduler_type not in FOLLOWS_VALIDATION:
        run.scheduler.step()

    step = run.progress.step + 1
    model.set_maturity(
        maturity.observe(
            model.maturity,
            gate_sum_E,
            loss_sum_E,
            progress=step / run.steps,
            tokens_per_expert=run.target_tokens / model.mixture.state.active_count,
            config=config.moe,
        )
    )
    model.experts.count_step(step, step / run.steps)
    if statistics is not None:
        run.progress.fractions = {
            name: part.view(statistics.assigned_NE.shape).tolist()
            for name, part in zip(Fractions._fields, read[4:], strict=True)
        }
    return result


def next_batches(run: Run) -> list[dict[str, Tensor]]:
    """The micro-batches of one step. Rows of similar length share one, which saves padding."""
    size, parts = run.config.train.batch_size, run.config.train.gradient_accumulation_steps
    rows = [run.data.train[index][row] for index, row in islice(run.sampler, size * parts)]
    rows.sort(key=lambda row: len(row["input_ids"]))
    ends = split_by_length([len(row["input_ids"]) for row in rows], parts)
    return [collate(rows[begin:end], run.pad_token_id) for begin, end in pairwise([0, *ends])]


def expert_gate_sums(gates: Tensor, token_losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gate mass, and gate-weighted loss, of each expert over the target positions.

    gates [B, S, N, E] are averaged over sites; token_losses [B, S]; labels [B, S] -> two of [E].
    """
    is_target = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)).to(gates.device)
    gates_BSE = gates.detach().mean(2) * is_target[..., None]
    gate_sum_E = gates_BSE.sum((0, 1))
    return gate_sum_E, torch.einsum("bse,bs->e", gates_BSE, token_losses.to(gates_BSE))


def _fractions(run: Run, device: torch.device) -> Fractions:
    """The previous step's fractions; uniform ones, which exert no pressure, before the first.

    An expert that is new since that step has none yet; one that is gone keeps none.
    """
    active_E = run.model.mixture.state.active_E.to(device)
    even_NE = (active_E / active_E.sum()).expand(len(run.model.site_names), -1)
    if run.progress.fractions is None:
        return Fractions(even_NE, even_NE)
    rows = {name: torch.tensor(rows) for name, rows in run.progress.fractions.items()}
    found = {
        name: losses.carried_fractions(rows_NE, active_E)
        for name, rows_NE in to_device(rows, device).items()
    }
    return Fractions(**found)

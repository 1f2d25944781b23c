"""One optimizer step, from its batches to the count.

Shape letters: B batch, S sequence, E experts.
"""

import math
import time
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.data.batching import micro_batches, to_device
from dylora.data.packing import fill_up, packed_batches
from dylora.data.splits import derived_seed
from dylora.kernels.cross_entropy import count_targets
from dylora.model import BatchTotals
from dylora.routing.losses import Observation, RoutingStatistics
from dylora.training.optim import named_parameters
from dylora.training.packing import is_flash
from dylora.training.resume import last_good
from dylora.training.run import Run
from dylora.training.schedule import FOLLOWS_VALIDATION


class NotFinite(ValueError):
    """Too many steps in a row whose loss or gradient was not finite."""


class StepResult(NamedTuple):
    """What an optimizer step measured; means over the accumulated batch."""

    losses: dict[str, float]  # by name: loss, which is trained with, and its parts
    grad_norm: float  # of all gradients, before they were clipped
    clip_factor: float  # that clipping multiplied them by; 1: not clipped
    target_tokens: int
    tokens: int
    seconds: float
    statistics: RoutingStatistics | None
    gate_share_E: Tensor  # on the CPU
    nonfinite: str | None  # loss or gradient: then nothing was updated

    @property
    def loss(self) -> float:
        return self.losses["loss"]


def run_step(run: Run) -> StepResult:
    """One optimizer step over an accumulated batch. Its gradients stay until the next one.

    When the loss or the gradient is not finite, nothing is updated but the scale of float16, and
    the result says so. Raises NotFinite, naming the last good checkpoint, after
    train.max_nonfinite_steps of these in a row.
    """
    started = time.perf_counter()
    run.model.train()
    run.optimizer.zero_grad(set_to_none=True)
    batches, totals = next_batches(run)
    sums = add_up(run, *forward_backward(run, batches, totals))
    losses, grad_norm, seen = to_numbers(run, *sums, clip_gradients(run))
    finite = {"loss": math.isfinite(losses["loss"]), "gradient": math.isfinite(grad_norm)}
    nonfinite = next((name for name, is_finite in finite.items() if not is_finite), None)
    if nonfinite is None:
        run.scaler.step(run.optimizer)
        step = run.progress.step + 1
        rate = float(run.scheduler.get_last_lr()[0]) / run.config.train.learning_rate
        tokens = run.target_tokens
        run.model.observe(seen, step=step, steps=run.steps, target_tokens=tokens, rate=rate)
        if run.config.train.lr_scheduler_type not in FOLLOWS_VALIDATION:
            run.scheduler.step()
    run.scaler.update()
    result = StepResult(
        losses,
        grad_norm,
        clip_factor(grad_norm, run.config.train.max_grad_norm),
        int(totals.target_tokens or 0),
        int(totals.tokens or 0),
        time.perf_counter() - started,
        seen.statistics,
        seen.gate_sum_E / seen.gate_sum_E.sum().clamp_min(1e-12),
        nonfinite,
    )
    count(run, result)
    return result


def next_batches(run: Run) -> tuple[list[dict[str, Tensor]], BatchTotals]:
    """This process's micro-batches of one step on the device, and what those of all come to.

    Rows of similar length share a micro-batch, or are packed into rows: either saves padding.
    """
    size, parts = run.config.train.batch_size, run.config.train.gradient_accumulation_steps
    rows = [run.data.train[index][row] for index, row in islice(run.sampler, size * parts)]
    if run.config.data.packing:
        one_row = is_flash(run.model)
        batches = packed_batches(rows, size, run.pad_token_id, one_row=one_row)
        batches = fill_up(batches, run.processes.size)
    else:
        batches = micro_batches(rows, parts, run.pad_token_id)
    # Counted on the CPU, where nothing waits for the device, nor for another process.
    target_tokens = sum(int(count_targets(batch["labels"])) for batch in batches)
    masks = [batch.get("token_mask", batch.get("attention_mask")) for batch in batches]
    tokens = sum(int(mask.sum()) for mask in masks if mask is not None)
    totals = BatchTotals(target_tokens, tokens, run.model.carried_fractions())
    own = [batches[part] for part in run.processes.share(len(batches))]
    return [to_device(batch, run.model.device) for batch in own], totals


def forward_backward(
    run: Run, batches: list[dict[str, Tensor]], totals: BatchTotals
) -> tuple[dict[str, Tensor], Observation]:
    """The gradient of the whole batch; the losses of this process's passes, which add up under
    common totals, and what they show of the experts.

    What a pass draws depends on its place in the run, not on the process or what was drawn before.
    """
    losses: dict[str, Tensor] = {}
    seen: Observation | None = None
    train, module, device = run.config.train, run.replicas.module(), run.model.device
    parts = run.processes.share(len(batches) * run.processes.size)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for part, batch in zip(parts, batches, strict=True):
            torch.manual_seed(derived_seed("pass", train.seed, run.progress.step, part))
            with run.replicas.passing(last=part == parts[-1]):
                smoothing = train.label_smoothing
                output = module(
                    **batch, label_smoothing=smoothing, totals=totals, keep_logits=False
                )
                # Gradients are averaged over processes, and are to be their sum.
                run.scaler.scale(output.loss * run.processes.size).backward()
            for name, loss in {"loss": output.loss, **output.losses}.items():
                losses[name] = losses.get(name, 0) + loss.detach()
            seen = output.observation(batch["labels"]).plus(seen)
    assert seen is not None
    return losses, seen


def add_up(
    run: Run, losses: dict[str, Tensor], seen: Observation
) -> tuple[dict[str, Tensor], Observation, Tensor]:
    """The sums over all processes, and their votes on leaving: `Interruption.votes`."""
    votes = run.interruption.votes(seen.gate_sum_E)
    sums, statistics = [seen.gate_sum_E, seen.loss_sum_E, seen.target_tokens], seen.statistics
    added = run.processes.add_up([votes, *losses.values(), *sums, *(statistics or ())])
    votes, *values = added[: 1 + len(losses)]
    gate_sum_E, loss_sum_E, targets, *rest = added[1 + len(losses) :]
    seen = Observation(gate_sum_E, loss_sum_E, targets, RoutingStatistics(*rest) if rest else None)
    return dict(zip(losses, values, strict=True)), seen, votes


def clip_gradients(run: Run) -> Tensor:
    """Clip to train.max_grad_norm; returns the norm before."""
    run.scaler.unscale_(run.optimizer)
    parameters = [p for p in named_parameters(run.model).values() if p.requires_grad]
    limit = run.config.train.max_grad_norm or math.inf
    return torch.nn.utils.clip_grad_norm_(parameters, limit)


def clip_factor(grad_norm: float, limit: float) -> float:
    """What torch's clipping to `limit` multiplies gradients of this norm by; 0: no limit."""
    return min(1.0, limit / (grad_norm + 1e-6)) if limit else 1.0


def to_numbers(
    run: Run, losses: dict[str, Tensor], seen: Observation, votes: Tensor, grad_norm: Tensor
) -> tuple[dict[str, float], float, Observation]:
    """The losses and the norm as numbers, and the experts' sums on the CPU; settles the votes.

    The one time a step waits for the device: what is not finite must not be applied, and maturity
    decides how the next step is computed.
    """
    values = torch.stack([*losses.values(), grad_norm])
    parts = torch.cat([values, votes, seen.gate_sum_E, seen.loss_sum_E]).cpu()
    values, votes, gate_sum_E, loss_sum_E = parts.split(
        [len(values), len(votes), len(seen.gate_sum_E), len(seen.loss_sum_E)]
    )
    run.interruption.settle(votes.tolist())
    *numbers, norm = values.tolist()
    seen = seen._replace(gate_sum_E=gate_sum_E, loss_sum_E=loss_sum_E)
    return dict(zip(losses, numbers, strict=True)), norm, seen


def count(run: Run, result: StepResult) -> None:
    """Count a step, and what it trained on or that it was left out. Raises as `run_step`."""
    progress, limit = run.progress, run.config.train.max_nonfinite_steps
    progress.step += 1
    if result.nonfinite is None:
        progress.targets += result.target_tokens
        progress.skipped_in_a_row = 0
        return
    progress.skipped_steps += 1
    # float16 begins with a scale that overflows, and halves it until it fits: nothing is wrong.
    if result.nonfinite == "gradient" and run.scaler.is_enabled() and run.scaler.get_scale() >= 1:
        return
    progress.skipped_in_a_row += 1
    what = (
        f"step {progress.step}: the {result.nonfinite} is not finite (loss {result.loss}, gradient "
        f"norm {result.grad_norm}); nothing was updated"
    )
    if progress.skipped_in_a_row >= limit:
        raise NotFinite(
            f"{what}, {progress.skipped_in_a_row} steps in a row. {last_good(run)} "
            f"Try a lower train.learning_rate, a warm-up, or model.dtype float32"
        )
    run.log.info(f"warning: {what} ({progress.skipped_in_a_row} in a row, stopping at {limit})")

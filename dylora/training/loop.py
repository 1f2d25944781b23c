"""The training loop: `train` tells the story in time order; each step is a function below it.

Shape letters: B batch, S sequence, N sites, E experts.
"""

import math
import time
from collections.abc import Callable
from contextlib import closing, suppress
from itertools import islice, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dylora import losses, maturity
from dylora.compute.pieces import is_emulated
from dylora.losses import Fractions, RoutingStatistics
from dylora.model import LossScale
from dylora.run_config import RunConfig
from dylora.storage.checkpoint import tidy
from dylora.storage.lock import lock_folder
from dylora.training.batches import collate, cut_by_length, to_device
from dylora.training.interruption import Interrupted, Interruption
from dylora.training.monitor import (
    CollapseWatch,
    expert_metrics,
    memory_gb,
    routing_metrics,
    summarize,
)
from dylora.training.optim import FOLLOWS_VALIDATION, named_parameters
from dylora.training.resume import last_good, rehearse_save, resume, save
from dylora.training.setup import Run, prepare, record_settings, run_folder
from dylora.training.validation import SetScore, overall_loss, validate


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
    load_E: Tensor
    trouble: str | None = None  # what was not finite; then nothing was updated


def train(config: RunConfig, resume_from_checkpoint: str | None = None) -> Run:
    """Train, evaluate, keep checkpoints; everything lies under <output_dir>/<name>/ afterwards.

    Args:
        config: the run.
        resume_from_checkpoint: `latest`, a checkpoint folder, or None for a fresh run.

    After SIGTERM or SIGINT it saves at the next step boundary, and ends with SystemExit (143) or
    KeyboardInterrupt.

    Raises ValueError for settings that do not fit together, for steps in a row that were not finite
    and for a checkpoint that cannot be saved; FileExistsError when a fresh run would write into a
    folder that holds another one, or another process trains there.
    """
    with lock_folder(run_folder(config)):
        tidy(run_folder(config))
        run = prepare(config, fresh=resume_from_checkpoint is None)
        if resume_from_checkpoint is not None:
            resume(run, resume_from_checkpoint)
        rehearse_save(run)
        if run.config.eval.benchmark_strategy != "none":
            from dylora.evaluation.in_training import check_benchmark

            check_benchmark(run)
        record_settings(run)
        announce(run)
        with closing(run.log), Interruption() as interruption:
            run_steps(run, interruption)
            if interruption.received is not None:  # just after the last save
                interruption.leave()
    return run


def run_steps(run: Run, interruption: Interruption) -> None:
    """All steps that are left, with what comes between them."""
    config, progress, log = run.config, run.progress, run.log
    log.start(progress.step, run.steps)
    window, watch = Window(), CollapseWatch(config.log.collapse_steps)
    stopping = _is_out_of_patience(run)
    if progress.evaluation_due or progress.benchmark_due:
        stopping = finish_step(run, interruption)
    while progress.step < run.steps and not stopping:
        started, passes = time.perf_counter(), run.sampler.epoch
        result = train_step(run)
        progress.step += 1
        seconds = time.perf_counter() - started
        count_trouble(run, result)
        window.add(result, seconds)
        log.advance(result.loss, result.tokens / seconds)
        warn_of_collapse(run, result, watch)

        last = progress.step == run.steps
        if _due(progress.step, config.log.logging_steps) or last:
            metrics = window.metrics(run, result)
            log.write(progress.step, progress.targets, metrics)
            log.progress_line(progress.step, metrics)
            window = Window()
        run.optimizer.zero_grad(set_to_none=True)

        progress.evaluation_due = _due(progress.step, config.eval.eval_steps) or last
        strategy = config.eval.benchmark_strategy
        ends_pass = strategy == "epoch" and run.sampler.epoch > passes
        progress.benchmark_due = ends_pass or (last and strategy != "none")
        stopping = finish_step(run, interruption)


def finish_step(run: Run, interruption: Interruption) -> bool:
    """Evaluate and save where they are due, or leave; returns whether training ends early."""
    config, progress, log = run.config, run.progress, run.log
    last, evaluated = progress.step == run.steps, False
    if progress.evaluation_due:
        # A signal during evaluation leaves it due: the resumed run begins with it.
        with suppress(Interrupted):
            evaluate(run, before_batch=interruption.check)
            evaluated, progress.evaluation_due = True, False
    stopping = evaluated and _is_out_of_patience(run)
    best = evaluated and progress.best_step == progress.step
    wanted = interruption.received is not None
    if stopping and config.eval.benchmark_strategy != "none":
        progress.benchmark_due = True
    due = _due(progress.step, config.train.save_steps) or progress.benchmark_due
    if due or last or stopping or best or wanted:
        save(run)
        wanted = wanted or interruption.received is not None
    if wanted:
        interruption.leave()
    if progress.benchmark_due:
        benchmark(run, interruption)
    if stopping:
        log.say(f"stopped: {progress.evaluations_without_gain} evaluations without gain")
    return stopping


def benchmark(run: Run, interruption: Interruption) -> None:
    """Run the benchmark of this step, after its save: generation may need memory that is not there.

    A signal leaves it due, as the checkpoint says; the resumed run begins with it.
    """
    from dylora.evaluation.in_training import benchmark_step

    try:
        benchmark_step(run, interruption.check)
        run.progress.benchmark_due = False
    except Interrupted:
        interruption.leave()


def announce(run: Run) -> None:
    """Say what is about to happen."""
    for report in run.data.reports:
        run.log.say(report.describe())
    trainable, frozen = run.model.count_parameters()
    sites, table = len(run.model.site_names), run.model.experts.table
    ranks = sorted({row.rank for row in table})
    device = run.model.injection.state.maturity_E.device
    run.log.say(
        f"{len(table)} experts of rank {', '.join(map(str, ranks))} at {sites} sites: "
        f"{trainable:,} trainable parameters beside {frozen:,} frozen ones; "
        f"{run.steps - run.progress.step} steps on {device}"
    )
    if device.type == "cpu" and is_emulated(run.model.base.dtype):
        run.log.say(
            f"warning: this CPU has no instructions for {run.config.model.dtype}, so the base "
            "takes ten times as long as in float32, or more: set model.dtype float32"
        )


def train_step(run: Run) -> StepResult:
    """One optimizer step over an accumulated batch: forward, backward, clip, update, observe.

    When the loss or the gradients are not finite, nothing is updated but the scale of float16, and
    the result says so.
    """
    config, model = run.config, run.model
    model.train()
    device = model.injection.state.maturity_E.device
    batches = next_batches(run)  # counted here, where nothing waits for the device
    targets = sum(int(losses.count_targets(batch["labels"])) for batch in batches)
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    batches = [to_device(batch, device) for batch in batches]
    scale = LossScale(targets, tokens, _fractions(run, device))

    sums = torch.zeros(5, device=device)  # the losses: they add up under one scale
    mass_E = torch.zeros(len(model.experts), device=device)
    loss_mass_E = torch.zeros_like(mass_E)
    statistics: RoutingStatistics | None = None
    for batch in batches:
        smoothing = config.train.label_smoothing
        output = model(**batch, label_smoothing=smoothing, scale=scale, keep_logits=False)
        run.scaler.scale(output.loss).backward()
        sums += torch.stack(output[:5]).detach()
        mass, loss_mass = expert_mass(output.routing.gates, output.token_losses, batch["labels"])
        mass_E, loss_mass_E = mass_E + mass, loss_mass_E + loss_mass
        if (found := output.routing.statistics) is not None:
            found = found.detach()
            statistics = found if statistics is None else statistics.plus(found)

    run.scaler.unscale_(run.optimizer)
    parameters = [p for p in named_parameters(model).values() if p.requires_grad]
    limit = config.train.max_grad_norm or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    measured = [sums, grad_norm[None], mass_E, loss_mass_E]
    if statistics is not None:
        fractions = losses.fractions_of(statistics)
        measured += [part.flatten() for part in fractions]
    # The one time a step waits for the device: what is not finite must not be applied, and maturity
    # decides how the next step is computed.
    read = torch.cat(measured).cpu().split([len(part) for part in measured])
    loss, lm_loss, aux_loss, switch_loss, z_loss = read[0].tolist()
    [grad_norm], mass_E, loss_mass_E = read[1].tolist(), *read[2:4]
    load_E = mass_E / mass_E.sum().clamp_min(1e-12)
    parts = (loss, lm_loss, aux_loss, switch_loss, z_loss, grad_norm)
    result = StepResult(*parts, targets, tokens, statistics, load_E)
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
            mass_E,
            loss_mass_E,
            progress=step / run.steps,
            tokens_per_expert=run.target_tokens / model.injection.state.active_count,
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


def count_trouble(run: Run, result: StepResult) -> None:
    """Count a step that was left out, or what a good one trained on.

    Raises ValueError, naming the last good checkpoint, after train.max_nonfinite_steps in a row.
    """
    progress, limit = run.progress, run.config.train.max_nonfinite_steps
    if result.trouble is None:
        progress.targets += result.targets
        progress.skipped_in_a_row = 0
        return
    progress.skipped_steps += 1
    # float16 begins with a scale that overflows, and halves it until it fits: that is no trouble.
    if result.trouble == "gradient" and run.scaler.is_enabled() and run.scaler.get_scale() >= 1:
        return
    progress.skipped_in_a_row += 1
    what = (
        f"step {progress.step}: the {result.trouble} is not finite (loss {result.loss}, gradient "
        f"norm {result.grad_norm}); nothing was updated"
    )
    if progress.skipped_in_a_row >= limit:
        raise ValueError(
            f"{what}, {progress.skipped_in_a_row} steps in a row. {last_good(run)} "
            f"Try a lower train.learning_rate, a warm-up, or model.dtype float32"
        )
    run.log.say(f"warning: {what} ({progress.skipped_in_a_row} in a row, stopping at {limit})")


def next_batches(run: Run) -> list[dict[str, Tensor]]:
    """The micro-batches of one step. Rows of similar length share one, which saves padding."""
    size, parts = run.config.train.batch_size, run.config.train.gradient_accumulation_steps
    rows = [run.data.train[index][row] for index, row in islice(run.sampler, size * parts)]
    rows.sort(key=lambda row: len(row["input_ids"]))
    ends = cut_by_length([len(row["input_ids"]) for row in rows], parts)
    return [collate(rows[begin:end], run.pad_token_id) for begin, end in pairwise([0, *ends])]


def expert_mass(gates: Tensor, token_losses: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Gate mass, and gate-weighted loss, of each expert over the target positions.

    gates [B, S, N, E] are averaged over sites; token_losses [B, S]; labels [B, S] -> two of [E].
    """
    is_target = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1)).to(gates.device)
    gates_BSE = gates.detach().mean(2) * is_target[..., None]
    mass_E = gates_BSE.sum((0, 1))
    return mass_E, torch.einsum("bse,bs->e", gates_BSE, token_losses.to(gates_BSE))


def warn_of_collapse(run: Run, result: StepResult, watch: CollapseWatch) -> None:
    """Say so when the routing of a site stays collapsed."""
    if result.statistics is None or result.trouble or not run.config.moe.use_moe_routing:
        return
    usage_NE = summarize(result.statistics).usage_NE
    active = [row.takes_part for row in run.model.experts.table]
    for line in watch.observe(usage_NE, active, run.model.site_names):
        run.log.say(line)


def evaluate(run: Run, before_batch: Callable[[], None] = lambda: None) -> dict[str, SetScore]:
    """Validate, log, and remember whether this was the best so far.

    What `before_batch` raises ends it with nothing logged or remembered.
    """
    scores = validate(
        run.model,
        run.data.validation,
        batch_size=run.config.eval.batch_size,
        pad_token_id=run.pad_token_id,
        before_batch=before_batch,
    )
    loss, progress = overall_loss(scores), run.progress
    metrics = {"val/loss": loss, "val/ppl": math.exp(min(loss, 700.0))}
    metrics |= {f"val/loss/{name}": score.loss for name, score in scores.items()}
    run.log.write(progress.step, progress.targets, metrics)
    shown = ", ".join(f"{name} {score.loss:.3f}" for name, score in scores.items())
    run.log.say(f"step {progress.step}  validation loss {loss:.4f}  ({shown})")
    if run.config.train.lr_scheduler_type in FOLLOWS_VALIDATION:
        run.scheduler.step(loss)  # type: ignore[arg-type]
    if loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_without_gain = 0
    else:
        progress.evaluations_without_gain += 1
    return scores


class Window:
    """Means since the last line of metrics."""

    def __init__(self) -> None:
        self.results: list[StepResult] = []
        self.seconds = 0.0

    def add(self, result: StepResult, seconds: float) -> None:
        self.results.append(result)
        self.seconds += seconds

    def metrics(self, run: Run, last: StepResult) -> dict[str, float]:
        """train/…, router/…, expert/… and system/… of a line of metrics.jsonl.

        The losses are means over the steps that were not left out, and NaN where there is none.
        """
        count = len(self.results)
        applied = [result for result in self.results if result.trouble is None]
        metrics = {
            f"train/{name}": sum(getattr(result, name) for result in applied) / len(applied)
            if applied
            else math.nan
            for name in ("loss", "lm_loss", "aux_loss", "switch_loss", "z_loss", "grad_norm")
        }
        metrics["train/skipped_steps"] = float(run.progress.skipped_steps)
        metrics["train/lr"] = float(run.scheduler.get_last_lr()[0])
        metrics["train/tokens_per_s"] = sum(r.tokens for r in self.results) / self.seconds
        metrics["train/step_time_s"] = self.seconds / count
        if last.statistics is not None:
            active = [row.takes_part for row in run.model.experts.table]
            metrics |= routing_metrics(summarize(last.statistics), run.model.site_names, active)
        metrics |= expert_metrics(run.model, last.load_E)
        metrics["system/mem_gb"] = memory_gb()
        return metrics


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _is_out_of_patience(run: Run) -> bool:
    patience = run.config.train.early_stopping_patience
    return patience is not None and run.progress.evaluations_without_gain >= patience


def _fractions(run: Run, device: torch.device) -> Fractions:
    """The previous step's fractions; uniform ones, which exert no pressure, before the first.

    An expert that is new since that step has none yet; one that is gone keeps none.
    """
    active_E = run.model.injection.state.active_E.to(device)
    even_NE = (active_E / active_E.sum()).expand(len(run.model.site_names), -1)
    if run.progress.fractions is None:
        return Fractions(even_NE, even_NE)
    rows = {name: torch.tensor(rows) for name, rows in run.progress.fractions.items()}
    found = {
        name: losses.carried_fractions(rows_NE, active_E)
        for name, rows_NE in to_device(rows, device).items()
    }
    return Fractions(**found)

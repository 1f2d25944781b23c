"""The training loop, top to bottom: `train`, then its steps, then what finishes a step."""

import math
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress

from dylora.routing.metrics import information_metrics
from dylora.run_config import RunConfig
from dylora.storage.folders import checkpoints, recover
from dylora.storage.lock import lock_folder
from dylora.training.callbacks import Callback, CollapseWarning, LateMaturityWarning, MetricsLog
from dylora.training.compilation import compiled_passes
from dylora.training.distributed import Processes, join_processes, shard_base
from dylora.training.environment import deterministic_algorithms, tf32_products
from dylora.training.memory import explained
from dylora.training.optim import settle, settled
from dylora.training.resume import load_best, preflight_save, resume, save
from dylora.training.run import Parts, Run, log_summary, prepare, record_settings, run_folder
from dylora.training.schedule import FOLLOWS_VALIDATION
from dylora.training.signals import Interrupted
from dylora.training.step import NotFinite, run_step
from dylora.training.validation import SetScore, overall_loss, sparse_cost, validate


def train(
    config: RunConfig,
    resume_from_checkpoint: str | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    parts: Parts | None = None,
) -> Run:
    """Train, evaluate, keep checkpoints; everything lies under <output_dir>/<name>/ afterwards.

    Args:
        config: the run.
        resume_from_checkpoint: `latest`, a checkpoint folder, or None for a fresh run; `auto`:
            the latest where there is one, for a command that is started again until it is done.
        callbacks: what else is done between the steps.
        parts: tokenizer and data, and in a stage of a stream the model, which are built otherwise.

    After SIGTERM or SIGINT it saves at the next step boundary, and ends with SystemExit (143) or
    KeyboardInterrupt. In several processes (train.parallel) all return a run, whose passes cannot
    be shared any more; with fsdp2 its base is of no more use.

    Raises ValueError for settings that do not fit together, for steps in a row that were not finite
    and for a checkpoint that cannot be saved; FileExistsError when a fresh run would write into a
    folder that holds another one, or another process trains there.
    """
    handled = [name for callback in callbacks for name in callback.handles]
    if config.eval.benchmark_strategy != "none" and "eval.benchmark_strategy" not in handled:
        raise ValueError(
            "eval.benchmark_strategy needs the callback that runs benchmarks: pass it in callbacks"
        )
    with join_processes(config) as processes, ExitStack() as held:

        def claim() -> str | None:
            held.enter_context(lock_folder(run_folder(config)))
            recover(run_folder(config))
            if resume_from_checkpoint == "auto":
                return "latest" if checkpoints(run_folder(config)) else None
            return resume_from_checkpoint

        source = processes.from_first(claim)
        run = processes.together(lambda: begin(config, source, callbacks, parts, processes))
        held.enter_context(deterministic_algorithms(config.train.deterministic))
        held.enter_context(tf32_products(config.train.tf32, run.model.device))
        held.enter_context(compiled_passes(run.model, config.train.compile))
        with closing(run.log), run.interruption:
            try:
                run_steps(run, callbacks)
            except NotFinite:  # in all processes alike: one of them tells
                if processes.is_first:
                    raise
                raise SystemExit(2) from None
            settle(run.optimizer)
            load_best(run)
            for callback in callbacks:
                callback.on_end(run)
            if run.interruption.received is not None:  # just after the last save
                run.interruption.leave()
    return run


def begin(
    config: RunConfig,
    source: str | None,
    callbacks: Sequence[Callback],
    parts: Parts | None,
    processes: Processes,
) -> Run:
    """Everything before the first step; source: the checkpoint to go on from."""
    run = prepare(config, fresh=source is None, parts=parts, processes=processes)
    if source is not None:
        resume(run, source)
    processes.from_first(lambda: preflight_save(run))
    if source is None:
        run.log.set_aside_earlier()
    for callback in callbacks:
        callback.on_start(run)
    earlier = f"until-step-{run.progress.step}"
    processes.from_first(lambda: record_settings(run.config, run.model.device, earlier))
    log_summary(run)
    if config.train.parallel == "fsdp2":
        shard_base(run.model)
    return run


def run_steps(run: Run, callbacks: Sequence[Callback] = ()) -> None:
    """All steps that are left, with what comes between them."""
    config, progress = run.config, run.progress
    callbacks = [MetricsLog(), CollapseWarning(), LateMaturityWarning(), *callbacks]
    run.log.start(progress.step, run.steps)
    stopping = is_out_of_patience(run)
    if progress.evaluation_due or progress.benchmark_due:  # a signal left them to this process
        stopping = finish_step(run, callbacks)
    while progress.step < run.steps and not stopping:
        with explained(config):
            result = run_step(run)
        last = progress.step == run.steps
        progress.evaluation_due = last or is_due(progress.step, config.eval.eval_steps)
        for callback in callbacks:
            callback.after_step(run, result)
        stopping = finish_step(run, callbacks)


def finish_step(run: Run, callbacks: Sequence[Callback]) -> bool:
    """Evaluate and save where they are due, or leave; returns whether training ends early."""
    config, progress, interruption = run.config, run.progress, run.interruption
    stopping = best = False
    if progress.evaluation_due:
        # A signal during evaluation leaves it due: the resumed run begins with it.
        with suppress(Interrupted), settled(run.optimizer):
            scores = evaluate(run)
            progress.evaluation_due = False
            stopping, best = is_out_of_patience(run), progress.best_step == progress.step
            for callback in callbacks:
                callback.on_evaluate(run, scores)
    due = is_due(progress.step, config.train.save_steps) or progress.benchmark_due
    last, leaving = progress.step == run.steps, interruption.received is not None
    if due or last or stopping or best or leaving:
        with settled(run.optimizer):
            folder = run.processes.from_first(lambda: save(run))
            for callback in callbacks:
                with suppress(Interrupted):
                    callback.on_save(run, folder)
        if interruption.received is not None:
            interruption.leave()
    if stopping:
        run.log.info(f"stopped: {progress.evaluations_without_gain} evaluations without gain")
    return stopping


def evaluate(run: Run) -> dict[str, SetScore]:
    """Validate, log, and remember whether this was the best so far.

    Raises Interrupted when a signal has come, with nothing logged or remembered.
    """
    scores = validate(
        run.model,
        run.data.validation,
        batch_size=run.config.eval.batch_size,
        pad_token_id=run.pad_token_id,
        before_batch=run.interruption.check,
        processes=run.processes,
    )
    loss, progress = overall_loss(scores), run.progress
    metrics = {"val/loss": loss, "val/ppl": math.exp(min(loss, 700.0))}
    metrics |= {f"val/loss/{name}": score.loss for name, score in scores.items()}
    size = run.config.eval.batch_size
    cost = sparse_cost(run.model, run.data.validation, run.pad_token_id, size)
    metrics |= {} if cost is None else {"val/sparse_cost": cost}
    usage = [score.usage_NE for score in scores.values() if score.usage_NE is not None]
    blocks, shared = run.model.site_names, run.config.moe.shared_experts
    metrics |= information_metrics(usage, blocks, shared)
    run.log.write(progress.step, progress.targets, metrics)
    shown = ", ".join(f"{name} {score.loss:.3f}" for name, score in scores.items())
    run.log.info(f"step {progress.step}  validation loss {loss:.4f}  ({shown})")
    if run.config.train.lr_scheduler_type in FOLLOWS_VALIDATION:
        run.scheduler.step(loss)  # type: ignore[arg-type]
    if loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_without_gain = 0
    else:
        progress.evaluations_without_gain += 1
    return scores


def is_due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps comes after this one; None: never."""
    return every is not None and step % every == 0


def is_out_of_patience(run: Run) -> bool:
    """Whether early stopping ends the run now."""
    patience = run.config.train.early_stopping_patience
    return patience is not None and run.progress.evaluations_without_gain >= patience

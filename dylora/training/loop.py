"""The training loop: `train` tells the story in time order; each step is a function below it.

Shape letters: B batch, S sequence, N sites, E experts.
"""

import math
from collections.abc import Callable
from contextlib import closing, suppress

from dylora.kernels.common import is_emulated
from dylora.run_config import RunConfig
from dylora.storage.folders import recover
from dylora.storage.lock import lock_folder
from dylora.training.metrics import CollapseDetector, Window, summarize
from dylora.training.optim import FOLLOWS_VALIDATION
from dylora.training.resume import preflight_save, resume, save
from dylora.training.run import Run, prepare, record_settings, run_folder
from dylora.training.signals import Interrupted, Interruption
from dylora.training.step import StepResult, run_step
from dylora.training.validation import SetScore, overall_loss, validate


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
        recover(run_folder(config))
        run = prepare(config, fresh=resume_from_checkpoint is None)
        if resume_from_checkpoint is not None:
            resume(run, resume_from_checkpoint)
        preflight_save(run)
        if run.config.eval.benchmark_strategy != "none":
            from dylora.evaluation.passk.callback import check_benchmark

            check_benchmark(run)
        record_settings(run)
        log_summary(run)
        with closing(run.log), Interruption() as interruption:
            run_steps(run, interruption)
            if interruption.received is not None:  # just after the last save
                interruption.leave()
    return run


def run_steps(run: Run, interruption: Interruption) -> None:
    """All steps that are left, with what comes between them."""
    config, progress, log = run.config, run.progress, run.log
    log.start(progress.step, run.steps)
    window, watch = Window(), CollapseDetector(config.log.collapse_steps)
    stopping = _is_out_of_patience(run)
    if progress.evaluation_due or progress.benchmark_due:
        stopping = finish_step(run, interruption)
    while progress.step < run.steps and not stopping:
        passes = run.sampler.epoch
        result = run_step(run)
        window.add(result)
        log.advance(result.loss, result.tokens / result.seconds)
        warn_of_collapse(run, result, watch)

        last = progress.step == run.steps
        if _due(progress.step, config.log.logging_steps) or last:
            metrics = window.metrics(run, result)
            log.write(progress.step, progress.targets, metrics)
            log.progress_line(progress.step, metrics)
            window = Window()
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
        log.info(f"stopped: {progress.evaluations_without_gain} evaluations without gain")
    return stopping


def benchmark(run: Run, interruption: Interruption) -> None:
    """Run the benchmark of this step, after its save: generation may need memory that is not there.

    A signal leaves it due, as the checkpoint says; the resumed run begins with it.
    """
    from dylora.evaluation.passk.callback import benchmark_step

    try:
        benchmark_step(run, interruption.check)
        run.progress.benchmark_due = False
    except Interrupted:
        interruption.leave()


def log_summary(run: Run) -> None:
    """Say what is about to happen."""
    for report in run.data.reports:
        run.log.info(report.describe())
    trainable, frozen = run.model.count_parameters()
    sites, table = len(run.model.site_names), run.model.experts.table
    ranks = sorted({row.rank for row in table})
    device = run.model.device
    run.log.info(
        f"{len(table)} experts of rank {', '.join(map(str, ranks))} at {sites} sites: "
        f"{trainable:,} trainable parameters beside {frozen:,} frozen ones; "
        f"{run.steps - run.progress.step} steps on {device}"
    )
    if device.type == "cpu" and is_emulated(run.model.base.dtype):
        run.log.info(
            f"warning: this CPU has no instructions for {run.config.model.dtype}, so the base "
            "takes ten times as long as in float32, or more: set model.dtype float32"
        )


def warn_of_collapse(run: Run, result: StepResult, watch: CollapseDetector) -> None:
    """Say so when the routing of a site stays collapsed."""
    if result.statistics is None or result.nonfinite or not run.config.moe.use_moe_routing:
        return
    usage_NE = summarize(result.statistics).usage_NE
    active = [row.takes_part for row in run.model.experts.table]
    for line in watch.observe(usage_NE, active, run.model.site_names):
        run.log.info(line)


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
    run.log.info(f"step {progress.step}  validation loss {loss:.4f}  ({shown})")
    if run.config.train.lr_scheduler_type in FOLLOWS_VALIDATION:
        run.scheduler.step(loss)  # type: ignore[arg-type]
    if loss < progress.best_loss:
        progress.best_loss, progress.best_step = loss, progress.step
        progress.evaluations_without_gain = 0
    else:
        progress.evaluations_without_gain += 1
    return scores


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _is_out_of_patience(run: Run) -> bool:
    patience = run.config.train.early_stopping_patience
    return patience is not None and run.progress.evaluations_without_gain >= patience

"""What is done between the steps of a run: the hooks, and the two callbacks of every run."""

from pathlib import Path

from dylora.routing.maturity import LATE
from dylora.routing.metrics import find_collapses, routing_metrics
from dylora.training.log import memory_gb
from dylora.training.metrics import expert_metrics, train_metrics, window_row
from dylora.training.run import Run
from dylora.training.step import StepResult
from dylora.training.validation import SetScore


class Callback:
    """Hooks of `train`; each does nothing unless overridden. Callbacks run in their order.

    A callback may do with the run what may be done between steps: write metrics
    (`run.log.write`), change experts (`run.model.experts`), change routing
    (`run.model.set_routing`). Work of more than some seconds calls `run.interruption.check()`
    every now and then, which raises Interrupted once somebody wants the process to end.
    """

    handles: tuple[str, ...] = ()  # settings that have no effect without this callback

    def on_start(self, run: Run) -> None:
        """Before the first step, after a resume. A ValueError here ends the run cheaply."""

    def after_step(self, run: Run, result: StepResult) -> None:
        """After every optimizer step, counted already; its gradients are still there."""

    def on_evaluate(self, run: Run, scores: dict[str, SetScore]) -> None:
        """After a validation, before the save of that step."""

    def on_save(self, run: Run, folder: Path) -> None:
        """After a checkpoint is whole. What sets `run.progress.benchmark_due` in a hook before has
        the step saved, and is called here; a signal leaves it due for the resumed run."""

    def on_end(self, run: Run) -> None:
        """After the last step, evaluated and saved."""


class MetricsLog(Callback):
    """The progress bar, and the rows of metrics.jsonl: means since the last one."""

    def after_step(self, run: Run, result: StepResult) -> None:
        progress = run.progress
        progress.window.append(window_row(result))
        run.log.advance(result.loss, result.tokens / result.seconds)
        if progress.step % run.config.log.logging_steps == 0 or progress.step == run.steps:
            metrics = row_of_metrics(run, result)
            run.log.write(progress.step, progress.targets, metrics)
            run.log.progress_line(progress.step, metrics)
            progress.window = []


class CollapseWarning(Callback):
    """Says so when the routing of a block stays collapsed; the skill library's rule cannot."""

    def after_step(self, run: Run, result: StepResult) -> None:
        if result.statistics is None or result.nonfinite or not run.config.moe.trains_routers:
            return
        usage_NE, names = result.statistics.usage_NE.cpu(), run.model.site_names
        steps, counts = run.config.log.collapse_steps, run.progress.collapsed_steps
        active_NE, shared = run.model.mixture.active_NE, run.config.moe.shared_experts
        for line in find_collapses(counts, usage_NE, active_NE, names, steps, shared):
            run.log.info(line)


class LateMaturityWarning(Callback):
    """Says so when experts mature when the run has little left to adapt to it; nothing where
    maturity does not decide how tokens are routed."""

    def __init__(self) -> None:
        self.mature: set[int] | None = None  # after the last step that this process has done

    def after_step(self, run: Run, result: StepResult) -> None:
        values = run.model.maturity.maturity.tolist()
        mature = {expert for expert, value in enumerate(values) if value == 1}
        before, self.mature = self.mature, mature
        new = [] if before is None else sorted(mature - before)
        share = run.progress.step / run.steps
        if new and share > LATE and run.model.config.follows_maturity:
            run.log.info(
                f"warning: at {share:.0%} of the run these experts became mature, which leaves "
                f"little to adapt in: {', '.join(map(str, new))}; a longer run, or "
                "moe.maturity_mode schedule, lets them mature earlier"
            )


def row_of_metrics(run: Run, result: StepResult) -> dict[str, float]:
    """train/… over the steps since the last row; router/…, expert/… and system/… of this step."""
    window, model = run.progress.window, run.model
    metrics = train_metrics(window, [*result.losses, "grad_norm", "clip_factor"])
    metrics["train/skipped_steps"] = float(run.progress.skipped_steps)
    metrics["train/lr"] = float(run.scheduler.get_last_lr()[0])
    seconds = sum(row["seconds"] for row in window)
    metrics["train/tokens_per_s"] = sum(row["tokens"] for row in window) / seconds
    metrics["train/step_time_s"] = seconds / len(window)
    if result.statistics is not None:
        active_NE, shared = model.mixture.active_NE, model.config.shared_experts
        metrics |= routing_metrics(result.statistics, model.site_names, active_NE, shared)
    metrics |= expert_metrics(model, result.gate_share_E, result.clip_factor)
    metrics["system/mem_gb"] = memory_gb()
    return metrics

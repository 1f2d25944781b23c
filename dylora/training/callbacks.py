"""What hangs on a run between its steps: the hooks, and the two callbacks that every run has."""

import math
from pathlib import Path

from dylora.training.log import memory_gb
from dylora.training.metrics import (
    CollapseDetector,
    expert_metrics,
    routing_metrics,
    summarize,
)
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

    def __init__(self) -> None:
        self.results: list[StepResult] = []

    def after_step(self, run: Run, result: StepResult) -> None:
        self.results.append(result)
        run.log.advance(result.loss, result.tokens / result.seconds)
        step = run.progress.step
        if step % run.config.log.logging_steps == 0 or step == run.steps:
            metrics = self.metrics(run)
            run.log.write(step, run.progress.targets, metrics)
            run.log.progress_line(step, metrics)
            self.results = []

    def metrics(self, run: Run) -> dict[str, float]:
        """train/…, router/…, expert/… and system/… of a row.

        The losses are means over the steps that updated something, NaN where there is none.
        """
        last, seconds = self.results[-1], sum(result.seconds for result in self.results)
        updated = [r.losses | {"grad_norm": r.grad_norm} for r in self.results if not r.nonfinite]
        metrics = {
            f"train/{name}": sum(values[name] for values in updated) / len(updated)
            if updated
            else math.nan
            for name in (*last.losses, "grad_norm")
        }
        metrics["train/skipped_steps"] = float(run.progress.skipped_steps)
        metrics["train/lr"] = float(run.scheduler.get_last_lr()[0])
        metrics["train/tokens_per_s"] = sum(r.tokens for r in self.results) / seconds
        metrics["train/step_time_s"] = seconds / len(self.results)
        if last.statistics is not None:
            metrics |= routing_metrics(
                summarize(last.statistics), run.model.site_names, active(run)
            )
        metrics |= expert_metrics(run.model, last.gate_share_E)
        metrics["system/mem_gb"] = memory_gb()
        return metrics


class CollapseWarning(Callback):
    """Says so when the routing of a block stays collapsed."""

    def __init__(self, steps: int) -> None:
        self.detector = CollapseDetector(steps)

    def after_step(self, run: Run, result: StepResult) -> None:
        if result.statistics is None or result.nonfinite or not run.config.moe.use_moe_routing:
            return
        usage_NE = summarize(result.statistics).usage_NE
        for line in self.detector.observe(usage_NE, active(run), run.model.site_names):
            run.log.info(line)


def active(run: Run) -> list[bool]:
    """Which experts are mixed in."""
    return [row.takes_part for row in run.model.experts.table]

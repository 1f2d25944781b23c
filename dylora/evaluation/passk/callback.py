"""A benchmark between the steps of a run: eval/<task>/pass@1 in metrics.jsonl.

Random state and the model's mode are restored. Its samples are in the run's folder,
benchmark/step-<n>/, so that an interrupted one is continued.
"""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from dylora.evaluation.passk.benchmark import find_backend, read_tasks
from dylora.evaluation.passk.options import BenchmarkOptions, expand_tasks
from dylora.evaluation.passk.sampling import sample_to_file
from dylora.evaluation.passk.scoring import Selection, score, select_tasks
from dylora.run_config import EvalConfig
from dylora.storage.folders import quarantine, write_file
from dylora.training.loop import Callback, is_out_of_patience
from dylora.training.run import Run
from dylora.training.signals import Interrupted
from dylora.training.step import StepResult
from dylora.training.validation import SetScore

FOLDER = "benchmark"


def options_of(config: EvalConfig) -> BenchmarkOptions:
    """A run's benchmark, greedy; raises ValueError for a file of a suite not asked for."""
    tasks = expand_tasks(config.benchmark_tasks)
    for name in config.benchmark_files:
        if name not in tasks:
            raise ValueError(
                f"eval.benchmark_files names {name!r}, which eval.benchmark_tasks does not"
            )
    files = dict(config.benchmark_files)
    return BenchmarkOptions(tasks=tasks, files=files, limit=config.benchmark_limit)


class Benchmark(Callback):
    """Runs the suites of eval.benchmark_tasks as eval.benchmark_strategy says, each after a save:
    generation may need memory that is not there. Several processes share the answers."""

    handles = ("eval.benchmark_strategy",)

    def on_start(self, run: Run) -> None:
        self.epoch = run.sampler.epoch
        if run.config.eval.benchmark_strategy != "none":
            run.processes.from_first(lambda: check_benchmark(run))

    def after_step(self, run: Run, result: StepResult) -> None:
        strategy, ends_pass = run.config.eval.benchmark_strategy, run.sampler.epoch > self.epoch
        self.epoch = run.sampler.epoch
        last = run.progress.step == run.steps
        run.progress.benchmark_due = (strategy == "epoch" and ends_pass) or (
            strategy != "none" and last
        )

    def on_evaluate(self, run: Run, scores: dict[str, SetScore]) -> None:
        if run.config.eval.benchmark_strategy != "none" and is_out_of_patience(run):
            run.progress.benchmark_due = True  # this was the last step

    def on_save(self, run: Run, folder: Path) -> None:
        if run.progress.benchmark_due:
            benchmark_step(run)
            run.progress.benchmark_due = False


def check_benchmark(run: Run) -> None:
    """Read the tasks and start a sandbox before the first step, and log what will be run.

    Folders in benchmark/ of later steps, from a run that went further, are renamed. Raises
    ValueError for suites that cannot be used, and where no sandbox works.
    """
    config = run.config.eval
    suites = _select(run)
    backend = find_backend([one.tasks for one in suites.values()], options_of(config))
    parts = []
    for name, selection in suites.items():
        trained = len(selection.trained)
        left = f" ({trained} trained ones left out)" if trained else ""
        parts.append(f"{len(selection.problems)} tasks of {name}{left}")
    when = "after every pass" if config.benchmark_strategy == "epoch" else "at the end"
    run.log.info(f"benchmark {when}: {', '.join(parts)}; programs run under {backend}")
    for folder in (run.folder / FOLDER).glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdecimal() and int(number) > run.progress.step:
            run.log.info(f"set aside as {quarantine(folder, 'superseded')}")


def benchmark_step(run: Run) -> None:
    """Benchmark the mixture as it is now, unless the step has its row of metrics.jsonl already.

    Processes share the answers, and the first judges them. Raises Interrupted, samples kept, when a
    signal came.
    """
    run.interruption.check()
    processes, suites = run.processes, run.processes.together(lambda: _select(run))
    options, folder = options_of(run.config.eval), run.folder / FOLDER / f"step-{run.progress.step}"

    def is_done() -> bool:
        folder.mkdir(parents=True, exist_ok=True)
        return run.log.has(run.progress.step, f"eval/{next(iter(suites))}/pass@1")

    if processes.from_first(is_done):
        return
    answers = {}
    for name, selection in suites.items():
        file = folder / f"{name.replace('/', '.')}.jsonl"
        sampling = options.sampling(selection.tasks.max_new_tokens, run.config.eval.batch_size)
        check = run.interruption.check
        answers[name] = sample_to_file(
            run.model, run.tokenizer, selection.problems, sampling, file, check, processes
        )

    def work() -> None:
        with suppress(Interrupted):  # `check` says so in all processes
            judge(run, suites, answers, folder)

    processes.from_first(work, patiently=True)
    run.interruption.check()


def judge(
    run: Run, suites: dict[str, Selection], answers: dict[str, dict[str, list[str]]], folder: Path
) -> None:
    """Check the answers of each suite, and write what they score; raises Interrupted."""
    config, progress, options = run.config.eval, run.progress, options_of(run.config.eval)
    metrics, results = {}, {}
    for name, selection in suites.items():
        check, limits = run.interruption.check_here, selection.tasks.limits
        found = score(selection.problems, answers[name], options, limits, check)
        metrics[f"eval/{name}/pass@1"] = found.pass_at_k["1"]["mean"]
        sampling = options.sampling(selection.tasks.max_new_tokens, config.batch_size)
        results[name] = selection.describe(sampling) | found._asdict()
    content = {"step": progress.step, "options": asdict(options), "suites": results}
    write_file(folder / "results.json", json.dumps(content, indent=2) + "\n")
    run.log.write(progress.step, progress.targets, metrics)
    shown = ", ".join(
        f"{name} {entry['pass_at_k']['1']['mean']:.1%} of {entry['tasks']}"
        for name, entry in results.items()
    )
    run.log.info(f"step {progress.step}  pass@1: {shown}")


def _select(run: Run) -> dict[str, Selection]:
    return {
        name: select_tasks(name, tasks, run.model.training_record, include=False)
        for name, tasks in read_tasks(options_of(run.config.eval)).items()
    }

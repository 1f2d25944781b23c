"""A benchmark between the steps of a run: eval/<task>/pass@1 in metrics.jsonl.

It does not change the run: the random state and the model's mode are as before, and nothing is
counted while it answers. Its samples lie in the run's folder, benchmark/step-<n>/, so that an
interrupted one goes on where it was.
"""

import json
from collections.abc import Callable
from dataclasses import asdict

from dylora.evaluation.passk.benchmark import BenchmarkOptions, describe, expand_tasks, read_tasks
from dylora.evaluation.passk.problem import Problem
from dylora.evaluation.passk.sampling import Sampling, sample_to_file
from dylora.evaluation.passk.scoring import score
from dylora.evaluation.passk.suites import Tasks, data_of, leave_out_trained
from dylora.run_config import EvalConfig
from dylora.sandbox.host import Sandbox
from dylora.storage.folders import quarantine, write_file
from dylora.training.run import Run

FOLDER = "benchmark"


def options_of(config: EvalConfig) -> BenchmarkOptions:
    """The benchmark that a run's settings describe: greedy, one program a task.

    Raises ValueError for a file of a suite that is not asked for.
    """
    tasks = expand_tasks(config.benchmark_tasks)
    for name in config.benchmark_files:
        if name not in tasks:
            raise ValueError(
                f"eval.benchmark_files names {name!r}, which eval.benchmark_tasks does not"
            )
    return BenchmarkOptions(
        tasks=tasks,
        files=dict(config.benchmark_files),
        limit=config.benchmark_limit,
    )


def check_benchmark(run: Run) -> None:
    """Read the tasks and start a sandbox, before the first step; say what is going to happen.

    What a run has left in benchmark/ of steps that it has not come to is set aside.

    Raises ValueError for suites that cannot be used, and for a machine without a sandbox.
    """
    config = run.config.eval
    with Sandbox() as sandbox:
        level = sandbox.level
    parts = []
    for name, (_, kept, trained) in _tasks(run).items():
        left = f" ({len(trained)} trained ones left out)" if trained else ""
        parts.append(f"{len(kept)} tasks of {name}{left}")
    when = "after every pass" if config.benchmark_strategy == "epoch" else "at the end"
    run.log.info(f"benchmark {when}: {', '.join(parts)}; programs run under {level}")
    for folder in (run.folder / FOLDER).glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdecimal() and int(number) > run.progress.step:
            run.log.info(f"set aside as {quarantine(folder, 'superseded')}")


def benchmark_step(run: Run, before_batch: Callable[[], None] = lambda: None) -> None:
    """Benchmark the mixture as it is now; a row of metrics.jsonl, and benchmark/step-<n>/.

    Does nothing for a step that has its row. What `before_batch` raises ends it, samples kept.
    """
    config, progress = run.config.eval, run.progress
    suites = _tasks(run)
    if run.log.has(progress.step, f"eval/{next(iter(suites))}/pass@1"):
        return
    folder = run.folder / FOLDER / f"step-{progress.step}"
    folder.mkdir(parents=True, exist_ok=True)
    metrics, results = {}, {}
    for name, (tasks, kept, trained) in suites.items():
        sampling = Sampling(
            max_new_tokens=tasks.max_new_tokens,
            seed=options_of(config).seed,
            batch_size=config.batch_size,
        )
        file = folder / f"{name.replace('/', '.')}.jsonl"
        programs = sample_to_file(run.model, run.tokenizer, kept, sampling, file, before_batch)
        found = score(
            kept,
            programs,
            k=(1,),
            seconds=tasks.seconds,
            workers=2,
            seed=0,
            before_each=before_batch,
        )
        metrics[f"eval/{name}/pass@1"] = found.pass_at_k["1"]["mean"]
        results[name] = describe(tasks, kept, trained, sampling, False) | found._asdict()
    content = {"step": progress.step, "options": asdict(options_of(config)), "suites": results}
    write_file(folder / "results.json", json.dumps(content, indent=2) + "\n")
    run.log.write(progress.step, progress.targets, metrics)
    shown = ", ".join(
        f"{name} {entry['pass_at_k']['1']['mean']:.1%} of {entry['tasks']}"
        for name, entry in results.items()
    )
    run.log.info(f"step {progress.step}  pass@1: {shown}")


def _tasks(run: Run) -> dict[str, tuple[Tasks, list[Problem], list[Problem]]]:
    """Of each suite: all of it, what is scored, and what the run trains on."""
    found = {}
    for name, tasks in read_tasks(options_of(run.config.eval)).items():
        kept, trained = leave_out_trained(tasks.problems, data_of(run.model.training_record))
        if not kept:
            raise ValueError(f"eval.benchmark_tasks: the run trains on all {len(trained)} tasks "
                             f"of {name} that were chosen")  # fmt: skip
        found[name] = (tasks, kept, trained)
    return found

"""Which tasks are put to a checkpoint, and the score of its answers.

Tasks that a checkpoint was trained on are left out of its score by default.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from dylora.data.splits import text_hash
from dylora.evaluation.passk.estimate import bootstrap, pass_at_k
from dylora.evaluation.passk.options import BenchmarkOptions, Sampling
from dylora.evaluation.passk.problem import Problem
from dylora.evaluation.passk.suites import Tasks
from dylora.sandbox.host import Limits, Result, Sandbox, run_all
from dylora.storage.text_hashes import hashes_in


def training_sources(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The data sources of a training record and of those that it continues."""
    earlier = [source for one in record.get("earlier", []) for source in training_sources(one)]
    return [*record.get("data", {}).get("sources", []), *earlier]


def split_trained(
    problems: Sequence[Problem], record: dict[str, Any]
) -> tuple[list[Problem], list[Problem]]:
    """(Not trained on, trained on), as a checkpoint's training record says.

    Tasks are recognised by MBPP's task ids (the sanitized and the + set share them) and by content:
    a row whose question or answer equals the task's (`text_hashes`).
    """
    sources = training_sources(record)
    ids = {f"Mbpp/{number}" for source in sources for number in source.get("task_ids", [])}
    hashes = hashes_in(record)
    kept: list[Problem] = []
    trained: list[Problem] = []
    for problem in problems:
        known = problem.task_id in ids or any(text_hash(text) in hashes for text in problem.texts)
        (trained if known else kept).append(problem)
    return kept, trained


class Selection(NamedTuple):
    """The tasks of a suite that are put to a checkpoint."""

    tasks: Tasks
    problems: list[Problem]  # to be scored
    trained: list[Problem]  # the checkpoint was trained on these
    include_trained: bool

    def describe(self, sampling: Sampling) -> dict[str, Any]:
        """What is asked of a model, for results.json."""
        return {
            "tasks": len(self.problems),
            "source": self.tasks.source._asdict(),
            "prompt": self.tasks.prompt,
            "shots": self.tasks.shots,
            "first_prompt": self.problems[0].prompt,
            "stops": list(self.problems[0].stops),
            "sampling": asdict(sampling),
            "seconds_a_program": self.tasks.limits.seconds,
            "trained_tasks": len(self.trained),
            "trained_tasks_are": "scored" if self.include_trained else "left out",
        }


def select_tasks(name: str, tasks: Tasks, record: dict[str, Any], include: bool) -> Selection:
    """Leaves out the tasks that a training record names, unless they are included.

    Raises ValueError where none is left.
    """
    kept, trained = split_trained(tasks.problems, record)
    if not kept and not include:
        raise ValueError(
            f"{name}: all {len(trained)} chosen tasks were trained on; choose others "
            "(run.py benchmark --include-trained scores them nevertheless)"
        )
    return Selection(tasks, tasks.problems if include else kept, trained, include)


class Score(NamedTuple):
    """The score of one model on one suite."""

    pass_at_k: dict[str, dict[str, float]]  # by k: mean, low and high of the 95 % interval
    outcomes: dict[str, int]  # of all answers
    passed: dict[str, int]  # by task: how many of its samples


def score(
    problems: Sequence[Problem],
    answers: dict[str, list[str]],
    options: BenchmarkOptions,
    limits: Limits,
    before_each: Callable[[], None] = lambda: None,
) -> Score:
    """Checks every answer (of each task equally many).

    limits: of a program over all its tests; before_each: called before each check; an exception of
    it ends the scoring. Raises ValueError where no sandbox works.
    """
    jobs = [(problem, answer) for problem in problems for answer in answers[problem.task_id]]

    def check(sandbox: Sandbox | None, job: tuple[Problem, str]) -> Result:
        before_each()
        return job[0].checker.check(job[1], sandbox)

    if any(problem.checker.runs_programs for problem in problems):
        programs: Any = {"backend": options.sandbox, "unsafe": options.unsafe, "limits": limits}
        results = list(run_all(jobs, check, workers=options.workers, **programs))
    else:
        results = [check(None, job) for job in jobs]
    passed = Counter({problem.task_id: 0 for problem in problems})
    for (problem, _), result in zip(jobs, results, strict=True):
        passed[problem.task_id] += result.outcome == "passed"
    samples = len(jobs) // len(problems)
    scores = {
        k: [pass_at_k(samples, passed[problem.task_id], k) for problem in problems]
        for k in options.k
    }
    return Score(
        pass_at_k={str(k): bootstrap(scores[k], seed=options.seed)._asdict() for k in options.k},
        outcomes=dict(sorted(Counter(result.outcome for result in results).items())),
        passed=dict(passed),
    )

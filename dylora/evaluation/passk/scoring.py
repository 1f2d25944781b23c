"""From programs to a score: every program is run, and what came of them is counted."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dylora.evaluation.passk.estimate import bootstrap, pass_at_k
from dylora.evaluation.passk.problem import Problem
from dylora.evaluation.skills import judge_answer
from dylora.sandbox.host import Limits, Result, Sandbox, run_all


class Score(NamedTuple):
    """What one model's programs came to on one suite."""

    pass_at_k: dict[str, dict[str, float]]  # by k: mean, low and high of the 95 % interval
    outcomes: dict[str, int]  # of all programs
    passed: dict[str, int]  # by task: how many of its samples


def judge(sandbox: Sandbox, job: tuple[Problem, str]) -> Result:
    """Runs one program with its task's tests, or an answer with its skill's check."""
    problem, source = job
    if problem.check is not None:
        return judge_answer(sandbox, problem.check, source)
    return sandbox.run_tests(
        source, problem.tests, setup=problem.setup, entry_points=problem.entry_points
    )


def score(
    problems: Sequence[Problem],
    programs: dict[str, list[str]],
    *,
    k: Sequence[int],
    seconds: int,
    workers: int,
    seed: int,
    level: str = "auto",
    unsafe: bool = False,
    before_each: Callable[[], None] = lambda: None,
) -> Score:
    """Runs every program and counts.

    Args:
        programs: of each task, equally many.
        seconds: of processor time for a program over all its tests; the wall clock gets thrice
            that, and 5 s.
        before_each: called before a program starts; what it raises ends the scoring.

    Raises:
        ValueError: k above the samples a task, or a machine that cannot protect itself.
    """
    jobs = [(problem, source) for problem in problems for source in programs[problem.task_id]]

    def run(sandbox: Sandbox, job: tuple[Problem, str]) -> Result:
        before_each()
        return judge(sandbox, job)

    limits = Limits(seconds=seconds, wall_seconds=3 * seconds + 5)
    found = list(run_all(jobs, run, workers=workers, limits=limits, level=level, unsafe=unsafe))
    passed = Counter({problem.task_id: 0 for problem in problems})
    for (problem, _), result in zip(jobs, found, strict=True):
        passed[problem.task_id] += result.outcome == "passed"
    samples = len(jobs) // len(problems)
    scores = {
        one: [pass_at_k(samples, passed[problem.task_id], one) for problem in problems] for one in k
    }
    return Score(
        pass_at_k={str(one): bootstrap(scores[one], seed=seed)._asdict() for one in k},
        outcomes=dict(sorted(Counter(result.outcome for result in found).items())),
        passed=dict(passed),
    )

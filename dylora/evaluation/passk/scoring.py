"""From answers to a score: every answer is checked, and the outcomes are counted."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.evaluation.passk.contamination import Selection
from dylora.evaluation.passk.estimate import bootstrap, pass_at_k
from dylora.evaluation.passk.options import BenchmarkOptions
from dylora.evaluation.passk.problem import Problem
from dylora.evaluation.passk.sampling import sample_to_file
from dylora.model import DyLoRA_MoE
from dylora.sandbox.host import Limits, Result, Sandbox, run_all


class Score(NamedTuple):
    """The score of one model on one suite."""

    pass_at_k: dict[str, dict[str, float]]  # by k: mean, low and high of the 95 % interval
    outcomes: dict[str, int]  # of all answers
    passed: dict[str, int]  # by task: how many of its samples


def score_model(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    selection: Selection,
    options: BenchmarkOptions,
    batch_size: int,
    file: Path,
    before_each: Callable[[], None] = lambda: None,
) -> Score:
    """Draws the samples that the file lacks, and checks all of them.

    before_each: called before each batch and each check; an exception of it ends the scoring.

    Raises:
        ValueError: A prompt too long for the base, or no sandbox works here and one is needed.
    """
    problems, sampling = selection.problems, options.sampling(selection.tasks, batch_size)
    answers = sample_to_file(model, tokenizer, problems, sampling, file, before_each)
    return score(problems, answers, options, selection.tasks.limits, before_each)


def score(
    problems: Sequence[Problem],
    answers: dict[str, list[str]],
    options: BenchmarkOptions,
    limits: Limits,
    before_each: Callable[[], None] = lambda: None,
) -> Score:
    """Checks every answer (of each task equally many) and counts.

    limits: of a program over all its tests.
    """
    jobs = [(problem, answer) for problem in problems for answer in answers[problem.task_id]]

    def check(sandbox: Sandbox | None, job: tuple[Problem, str]) -> Result:
        before_each()
        return job[0].checker.check(job[1], sandbox)

    if any(problem.checker.runs_programs for problem in problems):
        results = list(
            run_all(
                jobs,
                check,
                workers=options.workers,
                limits=limits,
                backend=options.sandbox,
                unsafe=options.unsafe,
            )
        )
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

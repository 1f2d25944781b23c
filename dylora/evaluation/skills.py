"""The embedded skills as tasks: generated questions, and answers that are run to be judged.

Answers run in the sandbox, where worker.py's `answer_values` takes them through what their kind
asks for; what comes out is compared here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

import dylora.tasks.worker as worker
from dylora.data.prompts import format_prompt
from dylora.evaluation.passk.problem import Problem, program_of
from dylora.evaluation.passk.sampling import generate_in_batches
from dylora.model import DyLoRA_MoE
from dylora.sandbox.host import Limits, Result, Sandbox, run_all
from dylora.tasks import SKILLS, Task, check_answers, generate_tasks
from dylora.tasks.checking import is_right

SKILL_SUITES = tuple(f"skills/{skill}" for skill in SKILLS)
TASKS_OF_A_SKILL = 100
ANSWER_TOKENS = 64
"""The longest reference has half of that on the embedded tokenizer."""
ANSWER_LIMITS = Limits(seconds=2, wall_seconds=10)


class SkillScore(NamedTuple):
    """How one skill went."""

    passed: int
    total: int
    answers: list[str]
    level: str  # what kept the machine from the answers while they ran

    @property
    def share(self) -> float:
        return self.passed / self.total


def skill_problems(suite: str, count: int | None = None, seed: int = 0) -> list[Problem]:
    """Test tasks of one of `SKILL_SUITES`. They share no literal with what training may see."""
    skill = suite.rpartition("/")[2]
    tasks = generate_tasks(skill, "test", count or TASKS_OF_A_SKILL, seed)
    return [_problem(task, number) for number, task in enumerate(tasks)]


def _problem(task: Task, number: int) -> Problem:
    return Problem(
        task_id=f"skills/{task.skill}/{number}",
        prompt=format_prompt(task.instruction),
        prefix="",
        stops=("\n### ",),
        setup="",
        tests="",
        entry_points=(),
        reference=task.answer,
        texts=(task.instruction,),  # two tasks may well have one answer
        check=task.check,
    )


def judge_answer(sandbox: Sandbox, check: dict[str, Any], answer: str) -> Result:
    """Runs an answer in the sandbox and compares; "failed" means that it gave something else."""
    job = {key: item for key, item in check.items() if key != "expected"}
    source = Path(worker.__file__).read_text(encoding="utf-8")
    call = ("answer_values", [job | {"source": answer.strip()}])
    result, values = sandbox.call(source, [call])
    if result.outcome == "passed" and not is_right(check, values[0]):
        return result._replace(outcome="failed", detail="not what was expected")
    return result


def score_skills(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    skills: Sequence[str],
    count: int,
    *,
    max_new_tokens: int = ANSWER_TOKENS,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, SkillScore]:
    """Answer `count` test tasks of each skill greedily and run the answers.

    In the sandbox; on a machine that has none, in separate processes with limits (see
    tasks/checking.py). `level` tells which.
    """
    scores = {}
    for skill in skills:
        tasks = generate_tasks(skill, "test", count, seed)
        answers = answer(model, tokenizer, tasks, max_new_tokens, batch_size)
        passed, level = check_in_sandbox(tasks, answers)
        scores[skill] = SkillScore(sum(passed), len(tasks), answers, level)
    return scores


def check_in_sandbox(tasks: Sequence[Task], answers: Sequence[str]) -> tuple[list[bool], str]:
    """Whether each answer is right, and what protected the machine meanwhile."""
    try:
        with Sandbox(ANSWER_LIMITS) as sandbox:
            level = sandbox.level
    except ValueError as refusal:
        return check_answers(tasks, answers), f"resource limits only ({refusal})"
    jobs = list(zip(tasks, answers, strict=True))
    found = run_all(jobs, lambda box, job: judge_answer(box, job[0].check, job[1]),
                    limits=ANSWER_LIMITS)  # fmt: skip
    return [result.outcome == "passed" for result in found], level


def answer(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """Greedy answers, in the tasks' order; prompts of similar length share a batch."""
    problems = [_problem(task, number) for number, task in enumerate(tasks)]
    texts = generate_in_batches(
        model, tokenizer, problems, batch_size, max_new_tokens=max_new_tokens
    )
    return [program_of(problem, text) for problem, text in zip(problems, texts, strict=True)]

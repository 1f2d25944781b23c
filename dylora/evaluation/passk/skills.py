"""The embedded skills as a suite, and what a run's report says of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.prompts import format_prompt
from dylora.evaluation.passk.generation import generate_in_batches
from dylora.evaluation.passk.problem import Problem, answer_of
from dylora.model import DyLoRA_MoE
from dylora.sandbox.host import Result, Sandbox
from dylora.tasks import SKILLS, Task, check_answers, generate_tasks
from dylora.tasks.checking import check_answer

SKILL_SUITES = tuple(f"skills/{skill}" for skill in SKILLS)
TASKS_OF_A_SKILL = 100
ANSWER_TOKENS = 64
"""The longest reference has half of that on the embedded tokenizer."""


@dataclass(frozen=True)
class SkillCheck:
    """Checks an answer to a generated task by the values that it gives."""

    runs_programs: ClassVar[bool] = True

    task: dict[str, Any]
    """`check` of a Task."""

    def check(self, answer: str, sandbox: Sandbox | None) -> Result:
        assert sandbox is not None
        return check_answer(sandbox, self.task, answer)


class Answer(NamedTuple):
    """One test task, and what became of it."""

    question: str
    expected: str  # an answer that passes; others may
    given: str
    passed: bool


class SkillScore(NamedTuple):
    """The test answers of one skill."""

    passed: int
    total: int
    answers: list[Answer]
    backend: str  # what protected the machine while the answers ran

    @property
    def share(self) -> float:
        return self.passed / self.total


def skill_problems(suite: str, count: int | None = None, seed: int = 0) -> list[Problem]:
    """Test tasks of one of `SKILL_SUITES`. They share no literal with those for training."""
    skill = suite.rpartition("/")[2]
    tasks = generate_tasks(skill, "test", count or TASKS_OF_A_SKILL, seed)
    return [_problem(task, number) for number, task in enumerate(tasks)]


def _problem(task: Task, number: int) -> Problem:
    return Problem(
        task_id=f"skills/{task.skill}/{number}",
        prompt=format_prompt(task.instruction),
        instruction=task.instruction,
        prefix="",
        stops=("\n### ",),
        reference=task.answer,
        texts=(task.instruction,),  # two tasks may well have one answer
        checker=SkillCheck(task.check),
    )


def score_skills(
    model: DyLoRA_MoE, tokenizer: PreTrainedTokenizerBase, skills: Sequence[str], count: int
) -> dict[str, SkillScore]:
    """Answer `count` test tasks of each skill greedily and check the answers (`check_answers`)."""
    scores = {}
    for skill in skills:
        tasks = generate_tasks(skill, "test", count)
        problems = [_problem(task, number) for number, task in enumerate(tasks)]
        texts = generate_in_batches(model, tokenizer, problems, 64, max_new_tokens=ANSWER_TOKENS)
        answers = [answer_of(problem, text) for problem, text in zip(problems, texts, strict=True)]
        passed, backend = check_answers(tasks, answers)
        rows = zip(tasks, answers, passed, strict=True)
        told = [Answer(task.instruction, task.answer, text, right) for task, text, right in rows]
        scores[skill] = SkillScore(sum(passed), len(tasks), told, backend)
    return scores

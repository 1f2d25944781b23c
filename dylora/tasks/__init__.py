"""Six small skills, each made by a seeded generator and checked by running the answers.

`lists` and `strings` ask for a Python function, `sql` for a query, `regex` for a pattern, `json`
for a Python expression on records, `arithmetic` for the expression that solves a word problem.
Train, validation and test share no instance and no literal (see task.py), and a sixth of the
pairs of operations is combined in test only.
"""

import random
from typing import get_args

from dylora.fields import nearest
from dylora.tasks import arithmetic, functions, records, regex, sql
from dylora.tasks.answers import run_answer
from dylora.tasks.checking import check_answers
from dylora.tasks.task import Split, Task, is_held_out

__all__ = ["SKILLS", "Split", "Task", "check_answers", "generate_tasks"]

_DRAFTS = {
    "lists": functions.draft_lists,
    "strings": functions.draft_strings,
    "sql": sql.draft,
    "regex": regex.draft,
    "json": records.draft,
    "arithmetic": arithmetic.draft,
}
SKILLS: tuple[str, ...] = tuple(_DRAFTS)
_MOST_MISSES = 2000
"""So many draws in a row without a new task mean that there is none left."""


def generate_tasks(skill: str, split: Split, count: int, seed: int = 0) -> list[Task]:
    """Distinct tasks of a skill, no two with the same instruction or the same program.

    The same arguments give the same tasks on every machine, and fewer tasks are a prefix of more.
    Raises ValueError for an unknown skill or split, and for more tasks than there are.
    """
    if skill not in _DRAFTS:
        raise ValueError(f"unknown skill {skill!r}{nearest(skill, list(SKILLS))}")
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}{nearest(split, list(get_args(Split)))}")
    rng = random.Random(f"{skill}/{split}/{seed}")
    tasks: list[Task] = []
    seen: set[str] = set()
    misses = 0
    while len(tasks) < count:
        if misses == _MOST_MISSES:
            raise ValueError(
                f"{skill} has about {len(tasks)} tasks for {split}, not the {count} asked for"
            )
        misses += 1
        draft = _DRAFTS[skill](rng, split)
        held_out = split != "test" and is_held_out(draft.operations)
        if held_out or seen & {draft.program, draft.instruction}:
            continue
        check = draft.make_check()
        expected = check["expected"] = run_answer(check | {"source": draft.answer})
        if len(check["inputs"]) > 1 and all(
            one == check["expected"][0] for one in check["expected"]
        ):
            continue  # an answer that ignores its input would pass
        if expected in [run_answer(check | {"source": text}) for text in draft.simpler]:
            continue
        misses = 0
        seen |= {draft.program, draft.instruction}
        instruction, answer = draft.instruction, draft.answer
        tasks.append(Task(skill=skill, instruction=instruction, answer=answer, check=check))
    return tasks

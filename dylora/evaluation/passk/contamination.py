"""Tasks of a suite that a checkpoint was trained on are left out of its score, by default."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from dylora.data.splits import text_hash
from dylora.evaluation.passk.problem import Problem
from dylora.evaluation.passk.sampling import Sampling
from dylora.evaluation.passk.suites import Tasks


def training_sources(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The data sources of a training record and of the records that it continues."""
    sources = list(record.get("data", {}).get("sources", []))
    for earlier in record.get("earlier", []):
        sources += training_sources(earlier)
    return sources


def split_trained(
    problems: Sequence[Problem], record: dict[str, Any]
) -> tuple[list[Problem], list[Problem]]:
    """(Not trained on, trained on), as a checkpoint's training record says.

    Tasks are recognised by MBPP's task ids (the sanitized and the + set share them) and by content,
    from whatever file it came: a row whose question or answer equals the task's (`text_hashes`).
    """
    sources = training_sources(record)
    ids = {f"Mbpp/{number}" for source in sources for number in source.get("task_ids", [])}
    hashes = {one for source in sources for one in source.get("text_hashes", "").split()}
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

    def describe(self, sampling: Sampling, include_trained: bool) -> dict[str, Any]:
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
            "trained_tasks_are": "scored" if include_trained else "left out",
        }


def select_tasks(name: str, tasks: Tasks, record: dict[str, Any], include: bool) -> Selection:
    """Leaves out the tasks that a training record names, unless they are included.

    Raises:
        ValueError: No task is left.
    """
    kept, trained = split_trained(tasks.problems, record)
    if not kept and not include:
        raise ValueError(
            f"{name}: all {len(trained)} chosen tasks were trained on; choose others "
            "(run.py benchmark --include-trained scores them nevertheless)"
        )
    return Selection(tasks, tasks.problems if include else kept, trained)

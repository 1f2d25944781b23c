"""Questions to begin with: one of each embedded skill that a mixture was trained on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dylora.storage.safe_io import read_json
from dylora.tasks import SKILLS, generate_tasks
from dylora.training.stages import SKILL_PREFIX, past_of


def suggested_questions(record: Mapping[str, Any], run: Path) -> dict[str, str]:
    """Skill -> a question of it, for the skills among the sources of a training record.

    run: the folder of the training. Of its test questions the first that these weights answered
    rightly is taken; where it says nothing of them, the first test question.
    """
    data = [past.get("data", {}) for past in past_of(dict(record))]
    learned = {source["name"] for one in data for source in one.get("sources", [])}
    right = answered_rightly(run / "results.json", record.get("step"))
    return {
        skill: right.get(skill) or generate_tasks(skill, "test", 1)[0].instruction
        for skill in SKILLS
        if SKILL_PREFIX + skill in learned
    }


def answered_rightly(results: Path, step: int | None) -> dict[str, str]:
    """Skill -> the first of its questions that passed; empty where the file is not there, is of
    another step or is no results.json of ours: anybody may have written it."""
    try:
        found = read_json(results)
        answers = found["answers"] if found["step"] == step else {}
        passed = {
            skill: [one["question"] for one in given if one["passed"]]
            for skill, given in answers.items()
        }
        return {skill: asked[0] for skill, asked in passed.items() if asked and is_text(asked[0])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def is_text(question: Any) -> bool:
    """Whether it can be shown: what steers a terminal cannot."""
    return isinstance(question, str) and question.isprintable()

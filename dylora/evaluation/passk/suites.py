"""The suites of tasks: a table, and how their original files or hub sets are read.

A new suite is a row of `SUITES`: where its rows are, and a function that makes a `Problem` of one,
with the `Checker` that judges its answers.
"""

import ast
import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dylora.data.prompts import format_prompt, mbpp_instruction
from dylora.data.readers import read_records
from dylora.data.sources import MBPP, MBPP_PUBLISHED
from dylora.evaluation.passk.evalplus import CONTINUATION_STOPS, humaneval_plus, mbpp_plus
from dylora.evaluation.passk.problem import Problem, ProgramTests, unix
from dylora.evaluation.passk.skills import ANSWER_TOKENS, SKILL_SUITES, skill_problems
from dylora.fields import nearest
from dylora.sandbox.host import Limits
from dylora.tasks.checking import ANSWER_LIMITS

PROGRAM_LIMITS = Limits()
PLUS_LIMITS = Limits(seconds=60, wall_seconds=60, memory_mb=2048)
"""Some inputs of the + sets take their own references long, and give lists of millions."""
INSTRUCTION_STOPS = ("\nassert ", "\nif __name__", "\n```", "\n### ")
SHOTS = 3
SHOT_IDS = (2, 3, 4)
"""The tasks of MBPP's prompt split that Austin et al. (2021) show before each question."""
SHOT_PROMPT = (
    "You are an expert Python programmer, and here is your task: {text} "
    "Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
)
SHOT_ANSWER = "{code}\n[DONE]\n\n"
"""Their form, from the README of the data (google-research/mbpp), as lm-evaluation-harness joins
the examples: by an empty line."""
SHOT_WORDS = f"{SHOTS}-shot, tasks 2, 3 and 4 solved before the question, all tests shown"


class Suite(NamedTuple):
    """A row of the table: where a suite is, and how it is read."""

    hub: str
    hub_columns: tuple[str, ...]
    to_problem: Callable[[dict[str, Any]], Problem]
    prompt: str  # how tasks are put to the model, in words for the results
    hub_config: str | None = None
    hub_splits: tuple[str, ...] = ("test",)
    file_columns: tuple[str, ...] = ()  # of a JSON file in the original format; (): as in the hub
    limits: Limits = PROGRAM_LIMITS
    max_new_tokens: int = 512
    is_mbpp: bool = False  # has MBPP's published splits, and its prompt of 3 shots


class Source(NamedTuple):
    """What was read, for the results."""

    path: str  # a file, a name of the hub, or the generator
    revision: str | None
    sha256: str | None  # of the file; None for the hub
    split: str


class Tasks(NamedTuple):
    """The problems of one suite, ready for a model."""

    problems: list[Problem]
    source: Source
    prompt: str  # how they are put to the model, in words
    shots: int
    limits: Limits  # of a program over all its tests
    max_new_tokens: int


def read_suite(
    name: str,
    path: str | None = None,
    *,
    split: str = "test",
    revision: str | None = None,
    shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> Tasks:
    """The tasks of a suite, in its order.

    Args:
        name: one of `SUITES`, or skills/<skill>.
        path: a local file in the suite's original format; None: the hub.
        split: MBPP's published splits by task id: train (601–974), validation (511–600), test
            (11–510), prompt (1–10), or all. Others have test only.
        revision: of the hub's data set.
        shots: solved tasks before each question: 0, or 3 for MBPP.
        limit: only the first so many tasks.
        seed: of the generated tasks of a skill.

    Raises:
        ValueError: An unknown suite or split, a file that cannot be read, or a bad row: a suite
            with a task missing would give another score.
    """
    if name in SKILL_SUITES:
        return _generate_skill(name, path, limit, seed)
    suite = _find_suite(name, split, shots)
    where = path or suite.hub
    wanted = MBPP_PUBLISHED.get(split) if suite.is_mbpp else None
    chosen: list[Problem] = []
    examples: dict[int, str] = {}
    for number, problem in _problems(name, suite, path, revision, shots, wanted):
        if number in SHOT_IDS and shots:
            examples[number] = problem.prompt + SHOT_ANSWER.format(code=problem.reference.rstrip())
        if wanted is None or number in wanted:
            chosen.append(problem)
    seen = [problem.task_id for problem in chosen]
    if not seen:
        raise ValueError(f"{where} has no task of {name}'s split {split}")
    if len(set(seen)) < len(seen):
        twice = next(task_id for task_id in seen if seen.count(task_id) > 1)
        raise ValueError(f"{where}: {twice} appears twice")
    if shots:
        missing = [number for number in SHOT_IDS if number not in examples]
        if missing:
            raise ValueError(f"{where} lacks task {missing[0]}, which 3 shots need")
        before = "".join(examples[number] for number in SHOT_IDS)
        chosen = [problem._replace(prompt=before + problem.prompt) for problem in chosen]
    source = Source(where, revision, _sha256(path) if path else None, split)
    prompt = SHOT_WORDS if shots else suite.prompt
    return Tasks(chosen[:limit], source, prompt, shots, suite.limits, suite.max_new_tokens)


def suite_names() -> list[str]:
    """Every name that `read_suite` takes."""
    return [*SUITES, *SKILL_SUITES]


def takes_shots(name: str) -> bool:
    """Whether a suite has MBPP's own rows, with its splits."""
    return name in SUITES and SUITES[name].is_mbpp


def _generate_skill(name: str, path: str | None, limit: int | None, seed: int) -> Tasks:
    if path is not None:
        raise ValueError(f"{name} is generated, so there is no file to read: {path}")
    source = Source(f"generated with seed {seed}", None, None, "test")
    prompt = "0-shot, the instruction template with the task"
    problems = skill_problems(name, limit, seed)
    return Tasks(problems, source, prompt, 0, ANSWER_LIMITS, ANSWER_TOKENS)


def _find_suite(name: str, split: str, shots: int) -> Suite:
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}{nearest(name, suite_names())}")
    suite = SUITES[name]
    splits = [*MBPP_PUBLISHED, "all"] if suite.is_mbpp else ["test"]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}{nearest(split, splits)}")
    if shots not in (0, SHOTS) or (shots and not suite.is_mbpp):
        raise ValueError(f"{name} has no prompt of {shots} shots: 0, or {SHOTS} for MBPP")
    return suite


def _problems(
    name: str,
    suite: Suite,
    path: str | None,
    revision: str | None,
    shots: int,
    wanted: range | None,
) -> Iterator[tuple[int | None, Problem]]:
    """The rows as problems, with their numbers in MBPP: those wanted, and the solved ones."""
    is_json = path is not None and Path(path).suffix.lower() != ".parquet"
    records = read_records(
        path or suite.hub,
        revision,
        columns=list((is_json and suite.file_columns) or suite.hub_columns),
        hub_config=suite.hub_config if path is None else None,
        hub_splits=suite.hub_splits,
    )
    for record in records:
        try:
            if record.problem:
                raise ValueError(record.problem)
            number = int(record.fields["task_id"]) if suite.is_mbpp else None
            if wanted is not None and number not in (*wanted, *(SHOT_IDS if shots else ())):
                continue
            problem = suite.to_problem(record.fields)
            if shots:
                prompt = _shot_prompt(record.fields)
                problem = problem._replace(prompt=prompt, stops=("[DONE]",))
        except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
            why = record.problem or f"{type(error).__name__}: {error}"
            raise ValueError(f"{record.location}: not a task of {name} ({why})") from None
        yield number, problem


def _sha256(path: str) -> str:
    with Path(path).expanduser().open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# MBPP


def _mbpp_text(task: dict[str, Any]) -> str:
    return unix(task["text"] if "text" in task else task["prompt"])  # the sanitized set's name


def _mbpp(task: dict[str, Any]) -> Problem:
    text, code = _mbpp_text(task), unix(task["code"])
    checks = [unix(check) for check in task["test_list"]]
    before = unix(task.get("test_setup_code") or "")
    imports = [unix(line) for line in task.get("test_imports") or []]
    # After the entry points: setups build trees of the program's own nodes.
    tests = "\n".join([*imports, before, *checks])
    entry_points = _defined(code, tests)
    if not entry_points:
        raise ValueError("its tests call no function of its program")
    instruction = mbpp_instruction(text, checks[0])
    return Problem(
        task_id=f"Mbpp/{int(task['task_id'])}",
        prompt=format_prompt(instruction),
        prefix="",
        stops=INSTRUCTION_STOPS,
        reference=code,
        texts=(text, instruction, code),
        checker=ProgramTests(tests, entry_points),
    )


def _shot_prompt(task: dict[str, Any]) -> str:
    tests = "\n".join(unix(check) for check in task["test_list"])
    return SHOT_PROMPT.format(text=_mbpp_text(task), tests=tests)


def _defined(source: str, used_in: str) -> tuple[str, ...]:
    """The functions and classes of a program that a text uses."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    with warnings.catch_warnings(action="ignore"):  # some programs of MBPP have "\d"
        tree = ast.parse(source)
    names = [node.name for node in tree.body if isinstance(node, kinds)]
    used = set(re.findall(r"\w+", used_in))
    return tuple(dict.fromkeys(name for name in names if name in used))


# HumanEval


def _humaneval(task: dict[str, Any]) -> Problem:
    prompt, name = unix(task["prompt"]), task["entry_point"]
    answer, test = unix(task["canonical_solution"]), unix(task["test"])
    return Problem(
        task_id=task["task_id"],
        prompt=prompt,
        prefix=prompt,
        stops=CONTINUATION_STOPS,
        reference=prompt + answer,
        texts=(prompt, prompt + answer),  # a body alone may occur in other programs
        # The setup defines the helpers that the tests use: those of the program are not trusted.
        checker=ProgramTests(f"{test}\n\ncheck({name})\n", (name,), setup=prompt),
    )


_AS_PUBLISHED = "0-shot, the published prompt is continued as it stands"
_TEMPLATE = "0-shot, the instruction template with the {} and the first test"
_HUMANEVAL = ("task_id", "prompt", "canonical_solution", "entry_point")
_PLUS_FILE = (*_HUMANEVAL, "base_input", "plus_input", "atol")
SUITES: dict[str, Suite] = {
    "mbpp": Suite(
        hub=MBPP,
        hub_config="full",
        hub_splits=tuple(MBPP_PUBLISHED),
        hub_columns=("task_id", "text", "code", "test_list", "test_setup_code"),
        to_problem=_mbpp,
        prompt=_TEMPLATE.format("text"),
        is_mbpp=True,
    ),
    "mbpp_sanitized": Suite(
        hub=MBPP,
        hub_config="sanitized",
        hub_splits=tuple(MBPP_PUBLISHED),
        hub_columns=("task_id", "prompt", "code", "test_list", "test_imports"),
        to_problem=_mbpp,
        prompt=_TEMPLATE.format("prompt"),
        is_mbpp=True,
    ),
    "humaneval": Suite(
        hub="openai/openai_humaneval",
        hub_columns=(*_HUMANEVAL, "test"),
        to_problem=_humaneval,
        prompt=_AS_PUBLISHED,
    ),
    "humaneval+": Suite(
        hub="evalplus/humanevalplus",
        hub_columns=(*_HUMANEVAL, "test"),
        file_columns=_PLUS_FILE,
        to_problem=humaneval_plus,
        prompt=_AS_PUBLISHED,
        limits=PLUS_LIMITS,
    ),
    "mbpp+": Suite(
        hub="evalplus/mbppplus",
        hub_columns=("task_id", "prompt", "code", "test_list", "test"),
        file_columns=_PLUS_FILE,
        to_problem=mbpp_plus,
        prompt="0-shot, the published docstring (question and first test) is continued as it "
        "stands",
        limits=PLUS_LIMITS,
    ),
}

"""The suites of tasks: a table, and how their original files or hub sets are read.

A new suite is a row of `SUITES`: where its rows are, and a function that makes a `Problem` of one,
with the `Checker` that judges its answers.
"""

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dylora.data.prompts import format_prompt, mbpp_instruction
from dylora.data.readers import read_records
from dylora.data.sources import MBPP, MBPP_PUBLISHED
from dylora.evaluation.passk.evalplus import continued_function, humaneval_plus, mbpp_plus
from dylora.evaluation.passk.problem import PROMPTS, Problem, ProgramTests, unix
from dylora.evaluation.passk.skills import ANSWER_TOKENS, SKILL_SUITES, skill_problems
from dylora.fields import nearest
from dylora.sandbox.host import Limits
from dylora.storage.manifest import hash_file
from dylora.tasks.checking import ANSWER_LIMITS

PROGRAM_LIMITS = Limits(seconds=20)
"""Mbpp/123's own reference takes 3 to 5 s."""
PLUS_LIMITS = Limits(seconds=90, wall_seconds=60, memory_mb=2048)
"""Some inputs of the + sets take their own references long (Mbpp/599: 28 s, 41 on a busy machine),
and give lists of millions."""
_SHOTS = PROMPTS["shots"]


class Suite(NamedTuple):
    """A row of the table: where a suite is, and how it is read."""

    hub: str
    hub_columns: tuple[str, ...]
    to_problem: Callable[[dict[str, Any]], Problem]
    prompt: str  # how tasks are put to the model, in words for the results
    hub_config: str | None = None
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
    shots: int = 0,
    limit: int | None = None,
    seed: int = 0,
) -> Tasks:
    """The first `limit` tasks of a suite: one of `SUITES`, or skills/<skill> generated from `seed`.

    Args:
        path: a local file in the suite's original format; None: the hub.
        split: MBPP's published splits by task id: train (601–974), validation (511–600), test
            (11–510), prompt (1–10), or all. Others have test only.
        shots: solved tasks before each question: 0, or 3 for MBPP.

    Raises ValueError for an unknown suite or split, a file that cannot be read, or a bad row: a
    suite with a task missing would give another score.
    """
    if name in SKILL_SUITES:
        if path is not None:
            raise ValueError(f"{name} is generated, so there is no file to read: {path}")
        source = Source(f"generated with seed {seed}", None, None, "test")
        prompt = "0-shot, the instruction template with the task"
        problems = skill_problems(name, limit, seed)
        return Tasks(problems, source, prompt, 0, ANSWER_LIMITS, ANSWER_TOKENS)
    suite = _find_suite(name, split, shots)
    where = path or suite.hub
    wanted = MBPP_PUBLISHED.get(split) if suite.is_mbpp else None
    rows = list(_problems(name, suite, path, shots, wanted))
    chosen = [problem for number, problem in rows if wanted is None or number in wanted]
    seen = [problem.task_id for problem in chosen]
    if not seen:
        raise ValueError(f"{where} has no task of {name}'s split {split}")
    if len(set(seen)) < len(seen):
        twice = next(task_id for task_id in seen if seen.count(task_id) > 1)
        raise ValueError(f"{where}: {twice} appears twice")
    if shots:
        solved = {
            number: problem.prompt + _SHOTS["answer"].format(code=problem.reference.rstrip())
            for number, problem in rows
        }
        missing = [number for number in _SHOTS["ids"] if number not in solved]
        if missing:
            raise ValueError(f"{where} lacks task {missing[0]}, which 3 shots need")
        before = "".join(solved[number] for number in _SHOTS["ids"])
        chosen = [problem._replace(prompt=before + problem.prompt) for problem in chosen]
    digest = hash_file(Path(path).expanduser()) if path else None
    source = Source(where, None, digest, split)
    prompt = _SHOTS["description"] if shots else suite.prompt
    return Tasks(chosen[:limit], source, prompt, shots, suite.limits, suite.max_new_tokens)


def takes_shots(name: str) -> bool:
    """Whether a suite has MBPP's own rows, with its splits."""
    return name in SUITES and SUITES[name].is_mbpp


def _find_suite(name: str, split: str, shots: int) -> Suite:
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}{nearest(name, [*SUITES, *SKILL_SUITES])}")
    suite = SUITES[name]
    splits = [*MBPP_PUBLISHED, "all"] if suite.is_mbpp else ["test"]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}{nearest(split, splits)}")
    if shots not in (0, 3) or (shots and not suite.is_mbpp):
        raise ValueError(f"{name} has no prompt of {shots} shots: 0, or 3 for MBPP")
    return suite


def _problems(
    name: str, suite: Suite, path: str | None, shots: int, wanted: range | None
) -> Iterator[tuple[int | None, Problem]]:
    """The rows as problems, with their numbers in MBPP: those wanted, and the solved ones."""
    is_json = path is not None and Path(path).suffix.lower() != ".parquet"
    records = read_records(
        path or suite.hub,
        None,
        columns=list((is_json and suite.file_columns) or suite.hub_columns),
        hub_config=suite.hub_config if path is None else None,
        hub_splits=tuple(MBPP_PUBLISHED) if suite.is_mbpp else ("test",),
    )
    for record in records:
        try:
            if record.problem:
                raise ValueError(record.problem)
            number = int(record.fields["task_id"]) if suite.is_mbpp else None
            if wanted is not None and number not in (*wanted, *(_SHOTS["ids"] if shots else ())):
                continue
            problem = suite.to_problem(record.fields)
            if shots:
                tests = "\n".join(map(unix, record.fields["test_list"]))
                prompt = _SHOTS["prompt"].format(text=problem.texts[0], tests=tests)
                problem = problem._replace(prompt=prompt, instruction="", stops=("[DONE]",))
        except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
            why = record.problem or f"{type(error).__name__}: {error}"
            raise ValueError(f"{record.location}: not a task of {name} ({why})") from None
        yield number, problem


def _mbpp(task: dict[str, Any]) -> Problem:
    text = unix(task["text"] if "text" in task else task["prompt"])  # the sanitized set's name
    code = unix(task["code"])
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
        instruction=instruction,
        prefix="",
        stops=tuple(PROMPTS["stops"]["instruction"]),
        reference=code,
        texts=(text, instruction, code),
        checker=ProgramTests(tests, entry_points),
    )


def _defined(source: str, used_in: str) -> tuple[str, ...]:
    """The functions and classes of a program that a text uses."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    with warnings.catch_warnings(action="ignore"):  # some programs of MBPP have "\d"
        tree = ast.parse(source)
    names = [node.name for node in tree.body if isinstance(node, kinds)]
    used = set(re.findall(r"\w+", used_in))
    return tuple(dict.fromkeys(name for name in names if name in used))


def _humaneval(task: dict[str, Any]) -> Problem:
    name = task["entry_point"]
    # The setup defines the helpers that the tests use: those of the program are not trusted.
    tests, setup = f"{unix(task['test'])}\n\ncheck({name})\n", unix(task["prompt"])
    return continued_function(task, ProgramTests(tests, (name,), setup))


_AS_PUBLISHED = "0-shot, the published prompt is continued as it stands"
_DOCSTRING = "0-shot, the published docstring (question and first test) is continued as it stands"
_TEMPLATE = "0-shot, the instruction template with the {} and the first test"
_HUMANEVAL = ("task_id", "prompt", "canonical_solution", "entry_point")
_PLUS_FILE = (*_HUMANEVAL, "base_input", "plus_input", "atol")
SUITES: dict[str, Suite] = {
    "mbpp": Suite(
        hub=MBPP,
        hub_config="full",
        hub_columns=("task_id", "text", "code", "test_list", "test_setup_code"),
        to_problem=_mbpp,
        prompt=_TEMPLATE.format("text"),
        is_mbpp=True,
    ),
    "mbpp_sanitized": Suite(
        hub=MBPP,
        hub_config="sanitized",
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
        prompt=_DOCSTRING,
        limits=PLUS_LIMITS,
    ),
}

"""The published suites of programming tasks: read from their original files or the hub."""

import ast
import hashlib
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dylora.data.prompts import format_prompt, mbpp_instruction
from dylora.data.readers import read_records
from dylora.data.sources import MBPP, MBPP_PUBLISHED, text_hash
from dylora.evaluation.passk.evalplus import CONTINUATION_STOPS, humaneval_plus, mbpp_plus
from dylora.evaluation.passk.problem import Problem, unix
from dylora.evaluation.skills import ANSWER_LIMITS, ANSWER_TOKENS, SKILL_SUITES, skill_problems
from dylora.fields import nearest

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


class Suite(NamedTuple):
    """Where a suite comes from and how its rows read."""

    hub: str
    hub_config: str | None
    hub_splits: tuple[str, ...]
    hub_columns: tuple[str, ...]
    file_columns: tuple[str, ...]  # of a JSON file in the original format
    to_problem: Callable[[dict[str, Any]], Problem]
    prompt: str  # how tasks are put to the model, for the results
    seconds: int = 5  # of processor time for a program over all its tests


class Source(NamedTuple):
    """What was read, for the results."""

    path: str  # a file, a name of the hub, or the generator
    revision: str | None
    sha256: str | None  # of the file; None for the hub
    split: str


class Tasks(NamedTuple):
    """The problems of one suite, ready to be put to a model."""

    problems: list[Problem]
    source: Source
    prompt: str  # how they are put, in words
    shots: int
    seconds: int  # of processor time for a program over all its tests
    max_new_tokens: int = 512


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
        path: a local file in the suite's original format; none: the hub.
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
        if path is not None:
            raise ValueError(f"{name} is generated, so there is no file to read: {path}")
        problems = skill_problems(name, limit, seed)
        source = Source(f"generated with seed {seed}", None, None, "test")
        prompt = "0-shot, the instruction template with the task"
        return Tasks(problems, source, prompt, 0, ANSWER_LIMITS.seconds, ANSWER_TOKENS)
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}{nearest(name, suite_names())}")
    suite, splits = SUITES[name], [*MBPP_PUBLISHED, "all"] if takes_shots(name) else ["test"]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}{nearest(split, splits)}")
    if shots not in (0, SHOTS) or (shots and not takes_shots(name)):
        raise ValueError(f"{name} has no prompt of {shots} shots: 0, or {SHOTS} for MBPP")
    is_json = path is not None and Path(path).suffix.lower() != ".parquet"
    records = read_records(
        path or suite.hub,
        revision,
        columns=list(suite.file_columns if is_json else suite.hub_columns),
        hub_config=suite.hub_config if path is None else None,
        hub_splits=suite.hub_splits,
    )
    problems, examples = [], {}
    for record in records:
        try:
            if record.problem:
                raise ValueError(record.problem)
            task = record.fields
            if shots and int(task["task_id"]) in SHOT_IDS:
                answer = SHOT_ANSWER.format(code=unix(task["code"]).rstrip())
                examples[int(task["task_id"])] = _shot_prompt(task) + answer
            if split in MBPP_PUBLISHED and takes_shots(name) and not _is_in(split, task):
                continue
            problem = suite.to_problem(task)
            if shots:
                problem = problem._replace(prompt=_shot_prompt(task), stops=("[DONE]",))
            problems.append(problem)
        except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
            why = f"{type(error).__name__}: {error}" if not record.problem else record.problem
            raise ValueError(f"{record.place}: no task of {name} ({why})") from None
    where = path or suite.hub
    seen = [problem.task_id for problem in problems]
    if not seen:
        raise ValueError(f"{where} has no task of {name}'s split {split}")
    if len(set(seen)) < len(seen):
        twice = next(task_id for task_id in seen if seen.count(task_id) > 1)
        raise ValueError(f"{where}: {twice} stands there twice")
    if shots:
        missing = [number for number in SHOT_IDS if number not in examples]
        if missing:
            raise ValueError(f"{where} lacks task {missing[0]}, which 3 shots need")
        before = "".join(examples[number] for number in SHOT_IDS)
        problems = [problem._replace(prompt=before + problem.prompt) for problem in problems]
    source = Source(where, revision, _sha256(path) if path else None, split)
    words = f"{SHOTS}-shot, tasks 2, 3 and 4 solved before the question, all tests shown"
    prompt = words if shots else suite.prompt
    return Tasks(problems[:limit], source, prompt, shots, suite.seconds)


def suite_names() -> list[str]:
    """Every name that `read_suite` takes."""
    return [*SUITES, *SKILL_SUITES]


def takes_shots(name: str) -> bool:
    """Whether a suite is MBPP's own rows, with its splits."""
    return name in ("mbpp", "mbpp_sanitized")


def data_of(record: dict[str, Any]) -> dict[str, Any]:
    """The data stamp of a checkpoint's training record, with those of what it began with."""
    sources = list(record.get("data", {}).get("sources", []))
    for earlier in record.get("earlier", []):
        sources += data_of(earlier)["sources"]
    return {"sources": sources}


def leave_out_trained(
    problems: Iterable[Problem], data_stamp: dict[str, Any]
) -> tuple[list[Problem], list[Problem]]:
    """(Kept, left out): the second were trained on, as the checkpoint's data stamp tells.

    By MBPP's task ids, which the sanitized and the + set share; and by content, whatever file it
    came from: a row whose question or answer reads like the task's (`text_hashes`).
    """
    sources = data_stamp.get("sources", [])
    ids = {f"Mbpp/{number}" for source in sources for number in source.get("task_ids", [])}
    hashes = {one for source in sources for one in source.get("text_hashes", "").split()}
    kept: list[Problem] = []
    trained: list[Problem] = []
    for problem in problems:
        known = problem.task_id in ids or any(text_hash(text) in hashes for text in problem.texts)
        (trained if known else kept).append(problem)
    return kept, trained


def _sha256(path: str) -> str:
    with Path(path).expanduser().open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# MBPP


def _is_in(split: str, task: dict[str, Any]) -> bool:
    return int(task["task_id"]) in MBPP_PUBLISHED[split]


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
        setup="",
        tests=tests,
        entry_points=entry_points,
        reference=code,
        texts=(text, instruction, code),
    )


def _shot_prompt(task: dict[str, Any]) -> str:
    tests = "\n".join(unix(check) for check in task["test_list"])
    return SHOT_PROMPT.format(text=_mbpp_text(task), tests=tests)


def _defined(source: str, used_in: str) -> tuple[str, ...]:
    """The functions and classes of a program that a text uses."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    with warnings.catch_warnings(action="ignore"):  # "\d" in MBPP's programs is theirs to mend
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
        setup=prompt,  # helpers that the tests use come from here, not from the program
        tests=f"{test}\n\ncheck({name})\n",
        entry_points=(name,),
        reference=prompt + answer,
        texts=(prompt, prompt + answer),  # a body alone may be anybody's
    )


_AS_PUBLISHED = "0-shot, the published prompt is continued as it stands"
_HUMANEVAL = ("task_id", "prompt", "canonical_solution", "entry_point")
_MBPP = ("task_id", "text", "code", "test_list", "test_setup_code")
_SANITIZED = ("task_id", "prompt", "code", "test_list", "test_imports")
_INPUTS = ("base_input", "plus_input", "atol")
SUITES: dict[str, Suite] = {
    "mbpp": Suite(
        MBPP,
        "full",
        tuple(MBPP_PUBLISHED),
        _MBPP,
        _MBPP,
        _mbpp,
        "0-shot, the instruction template with the text and the first test",
    ),
    "mbpp_sanitized": Suite(
        MBPP,
        "sanitized",
        tuple(MBPP_PUBLISHED),
        _SANITIZED,
        _SANITIZED,
        _mbpp,
        "0-shot, the instruction template with the prompt and the first test",
    ),
    "humaneval": Suite(
        "openai/openai_humaneval",
        None,
        ("test",),
        (*_HUMANEVAL, "test"),
        (*_HUMANEVAL, "test"),
        _humaneval,
        _AS_PUBLISHED,
    ),
    "humaneval+": Suite(
        "evalplus/humanevalplus",
        None,
        ("test",),
        (*_HUMANEVAL, "test"),
        (*_HUMANEVAL, *_INPUTS),
        humaneval_plus,
        _AS_PUBLISHED,
        seconds=30,
    ),
    "mbpp+": Suite(
        "evalplus/mbppplus",
        None,
        ("test",),
        ("task_id", "prompt", "code", "test_list", "test"),
        (*_HUMANEVAL, *_INPUTS),
        mbpp_plus,
        "0-shot, the published docstring (question and first test) is continued as it stands",
        seconds=30,
    ),
}

"""The published suites of programming tasks: read from their original files or the hub.

What the tests need besides the program stands in `setup`, which the program cannot touch.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

from dylora.config import nearest
from dylora.training.prompts import format_prompt, mbpp_instruction
from dylora.training.records import read_records
from dylora.training.sources import MBPP, MBPP_PUBLISHED, content_hash


class Problem(NamedTuple):
    """One task of a suite."""

    task_id: str  # as EvalPlus writes it: Mbpp/11, HumanEval/0
    prompt: str  # what the model is given, whole
    prefix: str  # stands before the model's text to make the program; "" where it writes it all
    stops: tuple[str, ...]  # the model's text ends before the first of these
    setup: str  # Python that the tests' process runs first
    tests: str  # Python; calls the entry points
    entry_points: tuple[str, ...]
    reference: str  # a program that passes
    content_hash: str  # SHA-256 of question, answer and tests


class Suite(NamedTuple):
    """Where a suite comes from and how its rows read."""

    hub: str
    hub_config: str | None
    hub_splits: tuple[str, ...]
    columns: tuple[str, ...]
    to_problem: Callable[[dict[str, Any]], Problem]
    prompt: str  # how tasks are put to the model, for the results


_STOPS = ("\ndef ", "\nclass ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n@", "\n```", "\n\n\n\n")
"""A continuation of a function ends where unindented text begins (Chen et al. 2021, and more)."""
_INSTRUCTION_STOPS = ("\nassert ", "\nif __name__", "\n```", "\n### ")


def read_suite(
    name: str, path: str | None = None, *, split: str = "test", revision: str | None = None
) -> list[Problem]:
    """The problems of a suite, in its order.

    Args:
        name: one of `SUITES`.
        path: a local file in the suite's original format; none: the hub.
        split: MBPP's published splits by task id: train (601–974), validation (511–600), test
            (11–510), prompt (1–10), or all. Others have test only.
        revision: of the hub's data set.

    Raises:
        ValueError: An unknown suite or split, a file that cannot be read, or a bad row: a suite
            with a task missing would give another score.
    """
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}{nearest(name, list(SUITES))}")
    is_mbpp = name.startswith("mbpp")
    splits = [*MBPP_PUBLISHED, "all"] if is_mbpp else ["test"]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}{nearest(split, splits)}")
    suite = SUITES[name]
    records = read_records(
        path or suite.hub,
        revision,
        columns=list(suite.columns),
        hub_config=suite.hub_config if path is None else None,
        hub_splits=suite.hub_splits,
    )
    problems = []
    for record in records:
        try:
            if record.problem:
                raise ValueError(record.problem)
            task = record.fields
            if is_mbpp and split != "all" and int(task["task_id"]) not in MBPP_PUBLISHED[split]:
                continue
            problems.append(suite.to_problem(task))
        except (KeyError, TypeError, AttributeError, ValueError, SyntaxError) as error:
            why = f"{type(error).__name__}: {error}" if not record.problem else record.problem
            raise ValueError(f"{record.place}: no task of {name} ({why})") from None
    seen = [problem.task_id for problem in problems]
    if not seen:
        raise ValueError(f"{path or suite.hub} has no task of {name}'s split {split}")
    if len(set(seen)) < len(seen):
        twice = next(task_id for task_id in seen if seen.count(task_id) > 1)
        raise ValueError(f"{path or suite.hub}: {twice} stands there twice")
    return problems


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

    By MBPP's task ids, which the sanitized and the + set share; by the rows' content hashes where
    the stamp has them (`row_sha256`).
    """
    sources = data_stamp.get("sources", [])
    ids = {f"Mbpp/{number}" for source in sources for number in source.get("task_ids", [])}
    hashes: Collection[str] = {one for source in sources for one in source.get("row_sha256", [])}
    kept: list[Problem] = []
    trained: list[Problem] = []
    for problem in problems:
        known = problem.task_id in ids or problem.content_hash in hashes
        (trained if known else kept).append(problem)
    return kept, trained


def program_of(problem: Problem, text: str) -> str:
    """The program that a model's text amounts to: the text up to a stop, behind its prefix.

    An instruction's answer may come in a fenced block, which is then taken alone.
    """
    if not problem.prefix:
        fenced = re.search(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", text, re.DOTALL)
        text = fenced[1] if fenced else text
    ends = [at for at in (text.find(stop) for stop in problem.stops) if at >= 0]
    return problem.prefix + text[: min(ends, default=len(text))]


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _defined(source: str, used_in: str) -> tuple[str, ...]:
    """The functions and classes of a program that a text uses."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    with warnings.catch_warnings(action="ignore"):  # "\d" in MBPP's programs is theirs to mend
        tree = ast.parse(source)
    names = [node.name for node in tree.body if isinstance(node, kinds)]
    used = set(re.findall(r"\w+", used_in))
    return tuple(dict.fromkeys(name for name in names if name in used))


def _mbpp(task: dict[str, Any]) -> Problem:
    text = task["text"] if "text" in task else task["prompt"]  # the sanitized set's name for it
    code, checks = _unix(task["code"]), [_unix(check) for check in task["test_list"]]
    before = _unix(task.get("test_setup_code") or "")
    imports = [_unix(line) for line in task.get("test_imports") or []]
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
        stops=_INSTRUCTION_STOPS,
        setup="",
        tests=tests,
        entry_points=entry_points,
        reference=code,
        content_hash=content_hash(instruction.strip(), "", code.rstrip()),  # as training's rows
    )


def _humaneval(task: dict[str, Any]) -> Problem:
    prompt, name = _unix(task["prompt"]), task["entry_point"]
    answer, test = _unix(task["canonical_solution"]), _unix(task["test"])
    return Problem(
        task_id=task["task_id"],
        prompt=prompt,
        prefix=prompt,
        stops=_STOPS,
        setup=prompt,  # helpers that the tests use come from here, not from the program
        tests=f"{test}\n\ncheck({name})\n",
        entry_points=(name,),
        reference=prompt + answer,
        content_hash=content_hash(prompt.strip(), "", answer.rstrip()),
    )


_COMPARE = """
import copy, math

def _close(given, expected, atol):
    if isinstance(expected, float) and type(given) in (int, float):
        return math.isclose(given, expected, rel_tol=1e-7, abs_tol=atol)
    if isinstance(expected, (list, tuple)) and type(given) is type(expected):
        return len(given) == len(expected) and all(
            _close(one, other, atol) for one, other in zip(given, expected)
        )
    return given == expected

def _check_all(candidate, reference, inputs, atol):
    for arguments in inputs:
        expected = reference(*copy.deepcopy(arguments))
        given = candidate(*copy.deepcopy(arguments))
        assert given == expected or _close(given, expected, atol or 1e-6)
"""


def _humaneval_plus(task: dict[str, Any]) -> Problem:
    """Inputs instead of tests: what is expected the reference computes, beside the tests."""
    base = _humaneval(task | {"test": ""})
    name, inputs = task["entry_point"], [*task["base_input"], *task["plus_input"]]
    atol = float(task["atol"])
    # find_zero has many right answers: its own definition decides (HumanEval/32).
    check = f"_check_all({name}, _reference, _inputs, {atol!r})"
    if name == "find_zero":
        check = f"for (xs,) in _inputs: assert abs(poly(xs, {name}(xs))) <= {atol or 1e-4!r}"
    return base._replace(
        setup=f"{base.reference}\n_reference = {name}\n{_COMPARE}",
        tests=f"import json\n_inputs = json.loads({json.dumps(inputs)!r})\n{check}\n",
        content_hash=base.content_hash,
    )


_HUMANEVAL_COLUMNS = ("task_id", "prompt", "canonical_solution", "entry_point")
SUITES: dict[str, Suite] = {
    "mbpp": Suite(
        MBPP,
        "full",
        tuple(MBPP_PUBLISHED),
        ("task_id", "text", "code", "test_list", "test_setup_code"),
        _mbpp,
        "0-shot, the instruction template with the text and the first test",
    ),
    "mbpp_sanitized": Suite(
        MBPP,
        "sanitized",
        tuple(MBPP_PUBLISHED),
        ("task_id", "prompt", "code", "test_list", "test_imports"),
        _mbpp,
        "0-shot, the instruction template with the prompt and the first test",
    ),
    "humaneval": Suite(
        "openai/openai_humaneval",
        None,
        ("test",),
        (*_HUMANEVAL_COLUMNS, "test"),
        _humaneval,
        "0-shot, the published prompt is continued as it stands",
    ),
    "humaneval+": Suite(
        "evalplus/humanevalplus",
        None,
        ("test",),
        (*_HUMANEVAL_COLUMNS, "base_input", "plus_input", "atol"),
        _humaneval_plus,
        "0-shot, the published prompt is continued as it stands",
    ),
}

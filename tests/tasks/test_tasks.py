"""The embedded skills: what generates them, and the checker that runs the answers."""

import hashlib
import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from dylora import tasks as suite
from dylora.sandbox import host
from dylora.sandbox.host import Limits, Sandbox
from dylora.tasks import SKILLS, Split, Task, check_answers, checking, generate_tasks
from dylora.tasks.task import POOLS, Draft, is_held_out

ROOT = Path(__file__).parents[2]
SPLITS: tuple[Split, ...] = get_args(Split)
COUNTS: dict[Split, int] = {"train": 2000, "validation": 1000, "test": 1000}
STRUCTURAL = {"0", "1", ""}
"""Constants that are code, not literals: the defaults 0 and "" among them."""
SWAPS = (
    (" > ", " >= "),
    (" >= ", " > "),
    (" < ", " <= "),
    (" <= ", " < "),
    (" == ", " != "),
    (" != ", " == "),
    (" = ", " != "),
    (" + ", " - "),
    (" - ", " + "),
    (" * ", " + "),
    (" % ", " // "),
    (" and ", " or "),
    (" not in ", " in "),
    (" desc", ""),
    ("between", "not between"),
    ("sum(", "max("),
    ("max(", "min("),
    ("min(", "max("),
    ("sorted(", "list("),
    ("[::-1]", ""),
    (".upper()", ""),
    ("startswith", "endswith"),
    ("endswith", "startswith"),
    (r"\d", "."),
    ("[a-z]", "[A-Z]"),
    ("?", ""),
    ("+", "*"),
    ("*", "+"),
)


@pytest.fixture(scope="module")
def generated() -> dict[tuple[str, Split], list[Task]]:
    """As many tasks as the tests below run."""
    return {
        (skill, split): generate_tasks(skill, split, 140) for skill in SKILLS for split in SPLITS
    }


@pytest.fixture(scope="module")
def drafted() -> dict[tuple[str, Split], list[Draft]]:
    """Drafts that `generate_tasks` may keep, thousands of them: cheap without their checks."""
    drafts: dict[tuple[str, Split], list[Draft]] = {}
    for (skill, draft), split in itertools.product(suite._DRAFTS.items(), SPLITS):
        rng = random.Random(f"{skill} {split}")
        drawn = [draft(rng, split) for _ in range(7 * COUNTS[split] // 2)]
        kept = [one for one in drawn if split == "test" or not is_held_out(one.operations)]
        drafts[skill, split] = kept
    return drafts


def near_misses(answer: str) -> list[str]:
    """The answer with each integer off by one, and with each operation swapped for another."""
    wrong = [
        answer[: found.start()] + str(int(found.group()) + step) + answer[found.end() :]
        for found in re.finditer(r"\b\d+\b", answer)
        for step in (-1, 1)
    ]
    return wrong + [answer.replace(old, new, 1) for old, new in SWAPS if old in answer]


def literals(text: str) -> set[str]:
    """The numbers and the quoted strings of a text."""
    quoted = {first or second for first, second in re.findall(r"\"(.*?)\"|'(.*?)%?'", text)}
    return quoted | set(re.findall(r"\d+", text))


def a_task(kind: str, inputs: list[Any], expected: list[Any], **extra: Any) -> Task:
    check = {"kind": kind, "inputs": inputs, "expected": expected, **extra}
    return Task(skill="", instruction="", answer="", check=check)


def verdicts(task: Task, answers: Sequence[str], seconds: int = 2) -> list[bool]:
    limits = Limits(seconds=seconds, wall_seconds=seconds + 1)
    return check_answers([task] * len(answers), answers, limits=limits)[0]


DOUBLE = a_task("function", [1, 5], [2, 10], function="f")
RIGHT = "def f(x):\n    return x * 2"
TABLE = {"table": "t", "columns": ["a integer"], "rows": [[2], [1], [3]]}


# What is generated


@pytest.mark.parametrize("skill", SKILLS)
def test_every_reference_answer_passes(
    generated: dict[tuple[str, Split], list[Task]], skill: str
) -> None:
    tasks = [task for split in SPLITS for task in generated[skill, split][:100]]
    passed, _ = check_answers(tasks, [f"\n{task.answer}\n\n" for task in tasks])
    assert [task.answer for task, ok in zip(tasks, passed, strict=True) if not ok] == []


@pytest.mark.parametrize("skill", SKILLS)
def test_near_misses_fail(generated: dict[tuple[str, Split], list[Task]], skill: str) -> None:
    # Survivors mean the same (v > 12 and v % 5 == 0 has v > 13 beside it; n // 50 and n // 51
    # of small n; [aeiou]{3,10}[aeiou]+) or are worth the same (two sums modulo a small number).
    tasks = generated[skill, "test"][100:140]
    jobs = [(task, wrong) for task in tasks for wrong in near_misses(task.answer)]
    passed, _ = check_answers([task for task, _ in jobs], [wrong for _, wrong in jobs])
    survivors = [wrong for (_, wrong), ok in zip(jobs, passed, strict=True) if ok]
    assert len(jobs) > 60
    assert len(survivors) < 0.05 * len(jobs), survivors


@pytest.mark.parametrize("skill", SKILLS)
def test_the_answer_to_another_task_fails(
    generated: dict[tuple[str, Split], list[Task]], skill: str
) -> None:
    tasks = generated[skill, "test"][:60]
    others = [task.answer for task in tasks[1:] + tasks[:1]]
    # Two word problems may have the same small value.
    assert sum(check_answers(tasks, others)[0]) <= (1 if skill == "arithmetic" else 0)


def test_tasks_are_distinct(generated: dict[tuple[str, Split], list[Task]]) -> None:
    for tasks in generated.values():
        assert len({task.instruction for task in tasks}) == len(tasks)


def test_there_are_thousands_of_distinct_programs(
    drafted: dict[tuple[str, Split], list[Draft]],
) -> None:
    for (skill, split), drafts in drafted.items():
        assert len({draft.program for draft in drafts}) > COUNTS[split], (skill, split)


def test_instructions_and_answers_are_short(
    drafted: dict[tuple[str, Split], list[Draft]],
) -> None:
    for drafts in drafted.values():
        assert max(len(draft.instruction.split()) for draft in drafts) <= 45
        assert max(draft.answer.count("\n") for draft in drafts) <= 1


def test_checks_survive_json(generated: dict[tuple[str, Split], list[Task]]) -> None:
    for tasks in generated.values():
        assert all(json.loads(json.dumps(task.check)) == task.check for task in tasks[:50])


def test_pools_of_the_splits_are_disjoint() -> None:
    union = {split: {x for pool in POOLS.values() for x in pool[split]} for split in SPLITS}
    for first, second in itertools.combinations(SPLITS, 2):
        assert union[first] & union[second] == set()


@pytest.mark.parametrize("skill", SKILLS)
def test_splits_share_no_instruction_and_no_literal(
    drafted: dict[tuple[str, Split], list[Draft]], skill: str
) -> None:
    words = {x for pool in ("name", "item") for split in SPLITS for x in POOLS[pool][split]}
    used: dict[str, set[str]] = {}
    for split in SPLITS:
        used[split] = set()
        for task in drafted[skill, split]:
            asked = literals(task.instruction)
            if skill == "arithmetic":
                asked |= words & set(re.findall(r"\w+", task.instruction))
            assert asked - STRUCTURAL, task
            if skill != "regex":  # whose literals stand unquoted
                assert literals(task.answer) <= asked | STRUCTURAL, task
            used[split] |= asked - STRUCTURAL
    for first, second in itertools.combinations(SPLITS, 2):
        assert used[first] & used[second] == set()


@pytest.mark.parametrize("skill", SKILLS)
def test_each_operation_is_trained_though_pairs_are_held_out(
    drafted: dict[tuple[str, Split], list[Draft]], skill: str
) -> None:
    shown = {
        split: {kind for draft in drafted[skill, split] for kind in draft.operations}
        for split in SPLITS
    }
    assert shown["train"] == shown["validation"] == shown["test"]


@pytest.mark.parametrize("skill", SKILLS)
def test_some_pairs_of_operations_appear_in_test_only(
    monkeypatch: pytest.MonkeyPatch, skill: str
) -> None:
    operations: dict[str, tuple[str, ...]] = {}
    make = suite._DRAFTS[skill]

    def record(rng: random.Random, split: Split) -> Draft:
        draft = make(rng, split)
        operations[draft.instruction] = draft.operations
        return draft

    monkeypatch.setitem(suite._DRAFTS, skill, record)
    shown = {
        split: [operations[task.instruction] for task in generate_tasks(skill, split, 100)]
        for split in SPLITS
    }
    assert not any(map(is_held_out, shown["train"] + shown["validation"]))
    assert 0.1 < sum(map(is_held_out, shown["test"])) / 100 < 0.7


def test_generation_does_not_depend_on_the_process() -> None:
    code = (
        "import hashlib; from dylora.tasks import *;"
        "tasks = [generate_tasks(k, s, 20, seed=3) for k in SKILLS for s in ('train', 'test')];"
        "print(hashlib.sha256(repr(tasks).encode()).hexdigest())"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONHASHSEED": "1"},  # this process has another, drawn at its start
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    tasks = [generate_tasks(k, s, 20, seed=3) for k in SKILLS for s in ("train", "test")]
    assert printed == hashlib.sha256(repr(tasks).encode()).hexdigest()


def test_fewer_tasks_are_a_prefix_and_seeds_differ() -> None:
    tasks = generate_tasks("json", "test", 30)
    assert generate_tasks("json", "test", 10) == tasks[:10]
    assert generate_tasks("json", "test", 30, seed=1) != tasks


def test_an_unknown_skill_or_split_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'string'.*strings"):
        generate_tasks("string", "train", 1)
    with pytest.raises(ValueError, match=r"'valid'.*validation"):
        generate_tasks("lists", "valid", 1)  # type: ignore[arg-type]


def test_asking_for_more_than_there_is_says_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def three(rng: random.Random, split: Split) -> Draft:
        n = rng.choice((3, 4, 5))
        check = {"kind": "arithmetic", "inputs": [None]}
        return Draft(("n",), str(n), f"Give {n}.", str(n), [], lambda: dict(check))

    monkeypatch.setitem(suite._DRAFTS, "arithmetic", three)
    assert len(generate_tasks("arithmetic", "test", 3)) == 3
    with pytest.raises(ValueError, match="about 3 tasks for test, not the 4"):
        generate_tasks("arithmetic", "test", 4)


# How answers are checked


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "__import__('time').sleep(60)",
        "x = [0]\n    while True: x += x",
        "__import__('sys').exit(0)",
        "__import__('os')._exit(0)",
        "print([2, 10])",
        "raise ValueError",
        "return f(x)",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "class A(int):\n        __eq__ = lambda self, other: True\n    return A()",
        "class A:\n        __eq__ = lambda self, other: True\n    return A()",
        "return 'x' * 10**8",
        "return 10**5000",
        "return None",
    ],
)
def test_a_bad_answer_fails_alone(body: str) -> None:
    bad = f"def f(x):\n    {body}"
    assert verdicts(DOUBLE, [RIGHT, RIGHT, bad, RIGHT, RIGHT], 1) == [
        True,
        True,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("bad", ["", "def f(x)", "g = 1", "\0", "(" * 500, "f = 3", "\ud800"])
def test_a_text_that_defines_no_function_fails(bad: str) -> None:
    assert verdicts(DOUBLE, [bad, RIGHT, RIGHT]) == [False, True, True]


def test_answers_start_in_an_empty_place_of_their_own() -> None:
    probe = """
def f(x):
    import os, sys
    names = [name for name in os.environ if name != "LC_CTYPE"]  # which Python sets by itself
    return [sorted(names), os.listdir("."), sys.stdin.read(), "dylora" in sys.modules]
"""
    task = a_task("function", [0], [[["HOME", "TMPDIR"], [], "", False]], function="f")
    leave = "def f(x):\n    open('left', 'w')"
    assert verdicts(task, [leave, leave, probe, probe]) == [False, False, True, True]


def test_the_process_that_runs_answers_is_not_told_what_is_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    jobs: list[dict[str, Any]] = []
    call = Sandbox.call

    def spy(self: Sandbox, source: str, calls: Sequence[tuple[str, Sequence[Any]]]) -> Any:
        jobs.extend(job for _, args in calls for job in args)
        return call(self, source, calls)

    monkeypatch.setattr(Sandbox, "call", spy)
    tasks = [generate_tasks(skill, "test", 1)[0] for skill in SKILLS]
    assert all(check_answers(tasks, [task.answer for task in tasks])[0])
    assert len(jobs) == len(SKILLS)
    assert not any("expected" in job for job in jobs)


def test_where_no_sandbox_works_answers_run_with_limits_alone_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = Sandbox._start

    def refuse(self: Sandbox, backend: str) -> str:
        if backend != "unsafe":
            raise host._Refused("not on this machine")
        return start(self, backend)

    answers = [RIGHT, "def f(x):\n    return x", "def f(x):\n    while True: pass", RIGHT]
    limits = Limits(seconds=1, wall_seconds=2)
    protected, backend = check_answers([DOUBLE] * 4, answers, limits=limits)
    assert "seccomp" in backend
    monkeypatch.setattr(Sandbox, "_start", refuse)
    unprotected, backend = check_answers([DOUBLE] * 4, answers, limits=limits)
    assert backend.startswith("resource limits only (programs cannot be run safely here: landlock")
    assert protected == unprotected == [True, False, False, True]


@pytest.mark.parametrize(
    ("expected", "returned"),
    [(1, "True"), (True, "1"), (1, "1.0"), (1.0, "1"), ([1], "(1,)"), ("a", "b'a'"), ([], "{}")],
)
def test_types_count(expected: Any, returned: str) -> None:
    task = a_task("expression", [0], [expected], variable="x")
    assert verdicts(task, [repr(expected), returned]) == [True, False]


def test_floats_may_differ_by_rounding() -> None:
    assert verdicts(a_task("expression", [0], [0.3], variable="x"), ["0.1 + 0.2"]) == [True]


def test_only_one_reading_statement_is_a_query() -> None:
    task = a_task("sql", [TABLE], [[[1], [2]]], compare="unordered")
    good = ["select a from t where a < 3", "SELECT a FROM t WHERE a <= 2;"]
    bad = [
        "select a from t where a < 3; select 1",
        "delete from t where a = 3 returning a",
        "update t set a = 1",
        "pragma table_info(t)",
        "attach database ':memory:' as other",
        "create table u (a)",
        "rollback",
        "with recursive n(i) as (select 1 union all select i + 1 from n) select i from n",
        "",
    ]
    assert verdicts(task, good + bad, 1) == [True] * len(good) + [False] * len(bad)


def test_the_order_of_rows_counts_when_asked_for() -> None:
    queries = ["select a from t order by a", "select a from t order by a desc"]
    rows = [[[1], [2], [3]]]
    assert verdicts(a_task("sql", [TABLE], rows, compare="exact"), queries) == [True, False]
    assert verdicts(a_task("sql", [TABLE], rows, compare="unordered"), queries) == [True, True]
    doubled = "select a from t union all select 3"
    assert verdicts(a_task("sql", [TABLE], rows, compare="unordered"), [doubled]) == [False]


def test_a_pattern_matches_in_full_and_in_time() -> None:
    task = a_task("regex", ["aaa", "aab", "a" * 40 + "b"], [True, False, False])
    assert verdicts(task, ["a+", "a", "(a+)+", "["], 1) == [True, False, False, False]


def test_arithmetic_is_numbers_and_operators_only() -> None:
    task = a_task("arithmetic", [None], [8])
    good = ["2 * 4", "16 / 2", "2**3", "-(1 - 9)", "17 // 2", "8"]
    bad = ["int('8')", "[8][0]", "x", "9", "True * 8", "2 *", "9 ** 9 ** 9", "8 if 1 else 0"]
    assert verdicts(task, good + bad) == [True] * len(good) + [False] * len(bad)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="1 answers for 2 tasks"):
        check_answers([DOUBLE, DOUBLE], [RIGHT])
    with pytest.raises(ValueError, match="workers"):
        check_answers([DOUBLE], [RIGHT], workers=0)


def test_values_that_cannot_be_compared_are_wrong() -> None:
    rows = {"kind": "sql", "compare": "unordered", "inputs": [TABLE], "expected": [[[1]]]}
    assert not checking.is_right(rows, [[{1}]])
    task = a_task("arithmetic", [None], [5])
    assert verdicts(task, ["5", "99**64 * 99**64 * 99**64"]) == [True, False]

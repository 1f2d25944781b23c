"""Answers of the embedded skills, run in the sandbox."""

import pytest

from dylora.sandbox.host import Sandbox
from dylora.tasks import SKILLS, generate_tasks
from dylora.tasks.checking import ANSWER_LIMITS, check_answer

DOUBLE = {"kind": "function", "function": "f", "inputs": [1, 5], "expected": [2, 10]}
RIGHT = "def f(x):\n    return x * 2"


@pytest.fixture(scope="module")
def sandbox():
    with Sandbox(ANSWER_LIMITS) as box:
        yield box


@pytest.mark.parametrize("skill", SKILLS)
def test_references_pass_in_the_sandbox_and_those_of_another_task_do_not(sandbox, skill):
    tasks = generate_tasks(skill, "test", 6)
    for task, other in zip(tasks, tasks[1:] + tasks[:1], strict=True):
        assert check_answer(sandbox, task.check, f"\n{task.answer}\n").outcome == "passed"
        assert check_answer(sandbox, task.check, other.answer).outcome in ("failed", "error")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (RIGHT, "passed"),
        ("def f(x):\n    return x", "failed"),
        ("def f(x):\n    return float(x * 2)", "failed"),
        ("def f(x):\n    return (x * 2,)", "error"),
        ("def g(x):\n    return x * 2", "error"),
        ("def f(x):\n    while True: pass", "timeout"),
        ("def f(x):\n    open('/etc/passwd').read()\n    return x * 2", "not supported"),
        ("import os\nos.kill(os.getppid(), 9)", "violation"),
        # Without `_plain` a set would come out, which is no value of JSON's.
        ("import __main__, sys\nsys._getframe(2).f_globals['_plain'] = lambda v: {v}\n"
         "def f(x): return x * 2", "failed"),
    ],
)  # fmt: skip
def test_an_answer_is_judged_by_what_it_returns(sandbox, answer, outcome):
    assert check_answer(sandbox, DOUBLE, answer).outcome == outcome

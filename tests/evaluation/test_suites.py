"""The published suites: their splits, their formats, and that the sandbox tells right from wrong.

MBPP comes as it was published; HumanEval's rows are made up here in its format.
"""

import ast
import contextlib
import io
import json
import multiprocessing
from pathlib import Path

import pytest

from dylora.evaluation.sandbox import Limits, Sandbox, run_all
from dylora.evaluation.suites import Problem, data_of, leave_out_trained, program_of, read_suite

REAL = Path(__file__).parents[2].parent / "shared" / "data"
MBPP_FILE = str(REAL / "mbpp.jsonl")
HUMAN = {
    "task_id": "HumanEval/0",
    "prompt": 'def helper(x):\n    return x + 1\n\n\ndef f(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert helper(candidate(2)) == 5\n",
    "entry_point": "f",
}
PLUS = {key: HUMAN[key] for key in HUMAN if key != "test"} | {
    "base_input": [[2]],
    "plus_input": [[0.1], [-3]],
    "atol": 0,
    "contract": "",
}


@pytest.fixture(scope="module")
def mbpp() -> list[Problem]:
    return read_suite("mbpp", MBPP_FILE, split="all")


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def outcome(problem: Problem, program: str, limits: Limits | None = None) -> str:
    with Sandbox(limits) as box:
        return judge(box, (problem, program))


def judge(box: Sandbox, job: tuple[Problem, str]) -> str:
    problem, program = job
    found = box.run_tests(
        program, problem.tests, setup=problem.setup, entry_points=problem.entry_points
    )
    return found.outcome


# Reading


@pytest.mark.parametrize(
    ("split", "first", "count"),
    [("train", 601, 374), ("validation", 511, 90), ("test", 11, 500), ("prompt", 1, 10)],
)
def test_mbpp_has_its_published_splits(split: str, first: int, count: int):
    problems = read_suite("mbpp", MBPP_FILE, split=split)
    assert (problems[0].task_id, len(problems)) == (f"Mbpp/{first}", count)


def test_mbpps_prompt_shows_the_first_test_and_no_other(mbpp: list[Problem]):
    tests = mbpp[1].tests.strip().splitlines()
    assert tests[0] in mbpp[1].prompt
    assert tests[1] not in mbpp[1].prompt


def test_the_sanitized_set_imports_what_its_tests_need(tmp_path: Path):
    row = {
        "source_file": "x",
        "task_id": 11,
        "prompt": "Write f.",
        "code": "def f(x):\n    return x * 0.1",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(f(3), 0.3)"],
    }
    path = tmp_path / "sanitized-mbpp.json"
    path.write_text(json.dumps([row]))
    (problem,) = read_suite("mbpp_sanitized", str(path))
    assert outcome(problem, problem.reference) == "passed"


@pytest.mark.parametrize(("suite", "row"), [("humaneval", HUMAN), ("humaneval+", PLUS)])
def test_humaneval_in_both_forms_tells_right_from_wrong(suite: str, row: dict, tmp_path: Path):
    (problem,) = read_suite(suite, write(tmp_path / "he.jsonl", row))
    assert problem.task_id == "HumanEval/0"
    assert outcome(problem, problem.reference) == "passed"
    wrong = "    return x * x\n"  # right for 2, the only input of the published tests
    assert outcome(problem, program_of(problem, wrong)) == ("failed" if "+" in suite else "passed")
    assert outcome(problem, program_of(problem, "    return 3 * x\n")) == "failed"


def test_a_helper_of_the_prompt_cannot_be_replaced_by_the_program(tmp_path: Path):
    (problem,) = read_suite("humaneval", write(tmp_path / "he.jsonl", HUMAN))
    cheat = problem.prefix + "    return 0\ndef helper(x): return 5\ndef check(f): pass\n"
    assert outcome(problem, cheat) == "failed"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("def f(): pass\n### Instruction:\nmore", "def f(): pass"),
        ("Here:\n```python\ndef f(): pass\n```\nThat is it.", "def f(): pass"),
        ("def f(): pass\nassert f()", "def f(): pass"),
        ("```\ndef f(): pass", "def f(): pass"),
    ],
)
def test_an_answers_program_ends_where_it_should(mbpp: list[Problem], text: str, program: str):
    assert program_of(mbpp[0], text) == program


@pytest.mark.parametrize(
    ("suite", "row", "message"),
    [
        ("humaneval", {**HUMAN, "prompt": None}, r"he.jsonl:1: no task of humaneval"),
        ("humanevl", HUMAN, r"unknown suite 'humanevl'.*humaneval"),
    ],
)
def test_a_bad_row_or_name_is_one_line_that_says_so(suite, row, message, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        read_suite(suite, write(tmp_path / "he.jsonl", row))


def test_a_task_that_stands_twice_and_an_unknown_split_are_refused(tmp_path: Path):
    path = write(tmp_path / "he.jsonl", HUMAN, HUMAN)
    with pytest.raises(ValueError, match="HumanEval/0 stands there twice"):
        read_suite("humaneval", path)
    with pytest.raises(ValueError, match="humaneval has no split 'train'"):
        read_suite("humaneval", path, split="train")


def test_trained_tasks_are_left_out_by_id_and_by_content(mbpp: list[Problem]):
    stamp = {"sources": [{"task_ids": [2, 5]}, {"row_sha256": [mbpp[6].content_hash]}, {}]}
    kept, trained = leave_out_trained(mbpp, stamp)
    assert [problem.task_id for problem in trained] == ["Mbpp/2", "Mbpp/5", "Mbpp/7"]
    assert len(kept) == 971
    assert leave_out_trained(mbpp, {}) == (mbpp, [])


def test_tasks_of_what_a_checkpoint_began_with_are_trained_ones(mbpp: list[Problem]):
    first = {"data": {"sources": [{"name": "mbpp", "task_ids": [11]}]}}
    second = {"data": {"sources": [{"name": "mine"}]}, "earlier": [first]}
    third = {"data": {"sources": [{"name": "mbpp", "task_ids": [12]}]}, "earlier": [second]}
    _, trained = leave_out_trained(mbpp, data_of(third))
    assert sorted(problem.task_id for problem in trained) == ["Mbpp/11", "Mbpp/12"]


# Controls

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # MBPP's programs


def mutant(problem: Problem) -> str:
    """The program with one thing changed in the function that the tests call.

    The first that applies, from the end of the function: a comparison or an operation turned, a
    number one higher, and otherwise its last returned value in a list of its own.
    """
    tree = ast.parse(problem.reference)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    function = [node for node in functions if node.name in problem.entry_points][-1]
    returns = [node for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
    turned = {ast.Add: ast.Sub(), ast.Sub: ast.Add(), ast.Mult: ast.Add(), ast.Mod: ast.Mult()}
    flipped = {ast.Eq: ast.NotEq(), ast.NotEq: ast.Eq(), ast.Lt: ast.Gt(), ast.Gt: ast.Lt()}
    for node in [*reversed([*ast.walk(function)])]:
        if isinstance(node, ast.Compare) and type(node.ops[0]) in flipped:
            node.ops[0] = flipped[type(node.ops[0])]
            return ast.unparse(tree)
        if isinstance(node, ast.BinOp) and type(node.op) in turned:
            node.op = turned[type(node.op)]
            return ast.unparse(tree)
    if returns:
        returns[-1].value = ast.List([returns[-1].value], ast.Load())
    else:
        function.body = [ast.parse("raise ValueError").body[0]]
    return ast.unparse(tree)


def plain(problem: Problem, program: str) -> bool:
    """The other way to the verdict: program and tests in one process, without any protection."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_plain, args=(program, problem.tests))
    process.start()
    process.join(10)
    process.kill()
    process.join()
    return process.exitcode == 0


def _plain(program: str, tests: str) -> None:
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(program, names)
        exec(tests, names)


def test_every_twentieth_reference_of_mbpp_passes_and_its_mutant_is_judged_as_in_plain_python(
    mbpp: list[Problem],
):
    sample = mbpp[3::20]
    references = [(problem, problem.reference) for problem in sample]
    assert set(run_all(references, judge)) == {"passed"}
    mutants = [(problem, mutant(problem)) for problem in sample]
    passed = [
        job
        for job, found in zip(mutants, run_all(mutants, judge), strict=True)
        if found == "passed"
    ]
    assert len(passed) < len(sample) / 8
    assert all(plain(*job) for job in passed)


@pytest.mark.slow
def test_all_974_references_of_mbpp_pass(mbpp: list[Problem]):
    jobs = [(problem, problem.reference) for problem in mbpp]
    found = list(run_all(jobs, judge, workers=1, limits=Limits(seconds=30, wall_seconds=90)))
    failed = [job[0].task_id for job, one in zip(jobs, found, strict=True) if one != "passed"]
    assert (len(found), failed) == (974, [])


@pytest.mark.slow
def test_of_974_mutants_of_mbpp_only_those_that_are_right_pass(mbpp: list[Problem]):
    jobs = [(problem, mutant(problem)) for problem in mbpp]
    limits = Limits(seconds=1, wall_seconds=3)
    found = list(run_all(jobs, judge, workers=1, limits=limits))
    passed = [job for job, one in zip(jobs, found, strict=True) if one == "passed"]
    counts = {one: found.count(one) for one in sorted(set(found))}
    print(counts, *(problem.task_id for problem, _ in passed))
    assert all(plain(*job) for job in passed)
    assert len(passed) < 60

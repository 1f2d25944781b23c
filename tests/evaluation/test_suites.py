"""The published suites: their splits, their formats, and that the sandbox tells right from wrong.

MBPP comes as it was published; HumanEval's rows are made up here in its format.
"""

import ast
import contextlib
import gzip
import hashlib
import io
import json
import multiprocessing
from pathlib import Path

import pytest
from datasets import Dataset

from dylora.data import unpacked
from dylora.data.splits import text_hash
from dylora.evaluation.passk.evalplus import typed_input
from dylora.evaluation.passk.problem import Problem, ProgramTests, answer_of
from dylora.evaluation.passk.scoring import split_trained
from dylora.evaluation.passk.suites import read_suite
from dylora.sandbox.host import Limits, Sandbox, run_all
from published import FOLDER, MBPP, needs_published_rows

PUBLISHED = {  # file, tasks (MBPP+: of its releases 0.2 and 0.1)
    "humaneval": ("HumanEval.jsonl.gz", (164,)),
    "humaneval+": ("HumanEvalPlus.jsonl.gz", (164,)),
    "mbpp": ("mbpp.jsonl", (974,)),
    "mbpp_sanitized": ("sanitized-mbpp.json", (427,)),
    "mbpp+": ("MbppPlus.jsonl.gz", (378, 399)),
}

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
    return read_suite("mbpp", MBPP, split="all").problems


def write(path: Path, *rows: object) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def outcome(problem: Problem, program: str, limits: Limits | None = None) -> str:
    with Sandbox(limits) as box:
        return judge(box, (problem, program))


def judge(box: Sandbox, job: tuple[Problem, str]) -> str:
    problem, program = job
    return problem.checker.check(program, box).outcome


def program_tests(problem: Problem) -> ProgramTests:
    assert isinstance(problem.checker, ProgramTests)
    return problem.checker


# Reading


@pytest.mark.parametrize(
    ("split", "first", "count"),
    [("train", 601, 374), ("validation", 511, 90), ("test", 11, 500), ("prompt", 1, 10)],
)
@needs_published_rows
def test_mbpp_has_its_published_splits(split: str, first: int, count: int):
    problems = read_suite("mbpp", MBPP, split=split).problems
    assert (problems[0].task_id, len(problems)) == (f"Mbpp/{first}", count)


@needs_published_rows
def test_mbpps_prompt_shows_the_first_test_and_no_other(mbpp: list[Problem]):
    tests = program_tests(mbpp[1]).tests.strip().splitlines()
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
    (problem,) = read_suite("mbpp_sanitized", str(path)).problems
    assert outcome(problem, problem.reference) == "passed"


@pytest.mark.parametrize(("suite", "row"), [("humaneval", HUMAN), ("humaneval+", PLUS)])
def test_humaneval_in_both_forms_tells_right_from_wrong(suite: str, row: dict, tmp_path: Path):
    (problem,) = read_suite(suite, write(tmp_path / "he.jsonl", row)).problems
    assert problem.task_id == "HumanEval/0"
    assert outcome(problem, problem.reference) == "passed"
    wrong = "    return x * x\n"  # right for 2, the only input of the published tests
    assert outcome(problem, answer_of(problem, wrong)) == ("failed" if "+" in suite else "passed")
    assert outcome(problem, answer_of(problem, "    return 3 * x\n")) == "failed"


def test_a_helper_of_the_prompt_cannot_be_replaced_by_the_program(tmp_path: Path):
    (problem,) = read_suite("humaneval", write(tmp_path / "he.jsonl", HUMAN)).problems
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
@needs_published_rows
def test_an_answers_program_ends_where_it_should(mbpp: list[Problem], text: str, program: str):
    assert answer_of(mbpp[0], text) == program


@pytest.mark.parametrize(
    ("suite", "row", "message"),
    [
        ("humaneval", {**HUMAN, "prompt": None}, r"he.jsonl:1: not a task of humaneval"),
        ("humanevl", HUMAN, r"unknown suite 'humanevl'.*humaneval"),
    ],
)
def test_a_bad_row_or_name_is_one_line_that_says_so(suite, row, message, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        read_suite(suite, write(tmp_path / "he.jsonl", row))


def test_a_task_that_appears_twice_and_an_unknown_split_are_refused(tmp_path: Path):
    path = write(tmp_path / "he.jsonl", HUMAN, HUMAN)
    with pytest.raises(ValueError, match="HumanEval/0 appears twice"):
        read_suite("humaneval", path)
    with pytest.raises(ValueError, match="humaneval has no split 'train'"):
        read_suite("humaneval", path, split="train")


@needs_published_rows
def test_trained_tasks_are_left_out_by_id_and_by_what_question_or_answer_reads_like(
    mbpp: list[Problem],
):
    question, answer = mbpp[6].texts[0], mbpp[8].reference
    hashes = " ".join([text_hash(f"  {question}\n"), text_hash(answer.replace("    ", "\t"))])
    record = {"data": {"sources": [{"task_ids": [2, 5]}, {"text_hashes": hashes}, {}]}}
    kept, trained = split_trained(mbpp, record)
    assert [problem.task_id for problem in trained] == ["Mbpp/2", "Mbpp/5", "Mbpp/7", "Mbpp/9"]
    assert len(kept) == 970
    assert split_trained(mbpp, {}) == (mbpp, [])


@needs_published_rows
def test_tasks_of_what_a_checkpoint_began_with_are_trained_ones(mbpp: list[Problem]):
    first = {"data": {"sources": [{"name": "mbpp", "task_ids": [11]}]}}
    second = {"data": {"sources": [{"name": "mine"}]}, "earlier": [first]}
    third = {"data": {"sources": [{"name": "mbpp", "task_ids": [12]}]}, "earlier": [second]}
    _, trained = split_trained(mbpp, third)
    assert sorted(problem.task_id for problem in trained) == ["Mbpp/11", "Mbpp/12"]


# Few shots


@needs_published_rows
def test_three_shots_are_the_published_ones_in_the_published_form():
    tasks = read_suite("mbpp", MBPP, shots=3, limit=1)
    prompt = tasks.problems[0].prompt
    parts = prompt.split("You are an expert Python programmer, and here is your task: ")
    assert [part.split(" Your code")[0][:45] for part in parts[1:]] == [
        "Write a function to find the similar elements",  # 2
        "Write a python function to identify non-prime",  # 3
        "Write a function to find the largest integers",  # 4
        "Write a python function to remove first and l",  # 11
    ]
    assert prompt.count("[DONE]") == 3
    assert prompt.count("assert ") == 12  # all tests are shown
    assert prompt.endswith('== "H"\n[BEGIN]\n')
    assert tasks.problems[0].stops == ("[DONE]",)
    assert "\r" not in prompt


@needs_published_rows
def test_an_answer_after_three_shots_is_judged_up_to_its_end(mbpp: list[Problem]):
    (problem,) = read_suite("mbpp", MBPP, shots=3, limit=1).problems
    assert outcome(problem, answer_of(problem, f"{problem.reference}\n[DONE]\n)(")) == "passed"


@pytest.mark.parametrize(("suite", "shots"), [("humaneval", 3), ("mbpp", 2)])
def test_shots_that_nobody_published_are_refused(suite: str, shots: int):
    with pytest.raises(ValueError, match=f"{suite} has no prompt of {shots} shots"):
        read_suite(suite, MBPP, shots=shots)


# MBPP+ and HumanEval+


def plus_row(number: int, name: str, solution: str, base: list, plus: list, atol=0) -> dict:
    return {
        "task_id": f"Mbpp/{number}",
        "prompt": f'"""\nDo it.\nassert {name}(1) == 1\n"""\n',
        "entry_point": name,
        "canonical_solution": f"\n{solution}",
        "base_input": base,
        "plus_input": plus,
        "atol": atol,
        "contract": "",
    }


SHARED = plus_row(
    2,
    "similar_elements",
    "def similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    [[[3, 4, 5, 6], [5, 7, 4, 10]]],
    [[[1, 2], []]],
)
MEAN = plus_row(
    900, "mean", "def mean(v):\n    return sum(v) / len(v)\n", [[[1, 2]]], [[[0.1, 0.2, 0.4]]]
)
FACTORIAL = plus_row(
    901, "f", "def f(n):\n    return n * f(n - 1) if n else 1\n", [[3]], [[0], [5], [6]]
)
SLANT = plus_row(
    581,
    "surface_Area",
    "def surface_Area(b, s):\n    return 2 * b * s + b * b\n",
    [[3, 4]],
    [[4, 5]],
)
DIGITS = plus_row(
    558,
    "digit_distance_nums",
    "def digit_distance_nums(a, b):\n    return sum(map(int, str(abs(a - b))))\n",
    [[1, 2]],
    [[19, 21]],
)
SEARCH = plus_row(
    434,
    "text_match_three",
    "import re\ndef text_match_three(t):\n    return re.search('ab{3}', t)\n",
    [["abbb"]],
    [["ab"]],
)


@pytest.mark.parametrize(
    ("row", "program", "expected"),
    [
        (SHARED, "def similar_elements(a, b):\n    return sorted(set(b) & set(a))", "passed"),
        (SHARED, "def similar_elements(a, b):\n    return set(a + ()) & set(b + ())", "passed"),
        (SHARED, "def similar_elements(a, b):\n    return a", "failed"),
        (SHARED, "def similar_elements(a, b):\n    return filter(set(a).__contains__, b)",
         "passed"),
        (SHARED, "def similar_elements(a, b):\n    return dict.fromkeys(set(a) & set(b)).keys()",
         "passed"),
        (MEAN, "def mean(v):\n    return sum(x / len(v) for x in v)", "passed"),
        (MEAN, "def mean(v):\n    return sum(v) / len(v) + 1e-4", "failed"),
        (MEAN, "def mean(v):\n    return str(sum(v) / len(v))", "failed"),
        (SLANT, "def surface_Area(b, s):\n    return round(b*b + b*(b*b + 4*s*s)**.5)", "passed"),
        (SLANT, "def surface_Area(b, s):\n    return b * b", "failed"),
        (DIGITS, "def digit_distance_nums(a, b):\n"
         "    return sum(abs(int(x) - int(y)) for x, y in zip(str(a), str(b)))", "passed"),
        (DIGITS, "def digit_distance_nums(a, b):\n    return 1", "failed"),
        (SEARCH, "def text_match_three(t):\n    return 'abbb' in t", "passed"),
        (SEARCH, "def text_match_three(t):\n    return 'ab' in t", "failed"),
        (FACTORIAL, "def f(n):\n    return 0", "failed"),
    ],
)  # fmt: skip
def test_mbpp_plus_judges_as_evalplus_does(row: dict, program: str, expected: str, tmp_path: Path):
    tasks = read_suite("mbpp+", write(tmp_path / "plus.jsonl", row))
    assert outcome(tasks.problems[0], program) == expected


def test_the_reference_of_a_plus_task_calls_itself_and_not_the_program(tmp_path: Path):
    """Else a wrong program would make its own expected values."""
    (problem,) = read_suite("mbpp+", write(tmp_path / "plus.jsonl", FACTORIAL)).problems
    counts = "calls = 0\ndef f(n):\n    global calls\n    calls += 1\n    assert calls < 5\n"
    loop = "    x = 1\n    for i in range(1, n + 1): x *= i\n    return x\n"
    assert outcome(problem, counts + loop) == "passed"


@pytest.mark.parametrize(
    ("suite", "row", "inputs"),
    [
        (
            "mbpp+",
            {
                "task_id": 2,
                "code": SHARED["canonical_solution"],
                "prompt": "Do it.",
                "source_file": "x",
                "test_imports": [],
                "test_list": ["assert similar_elements(1) == 1"],
            },
            "assertion(similar_elements(*inp), exp, 0)",
        ),
        (
            "humaneval+",
            {key: HUMAN[key] for key in HUMAN if key != "test"},
            "assertion(candidate(*inp), exp, 0)",
        ),
    ],
)
def test_the_hubs_form_of_a_plus_set_is_the_same_task(suite, row, inputs, tmp_path: Path):
    arguments = "[[(3, 4), (4, inf)], [(1, 2), ()]]" if suite == "mbpp+" else "[[2], [0.1], [-3]]"
    loop = f"for i, (inp, exp) in enumerate(zip(inputs, results)):\n    {inputs}\n"
    row["test"] = f"import numpy as np\n\ninputs = {arguments}\nresults = [None]\n{loop}"
    path = tmp_path / "hub.parquet"
    Dataset.from_list([row]).to_parquet(path)
    (problem,) = read_suite(suite, str(path)).problems
    assert problem.task_id == ("Mbpp/2" if suite == "mbpp+" else "HumanEval/0")
    assert problem.prompt == (SHARED if suite == "mbpp+" else HUMAN)["prompt"]
    assert outcome(problem, problem.reference) == "passed"
    body = "def similar_elements(*a): return [9]" if suite == "mbpp+" else "    0"
    assert outcome(problem, problem.prompt + body) == "failed"


@pytest.mark.parametrize(("suite", "row"), [("mbpp+", SHARED), ("humaneval+", PLUS)])
def test_a_plus_set_is_read_packed_as_it_is_published(suite: str, row: dict, tmp_path: Path):
    text = json.dumps(row)
    (tmp_path / "plain.jsonl").write_text(text)
    packed = tmp_path / "Plus.jsonl.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    plain = read_suite(suite, str(tmp_path / "plain.jsonl"))
    found = read_suite(suite, str(packed))
    assert found.problems == plain.problems
    assert found.source.sha256 == hashlib.sha256(packed.read_bytes()).hexdigest()
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"Plus\.jsonl\.gz cannot be decompressed"):
        read_suite(suite, str(packed))


def test_a_packed_file_that_expands_without_end_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(unpacked, "MAX_UNPACKED", 10**5)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b"\n" * 10**6))
    with pytest.raises(ValueError, match="more than 100,000 bytes once decompressed"):
        read_suite("mbpp+", str(tmp_path / "bomb.jsonl.gz"))


@pytest.mark.slow
@pytest.mark.parametrize("suite", PUBLISHED)
def test_every_published_reference_passes(suite: str):
    """Within the limits that a benchmark has: MBPP+ takes 15 minutes."""
    file, tasks = PUBLISHED[suite]
    if not (FOLDER / file).exists():
        pytest.skip(f"{file} is not here (CONTRIBUTING.md)")
    split = "all" if suite in ("mbpp", "mbpp_sanitized") else "test"
    read = read_suite(suite, str(FOLDER / file), split=split)
    jobs = [(problem, problem.reference) for problem in read.problems]
    found = run_all(jobs, judge, workers=2, limits=read.limits)
    failed = [job[0].task_id for job, one in zip(jobs, found, strict=True) if one != "passed"]
    assert failed == []
    assert len(jobs) in tasks


@pytest.mark.parametrize(
    ("number", "given", "expected"),
    [
        (2, [[1], [2]], [(1,), (2,)]),
        (63, [[[1, 2]]], [[(1, 2)]]),
        (75, [[[1, 2]], 3], [[(1, 2)], 3]),
        (106, [[1], [2]], [[1], (2,)]),
        (307, [[1], 2, 3], [(1,), 2, 3]),
        (259, [[[1], [2]]], [((1,), (2,))]),
        (580, [[1, [2, [3]]]], [(1, (2, (3,)))]),
        (115, [[[1, 2], []]], [[{1, 2}, {}]]),
        (124, ["0", "1j"], [0.0, 1j]),
        (252, ["2"], [2 + 0j]),
        (278, [[1, [2]]], [(1, (2,))]),
        (722, [{"a": [1, 2]}, 3], [{"a": (1, 2)}, 3]),
        (3, [[1]], [[1]]),
    ],
)
def test_the_json_of_an_argument_becomes_the_type_that_the_function_takes(number, given, expected):
    found = typed_input(number, given)
    assert repr(found) == repr(expected)


# Controls

pytestmark = pytest.mark.filterwarnings("ignore:invalid escape sequence")  # MBPP's programs


def mutant(problem: Problem) -> str:
    """The program with one thing changed in the function that the tests call.

    The first that applies, from the end of the function: a comparison or an operation turned, a
    number one higher, and otherwise its last returned value in a list of its own.
    """
    tree = ast.parse(problem.reference)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    function = [node for node in functions if node.name in program_tests(problem).entry_points][-1]
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
    process = context.Process(target=_plain, args=(program, program_tests(problem).tests))
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


@needs_published_rows
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
@needs_published_rows
def test_of_974_mutants_of_mbpp_only_those_that_are_right_pass(mbpp: list[Problem]):
    jobs = [(problem, mutant(problem)) for problem in mbpp]
    limits = Limits(seconds=1, wall_seconds=3)
    found = list(run_all(jobs, judge, workers=1, limits=limits))
    passed = [job for job, one in zip(jobs, found, strict=True) if one == "passed"]
    counts = {one: found.count(one) for one in sorted(set(found))}
    print(counts, *(problem.task_id for problem, _ in passed))
    assert all(plain(*job) for job in passed)
    assert len(passed) < 60

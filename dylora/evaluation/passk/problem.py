"""One task of a benchmark: its prompt, how a model's text becomes an answer, and its checker."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from dylora.sandbox.host import Result, Sandbox

ASSETS = Path(__file__).parents[2] / "assets" / "benchmark"
PROMPTS: dict[str, dict[str, Any]] = json.loads((ASSETS / "prompts.json").read_text("utf-8"))
"""stops: where an answer ends, by the form of its prompt. Unindented text ends a continued function
(Chen et al. 2021, and more); after a docstring, a program may have several functions, as EvalPlus
has it. Some tokenizers treat marks like <|endoftext|> as plain text.

shots: the form of MBPP's 3-shot prompt, from the README of the data (google-research/mbpp), with
the tasks that Austin et al. (2021) show.

verdicts: MBPP+'s questions with several right answers, by entry point, as EvalPlus 0.3 judges them.
"""


class Checker(Protocol):
    """Decides whether an answer is right."""

    runs_programs: ClassVar[bool]
    """Whether `check` needs a sandbox; where no checker of a suite does, it is given None."""

    def check(self, answer: str, sandbox: Sandbox | None) -> Result:
        """The verdict; the outcome "passed" counts. Must not raise, whatever the model wrote."""
        ...


class Problem(NamedTuple):
    """One task of a suite."""

    task_id: str  # as EvalPlus writes it: Mbpp/11, HumanEval/0; skills/sql/0
    prompt: str  # the model's whole input
    prefix: str  # comes before the model's text in the answer; "" where the text is all of it
    stops: tuple[str, ...]  # the model's text ends before the first of these
    reference: str  # an answer that passes
    texts: tuple[str, ...]  # question and answer, in the forms in which training data may hold them
    checker: Checker
    instruction: str = ""  # what a model is asked that was trained with another template


@dataclass(frozen=True)
class ProgramTests:
    """Checks a program by tests in Python, which the program can neither read nor change."""

    runs_programs: ClassVar[bool] = True

    tests: str
    """Python that calls the entry points."""
    entry_points: tuple[str, ...]
    """Functions and classes of the program."""
    setup: str = ""
    """Python that the tests' process runs first."""

    def check(self, answer: str, sandbox: Sandbox | None) -> Result:
        assert sandbox is not None
        return sandbox.run_tests(
            answer, self.tests, setup=self.setup, entry_points=self.entry_points
        )


def answer_of(problem: Problem, text: str) -> str:
    """The answer in a model's text: the text up to the first stop, behind the prefix.

    Without a prefix, a text with a fenced block is that block alone.
    """
    if not problem.prefix:
        fenced = re.search(r"```\w*[ \t]*\n(.*?)(?:\n```|\Z)", text, re.DOTALL)
        text = fenced[1] if fenced else text
    ends = [at for at in (text.find(stop) for stop in problem.stops) if at >= 0]
    return problem.prefix + text[: min(ends, default=len(text))]


def unix(text: str) -> str:
    """The text with line feeds alone: MBPP's programs come with carriage returns."""
    return text.replace("\r\n", "\n").replace("\r", "\n")

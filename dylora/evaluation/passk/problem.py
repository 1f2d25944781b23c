"""One task of a benchmark, and what a model's text for it amounts to."""

import re
from typing import Any, NamedTuple


class Problem(NamedTuple):
    """One task of a suite. What tests need besides the program the program cannot touch."""

    task_id: str  # as EvalPlus writes it: Mbpp/11, HumanEval/0; skills/sql/0
    prompt: str  # what the model is given, whole
    prefix: str  # stands before the model's text to make the program; "" where it writes it all
    stops: tuple[str, ...]  # the model's text ends before the first of these
    setup: str  # Python that the tests' process runs first
    tests: str  # Python; calls the entry points
    entry_points: tuple[str, ...]
    reference: str  # a program that passes
    texts: tuple[str, ...]  # question and answer, in the forms in which training data may hold them
    check: dict[str, Any] | None = None  # instead of tests: how an embedded skill checks an answer


def program_of(problem: Problem, text: str) -> str:
    """The program that a model's text amounts to: the text up to a stop, behind its prefix.

    An instruction's answer may come in a fenced block, which is then taken alone.
    """
    if not problem.prefix:
        fenced = re.search(r"```\w*[ \t]*\n(.*?)(?:\n```|\Z)", text, re.DOTALL)
        text = fenced[1] if fenced else text
    ends = [at for at in (text.find(stop) for stop in problem.stops) if at >= 0]
    return problem.prefix + text[: min(ends, default=len(text))]


def unix(text: str) -> str:
    """The text with line feeds alone: MBPP's programs come with carriage returns."""
    return text.replace("\r\n", "\n").replace("\r", "\n")

"""Python functions on a list of integers or the words of a text: keep some, change each, sum up."""

import random
from collections.abc import Callable
from typing import Any

from dylora.tasks.task import FORMS, Draft, Literals, Split

_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draft_lists(rng: random.Random, split: Split) -> Draft:
    """Draws one task on integers; every one has a literal, so no two splits can share it."""
    literals = Literals(rng, split)
    filtered, mapped = rng.choice(((1, True), (1, True), (1, False), (0, True)))
    steps = _Steps(literals, FORMS["lists"], bool(filtered), mapped)
    name = rng.choice(FORMS["functions"]["names"])
    argument = rng.choice(FORMS["lists"]["arguments"])
    subject = f"the {argument}" if filtered else f"all {argument}"
    return steps.draft(name, argument, subject, argument, argument[0], lambda: _lists(literals))


def draft_strings(rng: random.Random, split: Split) -> Draft:
    """Draws one task on words; its filter always has a literal, so no two splits can share it."""
    literals = Literals(rng, split)
    _, mapped = rng.choice(((1, True), (1, True), (1, False)))
    steps = _Steps(literals, FORMS["strings"], True, mapped)
    is_text = rng.random() < 0.5
    argument = rng.choice(FORMS["strings"]["texts" if is_text else "word_lists"])
    source = f"{argument}.split()" if is_text else argument
    name = rng.choice(FORMS["functions"]["names"])

    def make_inputs() -> list[Any]:
        return [" ".join(words) if is_text else words for words in _word_lists(literals)]

    subject = f"the words of {argument}" if is_text else f"the {argument}"
    return steps.draft(name, argument, subject, source, "w", make_inputs)


class _Steps:
    """What a function does: it keeps elements, changes each, and makes a result of them."""

    def __init__(
        self, literals: Literals, forms: dict[str, Any], filtered: bool, mapped: bool
    ) -> None:
        self.rng = literals.rng
        self.operations: list[str] = []
        self.condition = self.wanted = self.change = ""
        self.element = "{x}"

        def draw(forms: dict[str, Any]) -> tuple[str, str]:
            kind, code, phrase = literals.draw(forms)
            self.operations.append(kind)
            return code, phrase

        if filtered:
            self.condition, self.wanted = draw(forms["filters"])
        if mapped:
            extra = forms["maps_of_filtered"] if filtered else {}
            self.element, self.change = draw(forms["maps"] | extra)
        extra = {} if mapped else forms["results_of_unmapped"]
        self.whole, self.summary = draw(forms["results"] | extra)

    def draft(
        self,
        name: str,
        argument: str,
        subject: str,
        source: str,
        variable: str,
        make_inputs: Callable[[], list[Any]],
    ) -> Draft:
        """The task of a function `name(argument)` that loops over `source`, in words `subject`."""
        call = f"{name}({argument})"

        def render(element: str, condition: str) -> str:
            loop = f"{element} for {{x}} in {source}" + (f" if {condition}" if condition else "")
            expression = self.whole.format(g=loop).format(x=variable)
            return f"def {call}:\n    return {expression}"

        simpler = [render(self.element, "")] if self.condition else []
        simpler += [render("{x}", self.condition)] if self.change else []
        described = f"{subject} {self.wanted}".rstrip()
        described += f", each {self.change}" if self.change else ""
        opening = self.rng.choice(FORMS["functions"]["openings"])
        instruction = opening.format(call=call, d=self.summary.format(d=described))
        return Draft(
            operations=tuple(self.operations),
            program=f"{self.whole} {self.element} {self.condition} {source == argument}",
            instruction=instruction,
            answer=render(self.element, self.condition),
            simpler=simpler,
            make_check=lambda: {"kind": "function", "function": name, "inputs": make_inputs()},
        )


def _lists(literals: Literals) -> list[list[int]]:
    """Lists that tell near misses apart: none, the edges one at a time, and long mixtures."""
    rng, edges = literals.rng, literals.edges()
    top = 3 * max(literals.numbers)
    products = [n * factor for n in literals.numbers for factor in (-2, 2, 3, 5)]
    others = [rng.randint(-top, top) for _ in range(8)]
    pool = edges + products + others + [-n for n in literals.numbers] + [0, 1]
    long = [[rng.choice(pool) for _ in range(20)] for _ in range(2)]
    wide = [rng.randint(-9, top) for _ in range(40)]
    dense = [n + step for n in literals.numbers for step in range(-6, 7)]
    rng.shuffle(dense)
    return [[], *([value] for value in edges + others), *long, wide, dense]


def _word_lists(literals: Literals) -> list[list[str]]:
    """Word lists that tell near misses apart: none, the edges one at a time, long mixtures."""
    rng = literals.rng

    def pad(length: int) -> str:
        return "".join(rng.choices(_LETTERS, k=max(length, 0)))

    lengths = sorted(set(literals.edges())) or [3, 5, 7]
    words = [pad(length) for length in lengths for _ in range(3)]
    for text in literals.strings:
        words += [text, text * 2, text.upper() + pad(3)]
        for length in lengths:
            rest = pad(length - len(text))
            middle = rng.randint(0, len(rest))
            words += [text + rest, rest + text, rest[:middle] + text + rest[middle:]]
    for first in literals.strings:
        words += [first + pad(2) + second + pad(1) for second in literals.strings]
    words = [word for word in words if word]
    long = [rng.sample(words, len(words)) for _ in range(2)]
    return [[], *([word] for word in words), *long]

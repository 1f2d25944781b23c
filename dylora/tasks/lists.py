"""Python functions on a list of integers: keep some, change each, aggregate."""

import random
from typing import Any

from dylora.tasks.task import COMPARISONS, Draft, Forms, Literals, Split

OTHER_TESTS: Forms = {
    "multiple": ("{{x}} % {n} == 0", ("divisible by {n}", "that are multiples of {n}")),
    "not": ("{{x}} != {n}", ("other than {n}", "not equal to {n}")),
}
MAPS: Forms = {
    "times": ("{{x}} * {n}", ("multiplied by {n}", "times {n}")),
    "plus": ("{{x}} + {n}", ("plus {n}", "increased by {n}")),
    "minus": ("{{x}} - {n}", ("minus {n}", "decreased by {n}")),
}
PLAIN_MAPS: Forms = {
    "square": ("{{x}} * {{x}}", ("squared",)),
}
FINALS: Forms = {
    "list": ("[{{g}}]", ("{{d}}", "a list of {{d}}")),
    "sum": ("sum({{g}})", ("the sum of {{d}}", "the total of {{d}}")),
    "max": (
        "max(({{g}}), default=0)",
        ("the largest (or 0) of {{d}}", "the maximum (or 0) of {{d}}"),
    ),
    "sorted": ("sorted({{g}})", ("{{d}}, sorted", "{{d}} in ascending order")),
    "reversed": ("[{{g}}][::-1]", ("{{d}}, last to first", "{{d}} in reverse order")),
}
COUNTS: Forms = {
    "count": ("len([{{g}}])", ("the number of {{d}}", "the count of {{d}}")),
}
"""Only without a map, which would change nothing."""
ARGUMENTS = ("values", "numbers", "items")
FUNCTIONS = (
    "f", "pick", "run", "keep", "solve", "select", "process", "convert", "compute", "result",
    "filter_all", "get", "make", "check", "update", "find",
)  # fmt: skip
OPENINGS = (
    "Write {call} returning {d}.",
    "{call} should return {d}.",
)


def draft(rng: random.Random, split: Split) -> Draft:
    """Draws one task; every one has a literal, so no two splits can share it."""
    literals = Literals(rng, split)
    filters, mapped = rng.choice(((1, True), (1, True), (1, False), (0, True)))
    pools = [COMPARISONS | OTHER_TESTS][:filters]
    conditions, wanted, operations = [], [], []
    for pool in pools:
        kind = rng.choice(list(pool))
        condition, phrase = literals.fill(*pool[kind], high=20 if "multiple" in kind else 99)
        conditions.append(condition)
        wanted.append(phrase)
        operations.append(kind)
    element, change = "{x}", ""
    if mapped:
        maps = MAPS | PLAIN_MAPS if conditions else MAPS
        kind = rng.choice(list(maps))
        element, change = literals.fill(*maps[kind])
        operations.append(kind)
    finals = FINALS if mapped else FINALS | COUNTS
    kind = rng.choice(list(finals))
    whole, summary = literals.fill(*finals[kind], high=9)
    operations.append(kind)

    name, argument = rng.choice(FUNCTIONS), rng.choice(ARGUMENTS)

    def render(element: str, conditions: list[str]) -> str:
        loop = element + " for {x} in {xs}" + " if " * bool(conditions) + " and ".join(conditions)
        expression = whole.format(g=loop).format(x=argument[0], xs=argument)
        return f"def {name}({argument}):\n    return {expression}"

    simpler = [render(element, [c for c in conditions if c != left]) for left in conditions]
    if change:
        simpler.append(render("{x}", conditions))
    program = whole + element + " ".join(conditions)
    described = f"the {argument} " + " and ".join(wanted) if wanted else f"all {argument}"
    described += f", each {change}" if change else ""
    described = summary.format(d=described)
    instruction = rng.choice(OPENINGS).format(call=f"{name}({argument})", d=described)

    def make_check() -> dict[str, Any]:
        return {"kind": "function", "function": name, "inputs": _inputs(literals)}

    answer = render(element, conditions)
    return Draft(tuple(operations), program, instruction, answer, simpler, make_check)


def _inputs(literals: Literals) -> list[list[int]]:
    """Lists that tell near misses apart: none, the edges one at a time, and long mixtures."""
    rng, edges = literals.rng, literals.edges()
    top = 3 * max(literals.numbers)
    products = [n * factor for n in literals.numbers for factor in (-2, 2, 3, 5)]
    strangers = [rng.randint(-top, top) for _ in range(8)]
    pool = edges + products + strangers + [-n for n in literals.numbers] + [0, 1]
    long = [[rng.choice(pool) for _ in range(20)] for _ in range(2)]
    wide = [rng.randint(-9, top) for _ in range(40)]
    dense = [n + step for n in literals.numbers for step in range(-6, 7)]
    rng.shuffle(dense)
    return [[], *([value] for value in edges + strangers), *long, wide, dense]

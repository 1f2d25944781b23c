"""Python functions on strings: the words of a text or a list, some kept, each changed, joined."""

import random
from typing import Any

from dylora.tasks.lists import FUNCTIONS, OPENINGS
from dylora.tasks.task import COMPARISONS, Draft, Forms, Literals, Split

FILTERS: Forms = {
    "starts": ('w.startswith("{s}")', ('starting with "{s}"', 'that begin with "{s}"')),
    "ends": ('w.endswith("{s}")', ('ending in "{s}"', 'that end with "{s}"')),
    "contains": ('"{c}" in w', ('containing "{c}"', 'that have "{c}" in them')),
    "not": ('w != "{word}"', ('other than "{word}"', 'that are not "{word}"')),
}
LENGTHS: Forms = {
    f"length_{kind}": (
        code.replace("{{x}}", "len(w)"),
        tuple(f"of length {phrase}" for phrase in phrases),
    )
    for kind, (code, phrases) in COMPARISONS.items()
}
MAPS: Forms = {
    "upper": ("w.upper()", ("in upper case", "in capital letters")),
    "reverse": ("w[::-1]", ("spelled backwards", "reversed")),
    "prefix": ('"{s}" + w', ('with "{s}" in front', 'after "{s}"')),
    "head": ("w[:{n}]", ("cut to {n} letters", "cut to its first {n} letters")),
}
FINALS: Forms = {
    "join": ('"{p}".join({{g}})', ('{{d}}, joined with "{p}"', '{{d}}, with "{p}" between')),
    "list": ("[{{g}}]", ("a list of {{d}}", "{{d}}, as a list")),
    "sorted": ("sorted({{g}})", ("{{d}}, sorted", "{{d}} in alphabetical order")),
}
COUNT: Forms = {"count": ("len([{{g}}])", ("the number of {{d}}", "the count of {{d}}"))}
TEXTS, WORD_LISTS = ("text", "line", "message"), ("words", "strings", "names")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def draft(rng: random.Random, split: Split) -> Draft:
    """Draws one task; its filter always has a literal, so no two splits can share it."""
    literals = Literals(rng, split)
    filters, mapped = rng.choice(((1, True), (1, True), (1, False)))
    pools = [FILTERS | LENGTHS] if filters == 1 else rng.sample((FILTERS, LENGTHS), 2)
    conditions, wanted, operations = [], [], []
    for pool in pools:
        kind = rng.choice(list(pool))
        condition, phrase = literals.fill(*pool[kind], high=16)
        conditions.append(condition)
        wanted.append(phrase)
        operations.append(kind)
    element, change = "w", ""
    if mapped:
        kind = rng.choice(list(MAPS))
        element, change = literals.fill(*MAPS[kind], high=12)
        operations.append(kind)
    finals = FINALS if change else FINALS | COUNT
    kind = rng.choice(list(finals))
    whole, summary = literals.fill(*finals[kind], high=9)
    operations.append(kind)

    splits = rng.random() < 0.5
    argument = rng.choice(TEXTS if splits else WORD_LISTS)
    source = f"{argument}.split()" if splits else argument
    name = rng.choice(FUNCTIONS)

    def render(element: str, conditions: list[str]) -> str:
        loop = f"{element} for w in {source}" + " if " * bool(conditions) + " and ".join(conditions)
        return f"def {name}({argument}):\n    return {whole.format(g=loop)}"

    simpler = [render(element, [c for c in conditions if c != left]) for left in conditions]
    if change:
        simpler.append(render("w", conditions))
    program = f"{whole} {element} {conditions} {splits}"
    described = f"the words of {argument} " if splits else f"the {argument} "
    described += " and ".join(wanted) + (f", each {change}" if change else "")
    described = summary.format(d=described)
    instruction = rng.choice(OPENINGS).format(call=f"{name}({argument})", d=described)

    def make_check() -> dict[str, Any]:
        inputs = [" ".join(words) if splits else words for words in _inputs(literals)]
        return {"kind": "function", "function": name, "inputs": inputs}

    answer = render(element, conditions)
    return Draft(tuple(operations), program, instruction, answer, simpler, make_check)


def _inputs(literals: Literals) -> list[list[str]]:
    """Word lists that tell near misses apart: none, the edges one at a time, long mixtures."""
    rng = literals.rng

    def pad(length: int) -> str:
        return "".join(rng.choices(LETTERS, k=max(length, 0)))

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

"""Python expressions that transform JSON: a list of records or a dictionary of numbers."""

import random
from typing import Any

from dylora.tasks.task import FORMS, Draft, Literals, Split

_FORMS = FORMS["json"]


def draft(rng: random.Random, split: Split) -> Draft:
    """Draws one task; its filter has a literal, so no two splits can share it."""
    literals = Literals(rng, split)
    text = literals.draw_string("text_key")
    number, other = literals.draw_string("number_key"), literals.draw_string("number_key")
    literals.strings.clear()  # keys are the fields' names, not values to look for
    on_records = rng.random() < 0.6
    operations, tests = [], []
    for side in rng.choice((["number"], ["text"], ["number", "text"])):
        kind, code, phrase = literals.draw(_FORMS[f"{side}_tests"])
        subject = rng.choice((number, other)) if side == "number" else text
        if on_records:
            tests.append((code.format(x=f'r["{subject}"]'), f'"{subject}" {phrase}'))
        else:
            place = ("v", "value") if side == "number" else ("k", "key")
            tests.append((code.format(x=place[0]), f"{place[1]} {phrase}"))
        operations.append(kind)
    described = " and ".join(phrase for _, phrase in tests)

    form = "record" if on_records else "mapping"
    results, changes = _FORMS[f"{form}_results"], _FORMS["changes"]
    result = rng.choice(list(results))
    whole, requests = results[result]
    kind = rng.choice(list(changes)) if "{change}" in whole else "same"
    change, changed = literals.fill(*changes[kind])
    operations += [kind, f"{form}_{result}"]
    source = "for r in {rows}" if on_records else "for k, v in {rows}.items()"
    values = {
        "text": text,
        "number": number,
        "change": change.format(x=f'r["{number}"]' if on_records else "v"),
        "changed": changed.format(d=f'"{number}"' if on_records else "the values"),
    }
    variable = rng.choice(_FORMS[f"{form}s"])

    def render(conditions: list[str], variable: str) -> str:
        loop = source.format(rows=variable) + " if " * bool(conditions) + " and ".join(conditions)
        return whole.format(loop=loop, **values)

    conditions = [code for code, _ in tests]
    simpler = [render([c for c in conditions if c != left], variable) for left in conditions]
    wanted = rng.choice(requests).format(**values)
    where = f"of {variable} with" if on_records else f"in {variable} with"
    instruction = rng.choice(_FORMS["openings"]).format(d=f"{wanted} {where} {described}")

    def make_check() -> dict[str, Any]:
        inputs = [
            [dict(zip((text, number, other), row, strict=True)) for row in rows]
            if on_records
            else {row[0]: row[1] for row in rows}
            for rows in _inputs(literals)
        ]
        return {"kind": "expression", "variable": variable, "inputs": inputs}

    program, answer = render(conditions, "_"), render(conditions, variable)
    return Draft(tuple(operations), program, instruction, answer, simpler, make_check)


def _inputs(literals: Literals) -> list[list[list[Any]]]:
    """Rows of a text and two numbers that tell near misses apart: each edge alone, mixtures."""
    rng, edges = literals.rng, literals.edges() or [5, 50]
    texts = ["other", "ox", "Zebra", "cab", "apex"]
    for text in literals.strings:
        texts += [text, text.upper(), text[:-1]]
        texts += [before + text + after for before in ("", "x", "b") for after in ("", "x", "b")]
    numbers = edges + [n * factor for n in literals.numbers for factor in (0, 2, 3)]
    numbers += [rng.randint(-9, 3 * max(edges)) for _ in range(4)]
    near = [*literals.strings, "other"]
    single: list[list[Any]] = [[text, edge, edge] for text in near for edge in edges]
    single += [[text, rng.choice(numbers), rng.choice(numbers)] for text in texts]
    mixtures = []
    for pool in (numbers, numbers, edges):
        column = rng.sample(texts, len(texts)) + rng.choices(texts, k=8)
        mixtures.append([[text, rng.choice(pool), rng.choice(pool)] for text in column])
    return [[], *([row] for row in single), *mixtures]

"""Word problems in two to four steps, answered by an expression whose value is checked."""

import random
from typing import Any

from dylora.tasks.answers import calculate
from dylora.tasks.task import Draft, Forms, Literals, Split

STARTS: Forms = {
    "has": ("{a}", ("{name} has {a} {item}.", "There are {a} {item} at the shop of {name}.")),
    "packs": (
        "{a} * {b}",
        ("{name} buys {a} packs of {b} {item}.", "{name} has {a} bags with {b} {item} in each."),
    ),
}
EVENTS: Forms = {
    "gain": (
        "{x} + {c}",
        ("Then {c} more arrive.", "A friend brings {c} more.", "{friend} adds {c} {item}."),
    ),
    "lose": (
        "{x} - {c}",
        ("Then {c} get lost.", "{name} gives {c} to {friend}.", "After that {c} break."),
    ),
    "grow": (
        "({x}) * {c}",
        ("Next year there are {c} times as many.", "The number becomes {c} times as large."),
    ),
}
QUESTIONS: Forms = {
    "total": ("{x}", ("How many {item} are there now?", "How many {item} is that in the end?")),
    "cost": (
        "({x}) * {e}",
        ("Each costs {e} coins. What do all cost?", "Sold at {e} coins each, what do they bring?"),
    ),
    "share": (
        "({x}) / {e}",
        ("How many does each of {e} friends get?", "Split over {e} boxes, how many in each?"),
    ),
    "over": (
        "({x}) % {e}",
        ("Packed in bags of {e}, how many are left over?", "In rows of {e}, how many remain?"),
    ),
}


def draft(rng: random.Random, split: Split) -> Draft:
    """Draws one problem, again until its value is a natural number; all numbers are literals."""
    while True:
        literals = Literals(rng, split)
        start, question = rng.choice(list(STARTS)), rng.choice(list(QUESTIONS))
        events = rng.sample(list(EVENTS), rng.choice((0, 1)) if start != "has" else 1)
        steps = [STARTS[start], *(EVENTS[event] for event in events), QUESTIONS[question]]
        words = {
            "name": literals.draw_string("name"),
            "friend": literals.draw_string("name"),
            "item": literals.draw_string("item"),
        }
        expression, story, values = "", [], []
        for code, phrases in steps:
            numbers = {
                field: literals.draw_numbers(1, 20 if field == "e" and question == "share" else 99)[
                    0
                ]
                for field in "abcde"
                if f"{{{field}}}" in code
            }
            inner = code.replace("({x})", "{x}") if expression.isdigit() else code
            expression = inner.format(x=expression, **numbers)
            story.append(rng.choice(phrases).format(**words, **numbers))
            values.append(expression)
        amounts = [calculate(value) for value in values]
        natural = all(amount >= 1 and amount == int(amount) for amount in amounts)
        if natural and amounts[-1] > 2:  # 1 and 2 are remainders that a guess finds
            break
    instruction = " ".join(story)

    def make_check() -> dict[str, Any]:
        return {"kind": "arithmetic", "inputs": [None]}

    program = f"{start} {events} {expression}"
    operations = (start, *events, question)
    simpler = [] if question == "total" else [values[-2]]
    return Draft(operations, program, instruction, expression, simpler, make_check)

"""Word problems in two to four steps, answered by an expression whose value is checked."""

import random
from functools import partial

from dylora.tasks.answers import calculate
from dylora.tasks.task import FORMS, Draft, Literals, Split

_FORMS = FORMS["arithmetic"]


def draft(rng: random.Random, split: Split) -> Draft:
    """Draws one problem, again until its value is a natural number; all numbers are literals."""
    while True:
        literals = Literals(rng, split)
        start = rng.choice(list(_FORMS["starts"]))
        question = rng.choice(list(_FORMS["questions"]))
        events = rng.sample(list(_FORMS["events"]), rng.choice((0, 1)) if start != "has" else 1)
        steps = [
            _FORMS["starts"][start],
            *(_FORMS["events"][event] for event in events),
            _FORMS["questions"][question],
        ]
        pools = {"name": "name", "friend": "name", "item": "item"}
        words = {field: literals.draw_string(pool) for field, pool in pools.items()}
        expression, story, values = "", [], []
        for code, phrases in steps:
            numbers = {}
            for field in (one for one in "abcde" if f"{{{one}}}" in code):
                high = 20 if field == "e" and question == "share" else 99
                numbers[field] = literals.draw_numbers(1, high)[0]
            inner = code.replace("({x})", "{x}") if expression.isdigit() else code
            expression = inner.format(x=expression, **numbers)
            story.append(rng.choice(phrases).format(**words, **numbers))
            values.append(expression)
        amounts = [calculate(value) for value in values]
        natural = all(amount >= 1 and amount == int(amount) for amount in amounts)
        if natural and amounts[-1] > 2:  # 1 and 2 are remainders that a guess finds
            break
    instruction = " ".join(story)

    program = f"{start} {events} {expression}"
    operations = (start, *events, question)
    simpler = [] if question == "total" else [values[-2]]
    make_check = partial(dict, kind="arithmetic", inputs=[None])
    return Draft(operations, program, instruction, expression, simpler, make_check)

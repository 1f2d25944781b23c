"""Regular expressions for full matches: a sequence of classes, words, separators, repetitions."""

import random
import re
from functools import partial
from typing import Any, NamedTuple

from dylora.tasks.task import FORMS, Draft, Literals, Split

_FORMS = FORMS["regex"]


class _Part(NamedTuple):
    """A piece of a pattern, with texts that match it or nearly do."""

    operations: tuple[str, ...]
    code: str
    phrase: str
    samples: list[str]


def draft(rng: random.Random, split: Split) -> Draft:
    """Draws one task; drawn again until it has a literal, so no two splits can share it."""
    while True:
        literals = Literals(rng, split)
        parts = [
            _separator(literals)
            if kind == "s"
            else rng.choice((_class, _class, _class, _fixed))(literals)
            for kind in rng.choice(("psp", "psp", "ps", "sp"))
        ]
        if literals.strings or literals.numbers:
            break
    pattern = "".join(part.code for part in parts)
    opening, joint = rng.choice(_FORMS["openings"]), rng.choice(_FORMS["joints"])
    instruction = opening.format(d=joint.join(part.phrase for part in parts))

    operations = tuple(kind for part in parts for kind in part.operations)
    codes = [part.code for part in parts]
    simpler = ["".join(codes[:place] + codes[place + 1 :]) for place in range(len(codes))]
    make_check = partial(_make_check, rng, parts)
    return Draft(operations, pattern, instruction, pattern, simpler, make_check)


def _class(literals: Literals) -> _Part:
    kind = literals.rng.choice(list(_FORMS["classes"]))
    code, name, members = _FORMS["classes"][kind]
    before = len(literals.numbers)
    repeat, times, phrase = literals.draw(_FORMS["repeats"])
    bounds = literals.numbers[before:]
    most = max(bounds, default=1)
    lengths = {0, 1, 2, *(n + step for n in bounds for step in (-1, 0, 1)), 3 * most}
    samples = ["".join(literals.rng.choices(members, k=length)) for length in sorted(lengths)]
    samples += [members[0] * most, members[-1] * most]
    # Each class against the members of the others: [a-z] for [a-f], \w for \d.
    size = min(bounds, default=1)
    others = [other for _, _, other in _FORMS["classes"].values()]
    samples += ["".join(literals.rng.choices(other, k=size)) for other in others]
    return _Part((kind, repeat), code + times, phrase.format(one=name), samples)


def _fixed(literals: Literals) -> _Part:
    before = len(literals.strings)
    kind, code, phrase = literals.draw(_FORMS["fixed"])
    samples = ["", "x", "7", "Q"]
    for text in literals.strings[before:]:
        samples += [text, text * 2, text[:-1], text.upper(), text + "s", text + text[-1]]
    return _Part((kind,), code, phrase, samples)


def _separator(literals: Literals) -> _Part:
    text = literals.draw_string("separator")
    phrase = literals.rng.choice(_FORMS["separator_phrases"]).format(p=text)
    samples = ["", text, text * 2, "_" if text != "_" else "-"]
    return _Part((), text, phrase, samples)  # it combines with everything: no operation


def _make_check(rng: random.Random, parts: list[_Part]) -> dict[str, Any]:
    """The check on texts that vary one part at a time among matching others, then all at once."""
    good = [[s for s in part.samples if re.fullmatch(part.code, s)] for part in parts]
    texts = []
    for place, part in enumerate(parts):
        for sample in part.samples:
            pieces = [rng.choice(choices) for choices in good]
            pieces[place] = sample
            texts.append("".join(pieces))
    texts += ["".join(rng.choice(choices) for choices in good) for _ in range(4)]
    texts += [texts[-1] + "\n", texts[-1] + "x", "x" + texts[-1]]
    return {"kind": "regex", "inputs": list(dict.fromkeys(texts))}

"""One SELECT over a small schema, run by sqlite3 on several small databases."""

import random
from typing import Any

from dylora.tasks.task import FORMS, Draft, Literals, Split

_FORMS = FORMS["sql"]
_TABLES: dict[str, tuple[list[str], list[str]]] = _FORMS["tables"]
"""Text columns (the first is the row's name) and integer columns of each table."""


def draft(rng: random.Random, split: Split) -> Draft:
    """Draws one task; its first condition has a literal, so no two splits can share it."""
    literals = Literals(rng, split)
    table = rng.choice(list(_TABLES))
    (name, group), numbers = _TABLES[table]
    filtered, by = rng.sample(numbers, 2)  # two: the edges repeat, an order must not
    columns = {"name": name, "group": group, "number": rng.choice(numbers), "by": by}

    tests, operations = [], []
    sides = rng.choice((["number"], ["text"], ["number", "text"]))
    for side in sides:
        column = filtered if side == "number" else group
        kind, code, phrase = literals.draw(_FORMS[f"{side}_tests"])
        tests.append((code.format(x=column), phrase.format(x=column)))
        operations.append(kind)
    condition = " and ".join(code for code, _ in tests)
    described = " and ".join(phrase for _, phrase in tests)

    edges = literals.edges() or [7, 40]
    style = rng.choice(("rows", "ordered", "aggregate", "group"))
    tail, suffix = "", ""
    if style in ("rows", "ordered"):
        kind = rng.choice(list(_FORMS["selections"]))
        what, requests = _FORMS["selections"][kind]
        operations.append(kind)
    else:
        kind = rng.choice(list(_FORMS["aggregates"]))
        what, requests = _FORMS["aggregates"][kind]
        operations.append(f"{style}_{kind}")
    request = rng.choice(requests)
    if style == "ordered":
        kind, tail, suffix = (part.format(by=by) for part in literals.draw(_FORMS["orders"]))
        operations.append(kind)
    elif style == "group":
        what, request = f"{{group}}, {what}", f"{request} of each {{group}}"
        tail = f" group by {group}"
    what, request = what.format(**columns), request.format(**columns)
    schema = f"{table}({name}, {group}, {', '.join(numbers)})"
    query = f"select {what} from {table} where {condition}{tail}"
    instruction = rng.choice(_FORMS["openings"]).format(
        schema=schema, d=f"{request} where {described}{suffix}"
    )

    def make_check() -> dict[str, Any]:
        texts = literals.strings
        databases = _databases(rng, table, filtered, edges, texts)
        compare = "exact" if style == "ordered" else "unordered"
        return {"kind": "sql", "inputs": databases, "compare": compare}

    return Draft(tuple(operations), query, instruction, query, [], make_check)


def _databases(
    rng: random.Random, table: str, filtered: str, edges: list[int], texts: list[str]
) -> list[dict[str, Any]]:
    """Contents that tell near misses apart: each edge and text alone in a row, then all, twice.

    The integers of the other column are distinct, so that an order by it is unique.
    """
    (name, group), columns = _TABLES[table]

    def rows(cells: list[tuple[str, int]]) -> list[list[str | int]]:
        spread = sorted({*edges, *range(1, 2 * len(cells) + 9)})
        others = rng.sample(spread, len(cells))
        pairs = [(edge, other) for (_, edge), other in zip(cells, others, strict=True)]
        pairs = pairs if columns[0] == filtered else [(other, edge) for edge, other in pairs]
        return [
            [f"row{index}", text, *pair]
            for index, ((text, _), pair) in enumerate(zip(cells, pairs, strict=True))
        ]

    near = [(text, edge) for text in [*texts, "other"] for edge in edges]
    wide = [*edges, min(edges) // 2, max(edges) + 9]
    cells = [
        (text, edge) for text in [*texts, *(text + "s" for text in texts), "other"] for edge in wide
    ]
    full = rng.sample(cells * 2, len(cells) * 2)
    contents = [[], *([cell] for cell in near), full]
    types = [f"{name} text", f"{group} text", *(f"{column} integer" for column in columns)]
    return [{"table": table, "columns": types, "rows": rows(cells)} for cells in contents]

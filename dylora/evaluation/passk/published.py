"""Published pass@1 scores of well-known bases, to compare a base's measured score with.

Reports differ in what no table shows: the prompt to its last newline, the stops, sampling; so each
number names its source and its settings. EvalPlus' "MBPP" is its own choice of tasks with the first
tests, not MBPP's test split, and is left out.
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dylora.evaluation.passk.problem import ASSETS

SCORES_FILE = ASSETS / "published_scores.json"


class PublishedScore(NamedTuple):
    """One published number."""

    percent: float  # pass@1
    how: str  # shots, decoding
    source: str


@cache
def read_scores(file: Path = SCORES_FILE) -> dict[str, dict[str, list[PublishedScore]]]:
    """Scores by base and suite; raises ValueError for one without its source or out of range."""
    scores: dict[str, dict[str, list[PublishedScore]]] = {}
    for base, suites in json.loads(file.read_text(encoding="utf-8")).items():
        for suite, rows in suites.items():
            for row in rows:
                if row.keys() != set(PublishedScore._fields):
                    raise ValueError(f"{file}: {row} has other fields than a published score")
                if not (0 < row["percent"] < 100 and row["how"] and row["source"]):
                    raise ValueError(
                        f"{file}: {row} needs a percentage between 0 and 100, settings and source"
                    )
                scores.setdefault(base, {}).setdefault(suite, []).append(PublishedScore(**row))
    return scores


def published_of(base: str, suite: str) -> list[PublishedScore]:
    """The published scores of a base on a suite; none for what the file lacks."""
    return read_scores().get(base, {}).get(suite, [])


def published_lines(base: str, suite: str) -> list[str]:
    """Lines to print beside the base's own score."""
    return [
        f"published for {base}: {one.percent:.1f} % ({one.how}; {one.source})"
        for one in published_of(base, suite)
    ] or [
        f"no published score of {base} on {suite} is known here: before a gain is believed, "
        "find one, and check the base's own score against it"
    ]

"""Published pass@1 scores of well-known bases, to compare a base's measured score with.

assets/benchmark/published_scores.json holds the numbers. Reports differ in what no table shows: the
prompt to its last newline, the stops, sampling; so each number names its source and its settings.
EvalPlus' "MBPP" is its own choice of tasks with the first tests, not MBPP's test split, and is left
out.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

SCORES_FILE = Path(__file__).parents[2] / "assets" / "benchmark" / "published_scores.json"


class PublishedScore(NamedTuple):
    """One published number."""

    percent: float  # pass@1
    how: str  # shots, decoding
    source: str


@cache
def read_scores(file: Path = SCORES_FILE) -> dict[str, dict[str, list[PublishedScore]]]:
    """Scores by base and suite.

    Raises:
        ValueError: A score with other fields, without a source, or with an impossible percentage.
    """
    table = json.loads(file.read_text(encoding="utf-8"))
    return {
        base: {suite: [_score(file, row) for row in rows] for suite, rows in suites.items()}
        for base, suites in table.items()
    }


def _score(file: Path, row: dict[str, Any]) -> PublishedScore:
    if row.keys() != set(PublishedScore._fields):
        raise ValueError(f"{file}: {row} must have the fields {', '.join(PublishedScore._fields)}")
    score = PublishedScore(**row)
    if not (0 < score.percent < 100 and score.how and score.source):
        raise ValueError(f"{file}: {row} has no percentage between 0 and 100, settings and source")
    return score


def published_of(base: str, suite: str) -> list[PublishedScore]:
    """The published scores of a base on a suite; none for what the file lacks."""
    return read_scores().get(base, {}).get(suite, [])


def published_lines(base: str, suite: str) -> list[str]:
    """Lines to print beside the base's own score."""
    found = published_of(base, suite)
    if not found:
        return [
            f"no published score of {base} on {suite} is known here: before a gain is believed, "
            "find one, and check the base's own score against it"
        ]
    return [f"published for {base}: {one.percent:.1f} % ({one.how}; {one.source})" for one in found]

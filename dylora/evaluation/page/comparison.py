"""What the page of several runs says: final numbers with their spread, curves, differences."""

import json
import statistics
from collections.abc import Iterable
from typing import Any

from dylora.evaluation.figures.curves import compare_losses
from dylora.evaluation.figures.style import styled
from dylora.evaluation.forgetting import over_seeds
from dylora.evaluation.page.tables import Table
from dylora.evaluation.run_files import RunFiles
from dylora.fields import join

Groups = dict[str, list[RunFiles]]
SEEDS = ("name", "output_dir", "train.seed", "data.seed")  # what the runs of a group may differ in
NOTHING = "–"


def grouped(runs: Iterable[RunFiles]) -> Groups:
    """Runs of equal settings but for their seeds, under the name of their first; where two groups
    would have one name, their folders tell them apart."""
    by_settings: dict[str, list[RunFiles]] = {}
    for run in runs:
        settings = {key: value for key, value in flat(run.settings).items() if key not in SEEDS}
        by_settings.setdefault(json.dumps(settings, sort_keys=True, default=str), []).append(run)
    groups: Groups = {}
    for group in by_settings.values():
        name = group[0].name if group[0].name not in groups else str(group[0].folder)
        groups[name] = group
    return groups


def final_numbers(groups: Groups) -> list[Table]:
    """A row a group: validation loss at the end and at its best, and speed; then by set."""
    columns: dict[str, Any] = {
        "loss at the end": lambda run: run.last("val/loss"),
        "lowest loss": lambda run: min((y for _, y in run.points("val/loss")), default=None),
        "tokens per s": lambda run: _mean([y for _, y in run.points("train/tokens_per_s")]),
        "experts a token": lambda run: (run.results.get("routing") or {}).get("active_experts"),
    }
    rows = [
        [
            name,
            str(len(group)),
            *(shown([value(run) for run in group]) for value in columns.values()),
        ]
        for name, group in groups.items()
    ]
    return [("", ["runs of", "runs", *columns], rows), *_by_set(groups)]


def _by_set(groups: Groups) -> list[Table]:
    """A row a set, a column a group: the loss at the end, and the share of answers that pass."""
    sets = list(dict.fromkeys(s["name"] for group in groups.values() for run in group
                              for s in _sets(run)))  # fmt: skip
    tables: list[Table] = []
    for key, title in (("trained_loss", "Loss by set"), ("trained_passed", "Answers that pass")):
        rows = [
            [
                name,
                *(shown([_of_set(run, name, key) for run in group]) for group in groups.values()),
            ]
            for name in sets
        ]
        rows = [row for row in rows if any(cell != NOTHING for cell in row[1:])]
        tables += [(title, ["set", *groups], rows)] if rows else []
    return tables


def shown(values: list[float | None]) -> str:
    """A mean over runs, and half of its 95 % interval where there are several."""
    found = [value for value in values if value is not None]
    if not found:
        return NOTHING
    text = f"{statistics.fmean(found):.4g}"
    if len(found) > 1:
        interval = over_seeds(found)
        text += f" ± {interval.high - interval.mean:.2g}"
    return text + (f" ({len(found)} of {len(values)} runs)" if len(found) < len(values) else "")


def differences(groups: Groups) -> list[Table]:
    """The settings in which groups differ, a column a group."""
    settings = {name: flat(group[0].settings) for name, group in groups.items()}
    keys = dict.fromkeys(key for found in settings.values() for key in found)
    rows = []
    for key in keys:
        values = [str(found.get(key, NOTHING)) for found in settings.values()]
        if key not in SEEDS and len(set(values)) > 1:
            rows.append([key, *values])
    return [("", ["setting", *settings], rows)] if rows else []


def figures(groups: Groups) -> list[tuple[str, str, list[Any]]]:
    """Title, caption and the variants of each: as it is, and with a logarithmic scale."""
    with styled():
        drawn = [compare_losses(groups, log=log) for log in (False, True)]
    drawn = [figure for figure in drawn if figure is not None]
    caption = "All sets, in nats per target token; runs of one group have one colour."
    return [("Validation loss", caption, drawn)] if drawn else []


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists as a whole."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = join(prefix, str(key))
        found |= flat(value, name) if isinstance(value, dict) and value else {name: value}
    return found


def _sets(run: RunFiles) -> list[dict[str, Any]]:
    return run.results.get("sets") or []


def _of_set(run: RunFiles, name: str, key: str) -> float | None:
    return next((row.get(key) for row in _sets(run) if row["name"] == name), None)


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None

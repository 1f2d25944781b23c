"""Figures of a stream: what is left of each skill, and how novelty is told."""

from itertools import chain
from typing import Any

from dylora.evaluation.figures import style
from dylora.evaluation.run_files import RunFiles

LABELS = {"losses": "loss (nats per target token)", "passed": "share of answers that pass"}


def forgetting(run: RunFiles) -> Any:
    """Each skill's loss after every stage; the circle is the stage that taught it."""
    return _over_stages(run, "losses")


def passed(run: RunFiles) -> Any:
    """Likewise the share of test answers that pass."""
    return _over_stages(run, "passed")


def novelty(run: RunFiles) -> Any:
    """Margins of batches whose skill is known and of the same where it is not: new above 1."""
    found = run.results.get("novelty") or {}
    if not found.get("known"):
        return None
    import numpy

    groups = {
        "skill is known": list(chain.from_iterable(found["known"].values())),
        "same batches, skill is not known": list(chain.from_iterable(found["novel"].values())),
    }
    groups = {name: margins for name, margins in groups.items() if margins}
    every = [margin for margins in groups.values() for margin in margins]
    bins = numpy.geomspace(min(*every, 0.5) * 0.9, max(*every, 2.0) * 1.1, 60)
    figure, grid = style.new_figure()
    axes = grid[0, 0]
    for (label, margins), color in zip(groups.items(), style.COLORS, strict=False):
        counts, _ = numpy.histogram(margins, bins)
        axes.step(bins[:-1], counts, where="post", color=color, label=label)
        axes.fill_between(bins[:-1], counts, step="post", color=color, alpha=0.25, linewidth=0)
    axes.axvline(1, color=style.INK, linestyle="--", linewidth=1, label="threshold")
    limits: dict[str, Any] = {"xscale": "log", "ylim": (0, None)}
    return style.finish_curves(figure, axes, "distance / threshold", "batches", **limits)


def _over_stages(run: RunFiles, key: str) -> Any:
    found = run.results.get(key)
    if not found:
        return None
    stages = [stage["name"] for stage in run.results["stages"]]
    figure, grid = style.new_figure()
    axes = grid[0, 0]
    for column, name in enumerate(found["skills"]):
        values = [row[column] for row in found["matrix"]]
        points = [(stage, value) for stage, value in enumerate(values) if value is not None]
        if not points:
            continue
        looks = style.line_style(column, len(found["skills"]))
        axes.plot(*zip(*points, strict=True), label=style.shorten(name), **looks)
        taught = stages.index(name)
        if values[taught] is not None:
            axes.plot(taught, values[taught], "o", color=looks["color"], label="_")
    every = max(1, -(-len(stages) // 14))
    places = range(0, len(stages), every)
    names = [style.shorten(stages[place]) for place in places]
    axes.set_xticks(places, names, rotation=35, ha="right")
    return style.finish_curves(figure, axes, "after stage", LABELS[key], ylim=(0, None))

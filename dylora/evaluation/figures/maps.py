"""Heat maps: experts by site, measures by site, distances of skills, what a stream keeps.

Shape letters: N sites, E experts, K skills.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dylora.evaluation.figures.style import COLORS, WIDTH, new_figure, shorten
from dylora.evaluation.run_files import RunFiles

MOST_NAMES = 14  # on an axis of a heat map; more are numbered


def usage(run: RunFiles) -> Any:
    """Expert by site, a map for each set."""
    usage_of = run.routing.get("usage") or {}
    return usage_maps(usage_of, run.shared) if usage_of else None


def usage_maps(usage_of: Mapping[str, Sequence[Sequence[float]]], shared: int = 0) -> Any:
    """usage_of: by set, each expert's share of each site's gates, [N][E]. Drawn is the share of
    those that are chosen among, over an even one; the first `shared` are not."""
    import numpy

    maps = {name: _over_even(numpy.array(rows), shared) for name, rows in usage_of.items()}
    experts, sites = next(iter(maps.values())).shape
    columns = min(len(maps), 3 if len(maps) <= 9 else 4)
    lines = -(-len(maps) // columns)
    width = min(max(0.17 * sites, 1.5), 6.5 if columns == 1 else 2.6) * columns + 1.0
    height = (min(max(0.17 * experts, 1.1), 1.8) + 0.3) * lines + 0.4
    size: Any = {"rows": lines, "columns": columns, "sharex": True, "sharey": True}
    figure, grid = new_figure(max(width, 4.2), max(height, 2.2), **size)
    reach = 2.0 ** min(4, max(1, round(math.log2(max(experts, 2)))))
    image = None
    for axes, (name, values) in zip(grid.flat, maps.items(), strict=False):
        image = _draw_map(axes, values, reach)
        axes.set_title(shorten(name))
        _number(axes.xaxis, sites)
        _number(axes.yaxis, experts, shared)
    for axes in list(grid.flat)[len(maps) :]:
        axes.set_visible(False)
    figure.supxlabel("site", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    ticks = [1 / reach, 1, reach]
    looks: Any = {"shrink": min(1.0, 2.2 / height), "aspect": 15, "pad": 0.02, "extend": "both"}
    bar = figure.colorbar(image, ax=grid, ticks=ticks, **looks)
    bar.ax.set_yticklabels([f"1/{reach:.0f}", "even", f"{reach:.0f}×"])
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
    return figure


def sites(run: RunFiles) -> Any:
    """Information and entropy of each site at the end."""
    measures = {
        "information about the set (nats)": run.by_site("val/information"),
        "entropy of a token's routing (nats)": run.by_site("router/entropy"),
    }
    measures = {label: found for label, found in measures.items() if found}
    if not measures:
        return None
    count = len(measures)
    figure, grid = new_figure(WIDTH, 1.5 * count + 0.4, rows=count, sharex=True)
    for axes, (label, found) in zip(grid.flat, measures.items(), strict=True):
        values = list(found.values())
        axes.plot(range(len(values)), values, "o-", label=label, color=COLORS[0])
        axes.set(ylim=(min(0.0, *values), None))
        axes.set_title(label, loc="left")
        _whole(axes.xaxis)
    figure.supxlabel("site", fontsize=9)
    return figure


def similarity(run: RunFiles) -> Any:
    """How far the skills of a stream lie apart, in deviations within skills."""
    found = run.results.get("similarity")
    if not found:
        return None
    return _square(found["skills"], found["skills"], found["matrix"], "distance", "viridis_r")


def forgetting_map(run: RunFiles) -> Any:
    """Loss on each skill (a column) after every stage (a row)."""
    found = run.results.get("losses")
    if not found:
        return None
    stages = [stage["name"] for stage in run.results["stages"]]
    figure = _square(stages, found["skills"], found["matrix"], "loss (nats)", "viridis_r")
    figure.axes[0].set(xlabel="skill", ylabel="after stage")
    return figure


# Parts


def _over_even(usage_NE: Any, shared: int) -> Any:
    """[E, N]: each routed expert's share over an even one."""
    routed = usage_NE[:, shared:]
    sums = routed.sum(-1, keepdims=True).clip(1e-12)
    return (routed / sums * routed.shape[1]).T


def _draw_map(axes: Any, values: Any, reach: float) -> Any:
    """A map that diverges around 1, on a logarithmic scale from 1 / reach to reach."""
    import numpy
    from matplotlib.colors import LogNorm

    axes.grid(visible=False)
    return axes.imshow(
        numpy.maximum(values, 1e-6),
        cmap="RdBu_r",
        norm=LogNorm(1 / reach, reach),
        aspect="auto",
        interpolation="nearest",
    )


def _number(axis: Any, count: int, first: int = 0) -> None:
    """Ticks at some of `count` places, numbered from `first`."""
    every = max(1, -(-count // 8))
    places = list(range(0, count, every))
    axis.set_ticks(places, [str(first + place) for place in places])


def _whole(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True))


def _square(
    rows: Sequence[str], columns: Sequence[str], values: Any, unit: str, colors: str
) -> Any:
    """A map of named rows and columns, with its numbers where they fit."""
    import numpy

    numbers = numpy.array(values, dtype=float)  # None: not taken
    named = max(len(rows), len(columns)) <= MOST_NAMES
    widest = max(map(len, columns)) if named else 2
    cell = 0.44 if named else 0.16
    width, height = 2.0 + cell * len(columns), 1.0 + 0.32 * len(rows) * (1 if named else 0.5)
    figure, grid = new_figure(max(width, 3.4), max(height + 0.05 * widest, 2.0))
    axes = grid[0, 0]
    axes.grid(visible=False)
    image = axes.imshow(numbers, cmap=colors, aspect="auto", interpolation="nearest")
    if named:
        axes.set_xticks(range(len(columns)), map(shorten, columns), rotation=40, ha="right")
        axes.set_yticks(range(len(rows)), map(shorten, rows))
        middle = numpy.nanmean([numpy.nanmin(numbers), numpy.nanmax(numbers)])
        for (row, column), value in numpy.ndenumerate(numbers):
            if not math.isnan(value):
                color = "white" if value > middle else "black"
                text = f"{value:.2f}"
                axes.text(column, row, text, ha="center", va="center", color=color, fontsize=7)
    else:
        _number(axes.xaxis, len(columns))
        _number(axes.yaxis, len(rows))
    bar = figure.colorbar(image, ax=axes, label=unit, aspect=15, pad=0.02)
    bar.outline.set_visible(False)
    return figure

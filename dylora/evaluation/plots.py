"""Plots of a run; matplotlib is imported only here, and only when a plot is drawn."""

import itertools
import json
from pathlib import Path
from typing import Any

from torch import Tensor


def plot_loss(metrics_file: Path, out: Path) -> None:
    """Training and validation loss (nats per target token) over steps, from metrics.jsonl."""
    rows, (figure, axes) = read_rows(metrics_file), new_figure(7, 4)
    _plot(axes, rows, "train/lm_loss", label="training", color="0.6")
    style: dict[str, Any] = {"color": "black", "marker": "o", "markersize": 3}
    _plot(axes, rows, "val/loss", label="validation, all sets", **style)
    prefix = "val/loss/"
    for key in sorted({key for row in rows for key in row if key.startswith(prefix)}):
        _plot(axes, rows, key, label=key.removeprefix(prefix), linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss (nats per target token)", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)


def plot_maturity(metrics_file: Path, out: Path) -> None:
    """Maturity of each expert over steps."""
    rows, (figure, axes) = read_rows(metrics_file), new_figure(7, 3)
    known = {key for row in rows for key in row}
    for expert in itertools.takewhile(lambda e: f"expert/{e}/maturity" in known, itertools.count()):
        _plot(axes, rows, f"expert/{expert}/maturity", label=f"expert {expert}")
    axes.set(xlabel="step", ylabel="maturity", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)


def _plot(axes: Any, rows: list[dict[str, Any]], key: str, **style: Any) -> None:
    points = [(row["step"], row[key]) for row in rows if key in row]
    if points:
        axes.plot(*zip(*points, strict=True), **style)


def plot_usage(usage_of: dict[str, Tensor], out: Path) -> None:
    """One heatmap per set: expert × site, 1 = balanced; usage_of: shares of gates [N, E] by set."""
    from matplotlib import pyplot

    columns = min(3, len(usage_of))
    lines = -(-len(usage_of) // columns)
    shape: Any = {"figsize": (3.2 * columns, 2.6 * lines), "squeeze": False}
    figure, grid = pyplot.subplots(
        lines, columns, **shape, layout="constrained", sharex=True, sharey=True
    )
    image: Any = None
    experts = next(iter(usage_of.values())).shape[1]
    for axes, (name, usage_NE) in zip(grid.flat, usage_of.items(), strict=False):
        relative = (usage_NE * experts).T.numpy()
        image = axes.imshow(relative, vmin=0, vmax=max(2.0, experts / 2), cmap="viridis")
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(usage_NE.shape[0]))
        axes.set_yticks(range(experts))
    for axes in list(grid.flat)[len(usage_of) :]:
        axes.set_visible(False)
    figure.supxlabel("site", fontsize=9)
    figure.supylabel("expert", fontsize=9)
    figure.colorbar(image, ax=grid, label="share of the gate mass × experts (1 = balanced)")
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def plot_forgetting(stages: list[str], scores: dict[str, Any], out: Path) -> None:
    """Each skill's loss, and pass rate if there is one, after every stage; the circle is the stage
    that taught it. scores: by losses and passed, `skills` [K] and `matrix` [S][K]."""
    from matplotlib import pyplot

    shape: Any = {"figsize": (5.5 * len(scores), 3.6), "squeeze": False, "dpi": 120}
    figure, grid = pyplot.subplots(1, len(scores), **shape, layout="constrained")
    labels = {"losses": "loss (nats per target token)", "passed": "share of answers that pass"}
    for axes, (key, found) in zip(grid.flat, scores.items(), strict=True):
        for column, name in enumerate(found["skills"]):
            values = [row[column] for row in found["matrix"]]
            taught = stages.index(name)
            points = [(stage, value) for stage, value in enumerate(values) if value is not None]
            if not points:
                continue
            (line,) = axes.plot(*zip(*points, strict=True), label=name, linewidth=1)
            if values[taught] is not None:
                axes.plot(taught, values[taught], "o", color=line.get_color())
        axes.set_xticks(range(len(stages)), stages, rotation=45, ha="right", fontsize=8)
        axes.set(xlabel="after stage", ylabel=labels[key], ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    grid.flat[0].legend(frameon=False, fontsize=8)
    figure.savefig(out)
    pyplot.close(figure)


def plot_similarity(names: list[str], distances_KK: Tensor, out: Path) -> None:
    """A heatmap of the distances between skills."""
    figure, axes = new_figure(2.5 + 0.45 * len(names), 2 + 0.4 * len(names))
    image = axes.imshow(distances_KK.numpy(), cmap="viridis_r")
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(image, ax=axes, label="distance (deviations within skills)")
    figure.savefig(out)


def plot_novelty(known: dict[str, list[float]], novel: dict[str, list[float]], out: Path) -> None:
    """Distributions of margins on a logarithmic axis, of batches of known and of new skills, and
    the threshold at 1."""
    import numpy

    figure, axes = new_figure(7, 3.5)
    groups = {"known skill": known, "the same batches, skill not in the library": novel}
    chained = itertools.chain.from_iterable
    margins = {name: list(chained(group.values())) for name, group in groups.items()}
    found = [m for group in margins.values() for m in group]
    bins = numpy.geomspace(min(*found, 0.5) * 0.9, max(*found, 2.0) * 1.1, 60)
    for (label, values), color in zip(margins.items(), ("tab:green", "tab:red"), strict=True):
        axes.hist(values, bins=bins, label=label, color=color, alpha=0.6)
    axes.axvline(1, color="black", linestyle="--", label="threshold")
    axes.set(xscale="log", xlabel="distance / threshold (new above 1)", ylabel="batches")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)


def read_rows(metrics_file: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that was cut short."""
    rows = []
    for line in metrics_file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure in inches and its axes; a list of them for several columns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size: Any = {"figsize": (width, height), "dpi": 120, "layout": "constrained"}
    figure, grid = pyplot.subplots(1, columns, squeeze=False, sharey=True, **size)
    for axes in grid[0]:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, grid[0][0] if columns == 1 else list(grid[0])

"""Plots of a run; matplotlib is imported only here, and only when a plot is drawn."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor


def plot_loss(metrics_file: Path, out: Path) -> None:
    """Training and validation loss (nats per target token) over steps, from metrics.jsonl."""
    rows = read_rows(metrics_file)
    figure, axes = _figure(7, 4)
    for key, label, style in [
        ("train/lm_loss", "training", {"color": "0.6"}),
        ("val/loss", "validation, all sets", {"color": "black", "marker": "o", "markersize": 3}),
    ]:
        points = [(row["step"], row[key]) for row in rows if key in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    prefix = "val/loss/"
    for key in sorted({key for row in rows for key in row if key.startswith(prefix)}):
        points = [(row["step"], row[key]) for row in rows if key in row]
        axes.plot(*zip(*points, strict=True), label=key.removeprefix(prefix), linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss (nats per target token)", ylim=(0, None))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)


def plot_maturity(metrics_file: Path, out: Path) -> None:
    """Maturity of each expert over steps."""
    rows = read_rows(metrics_file)
    rows = [row for row in rows if "expert/0/maturity" in row]
    figure, axes = _figure(7, 3)
    expert = 0
    while rows and f"expert/{expert}/maturity" in rows[0]:
        values = [row[f"expert/{expert}/maturity"] for row in rows]
        axes.plot([row["step"] for row in rows], values, label=f"expert {expert}")
        expert += 1
    axes.set(xlabel="step", ylabel="maturity", ylim=(0, 1.05))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(out)


def plot_usage(usage_of: dict[str, Tensor], out: Path) -> None:
    """One heatmap per set: expert × site, 1 = a balanced share.

    usage_of: name of a set -> shares of each site's gate mass [N, E].
    """
    from matplotlib import pyplot

    columns = min(3, len(usage_of))
    lines = -(-len(usage_of) // columns)
    figure, grid = pyplot.subplots(
        lines,
        columns,
        figsize=(3.2 * columns, 2.6 * lines),
        squeeze=False,
        layout="constrained",
        sharex=True,
        sharey=True,
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


def read_rows(metrics_file: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without a last line that was cut short."""
    rows = []
    for line in metrics_file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(width, height), dpi=120, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes

"""Figures of a run in Python: each draws one file, whose ending says its format."""

from pathlib import Path
from typing import Any

from torch import Tensor

from dylora.evaluation.figures import curves, maps
from dylora.evaluation.figures.style import save_figure, styled
from dylora.evaluation.run_files import RunFiles, read_rows


def plot_loss(metrics_file: Path, out: Path) -> None:
    """Training and validation loss (nats per target token) over steps, from metrics.jsonl."""
    _save(curves.loss, metrics_file, out)


def plot_maturity(metrics_file: Path, out: Path) -> None:
    """Maturity of each expert over steps."""
    _save(curves.maturity, metrics_file, out)


def plot_usage(usage_of: dict[str, Tensor], out: Path) -> None:
    """Expert by site, a map for each set; usage_of: shares of gates [N, E] by set."""
    with styled():
        figure = maps.usage_maps({name: found.tolist() for name, found in usage_of.items()})
    save_figure(figure, out)


def _save(draw: Any, metrics_file: Path, out: Path) -> None:
    rows = read_rows(metrics_file)
    run = RunFiles(metrics_file.parent, rows, [], "", {}, {}, {}, [])
    with styled():
        figure = draw(run)
    if figure is None:
        raise ValueError(f"{metrics_file} has no row of what is to be drawn")
    save_figure(figure, out)

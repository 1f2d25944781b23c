"""Every figure of a run, by the name that `run.py plot --figure` takes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dylora.evaluation.figures import curves, maps, streams
from dylora.evaluation.figures.style import Format, save_figure, styled
from dylora.evaluation.run_files import RunFiles


class FigureKind(NamedTuple):
    """One figure."""

    draw: Callable[[RunFiles], Any]  # None where the run has nothing of it
    title: str

    @property
    def caption(self) -> str:
        """What it shows: the function's docstring."""
        return " ".join((self.draw.__doc__ or "").split())


FIGURES = {
    "loss": FigureKind(curves.loss, "Loss"),
    "loss_log": FigureKind(curves.loss_log, "Loss, logarithmic"),
    "rate": FigureKind(curves.rate, "Learning rate"),
    "speed": FigureKind(curves.speed, "Tokens a second"),
    "memory": FigureKind(curves.memory, "Memory"),
    "gradient": FigureKind(curves.gradient, "Gradient norm"),
    "maturity": FigureKind(curves.maturity, "Maturity of experts"),
    "share": FigureKind(curves.share, "Share of the gates, by expert"),
    "tokens": FigureKind(curves.tokens, "Tokens, by expert"),
    "expert_gradient": FigureKind(curves.expert_gradient, "Gradient norm, by expert"),
    "usage": FigureKind(maps.usage, "Which expert is used where, by set"),
    "sites": FigureKind(maps.sites, "Information and entropy, by site"),
    "information": FigureKind(curves.information, "What the expert says about the set"),
    "entropy": FigureKind(curves.entropy, "Entropy of routing"),
    "active": FigureKind(curves.active, "Experts that a token uses"),
    "collapse": FigureKind(curves.collapse, "Leading experts"),
    "dead": FigureKind(curves.dead, "Experts that are hardly used"),
    "sparse_cost": FigureKind(curves.sparse_cost, "Cost of sparsity"),
    "forgetting": FigureKind(streams.forgetting, "Loss on each skill, stage by stage"),
    "passed": FigureKind(streams.passed, "Answers that pass, stage by stage"),
    "forgetting_map": FigureKind(maps.forgetting_map, "Loss on each skill after every stage"),
    "similarity": FigureKind(maps.similarity, "Distance between skills"),
    "novelty": FigureKind(streams.novelty, "Margins of known and new skills"),
}


def draw(name: str, run: RunFiles) -> Any:
    """A figure by its name; None where the run has nothing of it."""
    with styled():
        return FIGURES[name].draw(run)


def save_figures(run: RunFiles, names: Sequence[str], folder: Path, form: Format) -> list[Path]:
    """Those of the named figures that the run has something of, as <folder>/<name>.<form>."""
    files = []
    for name in names:
        figure = draw(name, run)
        if figure is not None:
            save_figure(figure, folder / f"{name}.{form}")
            files.append(folder / f"{name}.{form}")
    return files

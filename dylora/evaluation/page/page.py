"""The page: its sections, put into one file that needs no network.

Everything that stands in it comes escaped, and its policy runs no script but its own.
"""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from dylora.evaluation.figures.catalogue import FIGURES, draw
from dylora.evaluation.page import comparison, tables
from dylora.evaluation.page.board import BoardFiles, is_board, read_board
from dylora.evaluation.page.svg import figure_markup
from dylora.evaluation.run_files import RunFiles, read_run
from dylora.storage.folders import write_file

PAGE = "report.html"
ASSETS = Path(__file__).parents[2] / "assets" / "report"
MOST_POINTS = 60_000  # numbers of metrics.jsonl that are drawn: a page of about 2 MB
WIDE = {"usage", "similarity", "forgetting_map"}  # figures as wide as the page


class PageFigure(NamedTuple):
    """A figure of the page; the second variant, if there is one, has a logarithmic scale."""

    title: str
    caption: str
    variants: list[str]  # HTML
    wide: bool = False


@dataclass
class Section:
    """One part of the page; what is empty is left out of it."""

    id: str
    title: str
    text: str = ""
    tables: list[tuple[str, list[str], list[list[str]]]] = field(default_factory=list)
    figures: list[PageFigure] = field(default_factory=list)
    texts: dict[str, Any] | None = None
    answers: list[tuple[str, str, list[dict[str, Any]]]] = field(default_factory=list)
    files: list[tuple[str, str]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.tables or self.figures or self.texts or self.answers or self.files)


def write_page(folders: Sequence[Path], out: Path) -> None:
    """Write the report of a run, of several beside each other, or of a comparison's folder.

    Raises ImportError naming the extra, FileNotFoundError for a folder that holds no run, and
    ValueError for a file in it that cannot be parsed and for a comparison among other folders.
    """
    board = next(filter(is_board, folders), None)
    if board is None:
        runs = [read_run(folder, most_points=MOST_POINTS // len(folders)) for folder in folders]
        if len(runs) == 1:
            title, summary, sections = runs[0].name, tables.summary(runs[0]), _sections(runs[0])
        else:
            title, summary, sections = f"{len(runs)} runs compared", [], _comparison(runs)
    elif len(folders) > 1:
        raise ValueError(f"{board} is of a comparison, which has a page of its own: give it alone")
    else:
        found = read_board(board, MOST_POINTS)
        runs = [run for group in found.runs.values() for run in group]
        title, summary, sections = found.title, [], _board(found)
    thinned = sorted({run.thinned for run in runs if run.thinned})
    if len(runs) == 1 and runs[0].routing.get("texts"):
        thinned.append(tables.thinned_texts(runs[0]))
    footer = "; ".join(["Written by dylora", *filter(None, thinned)]) + "."
    shown = [section for section in sections if not section.is_empty]
    write_file(out, _render(title=title, summary=summary, sections=shown, footer=footer))


def _sections(run: RunFiles) -> list[Section]:
    return [
        Section("results", "Results", tables=tables.results(run)),
        Section("training", "Training", figures=_figures(run, "loss rate speed memory gradient")),
        Section(
            "experts",
            "Experts",
            tables=tables.experts(run),
            figures=_figures(run, "maturity share tokens expert_gradient"),
        ),
        Section(
            "routing",
            "Routing",
            text="Share of the gates over an even one: blue is less, red is more than even.",
            figures=_figures(
                run, "usage information sites entropy active collapse dead sparse_cost"
            ),
        ),
        Section(
            "tokens",
            "Which expert leads each token",
            text="The colour is the expert with the largest gate among those that are chosen, the "
            "stronger the larger it is; prompts are paler. Hover or touch a token for its gates.",
            texts=tables.texts(run),
        ),
        Section("answers", "Answers", answers=tables.answers(run)),
        Section(
            "stream",
            "Skills one after another",
            tables=tables.stages(run),
            figures=_figures(run, "forgetting passed forgetting_map similarity novelty"),
        ),
        Section("settings", "Settings and environment", files=tables.files(run)),
    ]


def _comparison(runs: list[RunFiles]) -> list[Section]:
    groups = comparison.grouped(runs)
    return [
        Section(
            "results",
            "Final numbers",
            text="Runs that differ in their name and seeds alone are one group: the mean of its "
            "runs, with Student's 95 % interval over them.",
            tables=comparison.final_numbers(groups),
        ),
        *_curves_and_settings(groups, [(run.name, run.config) for run in runs if run.config]),
    ]


def _board(found: BoardFiles) -> list[Section]:
    first = [(name, runs[0].config) for name, runs in found.runs.items() if runs[0].config]
    return [
        Section("results", "Results", text=" ".join(found.notes), tables=found.tables),
        *_curves_and_settings(found.runs, first),
    ]


def _curves_and_settings(groups: comparison.Groups, files: list[tuple[str, str]]) -> list[Section]:
    figures = [
        PageFigure(title, caption, _markup(f"compared-{number}", variants, title))
        for number, (title, caption, variants) in enumerate(comparison.figures(groups))
    ]
    return [
        Section("curves", "Curves", figures=figures),
        Section("differences", "What differs", tables=comparison.differences(groups)),
        Section("settings", "Settings", files=files),
    ]


def _figures(run: RunFiles, names: str) -> list[PageFigure]:
    """Those of the named figures that the run has something of."""
    found = []
    for name in names.split():
        variants = [draw(name, run)]
        if name == "loss":
            variants.append(draw("loss_log", run))
        variants = [figure for figure in variants if figure is not None]
        if variants:
            title, caption = FIGURES[name].title, FIGURES[name].caption
            markup = _markup(f"figure-{name}", variants, title)
            found.append(PageFigure(title, caption, markup, name in WIDE))
    return found


def _markup(name: str, variants: Sequence[Any], title: str) -> list[str]:
    """All but the first hidden."""
    found = [figure_markup(f"{name}-{n}", figure, title) for n, figure in enumerate(variants)]
    return [
        *found[:1],
        *(one.replace('class="plot"', 'class="plot" hidden', 1) for one in found[1:]),
    ]


def _render(**context: Any) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'dylora[report]'") from error
    script = (ASSETS / "report.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(
        loader=FileSystemLoader(ASSETS), autoescape=True, undefined=StrictUndefined
    )
    css = (ASSETS / "report.css").read_text("utf-8")
    assets = {"css": css, "js": script, "script_hash": f"sha256-{digest}"}
    return environment.get_template("report.html").render(**assets, **context)

"""The one style of all figures: sizes, colours that colour-blind readers can tell apart, legends.

Figures are made without pyplot, so that no state of a caller's is touched.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dylora.evaluation.run_files import Points

Format = Literal["pdf", "svg", "png"]

INK, RULE = "#1b1c1d", "#d3d4d5"  # a page replaces them by its own, light or dark
# Okabe and Ito 2008, without the black and the yellow, which one of two backgrounds would hide.
COLORS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c8c8c")
DASHES = ("-", "--", ":")
MANY = len(COLORS) * len(DASHES)  # lines; more are told apart by a colour bar
WIDTH, HEIGHT = 5.0, 2.8  # inches of a figure of curves, without its legend
LONGEST_NAME = 26
STYLE: dict[str, Any] = {
    "font.size": 9,
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3,
    "pdf.fonttype": 42,  # text stays text that can be searched
    "svg.fonttype": "none",
    "svg.hashsalt": "dylora",  # the same figure is the same file
    "figure.dpi": 120,
    "savefig.dpi": 150,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def styled() -> Iterator[None]:
    """Within this context matplotlib has the style. Raises ImportError naming the extra."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'dylora[report]'") from error
    rc: Any = STYLE
    with matplotlib.rc_context(rc):
        yield


def new_figure(
    width: float = WIDTH, height: float = HEIGHT, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Any, Any]:
    """A figure in inches, and its axes [rows, columns]; to be called within `styled`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save_figure(figure: Any, out: Path, format: Format | None = None) -> None:
    """Write a figure; the file's ending, or `format`, says as what."""
    with styled():
        date = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
        form = format or out.suffix.removeprefix(".")
        figure.savefig(out, format=form, metadata=date.get(form))


def svg_of(figure: Any) -> str:
    """A figure as text of an SVG, without the lines before <svg>."""
    stream = io.StringIO()
    with styled():
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def line_style(index: int, count: int) -> dict[str, Any]:
    """Colour and dashes of one of `count` lines."""
    if count > MANY:
        from matplotlib import colormaps

        return {"color": colormaps["viridis"](0.05 + 0.85 * index / (count - 1))}
    dash = DASHES[index // len(COLORS) % len(DASHES)]
    return {"color": COLORS[index % len(COLORS)], "linestyle": dash}


def draw_curves(
    figure: Any, axes: Any, curves: Mapping[str, Points], *, counted: str = "", **style: Any
) -> None:
    """One line for each of several named series; too many to tell apart are coloured by number.

    counted: what they are numbers of, such as expert: the colour bar's label.
    """
    for index, (name, points) in enumerate(curves.items()):
        looks = line_style(index, len(curves)) | {"marker": "o" if len(points) == 1 else None}
        (line,) = axes.plot(*zip(*points, strict=True), label=shorten(name), **(looks | style))
        line.is_numbered = len(curves) > MANY
    if len(curves) > MANY:
        _number_bar(figure, axes, len(curves), counted)


def _number_bar(figure: Any, axes: Any, count: int, label: str) -> None:
    """A colour bar that tells lines by their number."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    listed = ListedColormap([colormaps["viridis"](0.05 + 0.85 * n / 255) for n in range(256)])
    numbers = ScalarMappable(Normalize(0, count - 1), listed)
    bar = figure.colorbar(numbers, ax=axes, label=label, aspect=25, pad=0.02)
    bar.outline.set_visible(False)


def add_legend(figure: Any, handles: Sequence[Any]) -> None:
    """A legend of these lines below the axes, for which the figure grows: none of it is covered."""
    names = [handle.get_label() for handle in handles]
    if not names:
        return
    width, height = figure.get_size_inches()
    columns = max(1, min(len(names), int(width / (0.068 * max(map(len, names)) + 0.5))))
    lines = -(-len(names) // columns)
    figure.set_size_inches(width, height + 0.17 * lines)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


def finish_curves(figure: Any, axes: Any, xlabel: str, ylabel: str, **limits: Any) -> Any:
    """Label the axes, and name the lines below them unless a colour bar does or there is but one;
    returns the figure."""
    axes.set(xlabel=xlabel, ylabel=ylabel, **limits)
    if limits.get("ylim") == (0, None):  # the default margin is of the values' range alone
        axes.set_ylim(0, 1.06 * axes.dataLim.y1 or 1)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            _number_log(axis)
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    listed = [line for line in named if not getattr(line, "is_numbered", False)]
    if len(named) > 1:
        add_legend(figure, listed)
    return figure


def _number_log(axis: Any) -> None:
    """Plain numbers at 1, 2 and 5 of each decade, as one decade is often all there is."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def shorten(name: str) -> str:
    """A name that fits a legend, and that matplotlib takes for no markup and no hidden label."""
    name = name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"
    return name.replace("$", r"\$").lstrip("_") or "–"

"""A matplotlib figure as a part of a page: an SVG in its colours, and what hovering tells."""

import json
import math
import re
from html import escape
from typing import Any

from dylora.evaluation.figures.style import INK, RULE, styled, svg_of

LEAST = 0.7  # of its width, to which a wide figure shrinks before it scrolls sideways
MOST_LINES = 64  # that hovering looks through in one set of axes


def figure_markup(name: str, figure: Any, title: str) -> str:
    """The SVG of a figure and, as JSON, where its values lie. name: unique in the page."""
    described = json.dumps(describe(figure), separators=(",", ":"))
    return (
        f'<div class="plot" id="{escape(name)}">{_svg(name, figure, title)}'
        f'<script type="application/json">{script_text(described)}</script></div>'
    )


def script_text(text: str) -> str:
    """JSON that no tag can end, whatever it holds."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _svg(name: str, figure: Any, title: str) -> str:
    """With ids of its own, the page's font, and ink and rules in the page's colours."""
    text = svg_of(figure)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r" *font-family: [^;\"]*;?", "", text)
    text = re.sub(r'( id="|url\(#|xlink:href="#)', rf"\g<1>{name}-", text)
    text = text.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    text = re.sub(r'="[^"]*"', _rounded, text)
    text = re.sub(r"\n\s*", "\n", text)
    width = figure.get_figwidth() * 96  # pixels of CSS
    style = f"width: {width:.0f}px; --least: {LEAST * width:.0f}px"
    size = f'<svg role="img" aria-label="{escape(title)}" style="{style}"'
    return re.sub(r'<svg([^>]*?) width="[^"]*" height="[^"]*"', rf"{size}\1", text, count=1)


def _rounded(attribute: "re.Match[str]") -> str:
    """Coordinates in hundredths of a point, which are enough."""
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])


def describe(figure: Any) -> list[dict[str, Any]]:
    """Of each axes: its box in shares of the figure (y down), limits, and lines or a map."""
    with styled():
        figure.draw_without_rendering()
    found = []
    for axes in figure.axes:
        if not axes.get_visible() or axes.get_label() == "<colorbar>":
            continue
        box = axes.get_position()
        one: dict[str, Any] = {"box": [box.x0, 1 - box.y1, box.width, box.height]}
        one["box"] = [round(float(share), 4) for share in one["box"]]
        if axes.images:
            one |= _map(axes, axes.images[0])
        else:
            one |= _curves(axes)
        found.append(one)
    return found


def _curves(axes: Any) -> dict[str, Any]:
    lines = [line for line in axes.lines if not line.get_label().startswith("_")]
    horizontal = [line for line in lines if line.get_transform() != axes.transData]
    ticks = axes.get_xticks()
    names = [label.get_text() for label in axes.get_xticklabels()]
    fixed = any(character.isalpha() for name in names for character in name)
    return {
        "x": [*map(float, axes.get_xlim()), axes.get_xscale() == "log"],
        "y": [*map(float, axes.get_ylim()), axes.get_yscale()],
        "names": dict(zip(map(str, map(int, ticks)), names, strict=True)) if fixed else {},
        "xlabel": axes.get_xlabel() or axes.figure.get_supxlabel(),
        "lines": [
            {
                "name": line.get_label().replace(r"\$", "$"),
                "color": _color(line),
                "points": [[_number(value) for value in point] for point in line.get_xydata()],
            }
            for line in lines[:MOST_LINES]
            if line not in horizontal
        ],
    }


def _map(axes: Any, image: Any) -> dict[str, Any]:
    rows, columns = image.get_array().shape
    return {
        "title": axes.get_title().replace(r"\$", "$"),
        "rows": _names(axes.get_yticks(), axes.get_yticklabels(), rows),
        "columns": _names(axes.get_xticks(), axes.get_xticklabels(), columns),
        "ylabel": axes.get_ylabel() or axes.figure.get_supylabel(),
        "xlabel": axes.get_xlabel() or axes.figure.get_supxlabel(),
        "map": [[_number(value) for value in row] for row in image.get_array().filled(math.nan)],
    }


def _names(ticks: Any, labels: Any, count: int) -> list[str]:
    """Of all places: the ticks' own where each has one, else numbers from the first tick's."""
    texts = [label.get_text() for label in labels]
    if len(texts) == count:
        return texts
    first = int(texts[0]) if texts and texts[0].isdecimal() else 0
    return [str(first + place) for place in range(count)]


def _color(line: Any) -> str:
    from matplotlib.colors import to_hex

    color = to_hex(line.get_color())
    return "currentColor" if color == INK else color


def _number(value: float) -> float | None:
    """With four digits; None: no value."""
    return float(f"{value:.4g}") if math.isfinite(value) else None

"""`run.py plot`: figures of a run, each as a file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dylora.fields import nearest, option


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Figures of a run as PDF, SVG or PNG, for papers."""

    run: str = option(metavar="DIR", positional=True)
    """Folder of a run or a stream."""
    figure: list[str] = option([], metavar="NAME [NAME ...]", many=True)
    """loss, maturity, usage and so on (docs/report.md has all); none: all that the run has."""
    format: Literal["pdf", "svg", "png"] = "pdf"
    """Of the files."""
    out: str | None = option(None, metavar="DIR")
    """Folder of the files; none: the run's own."""


def run(options: PlotOptions, overrides: list[str]) -> None:
    from dylora.evaluation.figures.catalogue import FIGURES, save_figures
    from dylora.evaluation.run_files import read_run

    for name in options.figure:
        if name not in FIGURES:
            raise ValueError(f"--figure: there is no figure {name}{nearest(name, list(FIGURES))}")
    folder = Path(options.run)
    out = folder if options.out is None else Path(options.out)
    found = read_run(folder)
    out.mkdir(parents=True, exist_ok=True)
    try:
        files = save_figures(found, options.figure or list(FIGURES), out, options.format)
    except ImportError as error:
        raise ValueError(str(error)) from error
    drawn = {file.stem for file in files}
    if missing := [name for name in options.figure if name not in drawn]:
        raise ValueError(
            f"{folder} holds nothing of {', '.join(missing)}: its run did not write it"
        )
    print(f"wrote {out}/: {', '.join(file.name for file in files)}")

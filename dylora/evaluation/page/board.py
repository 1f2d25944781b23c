"""The folder of a comparison, as `run.py compare` leaves it: what its report says, and the runs of
the cells that it chose."""

from pathlib import Path
from typing import Any, NamedTuple

from dylora.evaluation.page.comparison import Groups
from dylora.evaluation.page.tables import Table
from dylora.evaluation.run_files import read_run
from dylora.fields import FieldError
from dylora.run_config import MAX_NAME, require_folder_name
from dylora.storage.safe_io import MAX_JSON, read_bytes, read_json

REPORT = "report.json"


class BoardFiles(NamedTuple):
    """A comparison, read."""

    title: str
    tables: list[Table]  # of report.md
    notes: list[str]  # the rule, which rows were chosen by, what intervals are
    runs: Groups  # of each method the runs of its chosen cell at equal steps, one a seed


def is_board(folder: Path) -> bool:
    """Whether it is of a comparison, finished or not, and of no run."""
    begun = any(folder.glob("*/*-seed*/metrics.jsonl"))
    return not (folder / "metrics.jsonl").exists() and (begun or (folder / REPORT).exists())


def read_board(folder: Path, most_points: int) -> BoardFiles:
    """Raises ValueError for a comparison that has not ended, and for a file of it that cannot be
    parsed; most_points: see `read_run`, for all of its runs."""
    if not (folder / REPORT).exists():
        raise ValueError(
            f"{folder} is of a comparison that has not ended: start run.py compare again, and it "
            "goes on"
        )
    chosen = {}
    try:
        for method in read_json(folder / REPORT)["methods"]:
            chosen[method["name"]] = _chosen_cells(folder, method)
    except (KeyError, TypeError, FieldError) as error:
        raise ValueError(f"{folder / REPORT}: not of run.py compare ({error!r})") from None
    points = most_points // max(1, sum(map(len, chosen.values())))
    runs = {
        name: [read_run(cell, most_points=points) for cell in cells]
        for name, cells in chosen.items()
        if cells
    }
    text = read_bytes(folder / "report.md", MAX_JSON).decode("utf-8")
    return BoardFiles(*parse_report(text), runs)


def _chosen_cells(folder: Path, method: dict[str, Any]) -> list[Path]:
    """The runs at the method's best rate and scale that have metrics."""
    require_folder_name(method["name"], MAX_NAME)
    rate, scale = method["choice"]["rate"], method["choice"]["scale"]
    cells = (folder / method["name"]).glob(f"{rate:g}-{scale:g}-seed*/metrics.jsonl")
    seeds = [(cell.parent.name.rpartition("seed")[2], cell.parent) for cell in cells]
    # Those at equal time end in their number of steps instead.
    return [
        cell for seed, cell in sorted(seeds, key=lambda one: one[0].zfill(20)) if seed.isdecimal()
    ]


def parse_report(text: str) -> tuple[str, list[Table], list[str]]:
    """Title, tables and paragraphs of report.md."""
    title, caption, notes = "", "", []
    tables: list[Table] = []
    for block in text.strip().split("\n\n"):
        if block.startswith("# "):
            title = block[2:]
        elif block.startswith("## "):
            caption = block[3:]
        elif block.startswith("|"):
            rows = [line.strip("| ").split(" | ") for line in block.splitlines()]
            tables.append((caption, rows[0], rows[2:]))
        else:
            notes.append(block)
    return title, tables, notes

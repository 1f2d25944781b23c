"""What a run, or a stream of runs, has left in its folder: what figures and reports are made of."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from dylora.fields import is_number
from dylora.storage.folders import checkpoints
from dylora.storage.safe_io import metrics_row, read_bytes, read_json

Row = dict[str, Any]
Points = list[tuple[float, float]]
MOST_CONFIG = 1 << 20  # bytes
ROUTING_FILE = "routing.json"


class RunFiles(NamedTuple):
    """A run's folder, read; what is missing in it is empty here."""

    folder: Path
    rows: list[Row]  # of metrics.jsonl; the stages of a stream one after another
    boundaries: list[tuple[int, str]]  # of a stream: the step at which each stage begins, its name
    config: str  # config.yaml
    environment: dict[str, Any]  # env.json
    results: dict[str, Any]  # results.json
    routing: dict[str, Any]  # routing.json: gates by set, and of the tokens of some texts
    experts: list[dict[str, Any]]  # the table of the last checkpoint
    thinned: str = ""  # what was left out of `rows`; empty: nothing

    @property
    def name(self) -> str:
        return str(self.settings.get("name") or self.folder.resolve().name)

    @property
    def settings(self) -> dict[str, Any]:
        """config.yaml as mappings; empty where it cannot be parsed."""
        import yaml

        try:
            found = yaml.safe_load(self.config)
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def shared(self) -> int:
        """Experts at the beginning that all tokens use, and nothing chooses."""
        return int(self.settings.get("moe", {}).get("shared_experts") or 0)

    def points(self, key: str) -> Points:
        """A metric over steps, as far as it is finite."""
        found = [(row["step"], row[key]) for row in self.rows if key in row]
        return [(step, value) for step, value in found if is_number(value)]

    def last(self, key: str) -> float | None:
        """The last finite value of a metric."""
        points = self.points(key)
        return points[-1][1] if points else None

    def keys(self, pattern: str) -> list[str]:
        """Names of metrics that a pattern matches as a whole, in the order they came in."""
        known = {key: None for row in self.rows for key in row}
        return [key for key in known if re.fullmatch(pattern, key)]

    def expert_numbers(self, metric: str) -> list[int]:
        """Those that ever had expert/<number>/<metric>, gaps included."""
        found = self.keys(rf"expert/\d+/{metric}")
        return sorted(int(key.split("/")[1]) for key in found)

    def by_site(self, prefix: str) -> dict[str, float]:
        """The last value of <prefix>/<site> for every site."""
        keys = self.keys(re.escape(prefix) + "/.+")
        found = {key.removeprefix(prefix + "/"): self.last(key) for key in keys}
        return {site: value for site, value in found.items() if value is not None}


def read_run(folder: Path, *, most_points: int | None = None) -> RunFiles:
    """Read what lies there. most_points: thin rows of metrics until about so many numbers
    are left.

    Raises FileNotFoundError for a folder without metrics, and ValueError for a file that cannot be
    parsed.
    """
    rows, boundaries = read_rows(folder / "metrics.jsonl"), []
    stages = sorted(folder.glob("stage-*-*"), key=lambda path: _stage_number(path.name))
    for stage in stages if not rows else []:
        last = rows[-1] if rows else {"step": 0}
        boundaries.append((last["step"], stage.name.split("-", 2)[2]))
        rows += [_after(last, row) for row in read_rows(stage / "metrics.jsonl")]
    if not rows and not stages:
        raise FileNotFoundError(f"{folder} holds no run: there are no rows in its metrics.jsonl")
    rows, thinned = _thin(rows, most_points)
    config = folder / "config.yaml"
    return RunFiles(
        folder=folder,
        rows=rows,
        boundaries=boundaries,
        config=read_bytes(config, MOST_CONFIG).decode("utf-8") if config.exists() else "",
        environment=_read_if_there(folder / "env.json"),
        results=_read_if_there(folder / "results.json"),
        routing=_read_if_there(folder / ROUTING_FILE),
        experts=_expert_table(folder),
        thinned=thinned,
    )


def read_rows(metrics_file: Path) -> list[Row]:
    """The rows of metrics.jsonl, without lines that are none (a last one may be cut short)."""
    lines = metrics_file.read_bytes().splitlines() if metrics_file.exists() else []
    return [row for row in map(metrics_row, lines) if row is not None]


def _after(last: Row, row: Row) -> Row:
    """A row of a stage, whose steps and tokens go on from the last row before it."""
    seen = {key: last.get(key, 0) + row[key] for key in ("step", "tokens") if key in row}
    return row | seen


def _stage_number(name: str) -> int:
    number = name.split("-")[1]
    return int(number) if number.isdecimal() else 0


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}


def _expert_table(folder: Path) -> list[dict[str, Any]]:
    """Of the newest checkpoint whose config.json can be read."""
    for path in reversed(checkpoints(folder)):
        try:
            return list(read_json(path / "config.json")["experts"])
        except (OSError, ValueError, KeyError):
            continue
    return []


def _is_curve(key: str) -> bool:
    """Whether all values of a metric are drawn; of a site's own, such as router/entropy/<site>,
    only the last is."""
    return not key.startswith("router/") or key.count("/") == 1


def _thin(rows: list[Row], most: int | None) -> tuple[list[Row], str]:
    """Every k-th of the rows of training steps, those of evaluations and the last one always."""
    total = sum(_is_curve(key) for row in rows for key in row)
    if most is None or total <= most:
        return rows, ""
    every = math.ceil(total / most)
    trained = [row for row in rows if "val/loss" not in row]
    kept = {id(row) for row in [*trained[::every], *trained[-1:]]}
    found = [row for row in rows if "val/loss" in row or id(row) in kept]
    return found, f"one of {every} rows of metrics.jsonl is drawn, and every evaluation"

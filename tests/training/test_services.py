"""Rows reach what trackio and mlflow keep by themselves, also after a run goes on."""

import json
import sqlite3
from pathlib import Path

import pytest

from dylora.run_config import LogConfig
from dylora.training import loggers
from dylora.training.log import RunLog


def log_twice(folder: Path, service: str, monkeypatch) -> None:
    """A run that logs step 1 and ends, and goes on at step 2."""
    monkeypatch.setattr(loggers, "SECONDS", 120.0)
    monkeypatch.chdir(folder)
    for step in (1, 2):
        log = RunLog(folder, LogConfig(report_to=[service], project="p"), "run", {"seed": 3})
        log.start(0, 2)
        log.write(step, 10 * step, {"train/loss": 3.0 - step})
        log.close()


@pytest.mark.slow
def test_trackio_keeps_every_row_of_a_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    log_twice(tmp_path, "trackio", monkeypatch)
    with sqlite3.connect(tmp_path / "trackio" / "p.db") as base:
        rows = base.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert [(name, step, json.loads(row)["train/loss"]) for name, step, row in rows] == [
        ("run", 1, 2.0),
        ("run", 2, 1.0),
    ]


@pytest.mark.slow
def test_mlflow_keeps_every_row_of_a_run_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    log_twice(tmp_path, "mlflow", monkeypatch)
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        runs = base.execute("select name, status from runs").fetchall()
        rows = base.execute("select step, value from metrics where key = 'train/loss'").fetchall()
    assert runs == [("run", "FINISHED")]
    assert sorted(rows) == [(1, 2.0), (2, 1.0)]

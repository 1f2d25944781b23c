"""The notebooks run from their first cell to their last, and are kept as they were run."""

import os
from itertools import groupby
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MOST_BYTES = 150_000


def outputs_of(notebook: Any) -> list[list[str]]:
    """The kinds of output of each cell of code, a text that came in pieces once, without what went
    to stderr."""
    return [
        [
            kind
            for kind, _ in groupby(
                output.output_type for output in cell.outputs if output.get("name") != "stderr"
            )
        ]
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def opened(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore")  # of Jupyter's own packages
def test_a_notebook_runs_and_leaves_the_outputs_that_it_is_kept_with(path, monkeypatch):
    kept, notebook = opened(path), opened(path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    place = {"metadata": {"path": str(path.parent)}}
    options = {"timeout": 900, "kernel_name": "python3", "coalesce_streams": True}
    NotebookClient(notebook, **options, resources=place).execute()
    assert outputs_of(notebook) == outputs_of(kept)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_small_and_as_it_was_run_in_one_go(path):
    cells = [cell for cell in opened(path).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any("error" in kinds for kinds in outputs_of(opened(path)))
    assert cells[-1].outputs  # it ends in something to show
    assert path.stat().st_size < MOST_BYTES


def test_there_are_notebooks():
    assert NOTEBOOKS

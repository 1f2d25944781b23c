"""A run's report is added to the card of its checkpoint."""

import pytest

from dylora.evaluation.passk.estimate import wilson
from dylora.evaluation.report import SetRow, card_lines, report_run
from dylora.storage.manifest import verify
from dylora.training.loop import train


def test_the_report_of_a_run_stands_on_the_card_of_its_checkpoint(make_config):
    run = train(make_config(max_steps=2))
    folder = run.folder / "checkpoint-2"
    assert "## Results" not in (folder / "README.md").read_text()
    (row,) = report_run(run)
    card = (folder / "README.md").read_text()
    assert f"| rows | {row.base_loss:.3f} | {row.trained_loss:.3f} |" in card.split("## Results")[1]
    verify(folder)


@pytest.mark.parametrize("passed", [0, 30, 50])
def test_a_share_of_answers_comes_with_its_interval(passed):
    row = SetRow("skill/sql", 4.0, 0.5, 0.0, passed / 50, 1, 1.0)
    found = wilson(passed, 50)
    told = f"{passed / 50:.0%} ({found.low:.0%} to {found.high:.0%})"
    assert any(line.endswith(f"| {told} |") for line in card_lines([row], 50))

"""A run's report is added to the card of its checkpoint."""

import math

import pytest
import torch

from dylora.evaluation.forgetting import t_quantile
from dylora.evaluation.passk.estimate import wilson
from dylora.evaluation.report import SetRow, card_lines, format_table, half_width, report_run
from dylora.storage.manifest import verify
from dylora.training.loop import train


def test_the_report_of_a_run_stands_on_the_card_of_its_checkpoint(make_config):
    run = train(make_config(max_steps=2))
    folder = run.folder / "checkpoint-2"
    assert "## Results" not in (folder / "README.md").read_text()
    (row,) = report_run(run)
    card = (folder / "README.md").read_text()
    told = f"| rows | {row.base_loss:.3f} | {row.trained_loss:.3f} ±{row.loss_half:.3f} |"
    assert told in card.split("## Results")[1]
    verify(folder)


def test_the_interval_of_a_loss_is_the_ratios_over_rows(make_config):
    run = train(make_config(max_steps=2))
    (row,), (rows,) = report_run(run), run.data.validation
    losses, targets = [], []
    for example in rows:
        labels = torch.tensor(example["labels"])[None]
        with torch.no_grad():
            out = run.model.eval()(torch.tensor(example["input_ids"])[None], labels=labels)
        targets.append(int((labels[:, 1:] != -100).sum()))
        losses.append(float(out.lm_loss) * targets[-1])
    count, loss = len(rows), sum(losses) / sum(targets)
    off = [x - loss * n for x, n in zip(losses, targets, strict=True)]
    error = math.sqrt(sum(e * e for e in off) / (count - 1) * count) / sum(targets)
    assert row.trained_loss == pytest.approx(loss, rel=1e-5)
    assert row.loss_half == pytest.approx(t_quantile(0.975, count - 1) * error, rel=1e-3)
    assert f"{loss:.3f} ±{row.loss_half:.3f}" in format_table([row], 0)
    assert half_width(math.nan, 1) is None


@pytest.mark.parametrize("passed", [0, 30, 50])
def test_a_share_of_answers_comes_with_its_interval(passed):
    row = SetRow("skill/sql", 4.0, 0.5, 0.0, passed / 50, 1, 1.0)
    found = wilson(passed, 50)
    told = f"{passed / 50:.0%} ({found.low:.0%} to {found.high:.0%})"
    assert any(line.endswith(f"| {told} |") for line in card_lines([row], 50))

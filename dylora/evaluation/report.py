"""The report at the end of a training run: a table by set, plots and results.json."""

import json
import time
from typing import NamedTuple

from torch import Tensor

from dylora.evaluation.passk.estimate import wilson
from dylora.evaluation.passk.skills import score_skills
from dylora.evaluation.plots import plot_loss, plot_maturity, plot_usage
from dylora.storage.folders import write_file
from dylora.storage.model_card import CARD, mixture_card
from dylora.storage.safe_io import read_json
from dylora.training.run import Run
from dylora.training.validation import SetScore, validate

SKILL_PREFIX = "skill/"


class SetRow(NamedTuple):
    """One line of the table."""

    name: str
    base_loss: float  # nats per target token, adapters off
    trained_loss: float
    base_passed: float | None  # share of test answers that pass their checker
    trained_passed: float | None
    expert: int | None  # the one with the largest share of the gate mass
    expert_share: float | None


def report_run(run: Run) -> list[SetRow]:
    """Compare the trained mixture with its own base; print, plot, and write results.json."""
    sets, model = run.data.validation, run.model
    batch_size, pad = run.config.eval.batch_size, run.pad_token_id
    trained = validate(model, sets, batch_size=batch_size, pad_token_id=pad)
    with model.disable_adapters():
        base = validate(model, sets, batch_size=batch_size, pad_token_id=pad)

    count = run.config.eval.skill_answers
    skills = [s.name.removeprefix(SKILL_PREFIX) for s in sets if s.name.startswith(SKILL_PREFIX)]
    trained_skills, base_skills, backend = {}, {}, None
    if count and skills:
        run.log.info(f"answering {count} test tasks of {len(skills)} skills, base and trained …")
        trained_skills = score_skills(model, run.tokenizer, skills, count)
        with model.disable_adapters():
            base_skills = score_skills(model, run.tokenizer, skills, count)
        backend = trained_skills[skills[0]].backend
        run.log.info(f"answers ran under {backend}")

    rows = []
    for name, score in trained.items():
        skill, usage = name.removeprefix(SKILL_PREFIX), score.usage_NE
        share_E = None if usage is None else routed_shares(usage, model.config.shared_experts)
        rows.append(
            SetRow(
                name,
                base[name].loss,
                score.loss,
                base_skills[skill].share if skill in base_skills else None,
                trained_skills[skill].share if skill in trained_skills else None,
                None if share_E is None else int(share_E.argmax()),
                None if share_E is None else float(share_E.max()),
            )
        )
    run.log.info(format_table(rows, count))
    results = {
        "step": run.model.training_record["step"],  # of the weights
        "best_step": run.progress.best_step,
        "test_answers_per_skill": count,
        "sandbox": backend,
        "sets": [row._asdict() for row in rows],
        "answers": {name: score.answers for name, score in trained_skills.items()},
        "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    (run.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _write_card(run, rows, count)
    names = ["results.json", *_draw_plots(run, trained)]
    run.log.info(f"wrote {run.folder}/: {', '.join(names)}")
    return rows


def _write_card(run: Run, rows: list[SetRow], count: int) -> None:
    """Add what was found to the card of the checkpoint that has these weights, if it was kept."""
    folder = run.folder / f"checkpoint-{run.model.training_record['step']}"
    if (folder / "config.json").exists():
        card = mixture_card(read_json(folder / "config.json"), card_lines(rows, count))
        write_file(folder / CARD, card)


def card_lines(rows: list[SetRow], count: int) -> list[str]:
    """The table as markdown; shares of passed answers with Wilson's 95 % interval."""
    lines = [
        "| set | base loss | loss | base passes | passes |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row.name, f"{row.base_loss:.3f}", f"{row.trained_loss:.3f}"]
        for share in (row.base_passed, row.trained_passed):
            if share is None:
                cells.append("")
            else:
                found = wilson(round(share * count), count)
                cells.append(f"{share:.0%} ({found.low:.0%} to {found.high:.0%})")
        lines.append(f"| {' | '.join(cells)} |")
    told = "Losses in nats per target token, on validation rows"
    passes = f"; shares of {count} test answers, with 95 % intervals"
    return [
        *lines,
        "",
        told + (passes if any(row.trained_passed is not None for row in rows) else "") + ".",
    ]


def routed_shares(usage_NE: Tensor, shared: int) -> Tensor:
    """Each expert's mean share of what routers give, [E]; the shared ones, which have no part in
    that, 0."""
    routed_NE = usage_NE.clone()
    routed_NE[:, :shared] = 0
    return (routed_NE / routed_NE.sum(-1, keepdim=True).clamp_min(1e-12)).mean(0)


def _draw_plots(run: Run, scores: dict[str, SetScore]) -> list[str]:
    """Draw what can be drawn, and say what cannot; returns the names of the files."""
    folder, metrics, names = run.folder, run.folder / "metrics.jsonl", ["loss.png", "maturity.png"]
    usage = {name: score.usage_NE for name, score in scores.items() if score.usage_NE is not None}
    try:
        plot_loss(metrics, folder / names[0])
        plot_maturity(metrics, folder / names[1])
        if usage:
            names.append("usage.png")
            plot_usage(usage, folder / names[2])
    except (ImportError, OSError) as error:
        remedy = (
            "pip install 'dylora[report]'" if isinstance(error, ImportError) else "free some space"
        )
        run.log.info(f"warning: plots are left out ({error}): {remedy}")
        return []
    return names


def format_table(rows: list[SetRow], count: int) -> str:
    """The table as plain text; the columns of passed answers only where there are any."""
    with_answers = any(row.trained_passed is not None for row in rows)
    passes = f" {'base passes':>12} {'trained':>8}" if with_answers else ""
    header = f"{'set':20} {'base loss':>10} {'trained':>8}{passes}   expert (share)"
    lines = [header, "-" * len(header)]
    for row in rows:
        line = f"{row.name:20} {row.base_loss:10.3f} {row.trained_loss:8.3f}"
        if with_answers:
            passed = (row.base_passed, row.trained_passed)
            first, second = ("-" if share is None else f"{share:.0%}" for share in passed)
            line += f" {first:>12} {second:>8}"
        lines.append(
            line + ("" if row.expert is None else f"   {row.expert} ({row.expert_share:.0%})")
        )
    if with_answers:
        lines.append(f"loss in nats per target token, on validation; {count} test answers a skill")
    return "\n".join(lines)

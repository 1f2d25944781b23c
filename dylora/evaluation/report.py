"""What follows a training run: results.json and a table by set, then figures and report.html."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dylora.data.tokenize import TokenizedSet
from dylora.evaluation.figures.catalogue import save_figures
from dylora.evaluation.forgetting import t_quantile
from dylora.evaluation.page.page import PAGE, write_page
from dylora.evaluation.passk.estimate import wilson
from dylora.evaluation.passk.skills import SkillScore, score_skills
from dylora.evaluation.report_text import describe_routing, format_loss, format_share
from dylora.evaluation.routing_texts import write_routing
from dylora.evaluation.run_files import ROUTING_FILE, read_run
from dylora.model import DyLoRA_MoE
from dylora.routing.metrics import routed_shares
from dylora.storage.folders import write_file
from dylora.storage.model_card import CARD, mixture_card
from dylora.storage.safe_io import read_json
from dylora.training.run import Run
from dylora.training.validation import SetScore, active_parameters, validate

SKILL_PREFIX = "skill/"
FIGURES = ["loss", "maturity", "usage"]  # that a run leaves as PNG; report.html has all


class SetRow(NamedTuple):
    """One line of the table."""

    name: str
    base_loss: float  # nats per target token, adapters off
    trained_loss: float
    base_passed: float | None  # share of test answers that pass their checker
    trained_passed: float | None
    expert: int | None  # the one with the largest share of the gate mass
    expert_share: float | None
    targets: int = 0  # tokens that the losses are means over
    loss_half: float | None = None  # of trained_loss's 95 % interval over rows, the half


def report_run(run: Run) -> list[SetRow]:
    """Compare the trained mixture with its own base; print, write results.json, then draw.

    Whatever becomes of the figures and the page, the results are there before.
    """
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

    rows = [_set_row(model, one, base, trained, base_skills, trained_skills) for one in sets]
    routing = routing_summary(model, trained)
    run.log.info(format_table(rows, count))
    if routing is not None:
        run.log.info(describe_routing(routing))
    results = {
        "step": run.model.training_record["step"],  # of the weights
        "best_step": run.progress.best_step,
        "test_answers_per_skill": count,
        "sandbox": backend,
        "sets": [
            {key: None if value != value else value for key, value in row._asdict().items()}
            for row in rows  # JSON has no word for NaN
        ],
        "routing": routing,
        "answers": {
            name: [answer._asdict() for answer in score.answers]
            for name, score in trained_skills.items()
        },
        "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    (run.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    _write_card(run, rows, count)

    def write_routing_file() -> None:
        if any(score.usage_NE is not None for score in trained.values()):
            write_routing(run.folder / ROUTING_FILE, model, run.tokenizer, sets, trained)

    drawn = draw_all(run.folder, FIGURES, run.log.info, before=write_routing_file)
    run.log.info(f"wrote {run.folder}/: {', '.join(['results.json', *drawn])}")
    scored = _checkpoint(run)
    if (scored / "config.json").exists():
        run.log.info(f"talk to it: python run.py chat --checkpoint {scored}")
    return rows


def _set_row(
    model: DyLoRA_MoE,
    examples: TokenizedSet,
    base: dict[str, SetScore],
    trained: dict[str, SetScore],
    base_skills: dict[str, SkillScore],
    trained_skills: dict[str, SkillScore],
) -> SetRow:
    name = examples.name
    skill, score = name.removeprefix(SKILL_PREFIX), trained[name]
    shared, usage_NE = model.config.shared_experts, score.usage_NE
    share_E = None if usage_NE is None else expert_shares(usage_NE, shared)
    return SetRow(
        name,
        base[name].loss,
        score.loss,
        base_skills[skill].share if skill in base_skills else None,
        trained_skills[skill].share if skill in trained_skills else None,
        None if share_E is None else int(share_E.argmax()),
        None if share_E is None else float(share_E.max()),
        score.targets,
        half_width(score.error, len(examples)),
    )


def half_width(error: float, rows: int) -> float | None:
    """Half of a mean's 95 % interval by Student's t; None where there is no standard error."""
    return None if math.isnan(error) else t_quantile(0.975, rows - 1) * error


def _checkpoint(run: Run) -> Path:
    """Where the weights that are scored lie, if they were kept."""
    return run.folder / f"checkpoint-{run.model.training_record['step']}"


def _write_card(run: Run, rows: list[SetRow], count: int) -> None:
    """Add what was found to the card of the checkpoint that has these weights, if it was kept."""
    folder = _checkpoint(run)
    if (folder / "config.json").exists():
        card = mixture_card(read_json(folder / "config.json"), card_lines(rows, count))
        write_file(folder / CARD, card)


def card_lines(rows: list[SetRow], count: int) -> list[str]:
    """The table as markdown; shares of passed answers with Wilson's 95 % interval."""
    lines = ["| set | base loss | loss | base passes | passes |", "|---|---|---|---|---|"]
    for row in rows:
        loss = format_loss(row.trained_loss, row.loss_half)
        cells = [row.name, f"{row.base_loss:.3f}", loss]
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


def expert_shares(usage_NE: Tensor, shared: int) -> Tensor:
    """Each expert's mean share of what routers give, [E]; the shared ones, which have no part in
    that, 0."""
    return F.pad(routed_shares(usage_NE, shared).mean(0), (shared, 0))


def routing_summary(model: DyLoRA_MoE, scores: dict[str, SetScore]) -> dict[str, Any] | None:
    """How many experts a validation token uses, and of how many parameters; None where nothing is
    routed. `parameters` and `active_parameters` are those of experts and routers."""
    seen = [(score.active_N, score.targets) for score in scores.values()]
    counted = [(float(active_N.mean()), n) for active_N, n in seen if active_N is not None]
    total = sum(targets for _, targets in counted)
    if not total:
        return None
    firsts = [next(iter(block.adapters.values())) for block in model.mixture.blocks]
    return {
        "experts": len(model.experts.live),
        "experts_a_layer": fmean(sum(stack.count for stack in first.stacks) for first in firsts),
        "shared_experts": model.config.shared_experts,
        "active_experts": sum(active * targets for active, targets in counted) / total,
        "parameters": sum(p.numel() for _, p in model.own_parameters()),
        "active_parameters": active_parameters(model, scores),
    }


def draw_all(
    folder: Path,
    figures: Sequence[str],
    tell: Callable[[str], None],
    before: Callable[[], None] = lambda: None,
) -> list[str]:
    """Draw a run's figures and its page; what cannot be is said, and never an error, as the results
    are more than their pictures. Returns the names of the files.

    before: what writes the data that only a loaded model has.
    """
    again = f"then python run.py report {folder}"
    try:
        before()
        names = [file.name for file in save_figures(read_run(folder), figures, folder, "png")]
        write_page([folder], folder / PAGE)
    except ImportError as error:
        tell(f"warning: plots are left out ({error}), {again}")
    except OSError as error:
        tell(f"warning: plots are left out ({error}): free some space, {again}")
    except Exception as error:
        tell(f"warning: plots are left out ({type(error).__name__}: {error}): python run.py report "
             f"{folder} --traceback shows where")  # fmt: skip
    else:
        return [*names, PAGE]
    return []


def format_table(rows: list[SetRow], count: int) -> str:
    """The table as plain text; the columns of passed answers only where there are any."""
    with_answers = any(row.trained_passed is not None for row in rows)
    passes = f" {'base passes':>12} {'trained [95 %]':>18}" if with_answers else ""
    header = f"{'set':20} {'base loss':>10} {'trained':>13}{passes}   expert (share)"
    lines = [header, "-" * len(header)]
    for row in rows:
        loss = format_loss(row.trained_loss, row.loss_half)
        line = f"{row.name:20} {row.base_loss:10.3f} {loss:>13}"
        if with_answers:
            base = "-" if row.base_passed is None else f"{row.base_passed:.0%}"
            line += f" {base:>12} {format_share(row.trained_passed, count):>18}"
        lines.append(
            line + ("" if row.expert is None else f"   {row.expert} ({row.expert_share:.0%})")
        )
    lines.append(
        "loss in nats per target token on validation, ± half of its 95 % interval over rows"
    )
    if with_answers:
        lines.append(f"{count} test answers a skill, with Wilson's 95 % interval")
    return "\n".join(lines)

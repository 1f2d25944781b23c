"""The report of a stream: what was decided, what is left of each skill, and which data made whom.

Shape letters: S stages, K skills, D hidden width.
"""

import copy
import json
import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.data.splits import seeded_generator
from dylora.evaluation.forgetting import Transfer, format_matrix, measure
from dylora.evaluation.passk.skills import score_skills
from dylora.evaluation.report import draw_all
from dylora.evaluation.routing_texts import write_routing
from dylora.evaluation.run_files import ROUTING_FILE
from dylora.features import embed
from dylora.model import DyLoRA_MoE
from dylora.skills import NoveltyDetector, SkillLibrary
from dylora.storage.folders import write_file
from dylora.training.log import say
from dylora.training.stages import StageRecord, past_of
from dylora.training.stream import PassRate, Stream

BATCHES = 200  # drawn for each skill's distribution of margins
SMALLEST_BATCH, LARGEST_BATCH = 8, 64
FIGURES = ["forgetting", "similarity", "novelty"]  # left as PNG; report.html has all


class Margins(NamedTuple):
    """Of batches of rows: distance over threshold, novel above 1; by skill."""

    known: dict[str, list[float]]  # rows kept apart, judged by a library that knows the skill
    novel: dict[str, list[float]]  # the same batches, judged by one that lacks it
    batch: dict[str, int]  # rows


def pass_rate_of(count: int) -> PassRate | None:
    """How a stream scores an embedded skill: by so many test answers; None for 0 of them."""

    def pass_rate(model: DyLoRA_MoE, tokenizer: PreTrainedTokenizerBase, skill: str) -> float:
        return score_skills(model, tokenizer, [skill], count)[skill].share

    return pass_rate if count else None


def report_stream(stream: Stream) -> dict[str, Any]:
    """Print the matrices, draw them, and write results.json and experts.md; returns the results."""
    records = stream.records
    results: dict[str, Any] = {
        "stages": [record.to_dict() for record in records],
        "test_answers_per_skill": stream.config.eval.skill_answers,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    for key, what in (("losses", "loss in nats"), ("passed", "answers that pass")):
        names, scores, transfer = transfers(records, key)
        if not names:
            continue
        percent = key == "passed"
        table = format_matrix(scores, names, [one.name for one in records], percent=percent)
        say(f"{what} on each stage's held-out rows, after each stage\n{table}")
        say(describe_transfer(transfer, percent))
        results[key] = {
            "skills": names,
            "matrix": [[_number(value) for value in row] for row in scores],
            **{name: _number(value) for name, value in transfer._asdict().items()},
        }
    results["novelty"] = novelty_margins(stream)._asdict()
    if library := stream.model.skill_library:
        distances = skill_distances(library).tolist()
        results["similarity"] = {"skills": list(library.skills), "matrix": distances}
    write_file(stream.folder / "results.json", json.dumps(results, indent=2) + "\n")
    write_file(stream.folder / "experts.md", experts_table(stream))

    def write_texts() -> None:
        sets = [one for stage in stream.stages for one in stage.data.validation]
        write_routing(stream.folder / ROUTING_FILE, stream.model, stream.tokenizer, sets, {})

    drawn = draw_all(stream.folder, FIGURES, say, before=write_texts)
    say(f"wrote {stream.folder}/: {', '.join(['results.json', 'experts.md', *drawn])}")
    return results


# What is left of each skill


def transfers(
    records: list[StageRecord], key: str
) -> tuple[list[str], list[list[float]], Transfer]:
    """Names of the stages that were scored [K], their scores after every stage [S][K] (NaN where
    none was taken), and what they come to. key: losses or passed."""
    place = 0 if key == "losses" else 1
    taken = [getattr(record, key) or {} for record in records]
    names = [record.name for record in records if any(record.name in row for row in taken)]
    scores = [[_or_nan(row.get(name)) for name in names] for row in taken]
    by_name = {record.name: (index, record) for index, record in enumerate(records)}
    for column, name in enumerate(names):  # what it was worth before it was learned
        index, record = by_name[name]
        if index > 0:
            scores[index - 1][column] = _or_nan(record.before[place])
    if not names:
        return [], [], Transfer(*[math.nan] * 4)
    before = [_or_nan(by_name[name][1].base[place]) for name in names]
    learned = [by_name[name][0] for name in names]
    found = measure(scores, before, learned=learned, smaller_is_better=key == "losses")
    return names, scores, found


def describe_transfer(transfer: Transfer, percent: bool) -> str:
    """A line of the four measures; of losses in nats, of shares in points."""
    scale, unit = (100, " points") if percent else (1, " nats")
    parts = [
        f"{name} {value * scale:.{1 if percent else 4}f}{unit}"
        for name, value in transfer._asdict().items()
        if not math.isnan(value)
    ]
    return "; ".join(parts)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


# Novelty


def novelty_margins(stream: Stream) -> Margins:
    """Margins of random batches of each skill, with and without it in the library: half of the rows
    that were kept from the library, at least 8. None of a stage that has no such rows.

    Drawn without replacement: a batch of few rows that come again is farther from the mean than as
    many rows of the skill are.
    """
    library, margins = stream.model.skill_library, Margins({}, {}, {})
    for stage in stream.stages:
        _, rows = stage.held_out()
        if library is None or stage.name not in library.skills or not rows:
            continue
        whole = embed(library.mixture, rows).whole
        size = max(SMALLEST_BATCH, min(LARGEST_BATCH, len(rows) // 2))
        generator = seeded_generator("margins", stage.name)
        batches = [
            whole[torch.randperm(len(rows), generator=generator)[:size]] for _ in range(BATCHES)
        ]
        margins.batch[stage.name] = size
        margins.known[stage.name] = _margins(library, batches)
        if len(library) > 1:
            margins.novel[stage.name] = _margins(_without(library, stage.name), batches)
    return margins


def _margins(library: SkillLibrary, batches: list[Tensor]) -> list[float]:
    detector = NoveltyDetector(library)
    thresholds = detector.thresholds(len(batches[0]))
    return [float((detector.distances(batch) / thresholds).min()) for batch in batches]


def _without(library: SkillLibrary, name: str) -> SkillLibrary:
    """What the library would judge by had it never seen a skill."""
    other = copy.copy(library)
    other.skills = {key: skill for key, skill in library.skills.items() if key != name}
    return other


def skill_distances(library: SkillLibrary) -> Tensor:
    """Between the means of skills, in deviations within skills per coordinate, [K, K]."""
    means = torch.stack([skill.whole_sum / skill.rows for skill in library.skills.values()])
    variance = NoveltyDetector(library).variance()
    return ((means[:, None] - means) ** 2 / variance).mean(-1).sqrt()


# Who learned what


def experts_table(stream: Stream) -> str:
    """experts.md: who learned what, when, at what rank, from which data."""
    lines = [
        f"# What the experts of {stream.config.name} have learned",
        "",
        "Loss in nats per target token on held-out rows: of the base, when learned, at the end.",
        "",
        "| expert | skill | stage | decision | rank, alpha | steps | data | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = [run for run in past_of(stream.model.training_record) if "stage" in run]
    last = stream.records[-1].losses or {}
    for record, run in zip(stream.records, runs, strict=True):
        losses = record.base[0], (record.losses or {}).get(record.name), last.get(record.name)
        told = " → ".join("–" if loss is None else f"{loss:.3f}" for loss in losses)
        made = f"{record.rank}, {record.alpha:g}"
        made += (
            "" if record.copied is None else f", from {record.share:g} of expert {record.copied}"
        )
        steps = run.get("step", 0)
        cells = [
            *(", ".join(map(str, record.experts)), record.name, record.number),
            *(decision(record), made, steps, data_of(run), told),
        ]
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def decision(record: StageRecord) -> str:
    """The action, and the margin that it follows from."""
    if record.margin is None:
        return record.action
    return f"{record.action} ({record.margin:.2f} × the threshold from {record.nearest})"


def data_of(run: dict[str, Any]) -> str:
    """The sets of a stage's run: names, rows, and the beginning of a hash of their texts."""
    sources = run.get("data", {}).get("sources", [])
    return ", ".join(
        f"{source['name']}: {source['training_rows']} rows, sha256 {source['training_sha256'][:12]}"
        for source in sources
    )

"""The stages of a stream: their rows, their settings, and what became of each."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from dylora.data.prepare import PreparedData
from dylora.data.splits import derived_seed
from dylora.features import split_row
from dylora.fields import FieldError, build, check_fields, shown
from dylora.run_config import RunConfig, SourceConfig, StageConfig
from dylora.storage.skill_file import LEAST_ROWS
from dylora.training.init_from import past_of
from dylora.training.prompt_skills import LIBRARY_ROWS, Split, evenly
from dylora.training.run import run_folder

SKILL_PREFIX = "skill/"  # of the name of a generated source
APART = 3  # of so many held-out rows one is kept from the library, to see how well it judges

Action = Literal["shared", "new", "continue", "skip"]


class Stage(NamedTuple):
    """One stage and its rows."""

    number: int  # from 1; those of an earlier stream count
    name: str
    sources: list[SourceConfig]
    config: StageConfig | None  # None: it was learned in an earlier stream, and is evaluated only
    data: PreparedData

    @property
    def skills(self) -> list[str]:
        """The embedded skills of the stage; none where any source is another set."""
        names = [source.name for source in self.sources]
        generated = all(name.startswith(SKILL_PREFIX) for name in names)
        return [name.removeprefix(SKILL_PREFIX) for name in names] if generated else []

    def rows(self, split: Split, most: int | None = None) -> list[dict[str, list[int]]]:
        """So many rows at most, evenly from all of a split; by default as the library keeps."""
        sets = self.data.train if split == "train" else self.data.validation
        return evenly(sets, most or LIBRARY_ROWS[split])

    def held_out(self) -> tuple[list[dict[str, list[int]]], list[dict[str, list[int]]]]:
        """Validation rows that calibrate the thresholds of the stage's skill, and others that are
        kept from the library; of these none where too few would be left to calibrate with."""
        rows = self.rows("validation")
        apart = rows[APART - 1 :: APART]
        if len(rows) - len(apart) < LEAST_ROWS:
            return rows, []
        return [row for n, row in enumerate(rows) if n % APART != APART - 1], apart


class SetScores(NamedTuple):
    """What a mixture makes of a stage's rows and tasks."""

    loss: float | None  # nats per target token, on validation rows; None: no target
    passed: float | None  # share of test answers that pass their checker; None: not asked


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What became of a stage, in JSON types: stage.json, and `stage` of a training record."""

    number: int
    name: str
    sources: list[SourceConfig]
    action: Action
    experts: list[int]
    """Those that it trained; of action skip the one that knows its skill."""
    rank: int
    alpha: float
    copied: int | None = None
    """The expert that its new one started from."""
    share: float | None = None
    """Of that one's update."""
    nearest: str | None = None
    """The known skill that its rows are nearest to; none: nothing was known."""
    margin: float | None = None
    """Distance from it over its threshold: novel above 1."""
    distance: float | None = None
    far_share: float | None = None
    """Share of its rows that lie beyond 95 % of every known skill's held-out rows."""
    base: tuple[float | None, float | None] = (None, None)
    """Loss and share of passed answers of the base on its rows and tasks, as SetScores."""
    before: tuple[float | None, float | None] = (None, None)
    """Likewise of the mixture before it."""
    losses: dict[str, float | None] | None = None
    """After it: of every stage so far."""
    passed: dict[str, float | None] | None = None
    """Likewise the shares of passed answers."""

    def __post_init__(self) -> None:
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"base": list(self.base), "before": list(self.before)}


def read_record(where: str, found: Any) -> StageRecord:
    """The record of a checkpoint. Raises ValueError naming the checkpoint."""
    try:
        return build(StageRecord, found)
    except FieldError as error:
        raise ValueError(f"{where}: training.stage.{error}") from None


def records_of(
    training_record: dict[str, Any], where: str = "training record"
) -> list[StageRecord]:
    """What became of the stages that a mixture has gone through, in their order."""
    runs = past_of(training_record)
    return [read_record(where, run["stage"]) for run in runs if "stage" in run]


def folder_name(stage: Stage | StageRecord) -> str:
    """Of a stage's run, within the stream's folder."""
    return f"stage-{stage.number}-{stage.name}"


def stage_run(config: RunConfig, stage: Stage) -> RunConfig:
    """The run that learns a stage. Its seed is its own: no draw of an earlier stage reaches it."""
    assert stage.config is not None
    seed = derived_seed("stage", config.train.seed, stage.number) % 2**32  # as numpy takes it
    return replace(
        config,
        name=folder_name(stage),
        output_dir=str(run_folder(config)),
        data=replace(config.data, sources=stage.sources),
        train=replace(stage.config.settings(config.train), seed=seed),
        stages=[],
    )


def rank_and_alpha(config: RunConfig, stage: StageConfig) -> tuple[int, float]:
    """Of the expert that a stage makes."""
    rank = stage.rank or config.moe.r
    return rank, stage.alpha or config.moe.lora_alpha * rank / config.moe.r


def check_stages(stages: Sequence[Stage], known: Sequence[str]) -> None:
    """Raises ValueError for rows that are too few or shared, and for a name that is taken.

    known: the names in the skill library before the first stage that is to be learned.
    """
    for stage in stages:
        if stage.config is None:
            continue
        if stage.config.shared and known:
            raise ValueError(
                f"stage {shown(stage.name)}: shared experts are trained before there is a skill, "
                "since all of them rely on it"
            )
        if stage.config.shared:
            continue
        if stage.name in known:
            raise ValueError(
                f"stage {shown(stage.name)}: the checkpoint knows a skill of this name already; "
                "give it another"
            )
        rows = {split: stage.rows(split) for split in LIBRARY_ROWS}
        for split, found in rows.items():
            if len(found) < LEAST_ROWS:
                raise ValueError(
                    f"stage {shown(stage.name)} has {len(found)} rows for {split}, but at least "
                    f"{LEAST_ROWS} are needed to tell its skill from others: give it more rows"
                )
        texts = {tuple(split_row(row)[0]) for row in rows["train"]}
        if any(tuple(split_row(row)[0]) in texts for row in rows["validation"]):
            raise ValueError(
                f"stage {shown(stage.name)}: a validation row is also a training row (cut at "
                "data.max_length, two can be alike): a threshold needs rows of their own"
            )


def describe(record: StageRecord) -> str:
    """What was decided, in a line."""
    made = f"of rank {record.rank}, alpha {record.alpha:g}"
    numbers = ", ".join(map(str, record.experts))
    if record.copied is not None:
        made += f", which starts at {record.share:g} of expert {record.copied}"
    if record.action == "shared":
        return f"{record.name}: for all skills, shared expert {numbers} {made}"
    if record.margin is None:
        return f"{record.name}: new, as nothing is known; expert {numbers} {made}"
    distance = f"{record.margin:.2f} × the threshold from {record.nearest}"
    if record.margin > 1:
        return f"{record.name}: new, {distance}; expert {numbers} {made}"
    then = {
        "skip": f"expert {numbers} serves it, nothing is learned",
        "continue": f"expert {numbers} learns on",
        "new": f"yet a further expert {numbers} {made}",
    }
    return f"{record.name}: known, {distance}; {then[record.action]}"


def format_table(records: Sequence[StageRecord]) -> str:
    """A line for every stage so far: what was decided, its loss and its pass rate, each of the
    base, just after the stage and now."""
    last = records[-1]
    with_answers = any(record.passed for record in records)
    width = max(len("stage"), *(len(record.name) for record in records))
    header = f"{'stage':{width}} {'decision':8} {'margin':>7} {'expert':>6}"
    header += f" {'base loss':>10} {'learned':>8} {'now':>8}"
    header += f" {'base passes':>12} {'learned':>8} {'now':>5}" if with_answers else ""
    lines = [header, "-" * len(header)]
    for record in records:
        margin = "-" if record.margin is None else f"{record.margin:.2f}"
        numbers = ",".join(map(str, record.experts))
        line = f"{record.name:{width}} {record.action:8} {margin:>7} {numbers:>6}"
        rows = [(record.base[0], record.losses, last.losses, "10.3f", "8.3f", "8.3f")]
        if with_answers:
            rows.append((record.base[1], record.passed, last.passed, "12.0%", "8.0%", "5.0%"))
        for base, learned, now, *formats in rows:
            values = (base, (learned or {}).get(record.name), (now or {}).get(record.name))
            for value, form in zip(values, formats, strict=True):
                cell = "-" if value is None else f"{value:{form}}"
                line += f" {cell:>{form.partition('.')[0]}}"
        lines.append(line)
    return "\n".join(lines)


def finite(loss: float) -> float | None:
    """A loss for a JSON file."""
    return loss if math.isfinite(loss) else None

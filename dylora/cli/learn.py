"""`run.py learn`: one more skill for what a checkpoint has learned."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dylora.cli.config_file import load_run_config
from dylora.cli.train import train_stages
from dylora.fields import option
from dylora.run_config import OnKnown, SourceConfig, StageConfig, Start, dump_run_config

BUILT_IN = ("code_alpaca", "mbpp")
COLUMNS = ("instruction_column", "input_column", "output_column")
# What a checkpoint records of its run and the next one has otherwise.
NOT_TAKEN = {
    "model": {"base", "revision", "device", "quantization"},
    "data": {"sources"},
    "train": {"init_from", "train_experts", "seed", "prompt_clusters", "parallel"},
}


@dataclass(frozen=True, kw_only=True)
class LearnOptions:
    """Judge one more set of rows, and learn it with an expert of its own beside the others."""

    checkpoint: str = option(metavar="DIR")
    """Folder of a checkpoint with router_scope prompt, or of a run, or a repository of the hub,
    user/name; it is not changed."""
    checkpoint_revision: str | None = None
    """Commit, tag or branch of a checkpoint on the hub."""
    source: str = option(metavar="FILE")
    """Files of rows as path of a source takes them, skill/NAME, code_alpaca or mbpp."""
    name: str | None = None
    """Of the skill and of the run's folder; none: the source's."""
    instruction_column: str | None = None
    """Of a file; none: found by its name."""
    input_column: str | None = None
    """Of a file, for an optional further input."""
    output_column: str | None = None
    """Of a file."""
    rows: int | None = option(None, least=1)
    """Of skill/NAME: training examples to generate."""
    on_known: OnKnown = "skip"
    """Where the rows are of a known skill. skip: say which expert serves it; continue: train that
    expert further; new: add an expert all the same."""
    start: Start = "known"
    """Where the new expert starts. known: at the share of a known expert's update, of its rank and
    alpha, that has the lowest loss on the rows; fresh: without an update."""
    rank: int | None = option(None, least=1)
    """Of the new expert; none: moe.r of the checkpoint."""
    alpha: float | None = option(None, above=0)
    """Of the new expert; none: for the alpha / rank of the checkpoint."""
    config: str | None = option(None, metavar="FILE")
    """YAML file with sections data, train, eval and log; none: as the checkpoint was trained. The
    command line overrides fields of either."""
    resume_from_checkpoint: str | None = option(None, metavar="latest")
    """Go on where this command was interrupted."""
    print_config: bool = False
    """Print the resolved config and stop."""


def run(options: LearnOptions, overrides: list[str]) -> None:
    from dylora.storage.hub import local_folder

    stage = stage_of(options)
    folder = local_folder(options.checkpoint, options.checkpoint_revision)
    given = [f"train.init_from={folder}", f"name={stage.name}", f"stages={_as_yaml(stage)}"]
    if options.config is None:
        given = recorded_overrides(folder) + given
    config = load_run_config(options.config, [*given, *overrides])
    if options.print_config:
        print(dump_run_config(config), end="")
    else:
        train_stages(config, options.resume_from_checkpoint)


def stage_of(options: LearnOptions) -> StageConfig:
    """The stage that the options describe."""
    named = options.source in BUILT_IN or options.source.startswith("skill/")
    word = options.source.removeprefix("skill/") if named else Path(options.source).stem
    name = options.name or word
    given: Any = {key: getattr(options, key) for key in COLUMNS}
    given |= {"name": options.source} if named else {"name": name, "path": options.source}
    source = SourceConfig(rows=options.rows, **given)
    return StageConfig(
        name=name,
        sources=[source],
        on_known=options.on_known,
        start=options.start,
        rank=options.rank,
        alpha=options.alpha,
    )


def _as_yaml(stage: StageConfig) -> str:
    """A list of this one stage, in one line: JSON is not YAML beyond U+FFFF."""
    text = yaml.safe_dump(
        [asdict(stage)], default_flow_style=True, allow_unicode=True, width=math.inf
    )
    return text.strip()


def recorded_overrides(checkpoint: Path) -> list[str]:
    """The settings with which a checkpoint was trained, as overrides of a config.

    Raises ValueError or FileNotFoundError for a folder that is no checkpoint.
    """
    from dylora.evaluation.loading import note
    from dylora.storage.checkpoint import Checkpoint

    recorded: Any = Checkpoint.open(checkpoint, note).description["training"].get("settings", {})
    found = []
    for section, left_out in NOT_TAKEN.items():
        for key, value in dict(recorded.get(section, {})).items():
            if key not in left_out:
                text = value if isinstance(value, str) else json.dumps(value)
                found.append(f"{section}.{key}={text}")
    return found

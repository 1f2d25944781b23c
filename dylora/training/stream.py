"""A stream of skills and its parts: built, restored, saved."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.base_models import choose_device, load_tokenizer
from dylora.data.prepare import PreparedData
from dylora.fields import shown
from dylora.model import DyLoRA_MoE
from dylora.model_io import load_model, write_model
from dylora.run_config import RunConfig, SourceConfig
from dylora.storage import folders
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.manifest import is_intact
from dylora.training.init_from import init_from_checkpoint
from dylora.training.log import say
from dylora.training.run import build_model, fit_to_base, load_run_data, run_folder
from dylora.training.settings import data_difference, find_changes
from dylora.training.signals import Interruption
from dylora.training.stages import (
    SKILL_PREFIX,
    Stage,
    StageRecord,
    check_stages,
    folder_name,
    past_of,
    rank_and_alpha,
    records_of,
    stage_run,
)

STAGE_FILE = "stage.json"

PassRate = Callable[[DyLoRA_MoE, PreTrainedTokenizerBase, str], float]
"""The share of the test answers of an embedded skill that pass their checker."""


class Stream(NamedTuple):
    """Everything that a stream works with."""

    config: RunConfig
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    model: DyLoRA_MoE
    stages: list[Stage]
    pass_rate: PassRate | None
    interruption: Interruption

    @property
    def records(self) -> list[StageRecord]:
        """What became of the stages that are done."""
        return records_of(self.model.training_record)


def begin(config: RunConfig, pass_rate: PassRate | None, interruption: Interruption) -> Stream:
    """The mixture and the rows of all stages."""
    if config.train.init_from is None:
        config = with_first_experts(config)
    config = fit_to_base(config)
    device = choose_device(config.model.device)
    tokenizer = load_tokenizer(config.model.base, config.model.revision)
    model = build_model(config, tokenizer, device)
    if config.train.init_from is not None:
        init_from_checkpoint(model, config.train.init_from, None)
    stages = [
        known_stage(record, config, tokenizer) for record in records_of(model.training_record)
    ]
    for stage in config.stages:
        data = load_rows(stage.sources, config, tokenizer)
        stages.append(Stage(len(stages) + 1, stage.name, stage.sources, stage, data))
    check_stages(stages, list(model.skill_library.skills) if model.skill_library else [])
    folder = run_folder(config)
    return Stream(config, folder, tokenizer, model, stages, pass_rate, interruption)


def load_rows(
    sources: list[SourceConfig], config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> PreparedData:
    """The sets of one stage, as `load_run_data` gives those of a run."""
    data = replace(config.data, sources=sources)
    return load_run_data(replace(config, data=data, stages=[]), tokenizer)


def known_stage(
    record: StageRecord, config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> Stage:
    """A stage of the stream that this one goes on from, with rows if they can be generated.

    Where a checkpoint says that files lie is not followed.
    """
    data = PreparedData([], [], [], {})
    if all(source.name.startswith(SKILL_PREFIX) for source in record.sources):
        data = load_rows(record.sources, config, tokenizer)
    else:
        say(f"note: {record.name} is not evaluated: its rows are not at hand")
    return Stage(record.number, record.name, record.sources, None, data)


def with_first_experts(config: RunConfig) -> RunConfig:
    """The mixture begins with its shared experts and the first stage's own, or without that."""
    moe, shared = config.moe, config.moe.shared_experts
    own = moe.num_experts - shared
    if own > 1:
        raise ValueError(
            f"moe.num_experts is {moe.num_experts}, but a stream begins with {shared + 1}: its "
            "stages make the others"
        )
    for_all = [stage for stage in config.stages if stage.shared][:1] * shared
    first = [stage for stage in config.stages if not stage.shared][:own]
    made = [rank_and_alpha(config, stage) for stage in [*for_all, *first]]
    if len(made) < moe.num_experts or set(made) == {(moe.r, moe.lora_alpha)}:
        return config  # as moe has it
    ranks, alphas = (list(column) for column in zip(*made, strict=True))
    return replace(config, moe=replace(moe, expert_ranks=ranks, expert_alphas=alphas))


def restore(stream: Stream) -> int:
    """Put back the mixture after the last stage that is done; returns its number.

    Raises ValueError where the stream is now another.
    """
    checkpoint = last_checkpoint(stream.folder)
    if checkpoint is None:
        return len(stream.records)
    record = checkpoint.description["training"]
    runs = [run for run in past_of(record) if "stage" in run]
    for run, stage, found in zip(runs, stream.stages, records_of(record), strict=False):
        where = f"{checkpoint.path}: stage {found.number}"
        if found.name != stage.name:
            raise ValueError(
                f"{where} was {shown(found.name)}, this stream has {shown(stage.name)}: give its "
                "stages as they were, and others after them"
            )
        other = data_difference(run.get("data", {}), stage.data.provenance)
        learned = stage.config is not None and "data" in run
        if learned and other is not None:
            raise ValueError(f"{where}, {found.name}, was trained on other data: {other}")
    if not 0 < len(runs) <= len(stream.stages):
        raise ValueError(f"{checkpoint.path} has {len(runs)} stages, this stream fewer")
    for line in find_changes(checkpoint, stage_run(stream.config, stream.stages[len(runs) - 1])):
        say(line)
    load_model(stream.model.experts, checkpoint)
    stream.model.training_record = record
    say(f"resumed {checkpoint.path}: {len(runs)} of {len(stream.stages)} stages are done")
    write_record(stream, stream.records[-1])  # a crash may have come before
    return len(runs)


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint of a folder that verifies; what is newer and does not is set aside."""
    folders.recover(folder)
    for path in reversed(folders.checkpoints(folder)):
        if is_intact(path):
            return Checkpoint.of_verified(path)
        say(f"set aside as {folders.quarantine(path, 'damaged')}")
    return None


def save(stream: Stream, record: StageRecord) -> None:
    """The mixture after a stage, whole or absent; with it the stage is done."""
    folder, limit = (
        stream.folder / f"checkpoint-{record.number}",
        stream.config.train.save_total_limit,
    )

    def write_files(files: Path) -> None:
        write_model(stream.model.mixture, files)
        stream.tokenizer.save_pretrained(files)  # as beside the checkpoints of a run

    folders.write_folder(folder, write_files)
    write_record(stream, record)
    if limit is not None:
        folders.rotate(stream.folder, limit, None)
        for path in folders.checkpoints(
            stream.folder / folder_name(record)
        ):  # those of its run are of no more use
            shutil.rmtree(path)
    say(f"saved {stream.model.size_message(folder)}")


def write_record(stream: Stream, record: StageRecord) -> None:
    """stage.json of a stage that is done."""
    folder = stream.folder / folder_name(record)
    folder.mkdir(exist_ok=True)  # of a stage that learned nothing
    text = json.dumps(record.to_dict(), indent=2, ensure_ascii=False)
    folders.write_file(folder / STAGE_FILE, text + "\n")

"""A stream of skills, top to bottom: `train_stream`, one stage of it, and its parts.

A stage is judged (is its skill known?), learned by one expert alone in a run of its own, kept (the
expert frozen and mature, the skill in the library), and followed by an evaluation of every stage so
far. So a stream is a chain of runs, each of which begins with the mixture that the one before ended
with:

    <output_dir>/<name>/checkpoint-<k>/       the mixture after stage k
    <output_dir>/<name>/stage-<k>-<name>/     its run, and stage.json: what became of it

A stage is done when checkpoint-<k> is whole. Before that it is made again, from the last checkpoint
of its run or from its seed, to the same bits.
"""

from collections.abc import Sequence
from dataclasses import replace

from dylora.data.prompts import pad_token_id
from dylora.model import DyLoRA_MoE
from dylora.run_config import RunConfig
from dylora.skills import SkillLibrary
from dylora.storage.folders import checkpoints, recover
from dylora.storage.lock import lock_folder
from dylora.training.callbacks import Callback
from dylora.training.environment import seed_everything
from dylora.training.log import say
from dylora.training.loop import train
from dylora.training.run import Parts, record_settings, run_folder
from dylora.training.settings import recorded_settings
from dylora.training.signals import Interrupted, Interruption
from dylora.training.stages import (
    SetScores,
    Stage,
    StageRecord,
    describe,
    finite,
    format_table,
    past_of,
    rank_and_alpha,
    read_record,
    stage_run,
)
from dylora.training.start import start_expert
from dylora.training.stream import PassRate, Stream, begin, last_checkpoint, restore, save
from dylora.training.validation import overall_loss, validate

JUDGED_ROWS = 64  # training rows by which a stage is judged, at most


def train_stream(
    config: RunConfig,
    resume_from_checkpoint: str | None = None,
    *,
    callbacks: Sequence[Callback] = (),
    pass_rate: PassRate | None = None,
) -> Stream:
    """Learn the stages of a configuration one after another.

    Args:
        config: a run with stages. With train.init_from they come after what that checkpoint has
            learned.
        resume_from_checkpoint: `latest`, or None for a fresh stream. The stages that are done have
            to be as they were; others may have come after them.
        callbacks: what else is done between the steps of each stage.
        pass_rate: how answers to tasks of the embedded skills are scored; none: losses alone.

    After SIGTERM or SIGINT it ends as `dylora.training.loop.train` does.

    Raises what `train` does; before anything is trained ValueError for stages that `check_stages`
    refuses and for other stages than the resumed stream has done.
    """
    if resume_from_checkpoint not in (None, "latest"):
        raise ValueError(
            f"a stream is resumed as a whole: give latest instead of {resume_from_checkpoint}"
        )
    folder, fresh = run_folder(config), resume_from_checkpoint is None
    if fresh:
        config.check_acts()
    if fresh and (checkpoints(folder) or any(folder.glob("stage-*/checkpoint-*"))):
        raise FileExistsError(
            f"{folder} already holds a stream: give --resume_from_checkpoint latest, another "
            "--name, or remove it"
        )
    with lock_folder(folder), Interruption() as interruption:
        recover(folder)
        stream = begin(config, pass_rate, interruption)
        done = len(stream.records) if fresh else restore(stream)
        record_settings(stream.config, stream.model.device, f"until-stage-{done}")
        try:
            for stage in stream.stages[done:]:
                learn(stream, stage, callbacks)
                interruption.check()
        except Interrupted:
            interruption.leave()
    return stream


def learn(stream: Stream, stage: Stage, callbacks: Sequence[Callback]) -> None:
    """One stage, from its rows to the checkpoint after it."""
    model, config = stream.model, stage_run(stream.config, stage)
    earlier, begun = past_of(model.training_record), last_checkpoint(run_folder(config))
    seed_everything(config.train.seed)
    if begun is None:
        model.training_record = {"data": stage.data.provenance}  # the template of what is asked now
        record = choose_expert(stream, stage, decide(stream, stage))
    else:  # the expert is in it, and what was decided
        record = read_record(str(begun.file), begun.description["training"].get("stage"))
    say(f"stage {stage.number} of {stream.stages[-1].number}, {describe(record)}")
    if record.action == "skip":
        model.training_record = {"settings": recorded_settings(config), "earlier": earlier}
    else:
        kept = {"earlier": earlier, "stage": record.to_dict()}
        parts = Parts(stream.tokenizer, stage.data, model, kept, stream.interruption)
        resumed = None if begun is None else str(begun.path)
        train(config, resumed, callbacks=callbacks, parts=parts)
        keep(model, stage, record)
    record = evaluate_so_far(stream, record)
    model.training_record |= {"earlier": earlier, "stage": record.to_dict()}
    save(stream, record)
    say(format_table(stream.records))


# Parts of a stage


def decide(stream: Stream, stage: Stage) -> StageRecord:
    """Whether the stage's rows are of a known skill, and what is done then."""
    model, settings = stream.model, stage.config
    assert settings is not None
    library = model.skill_library
    verdict = library.judge(stage.rows("train", JUDGED_ROWS)) if library else None
    rank, alpha = rank_and_alpha(stream.config, settings)
    known = None if verdict is None or verdict.novel else library.expert_of(verdict.nearest)
    action, experts = "new", []
    if settings.shared:
        action, experts = "shared", list(range(model.config.shared_experts))
    elif known is not None and settings.on_known != "new":
        action, experts = settings.on_known, [known]
    if experts:
        rank, alpha = model.experts[experts[0]].rank, model.experts[experts[0]].alpha
    with model.disable_adapters():
        base = scores(stream, stage)
    return StageRecord(
        number=stage.number,
        name=stage.name,
        sources=stage.sources,
        action=action,
        experts=experts,
        rank=rank,
        alpha=alpha,
        nearest=verdict and verdict.nearest,
        margin=verdict and verdict.margin,
        distance=verdict and verdict.distance,
        far_share=verdict and verdict.far_share,
        base=base,
        before=scores(stream, stage),
    )


def choose_expert(stream: Stream, stage: Stage, record: StageRecord) -> StageRecord:
    """Enable the stage's experts alone, a new one where none is named, and name it.

    Raises Interrupted once somebody wants the process to end.
    """
    experts, chosen = stream.model.experts, record.experts
    experts.set_progress(0, 0.0)  # a stage has a clock of its own
    if record.action == "skip":
        return record
    if record.action == "new":
        chosen = idle_experts(stream)[:1] or [experts.create_expert(record.rank, record.alpha)]
        experts[chosen[0]].skill = record.name
        if stage.config is not None and stage.config.start == "known":
            rows, batch = stage.rows("train", JUDGED_ROWS), stream.config.eval.batch_size
            pad, check = pad_token_id(stream.tokenizer), stream.interruption.check
            found = start_expert(stream.model, chosen[0], rows, batch, pad, check)
            record = replace(record, copied=found and found.expert, share=found and found.share)
    experts.unfreeze(*chosen)
    experts.freeze(*(e for e in range(stream.model.config.shared_experts) if e not in chosen))
    experts.activate(*chosen)
    return replace(record, experts=chosen)


def idle_experts(stream: Stream) -> list[int]:
    """The one that a fresh stream begins with for its first skill, until that has come."""
    if stream.config.train.init_from is not None or stream.model.skill_library:
        return []
    return stream.model.experts.live[stream.model.config.shared_experts :]


def keep(model: DyLoRA_MoE, stage: Stage, record: StageRecord) -> None:
    """The stage's experts never change any more; its skill comes into the library."""
    model.experts.optimizer = None  # what it knew of the expert is of no more use
    model.experts.freeze(*record.experts)
    model.experts.activate_all_experts()
    maturity = model.maturity.maturity.clone()
    maturity[record.experts] = 1.0
    model.set_maturity(model.maturity._replace(maturity=maturity))
    model.mixture.fractions = None
    if record.action == "shared":
        return
    rows, (held_out, _) = stage.rows("train"), stage.held_out()
    library = model.skill_library or SkillLibrary(model)
    if record.action == "continue":
        assert record.nearest is not None
        library.extend(record.nearest, rows, held_out)
    else:
        library.add(record.name, rows, held_out, expert=record.experts[0])


def evaluate_so_far(stream: Stream, record: StageRecord) -> StageRecord:
    """The record with what the mixture now makes of every stage so far."""
    found = {
        stage.name: scores(stream, stage)
        for stage in stream.stages[: record.number]
        if stage.data.validation
    }
    return replace(
        record,
        losses={name: one.loss for name, one in found.items()},
        passed={name: one.passed for name, one in found.items() if one.passed is not None},
    )


def scores(stream: Stream, stage: Stage) -> SetScores:
    """Of a stage's rows and tasks, with the experts that its prompts are routed to.

    Raises Interrupted once somebody wants the process to end.
    """
    check = stream.interruption.check
    found = validate(
        stream.model,
        stage.data.validation,
        batch_size=stream.config.eval.batch_size,
        pad_token_id=pad_token_id(stream.tokenizer),
        before_batch=check,
    )
    rates = []
    for skill in stage.skills if stream.pass_rate is not None else ():
        check()
        rates.append(stream.pass_rate(stream.model, stream.tokenizer, skill))  # type: ignore[misc]
    return SetScores(finite(overall_loss(found)), sum(rates) / len(rates) if rates else None)

"""A run and its parts, built from a configuration in the order in which things fail cheaply."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.base_fingerprint import tokenizer_fingerprint
from dylora.base_models import (
    BaseSpec,
    choose_device,
    has_position_table,
    load_tokenizer,
    max_positions,
)
from dylora.data.prepare import MAX_LENGTH, PreparedData, load_data
from dylora.data.prompts import pad_token_id
from dylora.data.sampler import InterleavedSampler
from dylora.data.streamed import StreamedSet
from dylora.kernels.common import is_emulated
from dylora.model import DyLoRA_MoE
from dylora.run_config import DataConfig, RunConfig, dump_run_config
from dylora.storage.folders import checkpoints, quarantine, write_file
from dylora.training.distributed import ALONE, Processes, Replicas
from dylora.training.environment import environment, seed_everything
from dylora.training.init_from import init_from_checkpoint
from dylora.training.log import RunLog, SilentLog, say
from dylora.training.optim import build_optimizer
from dylora.training.packing import require_packing
from dylora.training.prompt_skills import fit_library
from dylora.training.schedule import build_scheduler
from dylora.training.settings import recorded_settings
from dylora.training.signals import Interruption
from dylora.training.trainer_state import Progress


class Run(NamedTuple):
    """Everything a run works with."""

    config: RunConfig
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    model: DyLoRA_MoE
    sampler: InterleavedSampler
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    steps: int  # optimizer steps of the whole run
    target_tokens: float  # that the whole run will train on, about
    log: RunLog
    progress: Progress
    interruption: Interruption
    processes: Processes
    replicas: Replicas

    @property
    def pad_token_id(self) -> int:
        return pad_token_id(self.tokenizer)


class Parts(NamedTuple):
    """What is brought along instead of being built: rows, and in a stage of a stream the model."""

    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    model: DyLoRA_MoE | None = None
    record: dict[str, Any] | None = None  # what training_record has besides what a run writes there
    interruption: Interruption | None = None  # that has been entered; None: the run has its own


def prepare(
    config: RunConfig, *, fresh: bool, parts: Parts | None = None, processes: Processes = ALONE
) -> Run:
    """Load and build everything, in the order in which it can fail cheaply; not what `parts` has.

    The random state is the caller's where it brings the model.
    """
    folder = check_run(config, fresh=fresh)
    if fresh and (parts is None or parts.model is None):  # a stage is asked when its stream begins
        config.check_acts()
    device = choose_device(config.model.device)
    config = fit_to_base(config)
    if parts is None:
        tokenizer = load_tokenizer(config.model.base, config.model.revision)
        data = load_run_data(config, tokenizer)
    else:
        tokenizer, data = parts.tokenizer, parts.data
    per_step = config.train.batch_size * config.train.gradient_accumulation_steps
    sampler = build_sampler(config.data, data, per_step)
    brought = parts and parts.model
    model = brought or build_model(config, tokenizer, device)
    if config.data.packing:
        require_packing(model)
    own = {"seed": config.train.seed, "settings": recorded_settings(config)}
    model.training_record = {"data": data.provenance, **own, **((parts and parts.record) or {})}
    if fresh and config.train.init_from is not None:
        init_from_checkpoint(model, config.train.init_from, config.train.train_experts)
    if fresh and config.moe.routes_prompts and brought is None:  # a stage fills it by itself
        fit_library(model, data, config.train.prompt_clusters, config.train.seed)
    freeze_routers(config, model)
    if fresh and not any(parameter.requires_grad for _, parameter in model.own_parameters()):
        raise ValueError(
            "nothing would be trained: all experts are frozen and no router is learned; set "
            "train.train_experts true"
        )
    steps = config.train.max_steps or max(1, round(config.train.epochs * len(sampler) / per_step))
    targets_per_step = per_step * sampler.mean([rows.mean_targets for rows in data.train])
    optimizer = build_optimizer(model, config.train)
    folder.mkdir(parents=True, exist_ok=True)
    return Run(
        config=config,
        folder=folder,
        tokenizer=tokenizer,
        data=data,
        model=model,
        sampler=sampler,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, config.train, steps),
        scaler=torch.amp.GradScaler(device.type, enabled=config.model.dtype == "float16"),
        steps=steps,
        target_tokens=targets_per_step * steps,
        log=open_log(config, processes),
        progress=Progress(),
        interruption=(parts and parts.interruption) or Interruption(processes),
        processes=processes,
        replicas=Replicas(model, processes),
    )


def freeze_routers(config: RunConfig, model: DyLoRA_MoE) -> None:
    """Where train.freeze_routers asks for it, also once a loader has made routers anew."""
    for _, parameter in model.router_parameters() if config.train.freeze_routers else ():
        parameter.requires_grad_(False)


def check_run(config: RunConfig, *, fresh: bool) -> Path:
    """The run's folder. Raises ValueError without data and for a folder that cannot be used,
    FileExistsError where a fresh run would find another one's checkpoints."""
    if config.stages:
        raise ValueError("a run of stages is trained by dylora.training.curriculum.train_stream")
    if not config.data.sources:
        raise ValueError("data.sources is empty: name at least one set to train on")
    folder = run_folder(config)
    if fresh and checkpoints(folder):
        raise FileExistsError(
            f"{folder} already holds checkpoints: give --resume_from_checkpoint latest, "
            f"another --name, or remove it"
        )
    metrics = folder / "metrics.jsonl"
    if metrics.is_dir():
        raise ValueError(f"{metrics} is a folder: remove it, or give another --name")
    return folder


def build_model(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> DyLoRA_MoE:
    """The mixture of a configuration, with fresh experts, on its base; seeds all generators."""
    seed_everything(config.train.seed)
    model = DyLoRA_MoE.from_base(
        config.model.base,
        config.moe,
        revision=config.model.revision,
        dtype=getattr(torch, config.model.dtype),
        device=device,
        attn_implementation=config.model.attn_implementation,
        quantization=config.model.quantization,
    )
    model.base_fingerprint["tokenizer"] = tokenizer_fingerprint(tokenizer)
    if config.train.gradient_checkpointing:
        model.enable_checkpointing()
    return model


def open_log(config: RunConfig, processes: Processes) -> RunLog:
    """The log of a run, which the first process writes."""
    log = RunLog if processes.is_first else SilentLog
    return log(run_folder(config), config.log, config.name, dataclasses.asdict(config))


def build_sampler(config: DataConfig, data: PreparedData, rows_per_step: int) -> InterleavedSampler:
    """The order in which a run takes its rows."""
    return InterleavedSampler(
        [len(examples) for examples in data.train],
        interleaved=config.interleaved_sampling,
        seed=config.seed,
        bucket_steps=config.bucket_steps,
        rows_per_step=rows_per_step,
        tokens=[examples.all_lengths for examples in data.train],
        weights=[source.weight for source in config.sources],
        streamed=[i for i, source in enumerate(config.sources) if source.stream_rows],
    )


def run_folder(config: RunConfig) -> Path:
    """Where everything of a run lies."""
    return Path(config.output_dir) / config.name


def load_run_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """The sets of a run, cut to its subsets.

    Raises ValueError as `load_data` does, and for ids that the base has no embedding of.
    """
    base = BaseSpec.resolve(config.model.base, config.model.revision).config()
    rows = base.get_text_config().vocab_size
    if (pad := pad_token_id(tokenizer)) >= rows:  # before rows are tokenised
        _refuse_id(config, pad, rows, "the tokenizer's padding")
    data = load_data(
        config.data,
        tokenizer,
        training_subset=config.train.subset,
        eval_subset=config.eval.eval_subset,
        needs_prompt=config.moe.routes_prompts,
    )
    for examples in (*data.train, *data.validation):
        if config.moe.routes_prompts and examples[0]["labels"][0] >= 0:
            raise ValueError(
                f"source {examples.name!r} is plain text, which has no prompt to route by: set "
                "moe.router_scope to site or shared"
            )
        if examples.largest_id >= rows:
            _refuse_id(config, examples.largest_id, rows, f"{examples.name}/{examples.split}")
        if isinstance(examples, StreamedSet):
            examples.embeddings = rows
    return data


def _refuse_id(config: RunConfig, token: int, rows: int, where: str) -> NoReturn:
    raise ValueError(
        f"{where} has the token id {token}, but the base {config.model.base!r} has {rows} rows of "
        "embeddings: take the tokenizer that belongs to it, or a base whose embeddings are enlarged"
    )


def fit_to_base(config: RunConfig) -> RunConfig:
    """With data.max_length as a number: 512 by default, or what the base takes if that is less.

    Raises ValueError where more is set than the base has positions.
    """
    base = BaseSpec.resolve(config.model.base, config.model.revision).config()
    asked, most = config.data.max_length, max_positions(base)
    length = asked or MAX_LENGTH
    if most is not None and most < length:
        if asked is None:
            print(f"note: data.max_length is {most}, not {length}: the base takes no more tokens")
            length = most
        elif has_position_table(base):
            raise ValueError(f"data.max_length is {asked}, but the base takes at most {most}")
        else:
            print(f"note: data.max_length is {asked}, and the base was made for {most} tokens")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=length))


def record_settings(config: RunConfig, device: torch.device, earlier: str) -> None:
    """config.yaml and env.json; only once nothing speaks against the run any more.

    A config.yaml with other settings is kept as config.yaml.<earlier>.
    """
    folder, settings = run_folder(config), dump_run_config(config)
    file = folder / "config.yaml"
    if file.exists() and file.read_text(encoding="utf-8") != settings:
        say(f"the earlier settings are kept as {quarantine(file, earlier)}")
    write_file(file, settings)
    write_file(folder / "env.json", json.dumps(environment(device), indent=2) + "\n")


def log_summary(run: Run) -> None:
    """What is about to happen: data, experts, parameters, steps."""
    for report in run.data.reports:
        run.log.info(report.describe())
    if (subset := run.config.train.subset) is not None:
        kind = f"a share of {subset:.4g}" if isinstance(subset, float) else f"{subset} rows"
        run.log.info(f"training_subset is {kind} of the training rows of each set")
    trainable, frozen = run.model.count_parameters()
    blocks, table = len(run.model.site_names), run.model.experts.table
    ranks = sorted({row.rank for row in table})
    device = run.model.device
    run.log.info(
        f"{len(table)} experts of rank {', '.join(map(str, ranks))} at {blocks} blocks: "
        f"{trainable:,} trainable parameters beside {frozen:,} frozen ones; "
        f"{run.steps - run.progress.step} steps on {device}"
    )
    if device.type == "cpu" and is_emulated(run.model.base.dtype):
        run.log.info(
            f"warning: this CPU has no instructions for {run.config.model.dtype}, so the base "
            "takes ten times as long as in float32, or more: set model.dtype float32"
        )

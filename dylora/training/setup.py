"""A run and its parts, built from a configuration in the order in which things fail cheaply."""

import dataclasses
import json
import math
import platform
import random
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.bases import choose_device, load_tokenizer
from dylora.maturity import ExpertMaturity
from dylora.model import DyLoRA_MoE
from dylora.model_files import load_model
from dylora.run_config import RunConfig, dump_run_config
from dylora.storage.checkpoint import checkpoints, read_description, write_file
from dylora.training.data import PreparedData, load_data
from dylora.training.monitor import RunLog
from dylora.training.optim import build_optimizer, build_scheduler
from dylora.training.prompts import pad_token_id
from dylora.training.sampler import InterleavedSampler

# Settings of a mixture that say how it is trained and mixed, not of what form its tensors are.
FREE_SETTINGS = {
    *("top_k_experts", "router_temperature", "router_noise", "routing_mode", "lora_dropout"),
    *("router_aux_loss_coef", "router_switch_loss_coef", "router_z_loss_coef", "freeze_A"),
    *("load_balance_loss_type", "expert_capacity_factor", "expert_dropout", "maturity_mode"),
    *("maturity_tau", "maturity_rho", "maturity_s", "maturity_fast", "maturity_slow"),
    *("maturity_threshold", "maturity_schedule", "init_lora_weights", "router_type"),
}


@dataclass
class Progress:
    """Where a run stands; saved as trainer_state.json."""

    step: int = 0
    targets: int = 0  # target tokens trained on so far
    best_loss: float = math.inf
    best_step: int | None = None
    evaluations_without_gain: int = 0
    skipped_steps: int = 0  # whose loss or gradient was not finite: they updated nothing
    skipped_in_a_row: int = 0  # of those, the latest without a good step between
    evaluation_due: bool = False  # stopped after this step, before it was evaluated
    benchmark_due: bool = False  # likewise: the benchmark comes after the save
    # f of the balance losses, [N, E] each: the previous step's assignment fractions over its whole
    # accumulated batch, so that the loss does not depend on how the batch is split.
    fractions: dict[str, list[list[float]]] | None = None
    sampler: dict[str, Any] = field(default_factory=dict)


class Run(NamedTuple):
    """Everything a run works with."""

    config: RunConfig
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    model: DyLoRA_MoE
    sampler: InterleavedSampler
    optimizer: torch.optim.AdamW
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    steps: int  # optimizer steps of the whole run
    target_tokens: float  # that the whole run will train on, about
    log: RunLog
    progress: Progress

    @property
    def pad_token_id(self) -> int:
        return pad_token_id(self.tokenizer)


def prepare(config: RunConfig, *, fresh: bool) -> Run:
    """Load and build everything, in the order in which it can fail cheaply."""
    if not config.data.sources:
        raise ValueError("data.sources is empty: name at least one set to train on")
    folder = run_folder(config)
    if fresh and checkpoints(folder):
        raise FileExistsError(
            f"{folder} already holds checkpoints: give --resume_from_checkpoint latest, "
            f"another --name, or remove it"
        )
    device = choose_device(config.model.device)
    tokenizer = load_tokenizer(config.model.base, config.model.revision)
    data = load_run_data(config, tokenizer)
    per_step = config.train.batch_size * config.train.gradient_accumulation_steps
    sampler = InterleavedSampler(
        [len(examples) for examples in data.train],
        interleaved=config.data.interleaved_sampling,
        seed=config.data.seed,
        window=config.data.length_window,
        rows_per_step=per_step,
        tokens=[examples.all_lengths for examples in data.train],
    )
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
    model.training_record = {"data": data.stamp, "seed": config.train.seed}
    if fresh and config.train.init_from is not None:
        begin_with(model, Path(config.train.init_from), config.train.train_experts)
    if not any(parameter.requires_grad for _, parameter in model.own_parameters()):
        raise ValueError(
            "nothing would be trained: all experts are frozen and no router is learned; set "
            "train.train_experts true"
        )
    if config.train.gradient_checkpointing:
        model.enable_checkpointing()

    steps = config.train.max_steps or max(1, round(config.train.epochs * len(sampler) / per_step))
    targets_per_step = per_step * sampler.mean([rows.mean_targets for rows in data.train])
    optimizer = build_optimizer(model, config.train)

    folder.mkdir(parents=True, exist_ok=True)
    if fresh:
        (folder / "metrics.jsonl").unlink(missing_ok=True)
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
        log=RunLog(folder, config.log, config.name, dataclasses.asdict(config)),
        progress=Progress(),
    )


def begin_with(model: DyLoRA_MoE, folder: Path, train_experts: bool | None) -> None:
    """Give a model the experts, routers and maturity of a checkpoint, for a run of its own.

    Moments, schedule, counters, place in the data and the averages behind maturity begin afresh.
    Raises ValueError, naming the setting, where the checkpoint is of another form.
    """
    description = read_description(folder)
    ours = model.config.to_dict()
    for name, theirs in description["moe"].items():
        if name not in FREE_SETTINGS and ours.get(name) != theirs:
            raise ValueError(
                f"moe.{name} is {ours.get(name)!r}, but train.init_from {folder} has {theirs!r}, "
                "and its tensors are made for that"
            )
    load_model(model, folder, description["experts"])
    newborn = ExpertMaturity.create(len(model.experts))
    model.set_maturity(newborn._replace(maturity=model.maturity.maturity))
    if train_experts is not None:
        live = model.experts.live
        model.experts.unfreeze(*live) if train_experts else model.experts.freeze(*live)
    model.training_record["earlier"] = [description["training"]]


def run_folder(config: RunConfig) -> Path:
    """Where everything of a run lies."""
    return Path(config.output_dir) / config.name


def load_run_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """The sets of a run, cut to its subsets. Raises ValueError as `load_data` does."""
    return load_data(
        config.data,
        tokenizer,
        training_subset=config.train.training_subset,
        eval_subset=config.eval.eval_subset,
    )


def record_settings(run: Run) -> None:
    """config.yaml and env.json; only once nothing speaks against the run any more."""
    device = run.model.injection.state.maturity_E.device
    write_file(run.folder / "config.yaml", dump_run_config(run.config))
    write_file(run.folder / "env.json", json.dumps(environment(device), indent=2) + "\n")


def seed_everything(seed: int) -> None:
    """torch (every device), numpy and random."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def environment(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for env.json."""
    import transformers

    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    ).stdout.strip()
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": named,
        "threads": str(torch.get_num_threads()),
        "commit": commit or "unknown",
    }

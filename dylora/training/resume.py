"""Saving a run and continuing it exactly: the same numbers as if it had never stopped."""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dylora.base_models import BaseSpec
from dylora.model_io import load_model, write_model
from dylora.storage import folders
from dylora.storage.checkpoint import BEST_FILE, Checkpoint
from dylora.storage.manifest import is_intact, is_run_checkpoint
from dylora.storage.tensors import read_state
from dylora.training.optim import (
    empty_state,
    load_state_by_name,
    named_parameters,
    parameter_groups,
    regroup,
    state_by_name,
)
from dylora.training.random_state import check_random_state, random_state, restore_random_state
from dylora.training.run import Run, freeze_routers
from dylora.training.schedule import check_schedule, restore_schedule
from dylora.training.settings import data_difference, find_changes, rates_of_checkpoint
from dylora.training.trainer_state import check_scaler, read_progress, require_same_form


def save(run: Run) -> Path:
    """Write checkpoint-<step>, point to the best one, and drop the oldest.

    Raises ValueError, naming the last good checkpoint, when it cannot be written or read back; the
    older ones are as they were.
    """
    progress, config = run.progress, run.config
    folder = run.folder / f"checkpoint-{progress.step}"
    write_state(run, folder, state_by_name(run.optimizer, run.model))
    best = None
    if progress.best_step is not None:
        best = run.folder / f"checkpoint-{progress.best_step}"
        pointer = {"checkpoint": best.name, "val_loss": progress.best_loss}
        with _as_one_error(run, run.folder / BEST_FILE):
            folders.write_file(run.folder / BEST_FILE, json.dumps(pointer) + "\n")
    if config.train.save_total_limit is not None:
        try:
            folders.rotate(run.folder, config.train.save_total_limit, best)
        except OSError as error:  # the new one is whole: that is what counts
            run.log.info(f"warning: older checkpoints could not be deleted: {error}")
    run.log.info(f"saved {run.model.size_message(folder)}")
    return folder


def preflight_save(run: Run) -> None:
    """Write a checkpoint of full size, read it back and delete it: now, not hours from now.

    Raises ValueError when it cannot be written, or when two do not fit on the disk: a new one is
    whole before an older one goes.
    """
    folder = run.folder / folders.PREFLIGHT
    moments = state_by_name(run.optimizer, run.model)
    for name, parameter in named_parameters(run.model).items():
        if parameter.requires_grad and not moments[name]:  # they are made in the first step
            moments[name] = empty_state(run.optimizer, parameter)
    try:
        write_state(run, folder, moments)
        with _as_one_error(run, folder):
            _read_back(run, folder)
        size, free = folders.folder_bytes(folder), shutil.disk_usage(run.folder).free
    finally:
        folders.remove_rehearsal(run.folder)
    if free < size:
        raise ValueError(
            f"a checkpoint of this run has {size / 1e6:.1f} MB, and beside it {free / 1e6:.1f} MB "
            f"are free for {run.folder}: two do not fit. Free some space, or give another "
            "--output_dir"
        )


def _read_back(run: Run, folder: Path) -> None:
    """Raises ValueError for a checkpoint that verifies, but that no run could go on from."""
    checkpoint = Checkpoint.of_verified(folder)
    check_same_settings(run, checkpoint)
    read_progress(folder / "trainer_state.json", len(run.model.site_names), len(run.model.experts))
    for name in ("optimizer.pt", "scheduler.pt"):
        _load(folder / name)
    check_random_state(folder / "rng_state.pt", _load(folder / "rng_state.pt"))


def write_state(run: Run, folder: Path, moments: dict[str, Any]) -> None:
    """Everything a run is, as a folder that is whole or absent. Raises ValueError as `save`."""
    progress = run.progress
    progress.sampler = run.sampler.state_dict()
    if run.model.mixture.fractions is not None:
        progress.fractions = {name: f.tolist() for name, f in run.model.mixture.fractions.items()}
    run.model.training_record |= {"step": progress.step, "targets": progress.targets}

    def write_files(folder: Path) -> None:
        write_model(run.model.mixture, folder)
        run.tokenizer.save_pretrained(folder)  # for other tools; here the base's own is taken
        torch.save(moments, folder / "optimizer.pt")
        torch.save(
            {"scheduler": run.scheduler.state_dict(), "scaler": run.scaler.state_dict()},
            folder / "scheduler.pt",
        )
        torch.save(random_state(), folder / "rng_state.pt")
        state = dataclasses.asdict(progress) | {"steps": run.steps}
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")

    with _as_one_error(run, folder):
        folders.write_folder(folder, write_files)


def load_best(run: Run) -> None:
    """After the last step: the weights of the best checkpoint where eval.load_best_at_end asks for
    them; else a line that says that the last ones are not the best."""
    best = run.progress.best_step
    if best is None or best == run.progress.step:
        return
    name = f"checkpoint-{best}"
    if not run.config.eval.load_best_at_end:
        run.log.info(
            f"note: the results are of the last weights, but those of {name} have the lowest "
            "validation loss: eval.load_best_at_end takes them"
        )
        return
    checkpoint = run.processes.from_first(lambda: Checkpoint.open(run.folder / name))
    load_model(run.model.experts, checkpoint)
    run.model.training_record = checkpoint.description["training"]
    run.log.info(f"took back the weights of {name}")


def last_good(run: Run) -> str:
    """A sentence that names the newest checkpoint that verifies."""
    for path in reversed(folders.checkpoints(run.folder)):
        if is_intact(path):
            return f"The last good checkpoint is {path}."
    return "There is no checkpoint yet."


def resume(run: Run, source: str) -> None:
    """Put a checkpoint's whole state back into a fresh run.

    What the run's folder holds of later steps is set aside, as .damaged or .superseded: it belongs
    to a future that is not going to be, and the run comes by those names again.
    Raises ValueError or FileNotFoundError naming what is missing or does not fit.
    """

    def find() -> Checkpoint:
        if source == "latest":
            return Checkpoint.latest(run.folder, run.log.info)
        return Checkpoint.open(source, run.log.info)

    checkpoint = run.processes.from_first(find)
    folder, description = checkpoint.path, checkpoint.description
    if not is_run_checkpoint(folder):
        raise ValueError(
            f"{folder} is no checkpoint of a run: train.init_from begins a run with its experts"
        )
    check_same_settings(run, checkpoint)
    load_model(run.model.experts, checkpoint)
    freeze_routers(run.config, run.model)
    kept = {"earlier", "stage", "text_hashes"}  # of what it began with
    for name in kept & description["training"].keys():
        run.model.training_record[name] = description["training"][name]
    regroup(run.optimizer, run.model, run.config.train)
    file = folder / "optimizer.pt"
    moments = _load(file)
    try:
        load_state_by_name(run.optimizer, run.model, moments)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    file = folder / "trainer_state.json"
    state = read_progress(file, len(run.model.site_names), len(run.model.experts))
    try:
        run.sampler.load_state_dict(state["sampler"])
    except ValueError as error:
        raise ValueError(f"{file}: sampler: {error}") from error
    if state.pop("steps") != run.steps:
        run.log.info("note: the run has another length than the one it continues")
    for name, value in state.items():
        setattr(run.progress, name, value)
    if run.progress.fractions is not None:
        fractions = run.progress.fractions.items()
        run.model.mixture.fractions = {name: torch.tensor(rows) for name, rows in fractions}
    step = run.progress.step
    run.model.experts.set_progress(step, step / run.steps)
    resume_schedule(run, checkpoint)
    generators = _load(folder / "rng_state.pt")
    check_random_state(folder / "rng_state.pt", generators)
    run.processes.from_first(lambda: set_aside_later(run, checkpoint, step))
    forget_lost_best(run, checkpoint)
    run.log.forget_after(step)
    restore_random_state(generators)
    run.log.info(f"resumed {folder} at step {step}")


def forget_lost_best(run: Run, checkpoint: Checkpoint) -> None:
    """Of a best checkpoint that is gone or damaged nothing can be taken back: the next one that is
    evaluated is the best."""
    progress = run.progress
    folder = run.folder / f"checkpoint-{progress.best_step}"
    if progress.best_step is None or folder == checkpoint.path:
        return
    if not run.processes.from_first(lambda: is_intact(folder)):
        run.log.info(
            f"note: {folder.name} had the lowest validation loss and is not there, whole, any "
            "more: the best is sought among what comes now"
        )
        progress.best_step, progress.best_loss = None, math.inf


def set_aside_later(run: Run, checkpoint: Checkpoint, step: int) -> None:
    """Rename the run's checkpoints of later steps."""
    for later in folders.checkpoints(run.folder):
        if int(later.name.rpartition("-")[2]) > step:
            whole = later not in checkpoint.damaged and is_intact(later)
            aside = folders.quarantine(later, "superseded" if whole else "damaged")
            run.log.info(f"set aside as {aside}")


def check_same_settings(run: Run, checkpoint: Checkpoint) -> None:
    """Raises ValueError naming what differs and cannot change; says what is taken."""
    folder, description = checkpoint.path, checkpoint.description
    kept = description["base_model_name_or_path"]
    if kept is None or BaseSpec.resolve(kept).name != run.model.base_name:
        raise ValueError(f"{folder} was trained on {kept}, this run has {run.model.base_name}")
    checkpoint.check_base(run.model.base_fingerprint)
    changes = find_changes(checkpoint, run.config)
    other = data_difference(description["training"].get("data", {}), run.data.provenance)
    if other is not None:
        raise ValueError(f"{folder} was trained on other data: {other}")
    for line in changes:
        run.log.info(line)


def resume_schedule(run: Run, checkpoint: Checkpoint) -> None:
    """Put the schedule back in its place, under this run's learning rates."""
    file, config = checkpoint.path / "scheduler.pt", run.config.train
    saved = _load(file)
    ours = {"scheduler": run.scheduler.state_dict(), "scaler": run.scaler.state_dict()}
    scaler = saved.get("scaler") if isinstance(saved, dict) else None
    if isinstance(scaler, dict) and not (scaler and ours["scaler"]):
        ours["scaler"] = saved["scaler"] = {}  # only float16 scales: from or to it, a scale is new
    require_same_form(file, "", saved, ours)
    before = rates_of_checkpoint(config, checkpoint)
    began_with, rates = (
        [group["lr"] for group in parameter_groups(run.model, settings)]
        for settings in (before, config)
    )
    check_schedule(file, saved["scheduler"], ours["scheduler"], run.progress.step, began_with)
    rates = restore_schedule(run.scheduler, saved["scheduler"], began_with, rates)
    for group, rate in zip(run.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    if saved["scaler"]:
        check_scaler(file, saved["scaler"], ours["scaler"])
        run.scaler.load_state_dict(saved["scaler"])


def _load(file: Path) -> Any:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: the run cannot continue exactly without it")
    return read_state(file)


@contextlib.contextmanager
def _as_one_error(run: Run, what: Path) -> Iterator[None]:
    """Turns the many errors of a full or broken disk into one that says what is left.

    torch raises RuntimeError, safetensors its own.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        if isinstance(error, FileExistsError):
            raise
        raise ValueError(f"{what} could not be saved ({error}). {last_good(run)}") from error

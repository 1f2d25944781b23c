"""Saving a run and continuing it exactly: the same numbers as if it had never stopped."""

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy
import torch

from dylora.model_files import load_model, write_model
from dylora.storage.checkpoint import latest_checkpoint, prune, read_description, write_folder
from dylora.training.optim import load_state_by_name, regroup, state_by_name
from dylora.training.setup import Run


def save(run: Run) -> Path:
    """Write checkpoint-<step>, point to the best one, and drop the oldest."""
    progress, config = run.progress, run.config
    progress.sampler = run.sampler.state_dict()
    run.model.training_record |= {"step": progress.step, "targets": progress.targets}

    def write_files(folder: Path) -> None:
        write_model(run.model, folder)
        torch.save(state_by_name(run.optimizer, run.model), folder / "optimizer.pt")
        torch.save(
            {"scheduler": run.scheduler.state_dict(), "scaler": run.scaler.state_dict()},
            folder / "scheduler.pt",
        )
        torch.save(random_state(), folder / "rng_state.pt")
        state = dataclasses.asdict(progress) | {"steps": run.steps}
        (folder / "trainer_state.json").write_text(json.dumps(state, indent=2) + "\n")

    folder = run.folder / f"checkpoint-{progress.step}"
    write_folder(folder, write_files)
    best = None
    if progress.best_step is not None:
        best = run.folder / f"checkpoint-{progress.best_step}"
        pointer = {"checkpoint": best.name, "val_loss": progress.best_loss}
        (run.folder / "best.json").write_text(json.dumps(pointer) + "\n")
    if config.train.save_total_limit is not None:
        prune(run.folder, config.train.save_total_limit, best)
    run.log.say(f"saved {run.model.size_message(folder)}")
    return folder


def resume(run: Run, source: str) -> None:
    """Put a checkpoint's whole state back into a fresh run.

    Raises ValueError or FileNotFoundError naming what is missing or does not fit.
    """
    folder = latest_checkpoint(run.folder, run.log.say) if source == "latest" else Path(source)
    description = read_description(folder)
    check_same_settings(run, folder, description)
    load_model(run.model, folder, description["experts"])
    regroup(run.optimizer, run.model, run.config.train)
    load_state_by_name(run.optimizer, run.model, _load(folder / "optimizer.pt"))
    schedule = _load(folder / "scheduler.pt")
    run.scheduler.load_state_dict(schedule["scheduler"])
    run.scaler.load_state_dict(schedule["scaler"])
    state = json.loads((folder / "trainer_state.json").read_text())
    if state.pop("steps") != run.steps:
        run.log.say("note: the run has another length than the one it continues")
    for name, value in state.items():
        setattr(run.progress, name, value)
    run.model.experts.set_progress(run.progress.step, run.progress.step / run.steps)
    for group, rate in zip(run.optimizer.param_groups, run.scheduler.get_last_lr(), strict=True):
        group["lr"] = rate
    run.sampler.load_state_dict(run.progress.sampler)
    run.log.forget_after(run.progress.step)
    restore_random_state(_load(folder / "rng_state.pt"))
    run.log.say(f"resumed {folder} at step {run.progress.step}")


def random_state() -> dict[str, Any]:
    """The state of every generator, in types that torch.load(weights_only=True) reads."""
    version, words, gauss = random.getstate()
    numpy_state: Any = numpy.random.get_state()
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(words), gauss],
        "numpy": [
            str(name),
            torch.from_numpy(keys.astype("int64")),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo `random_state`."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))


def _load(file: Path) -> Any:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: the run cannot continue exactly without it")
    return torch.load(file, weights_only=True, map_location="cpu")


def check_same_settings(run: Run, folder: Path, description: dict[str, Any]) -> None:
    """Raises ValueError naming a setting of a checkpoint that differs from the run's."""
    ours = run.config.moe.to_dict()
    for name, value in description["moe"].items():
        if ours.get(name) != value:
            raise ValueError(
                f"{folder} was trained with moe.{name} = {value!r}, this run has {ours.get(name)!r}"
            )
    if description["base_model_name_or_path"] != run.model.base_name:
        raise ValueError(
            f"{folder} was trained on {description['base_model_name_or_path']}, "
            f"this run has {run.model.base_name}"
        )
    if description["quantization"] != run.config.model.quantization:
        raise ValueError(
            f"{folder} was trained with model.quantization = {description['quantization']!r}, "
            f"this run has {run.config.model.quantization!r}"
        )
    if what_rows(description["training"].get("data", {})) != what_rows(run.data.stamp):
        raise ValueError(f"{folder} was trained on other data than this run names")


def what_rows(stamp: dict[str, Any]) -> dict[str, Any]:
    """A data stamp without where the rows lie: a moved file with the same rows is the same data."""
    stamp = json.loads(json.dumps(stamp))  # tuples become lists, as on disk
    for source in stamp.get("sources", []):
        source.pop("path", None)
        source.pop("revision", None)
    return stamp

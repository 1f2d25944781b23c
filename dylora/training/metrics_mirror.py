"""Mirrors metrics.jsonl to a service that shows runs, in a process of its own.

`python metrics_mirror.py SERVICE FILE OFFSET SETTINGS` sends every row beyond OFFSET until its
standard input ends, which happens when the trainer closes it or dies. Whatever the service does
(hang, crash, fill the disk) the trainer does not notice. It imports nothing of ours: torch alone
takes seconds.
"""

import json
import os
import select
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

POLL_SECONDS = 1.0


class Service(NamedTuple):
    """A run that is open at a service."""

    log: Callable[[dict[str, float], int], Any]  # a row and its step
    finish: Callable[[], Any]


def main() -> None:
    """Exit code 1, with the reason as the last line of the output, when the service refuses."""
    name, file, offset, settings = sys.argv[1:]
    try:
        mirror(SERVICES[name], Path(file), int(offset), json.loads(settings))
    except Exception as error:
        print(" ".join(str(error).split()), flush=True)
        raise SystemExit(1) from None


def mirror(
    start: Callable[..., Service], file: Path, offset: int, settings: dict[str, Any]
) -> None:
    """Send rows until standard input ends, then the rest."""
    service, ended = start(file.parent, **settings), False
    while not ended:
        ended = bool(select.select([sys.stdin], [], [], POLL_SECONDS)[0])
        lines, offset = whole_lines(file, offset)
        for line in lines:
            row = json.loads(line)
            service.log({key: value for key, value in row.items() if key != "step"}, row["step"])
    service.finish()


def start_wandb(folder: Path, project: str, name: str, config: dict[str, Any]) -> Service:
    """Offline without a key. A resumed run goes on as the same one, by the number it was given."""
    import wandb

    known = folder / "wandb.id"
    if not known.exists():
        known.write_text(os.urandom(4).hex())
    has_key = bool(os.environ.get("WANDB_API_KEY")) or bool(wandb.api.api_key)
    run = wandb.init(
        project=project,
        name=name,
        dir=str(folder),
        config=config,
        mode=None if has_key or "WANDB_MODE" in os.environ else "offline",
        id=known.read_text(),
        resume="allow",
    )
    return Service(lambda row, step: run.log(row, step=step), run.finish)


def start_tensorboard(folder: Path, project: str, name: str, config: dict[str, Any]) -> Service:
    """Event files in the folder `tensorboard` of the run."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```", 0)

    def log(row: dict[str, float], step: int) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return Service(log, writer.close)


def start_trackio(folder: Path, project: str, name: str, config: dict[str, Any]) -> Service:
    """Runs of a project are told apart by their names."""
    trackio = import_module("trackio")
    trackio.init(project=project, name=name, config=config, resume="allow", embed=False)
    return Service(lambda row, step: trackio.log(row, step=step), trackio.finish)


def start_mlflow(folder: Path, project: str, name: str, config: dict[str, Any]) -> Service:
    """Where MLFLOW_TRACKING_URI says; else as mlflow does by itself."""
    mlflow = import_module("mlflow")
    known = folder / "mlflow.id"
    mlflow.set_experiment(project)
    before = known.read_text() if known.exists() else None
    run = mlflow.start_run(run_id=before, run_name=None if before else name)
    if before is None:
        known.write_text(run.info.run_id)
        mlflow.log_dict(config, "config.json")
    return Service(lambda row, step: mlflow.log_metrics(row, step=step), mlflow.end_run)


SERVICES: dict[str, Callable[..., Service]] = {
    "wandb": start_wandb,
    "tensorboard": start_tensorboard,
    "trackio": start_trackio,
    "mlflow": start_mlflow,
}


def whole_lines(file: Path, offset: int) -> tuple[list[bytes], int]:
    """The lines that have ended since `offset`, and the offset behind them."""
    if not file.exists():
        return [], offset
    with file.open("rb") as content:
        content.seek(offset)
        text = content.read()
    end = text.rfind(b"\n") + 1
    return text[:end].splitlines(), offset + end


if __name__ == "__main__":
    main()

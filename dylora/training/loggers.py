"""Mirrors of metrics.jsonl. Whatever they do never changes or stops a run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

WANDB_SECONDS = 4.0  # that a run waits for wandb at its end


class WandbMirror:
    """The process of training/wandb_mirror.py, seen from the trainer.

    Its methods return a line about what went wrong, after which the mirror is of no more use.
    """

    def __init__(self, file: Path, project: str, name: str, settings: dict[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "log.wandb is true, but wandb is not installed: pip install 'dylora[wandb]'"
            )
        self._file, self._output = file, file.with_name("wandb.log")
        self._settings = {
            "project": project,
            "name": name,
            "dir": str(file.parent),
            "config": settings,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str | None:
        """Mirror what is written from now on."""
        offset = self._file.stat().st_size if self._file.exists() else 0
        # -P: no module of this folder may pass for one that wandb imports.
        script = [sys.executable, "-P", str(Path(__file__).with_name("wandb_mirror.py"))]
        arguments = [str(self._file), str(offset), json.dumps(self._settings)]
        try:
            with self._output.open("wb") as output:
                self._process = subprocess.Popen(
                    [*script, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a Ctrl-C is the trainer's
                )
        except OSError as error:
            return f"wandb could not start ({error})"
        return None

    def failure(self) -> str | None:
        """Why the process has ended, if it has."""
        if self._process is None or not self._process.poll():
            return None
        with suppress(OSError):
            lines = self._output.read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
            return f"wandb stopped, and is left out from here on ({last or 'no reason given'})"
        return "wandb stopped, and is left out from here on"

    def finish(self) -> str | None:
        """Let it send the rest, but not for long: a dead server would hold it for minutes."""
        process = self._process
        if process is None:
            return None
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(WANDB_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            where = self._file.parent / "wandb"
            return f"wandb did not finish in {WANDB_SECONDS:g} s (`wandb sync` sends {where} later)"
        return self.failure()

"""Mirrors of metrics.jsonl at services that show runs. They never change or stop a run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 4.0  # that a run waits for a service at its end


class Mirror:
    """The process of training/metrics_mirror.py for one service, seen from the trainer.

    Its methods return a line about what went wrong, after which the mirror is of no more use.
    """

    def __init__(
        self, service: str, file: Path, project: str, name: str, config: dict[str, Any]
    ) -> None:
        if importlib.util.find_spec(service) is None:
            raise ValueError(
                f"log.report_to names {service}, which is not installed: pip install "
                f"'dylora[{service}]'"
            )
        self.service, self._file, self._output = service, file, file.with_name(f"{service}.log")
        self._settings = {"project": project, "name": name, "config": config}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> str | None:
        """Mirror what is written from now on."""
        offset = self._file.stat().st_size if self._file.exists() else 0
        # -P: no module of this folder may pass for one that wandb imports.
        script = [sys.executable, "-P", str(Path(__file__).with_name("metrics_mirror.py"))]
        arguments = [self.service, str(self._file), str(offset), json.dumps(self._settings)]
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
            return f"{self.service} could not start ({error})"
        return None

    def failure(self) -> str | None:
        """Why the process has ended, if it has."""
        if self._process is None or not self._process.poll():
            return None
        last = ""
        with suppress(OSError):
            lines = self._output.read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        reason = last or "no reason given"
        return f"{self.service} stopped, and is left out from here on ({reason})"

    def finish(self) -> str | None:
        """Let it send the rest, but not for long: a dead server would hold it for minutes."""
        process = self._process
        if process is None:
            return None
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            later = f" (`wandb sync` sends {self._file.parent / 'wandb'} later)"
            later = later if self.service == "wandb" else ""
            return f"{self.service} did not finish in {SECONDS:g} s{later}"
        return self.failure()

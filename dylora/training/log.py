"""metrics.jsonl, run.log, a progress bar or lines."""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dylora.run_config import LogConfig
from dylora.storage.folders import quarantine
from dylora.storage.safe_io import metrics_row
from dylora.training.loggers import Mirror


class RunLog:
    """metrics.jsonl, the bar or the lines, run.log, and mirrors at services that show runs.

    None of it can change or stop a run: what cannot be written is left out, and that is said.
    """

    def __init__(
        self, folder: Path, config: LogConfig, run_name: str, settings: dict[str, Any]
    ) -> None:
        """Raises ValueError when a service of log.report_to is not installed."""
        self._file, self._text = folder / "metrics.jsonl", folder / "run.log"
        self._bar: tqdm[Any] | None = None
        self._mirrors = [
            Mirror(service, self._file, config.project, run_name, settings)
            for service in config.services
        ]
        self._early: list[str] | None = []  # lines of before the start, which may be refused
        self._lost_rows = 0
        self._started = time.perf_counter()

    def set_aside_earlier(self) -> None:
        """Keep the rows of an earlier run, which has saved nothing, under a name of their own."""
        if self._file.exists():
            self.info(f"earlier metrics are kept as {quarantine(self._file, 'earlier')}")
            for known in self._file.parent.glob("*.id"):  # by which services know that run
                known.unlink()

    def forget_after(self, step: int) -> None:
        """Drop rows of a later step: a resumed run writes them again."""
        if not self._file.exists():
            return
        lines = self._file.read_bytes().splitlines()
        rows = [metrics_row(line) for line in lines]
        odd = sum(row is None for row in rows[:-1])  # the last one of a killed run is half-written
        if odd:
            self.info(f"warning: {odd} lines of {self._file} are no rows, and are dropped")
        kept = [
            line + b"\n"
            for line, row in zip(lines, rows, strict=True)
            if row is not None and row["step"] <= step
        ]
        replacement = self._file.with_suffix(".jsonl.new")
        replacement.write_bytes(b"".join(kept))
        replacement.replace(self._file)

    def has(self, step: int, metric: str) -> bool:
        """Whether a row of that step holds the metric."""
        if not self._file.exists():
            return False
        rows = map(metrics_row, self._file.read_bytes().splitlines())
        return any(row is not None and row["step"] == step and metric in row for row in rows)

    def start(self, step: int, steps: int) -> None:
        """Show the bar, if this is a terminal; start the mirrors."""
        self._started, self._first_step, self._steps = time.perf_counter(), step, steps
        early, self._early = self._early, None
        with suppress(OSError), self._text.open("a", encoding="utf-8") as file:
            file.writelines(early or ())
        with suppress(OSError, ValueError):
            self._bar = tqdm(
                total=steps, initial=step, disable=None, unit="step", dynamic_ncols=True
            )
        self._ask_mirrors(Mirror.start)

    def advance(self, loss: float, tokens_per_s: float) -> None:
        """One step is done."""
        if self._bar is not None and not self._bar.disable:
            shown = f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s"
            with suppress(OSError, ValueError):
                self._bar.set_postfix_str(shown, refresh=False)
                self._bar.update()

    def write(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """A row of metrics.jsonl, which is mirrored. On a full disk the row is left out, whole."""
        row = json.dumps({"step": step, "tokens": tokens, **metrics}) + "\n"
        size = None
        try:
            with self._file.open("a") as file:
                size = file.tell()
                file.write(row)
        except OSError as error:
            self._lost_rows += 1
            if self._lost_rows == 1:
                self.info(f"warning: metrics.jsonl lacks rows from step {step} on: {error}")
            if size is not None:
                with suppress(OSError):
                    os.truncate(self._file, size)
        self._ask_mirrors(Mirror.failure)

    def progress_line(self, step: int, metrics: dict[str, float]) -> None:
        """A plain line where there is no bar."""
        if self._bar is not None and not self._bar.disable:
            return
        done = step - self._first_step
        left = (self._steps - step) * (time.perf_counter() - self._started) / max(done, 1)
        self.info(
            f"step {step}/{self._steps}  loss {metrics['train/loss']:.4f}  "
            f"lr {metrics['train/lr']:.2e}  {metrics['train/tokens_per_s']:,.0f} tokens/s  "
            f"{tqdm.format_interval(left)} left"
        )

    def info(self, text: str) -> None:
        """A line for the reader, clear of the bar, and in run.log with the time."""
        say(text)
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n"
        if self._early is not None:
            self._early.append(line)
            return
        with suppress(OSError), self._text.open("a", encoding="utf-8") as file:
            file.write(line)

    def close(self) -> None:
        """End the bar and the mirrors."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
        if self._lost_rows:
            self.info(f"warning: metrics.jsonl lacks {self._lost_rows} rows that did not fit")
        self._ask_mirrors(Mirror.finish)

    def _ask_mirrors(self, question: Callable[[Mirror], str | None]) -> None:
        """Drop the mirrors whose answer is a failure."""
        answers = [(mirror, question(mirror)) for mirror in self._mirrors]
        self._mirrors = [mirror for mirror, failure in answers if failure is None]
        for failure in filter(None, (failure for _, failure in answers)):
            self.info(f"{failure}; metrics.jsonl has everything")


class SilentLog(RunLog):
    """Of a process beside the first: nothing is told, and no file is touched."""

    _nothing: Any = lambda *_: None
    set_aside_earlier = forget_after = start = write = progress_line = info = _nothing


def say(text: str) -> None:
    """A line for the reader, clear of any bar."""
    with suppress(OSError, ValueError):  # nobody reads any more, or the disk is full
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def memory_gb() -> float:
    """Peak memory: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, KiB here

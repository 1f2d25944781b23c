"""What a run tells: metrics.jsonl, a bar or log lines, and a mirror at Weights & Biases.

metrics.jsonl is the truth; whatever wandb does never changes or stops a run.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from dylora.losses import RoutingStatistics
from dylora.model import DyLoRA_MoE
from dylora.run_config import LogConfig

DEAD_BELOW = 0.01  # an expert with less of a site's gate mass counts as dead
WANDB_SECONDS = 4.0  # that a run waits for wandb at its end
COLLAPSED_ABOVE = 0.8  # a site whose leading expert has more than this counts as collapsed


class RoutingSummary(NamedTuple):
    """Means over tokens, on the CPU."""

    usage_NE: Tensor  # share of the gate mass
    entropy_N: Tensor  # of the gates, in nats
    active_N: Tensor  # experts with a non-zero gate
    top1_share_N: Tensor  # largest share of the assignments


def summarize(statistics: RoutingStatistics) -> RoutingSummary:
    """Means from sums."""
    usage_NE = statistics.gate_NE / statistics.gate_NE.sum(-1, keepdim=True).clamp_min(1e-12)
    assigned_N = statistics.assigned_NE.sum(-1).clamp_min(1)
    tokens = statistics.tokens.clamp_min(1)
    return RoutingSummary(
        usage_NE.cpu(),
        (statistics.entropy_N / tokens).cpu(),
        (statistics.active_N / tokens).cpu(),
        (statistics.assigned_NE.amax(-1) / assigned_N).cpu(),
    )


def routing_metrics(
    summary: RoutingSummary, site_names: list[str], active: list[bool] | None = None
) -> dict[str, float]:
    """router/… for all sites together, and for each.

    active: which experts take part; the others have no share and are not dead. None: all.
    """
    taking_part = torch.ones_like(summary.usage_NE[0], dtype=torch.bool)
    if active is not None:
        taking_part = torch.tensor(active)
    dead_N = (summary.usage_NE[:, taking_part] < DEAD_BELOW).sum(-1)
    max_usage_N = summary.usage_NE.amax(-1)
    metrics = {
        "router/entropy": summary.entropy_N.mean().item(),
        "router/max_usage": max_usage_N.max().item(),
        "router/dead_experts": float(dead_N.sum()),
        "router/top1_share": summary.top1_share_N.mean().item(),
        "router/active_experts": summary.active_N.mean().item(),
    }
    for index, name in enumerate(site_names):
        metrics[f"router/entropy/{name}"] = summary.entropy_N[index].item()
        metrics[f"router/max_usage/{name}"] = max_usage_N[index].item()
        metrics[f"router/dead_experts/{name}"] = float(dead_N[index])
        for expert, share in enumerate(summary.usage_NE[index].tolist()):
            metrics[f"router/usage/{name}/{expert}"] = share
    return metrics


def expert_metrics(model: DyLoRA_MoE, load_E: Tensor) -> dict[str, float]:
    """expert/{i}/… : maturity, gradient norm (call it before gradients are cleared), load.

    load_E: share of the gate mass, averaged over sites.
    """
    squares_E = torch.zeros(len(model.experts))
    for adapter in model.injection.adapters.values():
        for stack in adapter.stacks:
            for parameter in stack.parameters():
                if parameter.grad is not None:
                    square_E = parameter.grad.float().square().flatten(1).sum(1).cpu()
                    squares_E[list(stack.experts)] += square_E
    metrics = {}
    for expert, row in enumerate(model.experts.table):
        if row.state == "retired":
            continue
        metrics[f"expert/{expert}/maturity"] = float(model.maturity.maturity[expert])
        metrics[f"expert/{expert}/load"] = float(load_E[expert])
        metrics[f"expert/{expert}/grad_norm"] = float(squares_E[expert].sqrt())
    return metrics


class CollapseWatch:
    """Says once a site when its routing has been collapsed for many steps in a row.

    Collapsed means: the largest share of the gate mass lies above COLLAPSED_ABOVE, or an expert
    that takes part gets less than DEAD_BELOW.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._count: dict[str, int] = {}
        self._told: set[str] = set()

    def observe(self, usage_NE: Tensor, active: list[bool], site_names: list[str]) -> list[str]:
        """One step's usage -> a line for every site that has just been collapsed long enough."""
        if sum(active) < 2:
            return []
        lines = []
        for name, usage_E in zip(site_names, usage_NE[:, torch.tensor(active)], strict=True):
            largest, dead = float(usage_E.max()), int((usage_E < DEAD_BELOW).sum())
            collapsed = largest > COLLAPSED_ABOVE or dead > 0
            self._count[name] = self._count.get(name, 0) + 1 if collapsed else 0
            if self._count[name] >= self.steps and name not in self._told:
                self._told.add(name)
                what = f"one expert has {largest:.0%} of the gate mass"
                if largest <= COLLAPSED_ABOVE:
                    what = f"{dead} of {len(usage_E)} experts have under {DEAD_BELOW:.0%} of it"
                lines.append(
                    f"warning: routing at {name} has been collapsed for {self.steps} steps "
                    f"({what}). Try a larger moe.router_aux_loss_coef or moe.router_temperature, "
                    "or a smaller train.router_learning_rate"
                )
        return lines


class RunLog:
    """metrics.jsonl, the bar or the lines, and wandb.

    None of it can change or stop a run: what cannot be written is left out, and that is said.
    """

    def __init__(
        self, folder: Path, config: LogConfig, run_name: str, settings: dict[str, Any]
    ) -> None:
        """Raises ValueError when log.wandb is true and wandb is not installed."""
        self._file = folder / "metrics.jsonl"
        self._bar: tqdm[Any] | None = None
        self._mirror = None
        if config.wandb:
            self._mirror = WandbMirror(self._file, config.wandb_project, run_name, settings)
        self._lost_rows = 0
        self._started = time.perf_counter()

    def forget_after(self, step: int) -> None:
        """Drop rows of a later step: a resumed run writes them again."""
        if not self._file.exists():
            return
        kept = []
        for line in self._file.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue  # the half-written last line of a killed run
            if row["step"] <= step:
                kept.append(line + "\n")
        replacement = self._file.with_suffix(".jsonl.new")
        replacement.write_text("".join(kept))
        replacement.replace(self._file)

    def has(self, step: int, metric: str) -> bool:
        """Whether a row of that step holds the metric."""
        if not self._file.exists():
            return False
        rows = [json.loads(line) for line in self._file.read_text().splitlines()]
        return any(row["step"] == step and metric in row for row in rows)

    def start(self, step: int, steps: int) -> None:
        """Show the bar, if this is a terminal; start the mirror."""
        self._started, self._first_step, self._steps = time.perf_counter(), step, steps
        with suppress(OSError, ValueError):
            self._bar = tqdm(
                total=steps, initial=step, disable=None, unit="step", dynamic_ncols=True
            )
        if self._mirror is not None:
            self._tell(self._mirror.start())

    def advance(self, loss: float, tokens_per_s: float) -> None:
        """One step is done."""
        if self._bar is not None and not self._bar.disable:
            shown = f"loss {loss:.3f}, {tokens_per_s:,.0f} tokens/s"
            with suppress(OSError, ValueError):
                self._bar.set_postfix_str(shown, refresh=False)
                self._bar.update()

    def write(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """A row of metrics.jsonl, mirrored. On a full disk the row is left out, whole."""
        row = json.dumps({"step": step, "tokens": tokens, **metrics}) + "\n"
        size = None
        try:
            with self._file.open("a") as file:
                size = file.tell()
                file.write(row)
        except OSError as error:
            self._lost_rows += 1
            if self._lost_rows == 1:
                self.say(f"warning: metrics.jsonl lacks rows from step {step} on: {error}")
            if size is not None:
                with suppress(OSError):
                    os.truncate(self._file, size)
        if self._mirror is not None:
            self._tell(self._mirror.trouble())

    def progress_line(self, step: int, metrics: dict[str, float]) -> None:
        """A plain line where there is no bar."""
        if self._bar is not None and not self._bar.disable:
            return
        done = step - self._first_step
        left = (self._steps - step) * (time.perf_counter() - self._started) / max(done, 1)
        self.say(
            f"step {step}/{self._steps}  loss {metrics['train/loss']:.4f}  "
            f"lr {metrics['train/lr']:.2e}  {metrics['train/tokens_per_s']:,.0f} tokens/s  "
            f"{_clock(left)} left"
        )

    def say(self, text: str) -> None:
        """A line for the reader, clear of the bar."""
        with suppress(OSError, ValueError):  # nobody reads any more, or the disk is full
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """End the bar and the mirror."""
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.close()
        if self._lost_rows:
            self.say(f"warning: metrics.jsonl lacks {self._lost_rows} rows that did not fit")
        if self._mirror is not None:
            self._tell(self._mirror.finish())

    def _tell(self, trouble: str | None) -> None:
        if trouble is not None:
            self.say(f"{trouble}; metrics.jsonl has everything")
            self._mirror = None


class WandbMirror:
    """The process of training/wandb_mirror.py, seen from the trainer.

    Its methods return a line about what went wrong, after which the mirror is of no more use.
    """

    def __init__(self, file: Path, project: str, name: str, settings: dict[str, Any]) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("log.wandb is true, but wandb is not installed: pip install wandb")
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

    def trouble(self) -> str | None:
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
        return self.trouble()


def memory_gb() -> float:
    """Peak memory: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, KiB here


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

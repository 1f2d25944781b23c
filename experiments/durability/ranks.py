"""Question: do several processes survive a signal, a killed and a stopped one of them?

Method: a run of 16 steps in two processes that saves every second and evaluates every fourth, under
torchrun's own agent (`elastic_launch`, whose workers are forked here, so that no trial imports
anew). A trial has passed when the job ends as below, no process of it is left, its newest
checkpoint verifies, and the run ends bit-identical to one that was left alone.
signals: SIGTERM to the launcher at a random time; it ends within 20 s, at most one step after the
last row of metrics.jsonl is saved, and a second launch with `auto` ends the run.
kills: SIGKILL to random ranks at random times, two in a job; the agent starts the job again.
stops: SIGSTOP to a random rank; the job ends by train.process_timeout, and is launched again.
Decision: all of them.

    PYTHONPATH=. OMP_NUM_THREADS=1 python experiments/durability/ranks.py --work /tmp/ranks
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from common import arguments, digest, make_config
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from dylora.base_models import BaseSpec, load_tokenizer
from dylora.storage.folders import checkpoints, latest_checkpoint
from dylora.training.callbacks import Callback
from dylora.training.loop import train

RANKS, STEPS = 2, 16


class Pids(Callback):
    """Leaves the process's number in pids/, and its step beside it."""

    def on_start(self, run: Any) -> None:
        (Path(os.environ["DYLORA_PIDS"]) / f"{os.getpid()}").write_text(str(run.processes.rank))


def warm_up(base: str) -> None:
    """What every process of a trial would do anew, and is forked with instead: half of its time."""
    import datasets  # noqa: F401

    # tqdm's own is shared by all that are forked later: one that is killed with it leaves it taken.
    tqdm.set_lock(threading.RLock())
    load_tokenizer(base)
    BaseSpec.resolve(base).load()


def work(config: Any) -> None:
    """One rank of a job."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        ended = train(config, "auto", callbacks=[Pids()])
    if ended.processes.is_first:
        (ended.folder / "digest").write_text(digest(ended))


def launch(config: Any, folder: Path, restarts: int = 0) -> int:
    """Start a job in a process of its own; its number."""
    pids = folder.with_name("pids")
    shutil.rmtree(pids, ignore_errors=True)
    pids.mkdir(parents=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    os.environ["DYLORA_PIDS"] = str(pids)
    code = 1
    try:
        with open(folder.with_name("log"), "a") as log:
            os.dup2(log.fileno(), 2)
            job = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=RANKS,
                run_id=f"{os.getpid()}",
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                max_restarts=restarts,
                monitor_interval=0.1,
                start_method="fork",
                shutdown_timeout=20,
            )
            elastic_launch(job, work)(config)
        code = 0
    finally:
        os._exit(code)


def ranks(folder: Path) -> list[int]:
    """The processes of a job that are alive."""
    found = []
    for path in folder.with_name("pids").iterdir():
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{path.name}/stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z":
                found.append(int(path.name))
    return found


def last_step(folder: Path) -> int:
    """Of metrics.jsonl."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return max(json.loads(line)["step"] for line in lines)
    return 0


def wait(child: int, seconds: float = 300) -> int | None:
    """The exit code of a launcher; None where it had to be killed."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def wait_for_step(folder: Path, step: int, child: int) -> None:
    """Until the run has come so far, or has ended."""
    while last_step(folder) < step and Path(f"/proc/{child}").exists():
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.02)


def signalled(config: Any, folder: Path, draw: random.Random) -> dict[str, Any]:
    child = launch(config, folder)
    wait_for_step(folder, draw.randint(1, STEPS - 4), child)
    time.sleep(draw.uniform(0, 0.3))
    os.kill(child, signal.SIGTERM)
    sent = time.monotonic()
    code = wait(child)
    seconds, left = time.monotonic() - sent, ranks(folder)
    newest = int(latest_checkpoint(folder, print)[0].name.rpartition("-")[2])
    lost = last_step(folder) - newest
    again = wait(launch(config, folder))
    ok = not left and lost <= 0 and seconds < 20 and again == 0 and not ranks(folder)
    return {"code": code, "seconds": round(seconds, 2), "lost": lost, "ok": ok}


def killed(config: Any, folder: Path, draw: random.Random) -> dict[str, Any]:
    child, kills = launch(config, folder, restarts=4), 0
    for step in sorted(draw.sample(range(1, STEPS - 2), 2)):
        wait_for_step(folder, step, child)
        time.sleep(draw.uniform(0, 0.3))
        alive = ranks(folder)
        if alive:
            os.kill(draw.choice(alive), signal.SIGKILL)
            kills += 1
        time.sleep(1.0)  # until the agent has seen it
    code = wait(child)
    return {"kills": kills, "code": code, "ok": code == 0 and not ranks(folder)}


def stopped(config: Any, folder: Path, draw: random.Random) -> dict[str, Any]:
    child = launch(config, folder)
    wait_for_step(folder, draw.randint(1, STEPS - 4), child)
    os.kill(draw.choice(ranks(folder)), signal.SIGSTOP)
    sent = time.monotonic()
    code = wait(child)
    seconds, left = time.monotonic() - sent, ranks(folder)
    again = wait(launch(config, folder))
    ok = code == 1 and not left and again == 0
    return {"code": code, "seconds": round(seconds, 1), "ok": ok}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--signals", type=int, default=20)
    parser.add_argument("--kills", type=int, default=15, help="jobs, with two kills in each")
    parser.add_argument("--stops", type=int, default=3)
    options = parser.parse_args()
    shutil.rmtree(options.work, ignore_errors=True)
    settings = {"max_steps": STEPS, "save_steps": 2, "parallel": "ddp", "process_timeout": 10}
    whole = make_config(options.work, options.base, "whole", **settings)
    warm_up(options.base)
    if wait(launch(whole, options.work / "whole")) != 0:
        sys.exit("the run that is left alone failed")
    expected = (options.work / "whole" / "digest").read_text()
    config = make_config(options.work, options.base, "tried", **settings)
    folder, draw, summary = options.work / "tried", random.Random(0), {}
    trials = (signalled, options.signals), (killed, options.kills), (stopped, options.stops)
    for trial, count in trials:
        results = []
        for _ in range(count):
            shutil.rmtree(folder, ignore_errors=True)
            result = trial(config, folder, draw)
            file = folder / "digest"
            result["same"] = file.exists() and file.read_text() == expected
            result["ok"] = result["ok"] and result["same"] and bool(checkpoints(folder))
            results.append(result)
            print(trial.__name__, result, flush=True)
        summary[trial.__name__] = {"jobs": count, "passed": sum(one["ok"] for one in results)}
        if count and "kills" in results[0]:
            summary[trial.__name__]["kills"] = sum(one["kills"] for one in results)
        if count and "seconds" in results[0]:
            longest = max(one["seconds"] for one in results)
            summary[trial.__name__]["longest_seconds"] = longest
    print(json.dumps(summary, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(any(one["passed"] != one["jobs"] for one in summary.values()))


if __name__ == "__main__":
    main()

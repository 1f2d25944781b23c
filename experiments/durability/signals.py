"""Question: what does a SIGTERM or SIGINT at any time cost, and how long does it take?

Method: a run of 30 steps that saves every third and evaluates every fourth gets a signal after a
random time between its first step and its end. It has passed when it ends with 143 or 130 within
10 s, its newest checkpoint verifies and is at most one step behind the last one in metrics.jsonl,
and the resumed run ends bit-identical to one that was never stopped. Decision: all of them.

    PYTHONPATH=. python experiments/durability/signals.py --work /tmp/signals --count 20
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from common import arguments, digest, make_config

from dylora.storage.folders import latest_checkpoint
from dylora.training.loop import train


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--count", type=int, default=20, help="of each signal")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"max_steps": 30, "save_steps": 3}
    shutil.rmtree(options.work, ignore_errors=True)
    began = time.monotonic()
    expected = digest(train(make_config(options.work, options.base, "whole", **settings)))
    length = time.monotonic() - began
    config = make_config(options.work, options.base, "stopped", **settings)
    folder = options.work / "stopped"
    draw, results = random.Random(0), []
    for number, code in [(signal.SIGTERM, 143), (signal.SIGINT, 130)] * options.count:
        shutil.rmtree(folder, ignore_errors=True)
        child = start(config, None, folder)
        while not (folder / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.5 * length))
        os.kill(child, number)
        sent = time.monotonic()
        found = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.monotonic() - sent
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        newest, _ = latest_checkpoint(folder, print)
        lost = rows[-1]["step"] - int(newest.name.rpartition("-")[2])
        end = os.waitstatus_to_exitcode(os.waitpid(start(config, "latest", folder), 0)[1])
        same = end == 0 and (folder / "digest").read_text() == expected
        done = found == 0 and rows[-1]["step"] == 30  # it had ended before the signal came
        passed = same and (done or (found == code and lost <= 1 and seconds < 10))
        results.append(
            {"signal": number.name, "code": found, "lost": lost, "seconds": seconds, "ok": passed}
        )
        print(newest.name, results[-1], flush=True)
    stopped = [result for result in results if result["code"] != 0]
    summary = {
        "sent": len(results),
        "stopped": len(stopped),
        "passed": sum(result["ok"] for result in results),
        "longest_seconds": round(max(result["seconds"] for result in stopped), 2),
        "most_steps_lost": max(result["lost"] for result in stopped),
    }
    print(summary)
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=2) + "\n")
    sys.exit(summary["passed"] != len(results))


def start(config, resume: str | None, folder: Path) -> int:
    """Train in a forked process, which ends as the command would; its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        ended = train(config, resume)
        (folder / "digest").write_text(digest(ended))
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except KeyboardInterrupt:
        code = 130
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()

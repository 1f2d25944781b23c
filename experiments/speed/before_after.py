"""Processor time of two checkouts of dylora on the same work, and the losses of both.

    git worktree add --detach ../before d23f011
    pip install --no-deps --target deps jsonargparse==4.53.0 docstring-parser  # of before
    python experiments/speed/before_after.py --before ../before --path deps \
        --out experiments/results/before_after.json

The two take turns: each measurement is a fresh process with one thread, and what counts is its
user and system time, which other processes of the machine change little. Ratios are taken within a
round.
The configuration is that of the earlier quickstart with a fifth of its rows and with every default
that has changed since; what only the later checkout knows is set to what the earlier one did.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMED, STEPS, TOKENS = 15, 50, 64  # steps that are timed, whose losses are compared
CONFIG = """
name: timed
model: {base: tiny-code-llama, dtype: float32}
moe: {num_experts: 6, top_k_experts: 2, r: 16, lora_alpha: 192, router_temperature: 1.0,
      maturity_mode: manual}
data:
  sources:
    - {name: skill/lists, rows: 200}
    - {name: skill/strings, rows: 200}
    - {name: skill/sql, rows: 200}
    - {name: skill/regex, rows: 200}
    - {name: skill/json, rows: 200}
    - {name: skill/arithmetic, rows: 200}
  max_length: 256
train: {max_steps: 340, batch_size: 16, learning_rate: 2.0e-3, router_learning_rate: 5.0e-3,
        adam_beta2: 0.99, warmup_steps: 20}
eval: {eval_subset: 50, batch_size: 50}
log: {logging_steps: 1}
"""
AS_BEFORE = ["--moe.gate_scale", "sum_to_one"]  # of the later checkout alone
# Counts the steps of the run's optimizer (copies of it that are tried have one group), and leaves.
TRAIN = """
import json, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
marks, steps = [], int(sys.argv.pop(1))
def mark(optimizer, *_):
    if len(optimizer.param_groups) > 1:
        marks.append(time.process_time())
        if len(marks) > steps:
            raise SystemExit
register_optimizer_step_post_hook(mark)
try:
    runpy.run_path("run.py", run_name="__main__")
except SystemExit:
    pass
print(json.dumps((marks[-1] - marks[0]) / steps))
"""
DECODE = f"""
import json, time, torch
from dylora import DyLoRA_MoE, MoELoraConfig
ids, found = torch.arange(100, 116)[None], []
settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
settings |= dict(min_new_tokens={TOKENS}, max_new_tokens={TOKENS})
for mode in ("dense", "sparse"):
    config = MoELoraConfig(num_experts=6, routing_mode=mode)
    model = DyLoRA_MoE.from_base("tiny-code-llama", config).eval()
    model.generate(input_ids=ids, **settings)
    started = time.process_time()
    for _ in range(4):
        model.generate(input_ids=ids, **settings)
    found.append((time.process_time() - started) / 4 / {TOKENS})
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", type=Path, required=True, help="the earlier checkout")
    parser.add_argument("--after", type=Path, default=Path(__file__).parents[2])
    parser.add_argument("--path", type=Path, help="packages that the earlier one alone imports")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for result in compare(options, Path(folder)):
            print(json.dumps(result, indent=1), flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Every measurement of both sides; the result after each round."""
    (folder / "config.yaml").write_text(CONFIG)
    sides = {
        name: Side(getattr(options, name).resolve(), folder / name, options.path, extra)
        for name, extra in (("before", []), ("after", AS_BEFORE))
    }
    for side in sides.values():
        side.prepare()
    losses = compared(*(side.losses() for side in sides.values()))
    commits = {name: side.commit() for name, side in sides.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    for round_ in range(options.rounds):
        order = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
        for measure in (Side.step, Side.decode, Side.imported, Side.help, Side.evaluate):
            for name in order:
                for what, found in measure(sides[name]).items():
                    seconds.setdefault(what, {}).setdefault(name, []).append(found)
                    print(f"round {round_ + 1}  {what}: {name} {found:.4f} s", flush=True)
        yield {
            "commits": commits,
            "rounds": round_ + 1,
            "seconds": {what: summary(**values) for what, values in seconds.items()},
            "losses": losses,
        }


class Side:
    """One checkout, and the folder of its runs."""

    def __init__(self, root: Path, runs: Path, path: Path | None, extra: list[str]) -> None:
        self.root, self.runs, self.extra = root, runs, extra
        self.config = runs.parent / "config.yaml"
        paths = [str(root), *([str(path.resolve())] if path else [])]
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        self.environment = os.environ | own | {"HF_HUB_OFFLINE": "1"}

    def run(self, *words: str) -> tuple[float, str]:
        """Processor time of python with these arguments, and the last line that it prints."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=self.root, env=self.environment, stdout=output
            )
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            output.seek(0)
            lines = output.read().splitlines()
        if process.returncode:
            raise SystemExit(f"{self.root}: {words[:2]} failed\n" + "\n".join(lines[-5:]))
        return used.ru_utime + used.ru_stime, lines[-1] if lines else ""

    def train(self, steps: int) -> tuple[float, list[float]]:
        """Processor time of a step, the first left out, and the losses of so many."""
        shutil.rmtree(self.runs / "timed", ignore_errors=True)
        words = ["--config", str(self.config), "--output_dir", str(self.runs), *self.extra]
        seconds = json.loads(self.run("-c", TRAIN, str(steps), "train", *words)[1])
        rows = (self.runs / "timed" / "metrics.jsonl").read_text().splitlines()
        return seconds, [json.loads(row)["train/loss"] for row in rows[:steps]]

    def prepare(self) -> None:
        """A checkpoint to evaluate."""
        words = ["--config", str(self.config), "--name", "made", "--output_dir", str(self.runs)]
        self.run("run.py", "train", *words, "--train.max_steps", "1", "--eval.eval_subset", "1")

    def losses(self) -> list[float]:
        return self.train(STEPS)[1]

    def step(self) -> dict[str, float]:
        return {"a step of the quickstart": self.train(TIMED)[0]}

    def decode(self) -> dict[str, float]:
        dense, sparse = json.loads(self.run("-c", DECODE)[1])
        return {"a token, greedy, dense": dense, "a token, greedy, sparse": sparse}

    def imported(self) -> dict[str, float]:
        line = "from dylora import DyLoRA_MoE"
        return {line: self.run("-c", line)[0]}

    def help(self) -> dict[str, float]:
        return {"run.py --help": self.run("run.py", "--help")[0]}

    def evaluate(self) -> dict[str, float]:
        words = ["--config", str(self.config)]
        words += ["--checkpoint", str(self.runs / "made" / "checkpoint-1")]
        return {"run.py evaluate": self.run("run.py", "evaluate", *words)[0]}

    def commit(self) -> str:
        git = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
        return subprocess.check_output(git, cwd=self.root, text=True).strip()


def summary(before: list[float], after: list[float]) -> dict[str, Any]:
    """Medians, and the median and the quartiles of the rounds' ratios after / before."""
    ratios = [late / early for early, late in zip(before, after, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    medians = {"before": statistics.median(before), "after": statistics.median(after)}
    return medians | {"ratio": middle, "quartiles": [low, high], "ratios": ratios}


def compared(before: list[float], after: list[float]) -> dict[str, Any]:
    """Whether the losses of both are the same numbers."""
    pairs = list(zip(before, after, strict=True))
    other = [step for step, (early, late) in enumerate(pairs, 1) if early != late]
    return {
        "steps": len(pairs),
        "first step that differs": other[0] if other else None,
        "largest difference": max(abs(early - late) for early, late in pairs),
        "before": before,
        "after": after,
    }


if __name__ == "__main__":
    main()

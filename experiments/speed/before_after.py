"""Processor time of two checkouts of dylora on the same work, and the losses of both.

    git worktree add --detach ../before d23f011
    pip install --no-deps --target deps jsonargparse==4.53.0 docstring-parser  # of before
    python experiments/speed/before_after.py --before ../before --path deps \
        --out experiments/results/before_after.json

The two take turns: each measurement is a fresh process with one thread, and what counts is its
user and system time, which other processes of the machine change little. Ratios are taken within a
round.
The configuration is that of the earlier quickstart, with every default that has changed since; what
only the later checkout knows is set to what the earlier one did.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

STEPS, TOKENS = 50, 64
CONFIG = """
name: timed
model: {base: tiny-code-llama, dtype: float32}
moe: {num_experts: 6, top_k_experts: 2, r: 16, lora_alpha: 192, router_temperature: 1.0,
      maturity_mode: manual}
data:
  sources:
    - {name: skill/lists, rows: 1000}
    - {name: skill/strings, rows: 1000}
    - {name: skill/sql, rows: 1000}
    - {name: skill/regex, rows: 1000}
    - {name: skill/json, rows: 1000}
    - {name: skill/arithmetic, rows: 1000}
  max_length: 256
train: {max_steps: 340, batch_size: 16, learning_rate: 2.0e-3, router_learning_rate: 5.0e-3,
        adam_beta2: 0.99, warmup_steps: 20}
eval: {eval_subset: 50, batch_size: 50}
log: {logging_steps: 1}
"""
AS_BEFORE = ["--moe.gate_scale", "sum_to_one"]  # of the later checkout alone
# Counts the steps of the run's optimizer (copies of it that are tried have one group), and leaves.
TRAIN = f"""
import json, runpy, sys, time
from torch.optim.optimizer import register_optimizer_step_post_hook
marks = []
def mark(optimizer, *_):
    if len(optimizer.param_groups) > 1:
        marks.append(time.process_time())
        if len(marks) > {STEPS}:
            raise SystemExit
register_optimizer_step_post_hook(mark)
try:
    runpy.run_path("run.py", run_name="__main__")
except SystemExit:
    pass
print(json.dumps((marks[-1] - marks[0]) / {STEPS}))
"""
DECODE = f"""
import json, sys, time, torch
from dylora import DyLoRA_MoE, MoELoraConfig
torch.manual_seed(0)
config = MoELoraConfig(num_experts=6, init_lora_weights="gaussian", routing_mode=sys.argv[1])
model = DyLoRA_MoE.from_base("tiny-code-llama", config).eval()
ids = torch.arange(100, 116)[None]
settings = dict(attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0)
settings |= dict(min_new_tokens={TOKENS}, max_new_tokens={TOKENS})
model.generate(input_ids=ids, **settings)
started = time.process_time()
for _ in range(5):
    model.generate(input_ids=ids, **settings)
print(json.dumps((time.process_time() - started) / 5 / {TOKENS}))
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
        side.run_command("train", "--train.max_steps", "1", "--eval.eval_subset", "1")
    commits = {name: side.commit() for name, side in sides.items()}
    seconds: dict[str, dict[str, list[float]]] = {}
    losses: dict[str, list[list[float]]] = {name: [] for name in sides}
    for round_ in range(options.rounds):
        order = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
        for what, measure in MEASUREMENTS.items():
            for name in order:
                found = measure(sides[name])
                seconds.setdefault(what, {}).setdefault(name, []).append(found)
                print(f"round {round_ + 1}  {what}: {name} {found:.4f} s", flush=True)
        for name in sides:
            losses[name].append(sides[name].losses())
        yield {
            "commits": commits,
            "rounds": round_ + 1,
            "seconds": {what: summary(**values) for what, values in seconds.items()},
            "losses": compared(losses["before"], losses["after"]),
        }


class Side:
    """One checkout, and the folder of its runs."""

    def __init__(self, root: Path, runs: Path, path: Path | None, extra: list[str]) -> None:
        self.root, self.runs, self.extra = root, runs, extra
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

    def words(self, command: str, *options: str) -> list[str]:
        config = ["--config", str(self.runs.parent / "config.yaml"), *self.extra]
        return [command, *config, *options]

    def run_command(self, command: str, *options: str) -> float:
        """Of a command of run.py, as a whole."""
        if command == "train":
            options = (*options, "--output_dir", str(self.runs / "made"))
        return self.run("run.py", *self.words(command, *options))[0]

    def steps(self) -> float:
        """Of an optimizer step: the mean of steps 2 to 51."""
        subprocess.run(["rm", "-rf", str(self.runs / "trained")], check=True)
        words = self.words("train", "--output_dir", str(self.runs / "trained"))
        return json.loads(self.run("-c", TRAIN, *words)[1])

    def losses(self) -> list[float]:
        """Of the first steps of the last training."""
        rows = (self.runs / "trained" / "timed" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["train/loss"] for row in rows[:STEPS]]

    def evaluate(self) -> float:
        command = ["run.py", "evaluate", "--config", str(self.runs.parent / "config.yaml")]
        checkpoint = self.runs / "made" / "timed" / "checkpoint-1"
        return self.run(*command, "--checkpoint", str(checkpoint))[0]

    def commit(self) -> str:
        git = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
        return subprocess.check_output(git, cwd=self.root, text=True).strip()


MEASUREMENTS: dict[str, Callable[[Side], float]] = {
    "a step of the quickstart": Side.steps,
    "a token, greedy, dense": lambda side: json.loads(side.run("-c", DECODE, "dense")[1]),
    "a token, greedy, sparse": lambda side: json.loads(side.run("-c", DECODE, "sparse")[1]),
    "from dylora import DyLoRA_MoE": lambda side: side.run("-c", "from dylora import DyLoRA_MoE")[
        0
    ],
    "run.py --help": lambda side: side.run("run.py", "--help")[0],
    "run.py evaluate": Side.evaluate,
}


def summary(before: list[float], after: list[float]) -> dict[str, Any]:
    """Medians, and the median and the quartiles of the rounds' ratios after / before."""
    ratios = [late / early for early, late in zip(before, after, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    medians = {"before": statistics.median(before), "after": statistics.median(after)}
    return medians | {"ratio": middle, "quartiles": [low, high], "ratios": ratios}


def compared(before: list[list[float]], after: list[list[float]]) -> dict[str, Any]:
    """Whether the losses of both are the same numbers, and of each in every round."""
    pairs = list(zip(before[0], after[0], strict=True))
    other = [step for step, (early, late) in enumerate(pairs, 1) if early != late]
    return {
        "steps": len(pairs),
        "equal in all rounds": {
            "before": all(one == before[0] for one in before),
            "after": all(one == after[0] for one in after),
        },
        "first step that differs": other[0] if other else None,
        "largest difference": max(abs(early - late) for early, late in pairs),
        "before": before[0],
        "after": after[0],
    }


if __name__ == "__main__":
    main()

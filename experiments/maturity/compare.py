r"""Question: what does it cost to become sparse, when, and by which signal or schedule?

Method: configs/token_routing.yaml (same base and skills) with the sizes of the options, once for
each condition and seed, all at equal steps; of mature experts a token keeps --top_k. Tokens of a
second of processor time are of the training steps alone.
`plain LoRA` is one adapter with as many trainable parameters. Only the training seed differs
between seeds: rows and their order stay. The dense run of the first seed also measures, at CUT_AT,
by how much its loss grows when every token is cut to its top K, by either rule of moe.gate_scale.
Rule, fixed before the runs: a way of maturing holds when its mean held-out loss is above that of
`dense` by no more than the larger of the two standard deviations over seeds.
Result: README.md here and experiments/LOG.md.

    python experiments/maturity/compare.py            # runs what is missing, then prints the table
    python experiments/maturity/compare.py --table    # of what there is
    python experiments/maturity/compare.py --conditions dense,schedule --experts 64 --top_k 2 \
        --seeds 0,1,2 --steps 600 --batch_size 4 --alpha 4096 --rate 4e-4 --schedule 0.1,0.2 \
        --results experiments/results/sparse_64.json

A run that is in the results is not repeated.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dylora import DyLoRA_MoE
from dylora.cli.config_file import load_run_config
from dylora.config import MoELoraConfig
from dylora.data.tokenize import IGNORED, TokenizedSet
from dylora.run_config import RunConfig
from dylora.training.environment import environment
from dylora.training.run import Run, prepare
from dylora.training.step import run_step
from dylora.training.validation import overall_loss, validate

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "dense_to_sparse.json"
PLAIN = "plain LoRA"
CONDITIONS: dict[str, dict[str, Any]] = {
    "dense": {"maturity_mode": "manual"},  # nobody sets it: dense to the end
    "schedule": {"maturity_mode": "schedule"},
    "hybrid": {"maturity_mode": "hybrid"},
    "usage": {"maturity_mode": "usage"},
    PLAIN: {"use_moe_routing": False},
}
CUT_SEED, CUT_AT = 0, (30, 50, 70, 100)  # of the dense run that is cut, and at which steps
CUT_ROWS = 10  # held-out rows of each skill that this is measured on
LAST = 10  # steps that count as the end of a run
SIZES = ("rows", "steps", "batch_size", "warmup_steps", "eval_rows")
FORM = ("experts", "top_k", "alpha", "rate", "schedule")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=400, help="of each skill")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--warmup_steps", type=int, default=10)
    parser.add_argument("--eval_rows", type=int, default=60, help="held-out rows of each skill")
    parser.add_argument("--experts", type=int, default=6, help="of rank 16")
    parser.add_argument("--top_k", type=int, default=3)
    parser.add_argument("--alpha", type=float, default=1536.0, help="16·r·E is a scale of 16")
    parser.add_argument("--rate", type=float, default=8e-4)
    parser.add_argument("--schedule", default="0.2,0.6", help="maturity_schedule")
    parser.add_argument("--conditions", default=",".join(CONDITIONS))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in SIZES + FORM}
    results = {"sizes": sizes, "environment": {}, "runs": []}
    if options.results.exists():
        results = json.loads(options.results.read_text())
    if not options.table:
        if results["sizes"] != sizes:
            sys.exit(f"error: {options.results} holds runs of other sizes: {results['sizes']}")
        run_missing(results, options.results, options.conditions.split(","), options.seeds)
    print(table(results["runs"]))


def run_missing(results: dict[str, Any], file: Path, conditions: list[str], seeds: str) -> None:
    """Seed by seed, so that an interrupted comparison has whole rounds."""
    done = {(row["condition"], row["seed"]) for row in results["runs"]}
    wanted = [(name, seed) for seed in map(int, seeds.split(",")) for name in conditions]
    for condition, seed in wanted:
        if (condition, seed) in done:
            continue
        row = run_once(condition, seed, results)
        results["runs"].append(row)
        replacement = file.with_suffix(".new")
        replacement.write_text(json.dumps(results) + "\n")
        replacement.replace(file)
        print(f"{condition}, seed {seed}: {row['loss']:.4f}", flush=True)


def run_once(condition: str, seed: int, results: dict[str, Any]) -> dict[str, Any]:
    """Train one condition and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(configure(condition, seed, results["sizes"], folder), fresh=True)
        device = run.model.device
        results["environment"] = environment(device)
        active: list[float] = []
        matured: dict[int, int] = {}
        cuts: dict[int, dict[str, float]] = {}
        seconds, tokens = 0.0, 0
        while run.progress.step < run.steps:
            begin = time.process_time()
            result, step = run_step(run), run.progress.step
            seconds += time.process_time() - begin
            found, tokens = result.statistics, tokens + result.tokens
            active.append(1.0 if found is None else float((found.active_N / found.tokens).mean()))
            for expert, value in enumerate(run.model.maturity.maturity.tolist()):
                if value == 1 and condition != PLAIN:
                    matured.setdefault(expert, step)
            if condition == "dense" and seed == CUT_SEED and step in CUT_AT:
                cuts[step] = cut_costs(run)
        scores = validate(
            run.model,
            run.data.validation,
            batch_size=run.config.eval.batch_size,
            pad_token_id=run.pad_token_id,
        )
        trainable, _ = run.model.count_parameters()
    return {
        "condition": condition,
        "seed": seed,
        "loss": overall_loss(scores),
        "trainable": trainable,
        "tokens_per_s": tokens / seconds,
        "active_end": statistics.mean(active[-LAST:]),
        "active_mean": statistics.mean(active),
        "matured": sorted(matured.values()),
        "cuts": cuts,
    }


def cut_costs(run: Run) -> dict[str, float]:
    """The loss of a few held-out rows, as it is and with every token cut to its top K experts."""
    model, config = run.model, run.model.config
    pad, scales = run.pad_token_id, ("keep_size", "sum_to_one")
    sets = [head(examples, CUT_ROWS) for examples in run.data.validation]
    found = {"dense": overall_loss(validate(model, sets, batch_size=50, pad_token_id=pad))}
    for top_k, scale in itertools.product((2, 3), scales):
        cut = {"routing_mode": "sparse", "top_k_experts": top_k, "gate_scale": scale}
        model.mixture.set_config(dataclasses.replace(config, **cut))
        scores = validate(model, sets, batch_size=50, pad_token_id=pad)
        found[f"top {top_k}, {scale}"] = overall_loss(scores)
    model.mixture.set_config(config)
    return found


def head(examples: TokenizedSet, count: int) -> TokenizedSet:
    """The first examples of a set."""
    first = TokenizedSet(examples.name, examples.split)
    for index in range(min(count, len(examples))):
        row = examples[index]
        prompt = row["labels"].count(IGNORED)
        first.append(row["input_ids"][:prompt], row["input_ids"][prompt:])
    return first


def configure(condition: str, seed: int, sizes: dict[str, Any], folder: str) -> RunConfig:
    """The quickstart, smaller; `plain LoRA` with the rank that makes it as large as the mixture."""
    config = load_run_config(ROOT / "configs" / "token_routing.yaml")
    low, high = map(float, sizes["schedule"].split(","))
    form: dict[str, Any] = {"lora_alpha": sizes["alpha"], "num_experts": sizes["experts"]}
    form |= {"top_k_experts": sizes["top_k"], "maturity_schedule": (low, high)}
    changes = dict(CONDITIONS[condition])
    if condition == PLAIN:
        changes = plain_lora(config, form, changes)
    else:
        changes = dataclasses.asdict(config.moe) | form | changes
    return dataclasses.replace(
        config,
        output_dir=folder,
        moe=MoELoraConfig(**changes),
        data=dataclasses.replace(
            config.data,
            sources=[dataclasses.replace(s, rows=sizes["rows"]) for s in config.data.sources],
        ),
        train=dataclasses.replace(
            config.train,
            seed=seed,
            max_steps=sizes["steps"],
            batch_size=sizes["batch_size"],
            warmup_steps=sizes["warmup_steps"],
            learning_rate=sizes["rate"],
            router_learning_rate=1e-3,
        ),
        eval=dataclasses.replace(config.eval, eval_subset=sizes["eval_rows"], skill_answers=0),
    )


def plain_lora(config: RunConfig, form: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Settings of one adapter: the ranks of all experts in one, and what the routers weigh on top.

    Its alpha is the mixture's: evenly mixed, the experts are one LoRA of all their ranks with it.
    """
    many = dataclasses.replace(config.moe, **form)
    mixture, _ = DyLoRA_MoE.from_base(config.model.base, many).count_parameters()
    single = MoELoraConfig(**changes, r=1)
    per_rank, _ = DyLoRA_MoE.from_base(config.model.base, single).count_parameters()
    rank = round(mixture / per_rank)
    return changes | {"r": rank, "lora_alpha": form["lora_alpha"]}


def table(runs: list[dict[str, Any]]) -> str:
    """Means over seeds, ± their standard deviation, as Markdown."""
    lines = [
        "| condition | runs | held-out loss | active at the end | over the run "
        "| matured | first, last at step | tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for condition in CONDITIONS:
        rows = [row for row in runs if row["condition"] == condition]
        if not rows:
            continue
        counts = [len(row["matured"]) for row in rows]
        steps = [f"{row['matured'][0]}–{row['matured'][-1]}" for row in rows if row["matured"]]
        lines.append(
            f"| {condition} | {len(rows)} | {spread([row['loss'] for row in rows], 4)} "
            f"| {spread([row['active_end'] for row in rows], 2)} "
            f"| {spread([row['active_mean'] for row in rows], 2)} "
            f"| {', '.join(map(str, counts))} | {'; '.join(steps) or 'none'} "
            f"| {spread([row['tokens_per_s'] for row in rows], 0)} |"
        )
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()

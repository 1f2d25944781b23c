"""Question: does one lora_alpha serve every number of experts, top-k and rank?

Method: the embedded base and skills, one rate, a run for each form of a mixture, seed and alpha;
alphas are powers of 2, from a guess on in both directions until the best has a worse neighbour on
either side; the rest is configs/token_routing.yaml. The loss is that of held-out rows. Routing is
as it is from the first step: dense (K = E) or top-k.
Rule, fixed before the runs: a rule for alpha transfers to a form when its loss there, of the alpha
of the grid that is next to it, is at most 0.02 nats above the best of the grid.
Result: experiments/LOG.md and experiments/results/scale.json.

    python experiments/maturity/scale.py               # what is missing, then the table
    python experiments/maturity/scale.py --table       # of what there is
"""

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dylora.cli.config_file import load_run_config
from dylora.config import MoELoraConfig
from dylora.run_config import RunConfig
from dylora.training.run import prepare
from dylora.training.step import run_step
from dylora.training.validation import overall_loss, validate

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "scale.json"
STEPS, BATCH, WARMUP, ROWS, EVAL_ROWS, RATE, ROUTER_RATE = 100, 8, 10, 400, 60, 8e-4, 1e-3
TOLERANCE = 0.02


class Form(NamedTuple):
    """E experts of rank r, of which a token uses K."""

    experts: int
    top_k: int
    rank: int
    gate_scale: str = "keep_size"


FORMS = (
    *(Form(1, 1, rank) for rank in (4, 16, 64)),
    *(Form(6, top_k, 16) for top_k in (6, 2, 1)),
    *(Form(32, top_k, 4) for top_k in (32, 8, 2)),
    *(Form(2, 2, 16), Form(32, 32, 16), Form(6, 6, 64)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    if options.results.exists():
        runs = json.loads(options.results.read_text())["runs"]
    for seed in [] if options.table else map(int, options.seeds.split(",")):
        for form in FORMS:
            for alpha in search(runs, form, seed):
                loss = train(form, alpha, seed)
                runs.append({"form": list(form), "alpha": alpha, "seed": seed, "loss": loss})
                sizes = {"steps": STEPS, "batch": BATCH, "rate": RATE, "router_rate": ROUTER_RATE}
                text = ",\n".join(map(json.dumps, runs))
                whole = f'{{"sizes": {json.dumps(sizes)}, "runs": [\n{text}\n]}}\n'
                options.results.write_text(whole)
                print(form, seed, alpha, round(loss, 4), flush=True)
    print(table(runs))


def search(runs: list[dict[str, Any]], form: Form, seed: int) -> Iterator[int]:
    """Alphas to run until the best has a neighbour on either side; `runs` grows meanwhile."""
    guess = 2 ** round(math.log2(236 * math.sqrt(form.top_k * form.rank)))
    while True:
        found = losses_of(runs, form, seed)
        best = min(found, key=lambda alpha: found[alpha], default=guess)
        if not (left := [a for a in (best, best // 2, best * 2) if a not in found]):
            return
        yield left[0]


def losses_of(runs: list[dict[str, Any]], form: Form, seed: int) -> dict[int, float]:
    own = [run for run in runs if Form(*run["form"]) == form and run["seed"] == seed]
    return {run["alpha"]: run["loss"] for run in own}


def train(form: Form, alpha: float, seed: int) -> float:
    """The held-out loss of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(configure(form, alpha, seed, folder), fresh=True)
        while run.progress.step < run.steps:
            run_step(run)
        sets, size = run.data.validation, run.config.eval.batch_size
        scores = validate(run.model, sets, batch_size=size, pad_token_id=run.pad_token_id)
    return overall_loss(scores)


def configure(form: Form, alpha: float, seed: int, folder: str) -> RunConfig:
    """The quickstart, smaller, with this mixture."""
    changes: dict[str, Any] = {"r": form.rank, "lora_alpha": alpha}
    if form.experts == 1:
        changes |= {"use_moe_routing": False}
    else:
        dense = form.top_k == form.experts
        changes |= {"num_experts": form.experts, "top_k_experts": form.top_k}
        changes |= {"routing_mode": "dense" if dense else "sparse", "router_temperature": 1.0}
        changes |= {"expert_capacity_factor": None, "gate_scale": form.gate_scale}
    config = load_run_config(ROOT / "configs" / "token_routing.yaml")
    sources = [dataclasses.replace(source, rows=ROWS) for source in config.data.sources]
    return dataclasses.replace(
        config,
        output_dir=folder,
        moe=MoELoraConfig(**changes),
        data=dataclasses.replace(config.data, sources=sources),
        train=dataclasses.replace(
            config.train,
            seed=seed,
            max_steps=STEPS,
            batch_size=BATCH,
            warmup_steps=WARMUP,
            learning_rate=RATE,
            router_learning_rate=ROUTER_RATE,
        ),
        eval=dataclasses.replace(config.eval, eval_subset=EVAL_ROWS, skill_answers=0),
    )


def table(runs: list[dict[str, Any]]) -> str:
    """Mean loss over seeds by form and alpha, of alphas that all seeds of a form have."""
    alphas = sorted({run["alpha"] for run in runs})
    lines = [f"| E, K, r, gates | seeds | {' | '.join(map(str, alphas))} | within {TOLERANCE} |"]
    lines.append("|---" * (len(alphas) + 3) + "|")
    for form in FORMS:
        seeds = sorted({run["seed"] for run in runs if Form(*run["form"]) == form})
        losses = [losses_of(runs, form, seed) for seed in seeds]
        means = {
            alpha: statistics.mean(loss[alpha] for loss in losses)
            for alpha in alphas
            if losses and all(alpha in loss for loss in losses)
        }
        near = [a for a in means if means[a] <= min(means.values()) + TOLERANCE]
        cells = [f"{means[alpha]:.3f}" if alpha in means else "–" for alpha in alphas]
        name = ", ".join(map(str, form))
        cells += [", ".join(map(str, near)) or "–"]
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

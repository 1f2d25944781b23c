"""Question: does one lora_alpha serve every number of experts, top-k and rank?

Method: the embedded base and skills, one rate and seed, a run for each form of a mixture and each
alpha of a grid; the rest is configs/token_routing.yaml. The loss is that of held-out rows. Routing
is as it is from the first step: dense (K = E) or top-k.
Rule, fixed before the runs: alpha transfers to a form when its loss there is at most 0.02 nats
above the best of the grid.
Result: experiments/LOG.md and experiments/results/scale.json.

    python experiments/maturity/scale.py               # what is missing, then the table
    python experiments/maturity/scale.py --table       # of what there is
"""

import argparse
import dataclasses
import json
import tempfile
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
ALPHAS = (1536, 512, 4608)
STEPS, BATCH, WARMUP, ROWS, EVAL_ROWS, RATE, ROUTER_RATE = 100, 8, 10, 400, 60, 8e-4, 1e-3
TOLERANCE = 0.02


class Form(NamedTuple):
    """E experts of rank r, of which a token uses K."""

    experts: int
    top_k: int
    rank: int
    gate_scale: str = "keep_size"


FORMS = (
    *(Form(1, 1, rank) for rank in (16, 64, 4)),
    *(Form(6, 6, 16), Form(6, 2, 16), Form(6, 2, 16, "sum_to_one"), Form(32, 32, 4)),
    *(Form(32, 2, 4), Form(32, 2, 4, "sum_to_one"), Form(6, 1, 16)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    if options.results.exists():
        runs = json.loads(options.results.read_text())["runs"]
    done = {(Form(*run["form"]), run["alpha"]) for run in runs}
    wanted = [(form, alpha) for alpha in ALPHAS for form in FORMS if (form, alpha) not in done]
    for form, alpha in [] if options.table else wanted:
        runs.append({"form": list(form), "alpha": alpha, "loss": train(form, alpha)})
        sizes = {"steps": STEPS, "batch": BATCH, "rate": RATE, "router_rate": ROUTER_RATE}
        options.results.write_text(json.dumps({"sizes": sizes, "runs": runs}) + "\n")
        print(form, alpha, round(runs[-1]["loss"], 4), flush=True)
    print(table(runs))


def train(form: Form, alpha: float) -> float:
    """The held-out loss of one run."""
    with tempfile.TemporaryDirectory() as folder:
        run = prepare(configure(form, alpha, folder), fresh=True)
        while run.progress.step < run.steps:
            run_step(run)
        sets, size = run.data.validation, run.config.eval.batch_size
        scores = validate(run.model, sets, batch_size=size, pad_token_id=run.pad_token_id)
    return overall_loss(scores)


def configure(form: Form, alpha: float, folder: str) -> RunConfig:
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
            max_steps=STEPS,
            batch_size=BATCH,
            warmup_steps=WARMUP,
            learning_rate=RATE,
            router_learning_rate=ROUTER_RATE,
        ),
        eval=dataclasses.replace(config.eval, eval_subset=EVAL_ROWS, skill_answers=0),
    )


def table(runs: list[dict[str, Any]]) -> str:
    """Loss by form and alpha; the last column: alphas that are within the tolerance of the best."""
    alphas = sorted({run["alpha"] for run in runs})
    lines = [f"| E, K, r, gates | {' | '.join(map(str, alphas))} | within {TOLERANCE} |"]
    lines.append("|---" * (len(alphas) + 2) + "|")
    for form in FORMS:
        found = {run["alpha"]: run["loss"] for run in runs if Form(*run["form"]) == form}
        if not found:
            continue
        whole = len(found) == len(ALPHAS)
        near = [a for a in alphas if whole and found[a] <= min(found.values()) + TOLERANCE]
        cells = [f"{found[alpha]:.3f}" if alpha in found else "–" for alpha in alphas]
        name = ", ".join(map(str, form))
        lines.append(f"| {name} | {' | '.join(cells)} | {', '.join(map(str, near)) or '–'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""Question: does a mixture of adapters made elsewhere work before its router is trained?

Method: three plain LoRAs, each trained on one embedded skill (rates of configs/token_routing.yaml,
one expert of rank 16), saved, and imported as the experts of one mixture. Held-out loss of each
skill under every way to mix them: evenly; by Arrow's prototypes, dense or top 1, at several
temperatures; and with a router that is trained alone, experts frozen, on rows of all three skills,
from fresh values and from the prototypes. Bounds: each skill's own adapter (the oracle), the one
adapter that is best over all skills, and the base. Only the training seed differs between seeds:
rows and their order stay.
Rule, fixed before the runs: a way beats another when its mean loss over skills is lower by more
than the larger of the two standard deviations over seeds. Arrow is useful if it beats the even
mixture.
Result: experiments/LOG.md.

    python experiments/import/compare.py            # runs what is missing, then prints the tables
    python experiments/import/compare.py --table    # of what there is
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dylora import DyLoRA_MoE, MoELoraConfig, load_peft_experts
from dylora.cli.config_file import load_run_config
from dylora.run_config import RunConfig
from dylora.training.environment import environment
from dylora.training.run import Run, prepare
from dylora.training.step import run_step
from dylora.training.validation import validate

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results" / "import.json"
SKILLS = ("sql", "json", "arithmetic")
SEEDS = (0, 1, 2)
SIZES = ("rows", "steps", "batch_size", "router_steps", "eval_rows")
DENSE = {"routing_mode": "dense"}
SPARSE = {"routing_mode": "sparse", "gate_scale": "sum_to_one"}
TOP_2 = SPARSE | {"top_k_experts": 2}  # renormalised, as in Arrow
TOP_1 = SPARSE | {"top_k_experts": 1}  # the raw probability, unlike Arrow
ARROW: dict[str, dict[str, Any]] = {
    f"arrow, {name}, T = {temperature:g}": {"router_temperature": temperature} | mode
    for name, mode, temperatures in (
        ("dense", DENSE, (2.0, 1.0, 0.3, 0.1)),
        ("top 2", TOP_2, (1.0, 0.1)),
        ("top 1", TOP_1, (0.1,)),
    )
    for temperature in temperatures
}
TRAINED = ("router trained from fresh", "router trained from arrow")
ORDER = ("base", "its own adapter", "best adapter for all", "even", *ARROW, *TRAINED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=600, help="of each skill")
    parser.add_argument("--steps", type=int, default=60, help="for each adapter")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--router_steps", type=int, default=30)
    parser.add_argument("--eval_rows", type=int, default=40, help="held-out rows of each skill")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in SIZES}
    results = {"sizes": sizes, "environment": environment(torch.device("cpu")), "runs": []}
    if options.results.exists():
        results = json.loads(options.results.read_text())
    done = {row["seed"] for row in results["runs"]}
    for seed in [] if options.table else [seed for seed in SEEDS if seed not in done]:
        with tempfile.TemporaryDirectory() as folder:
            results["runs"].append({"seed": seed, **run_seed(seed, sizes, Path(folder))})
        options.results.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results["runs"]))


def run_seed(seed: int, sizes: dict[str, int], folder: Path) -> dict[str, Any]:
    """Losses by way of mixing and skill, and the share of the skill's own expert where routed."""
    adapters = []
    for skill in SKILLS:
        run = prepare(configure(skill, (skill,), seed, sizes, folder, plain()), fresh=True)
        steps(run, sizes["steps"])
        run.model.save_pretrained(folder / "adapters" / skill)
        adapters.append(folder / "adapters" / skill / "peft_adapters" / "expert_0")
        print(f"seed {seed}: {skill} trained", flush=True)
    everything = configure("all", SKILLS, seed, sizes, folder, plain())
    run = prepare(everything, fresh=True)

    losses: dict[str, list[float]] = {}
    own_share: dict[str, list[float]] = {}

    def score(name: str, model: DyLoRA_MoE) -> None:
        scores = list(measure(model, run).values())
        losses[name] = [score.loss for score in scores]
        if all(score.usage_NE is not None for score in scores):
            own_share[name] = [float(s.usage_NE.mean(0)[e]) for e, s in enumerate(scores)]
        print(f"seed {seed}: {name}: {statistics.mean(losses[name]):.4f}", flush=True)

    def imported(router_init: str = "learned", **moe: Any) -> DyLoRA_MoE:
        torch.manual_seed(seed)
        config = MoELoraConfig(num_experts=len(SKILLS), **moe)
        base = everything.model.base
        return load_peft_experts(base, adapters, config, router_init=router_init)  # type: ignore

    alone = [
        [one.loss for one in measure(imported(**only(e)), run).values()] for e in range(len(SKILLS))
    ]
    losses["its own adapter"] = [alone[e][e] for e in range(len(SKILLS))]
    losses["best adapter for all"] = min(alone, key=statistics.mean)
    mixture = imported(router_type="fixed")
    with mixture.disable_adapters():
        score("base", mixture)
    score("even", mixture)
    for name, moe in ARROW.items():
        score(name, imported("arrow", **moe))
    for name, router_init in zip(TRAINED, ("learned", "arrow"), strict=True):
        start = folder / router_init
        model = imported(router_init, router_temperature=1.0)
        model.save_pretrained(start)
        config = configure(router_init, SKILLS, seed, sizes, folder, model.config)
        train = dataclasses.replace(config.train, init_from=str(start))
        trained = prepare(dataclasses.replace(config, train=train), fresh=True)
        before = [p.clone() for _, p in trained.model.named_expert_parameters()]
        steps(trained, sizes["router_steps"])
        after = [p for _, p in trained.model.named_expert_parameters()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        score(name, trained.model)
    return {"losses": losses, "own_share": own_share}


def plain() -> MoELoraConfig:
    return MoELoraConfig(use_moe_routing=False, num_experts=1, r=16, lora_alpha=32)


def only(expert: int) -> dict[str, Any]:
    """Settings under which one expert is everything."""
    weights = [0.0] * len(SKILLS)
    weights[expert] = 1.0
    return {"router_type": "fixed", "fixed_routing_weights": weights}


def configure(
    name: str,
    skills: tuple[str, ...],
    seed: int,
    sizes: dict[str, int],
    folder: Path,
    moe: MoELoraConfig,
) -> RunConfig:
    """The quickstart on some of its skills."""
    config = load_run_config(ROOT / "configs" / "token_routing.yaml")
    sources = [
        dataclasses.replace(source, rows=sizes["rows"])
        for skill in skills
        for source in config.data.sources
        if source.name == f"skill/{skill}"
    ]
    return dataclasses.replace(
        config,
        name=name,
        output_dir=str(folder / "runs"),
        model=dataclasses.replace(config.model, device="cpu"),
        moe=moe,
        data=dataclasses.replace(config.data, sources=sources),
        train=dataclasses.replace(
            config.train,
            seed=seed,
            max_steps=sizes["router_steps" if len(skills) > 1 else "steps"],
            batch_size=sizes["batch_size"],
            warmup_steps=5,
        ),
        eval=dataclasses.replace(config.eval, eval_subset=sizes["eval_rows"], skill_answers=0),
    )


def steps(run: Run, count: int) -> None:
    """Train; the schedule is that of the configured number of steps."""
    for _ in range(count):
        run_step(run)


def measure(model: DyLoRA_MoE, run: Run) -> dict[str, Any]:
    """Held-out scores of every skill, in the order of SKILLS."""
    size = run.config.eval.batch_size
    return validate(model, run.data.validation, batch_size=size, pad_token_id=run.pad_token_id)


def table(runs: list[dict[str, Any]]) -> str:
    """Losses as Markdown: by skill the mean over seeds, overall with the deviation."""
    head = " | ".join(SKILLS)
    lines = [f"| way | {head} | mean | share of the own expert |", "|---|" + "---|" * 5]
    for name in ORDER:
        rows = [run["losses"][name] for run in runs]
        columns = [statistics.mean(row[e] for row in rows) for e in range(len(SKILLS))]
        shares = [statistics.mean(r["own_share"][name]) for r in runs if name in r["own_share"]]
        cells = [f"{value:.3f}" for value in columns]
        cells.append(spread([statistics.mean(row) for row in rows], "{:.3f}".format))
        cells.append(spread(shares, "{:.0%}".format) if shares else "–")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float], form: Callable[[float], str]) -> str:
    """Mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{form(statistics.mean(values))} ± {form(deviation)}"


if __name__ == "__main__":
    main()

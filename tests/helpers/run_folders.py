"""Folders as runs leave them, without a run: any number of experts, sites and sets."""

import json
import math
import random
from pathlib import Path

CONFIG = """name: {name}
output_dir: runs
model: {{base: tiny-code-llama}}
moe: {{num_experts: {experts}, shared_experts: {shared}, r: {rank}}}
train: {{max_steps: 100, seed: {seed}}}
"""


def write_run(
    folder: Path,
    *,
    experts: int = 4,
    sites: int = 6,
    sets: int = 3,
    steps: int = 10,
    rank: int = 8,
    seed: int = 0,
    shared: int = 0,
    retired: int | None = None,
    set_name: str = "skill/{}",
    text: str = "def f(x):",
) -> Path:
    """retired: the number of an expert whose metrics end at half of the steps."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names, places = [set_name.format(n) for n in range(sets)], [f"layers.{n}" for n in range(sites)]
    rows = []
    for step in range(1, steps + 1):
        row = {"step": step, "tokens": 100 * step, "train/lm_loss": 3 / step + draw.random()}
        row |= {"train/lr": 1e-3 / step, "train/tokens_per_s": 900 + draw.random()}
        row |= {"train/grad_norm": 1 + draw.random(), "system/mem_gb": 1.5}
        row |= {"router/entropy": 1.0, "router/max_usage": 0.5, "router/dead_experts": 0.0}
        row |= {"router/top1_share": 0.4, "router/active_experts": 2.0}
        row |= {f"router/entropy/{place}": draw.random() for place in places}
        for expert in range(experts):
            if expert == retired and step > steps // 2:
                continue
            values = {
                "maturity": min(1, step / steps),
                "load": 1 / experts,
                "grad_norm": 0.1 + expert,
            }
            values["tokens"] = step * 10.0 * (1 + expert)
            row |= {f"expert/{expert}/{key}": value for key, value in values.items()}
        rows.append(row)
    losses = {f"val/loss/{name}": 1 + n / 10 for n, name in enumerate(names)}
    for step in (max(1, steps // 2), steps):
        found = {key: loss + 1 / step for key, loss in losses.items()}
        found |= {"val/information": 0.3, "val/sparse_cost": 0.1, "val/loss": 1.2 + 1 / step}
        found |= {f"val/information/{place}": draw.random() for place in places}
        rows.append({"step": step, "tokens": 100 * step, **found})
    rows.sort(key=lambda row: row["step"])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"name": folder.name, "experts": experts, "shared": shared, "rank": rank}
    (folder / "config.yaml").write_text(CONFIG.format(seed=seed, **settings))
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "device": "x86_64"}))
    (folder / "results.json").write_text(json.dumps(_results(names, text)))
    (folder / "routing.json").write_text(json.dumps(_routing(names, places, experts, text, draw)))
    table = [
        {"name": f"expert_{n}", "state": "retired" if n == retired else "active", "rank": rank,
         "steps": steps, "skill": None, "history": [{"event": "frozen", "step": 3}] * (n == 0)}
        for n in range(experts)
    ]  # fmt: skip
    checkpoint = folder / f"checkpoint-{steps}"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps({"experts": table}))
    return folder


def _results(names: list[str], text: str) -> dict:
    sets = [
        {"name": name, "base_loss": 3.0, "trained_loss": 1.0 + n / 10, "base_passed": 0.0,
         "trained_passed": 0.5, "expert": 1, "expert_share": 0.7, "targets": 100}
        for n, name in enumerate(names)
    ]  # fmt: skip
    answer = {"question": text, "expected": "return x", "given": text, "passed": False}
    routing = {"experts": 4, "shared_experts": 0, "active_experts": 2.0, "parameters": 4_000_000}
    return {
        "sets": sets,
        "test_answers_per_skill": 10,
        "routing": routing | {"active_parameters": 2_000_000},
        "answers": {name: [answer, answer | {"passed": True}] for name in names},
        "written": "2026-01-01T00:00:00",
    }


def _routing(names: list[str], places: list[str], experts: int, text: str, draw) -> dict:
    def shares() -> list[float]:
        found = [draw.random() ** 3 for _ in range(experts)]
        return [share / math.fsum(found) for share in found]

    tokens = [*text, "\n", "return"]
    gates = [[n % experts, 70, (n + 1) % experts, 30] for n in range(len(tokens))]
    layers = [[number for pair in gates for number in pair]]
    other = [[(e + 1) % experts if n % 2 == 0 else e for n, e in enumerate(layers[0])]]
    return {
        "sites": places,
        "experts": experts,
        "usage": {name: [shares() for _ in places] for name in names},
        "kept_sites": [0],
        "texts": [{"set": names[0], "tokens": tokens, "prompt": 2, "gates": layers + other}],
    }


def write_stream(folder: Path, skills: int) -> Path:
    """A stream of that many stages, each with its run."""
    names = [f"skill {n}" for n in range(skills)]
    matrix = [
        [1.0 + row + column / 9 if column <= row + 1 else None for column in range(skills)]
        for row in range(skills)
    ]
    for number, name in enumerate(names, 1):
        write_run(folder / f"stage-{number}-{name}", experts=number, steps=4, sets=1)
    stages = [
        {"name": name, "action": "new", "margin": None if n == 0 else 3.0, "nearest": names[0],
         "experts": [n], "base": [3.0, None], "losses": {name: 1.0}}
        for n, name in enumerate(names)
    ]  # fmt: skip
    transfer = {"average": 1.0, "backward": 0.0, "forward": None, "forgetting": 0.0}
    margins = [0.3 + n / 99 for n in range(50)]
    results = {
        "stages": stages,
        "losses": {"skills": names, "matrix": matrix, **transfer},
        "novelty": {"known": {"a": margins}, "novel": {"a": [9 * m for m in margins]}, "batch": {}},
        "similarity": {"skills": names, "matrix": [[float(a != b) for a in names] for b in names]},
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text(
        CONFIG.format(name="stream", seed=0, experts=1, shared=0, rank=8)
    )
    return folder

"""Question: at which rate and scale (alpha / r) does each way to learn a stream learn best?

Method: one seed, --updates of 2 rows a stage, the mean loss on 64 validation rows a skill; test
tasks are not looked at. `experts` are trained alone for three of the six skills (at a gate of 1 the
other three ask nothing new); every other method learns the whole stream, or all rows at once.
Cells that are in the result already are not run again.
Result: experiments/results/continual_rates.json and experiments/LOG.md.

    python -m experiments.growth.rates --methods experts --scales 2,8,32 --rates 1e-3,5e-3
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from experiments.growth.methods import Recipe, Stage
from experiments.growth.scores import loss_of
from experiments.growth.stream import METHODS, skill_stages, write

ALONE = ("sql", "strings", "arithmetic")


def losses(name: str, stages: list[Stage], **settings: Any) -> dict[str, float]:
    """By skill, of validation rows, after the whole stream."""
    if name != "experts":
        method = METHODS[name](seed=0, **settings)
        if method.JOINT:
            method.learn_all(stages)
        for stage in [] if method.JOINT else stages:
            method.learn(stage)
            method.admit(stage)
        return {stage.name: loss_of(method.model, stage.held_out) for stage in stages}
    found = {}
    for stage in stages:
        if stage.name in ALONE:
            method = METHODS[name](seed=0, **settings)
            method.learn(stage)
            found[stage.name] = loss_of(method.model, stage.held_out)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default="experts,joint,joint-lora")
    parser.add_argument("--scales", default="2,8,32")
    parser.add_argument("--rates", default="1e-3,5e-3")
    parser.add_argument("--updates", type=int, default=320, help="a stage")
    parser.add_argument("--rows", type=int, default=640, help="of a skill")
    parser.add_argument(
        "--out", type=Path, default=Path("experiments/results/continual_rates.json")
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = json.loads(options.out.read_text())["cells"] if options.out.exists() else []
    stages = skill_stages(options.rows)
    for name in options.methods.split(","):
        for scale in map(float, options.scales.split(",")):
            for rate in map(float, options.rates.split(",")):
                cell: dict[str, Any] = {"method": name, "scale": scale, "rate": rate}
                cell |= {"updates": options.updates, "rows": options.rows}
                if any(cell.items() <= done.items() for done in cells):
                    continue
                recipe = Recipe(updates=options.updates)
                found = losses(name, stages, recipe=recipe, scale=scale, rate=rate)
                cells.append(cell | {"loss": found, "mean": sum(found.values()) / len(found)})
                print(time.strftime("%H:%M:%S"), cells[-1], flush=True)
                write(options.out, cells)


if __name__ == "__main__":
    main()

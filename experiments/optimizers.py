"""Question: which optimizer trains a mixture best at 100 steps of 8 rows, and what does it keep?

Method: the form of the quickstart (a shared expert beside small ones chosen by the prompt, scale
32) on the six embedded skills. One seed for three learning rates, each twice the one before, and
while the best is at an end for the next one, five at most. Then three seeds at the best, which draw
rows and their order, too. Chosen by validation; reported on rows with literals of their own.
Result: experiments/results/optimizers.json and docs/trainers.md. A run that is killed goes on when
it is started again.

    OMP_NUM_THREADS=1 python -m experiments.optimizers
"""

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from dylora import DyLoRA_MoE
from dylora.cli.compare import load_board
from dylora.compare.cells import drop_checkpoints, score_cell, train_cell
from dylora.run_config import RunConfig
from dylora.training.optim import make_optimizer, state_like

OUT = Path("experiments/results/optimizers.json")
SEEDS, MOST = (0, 1, 2), 5  # rates tried at most
# The rate in the middle of the first three, and settings that are not those of adamw.
TRIED: dict[str, tuple[float, dict[str, Any]]] = {
    "adamw": (6e-4, {}),
    "adamw_8bit": (6e-4, {}),  # at the best rate of adamw alone
    "muon": (1.2e-3, {}),
    "lion": (1e-4, {}),
    "lora_plus": (1.5e-4, {}),
    "schedule_free": (1.2e-3, {"lr_scheduler_type": "constant_with_warmup"}),
    "adafactor": (6e-4, {"adam_beta2": 0.999}),  # which is to be left alone with it
    "sgd": (0.1, {}),
}
OVERRIDES = ["test_answers=0", "output_dir=runs/optimizers", "run.eval.eval_steps=100"]
BOARD = load_board("configs/compare/decide_100x8.yaml", OVERRIDES)
METHOD = next(method for method in BOARD.methods if method.name == "prompt_routing")


def cell(optim: str, rate: float, seed: int) -> RunConfig:
    """A run, in a folder of its own."""
    config = BOARD.cell(METHOD, rate, 32, seed)
    train = dataclasses.replace(config.train, optim=optim, **TRIED[optim][1])
    return dataclasses.replace(config, train=train, output_dir=f"{config.output_dir}/{optim}")


def search(optim: str) -> dict[float, float]:
    """Rates and their losses on the rows to choose by."""
    middle, losses = TRIED[optim][0], dict[float, float]()
    rates = [middle] if optim == "adamw_8bit" else [middle / 2, middle, middle * 2]
    while rates:
        rate = rates.pop(0)
        loss = train_cell(cell(optim, rate, SEEDS[0]))["loss"]
        losses[rate] = float("inf") if loss is None else loss
        print(f"{optim:14}{rate:9.3g}  {loss}", flush=True)
        best = min(losses, key=losses.__getitem__)
        if not rates and 1 < len(losses) < MOST and best in (min(losses), max(losses)):
            rates.append(best / 2 if best == min(losses) else best * 2)
    return dict(sorted(losses.items()))


def state_bytes(optim: str) -> float:
    """Bytes of state a trained parameter."""
    config = cell(optim, TRIED[optim][0], SEEDS[0])
    model = DyLoRA_MoE.from_base(config.model.base, config.moe)
    optimizer = make_optimizer(model, config.train)
    own = [parameter for _, parameter in model.own_parameters()]
    kept = [t for p in own for t in state_like(optimizer, p).values() if t is not None]
    return sum(tensor.nbytes for tensor in kept) / sum(parameter.numel() for parameter in own)


def main() -> None:
    found: dict[str, Any] = {}
    for optim in TRIED:
        losses = search(optim)
        best = min(losses, key=losses.__getitem__)
        for rate in losses.keys() - {best}:
            drop_checkpoints(cell(optim, rate, SEEDS[0]))
        tests = [score_cell(cell(optim, best, seed), BOARD.config)["loss"] for seed in SEEDS]
        row = {"rate": best, "losses": losses, "tests": tests, "bytes": state_bytes(optim)}
        found[optim] = row | {"mean": statistics.mean(tests), "sd": statistics.stdev(tests)}
        OUT.write_text(json.dumps({"seeds": SEEDS, "optimizers": found}, indent=1) + "\n")
        print(optim, json.dumps(found[optim]), flush=True)


if __name__ == "__main__":
    main()

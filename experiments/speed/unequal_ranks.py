"""Do experts of unequal rank cost what their ranks add up to? A training step (forward, backward,
AdamW) of one expert of rank 49 with six of rank 8, against one LoRA of rank 97, seven experts of
nearly equal rank, 97 in all, and seven of rank 49, which is what padding to the largest costs.

    OMP_NUM_THREADS=1 python experiments/speed/unequal_ranks.py --layers 2 --tokens 256

Contenders take turns; a ratio is the median over rounds of that within a round. Times are those of
the process: others may use the machine.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dylora import DyLoRA_MoE
from dylora.run_config import TrainConfig
from dylora.training.optim import build_optimizer
from experiments.speed import models
from experiments.speed.timing import timed

RANKS = [49, 8, 8, 8, 8, 8, 8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512)
    options = parser.parse_args()
    options.device, options.clock = torch.device(options.device), time.process_time
    models.quiet()
    base = models.build(models.small(options.layers), options.device, torch.float32)
    contenders = {
        "ranks 49 and 6 of 8": models.mixture(base, 7, expert_ranks=RANKS),
        "one LoRA of 97": models.mixture(base, 1, r=97, top_k_experts=1, use_moe_routing=False),
        "7 experts, 97 in all": models.mixture(base, 7, expert_ranks=[13] + [14] * 6),
        "7 experts of 49": models.mixture(base, 7, r=49),
        "49, 8, 9, 8, 9, 7, 7": models.mixture(base, 7, expert_ranks=[49, 8, 9, 8, 9, 7, 7]),
    }
    ids = torch.randint(3, 4096, (1, options.tokens), device=options.device)
    ways: dict[str, Callable[[], object]] = {
        name: step(model, ids) for name, model in contenders.items()
    }
    timed("a training step", ways, "one LoRA of 97", options)
    print(f"\n{'contender':34} {'parameters of experts':>22} {'MB with moments':>16}")
    for name, model in contenders.items():
        count = sum(p.numel() for _, p in model.named_expert_parameters())
        print(f"{name:34} {count:22,} {count * 12 / 1e6:16.1f}")


def step(model: DyLoRA_MoE, ids: torch.Tensor) -> Callable[[], None]:
    """One step of training."""
    optimizer = build_optimizer(model.train(), TrainConfig(learning_rate=1e-5))

    def run() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


if __name__ == "__main__":
    main()

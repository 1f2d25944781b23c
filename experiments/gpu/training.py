"""Question: does a run on one GPU become faster as its experts mature, and does it learn?

Method: a hand-written loop with fused AdamW on windows of the standard library's own source; 64
experts of rank 16, K = 2, on the embedded base or on a random one of codegemma's width. All experts
are immature for 40 % of the steps, and mature linearly until 60 %.

    python experiments/gpu/training.py --device cuda --dtype bfloat16 \
        --out experiments/results/gpu/training.json
"""

import argparse
import json
import random
import statistics
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.base_models import load_tokenizer
from experiments.speed import models

MODULES = ("argparse", "ast", "csv", "datetime", "decimal", "difflib", "inspect", "tarfile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--wide", action="store_true", help="codegemma's width, 18 random layers")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train once; loss and tokens per second before, while and after the experts mature."""
    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    settings = MoELoraConfig(
        num_experts=options.experts,
        top_k_experts=2,
        r=16,
        lora_alpha=32 * options.experts,
        maturity_mode="manual",
        expert_capacity_factor=None,
    )
    if options.wide:
        base: Any = models.build(models.codegemma(18, vocabulary=8192), device, dtype)
        model = DyLoRA_MoE.from_base(base, settings)
    else:
        model = DyLoRA_MoE.from_base("tiny-code-llama", settings)
        own = {id(parameter) for _, parameter in model.own_parameters()}
        model.base.to(device)
        for parameter in model.base.parameters():
            if id(parameter) not in own:
                parameter.data = parameter.data.to(dtype)
    ids = source_ids().to(device)
    parameters = [parameter for _, parameter in model.own_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=5e-4, fused=True)
    curve = []
    draw = random.Random(0)
    for step in range(options.steps):
        done = step / options.steps
        mature = min(max((done - 0.4) / 0.2, 0.0), 1.0)
        values = torch.full((options.experts,), mature, dtype=torch.float64)
        model.set_maturity(model.maturity._replace(maturity=values))
        starts = [draw.randrange(len(ids) - options.length) for _ in range(options.rows)]
        batch = torch.stack([ids[start : start + options.length] for start in starts])
        started = time.perf_counter()
        output = model.train()(batch, labels=batch, keep_logits=False)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = output.lm_loss.item()
        seconds = time.perf_counter() - started
        curve.append((loss, batch.numel() / seconds, mature))
    third = max(len(curve) // 3, 1)
    first, last = (
        statistics.median(speed for _, speed, _ in part)
        for part in (curve[min(2, third - 1) : third], curve[-third:])
    )
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tokens a step": options.rows * options.length,
        "median tokens/s, first third": first,
        "median tokens/s, last third": last,
        "ratio": last / first,
        "peak_mb": peak,
        "loss, first and last tenth": [
            statistics.mean(loss for loss, _, _ in part)
            for part in (curve[: max(third // 3, 1)], curve[-max(third // 3, 1) :])
        ],
    }


def source_ids() -> Tensor:
    """Token ids of a few modules of the standard library, one text."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "\n".join((folder / f"{name}.py").read_text() for name in MODULES)
    encoded: Any = load_tokenizer("tiny-code-llama")(text, verbose=False)
    return torch.tensor(encoded["input_ids"])


if __name__ == "__main__":
    main()

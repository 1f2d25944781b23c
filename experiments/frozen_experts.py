"""Question: what does a training step cost while most experts are frozen, or A is (LoRA-FA)?

Method: a random Llama of 8 layers, hidden size 512, with 8 experts of rank 16 on q, k, v and o,
1024 tokens in one sequence; a step is forward, backward and AdamW. The cases take turns in every
round, in an order that alternates. `kept` are the bytes that autograd holds for the backward pass,
parameters left out; `peak` is the most that a step holds beyond what was there before it.
Result: experiments/results/frozen_experts_<device>_<dtype>.json and experiments/LOG.md.

    OMP_NUM_THREADS=1 python experiments/frozen_experts.py --device cpu --dtype float32
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.evaluation.validate.cost import peak_bytes, seconds
from dylora.training.environment import environment

RESULTS = Path(__file__).parent / "results"
EXPERTS, RANK, TOKENS, VOCABULARY = 8, 16, 1024, 2048
CASES: dict[str, tuple[dict[str, Any], int]] = {  # settings, and how many experts are frozen
    "all 8 trained": ({}, 0),
    "7 of 8 frozen": ({}, 7),
    "A frozen (LoRA-FA)": ({"freeze_A": True}, 0),
    "A frozen, 7 of 8 frozen": ({"freeze_A": True}, 7),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ids = ids.to(device)
    models = {name: build(*case, device, dtype) for name, case in CASES.items()}
    steps = {name: step_of(model, ids) for name, model in models.items()}
    for step in steps.values():
        step()  # the first step makes the optimizer's state
    kept = {name: kept_bytes(model, ids) for name, model in models.items()}
    peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for round_ in range(options.rounds):
        for name in list(CASES)[:: 1 if round_ % 2 == 0 else -1]:
            times[name].append(seconds(steps[name], device))
    rows = [
        {
            "case": name,
            "trainable": models[name].count_parameters()[0],
            "step_s": times[name],
            "kept_bytes": kept[name],
            "peak_bytes": peaks[name],
        }
        for name in CASES
    ]
    results = {"environment": environment(device), "dtype": options.dtype, "cases": rows}
    file = RESULTS / f"frozen_experts_{device.type}_{options.dtype}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(table(rows))


def build(
    settings: dict[str, Any], frozen: int, device: torch.device, dtype: torch.dtype
) -> DyLoRA_MoE:
    """A mixture on a random base, in training mode, its B's not 0."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
    )
    base = AutoModelForCausalLM.from_config(config).to(device, dtype)
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=EXPERTS, r=RANK, **settings))
    with torch.no_grad():
        for name, parameter in model.named_expert_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    model.experts.freeze(*range(frozen))
    return model.train()


def step_of(model: DyLoRA_MoE, ids: Tensor) -> Callable[[], Tensor]:
    """One optimizer step on the sequence [1, T]."""
    trained = [p for _, p in model.own_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> Tensor:
        loss = model(ids, labels=ids).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def kept_bytes(model: DyLoRA_MoE, ids: Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    del loss
    return sum(kept.values())


def table(rows: list[dict[str, Any]]) -> str:
    """Medians and ranges as Markdown; ratios are medians over rounds against the first case."""
    lines = [
        "| case | trainable | s a step (range) | against the first | kept MB | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = row["step_s"]
        ratios = [own / first for own, first in zip(times, rows[0]["step_s"], strict=True)]
        lines.append(
            f"| {row['case']} | {row['trainable']:,} | {statistics.median(times):.3f} "
            f"({min(times):.3f}–{max(times):.3f}) | {statistics.median(ratios):.3f} "
            f"| {row['kept_bytes'] / 1e6:.0f} | {row['peak_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()

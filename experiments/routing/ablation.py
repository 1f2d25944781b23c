"""Question: does each expert of a mixture routed by the prompt hold its own skill, and no other?

Method: the loss on 40 test rows a skill (literals of their own) of trained runs of a comparison,
with all experts, then with each of the routed ones left out, whose prompts go to the nearest other
expert, and with the shared expert alone. Each figure is the mean over the runs, beside the
standard deviation.
Result: experiments/results/prompt_ablation.json and docs/evidence.md.

    python -m experiments.routing.ablation runs/compare/decide_340x16/prompt_routing/*seed?
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from dylora import DyLoRA_MoE, load_tokenizer
from dylora.compare.rows import rows_to_report_on
from dylora.data.batching import collate
from dylora.data.prompts import pad_token_id
from dylora.data.tokenize import TokenizedSet
from dylora.data_config import DataConfig
from dylora.kernels.cross_entropy import count_targets
from dylora.storage.folders import checkpoints
from dylora.tasks import SKILLS

BASE, ROWS, BATCH = "tiny-code-llama", 40, 20


@torch.no_grad()
def loss_of(model: DyLoRA_MoE, rows: TokenizedSet, pad: int, gates_E: Tensor | None) -> float:
    """Mean nats per target; the model routes by itself where no gates are given."""
    total, targets = 0.0, 0
    for begin in range(0, len(rows), BATCH):
        examples = [rows[index] for index in range(begin, min(begin + BATCH, len(rows)))]
        given = {} if gates_E is None else {"routing_weights": gates_E.expand(len(examples), -1)}
        batch = collate(examples, pad)
        losses = model(**batch, keep_logits=False, **given).token_losses
        assert losses is not None
        total += losses.double().sum().item()
        targets += int(count_targets(batch["labels"]))
    return total / targets


def ablate(model: DyLoRA_MoE, sets: list[TokenizedSet], pad: int) -> dict[str, dict[str, float]]:
    """Losses by skill, by what was left out."""
    experts, shared = model.experts, model.config.shared_experts
    routed = range(shared, len(experts))

    def losses(gates_E: Tensor | None = None) -> dict[str, float]:
        return {s.name.removeprefix("skill/"): loss_of(model, s, pad, gates_E) for s in sets}

    found = {"nothing": losses()}
    for expert in routed:
        experts.activate(*(other for other in routed if other != expert))
        found[experts[expert].skill or f"expert {expert}"] = losses()
    experts.activate_all_experts()
    found["all routed experts"] = losses(torch.tensor([1.0] * shared + [0.0] * len(routed)))
    return found


def over_runs(found: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Mean and standard deviation of each figure."""

    def spread(values: list[float]) -> list[float]:
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        return [round(statistics.fmean(values), 4), round(deviation, 4)]

    return {
        removed: {skill: spread([one[removed][skill] for one in found]) for skill in losses}
        for removed, losses in found[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument(
        "--out", type=Path, default=Path("experiments/results/prompt_ablation.json")
    )
    options = parser.parse_args()
    tokenizer = load_tokenizer(BASE)
    names = [TokenizedSet(f"skill/{skill}", "validation") for skill in SKILLS]
    sets = rows_to_report_on(names, tokenizer, DataConfig(max_length=256), ROWS)
    found = []
    for run in options.runs:
        model = DyLoRA_MoE.from_pretrained(checkpoints(run)[-1]).eval()
        found.append(ablate(model, sets, pad_token_id(tokenizer)))
        print(run.name, found[-1], flush=True)
    table = {"runs": len(found), "rows a skill": ROWS, "loss": over_runs(found)}
    options.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    width = max(map(len, table["loss"]))
    print(" " * width, *(f"{skill:>14}" for skill in SKILLS))
    for removed, losses in table["loss"].items():
        cells = (f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in losses.values())
        print(f"{removed:{width}}", *(f"{cell:>14}" for cell in cells))


if __name__ == "__main__":
    main()

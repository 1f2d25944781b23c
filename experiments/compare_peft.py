"""Question: is the `lora` of a comparison what stock peft trains?

Method: the cell of one rate, scale and seed is trained by dylora, and peft's LoRA of the same rank
and alpha by a loop of torch's AdamW and a schedule of transformers, on the same micro-batches, from
the same initial A. Then both are scored on the rows that a comparison chooses by. In float64, too,
with norms that do not round to float32 as transformers' do, so that no rounding is left to grow.
Result: experiments/results/compare_peft.json and docs/evidence.md.

    OMP_NUM_THREADS=1 python -m experiments.compare_peft
    OMP_NUM_THREADS=1 python -m experiments.compare_peft --dtype float64 --steps 20
"""

import argparse
import dataclasses
import json
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import get_scheduler

from dylora.base_models import load_base
from dylora.cli.compare import load_board
from dylora.compare.config import Board
from dylora.compare.rows import rows_to_choose_by
from dylora.data.batching import collate
from dylora.training.run import Run, prepare
from dylora.training.step import next_batches, run_step
from dylora.training.validation import overall_loss, validate

RESULT = Path(__file__).parent / "results" / "compare_peft.json"
BOARD = "configs/compare/decide_100x8.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rate", type=float, default=6e-4)
    parser.add_argument("--scale", type=float, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    options = parser.parse_args()
    board = load_board(BOARD, [])
    with tempfile.TemporaryDirectory() as folder:
        ours = cell_of(board, options, f"{folder}/ours")
        rows = cell_of(board, options, f"{folder}/peft")  # gives the second one its batches
        theirs = in_peft(ours)
        if options.dtype == "float64":
            for model in (ours.model.base, theirs):
                in_float64(model)
        steps = options.steps
        losses = {"dylora": train_ours(ours, steps), "peft": train_peft(theirs, rows, steps)}
        scores = {"dylora": score_ours(ours), "peft": score_peft(theirs, rows)}
    each = list(zip(losses["dylora"], losses["peft"], strict=True))
    result = {
        **vars(options),
        "peft": peft.__version__,
        "torch": torch.__version__,
        "trainable": {"dylora": ours.model.count_parameters()[0], "peft": trainable(theirs)},
        "loss": scores,
        "difference": abs(scores["dylora"] - scores["peft"]),
        "largest_difference_of_a_step": max(abs(one - other) for one, other in each),
        "of_the_first_ten_steps": max(abs(one - other) for one, other in each[:10]),
    }
    both = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    RESULT.write_text(json.dumps(both | {options.dtype: result}, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def cell_of(board: Board, options: argparse.Namespace, folder: str) -> Run:
    """The run of the first method's cell, before its first step."""
    cell = board.cell(board.methods[0], options.rate, options.scale, options.seed)
    return prepare(dataclasses.replace(cell, output_dir=folder), fresh=True)


def in_peft(run: Run) -> Any:
    """Stock peft on another copy of the base, with the initial A of this run."""
    moe, base = run.config.moe, load_base(run.config.model.base)
    names = sorted({path.rpartition(".")[2] for path in run.model.mixture.adapters})
    config = peft.LoraConfig(r=moe.r, lora_alpha=moe.lora_alpha, target_modules=names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    for path, (A, _) in run.model.expert_weights(0).items():
        module: Any = model.get_base_model().get_submodule(path)
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(A)
    return model


def trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def in_float64(model: Any) -> None:
    """Let all of a Llama compute in float64; its norms, too."""
    model.double()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(rms_norm, module)


def rms_norm(module: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def train_ours(run: Run, steps: int) -> list[float]:
    return [run_step(run).loss for _ in range(steps)]


def train_peft(model: Any, rows: Run, steps: int) -> list[float]:
    """The training loss of each step; AdamW as torch has it, over all that peft trains."""
    train, losses = rows.config.train, []
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        weight_decay=train.weight_decay,
    )
    schedule = get_scheduler(train.lr_scheduler_type, optimizer, train.warmup_steps, rows.steps)
    model.train()
    for _ in range(steps):
        batches, totals = next_batches(rows)
        optimizer.zero_grad()
        sums = [nats(model, batch) for batch in batches]
        loss = torch.stack(sums).sum() / totals.target_tokens
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def nats(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The summed loss of a batch at its targets."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask")).logits
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")


def score_ours(run: Run) -> float:
    rows, size = rows_to_choose_by(run.data.validation), run.config.eval.batch_size
    scores = validate(run.model, rows, batch_size=size, pad_token_id=run.pad_token_id)
    return overall_loss(scores)


@torch.no_grad()
def score_peft(model: Any, rows: Run) -> float:
    total = targets = 0.0
    model.eval()
    for examples in rows_to_choose_by(rows.data.validation):
        batch = collate([examples[index] for index in range(len(examples))], rows.pad_token_id)
        total += float(nats(model, batch))
        targets += int((batch["labels"][:, 1:] != -100).sum())
    return total / targets


if __name__ == "__main__":
    main()

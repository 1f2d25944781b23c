"""Target tokens per second on real rows: our loop against transformers' Trainer with a peft LoRA.

    python experiments/speed/end_to_end.py --rows code_alpaca.json \
        --out experiments/results/end_to_end.json

The same base, rows, tokens, batch, optimizer and total rank; a step of theirs and one of ours take
turns within one process. `--rows` is a file of CodeAlpaca's format.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dylora.base_models import load_base
from dylora.config import MoELoraConfig
from dylora.run_config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from dylora.training.run import Run, prepare
from dylora.training.step import run_step
from experiments.speed.models import TARGETS, quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--base", default="tiny-code-llama")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--length_window", type=int, default=1, help="ours: data.bucket_steps")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        result = compare(options, Path(folder))
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Alternate their steps with ours; target tokens per second, and their ratio."""
    from transformers import TrainerCallback

    run = prepare(our_config(options, folder), fresh=True)
    counts: list[int] = []  # targets of each batch that the Trainer has fetched
    trainer = their_trainer(options, folder, run, counts)
    theirs: list[tuple[int, float]] = []  # targets and seconds of each step
    ours: list[tuple[int, float]] = []

    class TakeTurns(TrainerCallback):
        """Times the Trainer's step, then runs one of ours."""

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds = time.perf_counter() - self.started
            # The Trainer fetches the batches of a step before it begins it.
            theirs.append((sum(counts[-options.accumulation :]), seconds))
            counts.clear()
            result = run_step(run)
            ours.append((result.target_tokens, result.seconds))

    trainer.add_callback(TakeTurns())
    trainer.train()
    return summary(options, ours[1:], theirs[1:])


def our_config(options: argparse.Namespace, folder: Path) -> RunConfig:
    """E experts of rank 16, as a user would train them."""
    return RunConfig(
        name="ours",
        output_dir=str(folder),
        model=ModelConfig(base=options.base, dtype=options.dtype, device=options.device),
        moe=MoELoraConfig(num_experts=options.experts, r=16, lora_alpha=32),
        data=DataConfig(
            sources=[SourceConfig(name="code_alpaca", path=options.rows)],
            bucket_steps=options.length_window,
        ),
        train=TrainConfig(
            max_steps=options.steps + 2,
            batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
        ),
    )


def their_trainer(options: argparse.Namespace, folder: Path, run: Run, counts: list[int]) -> Any:
    """transformers' Trainer with a peft LoRA of the same rank in all, on the rows of our run."""
    import peft
    from transformers import Trainer, TrainingArguments

    rank = 16 * options.experts
    base = load_base(options.base, dtype=getattr(torch, options.dtype), device=options.device)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {
            name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
            for name, fill in (("input_ids", run.pad_token_id), ("labels", -100))
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        counts.append(int((batch["labels"][:, 1:] != -100).sum()))
        return batch

    rows = run.data.train[0]
    return Trainer(
        model=peft.get_peft_model(base, settings),
        args=TrainingArguments(
            output_dir=str(folder / "theirs"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
            learning_rate=2e-4,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=options.device == "cpu",
            bf16=False,
        ),
        train_dataset=[rows[index] for index in range(len(rows))],  # type: ignore[arg-type]
        data_collator=collate,
    )


def summary(
    options: argparse.Namespace, ours: list[tuple[int, float]], theirs: list[tuple[int, float]]
) -> dict[str, Any]:
    """With windows of similar length single steps differ much in tokens: so of all steps, too."""
    ratios = [
        (mine[0] / mine[1]) / (other[0] / other[1])
        for mine, other in zip(ours, theirs, strict=True)
    ]
    low, middle, high = statistics.quantiles(ratios, n=4)
    mine_all, other_all = (
        sum(n for n, _ in steps) / sum(s for _, s in steps) for steps in (ours, theirs)
    )
    return {
        "ours, target tokens/s": mine_all,
        f"Trainer + peft LoRA r={16 * options.experts}, target tokens/s": other_all,
        "ratio": mine_all / other_all,
        "median of the steps' ratios": middle,
        "quartiles of the steps' ratios": [low, high],
        "length_window": options.length_window,
        "steps": options.steps,
        "rows a step": options.batch_size * options.accumulation,
        "base": options.base,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    main()

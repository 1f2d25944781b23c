"""Target tokens per second on real rows: our loop against transformers' Trainer with a peft LoRA.

    python experiments/speed/end_to_end.py --rows code_alpaca.json \
        --out experiments/results/end_to_end.json

The same base, rows, tokens, batch, optimizer and total rank; a step of theirs and one of ours take
turns within one process. `--rows` is a file of CodeAlpaca's format.
"""

import argparse
import copy
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
from dylora.bases import load_base
from dylora.config import MoELoraConfig
from dylora.run_config import DataConfig, ModelConfig, RunConfig, SourceConfig, TrainConfig
from dylora.training.loop import train_step
from dylora.training.setup import prepare
from experiments.speed.models import quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--base", default="tiny-code-llama")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--length_window", type=int, default=1, help="ours: data.length_window")
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
    """Alternate their steps with ours; medians of target tokens per second, and their ratio."""
    import peft
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rank = 16 * options.experts
    config = RunConfig(
        name="ours",
        output_dir=str(folder),
        model=ModelConfig(base=options.base, dtype=options.dtype, device=options.device),
        moe=MoELoraConfig(num_experts=options.experts, r=16, lora_alpha=32),
        data=DataConfig(
            sources=[SourceConfig(name="code_alpaca", path=options.rows)],
            length_window=options.length_window,
        ),
        train=TrainConfig(
            max_steps=options.steps + 2,
            batch_size=options.batch_size,
            gradient_accumulation_steps=options.accumulation,
        ),
    )
    run = prepare(config, fresh=True)
    base = load_base(options.base, dtype=getattr(torch, options.dtype), device=options.device)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
    model = peft.get_peft_model(copy.deepcopy(base), settings)
    counts: list[int] = []

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
            started = time.perf_counter()
            result = train_step(run)
            run.optimizer.zero_grad(set_to_none=True)
            run.progress.step += 1
            ours.append((result.targets, time.perf_counter() - started))

    rows = run.data.train[0]
    trainer = Trainer(
        model=model,
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
        callbacks=[TakeTurns()],
    )
    trainer.train()
    # With windows of similar length single steps differ much in tokens: so sums are compared too.
    mine, other = ([n / s for n, s in steps[1:]] for steps in (ours, theirs))
    low, middle, high = statistics.quantiles(
        [one / two for one, two in zip(mine, other, strict=True)], n=4
    )
    mine_all, other_all = (
        sum(n for n, _ in steps[1:]) / sum(s for _, s in steps[1:]) for steps in (ours, theirs)
    )
    return {
        "ours, target tokens/s": mine_all,
        f"Trainer + peft LoRA r={rank}, target tokens/s": other_all,
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

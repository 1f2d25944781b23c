"""Train a mixture of LoRA experts on one page: no run, no configuration file, no network.

    python examples/minimal_loop.py

Everything that `run.py train` does about the experts is here: one loss for a batch that is taken in
parts, and experts that mature, so that the mixture goes from dense to sparse while it learns. What
a run adds is around it: checkpoints, resuming, metrics, schedules. The notebooks beside this file
use its functions.
"""

import argparse
import random
from typing import Any

import torch

from dylora import BatchTotals, DyLoRA_MoE, MoELoraConfig, format_prompt, load_tokenizer
from dylora.data.batching import collate
from dylora.data.prompts import encode_answers, encode_prompts, pad_token_id
from dylora.tasks import generate_tasks

BASE = "tiny-code-llama"  # five million parameters, comes with the package
SKILLS = ("lists", "sql", "arithmetic")
Rows = list[dict[str, list[int]]]  # input_ids and labels of each row


def main(steps: int) -> DyLoRA_MoE:
    """Train for some steps; print losses and the table of the experts."""
    random.seed(0)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(BASE)
    rows = [row for skill in SKILLS for row in tokenized(tokenizer, skill, 200)]

    # The base is frozen. Each expert starts as the identity, and immature: mixed for every token.
    config = MoELoraConfig(num_experts=4, top_k_experts=2, r=8, lora_alpha=64)
    model = DyLoRA_MoE.from_base(BASE, config)
    learn(model, tokenizer, rows, steps)
    print(f"\n{model.experts}")
    return model


def learn(
    model: DyLoRA_MoE,
    tokenizer: Any,
    rows: Rows,
    steps: int,
    *,
    batch: int = 16,
    parts: int = 2,
    rate: float = 2e-3,
    router_rate: float | None = None,
) -> None:
    """Optimizer steps on `batch` random rows each, taken in `parts`."""
    model.train()
    experts = [p for _, p in model.expert_parameters() if p.requires_grad]
    routers = [p for _, p in model.router_parameters() if p.requires_grad]
    groups = [{"params": experts}, {"params": routers, "lr": router_rate or rate}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)
    end = model.experts.step + steps

    for step in range(1, steps + 1):
        chosen = random.sample(rows, batch)
        batches = [collate(chosen[part::parts], pad_token_id(tokenizer)) for part in range(parts)]
        # The parts share their totals, so the loss is that of the whole batch, however it is split.
        totals = BatchTotals(
            target_tokens=sum(len(part["target_positions"]) for part in batches),
            tokens=sum(int(part["attention_mask"].sum()) for part in batches),
            fractions=model.carried_fractions(),
        )
        seen, lm_loss = None, 0.0
        for part in batches:
            output = model(**part, totals=totals, keep_logits=False)
            output.loss.backward()
            lm_loss += output.losses["lm_loss"].item()
            seen = output.observation(part["labels"]).plus(seen)
        torch.nn.utils.clip_grad_norm_([*experts, *routers], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.observe(seen, steps=end)  # maturity, and what the next step's balance loss needs

        if step % 10 == 0 or step == steps:
            maturity = " ".join(f"{m:.2f}" for m in model.maturity.maturity.tolist())
            print(f"step {step:3}  loss {lm_loss:.3f} nats per target token  maturity {maturity}")


@torch.no_grad()
def mean_loss(model: DyLoRA_MoE, tokenizer: Any, rows: Rows, **options: Any) -> float:
    """Nats per target token; options go to the model's forward (routing_weights)."""
    output = model.eval()(**collate(rows, pad_token_id(tokenizer)), keep_logits=False, **options)
    return output.losses["lm_loss"].item()


def tokenized(tokenizer: Any, skill: str, count: int, split: str = "train") -> Rows:
    """Rows of a skill as token ids; labels are -100 on the prompt, which is not trained on."""
    tasks = generate_tasks(skill, split, count)
    prompts = encode_prompts(tokenizer, [format_prompt(task.instruction) for task in tasks])
    answers = encode_answers(tokenizer, [task.answer for task in tasks])
    return [
        {
            "input_ids": [*prompt, *answer, tokenizer.eos_token_id],
            "labels": [-100] * len(prompt) + [*answer, tokenizer.eos_token_id],
        }
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)

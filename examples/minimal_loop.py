"""Train a mixture of LoRA experts on one page: no run, no configuration file, no network.

    python examples/minimal_loop.py

Everything that `run.py train` does about the experts is here: one loss for a batch that is taken in
two parts, and experts that mature, so that the mixture goes from dense to sparse while it learns.
What a run adds is around it: checkpoints, resuming, validation, metrics, schedules.
"""

import argparse
import random

import torch

from dylora import BatchTotals, DyLoRA_MoE, MoELoraConfig, format_prompt, load_tokenizer
from dylora.data.batching import collate
from dylora.data.prompts import encode_answers, encode_prompts, pad_token_id
from dylora.tasks import generate_tasks

BASE = "tiny-code-llama"  # five million parameters, comes with the package
SKILLS = ("lists", "sql", "arithmetic")


def main(steps: int, rows_per_step: int = 16, parts: int = 2) -> DyLoRA_MoE:
    """Train for some steps; print losses and the table of the experts."""
    random.seed(0)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(BASE)
    examples = [example for skill in SKILLS for example in tokenized(tokenizer, skill, rows=200)]

    # The base is frozen. Each expert starts as the identity, and immature: mixed for every token.
    config = MoELoraConfig(num_experts=4, top_k_experts=2, r=8, lora_alpha=64)
    model = DyLoRA_MoE.from_base(BASE, config).train()
    parameters = [parameter for _, parameter in model.own_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)

    for step in range(1, steps + 1):
        rows = random.sample(examples, rows_per_step)
        batches = [collate(rows[part::parts], pad_token_id(tokenizer)) for part in range(parts)]
        # The parts share their totals, so the loss is that of the whole batch, however it is split.
        totals = BatchTotals(
            target_tokens=sum(len(batch["target_positions"]) for batch in batches),
            tokens=sum(int(batch["attention_mask"].sum()) for batch in batches),
            fractions=model.carried_fractions(),
        )
        seen, lm_loss = None, 0.0
        for batch in batches:
            output = model(**batch, totals=totals, keep_logits=False)
            output.loss.backward()
            lm_loss += output.losses["lm_loss"].item()
            seen = output.observation(batch["labels"]).plus(seen)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.observe(seen, steps=steps)  # maturity, and what the next step's balance loss needs

        if step % 10 == 0 or step == steps:
            maturity = " ".join(f"{m:.2f}" for m in model.maturity.maturity.tolist())
            print(f"step {step:3}  loss {lm_loss:.3f} nats per target token  maturity {maturity}")

    print(f"\n{model.experts}")
    return model


def tokenized(tokenizer, skill: str, rows: int) -> list[dict[str, list[int]]]:
    """Rows of a skill as token ids; labels are -100 on the prompt, which is not trained on."""
    tasks = generate_tasks(skill, "train", rows)
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

"""What a shared expert with six small ones by the prompt costs against a LoRA of equal parameters.

Section `prompt_routed` of benchmark.py: the ranks of prompt_routing.yaml and lora.yaml.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch

from dylora import DyLoRA_MoE
from dylora.skills import SkillLibrary
from experiments.speed import models
from experiments.speed.models import with_peft
from experiments.speed.timing import timed

SKILLS, RANKS, SINGLE = 6, [49, 8, 8, 8, 8, 8, 8], 97
PROMPT = 32  # tokens of a row that are its prompt


def prompt_routed(options: argparse.Namespace) -> dict[str, Any]:
    """A train step of rows of all skills, and one more token with the cache."""
    config = models.small()
    base = models.build(config, options.device, options.dtype)
    routed = models.mixture(
        base,
        len(RANKS),
        shared_experts=1,
        expert_ranks=RANKS,
        router_scope="prompt",
        top_k_experts=1,
    )
    library, draw = SkillLibrary(routed), torch.Generator().manual_seed(0)
    for skill in range(SKILLS):
        rows = [rows_of(skill, config.vocab_size, draw) for _ in range(48)]
        library.add(f"skill-{skill}", rows[:32], rows[32:], expert=skill + 1)
    single = models.mixture(base, 1, use_moe_routing=False, r=SINGLE)
    stock = with_peft({f"peft LoRA r={SINGLE}": lambda: models.peft_lora(base, SINGLE)})
    asked = [rows_of(number % SKILLS, config.vocab_size, draw, 128) for number in range(8)]
    ids, labels = (
        torch.tensor([row[key] for row in asked], device=options.device)
        for key in ("input_ids", "labels")
    )
    found = routed(ids, labels=labels).routing
    assert found is not None
    assert found.gates[:, 0, 0, 1:].argmax(-1).tolist() == [n % SKILLS for n in range(8)]

    def ours(model: DyLoRA_MoE) -> Callable[[], None]:
        loss = lambda: model(ids, labels=labels, keep_logits=False).loss  # noqa: E731
        return models.train_step(model, loss)

    ways = {f"LoRA r={SINGLE}": ours(single), "by the prompt": ours(routed)}
    for name, model in stock.items():
        loss = lambda m=model: m(input_ids=ids, labels=labels, use_cache=False).loss  # noqa: E731
        ways[name] = models.train_step(model, loss)
    baseline = f"LoRA r={SINGLE}"
    results = {"train step": timed("train step, 8 x 128 of six skills", ways, baseline, options)}
    lot = {baseline: single.base, "by the prompt": routed.base}
    lot |= {name: model.eval() for name, model in stock.items()}
    caches = {}
    with torch.no_grad():
        for name, model in lot.items():
            caches[name] = model(input_ids=ids[:1, :PROMPT], use_cache=True).past_key_values

    @torch.no_grad()
    def tokens(name: str) -> None:
        for _ in range(8):
            lot[name](input_ids=ids[:1, :1], past_key_values=caches[name], use_cache=True)
            caches[name].crop(-1)

    token = {name: (lambda n=name: tokens(n)) for name in lot}
    results["decode"] = timed("decode 8 tokens of one text", token, baseline, options)
    return results


def rows_of(
    skill: int, words: int, draw: torch.Generator, length: int = 64
) -> dict[str, list[int]]:
    """A row whose prompt has words of its skill alone."""
    width = words // (2 * SKILLS)
    prompt = torch.randint(skill * width, (skill + 1) * width, (PROMPT,), generator=draw).tolist()
    answer = torch.randint(words, (length - PROMPT,), generator=draw).tolist()
    return {"input_ids": prompt + answer, "labels": [-100] * PROMPT + answer}

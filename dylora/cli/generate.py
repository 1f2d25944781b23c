"""`run.py generate`: one answer, and on request how its tokens were routed."""

import math
from dataclasses import dataclass
from typing import Any

from dylora.cli.options import BaseOptions, CheckpointOptions, RoutingOptions
from dylora.config import Quantization
from dylora.fields import option


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(RoutingOptions, BaseOptions, CheckpointOptions):
    """Continue a prompt with a checkpoint."""

    prompt: str
    """The instruction, or the text itself."""
    max_new_tokens: int = option(128, least=1)
    """Most tokens to add."""
    temperature: float = option(0.0, least=0)
    """0: the likeliest token each time."""
    raw: bool = False
    """Continue the prompt as it stands, without a template."""
    show_routing: bool = False
    """Show which experts each token used."""
    quantization: Quantization | None = None
    """How the base is stored, by default as in training: see model.quantization."""


def run(options: GenerateOptions, overrides: list[str]) -> None:
    """Print what the mixture answers."""
    import torch

    from dylora.base_models import choose_device
    from dylora.data.prompts import encode_prompts, format_prompt, pad_token_id
    from dylora.evaluation.loading import change_routing, decode_after, note
    from dylora.model import DyLoRA_MoE
    from dylora.storage.checkpoint import Checkpoint

    routing = options.routing()
    device = choose_device("auto")
    opened = Checkpoint.open(options.source(), note)
    spec = opened.base_spec(options.base, device=device, quantization=options.quantization)
    model = DyLoRA_MoE.from_pretrained(opened, spec).eval()
    change_routing(model, **routing)
    if options.base is None:  # whoever made the checkpoint chose it
        note(f"base: {spec.name}, as {opened.path} names it")
    tokenizer = opened.tokenizer(spec)
    text = options.prompt if options.raw else format_prompt(options.prompt)
    ids = torch.tensor(encode_prompts(tokenizer, [text]), device=device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.max_new_tokens,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        do_sample=options.temperature > 0,
        temperature=options.temperature or None,
    )
    length, tokens = ids.shape[1], output[0].tolist()
    special = set(tokenizer.all_special_ids)
    spoken = [token for token in tokens[length:] if token not in special]
    answer = decode_after(tokenizer, tokens[:length], spoken)
    print(answer)
    routed = any(True for _ in model.routers())  # not by constant weights
    if routed and model.config.router_scope == "prompt" and model.skill_library:
        say_skill(model, ids[0], chances=options.show_routing)
    elif options.show_routing:
        shares = model.get_routing_weights(output)[0].mean(1)  # [S, E], averaged over sites
        print(f"\nmean shares: {' '.join(f'{share:.0%}' for share in shares.mean(0).tolist())}")
        for place, share in enumerate(shares[length:], length):
            shown = decode_after(tokenizer, tokens[:place], tokens[place : place + 1])
            leader = int(share.argmax())
            print(f"{shown!r:16} expert {leader} ({float(share[leader]):.0%})")


def say_skill(model: Any, prompt: Any, *, chances: bool) -> None:
    """Which skill a prompt [S] of token ids asks for, or that it is unlike every known one."""
    from dylora.evaluation.loading import note

    choice = model.skill_library.which(prompt)
    if not choice.known:
        far = f"its distance is {choice.distance:.2f} × what is far from {choice.skill}"
        note(f"the prompt is unlike every known skill ({far}): answered by the base alone")
    if chances:
        print(f"\nskill: {choice.skill}, expert {model.skill_library.expert_of(choice.skill)}")
        ranked = sorted(choice.log_probabilities.items(), key=lambda item: -item[1])
        print(", ".join(f"{name} {math.exp(chance):.1%}" for name, chance in ranked[:10]))

"""`run.py generate`: one answer, and on request how its tokens were routed."""

import torch

from dylora.base_models import choose_device
from dylora.config import Quantization
from dylora.data.prompts import encode_prompts, format_prompt, pad_token_id
from dylora.evaluation.common import decode_after
from dylora.evaluation.loading import note
from dylora.model import DyLoRA_MoE
from dylora.storage.checkpoint import Checkpoint


def generate_text(
    checkpoint: str,
    prompt: str,
    base: str | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    raw: bool = False,
    show_routing: bool = False,
    quantization: Quantization | None = None,
) -> str:
    """Print and return what the mixture answers.

    Args:
        checkpoint: a folder written by training or `save_pretrained`.
        base: the base by name; by default the one the checkpoint names.
        temperature: 0 is greedy.
        raw: continue the prompt as it stands, without the instruction template.
        show_routing: print each token's leading expert and the mean share of every expert.
        quantization: how the base's linear layers are stored; by default as in training.
    """
    device = choose_device("auto")
    opened = Checkpoint.open(checkpoint, note)
    spec = opened.base_spec(base, device=device, quantization=quantization)
    model = DyLoRA_MoE.from_pretrained(opened, spec).eval()
    if base is None:  # whoever made the checkpoint chose it
        note(f"base: {spec.name}, as {checkpoint} names it")
    tokenizer = opened.tokenizer(spec)
    text = prompt if raw else format_prompt(prompt)
    ids = torch.tensor(encode_prompts(tokenizer, [text]), device=device)
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        do_sample=temperature > 0,
        temperature=temperature or None,
    )
    length, tokens = ids.shape[1], output[0].tolist()
    special = set(tokenizer.all_special_ids)
    spoken = [token for token in tokens[length:] if token not in special]
    answer = decode_after(tokenizer, tokens[:length], spoken)
    print(answer)
    if show_routing:
        shares = model.get_routing_weights(output)[0].mean(1)  # [S, E], averaged over sites
        print(f"\nmean shares: {' '.join(f'{share:.0%}' for share in shares.mean(0).tolist())}")
        for place, share in enumerate(shares[length:], length):
            shown = decode_after(tokenizer, tokens[:place], tokens[place : place + 1])
            leader = int(share.argmax())
            print(f"{shown!r:16} expert {leader} ({float(share[leader]):.0%})")
    return answer

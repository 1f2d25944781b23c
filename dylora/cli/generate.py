"""`dylora generate`: an answer, or those to a file of prompts; on request how it was routed."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dylora.cli.options import AnswerOptions, SpeakerOptions
from dylora.fields import option

if TYPE_CHECKING:
    from dylora.serving.answering import Row, Sampling
    from dylora.serving.engine import Speaker


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(AnswerOptions, SpeakerOptions):
    """Answer a prompt, or every prompt of a file, with a checkpoint."""

    prompt: str | None = None
    """The instruction, or the text itself."""
    prompts: str | None = option(None, metavar="FILE")
    """Instead of it a file: .jsonl with prompt, with instruction and maybe input, or with messages;
    else a prompt a line."""
    out: str | None = option(None, metavar="FILE")
    """With --prompts: the .jsonl that gets a line for each, in their order."""
    batch_size: int = option(8, least=1)
    """With --prompts: prompts that are answered together."""
    raw: bool = False
    """Continue the prompt as it stands, without a template."""
    show_routing: bool = False
    """Show which experts each token used."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give either --prompt TEXT or --prompts FILE")
        if (self.prompts is None) != (self.out is None):
            raise ValueError("--prompts FILE and --out FILE belong together")
        if self.prompts is not None and self.show_routing:
            raise ValueError("--show_routing is of one --prompt")


def run(options: GenerateOptions, overrides: list[str]) -> None:
    """Print what the mixture answers, or write it."""
    asked = None if options.prompts is None else list(read_prompts(Path(options.prompts)))
    if options.out is not None and Path(options.out).exists():
        raise FileExistsError(f"{options.out} exists: give another --out, or remove it")
    speaker = options.speaker()
    sampling = options.sampling()
    if asked is not None:
        _answer_file(speaker, asked, sampling, options)
        return
    (row,) = _rows(speaker, [{"prompt": options.prompt}], sampling, raw=options.raw)
    speaker.answer([row])
    print(row.text)
    _tell_routing(speaker, row, show=options.show_routing)


def read_prompts(file: Path) -> Iterator[dict[str, Any]]:
    """Each with prompt and maybe input, or with messages.

    Raises ValueError naming file and line.
    """
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            yield {"prompt": line}
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: not valid JSON ({error})") from None
        keys = found.keys() if isinstance(found, dict) else ()
        if "instruction" in keys:
            yield {"prompt": str(found["instruction"]), "input": str(found.get("input") or "")}
        elif "messages" in keys:
            yield {"messages": found["messages"]}
        elif isinstance(found, dict) and isinstance(found.get("prompt"), str):
            yield {"prompt": found["prompt"]}
        else:
            raise ValueError(f"{file}:{number}: has neither prompt, instruction nor messages")


def _rows(
    speaker: "Speaker", asked: list[dict[str, Any]], sampling: "Sampling", *, raw: bool
) -> "list[Row]":
    """A row for each prompt. Raises ValueError for one that is too long or no conversation."""
    from dylora.serving.answering import Row, room_after

    rows = []
    for number, one in enumerate(asked, 1):
        try:
            if "messages" in one:
                ids = speaker.conversation(one["messages"])
            elif raw:
                ids = speaker.text(one["prompt"])
            else:
                ids = speaker.question(one["prompt"], one.get("input", ""))
            rows.append(Row(ids, sampling))
            room_after(speaker.model, rows[-1])
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}" if len(asked) > 1 else error) from None
    return rows


def _answer_file(
    speaker: "Speaker", asked: list[dict[str, Any]], sampling: "Sampling", options: GenerateOptions
) -> None:
    """A line of JSON for each prompt, in their order; prompts of similar length share a batch."""
    from tqdm import tqdm

    from dylora.storage.folders import write_file

    assert options.out is not None
    rows = _rows(speaker, asked, sampling, raw=options.raw)
    order = sorted(rows, key=lambda row: len(row.prompt))
    for begin in tqdm(range(0, len(order), options.batch_size), unit="batch", disable=None):
        speaker.answer(order[begin : begin + options.batch_size])
    told = [
        {**one, "text": row.text, "finish_reason": row.finish}
        for one, row in zip(asked, rows, strict=True)
    ]
    write_file(
        Path(options.out), "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in told)
    )
    print(f"wrote {len(told)} answers to {options.out}")


def _tell_routing(speaker: "Speaker", row: "Row", *, show: bool) -> None:
    """Which skill a prompt went to, or on request which expert led each token."""
    import torch

    from dylora.evaluation.loading import decode_after

    model, tokenizer, length = speaker.model, speaker.tokenizer, len(row.prompt)
    tokens = [*row.prompt, *row.tokens]
    routed = any(True for _ in model.routers())  # not by constant weights
    if routed and model.config.router_scope == "prompt" and model.skill_library:
        say_skill(model, torch.tensor(row.prompt, device=model.device), chances=show)
    elif show:
        output = torch.tensor([tokens], device=model.device)
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

"""`dylora chat`: a conversation in the terminal."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from dylora.cli.options import AnswerOptions, SpeakerOptions

if TYPE_CHECKING:
    from dylora.serving.answering import Row, Sampling
    from dylora.serving.engine import Speaker

HELP = """\
/1, /2 …   a question of those suggested at the beginning, by itself
/experts   which experts led the last answer
/reset     forget the conversation
/seed N    draw with this seed from now on
/quit      end (so does Ctrl-D); Ctrl-C ends an answer"""


@dataclass(frozen=True, kw_only=True)
class ChatOptions(AnswerOptions, SpeakerOptions):
    """Talk to a checkpoint in the terminal."""

    system: str | None = None
    """What stands before the conversation."""


def run(options: ChatOptions, overrides: list[str]) -> None:
    """Read lines and answer them, until there are no more."""
    from dylora.serving.suggestions import suggested_questions

    speaker = options.speaker()
    sampling = options.sampling()
    folder = Path(options.checkpoint)
    run_folder = folder if (folder / "metrics.jsonl").exists() else folder.resolve().parent
    suggested = suggested_questions(speaker.model.training_record, run_folder)
    talk(speaker, sampling, options.system, suggested)


def talk(
    speaker: "Speaker",
    sampling: "Sampling",
    system: str | None = None,
    suggested: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """The conversation, from the first line of standard input to its end; suggested: questions by
    skill."""
    begin = [{"role": "system", "content": system}] if system else []
    messages, last = list(begin), None
    interactive = sys.stdin.isatty()
    questions = {f"/{n}": question for n, question in enumerate(suggested.values(), 1)}
    if interactive:
        print("/help tells the commands")
        for number, (skill, question) in zip(questions, suggested.items(), strict=True):
            print(f"{number}  {skill}: {question}")
    while (line := _read("> " if interactive else "")) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages, last = list(begin), None
        elif command == "/seed" and rest.strip().isdecimal():
            sampling = replace(sampling, seed=int(rest))
        elif command == "/experts":
            told = last and last.tokens and experts_line(speaker, last)
            print(told or "nothing was answered yet")
        elif command.startswith("/") and command not in questions:
            print(HELP)
        elif command:
            if said := questions.get(command):
                messages = list(begin)
                print(said)
            asked = [*messages, {"role": "user", "content": said or line.strip()}]
            try:
                last = _answer(speaker, asked, sampling)
            except ValueError as error:  # the conversation has become too long
                print(f"error: {error}; /reset forgets it", file=sys.stderr)
            else:
                messages = [*asked, {"role": "assistant", "content": last.text}]


def experts_line(speaker: "Speaker", row: "Row") -> str:
    """The share of each expert in the tokens of an answer, the largest first."""
    import torch

    model = speaker.model
    ids = torch.tensor([[*row.prompt, *row.tokens]], device=model.device)
    labels = ids.clone()  # where they begin the prompt ends, by which it may have been routed
    labels[:, : len(row.prompt)] = -100
    with torch.no_grad():
        routing = model(ids, torch.ones_like(ids), labels).routing
    assert routing is not None
    gates = routing.gates[0].mean(1)  # [S, E], averaged over sites
    share_E = gates[len(row.prompt) - 1 : -1].mean(0)  # of the passes that made the answer
    share_E = share_E / share_E.sum().clamp_min(1e-12)
    ranked = sorted(enumerate(share_E.tolist()), key=lambda item: -item[1])
    table: Any = model.experts.table
    told = [
        f"expert {number}{f' ({table[number].skill})' if table[number].skill else ''} {share:.0%}"
        for number, share in ranked
        if share >= 0.005
    ]
    return ", ".join(told) or "the base alone"


def _answer(speaker: "Speaker", messages: list[dict[str, str]], sampling: "Sampling") -> "Row":
    from dylora.serving.answering import Row

    ids = speaker.conversation(messages)
    row = Row(ids, sampling, lambda piece: print(piece, end="", flush=True))
    try:
        speaker.answer([row])
    except KeyboardInterrupt:
        row.end("cancelled")
    print()
    return row


def _read(prompt: str) -> str | None:
    try:
        return input(prompt)
    except EOFError:
        return None

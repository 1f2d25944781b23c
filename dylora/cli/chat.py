"""`dylora chat`: a conversation in the terminal."""

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dylora.cli.options import AnswerOptions, SpeakerOptions

if TYPE_CHECKING:
    from dylora.serving.answering import Row, Sampling
    from dylora.serving.engine import Speaker

HELP = """\
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
    speaker = options.speaker()
    sampling = options.sampling()
    talk(speaker, sampling, options.system)


def talk(speaker: "Speaker", sampling: "Sampling", system: str | None = None) -> None:
    """The conversation, from the first line of standard input to its end."""
    begin = [{"role": "system", "content": system}] if system else []
    messages, last = list(begin), None
    interactive = sys.stdin.isatty()
    if interactive:
        print("/help tells the commands")
    while (line := _read("> " if interactive else "")) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            messages, last = list(begin), None
        elif command == "/seed" and rest.strip().isdecimal():
            sampling = replace(sampling, seed=int(rest))
        elif command == "/experts":
            print(experts_line(speaker, last) if last else "nothing was answered yet")
        elif command.startswith("/"):
            print(HELP)
        elif command:
            asked = [*messages, {"role": "user", "content": line.strip()}]
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
    gates = model.get_routing_weights(ids)[0].mean(1)  # [S, E], averaged over sites
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

"""Replacing the routers by constant weights: measured mean gates, and what the model loses by it.

Shape letters: B batch, S sequence, N sites, E experts, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dylora.data.prompts import encode, encode_prompts
from dylora.data.readers import read_records
from dylora.data.record import BadRecord
from dylora.data.templates import Chat, Template, question
from dylora.kernels.common import at_least_float32, evaluation_mode
from dylora.model import DyLoRA_MoE

WINDOW = 512  # tokens of a piece of a longer text
_CHARACTERS = 16  # per token, so that a limit in tokens bounds what is read of a text
_POSITIONS = 64  # whose distributions over the vocabulary are held at once


class Sequences(NamedTuple):
    """A text as token ids."""

    ids: list[Tensor]  # each [1, S] of at least 2 tokens
    firsts: list[int]  # where in each the tokens begin whose prediction counts; 1 or more
    source: str  # the file

    @property
    def tokens(self) -> int:
        return sum(part.shape[1] for part in self.ids)


class Comparison(NamedTuple):
    """Routed against constant weights over a text, each a mean over the predicted tokens."""

    tokens: int  # that were predicted
    kl: float  # of the static mixture's distribution from the routed one's, in nats
    routed_loss: float  # cross-entropy in nats
    static_loss: float


def read_text(file: str, template: Template, limit: int, window: int = WINDOW) -> Sequences:
    """Up to `limit` tokens of a text file, or of JSON rows.

    .json, .jsonl and .parquet: rows with `text`, or with `instruction`, `output` and optionally
    `input`, which are put into the template; their answers count, as in training. Any other file is
    one text. Longer texts are cut into pieces of `window` tokens, each with BOS. Raises
    ValueError or FileNotFoundError for what cannot be read.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    found, left = Sequences([], [], file), limit
    begin = encode_prompts(template.tokenizer, [""])[0]
    size = window - len(begin)
    for prompt, answer in _texts(path, template, limit):
        body = prompt + answer
        for start in range(0, len(body), size):
            piece = (begin + body[start : start + size])[:left]
            first = max(1, len(begin) + len(prompt) - start if len(prompt) > start else 1)
            if len(piece) > 1:
                found.ids.append(torch.tensor([piece]))
                found.firsts.append(first)
                left -= len(piece)
        if left < 2:
            break
    if not any(f < ids.shape[1] for f, ids in zip(found.firsts, found.ids, strict=True)):
        raise ValueError(f"{file}: {found.tokens} tokens of it hold none to predict")
    return found


def _texts(path: Path, template: Template, limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """The token ids of each text of a file without BOS: a prompt, maybe empty, and the rest."""
    tokenizer = template.tokenizer
    if path.suffix.lower() not in (".json", ".jsonl", ".parquet"):
        try:
            with path.open(encoding="utf-8") as stream:
                text = stream.read(limit * _CHARACTERS)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not a text in UTF-8") from error
        yield [], encode(tokenizer, [text], add_special_tokens=False)[0]
        return
    for record in read_records(str(path), columns=None):
        if record.problem:
            raise ValueError(f"{record.location}: {record.problem}")
        fields = record.fields
        if isinstance(fields.get("text"), str):
            yield [], encode(tokenizer, [fields["text"]], add_special_tokens=False)[0]
        elif isinstance(fields.get("instruction"), str) and isinstance(fields.get("output"), str):
            asked = question(template, fields["instruction"], fields.get("input") or "")
            answer = {"role": "assistant", "content": fields["output"]}
            [parts] = template.examples([Chat([*asked.messages, answer])])
            if isinstance(parts, BadRecord):
                raise ValueError(f"{record.location}: {parts}")
            ids, answered = parts[0], [token for part in parts[1:] for token in part]
            bos = encode_prompts(tokenizer, [""])[0]
            yield ids[len(bos) :] if ids[: len(bos)] == bos else ids, answered
        else:
            raise ValueError(
                f"{record.location}: needs the field 'text', or 'instruction' and 'output'"
            )


def measured_weights(model: DyLoRA_MoE, text: Sequences) -> Tensor:
    """The mean gates of every site over the tokens of a text, [N, E] in float64."""
    total_NE = torch.zeros(len(model.site_names), len(model.experts), dtype=torch.float64)
    with evaluation_mode(model):
        for ids in text.ids:
            gates = model.get_routing_weights(ids.to(model.device))[0]  # [S, N, E]
            total_NE += gates.cpu().double().sum(0)  # float64 on the CPU: MPS has none
    return total_NE / text.tokens


def compare(model: DyLoRA_MoE, weights_NE: Tensor, text: Sequences) -> Comparison:
    """The loss of constant weights [N, E] against the routers on a text."""
    device = model.device
    # Cast before the move: a device may have no float64 (MPS).
    weights = weights_NE.float().to(device)
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    with evaluation_mode(model):
        for ids, first in zip(text.ids, text.firsts, strict=True):
            ids = ids.to(device)
            constant = weights.expand(1, ids.shape[1], -1, -1)
            routed_SV = model(ids).logits[0, first - 1 : -1]
            static_SV = model(ids, routing_weights=constant).logits[0, first - 1 : -1]
            for begin in range(0, len(routed_SV), _POSITIONS):
                here = slice(begin, begin + _POSITIONS)
                log_p = at_least_float32(routed_SV[here]).log_softmax(-1)
                log_q = at_least_float32(static_SV[here]).log_softmax(-1)
                kl = (log_p.exp() * (log_p - log_q)).sum()
                targets = ids[0, first:][here, None]
                losses = [-log.gather(1, targets).sum() for log in (log_p, log_q)]
                sums += torch.stack([kl, *losses]).cpu().double()
            tokens += len(routed_SV)
    kl, routed, static = (sums / tokens).tolist()
    return Comparison(tokens, kl, routed, static)

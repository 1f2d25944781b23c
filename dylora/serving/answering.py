"""Answers to several prompts in one batch, each with its own settings, handed on as they come.

The passes are those of transformers' generate; which token a row takes is decided here, so that
rows of a batch may differ in temperature, seed, length and end.

Shape letters: B batch, S sequence, V vocabulary.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dylora.base_models import max_positions
from dylora.data.prompts import pad_token_id
from dylora.evaluation.loading import decode_after
from dylora.evaluation.passk.generation import default_generation_config, pad_left
from dylora.fields import check_fields, option
from dylora.kernels.common import evaluation_mode
from dylora.model import DyLoRA_MoE

_CONTEXT = 8  # tokens of a prompt before an answer, so that this is decoded as its continuation
_HALF = "\ufffd"  # what a tokenizer makes of the first bytes of a letter


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How one answer is drawn."""

    max_new_tokens: int = option(256, least=0)
    temperature: float = option(0.0, least=0)  # 0: the likeliest token each time
    top_p: float = option(1.0, above=0, most=1)  # of the fewest likeliest tokens that sum to it
    seed: int | None = None
    stops: tuple[str, ...] = ()  # texts that end an answer and are no part of it
    logprobs: int | None = option(None, least=0)  # likeliest tokens to tell beside each

    def __post_init__(self) -> None:
        check_fields(self)


class TokenScore(NamedTuple):
    """A token with its log-probability under the model, and the likeliest ones in its place."""

    token: int
    logprob: float | None  # None: the first of a text
    likeliest: dict[int, float]


@dataclass(eq=False)
class Row:
    """A prompt, and the answer as far as it has come."""

    prompt: list[int]
    sampling: Sampling = field(default_factory=Sampling)
    on_text: Callable[[str], None] = lambda piece: None  # is given each piece of the answer
    on_end: Callable[["Row"], None] = lambda row: None  # once, when it has its `finish`
    seconds: float | None = None  # that an answer may take; then it ends as at its length
    scores_prompt: bool = False
    tokens: list[int] = field(default_factory=list)  # of the answer, what ends it included
    text: str = ""  # that was given on
    scores: list[TokenScore] = field(default_factory=list)
    prompt_scores: list[TokenScore] = field(default_factory=list)
    finish: str | None = None  # stop, length, or cancelled
    error: Exception | None = None
    cancelled: bool = False  # set it, from any thread, to end the answer at its next token
    began: float = 0.0

    def end(self, finish: str) -> None:
        """Tell it at once: the rest of its batch may take much longer."""
        self.finish = finish
        self.on_end(self)


@torch.no_grad()
def answer(
    model: DyLoRA_MoE,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    ends: Collection[int],
) -> None:
    """Fill the rows, in one batch that is padded in front.

    ends: tokens that end an answer. Raises ValueError for a prompt that leaves the base no position
    for an answer: see `room_after`.
    """
    room = {id(row): room_after(model, row) for row in rows}
    with evaluation_mode(model), default_generation_config(model.base):
        for row in rows:
            row.began = time.monotonic()
            if row.scores_prompt:
                row.prompt_scores = _score(model, row)
            if room[id(row)] == 0:
                row.end("length")
        open_rows = [row for row in rows if row.finish is None]
        if not open_rows:
            return
        pad = pad_token_id(tokenizer)
        ids, mask = pad_left([row.prompt for row in open_rows], pad)
        chooser: Any = _Chooser(model, tokenizer, open_rows, ends, room, pad)
        model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(room[id(row)] for row in open_rows),
            do_sample=False,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=StoppingCriteriaList([chooser.done]),
        )


def room_after(model: DyLoRA_MoE, row: Row) -> int:
    """The tokens that an answer may have. Raises ValueError where there is no place for any."""
    if not row.prompt:
        raise ValueError("the prompt is empty")
    limit, wanted = max_positions(model.base.config), row.sampling.max_new_tokens
    if limit is None:
        return wanted
    if len(row.prompt) + min(wanted, 1) > limit:
        raise ValueError(f"the prompt has {len(row.prompt)} tokens, and the base takes {limit}")
    return min(wanted, limit - len(row.prompt))


class _Chooser:
    """Takes the next token of each row, and leaves generate no other."""

    def __init__(
        self,
        model: DyLoRA_MoE,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Row],
        ends: Collection[int],
        room: dict[int, int],
        pad: int,
    ) -> None:
        self.tokenizer, self.rows, self.ends, self.room, self.pad = tokenizer, rows, ends, room, pad
        self.silent = set(tokenizer.all_special_ids)
        self.generators = [torch.Generator(model.device) for _ in rows]
        for row, generator in zip(rows, self.generators, strict=True):
            seed = row.sampling.seed
            generator.seed() if seed is None else generator.manual_seed(seed % 2**63)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        for place, row in enumerate(self.rows):
            token = self.pad
            if row.finish is None:
                token = _draw(scores[place], row.sampling, self.generators[place])
                if row.sampling.logprobs is not None:
                    row.scores.append(_token_score(scores[place], token, row.sampling.logprobs))
                self._take(row, token)
            forced[place, token] = 0.0
        return forced

    def done(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        flags = [row.finish is not None for row in self.rows]
        return torch.tensor(flags, device=input_ids.device)

    def _take(self, row: Row, token: int) -> None:
        row.tokens.append(token)
        late = row.seconds is not None and time.monotonic() - row.began > row.seconds
        finish = None
        if token in self.ends:
            finish = "stop"
        elif row.cancelled:
            finish = "cancelled"
        elif late or len(row.tokens) >= self.room[id(row)]:
            finish = "length"
        spoken = [one for one in row.tokens if one not in self.silent and one not in self.ends]
        text = decode_after(self.tokenizer, row.prompt[-_CONTEXT:], spoken)
        found = [place for stop in row.sampling.stops if (place := text.find(stop)) >= 0]
        if found:
            text = text[: min(found)]
            finish = "stop"
        sure = len(text) if finish else _sure(text, row.sampling.stops)
        if sure > len(row.text):
            piece, row.text = text[len(row.text) : sure], text[:sure]
            row.on_text(piece)
        if finish is not None:
            row.end(finish)


def _draw(scores_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    if sampling.temperature == 0:
        return int(scores_V.argmax())
    # Beyond these bounds a draw is the same, but float32 makes 0 / 0 or inf / inf of it.
    temperature = min(max(sampling.temperature, 1e-30), 1e30)
    probabilities_V = ((scores_V - scores_V.max()) / temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities_V.sort(descending=True)
        ordered[1:][(ordered.cumsum(-1) - ordered)[1:] >= sampling.top_p] = 0.0  # the first stays
        probabilities_V = torch.zeros_like(probabilities_V).scatter(0, order, ordered)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def _sure(text: str, stops: Sequence[str]) -> int:
    """Characters that stay whatever comes: neither half a letter nor the beginning of a stop."""
    text = text.rstrip(_HALF)
    held = 0
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), held, -1):
            if text.endswith(stop[:size]):
                held = size
                break
    return len(text) - held


def _token_score(scores_V: Tensor, token: int, count: int) -> TokenScore:
    logprobs = scores_V.float().log_softmax(-1)
    values, tokens = logprobs.topk(min(count, len(logprobs)))
    likeliest = dict(zip(tokens.tolist(), values.tolist(), strict=True))
    return TokenScore(token, float(logprobs[token]), likeliest)


def _score(model: DyLoRA_MoE, row: Row) -> list[TokenScore]:
    """Each token of a prompt, given those before it."""
    count = row.sampling.logprobs or 0
    logits_SV = model(torch.tensor([row.prompt], device=model.device)).logits[0]
    rest = zip(logits_SV, row.prompt[1:], strict=False)
    first = TokenScore(row.prompt[0], None, {})
    return [first, *(_token_score(scores_V, token, count) for scores_V, token in rest)]

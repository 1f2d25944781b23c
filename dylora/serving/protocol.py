"""What OpenAI's completions and chat completions ask, and how they are answered, in JSON.

A parameter acts, or is refused by name, or means nothing here at the value that it has.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from dylora.fields import MAX_INT, FieldError, nearest, shown
from dylora.serving.answering import Row, Sampling, TokenScore
from dylora.serving.engine import Speaker

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_LOGPROBS = 8, 64, 4, 20
_COMMON = {"model", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream",
           "stream_options"}  # fmt: skip
_CHAT = _COMMON | {"messages", "max_completion_tokens"}
_TEXT = _COMMON | {"prompt", "echo", "logprobs"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # at these values a parameter asks for nothing
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,),
    "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,), "tools": ([],),
    "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
_NOTES = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}


class Refused(ValueError):
    """A request that cannot be answered as it is."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        code = {404: "model_not_found", 429: "rate_limit_exceeded"}.get(self.status)
        error = {"message": str(self), "type": kind, "param": self.param, "code": code}
        return {"error": error}


class Limits(NamedTuple):
    """What a request may ask for."""

    max_new_tokens: int
    seconds: float


@dataclass(frozen=True)
class Request:
    """One request, its rows not yet answered."""

    rows: list[Row]
    count: int  # of answers to each prompt; their rows follow each other
    chat: bool
    stream: bool
    with_usage: bool  # at the end of a stream
    echo: bool
    prompts: list[str]  # as texts, for echo
    model: str
    id: str
    created: int


def read_request(body: Any, speaker: Speaker, name: str, limits: Limits, *, chat: bool) -> Request:
    """The rows of a request. Raises Refused, naming the parameter."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    body = {key: value for key, value in body.items() if value is not None}
    known = _CHAT if chat else _TEXT
    for key, value in list(body.items()):
        if key in _NOTES or _is_neutral(key, value):
            del body[key]
        elif key not in known:
            near = nearest(key, sorted(known))
            raise Refused(f"the parameter {shown(key)} is not supported here{near}", str(key))
    if body.get("model", name) != name:
        raise Refused(f"the model {shown(body['model'])} is not here, only {name}", "model", 404)
    echo = _of(body, "echo", bool, False)
    prompts = [_conversation(body, speaker)] if chat else _prompts(body, speaker)
    sampling = _sampling(body, limits, echo=echo)
    count = _of(body, "n", int, 1)
    if not 1 <= count <= MOST_CHOICES:
        raise Refused(f"n is {shown(count)}, but must be from 1 to {MOST_CHOICES}", "n")
    options = _of(body, "stream_options", dict, {})
    stream = _of(body, "stream", bool, False)
    if stream and sampling.logprobs is not None:
        raise Refused("logprobs are not streamed: leave out stream", "logprobs")
    rows = [
        Row(
            ids,
            Sampling(**{**vars(sampling), "seed": _seed(sampling.seed, number)}),
            seconds=limits.seconds,
            scores_prompt=echo and sampling.logprobs is not None,
        )
        for ids in prompts
        for number in range(count)
    ]
    texts = [speaker.tokenizer.decode(row.prompt, skip_special_tokens=True) for row in rows]
    kind = "chatcmpl" if chat else "cmpl"
    return Request(
        rows=rows,
        count=count,
        chat=chat,
        stream=stream,
        with_usage=bool(options.get("include_usage")),
        echo=echo,
        prompts=[str(text) for text in texts],
        model=name,
        id=f"{kind}-{uuid.uuid4().hex}",
        created=int(time.time()),
    )


def _is_neutral(key: str, value: Any) -> bool:
    """Of its kind, too: 0 log-probabilities are some, and False is none."""
    given = isinstance(value, bool)
    return any(given == isinstance(one, bool) and value == one for one in _NEUTRAL.get(key, ()))


def _sampling(body: Mapping[str, Any], limits: Limits, *, echo: bool) -> Sampling:
    stops = body.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    plain = isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    if not plain or len(stops) > MOST_STOPS:
        raise Refused(f"stop must be a text, or up to {MOST_STOPS} of them", "stop")
    wanted = body.get("max_completion_tokens", body.get("max_tokens", limits.max_new_tokens))
    most, least = limits.max_new_tokens, 0 if echo else 1
    if type(wanted) is not int or not least <= wanted <= most:
        raise Refused(
            f"max_tokens is {shown(wanted)}, but must be from {least} to {most}", "max_tokens"
        )
    logprobs = body.get("logprobs")
    if logprobs is not None and (type(logprobs) is not int or not 0 <= logprobs <= MOST_LOGPROBS):
        rule = f"a whole number from 0 to {MOST_LOGPROBS}"
        raise Refused(f"logprobs is {shown(logprobs)}, but must be {rule}", "logprobs")
    try:
        return Sampling(
            max_new_tokens=wanted,
            temperature=_of(body, "temperature", float, 1.0),
            top_p=_of(body, "top_p", float, 1.0),
            seed=_of(body, "seed", int, None),
            stops=tuple(stops),
            logprobs=logprobs,
        )
    except FieldError as error:
        raise Refused(f"{error}", error.key) from None


def _seed(seed: int | None, number: int) -> int | None:
    return None if seed is None else (seed + number) % 2**63


def _conversation(body: Mapping[str, Any], speaker: Speaker) -> list[int]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise Refused("messages must be a list of objects with role and content", "messages")
    try:
        return speaker.conversation([_plain_message(message) for message in messages])
    except ValueError as error:
        raise Refused(str(error), "messages") from None


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """With its content as one text, where it comes in parts of text; developer is system."""
    content, role = message.get("content"), message.get("role")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise Refused("only parts of text are understood in a message", "messages")
        content = "".join(texts)  # type: ignore[arg-type]
    return {"role": "system" if role == "developer" else role, "content": content}


def _prompts(body: Mapping[str, Any], speaker: Speaker) -> list[list[int]]:
    """A text, token ids, or a list of either."""
    given = body.get("prompt")
    many = given if isinstance(given, list) and not _are_ids(given) else [given]
    if not 1 <= len(many) <= MOST_PROMPTS:
        raise Refused(f"a request may have 1 to {MOST_PROMPTS} prompts", "prompt")
    words = speaker.words
    prompts = []
    for one in many:
        if isinstance(one, str):
            prompts.append(speaker.text(one))
        elif isinstance(one, list) and _are_ids(one) and 0 <= min(one) <= max(one) < words:
            prompts.append(one)
        else:
            rule = f"a text or a list of token ids below {words}, or a list of these"
            raise Refused(f"prompt must be {rule}", "prompt")
    return prompts


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _of(body: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = body.get(key, default)
    if kind is float and type(value) is int and abs(value) <= MAX_INT:
        value = float(value)
    if value is not default and type(value) is not kind:
        raise Refused(f"{key} is {shown(value)}, but must be of the type {kind.__name__}", key)
    return value


# Answers


def whole_answer(request: Request, speaker: Speaker) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    choices = []
    for index, row in enumerate(request.rows):
        if request.chat:
            said: dict[str, Any] = {"message": {"role": "assistant", "content": row.text}}
        else:
            said = {"text": (request.prompts[index] if request.echo else "") + row.text}
        logprobs = None
        if row.sampling.logprobs is not None:
            logprobs = _logprobs([*row.prompt_scores, *row.scores], speaker)
        choices.append({"index": index, **said, "logprobs": logprobs, "finish_reason": row.finish})
    kind = "chat.completion" if request.chat else "text_completion"
    return {**_head(request, kind), "choices": choices, "usage": usage(request)}


def first_pieces(request: Request) -> Iterator[dict[str, Any]]:
    """What a stream begins with: the role of each answer, or the prompts where they are echoed."""
    for index, prompt in enumerate(request.prompts):
        if request.chat:
            yield _piece(request, index, {"delta": {"role": "assistant", "content": ""}})
        elif request.echo:
            yield piece_of(request, index, prompt)


def piece_of(request: Request, index: int, text: str, finish: str | None = None) -> dict[str, Any]:
    """The body of one piece of a stream."""
    if request.chat:
        said: dict[str, Any] = {"delta": {"content": text} if text else {}}
    else:
        said = {"text": text}
    return _piece(request, index, said, finish)


def _piece(
    request: Request, index: int, said: dict[str, Any], finish: str | None = None
) -> dict[str, Any]:
    choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
    kind = "chat.completion.chunk" if request.chat else "text_completion"
    return {**_head(request, kind), "choices": [choice]}


def last_piece(request: Request) -> dict[str, Any]:
    """What a stream was of, where that was asked for."""
    kind = "chat.completion.chunk" if request.chat else "text_completion"
    return {**_head(request, kind), "choices": [], "usage": usage(request)}


def usage(request: Request) -> dict[str, int]:
    """Tokens, those of a prompt counted once."""
    asked = sum(len(row.prompt) for row in request.rows[:: request.count])
    said = sum(len(row.tokens) for row in request.rows)
    return {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}


def _head(request: Request, kind: str) -> dict[str, Any]:
    return {"id": request.id, "object": kind, "created": request.created, "model": request.model}


def _logprobs(scores: Sequence[TokenScore], speaker: Speaker) -> dict[str, Any]:
    """As completions have them: lists, a token each."""

    def name(token: int) -> str:
        return str(speaker.tokenizer.decode([token]))

    offsets, place = [], 0
    for score in scores:
        offsets.append(place)
        place += len(name(score.token))
    return {
        "tokens": [name(score.token) for score in scores],
        "token_logprobs": [score.logprob for score in scores],
        "top_logprobs": [
            {name(token): value for token, value in score.likeliest.items()}
            if score.logprob is not None
            else None
            for score in scores
        ],
        "text_offset": offsets,
    }

"""An HTTP server with OpenAI's completions and chat completions, on starlette and uvicorn."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from dylora.serving.answering import Row
from dylora.serving.engine import Busy, Engine
from dylora.serving.protocol import (
    Limits,
    Refused,
    Request,
    first_pieces,
    last_piece,
    piece_of,
    read_request,
    whole_answer,
)

MAX_BODY = 4 << 20  # bytes of a request
_Event = tuple[int, str | Row]  # of a row by its index: a piece of its text, or itself at its end


def build_app(engine: Engine, name: str, limits: Limits) -> Starlette:
    """The application for one model, which it calls `name`."""

    async def complete(http: HttpRequest) -> Response:
        chat = http.url.path.endswith("/chat/completions")
        try:
            body = await _read_body(http)
            request = await asyncio.to_thread(
                read_request, body, engine.speaker, name, limits, chat=chat
            )
            events = _submit(engine, request)
        except Refused as refusal:
            return JSONResponse(refusal.body(), refusal.status)
        if request.stream:
            return _Stream(request, events)
        return await _whole(http, engine, request, events)

    async def models(http: HttpRequest) -> Response:
        about = {"id": name, "object": "model", "created": 0, "owned_by": "dylora"}
        if "model" not in http.path_params:
            return JSONResponse({"object": "list", "data": [about]})
        if http.path_params["model"] != name:
            refusal = Refused(f"there is no such model, only {name}", "model", 404)
            return JSONResponse(refusal.body(), 404)
        return JSONResponse(about)

    async def not_found(http: HttpRequest, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        return JSONResponse(Refused(f"{http.method} {http.url.path}: {error}", None, status).body(),
                            status)  # fmt: skip

    async def failed(http: HttpRequest, error: Exception) -> Response:
        return JSONResponse(Refused(_told(error), status=500).body(), 500)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close)

    routes = [
        Route("/v1/chat/completions", complete, methods=["POST"]),
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{model:path}", models),
    ]
    handlers: Any = {404: not_found, 405: not_found, 500: failed}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


async def _read_body(http: HttpRequest) -> Any:
    """The JSON of a request. Raises Refused for what is none, and for too much of it."""
    parts, size = [], 0
    try:
        async for part in http.stream():
            size += len(part)
            if size > MAX_BODY:
                raise Refused(f"a request may have {MAX_BODY:,} bytes", status=413)
            parts.append(part)
    except ClientDisconnect:
        raise Refused("the request broke off") from None
    try:
        body = json.loads(b"".join(parts))
        json.dumps(body, ensure_ascii=False).encode()
        return body
    except UnicodeEncodeError:
        raise Refused("the body has half a character: a surrogate without its other") from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from None


def _submit(engine: Engine, request: Request) -> "asyncio.Queue[_Event]":
    """Put all rows in the queue, or none. Raises Refused for prompts too long, for more rows than
    there is ever room for, and when too much waits."""
    if (wanted := len(request.rows)) > engine.most:
        rule = f"at most {engine.most} have room here at once"
        raise Refused(f"the request asks for {wanted} answers, but {rule}: ask for fewer", "n")
    events: asyncio.Queue[_Event] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def tell(event: _Event) -> None:
        with suppress(RuntimeError):  # the loop has ended, and whoever asked is gone
            loop.call_soon_threadsafe(events.put_nowait, event)

    try:
        for index, row in enumerate(request.rows):
            if request.stream:
                row.on_text = lambda piece, index=index: tell((index, piece))
            row.on_end = lambda row, index=index: tell((index, row))
            engine.submit(row)
    except (ValueError, Busy) as error:
        for row in request.rows:
            row.cancelled = True
        status = 429 if isinstance(error, Busy) else 400
        raise Refused(str(error), None if status == 429 else "prompt", status) from None
    return events


async def _whole(
    http: HttpRequest, engine: Engine, request: Request, events: "asyncio.Queue[_Event]"
) -> Response:
    """Wait for all rows; if whoever asked goes away, they end."""
    left = len(request.rows)
    while left:
        try:
            _, what = await asyncio.wait_for(events.get(), timeout=0.5)
        except TimeoutError:
            if await http.is_disconnected():
                for row in request.rows:
                    row.cancelled = True
                return Response(status_code=499)
            continue
        left -= isinstance(what, Row)
    failed = next((row.error for row in request.rows if row.error is not None), None)
    if failed is not None:
        return JSONResponse(Refused(_told(failed), status=500).body(), 500)
    return JSONResponse(await asyncio.to_thread(whole_answer, request, engine.speaker))


class _Stream(StreamingResponse):
    """Server-sent events. Its rows end with it, not with its generator: where whoever asked is gone
    at once, that is never begun, and no `finally` of it would run."""

    def __init__(self, request: Request, events: "asyncio.Queue[_Event]") -> None:
        super().__init__(_pieces(request, events), media_type="text/event-stream")
        self._rows = request.rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for row in self._rows:
                row.cancelled = True


async def _pieces(request: Request, events: "asyncio.Queue[_Event]") -> AsyncIterator[str]:
    """Each piece as it comes, and [DONE]."""
    for piece in first_pieces(request):
        yield _event(piece)
    left = len(request.rows)
    while left:
        index, what = await events.get()
        if isinstance(what, str):
            yield _event(piece_of(request, index, what))
            continue
        left -= 1
        if what.error is not None:
            yield _event(Refused(_told(what.error), status=500).body())
            return
        yield _event(piece_of(request, index, "", what.finish))
    if request.with_usage:
        yield _event(last_piece(request))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]

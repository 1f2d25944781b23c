"""What a request asks is read as OpenAI means it, and refused where it cannot be."""

import asyncio
import copy
import json
from contextlib import suppress
from types import SimpleNamespace

import pytest
from starlette.requests import ClientDisconnect
from starlette.testclient import TestClient

from dylora.serving.engine import Engine, Speaker
from dylora.serving.protocol import (
    Limits,
    Refused,
    Request,
    first_pieces,
    read_request,
    usage,
    whole_answer,
)
from dylora.serving.server import build_app

NAME, LIMITS = "mine", Limits(40, 60.0)


def read(speaker: Speaker, *, chat: bool = False, **body) -> Request:
    given = {"messages": [{"role": "user", "content": "Add 1."}]} if chat else {"prompt": "Add"}
    return read_request(given | body, speaker, NAME, LIMITS, chat=chat)


@pytest.fixture
def client(speaker):
    """Of a server with one row a batch, where three may wait."""
    engine = Engine(speaker, batch_size=1, waiting=3)
    app = build_app(engine, NAME, LIMITS)
    with TestClient(app, raise_server_exceptions=False) as found:
        yield found


def test_no_likeliest_tokens_beside_those_taken_are_still_log_probabilities(speaker):
    request = read(speaker, logprobs=0, max_tokens=2)
    speaker.answer(request.rows)
    (choice,) = whole_answer(request, speaker)["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == len(request.rows[0].tokens)
    assert choice["logprobs"]["top_logprobs"] == [{}] * len(request.rows[0].tokens)


@pytest.mark.parametrize("body", [{"logprobs": False}, {"frequency_penalty": 0.0}, {"best_of": 1}])
def test_a_parameter_that_asks_for_nothing_is_left_out(speaker, body):
    assert read(speaker, **body).rows[0].sampling.logprobs is None


@pytest.mark.parametrize("body", [{"best_of": True}, {"presence_penalty": False}])
def test_a_truth_is_no_number(speaker, body):
    with pytest.raises(Refused, match="is not supported here"):
        read(speaker, **body)


def test_a_prompt_is_counted_once_however_many_answers_it_has(speaker):
    request = read(speaker, prompt=["Add", "Say."], n=3, max_tokens=2)
    speaker.answer(request.rows)
    counted = usage(request)
    assert counted["prompt_tokens"] == len(speaker.text("Add")) + len(speaker.text("Say."))
    assert counted["completion_tokens"] == sum(len(row.tokens) for row in request.rows)
    assert counted["total_tokens"] == counted["prompt_tokens"] + counted["completion_tokens"]


def test_a_streamed_chat_begins_with_its_role(client):
    body = {"messages": [{"role": "user", "content": "Add 1."}], "n": 2, "max_tokens": 3}
    text = client.post("/v1/chat/completions", json={**body, "stream": True}).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    choices = [json.loads(line)["choices"][0] for line in lines[:-1]]
    for index in range(2):
        own = [choice["delta"] for choice in choices if choice["index"] == index]
        assert own[0] == {"role": "assistant", "content": ""}
        assert not any("role" in delta for delta in own[1:])


def test_a_stream_of_completions_begins_with_what_is_echoed(speaker):
    request = read(speaker, prompt=["Add", "Say."], echo=True, stream=True)
    told = [piece["choices"][0]["text"] for piece in first_pieces(request)]
    assert told == ["Add", "Say."]
    assert list(first_pieces(read(speaker, stream=True))) == []


@pytest.mark.parametrize(
    "body", [{"temperature": 10**400}, {"top_p": -(10**400)}, {"seed": 10**400}, {"n": 10**400}]
)
def test_a_number_beyond_all_bounds_is_refused(speaker, body):
    with pytest.raises(Refused, match=next(iter(body))):
        read(speaker, **body)


def test_draws_of_the_highest_seed_go_on_from_the_lowest(speaker):
    seeds = [row.sampling.seed for row in read(speaker, seed=2**63 - 1, n=2).rows]
    assert seeds == [2**63 - 1, 0]


def test_a_token_that_the_base_has_no_embedding_for_is_refused(speaker, tokenizer):
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens(["<new>"])
    with pytest.raises(Refused, match=f"token ids below {len(tokenizer)}"):
        read(Speaker(speaker.model, longer), prompt=[len(tokenizer)])


@pytest.mark.parametrize("key", ["prompt", "model"])
def test_half_a_character_is_refused(client, key):
    body = {"prompt": "x", "model": NAME} | {key: "\ud800"}
    found = client.post("/v1/completions", content=json.dumps(body))
    assert found.status_code == 400
    assert "half a character" in found.json()["error"]["message"]


def test_more_answers_than_may_ever_wait_are_not_to_be_asked_for_again(client):
    found = client.post("/v1/completions", json={"prompt": "x", "n": 5})
    assert (found.status_code, found.json()["error"]["param"]) == (400, "n")
    assert "5 answers" in found.json()["error"]["message"]


def test_a_fault_of_ours_is_told_in_openais_form(client, speaker, monkeypatch):
    monkeypatch.setattr(speaker, "text", lambda text: 1 / 0)
    found = client.post("/v1/completions", json={"prompt": "x"})
    assert found.status_code == 500
    assert found.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("version", ["2.3", "2.4"])  # of ASGI; they tell it in different ways
def test_nothing_is_computed_for_who_is_gone_before_a_stream_begins(speaker, version):
    submitted = []
    engine = SimpleNamespace(speaker=speaker, most=8, submit=submitted.append)  # never answers
    body = json.dumps({"prompt": "Add", "n": 2, "stream": True}).encode()
    told = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        return next(told, {"type": "http.disconnect"})

    async def send(message):
        if version == "2.4":
            raise OSError("gone")
        await asyncio.sleep(0)  # here it is cancelled

    scope = {"type": "http", "asgi": {"spec_version": version}, "method": "POST", "headers": []}
    scope |= {"path": "/v1/completions", "query_string": b"", "server": ("here", 80)}
    app = build_app(engine, NAME, LIMITS)
    with suppress(ClientDisconnect):
        asyncio.run(app(scope, receive, send))
    assert [row.cancelled for row in submitted] == [True, True]

"""The server, asked by OpenAI's own client and by lm-evaluation-harness."""

import asyncio
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
import uvicorn

from dylora.cli.main import main
from dylora.serving.answering import Row, Sampling
from dylora.serving.engine import Engine
from dylora.serving.protocol import Limits
from dylora.serving.server import MAX_BODY, build_app

NAME, LIMITS = "mine", Limits(40, 60.0)


class Served:
    """A server in a thread of its own, and a client of it."""

    def __init__(self, speaker, *, limits: Limits = LIMITS, batch_size=4, waiting=64):
        self.engine = Engine(speaker, batch_size=batch_size, waiting=waiting)
        app = build_app(self.engine, NAME, limits)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        serve = self._server.serve(sockets=[self._socket])
        self._thread = threading.Thread(target=lambda: asyncio.run(serve))
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        self.client = openai.OpenAI(base_url=self.address, api_key="none", max_retries=0)

    def close(self) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


@pytest.fixture(scope="module")
def served(speaker) -> Iterator[Served]:
    found = Served(speaker)
    yield found
    found.close()


def alone(speaker, ids: list[int], **sampling) -> Row:
    row = Row(ids, Sampling(**sampling))
    speaker.answer([row])
    return row


def test_a_chat_is_answered_as_the_mixture_answers_it(served, speaker):
    messages = [{"role": "user", "content": "Add 3 and 4."}]
    found = served.client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=9, temperature=0
    )
    expected = alone(speaker, speaker.conversation(messages), max_new_tokens=9)
    (choice,) = found.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish)
    assert choice.message.role == "assistant"
    assert found.usage.prompt_tokens == len(expected.prompt)
    assert found.usage.completion_tokens == len(expected.tokens)


def test_a_stream_adds_up_to_the_whole_answer(served):
    asked = {"model": NAME, "prompt": ["Add 1", "Say"], "n": 2}
    asked |= {"max_tokens": 9, "temperature": 0.7, "seed": 5}
    whole = served.client.completions.create(**asked)
    texts, ends = {}, {}
    stream = served.client.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    for piece in stream:
        for choice in piece.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            ends[choice.index] = choice.finish_reason or ends.get(choice.index)
        usage = piece.usage
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    assert len({choice.text for choice in whole.choices[:2]}) == 2  # n draws


def test_a_streamed_chat_comes_in_pieces(served, speaker):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Add 3 and 4."}]}]
    stream = served.client.chat.completions.create(
        model=NAME, messages=messages, max_completion_tokens=9, temperature=0, stream=True
    )
    pieces = [piece.choices[0].delta.content or "" for piece in stream]
    plain = [{"role": "user", "content": "Add 3 and 4."}]
    assert "".join(pieces) == alone(speaker, speaker.conversation(plain), max_new_tokens=9).text
    assert len(pieces) > 2


def test_the_model_is_listed(served):
    assert [model.id for model in served.client.models.list()] == [NAME]
    assert served.client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("other")


# Many at once


def requests(speaker) -> list[tuple[str, dict, str]]:
    """Kind, request and right text of twenty different requests."""
    made = []
    for number in range(20):
        text = f"Add {number} and {number + 1}." + " Please." * (number % 4)
        sampling = {"max_tokens": 3 + number % 7}
        if number % 3:
            sampling |= {"temperature": 0.9, "seed": number, "top_p": 0.8}
        else:
            sampling |= {"temperature": 0.0}
        if number % 2:
            asked = {"messages": [{"role": "user", "content": text}], **sampling}
            ids = speaker.conversation(asked["messages"])
        else:
            asked, ids = {"prompt": text, **sampling}, speaker.text(text)
        own = {k: v for k, v in sampling.items() if k != "max_tokens"}
        right = alone(speaker, ids, max_new_tokens=sampling["max_tokens"], **own).text
        made.append(("chat" if number % 2 else "text", asked, right))
    return made


def ask(client: openai.OpenAI, kind: str, asked: dict, *, stream: bool) -> str:
    create = client.chat.completions.create if kind == "chat" else client.completions.create
    found = create(model=NAME, stream=stream, **asked)
    if not stream:
        choice = found.choices[0]
        return choice.message.content if kind == "chat" else choice.text
    told = (piece.choices[0] for piece in found if piece.choices)
    return "".join((one.delta.content if kind == "chat" else one.text) or "" for one in told)


def test_two_hundred_mixed_requests_eight_at_once_are_all_answered_and_right(served, speaker):
    made = requests(speaker) * 10
    random.Random(0).shuffle(made)

    def one(number: int) -> tuple[str, str]:
        kind, asked, right = made[number]
        if number % 10 == 9:  # broken
            try:
                ask(served.client, kind, {**asked, "max_tokens": -1}, stream=number % 4 == 1)
            except openai.BadRequestError:
                return "refused", "refused"
            return "answered", "refused"
        return ask(served.client, kind, asked, stream=number % 4 < 2), right

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(200)))
    assert len(found) == 200
    assert [pair for pair in found if pair[0] != pair[1]] == []


# What is refused


CHAT = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("completions", b"{", 400, "the body is no JSON"),
        ("completions", b"[" * 100_000, 400, "the body is no JSON"),
        ("completions", b"[]", 400, "the body must be a JSON object"),
        ("completions", {}, 400, "prompt must be"),
        ("completions", {"prompt": []}, 400, "1 to 64 prompts"),
        ("completions", {"prompt": ["x"] * 65}, 400, "1 to 64 prompts"),
        ("completions", {"prompt": [[1, -1]]}, 400, "token ids below"),
        ("completions", {"prompt": [10**9]}, 400, "token ids below"),
        ("completions", {"prompt": "x", "max_tokens": 41}, 400, "from 1 to 40"),
        ("completions", {"prompt": "x", "max_tokens": True}, 400, "from 1 to 40"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature is -1"),
        ("completions", b'{"prompt": "x", "temperature": NaN}', 400, "temperature is nan"),
        ("completions", {"prompt": "x", "temperature": "hot"}, 400, "of the type float"),
        ("completions", {"prompt": "x", "top_p": 0}, 400, "top_p is 0"),
        ("completions", {"prompt": "x", "n": 9}, 400, "n is 9"),
        ("completions", {"prompt": "x", "stop": ["a"] * 5}, 400, "stop must be"),
        ("completions", {"prompt": "x", "stop": ""}, 400, "stop must be"),
        ("completions", {"prompt": "x", "seed": 1.5}, 400, "seed is 1.5"),
        ("completions", {"prompt": "x", "logprobs": 99}, 400, "logprobs is 99"),
        ("completions", {"prompt": "x", "logit_bias": {"5": 1}}, 400, "'logit_bias' is not"),
        ("completions", {"prompt": "x", "temprature": 1}, 400, "did you mean 'temperature'"),
        ("completions", {"prompt": "word " * 400}, 400, "and the base takes 128"),
        ("completions", {"prompt": "x", "model": "gpt"}, 404, "only mine"),
        ("chat/completions", {}, 400, "messages must be"),
        ("chat/completions", {"messages": []}, 400, "role user"),
        ("chat/completions", {"messages": [{"role": "tool", "content": "x"}]}, 400, "roles"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         400, "only parts of text"),
        ("chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "'tools' is not"),
        ("chat/completions", {**CHAT, "response_format": {"type": "json_object"}}, 400,
         "'response_format' is not"),
        ("nothing", {}, 404, "nothing"),
    ],
)  # fmt: skip
def test_a_broken_request_is_refused_in_openais_form(served, path, body, status, told):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = httpx.post(f"{served.address}/{path}", content=data)
    assert found.status_code == status, found.text
    assert told in found.json()["error"]["message"]


def test_a_request_that_is_too_large_is_refused_before_it_is_read(served):
    data = json.dumps({"prompt": "x" * MAX_BODY}).encode()
    assert httpx.post(f"{served.address}/completions", content=data).status_code == 413


def test_parameters_that_ask_for_nothing_are_taken(served):
    body = {"prompt": "x", "max_tokens": 1, "frequency_penalty": 0, "user": "u", "logit_bias": None}
    assert httpx.post(f"{served.address}/completions", json=body).status_code == 200


def test_who_goes_away_ends_the_answer_and_the_next_is_served(speaker):
    seen: list[Row] = []

    class Slow(type(speaker)):
        def answer(self, rows):
            seen.extend(rows)
            for row in rows:
                told = row.on_text
                row.on_text = lambda piece, told=told: (time.sleep(0.05), told(piece))
            super().answer(rows)

    slow = Slow(speaker.model, speaker.tokenizer)
    served = Served(slow, limits=Limits(100, 60.0))
    try:
        asked = {"model": NAME, "prompt": "Add", "temperature": 1.0, "seed": 1, "max_tokens": 100}
        stream = served.client.completions.create(**asked, stream=True)
        next(iter(stream))
        stream.close()
        with pytest.raises(openai.APITimeoutError):
            served.client.with_options(timeout=0.3).completions.create(**asked)
        served.client.completions.create(model=NAME, prompt="Say", max_tokens=1)
        assert [row.finish for row in seen[:2]] == ["cancelled"] * 2
    finally:
        served.close()


def test_more_than_may_wait_is_told_to_come_later(speaker):
    gate = threading.Event()

    class Held(type(speaker)):
        def answer(self, rows):
            gate.wait(20)
            super().answer(rows)

    served = Served(Held(speaker.model, speaker.tokenizer), waiting=2, batch_size=1)
    try:
        with ThreadPoolExecutor(8) as pool:
            body = {"prompt": "x", "max_tokens": 1}
            asked = [
                pool.submit(httpx.post, f"{served.address}/completions", json=body, timeout=30)
                for _ in range(8)
            ]
            while sum(one.done() for one in asked) < 5:
                time.sleep(0.01)
            gate.set()
            codes = sorted(one.result().status_code for one in asked)
        assert codes == [200] * 3 + [429] * 5
    finally:
        gate.set()
        served.close()


def test_an_answer_ends_when_its_time_is_over(speaker):
    served = Served(speaker, limits=Limits(40, 0.0))
    try:
        found = served.client.completions.create(
            model=NAME, prompt="Add", max_tokens=40, temperature=0
        )
        assert found.choices[0].finish_reason == "length"
        assert found.usage.completion_tokens == 1
    finally:
        served.close()


def test_other_machines_are_let_in_on_request_alone(capsys):
    assert main(["serve", "--checkpoint", "c", "--host", "0.0.0.0"]) == 2
    assert "give --allow_others" in capsys.readouterr().err


def test_a_missing_extra_is_named_with_its_command(capsys, monkeypatch):
    from dylora.cli import serve

    monkeypatch.setattr(serve, "find_spec", lambda name: None)
    assert main(["serve", "--checkpoint", "c"]) == 2
    assert "pip install 'dylora[serve]'" in capsys.readouterr().err


def test_the_command_serves_a_checkpoint_and_ends_at_a_signal(speaker, base_folder, tmp_path):
    speaker.model.base_name = str(base_folder)
    speaker.model.save_pretrained(tmp_path / "mine")
    command = [sys.executable, "-m", "dylora", "serve", "--checkpoint", str(tmp_path / "mine")]
    with subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            address = re.fullmatch(r"serving mine at (http://127\.0\.0\.1:\d+/v1)\n", line)[1]
            body = {"prompt": "Add", "max_tokens": 5, "temperature": 0}
            found = httpx.post(f"{address}/completions", json=body, timeout=60).json()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    right = alone(speaker, speaker.text("Add"), max_new_tokens=5)
    assert found["choices"][0]["text"] == right.text
    assert process.returncode == -signal.SIGTERM  # after what was begun
    assert "Traceback" not in errors


# lm-evaluation-harness


@pytest.fixture
def harness(served, base_folder):
    """Its model for completions, without its cache."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{served.address}/completions", model=NAME, tokenizer=str(base_folder),
        tokenizer_backend="huggingface", batch_size=2, max_length=100, num_concurrent=1,
    )  # fmt: skip


def instance(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0)


def test_lm_eval_scores_through_the_server_as_the_mixture_scores(harness, speaker):
    pairs = [("Add 3 and 4.", " 7"), ("Say", " something else")]
    found = harness.loglikelihood([instance("loglikelihood", *pair) for pair in pairs])
    for (context, rest), (value, _) in zip(pairs, found, strict=True):
        before, after = harness._encode_pair(context, rest)
        logits = speaker.model(torch.tensor([[*before, *after]])).logits[0].detach().log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(after) - 1)
        expected = sum(float(logits[p, t]) for p, t in zip(places, after, strict=True))
        assert value == pytest.approx(expected, abs=1e-3)


def test_lm_eval_generates_through_the_server(harness, served, speaker):
    from lm_eval.models.openai_completions import LocalChatCompletion

    settings = {"max_gen_toks": 8, "until": ["\n\n"], "temperature": 0}
    (text,) = harness.generate_until([instance("generate_until", "Add 3", dict(settings))])
    ids = harness.tok_encode("Add 3")
    assert text == alone(speaker, ids, max_new_tokens=8, stops=("\n\n",)).text
    chat = LocalChatCompletion(
        base_url=f"{served.address}/chat/completions", model=NAME, num_concurrent=1
    )
    message = [{"role": "user", "content": "Add 3"}]
    asked = chat.apply_chat_template(message)
    (text,) = chat.generate_until([instance("generate_until", asked, dict(settings))])
    right = alone(speaker, speaker.conversation(message), max_new_tokens=8, stops=("\n\n",))
    assert text == right.text

"""Generation that ends where it should, and samples that outlive a kill."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.base_models import load_tokenizer
from dylora.evaluation.passk import generation
from dylora.evaluation.passk.generation import generate
from dylora.evaluation.passk.problem import Problem, ProgramTests
from dylora.evaluation.passk.sampling import Sampling, read_samples, sample_to_file

TEXTS = [
    "def add(a, b):\n",
    "import os\n\n\nclass Reader:\n    def __init__(self, name):\n",
    "for index in range(10):\n    ",
    "x = 1\n",
]


@pytest.fixture(scope="module")
def model() -> DyLoRA_MoE:
    return DyLoRA_MoE.from_base("tiny-code-llama", MoELoraConfig(num_experts=2, r=2))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-code-llama")


def problem(prompt: str, *stops: str, task_id: str = "t") -> Problem:
    return Problem(task_id, prompt, "", stops, "", (), ProgramTests("", ()))


@pytest.fixture
def steps(model):
    """Counts the passes of the base."""
    counted: list[int] = []
    handle = model.base.register_forward_hook(lambda *_: counted.append(1))
    yield counted
    handle.remove()


# Ends


def test_each_row_ends_at_its_own_stop_and_the_batch_at_the_last(model, tokenizer, steps):
    free = generate(model, tokenizer, [problem(text) for text in TEXTS], max_new_tokens=40)
    stops = [text[9:12] for text in free]  # three letters that each text is sure to hold
    steps.clear()
    asked = [problem(text, stop) for text, stop in zip(TEXTS, stops, strict=True)]
    found = generate(model, tokenizer, asked, max_new_tokens=40)
    for text, stop, whole in zip(found, stops, free, strict=True):
        assert whole.startswith(text)
        assert stop in text
        assert len(text) < whole.find(stop) + len(stop) + 12  # but for the rest of a token
    assert len(steps) < 20


def test_only_the_end_of_a_text_is_looked_at_for_stops(model, tokenizer, monkeypatch):
    lengths = []
    decode = generation.decode_after

    def watched(tokenizer, context, ids):
        lengths.append(len(ids))
        return decode(tokenizer, context, ids)

    monkeypatch.setattr(generation, "decode_after", watched)
    generate(model, tokenizer, [problem(TEXTS[0], "\n@@@")], max_new_tokens=60)
    assert max(lengths[:-1]) == len("\n@@@") + 2
    assert lengths[-1] == 60


def test_a_text_ends_before_a_special_token(model, tokenizer, monkeypatch):
    ids = tokenizer("return x", add_special_tokens=False)["input_ids"]

    def speaks(input_ids, **_):
        made = torch.tensor([[*ids, tokenizer.bos_token_id, *ids]])
        return torch.cat([input_ids, made], dim=1)

    monkeypatch.setattr(model, "generate", speaks)
    assert generate(model, tokenizer, [problem("x")], max_new_tokens=40) == ["return x"]


def test_an_answer_ends_where_the_bases_positions_do(model, tokenizer, monkeypatch, steps):
    monkeypatch.setattr(model.base.config, "max_position_embeddings", 20)
    long, short = "x = 1\n" * 3, "x"
    lengths = [len(tokenizer(text)["input_ids"]) for text in (long, short)]
    both = generate(model, tokenizer, [problem(long), problem(short)], max_new_tokens=40)
    assert len(steps) == 20 - lengths[1]
    alone = generate(model, tokenizer, [problem(long)], max_new_tokens=40)
    assert both[0] == alone[0]
    with pytest.raises(ValueError, match=r"t has \d+ tokens and tiny-code-llama 20 positions"):
        generate(model, tokenizer, [problem(long * 3)], max_new_tokens=40)


def test_the_bases_own_settings_of_generation_change_nothing(model, tokenizer, monkeypatch):
    asked = [problem(text) for text in TEXTS]
    plain = generate(model, tokenizer, asked, max_new_tokens=20)
    monkeypatch.setattr(model.base.generation_config, "repetition_penalty", 3.0)
    assert generate(model, tokenizer, asked, max_new_tokens=20) == plain


def test_generation_leaves_the_random_state_and_the_mode_as_they_were(model, tokenizer):
    model.train()
    before = torch.get_rng_state()
    asked = [problem(text) for text in TEXTS[:2]]
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": 3}
    first = generate(model, tokenizer, asked, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    torch.rand(3)
    assert generate(model, tokenizer, asked, **options) == first
    assert generate(model, tokenizer, asked, **options | {"seed": 4}) != first
    model.eval()


# Samples in a file

MANY = [problem(f"{text}# {n}\n", task_id=f"task/{n}") for n, text in enumerate(TEXTS * 2)]
WAYS = {
    "greedy": Sampling(max_new_tokens=4, batch_size=2),
    "sampled": Sampling(max_new_tokens=4, batch_size=2, samples=3, temperature=0.8, seed=5),
}


@pytest.mark.parametrize("way", WAYS)
def test_samples_survive_kills_at_random_points(model, tokenizer, tmp_path: Path, way: str):
    """A process that is killed again and again leaves the file of one that never was."""
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    expected = sample_to_file(model, tokenizer, MANY, WAYS[way], whole)
    size, rng = whole.stat().st_size, random.Random(way)
    context, kills = multiprocessing.get_context("fork"), 0
    for part in range(1, 7):
        target = size * part / 7
        process = context.Process(
            target=sample_to_file, args=(model, tokenizer, MANY, WAYS[way], torn)
        )
        process.start()
        while process.is_alive() and (not torn.exists() or torn.stat().st_size < target):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        kills += process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if part % 2:  # a kill within a write, which is too short to be hit by chance
            with torn.open("r+b") as stream:
                stream.truncate(torn.stat().st_size - rng.randint(1, 20))
    assert kills >= 3
    assert sample_to_file(model, tokenizer, MANY, WAYS[way], torn) == expected
    assert torn.read_bytes() == whole.read_bytes()


def test_samples_of_a_task_are_drawn_in_batches_and_differ(model, tokenizer, tmp_path: Path):
    way = Sampling(max_new_tokens=8, batch_size=2, samples=5, temperature=2.0)
    found = sample_to_file(model, tokenizer, MANY[:1], way, tmp_path / "s.jsonl")
    assert len(set(found["task/0"])) == 5


def test_a_line_that_is_not_a_sample_is_named(tmp_path: Path):
    (tmp_path / "s.jsonl").write_text('{"task_id": "a"}\n')
    with pytest.raises(ValueError, match=r"s\.jsonl:1: not a sample"):
        read_samples(tmp_path / "s.jsonl")

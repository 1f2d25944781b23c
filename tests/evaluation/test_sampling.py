"""Generation that ends where it should, and samples that outlive a kill."""

import copy
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


# Text in context


@pytest.fixture(scope="module")
def llama_2_like():
    """A tokenizer that, like Llama 2's, drops the space that a text begins with."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback()),
            *(decoders.Fuse(), decoders.Strip(" ", 1, 0)),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    lines = ["def f(x):", "    return x + 1", "    if x:", "        return 2", '    """ one """']
    made.train_from_iterator(
        lines * 50, trainers.BpeTrainer(vocab_size=400, special_tokens=special)
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


PROMPT, BODY = 'def f(x):\n    """ one """\n', "    if x:\n        return 2\n    return x + 1\n"


def answer_ids(tokenizer, prompt: str, answer: str) -> list[int]:
    count = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return tokenizer(prompt + answer, add_special_tokens=False)["input_ids"][count:]


def test_an_answer_keeps_its_first_space_with_tokenizers_like_llama_2s(
    model, llama_2_like, monkeypatch
):
    ids = answer_ids(llama_2_like, PROMPT, BODY)

    def speaks(input_ids, **_):
        made = torch.tensor([[*ids, llama_2_like.eos_token_id]])
        return torch.cat([input_ids, made], dim=1)

    monkeypatch.setattr(model, "generate", speaks)
    assert generate(model, llama_2_like, [problem(PROMPT)], max_new_tokens=99) == [BODY]


@pytest.mark.parametrize(("stop", "found"), [("    if x:", True), ("\n    if x:", False)])
def test_a_stop_is_looked_for_in_the_answers_text_as_it_follows_the_prompt(
    llama_2_like, stop: str, found: bool
):
    """The first begins with a space that the answer's tokens alone lose; the second would need the
    prompt's last character."""
    prompt = llama_2_like(PROMPT)["input_ids"]
    stops = generation.StopCondition(llama_2_like, [problem(PROMPT, stop)], [prompt], [99], 0)
    ids = answer_ids(llama_2_like, PROMPT, "    if x:")
    assert stops(torch.tensor([ids]), None).tolist() == [found]


# Settings of the base


@pytest.mark.parametrize(
    "setting",
    [
        {"suppress_tokens": list(range(5, 900))},
        {"bad_words_ids": [[token] for token in range(5, 900)]},
        {"repetition_penalty": 5.0},
        {"no_repeat_ngram_size": 1},
        {"num_beams": 4},
        {"min_p": 0.9},
        {"typical_p": 0.1},
        {"epsilon_cutoff": 0.1},
        {"forced_eos_token_id": 2},
        {"exponential_decay_length_penalty": (1, 9.0)},
        {"sequence_bias": [[[7], 50.0]]},
    ],
    ids=lambda setting: next(iter(setting)),
)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_samples_do_not_depend_on_the_bases_generation_config(
    model, tokenizer, monkeypatch, setting, temperature
):
    asked = [problem(text) for text in TEXTS]
    options = {"max_new_tokens": 12, "temperature": temperature, "seed": 1}
    plain = generate(model, tokenizer, asked, **options)
    changed = copy.deepcopy(model.base.generation_config)
    changed.update(**setting)
    monkeypatch.setattr(model.base, "generation_config", changed)
    assert generate(model, tokenizer, asked, **options) == plain
    assert model.base.generation_config is changed

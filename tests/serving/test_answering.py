"""Answers of a batch are those of each row alone, cut and ended as they should be."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LogitsProcessorList, TopPLogitsWarper

from dylora.data.templates import load_template
from dylora.serving.answering import Row, Sampling, _draw, _sure, answer
from dylora.serving.engine import Busy, Engine, Speaker

MIXED = [
    ("Add 3 and 4.", Sampling(max_new_tokens=12)),
    ("Add 3 and 4. Please. And then some more words, so that it is long.", Sampling(
        max_new_tokens=5)),
    ("Say.", Sampling(max_new_tokens=9, temperature=0.8, seed=1)),
    ("Say.", Sampling(max_new_tokens=9, temperature=0.8, seed=2)),
    ("What is 5?", Sampling(max_new_tokens=11, temperature=1.5, top_p=0.7, seed=3)),
]  # fmt: skip


def rows_of(speaker: Speaker, mixed=MIXED) -> list[Row]:
    return [Row(speaker.question(text), sampling) for text, sampling in mixed]


def test_greedy_answers_are_those_of_generate(speaker):
    (row,) = rows_of(speaker, MIXED[:1])
    speaker.answer([row])
    ids = torch.tensor([row.prompt])
    plain = speaker.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False,
        pad_token_id=0, eos_token_id=list(speaker.ends),
    )  # fmt: skip
    assert row.tokens == plain[0, ids.shape[1] :].tolist()
    assert row.finish == ("stop" if row.tokens[-1] in speaker.ends else "length")


def test_a_row_is_the_same_alone_and_in_a_batch_of_others(speaker):
    together = rows_of(speaker)
    speaker.answer(together)
    for row, alone in zip(together, rows_of(speaker), strict=True):
        speaker.answer([alone])
        assert (row.tokens, row.text, row.finish) == (alone.tokens, alone.text, alone.finish)
    assert together[2].tokens != together[3].tokens  # by their seeds


def test_pieces_add_up_to_the_text(speaker):
    rows = rows_of(speaker)
    pieces = [[] for _ in rows]
    for row, own in zip(rows, pieces, strict=True):
        row.on_text = own.append
    speaker.answer(rows)
    assert ["".join(own) for own in pieces] == [row.text for row in rows]
    assert max(map(len, pieces)) > 1


def test_a_stop_ends_an_answer_and_is_no_part_of_it(speaker):
    whole, cut = Row(speaker.text("Add"), Sampling(max_new_tokens=12)), None
    speaker.answer([whole])
    stop = whole.text[3:6]  # across tokens
    pieces: list[str] = []
    cut = Row(whole.prompt, Sampling(max_new_tokens=12, stops=(stop,)), pieces.append)
    speaker.answer([cut])
    assert cut.text == whole.text[: whole.text.index(stop)] == "".join(pieces)
    assert cut.finish == "stop"
    assert len(cut.tokens) < len(whole.tokens)


@pytest.mark.parametrize(
    ("text", "stops", "sure"),
    [("abc", (), 3), ("abc\ufffd", (), 3), ("ab\nQ", ("\nQ:",), 2), ("ab", ("abab", "b"), 0)],
)
def test_what_may_still_change_is_held_back(text, stops, sure):
    assert _sure(text, stops) == sure


def test_the_share_of_likeliest_tokens_is_that_of_transformers():
    draw = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(20, generator=draw)
    for top_p in (0.1, 0.5, 0.9):
        kept = LogitsProcessorList([TopPLogitsWarper(top_p)])(torch.zeros(1, 1), scores[None])[0]
        sampling, seen = Sampling(temperature=1.0, top_p=top_p), set()
        for seed in range(300):
            seen.add(_draw(scores, sampling, torch.Generator().manual_seed(seed)))
        assert seen <= set(kept.isfinite().nonzero().flatten().tolist())
        assert len(seen) > 1 or int(kept.isfinite().sum()) == 1


def test_log_probabilities_are_those_of_the_pass(speaker):
    row = Row(speaker.text("Add 3"), Sampling(max_new_tokens=4, logprobs=2), scores_prompt=True)
    speaker.answer([row])
    ids = [*row.prompt, *row.tokens]
    expected = speaker.model(torch.tensor([ids])).logits[0].detach().log_softmax(-1)
    scores = [*row.prompt_scores, *row.scores]
    assert [score.token for score in scores] == ids
    assert scores[0].logprob is None
    for place, score in enumerate(scores[1:], 1):
        assert score.logprob == pytest.approx(float(expected[place - 1, ids[place]]), abs=1e-4)
        top = expected[place - 1].topk(2)
        assert list(score.likeliest.values()) == pytest.approx(top.values.tolist(), abs=1e-4)


def test_an_answer_ends_at_its_time_and_when_it_is_cancelled(speaker):
    late = Row(speaker.text("Add"), Sampling(max_new_tokens=50), seconds=0.0)
    gone = Row(speaker.text("Add"), Sampling(max_new_tokens=50), cancelled=True)
    speaker.answer([late, gone])
    assert (late.finish, len(late.tokens)) == ("length", 1)
    assert (gone.finish, len(gone.tokens)) == ("cancelled", 1)


def test_a_prompt_without_room_is_refused_and_an_answer_ends_at_the_last_position(speaker):
    with pytest.raises(ValueError, match="the prompt has 128 tokens, and the base takes 128"):
        speaker.answer([Row([5] * 128)])
    row = Row([5] * 125, Sampling(max_new_tokens=50))
    answer(speaker.model, speaker.tokenizer, [row], ends=())
    assert (row.finish, len(row.tokens)) == ("length", 3)


def test_a_conversation_is_encoded_as_training_encodes_it(speaker):
    """With the prompt's boundary between tokens, and an answer ended by EOS."""
    first = speaker.conversation([{"role": "user", "content": "Add 1."}])
    assert first == speaker.question("Add 1.")
    messages = [
        {"role": "user", "content": "Add 1."},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 3?"},
    ]
    ids = speaker.conversation(messages)
    assert ids[: len(first)] == first
    assert speaker.tokenizer.eos_token_id in ids[len(first) :]
    for wrong in ([], messages[:2], [{"role": "robot", "content": "x"}], [{"role": "user"}]):
        with pytest.raises(ValueError, match="message"):
            speaker.conversation(wrong)


def test_the_engine_answers_what_waits_together_and_tells_a_fault_to_those_it_hit(speaker):
    sizes, gate = [], threading.Event()

    class Slow(Speaker):
        def answer(self, rows):
            gate.wait(10)
            sizes.append(len(rows))
            if any(row.sampling.seed == 13 for row in rows):
                raise RuntimeError("no luck")
            super().answer(rows)

    engine = Engine(Slow(speaker.model, speaker.tokenizer), batch_size=3, waiting=5)
    ended = threading.Semaphore(0)
    seeds = (None, None, None, 13, None)
    rows = [Row(speaker.text("Add"), Sampling(max_new_tokens=2, seed=seed)) for seed in seeds]
    for row in rows:
        row.on_end = lambda row: ended.release()
    engine.submit(rows[0])
    while not engine._queue.empty():  # it is taken, and waits at the gate
        pass
    for row in rows[1:]:
        engine.submit(row)
    engine.submit(Row(speaker.text("Add"), cancelled=True))
    with pytest.raises(Busy, match="too many requests wait"):
        engine.submit(Row(speaker.text("Add")))
    gate.set()
    for _ in rows:
        assert ended.acquire(timeout=20)
    engine.close()
    assert sizes[:2] == [1, 3]
    assert isinstance(rows[1].error, RuntimeError)
    assert rows[0].finish == rows[4].finish == "length"


def test_an_answer_is_told_when_it_ends_and_not_when_its_batch_does(speaker):
    told: list[str] = []
    none = Row(speaker.text("Add"), Sampling(max_new_tokens=0))
    short = Row(speaker.text("Add"), Sampling(max_new_tokens=1))
    long = Row(speaker.text("Say."), Sampling(max_new_tokens=9), lambda piece: told.append("piece"))
    for name, row in (("none", none), ("short", short), ("long", long)):
        row.on_end = lambda row, name=name: told.append(name)
    engine = Engine(speaker, batch_size=3, waiting=3)
    engine._answer([none, short, long])
    engine.close()
    assert [one for one in told if one != "piece"] == ["none", "short", "long"]
    assert told[-2:] == ["piece", "long"]
    assert told.index("short") < told.index("long") - 2  # pieces came after it


def test_a_fault_is_told_to_the_rows_that_had_not_ended_alone(speaker):
    def fail(piece: str) -> None:
        raise RuntimeError("no luck")

    ended: list[Row] = []
    whole = Row(speaker.text("Add"), Sampling(max_new_tokens=1), on_end=ended.append)
    broken = Row(speaker.text("Say."), Sampling(max_new_tokens=1), fail, ended.append)
    engine = Engine(speaker, batch_size=2, waiting=2)
    engine._answer([whole, broken])
    engine.close()
    assert ended == [whole, broken]
    assert (whole.finish, whole.error) == ("length", None)
    assert isinstance(broken.error, RuntimeError)


@pytest.mark.parametrize("settings", [{"temperature": t} for t in (1e-40, 5e-324)] + [
    {"temperature": 1.0, "top_p": p} for p in (1e-40, 5e-324)
])  # fmt: skip
def test_however_low_its_temperature_or_share_a_row_takes_the_likeliest_token(settings):
    scores = torch.tensor([100.0, 90.0, 110.0, -torch.inf])
    assert _draw(scores, Sampling(seed=1, **settings), torch.Generator()) == 2


def test_the_highest_temperature_draws_evenly_from_what_is_possible():
    scores, seen = torch.tensor([100.0, 90.0, -torch.inf]), set()
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        seen.add(_draw(scores, Sampling(temperature=1e300), draw))
    assert seen == {0, 1}


def test_a_row_of_extreme_settings_does_not_fail_the_others(speaker):
    rows = [Row(speaker.text("Add"), Sampling(max_new_tokens=3, temperature=t)) for t in (0, 1e-46)]
    speaker.answer(rows)
    assert rows[0].tokens == rows[1].tokens


def test_a_text_and_a_conversation_that_are_encoded_at_once_keep_their_own_rules(
    speaker, tokenizer
):
    """A text's special tokens are text, a Jinja template's are tokens; the tokenizer has one
    setting for it, and the conversation comes between that and the text's ids."""
    own = copy.deepcopy(tokenizer)
    begun, other_done = threading.Event(), threading.Event()

    class Slow:
        """Waits, before it encodes a text, until the conversation is through."""

        def __init__(self, core):
            vars(self).update(core=core)

        def __getattr__(self, name):
            return getattr(self.core, name)

        def __setattr__(self, name, value):
            setattr(self.core, name, value)

        def encode_batch(self, texts, **options):
            if texts == ["</s>"]:
                begun.set()
                other_done.wait(1)
            return self.core.encode_batch(texts, **options)

    both = Speaker(speaker.model, own, load_template("chatml", own))
    right = both.text("</s>"), both.conversation([{"role": "user", "content": "x"}])
    assert own.eos_token_id not in right[0]
    own._tokenizer = Slow(own._tokenizer)
    with ThreadPoolExecutor(1) as pool:
        text = pool.submit(both.text, "</s>")
        assert begun.wait(10)
        conversation = both.conversation([{"role": "user", "content": "x"}])
        other_done.set()
        assert (text.result(), conversation) == right

"""Measured weights are mean gates; what freezing costs is a KL divergence and a loss."""

import json

import pytest
import torch
import torch.nn.functional as F

from dylora.base_models import load_tokenizer
from dylora.data.prompts import encode_prompts, format_prompt
from dylora.data.templates import TextTemplate
from dylora.evaluation.static_mixture import Sequences, compare, measured_weights, read_text

CODE = "def mean(values):\n    return sum(values) / len(values)\n"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny-code-llama")


@pytest.fixture
def text():
    """Three pieces of different lengths; the first two tokens of the second are a prompt."""
    draw = torch.Generator().manual_seed(2)
    ids = [torch.randint(3, 40, (1, n), generator=draw) for n in (9, 4, 3)]
    return Sequences(ids, [1, 2, 3], "a file")


def test_measured_weights_are_the_mean_gates_of_each_site_over_all_tokens(mixture, text):
    model = mixture(router_temperature=0.5)
    measured = measured_weights(model, text)
    gates = torch.cat([model.get_routing_weights(ids)[0] for ids in text.ids])
    assert gates.shape == (16, 2, 3)
    torch.testing.assert_close(measured, gates.double().mean(0))
    assert (measured[0] - measured[1]).abs().max() > 0.01, "sites that agree would prove nothing"


def test_the_comparison_is_the_mean_over_predicted_tokens(mixture, text):
    """In float64 and position by position."""
    model = mixture(router_temperature=0.5)
    weights = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.1, 0.9]], dtype=torch.float64)
    found = compare(model, weights, text)
    kls, losses = [], ([], [])
    for ids, first in zip(text.ids, text.firsts, strict=True):
        constant = weights.expand(1, ids.shape[1], -1, -1)
        with torch.no_grad():
            logits = model(ids).logits[0], model(ids, routing_weights=constant).logits[0]
        log_p, log_q = (value.double().log_softmax(-1) for value in logits)
        for position in range(first - 1, ids.shape[1] - 1):
            p, q = log_p[position], log_q[position]
            kls.append(F.kl_div(q, p, log_target=True, reduction="sum"))
            for mine, log in zip(losses, (p, q), strict=True):
                mine.append(-log[ids[0, position + 1]])
    assert found.tokens == len(kls) == 8 + 2
    assert found.kl == pytest.approx(float(torch.stack(kls).mean()), rel=1e-4)
    assert found.kl > 1e-3
    assert found.routed_loss == pytest.approx(float(torch.stack(losses[0]).mean()), rel=1e-5)
    assert found.static_loss == pytest.approx(float(torch.stack(losses[1]).mean()), rel=1e-5)


def test_fixed_routing_loses_nothing_when_frozen(mixture, text):
    model = mixture(router_type="fixed", fixed_routing_weights=[0.5, 0.2, 0.3])
    weights = measured_weights(model, text)
    torch.testing.assert_close(weights.float(), torch.tensor([[0.5, 0.2, 0.3]] * 2))
    found = compare(model, weights, text)
    assert abs(found.kl) < 1e-6
    assert found.static_loss == pytest.approx(found.routed_loss, abs=1e-6)


def test_the_models_mode_is_put_back(mixture, text):
    model = mixture(expert_dropout=0.5).train()
    expected = measured_weights(mixture(), text)
    torch.testing.assert_close(measured_weights(model, text), expected)
    assert model.training


# Texts


def test_a_long_text_is_cut_into_pieces_that_begin_as_texts_do(tokenizer, tmp_path):
    file = tmp_path / "code.txt"
    file.write_text(CODE * 10)
    text = read_text(str(file), TextTemplate(tokenizer, "alpaca"), 10_000, window=32)
    begin = encode_prompts(tokenizer, [""])[0]
    assert all(ids[0, : len(begin)].tolist() == begin for ids in text.ids)
    assert {ids.shape[1] for ids in text.ids[:-1]} == {32}
    body = [token for ids in text.ids for token in ids[0, len(begin) :].tolist()]
    assert tokenizer.decode(body) == CODE * 10
    assert text.tokens == sum(ids.shape[1] for ids in text.ids)


def test_no_more_tokens_are_taken_than_asked_for(tokenizer, tmp_path):
    file = tmp_path / "code.txt"
    file.write_text(CODE * 10)
    assert read_text(str(file), TextTemplate(tokenizer, "alpaca"), 50, window=32).tokens == 50


def test_of_rows_with_an_answer_the_answer_counts(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"text": CODE}, {"instruction": "Add.", "input": "1 2", "output": "3"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = read_text(str(file), TextTemplate(tokenizer, "alpaca"), 999)
    pieces = [tokenizer.decode(ids[0, 1:]) for ids in text.ids]
    answer = "3" + tokenizer.eos_token
    assert pieces == [CODE, format_prompt("Add.", "1 2") + answer]
    counted = [ids[0, first:] for ids, first in zip(text.ids, text.firsts, strict=True)]
    assert [tokenizer.decode(part) for part in counted] == [CODE, answer]


def test_an_answer_beyond_the_window_counts_in_the_next_piece(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": CODE * 3, "output": CODE}))
    text = read_text(str(file), TextTemplate(tokenizer, "alpaca"), 999, window=32)
    assert len(text.ids) > 2
    counted = [ids[0, first:] for ids, first in zip(text.ids, text.firsts, strict=True)]
    assert tokenizer.decode(torch.cat(counted)) == CODE + tokenizer.eos_token


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            b'{"text": "def f"}\n{"body": "x"}\n',
            r"rows\.jsonl:2: needs the field",
        ),
        ("rows.jsonl", b'{"text": "def f"}\n{"text\n', r"rows\.jsonl:2: not JSON"),
        ("text.txt", b"", r"text\.txt: 0 tokens of it hold none"),
        ("text.txt", b"caf\xe9", r"text\.txt: not a text in UTF-8"),
    ],
)
def test_what_is_no_text_is_named(name, content, message, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_text(str(tmp_path / name), TextTemplate(tokenizer, "alpaca"), 100)


def test_a_missing_text_is_named(tokenizer):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt: no such file"):
        read_text("nowhere.txt", TextTemplate(tokenizer, "alpaca"), 100)

"""The length of an example against what the base takes, and the part of the rows that is used."""

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig

from dylora.base_models import BaseSpec, max_positions
from dylora.run_config import DataConfig, RunConfig
from dylora.training.loop import train
from dylora.training.run import fit_to_base


@pytest.fixture
def asked(monkeypatch):
    """What a run takes as max_length on a base of this configuration."""

    def ask(base, length: int | None) -> int:
        monkeypatch.setattr(BaseSpec, "config", lambda self: base)
        run = RunConfig(data=DataConfig(max_length=length))
        return fit_to_base(run).data.max_length

    return ask


@pytest.mark.parametrize(
    ("base", "positions"),
    [
        (LlamaConfig(max_position_embeddings=96), 96),
        (GPT2Config(n_positions=64), 64),
        (MptConfig(max_seq_len=128), 128),
        (BloomConfig(seq_length=256), 256),
        (BloomConfig(), None),
    ],
)
def test_the_positions_of_a_base_are_known_by_any_name(base, positions):
    assert max_positions(base) == positions


def test_the_default_length_is_lowered_to_what_the_base_takes_and_that_is_said(asked, capsys):
    assert asked(GPT2Config(n_positions=64), None) == 64
    out = capsys.readouterr().out
    assert out == "note: data.max_length is 64, not 512: the base takes no more tokens\n"


@pytest.mark.parametrize("length", [None, 100, 512])
def test_a_length_that_the_base_takes_is_kept_in_silence(asked, capsys, length):
    assert asked(GPT2Config(n_positions=512), length) == (length or 512)
    assert asked(BloomConfig(), length) == (length or 512)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("base", [GPT2Config(n_positions=64), MptConfig(max_seq_len=64)])
def test_a_length_beyond_the_table_of_positions_is_refused(asked, base):
    with pytest.raises(ValueError, match=r"data\.max_length is 100, but the base takes at most 64"):
        asked(base, 100)


@pytest.mark.parametrize(
    "base", [LlamaConfig(max_position_embeddings=64), BloomConfig(seq_length=64)]
)
def test_a_length_beyond_positions_that_are_computed_is_said(asked, base, capsys):
    assert asked(base, 100) == 100
    out = capsys.readouterr().out
    assert out == "note: data.max_length is 100, and the base was made for 64 tokens\n"


def test_a_run_says_which_part_of_the_rows_it_trains_on(make_config, capsys):
    run = train(make_config(max_steps=1, training_subset="50%"))
    half = len(run.data.train[0])
    assert "training_subset is a share of 0.5 of the training rows" in capsys.readouterr().out
    assert half == 14  # of 27
    train(make_config("b", max_steps=1, training_subset=10))
    assert "training_subset is 10 rows of the training rows" in capsys.readouterr().out

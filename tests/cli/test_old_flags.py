"""Options of earlier training scripts: `train` takes them and says what they set."""

import pytest
import yaml

from dylora.cli.hints import OLD_FLAGS, all_keys
from dylora.cli.main import main
from dylora.run_config import TrainConfig


def resolved(capsys, path: str, *words: str) -> tuple[dict, str]:
    assert main(["train", "--print_config", "--config", path, *words]) == 0
    out, err = capsys.readouterr()
    return yaml.safe_load(out), err


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        ("--bf16", "model.dtype", "bfloat16"),
        ("--fp16", "model.dtype", "float16"),
        ("--num_experts 6", "moe.num_experts", 6),
        ("--balance_coefficient 0.05", "moe.router_aux_loss_coef", 0.05),
        ("--cosine_restarts", "train.lr_scheduler_type", "cosine_with_restarts"),
        ("--train_batch_size 3", "train.batch_size", 3),
        ("--train-batch-size=3", "train.batch_size", 3),
        ("--interleaved_sampling", "data.interleaved_sampling", True),
        ("--training_subset 10", "train.training_subset", 10),
    ],
)
def test_an_option_of_earlier_scripts_is_taken_and_said(config_file, capsys, words, key, value):
    section, name = key.split(".")
    tree, said = resolved(capsys, config_file("name: x\n"), *words.split())
    assert tree[section][name] == value
    flag = words.replace("=", " ").split()[0].replace("-", "_").replace("__", "--", 1)
    assert said.startswith(f"note: {flag} sets {key} to ")
    assert said.count("\n") == 1


def test_every_old_option_sets_a_key_that_exists():
    assert {key for key, _ in OLD_FLAGS.values()} <= set(all_keys())


def test_an_old_option_without_a_value_takes_none(config_file, refusal, capsys):
    path = config_file("name: x\n")
    assert main(["train", "--config", path, "--bf16", "yes"]) == 2
    assert "command line: yes belongs to no option" in capsys.readouterr().err


def test_other_commands_name_the_key_instead(config_file, refusal):
    words = ["--config", config_file("name: x\n"), "--checkpoint", "c", "--num_experts", "2"]
    assert "did you mean moe.num_experts?" in refusal("evaluate", *words)


# A part of the training rows


@pytest.mark.parametrize(
    ("written", "means"),
    [(10, 10), (1, 1), (0.1, 0.1), ("10%", 0.1), ("12.5%", 0.125), ("100%", 1.0), (None, None)],
)
def test_a_whole_number_is_rows_and_anything_below_one_a_share(written, means):
    found = TrainConfig(training_subset=written).subset
    assert (found, type(found)) == (means, type(means))


@pytest.mark.parametrize("written", [0, -1, 1.5, 1.0, 0.0, -0.1, "0%", "101%", "ten", "10 %", "%"])
def test_a_subset_that_is_neither_is_refused(written):
    with pytest.raises(ValueError, match=r"training_subset is .*a whole number of rows, a share"):
        TrainConfig(training_subset=written)


@pytest.mark.parametrize("text", ["10", "0.1", "10%"])
def test_a_subset_comes_back_from_a_dumped_config(config_file, capsys, text):
    tree, _ = resolved(capsys, config_file("name: x\n"), "--train.training_subset", text)
    again, _ = resolved(capsys, config_file(yaml.safe_dump(tree)))
    assert str(again["train"]["training_subset"]) == text

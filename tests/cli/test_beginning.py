"""What commands take from the checkpoint that they begin with."""

import json

import pytest
import yaml
from transformers import AutoModelForCausalLM

from dylora.cli.config_file import load_run_config
from dylora.cli.main import main
from dylora.run_config import RunConfig
from dylora.train_config import TrainConfig
from dylora.training.settings import recorded_settings


@pytest.fixture
def saved(mixture, base_folder, tmp_path):
    """Saves a mixture as training does, with the settings of its run."""

    def save(train: TrainConfig | None = None, **moe):
        model = mixture(AutoModelForCausalLM.from_pretrained(base_folder), **moe)
        model.base_name = str(base_folder)
        run = RunConfig(moe=model.config, train=train or TrainConfig())
        settings = recorded_settings(run)
        model.training_record = {"step": 1, "targets": 1, "seed": 0, "settings": settings}
        model.save_pretrained(tmp_path / "m")
        return tmp_path / "m"

    return save


def learned(folder, capsys, *options: str) -> dict:
    """The config of `learn`, as it prints it."""
    argv = ["learn", "--checkpoint", str(folder), "--print_config", *options]
    assert main(argv) == 0, capsys.readouterr().err
    return yaml.safe_load(capsys.readouterr().out)


PROMPTED = {"router_scope": "prompt", "expert_dropout": 0.0, "num_experts": 2}


@pytest.mark.parametrize("changes", [{"prompt_clusters": 24}, {"parallel": "ddp"}])
def test_what_only_a_run_without_stages_may_set_does_not_keep_a_checkpoint_from_learning(
    saved, capsys, changes
):
    train = TrainConfig(learning_rate=3e-3, **changes)
    config = learned(saved(train, **PROMPTED), capsys, "--source", "skill/sql")
    assert config["train"]["learning_rate"] == 3e-3
    assert config["train"] | changes != config["train"]


def test_learn_keeps_a_file_name_beyond_the_basic_plane(saved, capsys):
    path = "r\U0001f600\u2028é.jsonl"
    config = learned(saved(**PROMPTED), capsys, "--source", path, "--name", "smiles")
    assert config["stages"][0]["sources"][0]["path"] == path


@pytest.mark.parametrize("scale", ["keep_size", "sum_to_one", None])
def test_a_run_that_begins_with_a_checkpoint_mixes_as_that_one_did(saved, scale):
    folder = saved(gate_scale=scale or "keep_size")
    description = json.loads((folder / "config.json").read_text())
    if scale is None:  # as an earlier version has written it
        del description["moe"]["gate_scale"]
    (folder / "config.json").write_text(json.dumps(description))
    config = load_run_config(None, [f"train.init_from={folder}"])
    assert config.moe.gate_scale == (scale or "sum_to_one")
    given = ["moe.gate_scale=keep_size", f"train.init_from={folder}"]
    assert load_run_config(None, given).moe.gate_scale == "keep_size"

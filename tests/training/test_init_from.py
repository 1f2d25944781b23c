"""A run that begins with a checkpoint's weights; above all, routers trained on frozen experts."""

import dataclasses

import pytest
import torch
import yaml

from dylora.base_models import load_base
from dylora.cli.config_file import load_run_config
from dylora.cli.main import main
from dylora.model import DyLoRA_MoE
from dylora.run_config import TrainConfig, dump_run_config
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.text_hashes import hashes_in, without_hashes
from dylora.training.loop import train
from dylora.training.run import prepare
from peft_folders import make_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def imported(base_folder, tmp_path, capsys):
    """Two adapters of peft's, imported by the command: the folder of the mixture."""
    base = load_base(str(base_folder))
    for seed, name in enumerate(("sums", "words")):
        make_adapter(base, tmp_path / name, seed=seed, r=2 + seed, target_modules=["q_proj"])
    argv = ["import", "--adapters", str(tmp_path / "sums"), str(tmp_path / "words")]
    out = tmp_path / "imported"
    assert main([*argv, "--base", str(base_folder), "--out", str(out)]) == 0
    capsys.readouterr()
    return out


@pytest.fixture
def beginning_with(make_config, tmp_path):
    """A run's config that begins with a folder, as the YAML file of a user gives it."""

    def make(folder, **train_changes):
        config = make_config("fresh")
        tree = yaml.safe_load(dump_run_config(config))
        del tree["moe"]
        tree["model"] = {"device": "cpu", "dtype": "float32"}
        tree["train"] |= {"init_from": str(folder)} | train_changes
        file = tmp_path / "fresh.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return make


def adapters_and_routers(folder):
    model = DyLoRA_MoE.from_pretrained(folder)
    return dict(model.named_expert_parameters()), dict(model.router_parameters())


def test_imported_experts_stay_bit_identical_while_their_routers_learn(imported, beginning_with):
    run = train(load_run_config(beginning_with(imported)))
    experts, routers = adapters_and_routers(imported)
    after, learned = adapters_and_routers(run.folder / "checkpoint-10")
    assert [name for name in experts if not torch.equal(experts[name], after[name])] == []
    moved = [name for name in routers if not torch.equal(routers[name], learned[name])]
    assert moved == list(routers)


def test_train_experts_true_thaws_them(imported, beginning_with):
    run = train(load_run_config(beginning_with(imported, train_experts=True, max_steps=2)))
    before, _ = adapters_and_routers(imported)
    after = dict(run.model.named_expert_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_train_experts_false_freezes_them(make_config, beginning_with):
    source = train(make_config("source", max_steps=2)).folder / "checkpoint-2"
    run = prepare(load_run_config(beginning_with(source, train_experts=False)), fresh=True)
    assert [row.state for row in run.model.experts.table] == ["frozen"] * 3


def test_a_run_begins_with_weights_and_maturity_and_nothing_else(make_config, beginning_with):
    source = train(make_config("source", max_steps=3))
    run = prepare(load_run_config(beginning_with(source.folder / "checkpoint-3")), fresh=True)
    for name, parameter in run.model.own_parameters():
        assert torch.equal(parameter, dict(source.model.own_parameters())[name])
    assert torch.equal(run.model.maturity.maturity, source.model.maturity.maturity)
    assert (run.model.maturity.evidence.sum(), run.progress.step) == (0, 0)
    assert run.optimizer.state == {}


def test_what_the_file_does_not_say_of_mixture_and_base_is_the_checkpoints(
    imported, beginning_with, base_folder
):
    config = load_run_config(beginning_with(imported), ["moe.router_temperature=0.5"])
    assert config.model.base == str(base_folder)
    assert config.moe.target_modules == ["q_proj"]
    assert (config.moe.num_experts, config.moe.router_temperature) == (2, 0.5)


def test_a_run_begins_with_the_best_checkpoint_of_a_runs_folder(
    make_config, beginning_with, capsys
):
    source = train(make_config("source", max_steps=2, save_steps=1)).folder
    (source / "best.json").write_text('{"checkpoint": "checkpoint-1", "val_loss": 1.0}')
    capsys.readouterr()
    config = load_run_config(beginning_with(source))
    assert config.train.init_from == str(source / "checkpoint-1")
    assert f"checkpoint: {source / 'checkpoint-1'}, the best" in capsys.readouterr().err
    experts, _ = adapters_and_routers(source / "checkpoint-1")
    run = prepare(config, fresh=True)
    for name, parameter in run.model.named_expert_parameters():
        assert torch.equal(parameter, experts[name])


def test_a_resumed_run_keeps_its_experts_frozen(imported, beginning_with):
    file = beginning_with(imported, max_steps=4, save_steps=2)
    first = train(load_run_config(file))
    resumed = train(
        load_run_config(file, ["train.max_steps=6"]), str(first.folder / "checkpoint-2")
    )
    assert [row.state for row in resumed.model.experts.table] == ["frozen", "frozen"]


def test_what_a_run_began_with_stays_in_its_record_across_a_resume(
    make_config, beginning_with, tmp_path
):
    source = train(make_config("source", max_steps=2)).folder / "checkpoint-2"
    file = beginning_with(source, max_steps=2)
    # The run goes on from there with other rows, so that it has hashes that its source has not.
    config = load_run_config(file)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "Say {n}.", "answer": "{n}"}}\n' for n in range(30)))
    source_config = dataclasses.replace(config.data.sources[0], path=str(rows))
    data = dataclasses.replace(config.data, sources=[source_config])
    config = dataclasses.replace(config, data=data)
    expected = Checkpoint.open(source).description["training"]
    run = train(config)
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=3))
    resumed = train(longer, "latest")
    for folder in (run.folder / "checkpoint-2", resumed.folder / "checkpoint-3"):
        found = Checkpoint.open(folder).description["training"]
        assert found["earlier"] == [without_hashes(expected)]
        assert hashes_in(expected) < hashes_in(found)


# Refusals


def test_a_mixture_of_another_form_is_refused_by_the_settings_name(imported, beginning_with):
    config = load_run_config(beginning_with(imported), ["moe.router_scope=shared"])
    with pytest.raises(ValueError, match=r"moe\.router_scope is 'shared', but train\.init_from"):
        prepare(config, fresh=True)


def test_nothing_to_train_is_refused(imported, beginning_with):
    model = DyLoRA_MoE.from_pretrained(imported)
    config = load_run_config(beginning_with(imported))
    fixed = dataclasses.replace(model.config, router_type="fixed")
    mixture = DyLoRA_MoE(model.unload(), fixed)
    mixture.experts.freeze(0, 1)
    mixture.save_pretrained(imported, overwrite=True)
    config = load_run_config(beginning_with(imported))
    with pytest.raises(ValueError, match="nothing would be trained: all experts are frozen"):
        prepare(config, fresh=True)


def test_train_experts_needs_a_checkpoint_to_begin_with():
    with pytest.raises(ValueError, match="train_experts is False, but must be unset without init"):
        TrainConfig(train_experts=False)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "config.json does not exist: train.init_from is"),
        ("{", ValueError, "config.json: not valid JSON"),
        ('{"moe": 3}', ValueError, "config.json describes no mixture"),
        ('{"moe": {"num_experts": 1}}', ValueError, "config.json: moe: num_experts is 1"),
    ],
)
def test_a_folder_that_does_not_say_is_named(content, error, message, beginning_with, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        load_run_config(beginning_with(tmp_path))

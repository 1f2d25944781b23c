"""Folders go to a hub and come back, by huggingface_hub itself, against one on this machine."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dylora import DyLoRA_MoE, export_peft, load_peft_experts
from dylora.cli.config_file import load_run_config
from dylora.cli.main import main
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.hub import RESUME_FILES
from dylora.storage.manifest import verify
from dylora.storage.model_card import mixture_card
from dylora.training.init_from import init_from_checkpoint
from dylora.training.loop import train
from hub import Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub asks it, as somebody who is logged in, and has fetched nothing yet."""
    from huggingface_hub import _commit_api, constants, file_download, hf_api
    from transformers.utils import hub as of_transformers

    found = Hub()
    monkeypatch.setattr(of_transformers, "_hf_api", None)  # which one a test before may have made
    for module in (constants, hf_api, file_download, _commit_api):
        for name in ("ENDPOINT", "_HF_DEFAULT_ENDPOINT"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, found.address)
    template = found.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(hf_api.api, "endpoint", found.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "secret")
    yield found
    found.close()


@pytest.fixture
def on_folder(mixture, base_folder):
    """A mixture on the base of `base_folder`, which its files name."""

    def build(**settings) -> DyLoRA_MoE:
        base = AutoModelForCausalLM.from_pretrained(base_folder)
        model = mixture(base, **settings)
        model.base_name = str(base_folder)
        return model

    return build


def logits(model: DyLoRA_MoE) -> torch.Tensor:
    return model(torch.arange(3, 12)[None]).logits.detach()


def front_of(card: str) -> dict:
    return yaml.safe_load(card.split("---\n")[1])


def test_a_mixture_that_is_pushed_comes_back_by_its_name_with_the_same_logits(hub, on_folder):
    model = on_folder()
    url = model.push_to_hub("somebody/mixture")
    assert url.startswith(f"{hub.address}/somebody/mixture/commit/")
    again = DyLoRA_MoE.from_pretrained("somebody/mixture", model.base_name)
    assert torch.equal(logits(again), logits(model))


def test_save_pretrained_pushes_what_it_writes(hub, on_folder, tmp_path):
    on_folder().save_pretrained(tmp_path / "m", push_to_hub="somebody/m")
    written = {p.relative_to(tmp_path / "m").as_posix() for p in (tmp_path / "m").rglob("*.*")}
    assert written == set(hub.repositories["somebody/m"]["main"])


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_a_trainer_pushes_whole_mixtures_between_its_steps_and_at_the_end(hub, on_folder, tmp_path):
    model = on_folder()
    ids = torch.arange(3, 12)
    settings = {"push_to_hub": True, "hub_model_id": "somebody/m", "use_cpu": True}
    settings |= {"max_steps": 3, "save_steps": 2, "learning_rate": 0.1, "disable_tqdm": True}
    rows = [{"input_ids": ids, "labels": ids}]
    trainer = Trainer(
        model.base, TrainingArguments(str(tmp_path / "out"), **settings), train_dataset=rows
    )
    before = logits(model)
    pushed = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            trainer._finish_current_push()
            kept = DyLoRA_MoE.from_pretrained("somebody/m", model.base_name)
            pushed.append((state.global_step, logits(kept), logits(model.eval())))

    trainer.add_callback(Look())
    trainer.train()
    assert [step for step, *_ in pushed] == [2, 3]
    assert all(torch.equal(found, expected) for _, found, expected in pushed)
    with torch.no_grad():
        next(p for _, p in model.named_expert_parameters()).add_(1)
    trainer.push_to_hub()
    found = DyLoRA_MoE.from_pretrained("somebody/m", model.base_name)
    assert torch.equal(logits(found), logits(model))
    assert not torch.equal(logits(model), before)


def test_a_branch_is_made_for_a_push_and_main_stays(hub, on_folder):
    on_folder().push_to_hub("somebody/m", revision="try")
    files = hub.repositories["somebody/m"]
    assert ("config.json" in files["try"], files["main"]) == (True, {})


def test_a_revision_is_the_one_that_is_asked_for(hub, on_folder):
    model = on_folder()
    first = model.push_to_hub("somebody/m").rpartition("/")[2]
    before = logits(model)
    with torch.no_grad():
        for _, parameter in model.named_expert_parameters():
            parameter.add_(0.1)
    model.push_to_hub("somebody/m")
    old = DyLoRA_MoE.from_pretrained("somebody/m", model.base_name, revision=first)
    new = DyLoRA_MoE.from_pretrained("somebody/m", model.base_name)
    assert torch.equal(logits(old), before)
    assert torch.equal(logits(new), logits(model))
    with pytest.raises(FileNotFoundError, match="the hub does not give it"):
        Checkpoint.open("somebody/m", revision="nowhere")


def test_a_second_push_takes_away_what_the_first_had_more(hub, on_folder):
    on_folder().push_to_hub("somebody/m")
    smaller = on_folder(num_experts=2, maturity=[1.0, 0.5])
    smaller.push_to_hub("somebody/m")
    assert not [name for name in hub.repositories["somebody/m"]["main"] if "expert_2/" in name]
    again = DyLoRA_MoE.from_pretrained("somebody/m", smaller.base_name)
    assert len(again.experts) == 2


def test_what_the_hub_changed_is_refused_as_on_the_disk_but_for_the_card(hub, on_folder):
    model = on_folder()
    model.push_to_hub("somebody/m")
    files = hub.repositories["somebody/m"]["main"]
    files["README.md"] += b"\nMy own words.\n"
    files["virus.bin"] = b"never fetched"
    DyLoRA_MoE.from_pretrained("somebody/m", model.base_name)
    assert not [path for path in hub.asked if "virus" in path]
    files["router.safetensors"] = files["router.safetensors"][:-1] + b"\x01"
    with pytest.raises(ValueError, match=r"router\.safetensors has changed since it was written"):
        DyLoRA_MoE.from_pretrained("somebody/m", model.base_name)


def test_a_run_is_pushed_without_what_only_a_resumed_run_needs(hub, make_config, capsys):
    run = train(make_config(max_steps=2))
    assert main(["push", str(run.folder), "somebody/run", "--private"]) == 0
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"{hub.address}/somebody/run/commit/")
    )
    names = set(hub.repositories["somebody/run"]["main"])
    assert not names & set(RESUME_FILES)
    assert {"config.json", "README.md", "tokenizer.json", "tokenizer_config.json"} <= names
    checkpoint = Checkpoint.open("somebody/run")
    verify(checkpoint.path)
    tokenizer = AutoTokenizer.from_pretrained("somebody/run")
    assert tokenizer.get_vocab() == run.tokenizer.get_vocab()
    assert torch.equal(
        logits(DyLoRA_MoE.from_pretrained("somebody/run").eval()), logits(run.model.eval())
    )


def test_one_expert_is_pushed_and_peft_and_import_take_it_by_name(hub, on_folder, tmp_path):
    model = on_folder()
    model.save_pretrained(tmp_path / "m")
    for number, name in enumerate(("zero", "one")):
        argv = ["push", str(tmp_path / "m"), f"somebody/{name}", "--expert", str(number)]
        assert main(argv) == 0
    base = AutoModelForCausalLM.from_pretrained(model.base_name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        in_peft = PeftModel.from_pretrained(base, "somebody/one").eval()
    model.experts.set_active_expert(1)
    found = in_peft(torch.arange(3, 12)[None]).logits
    assert torch.allclose(found, logits(model), atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(model.base_name)
    assert len(load_peft_experts(base, ["somebody/zero", "somebody/one"]).experts) == 2


def test_info_learn_and_a_run_begin_with_a_repository_at_its_revision(hub, on_folder, capsys):
    prompted = {"router_scope": "prompt", "expert_dropout": 0.0}
    first = on_folder(**prompted, num_experts=2, maturity=[1, 1]).push_to_hub("somebody/m")
    first = first.rpartition("/")[2]
    on_folder(**prompted).push_to_hub("somebody/m")
    capsys.readouterr()
    for revision, experts in (([], 3), (["--checkpoint_revision", first], 2)):
        argv = ["--checkpoint", "somebody/m", *revision]
        assert main(["info", *argv]) == 0
        assert f"top 2 of {experts}" in capsys.readouterr().out
        assert main(["learn", *argv, "--source", "skill/sql", "--print_config"]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["moe"]["num_experts"] == experts
        assert len(Checkpoint.open(Path(config["train"]["init_from"])).experts) == experts
    config = load_run_config(None, ["train.init_from=somebody/m"])
    assert config.moe.num_experts == 3
    assert config.train.init_from == "somebody/m"  # no path of this machine is recorded
    model = on_folder(**prompted)
    init_from_checkpoint(model, config.train.init_from, None)
    assert model.training_record["earlier"] == []
    with pytest.raises(FileNotFoundError, match=r"train\.init_from: .* the hub does not give it"):
        load_run_config(None, ["train.init_from=somebody/else"])


def test_a_merged_model_is_pushed_with_its_card(hub, on_folder, tmp_path):
    on_folder().save_pretrained(tmp_path / "m")
    out = str(tmp_path / "out")
    argv = ["export", "--checkpoint", str(tmp_path / "m"), "--merge", "--expert", "0", "--out", out]
    assert main(argv) == 0
    assert main(["push", out, "somebody/merged"]) == 0
    files = hub.repositories["somebody/merged"]["main"]
    assert front_of(files["README.md"].decode())["library_name"] == "transformers"
    merged = AutoModelForCausalLM.from_pretrained("somebody/merged")
    assert torch.isfinite(merged(torch.arange(3, 12)[None]).logits).all()


def test_what_cannot_be_pushed_or_fetched_is_one_line(
    hub, on_folder, tmp_path, capsys, monkeypatch
):
    on_folder().save_pretrained(tmp_path / "m")
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HF_TOKEN", "wrong")
    cases = [
        (["push", str(tmp_path / "m"), "somebody/m"], "cannot be pushed to somebody/m"),
        (["push", str(tmp_path / "none"), "somebody/m"], "none does not exist"),
        (["push", str(tmp_path / "empty"), "somebody/m"], "is no mixture, no adapter and no model"),
        (["push", str(tmp_path / "m")], "USER/NAME is missing"),
        (["info", "--checkpoint", "somebody/else"], "is no folder here, and the hub does not give"),
    ]
    for argv, told in cases:
        assert main(argv) == 2
        err = capsys.readouterr().err
        assert (told in err, err.count("\n")) == (True, 1), err
    assert hub.repositories == {}


def test_a_folder_here_goes_before_the_hub_and_has_no_revision(
    hub, on_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    on_folder().save_pretrained("somebody/m")
    assert Checkpoint.open("somebody/m").path == Path("somebody/m")
    with pytest.raises(ValueError, match="is a folder here, which has no revision main"):
        Checkpoint.open("somebody/m", revision="main")
    assert hub.asked == []


# Cards


def test_the_card_of_a_mixture_says_what_it_is_made_of(on_folder, tmp_path, base_folder):
    model = on_folder()
    model.base_name, model.base_revision = "google/codegemma-2b", "abc123"
    source = {"name": "mine", "path": "somebody/rows", "training_rows": 7, "split_scheme": "90/10"}
    source |= {"training_sha256": "f" * 8}
    model.training_record = {"step": 3, "targets": 99, "seed": 1, "data": {"sources": [source]}}
    model.save_pretrained(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    front = front_of(card)
    assert front["library_name"] == "dylora"
    assert (front["base_model"], front["base_model_relation"]) == ("google/codegemma-2b", "adapter")
    assert front["datasets"] == ["somebody/rows"]
    for told in (
        "abc123",
        model.base_fingerprint["embedding"],
        "| mine | somebody/rows | 7 | 90/10",
    ):
        assert told in card
    maturity = model.maturity.maturity.tolist()
    rows = re.findall(r"^\| (expert_\d) \| active \| 2 \| 4 \| ([\d.]+) ", card, re.M)
    assert [(name, float(value)) for name, value in rows] == [
        (f"expert_{n}", round(value, 3)) for n, value in enumerate(maturity)
    ]
    expert = (tmp_path / "m" / "peft_adapters" / "expert_0" / "README.md").read_text()
    assert front_of(expert)["library_name"] == "peft"


def test_the_code_on_a_card_runs(on_folder, tmp_path):
    model = on_folder()
    model.save_pretrained(tmp_path / "m")
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "m" / "README.md").read_text(), re.S)
    assert len(blocks) == 2
    scope = {"base": AutoModelForCausalLM.from_pretrained(model.base_name)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        for block in blocks:
            exec(block.replace("THIS FOLDER OR REPOSITORY", str(tmp_path / "m")), scope)
    assert isinstance(scope["model"], PeftModel)


def test_a_card_names_the_licence_of_a_base_that_says_it(on_folder, tmp_path, base_folder):
    licensed = tmp_path / "base"
    shutil.copytree(base_folder, licensed)
    (licensed / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    model = on_folder()
    model.base_name = str(licensed)
    model.save_pretrained(tmp_path / "m")
    assert "| licence | apache-2.0 |" in (tmp_path / "m" / "README.md").read_text()


def test_a_name_cannot_break_out_of_its_place_on_a_card(on_folder, tmp_path):
    on_folder().save_pretrained(tmp_path / "m")
    description = json.loads((tmp_path / "m" / "config.json").read_text())
    description["base_model_name_or_path"] = "x | y\n---\nlicense: mit\n<script>"
    card = mixture_card(description)
    assert "license" not in front_of(card)
    assert "\nlicense:" not in card
    assert "<script>" not in card.replace("\\<script\\>", "")


def test_every_exported_folder_has_a_card_and_verifies_when_it_is_edited(on_folder, tmp_path):
    for folder in export_peft(on_folder(), tmp_path / "out"):
        assert "README.md" not in json.loads((folder / "manifest.json").read_text())["files"]
        with (folder / "README.md").open("a") as file:
            file.write("words")
        verify(folder)

"""`run.py export` as a user runs it, on the embedded base."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.base_models import EMBEDDED_BASES, load_base
from dylora.cli.main import main
from dylora.integrations.peft_export import EXPORT_FILE
from dylora.storage.manifest import verify
from dylora.storage.peft_config import CONFIG_FILE
from dylora.storage.safe_io import read_json

BASE = "tiny-code-llama"
CODE = "def mean(values):\n    return sum(values) / len(values)\n"
IDS = torch.tensor([[1, 40, 300, 7, 2000, 15, 9]])
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def random_mixture(**settings) -> DyLoRA_MoE:
    config = MoELoraConfig(**({"num_experts": 3, "r": 2, "lora_alpha": 4} | settings))
    model = DyLoRA_MoE.from_base(BASE, config).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in [*model.named_expert_parameters(), *model.router_parameters()]:
            if not name.endswith("lora_A"):
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "saved"
    random_mixture(use_rslora=True).save_pretrained(folder)
    return folder


@pytest.fixture
def export(checkpoint, tmp_path, capsys):
    """Runs the command to `out`; what it printed."""

    def run(*options: str, code: int = 0) -> str:
        place = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out")]
        assert main(["export", *place, *options]) == code
        out, err = capsys.readouterr()
        return out if code == 0 else err

    return run


@pytest.fixture
def text(tmp_path) -> str:
    file = tmp_path / "code.txt"
    file.write_text(CODE)
    return str(file)


@torch.no_grad()
def static_logits(checkpoint, weights_NE) -> torch.Tensor:
    model = DyLoRA_MoE.from_pretrained(checkpoint).eval()
    logits = model(IDS, routing_weights=weights_NE.expand(*IDS.shape, -1, -1)).logits
    with model.disable_adapters():
        assert (logits - model(IDS).logits).abs().max() > 0.1
    return logits


def test_experts_come_with_what_readers_make_of_them(export, tmp_path):
    printed = export().splitlines()
    assert printed[:3] == [str(tmp_path / "out" / f"expert_{expert}") for expert in range(3)]
    assert [line.split()[:3] for line in printed[3:5]] == [
        ["SGLang", "misreads", "the"],
        ["llama.cpp", "misreads", "the"],
    ]
    assert printed[5] == "no complaint of vLLM"


def test_a_complaint_about_some_experts_names_them(export, tmp_path, checkpoint, capsys):
    random_mixture(expert_ranks=[2, 20, 20]).save_pretrained(tmp_path / "large")
    place = ["--checkpoint", str(tmp_path / "large"), "--out", str(tmp_path / "out")]
    assert main(["export", *place]) == 0
    assert "vLLM needs --max-lora-rank 32 (expert_1, expert_2)" in capsys.readouterr().out


@torch.no_grad()
def test_the_embedded_bases_line_says_what_works(export, tmp_path):
    """Both remedies: the model by hand, and a folder as the name."""
    printed = export("--portable", "--expert", "1")
    assert "peft does not know the base 'tiny-code-llama' by name" in printed
    folder = tmp_path / "out" / "expert_1"
    by_hand = PeftModel.from_pretrained(load_base(BASE), folder).eval()
    named = str(EMBEDDED_BASES[BASE])
    assert f"--base_name {named}" in printed
    assert "peft does not know" not in export("--expert", "1", "--base_name", named, "--overwrite")
    by_name = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert (by_hand(IDS).logits - by_name(IDS).logits).abs().max() < 1e-5


def test_given_weights_need_no_base(export, tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("dylora.model.DyLoRA_MoE", None)
    printed = export("--mixture", "--weights", "0.5,0.3,0.1")
    assert printed.startswith("note: the weights add up to 0.9, not 1, and are used as they are\n")
    assert "no complaint of vLLM, SGLang, llama.cpp" in printed
    verify(tmp_path / "out")


@torch.no_grad()
def test_measured_weights_are_exported_and_what_they_lose_is_said(
    export, tmp_path, checkpoint, text
):
    printed = export("--mixture", "--weights", "measured", "--text", text, "--dtype", "float32")
    assert "mean gates over" in printed
    assert "static against routed: KL " in printed
    record = read_json(tmp_path / "out" / EXPORT_FILE)
    weights_NE = torch.tensor(list(record["weights"].values()))
    assert weights_NE.shape == (6, 3)
    assert (weights_NE[0] - weights_NE[1]).abs().max() > 1e-3
    assert record["text"]["kl"] > 0
    adapted = PeftModel.from_pretrained(load_base(BASE), tmp_path / "out").eval()
    assert (adapted(IDS).logits - static_logits(checkpoint, weights_NE)).abs().max() < 1e-5


def test_given_weights_are_compared_on_a_text(export, tmp_path, text):
    printed = export("--mixture", "--weights", "1,0,0", "--text", text)
    assert "mean gates" not in printed
    assert "static against routed: KL " in printed
    record = read_json(tmp_path / "out" / EXPORT_FILE)
    assert set(map(tuple, record["weights"].values())) == {(1.0, 0.0, 0.0)}
    assert record["text"]["file"] == text


@torch.no_grad()
def test_a_merged_expert_is_a_plain_model_with_its_tokenizer(export, tmp_path, checkpoint):
    export("--merge", "--expert", "2", "--dtype", "float32")
    expected = static_logits(checkpoint, torch.tensor([[0.0, 0.0, 1.0]] * 6))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    # logits of 10 are sums of float32, whose order depends on the threads
    torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode(CODE)
    assert read_json(tmp_path / "out" / EXPORT_FILE)["expert"] == 2
    verify(tmp_path / "out")


def test_a_merged_model_keeps_the_precision_of_its_base(export, tmp_path):
    export("--merge", "--weights", "0.5,0.3,0.2")
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == "float16"
    tied = json.loads((EMBEDDED_BASES[BASE] / "config.json").read_text())["tie_word_embeddings"]
    assert tied is True
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings


def test_fixed_routing_is_merged_without_weights(tmp_path, capsys):
    random_mixture(router_type="fixed").save_pretrained(tmp_path / "saved")
    place = ["--checkpoint", str(tmp_path / "saved"), "--out", str(tmp_path / "out")]
    assert main(["export", *place, "--merge"]) == 0
    weights = read_json(tmp_path / "out" / EXPORT_FILE)["weights"]
    assert weights["model.layers.0.self_attn"] == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--merge", "the routers choose by the token"),
        ("--mixture", "the routers choose by the token"),
        ("--mixture --weights 0.5,0.5", "one value for each of the 3 experts"),
        ("--merge --weights 0.5,-0.5,1", "finite and at least 0"),
        ("--merge --expert 7", "there is no expert 7"),
        ("--expert 7", "has no expert_7"),
        ("--mixture --weights measured --text nowhere.txt", "nowhere.txt: no such file"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(options, message, export, tmp_path):
    assert message in export(*options.split(), code=2)
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_taken_is_refused_before_a_base_is_loaded(export, tmp_path, monkeypatch):
    monkeypatch.setattr("dylora.model.DyLoRA_MoE", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CONFIG_FILE).write_text("somebody else's")
    assert "name another folder" in export("--merge", "--expert", "0", code=2)
    assert (tmp_path / "out" / CONFIG_FILE).read_text() == "somebody else's"

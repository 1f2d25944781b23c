"""Which base is loaded, and whether it is the one that a mixture was trained on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Mxfp4Config
from transformers.quantizers import quantizer_mxfp4

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.base_models import EMBEDDED_BASES, BaseSpec, choose_device, load_base
from dylora.cli.main import main
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.manifest import MANIFEST, write_manifest

BASE = "tiny-code-llama"
CONFIG = MoELoraConfig(num_experts=2, r=2)


@pytest.fixture
def base_folder(tiny_base, tmp_path) -> Path:
    tiny_base("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def saved(base_folder, tmp_path) -> Path:
    DyLoRA_MoE.from_base(str(base_folder), CONFIG).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def edit(folder: Path, **changes) -> None:
    """Change config.json, ... for a key that goes, and let the manifest agree."""
    file = folder / "config.json"
    merged = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in merged.items() if v is not ...}))
    (folder / MANIFEST).unlink()
    write_manifest(folder)


# Names


def test_a_folder_is_kept_by_its_absolute_path(base_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    DyLoRA_MoE.from_base("base", CONFIG).save_pretrained("saved")
    kept = Checkpoint.open("saved").description["base_model_name_or_path"]
    assert kept == str(base_folder)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    DyLoRA_MoE.from_pretrained(tmp_path / "saved")


def test_a_relative_name_is_looked_for_where_it_is_told(base_folder, tmp_path):
    assert BaseSpec.resolve("base", relative_to=tmp_path).name == str(base_folder)
    assert BaseSpec.resolve("some/base").name == "some/base"
    assert BaseSpec.resolve(BASE).name == BASE


@pytest.mark.parametrize("name", ["https://host/x", "~/base", "../base", "a/../../base"])
def test_an_address_or_a_way_out_is_followed_for_a_user_alone(name, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json names the base .* which is not followed"):
        BaseSpec.resolve(name, named_by=tmp_path / "config.json")
    BaseSpec.resolve(name)


def test_a_base_whose_files_lack_weights_is_refused(base_folder):
    file = base_folder / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 weights, among them model\.layers\.1\.mlp\.up"):
        load_base(str(base_folder))


def test_a_base_whose_weights_have_other_shapes_is_refused(base_folder):
    file = base_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 24}))
    with pytest.raises(ValueError, match=r"lack \d+ weights, among them .*mlp"):
        load_base(str(base_folder))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: min(500, file.stat().st_size // 2)])


BROKEN = {  # what is broken in a base's folder
    "config: no JSON": ("config.json", _cut),
    "config: a list": ("config.json", lambda file: file.write_text("[]")),
    "config: a width that is a text": ("config.json", {"hidden_size": "x"}),
    "config: no heads": ("config.json", {"num_attention_heads": 0}),
    "config: an unknown family": ("config.json", {"model_type": "nothing"}),
    "weights: cut off": ("model.safetensors", _cut),
    "weights: empty": ("model.safetensors", lambda file: file.write_bytes(b"")),
    "weights: none": ("model.safetensors", Path.unlink),
    "tokenizer: no JSON": ("tokenizer.json", _cut),
    "tokenizer: without its parts": ("tokenizer.json", lambda file: file.write_text("{}")),
    "tokenizer: settings cut off": ("tokenizer_config.json", _cut),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_of_a_base_is_one_line(name, tmp_path):
    shutil.copytree(EMBEDDED_BASES[BASE], tmp_path / "base")
    part, damage = BROKEN[name]
    file = tmp_path / "base" / part
    if isinstance(damage, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | damage))
    else:
        damage(file)
    spec = BaseSpec.resolve(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"cannot load the (model|tokenizer) .*base' \(") as error:
        spec.tokenizer() if name.startswith("tokenizer") else spec.load()
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel, lambda base: 5])
def test_a_wrapped_model_is_no_base_and_that_is_said(tiny_base, wrap):
    with pytest.raises(ValueError, match=r"base is a \w+, but must be a name.*unwrap it first"):
        DyLoRA_MoE.from_base(wrap(tiny_base("llama")), CONFIG)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_peft_model_is_no_base_and_that_is_said(tiny_base):
    wrapped = get_peft_model(tiny_base("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"base is a PeftModel, .*unwrap it first"):
        DyLoRA_MoE.from_base(wrapped, CONFIG)


# Fingerprints


def test_a_base_in_mxfp4_is_asked_for_dequantised_and_learns(tiny_base, tmp_path, ids, monkeypatch):
    tiny_base("gpt_oss").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    stored = {"quantization_config": {"quant_method": "mxfp4"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | stored))
    asked, kind = [], quantizer_mxfp4.Mxfp4HfQuantizer
    note = lambda self, **kwargs: asked.append(self.quantization_config.dequantize)  # noqa: E731
    monkeypatch.setattr(kind, "validate_environment", note)
    model = DyLoRA_MoE.from_base(str(tmp_path), MoELoraConfig(num_experts=2, r=2))
    assert asked == [True]
    model(ids, labels=ids).loss.backward()
    assert next(p for _, p in model.named_expert_parameters()).grad is not None


def test_a_base_that_lets_no_gradient_pass_is_refused_by_its_method(tiny_base):
    base = tiny_base("gpt_oss")
    base.hf_quantizer = quantizer_mxfp4.Mxfp4HfQuantizer(Mxfp4Config(), pre_quantized=True)
    with pytest.raises(ValueError, match="quantised as mxfp4, through which no gradient passes"):
        DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=2, r=2))


def test_a_base_of_another_vocabulary_is_refused(tiny_base, tmp_path):
    base = tiny_base("llama")
    base.resize_token_embeddings(70, mean_resizing=False)
    DyLoRA_MoE.from_base(base, CONFIG).save_pretrained(tmp_path / "saved")
    other = tiny_base("llama")
    with pytest.raises(ValueError, match=r"another base \(vocabulary 70, here \d+.*--allow_other"):
        DyLoRA_MoE.from_pretrained(tmp_path / "saved", other)
    assert not hasattr(other, "dylora_state")
    model = DyLoRA_MoE.from_pretrained(tmp_path / "saved", other, allow_other_base=True)
    assert model.base_fingerprint["vocabulary"] != 70


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("model.embed_tokens", "embedding"),
        ("model.layers.1.self_attn.o_proj", "projections"),
    ],
)
def test_a_base_of_other_weights_is_refused(path, what, saved, base_folder):
    base = load_base(str(base_folder))
    with torch.no_grad():
        base.get_submodule(path).weight.mul_(1.02)
    with pytest.raises(ValueError, match=rf"written for another base \(another {what}\)"):
        DyLoRA_MoE.from_pretrained(saved, base)


def test_a_base_of_other_positions_is_refused(saved, base_folder):
    file = base_folder / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123.0}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="another rotary"):
        DyLoRA_MoE.from_pretrained(saved)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_the_same(trained, used, base_folder, tmp_path):
    model = DyLoRA_MoE.from_base(str(base_folder), CONFIG, dtype=trained)
    model.save_pretrained(tmp_path / "saved")
    assert DyLoRA_MoE.from_pretrained(tmp_path / "saved", dtype=used).base.dtype == used


def test_a_checkpoint_without_a_fingerprint_still_loads(saved):
    edit(saved, base_fingerprint=...)
    assert len(DyLoRA_MoE.from_pretrained(saved).experts) == CONFIG.num_experts


@pytest.mark.parametrize(
    "change",
    [
        lambda kept: 3,
        lambda kept: {},
        lambda kept: {"vocabulary": 3},
        lambda kept: kept | {"more": 3},
        lambda kept: kept | {"vocabulary": "many"},
        lambda kept: kept | {"embedding": ["x"]},
    ],
)
def test_a_fingerprint_of_another_form_is_refused(change, saved):
    edit(saved, base_fingerprint=change(Checkpoint.open(saved).description["base_fingerprint"]))
    with pytest.raises(ValueError, match=r"config\.json: base_fingerprint"):
        DyLoRA_MoE.from_pretrained(saved)


def test_another_tokenizer_than_in_training_is_refused(tmp_path):
    model = DyLoRA_MoE.from_base(BASE, CONFIG)
    model.base_fingerprint["tokenizer"] = "0" * 64
    model.save_pretrained(tmp_path / "saved")
    checkpoint = Checkpoint.open(tmp_path / "saved")
    spec = checkpoint.base_spec()
    with pytest.raises(ValueError, match=r"written for another base \(another tokenizer\)"):
        checkpoint.tokenizer(spec)
    checkpoint = Checkpoint.open(tmp_path / "saved", allow_other_base=True)
    assert checkpoint.tokenizer(spec).encode("x")


def test_loading_and_saving_keeps_the_tokenizers_fingerprint(tmp_path):
    model = DyLoRA_MoE.from_base(BASE, CONFIG)
    model.base_fingerprint["tokenizer"] = "1" * 64
    model.save_pretrained(tmp_path / "saved")
    assert DyLoRA_MoE.from_pretrained(tmp_path / "saved").base_fingerprint["tokenizer"] == "1" * 64


def test_embedded_bases_are_folders_of_the_package(tmp_path):
    copy = Path(shutil.copytree(EMBEDDED_BASES[BASE], tmp_path / "copy"))
    assert BaseSpec.resolve(BASE).source == str(EMBEDDED_BASES[BASE])
    assert BaseSpec.resolve(str(copy)).source == str(copy)


def test_a_command_refuses_another_base_unless_it_is_told_to_take_it(saved, base_folder, capsys):
    weights = load_file(base_folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 1.02
    save_file(weights, base_folder / "model.safetensors", metadata={"format": "pt"})
    command = ["validate", "--checkpoint", str(saved), "--device", "cpu", "--tokens", "8"]
    assert main(command) == 2
    assert "written for another base (another embedding)" in capsys.readouterr().err
    assert main([*command, "--allow_other_base"]) == 0


@pytest.mark.parametrize("setting", ["model.device", "device"])
@pytest.mark.parametrize("name", ["gpu", "meta:x", "mtia"])
def test_a_device_that_is_not_there_is_refused_by_the_setting_that_named_it(name, setting):
    with pytest.raises(ValueError, match=rf"^{setting} is '{name}'"):
        choose_device(name, setting)

"""Adapters made elsewhere are recognised by their files and read strictly."""

import json
import os
import time
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import harm
from dylora.fields import shown
from dylora.storage.detect import detect_format, find_adapters
from dylora.storage.peft_config import alpha_of
from dylora.storage.peft_format import read_stock_adapter
from peft_folders import make_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}.lora_A.weight"


@pytest.fixture(scope="module")
def made(tiny_base, tmp_path_factory):
    """An adapter of peft's, its tensors and its configuration."""
    folder = tmp_path_factory.mktemp("made")
    make_adapter(tiny_base("llama"), folder, target_modules=["q_proj", "v_proj"])
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


@pytest.fixture
def written(made, tmp_path):
    """Writes that adapter with other settings, tensors added or changed, None leaving one out."""

    def write(settings=None, tensors=None, name="a"):
        kept, config = made
        folder = tmp_path / name
        folder.mkdir()
        merged = {k: v for k, v in (kept | (tensors or {})).items() if v is not None}
        save_file(merged, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(config | (settings or {})))
        return folder

    return write


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', not LORA"),
        ({"r": 0}, "r is 0, but must be a whole number from 1 to 65,536"),
        ({"r": True}, "r is True"),
        ({"r": 5}, r"A \[4, 32\] and lora_B \[32, 4\], but the rank is 5"),
        ({"lora_alpha": -1}, "lora_alpha is -1, but must be a number above 0 and at most"),
        ({"lora_alpha": "6"}, "lora_alpha is '6'"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern .* does not map names to a whole number"),
        ({"alpha_pattern": {"(q|v)_proj": 4}}, "names '\\(q|v\\)_proj', a regular expression"),
        ({"bias": "all"}, "bias 'all' changes biases that no gate could undo"),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save is not supported: it makes",
        ),
        ({"lora_bias": True}, "lora_bias is not supported: it makes more of it than a LoRA"),
        ({"kasa_config": {}}, "kasa_config is not supported: it makes more of it than a LoRA"),
        (
            {"trainable_token_indices": [1]},
            "trainable_token_indices is not supported",
        ),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3, but must be a name"),
        ({"target_modules": ["q_proj"]}, "v_proj is none of the target_modules of"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "names 'o_proj', but .* has none"),
        ({"use_dora": True}, "has a DoRA magnitude or matrices alone"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused(settings, message, written):
    with pytest.raises(ValueError, match=message) as error:
        read_stock_adapter(written(settings))
    assert "adapter_config.json" in str(error.value) or "adapter_model" in str(error.value)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
def test_a_setting_that_cannot_be_guessed_must_be_there(key, written):
    folder = written()
    config = json.loads((folder / "adapter_config.json").read_text())
    del config[key]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"'{key}' is missing, and its value cannot be guessed"):
        read_stock_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (KEY, torch.full((4, 32), float("nan")), "holds values that are not finite"),
        (KEY, torch.ones(4, 32, dtype=torch.int64), "is of type I64"),
        (KEY, torch.ones(4, 32, 1), r"has shape \[4, 32, 1\], not 2 dimensions"),
        (KEY, torch.ones(3, 32), r"A \[3, 32\] and lora_B \[32, 4\]"),
        (KEY, None, "q_proj has lora_B alone"),
        (f"base_model.model.{Q}.weight", torch.ones(2, 2), "is not a part of the adapter"),
        (f"base_model.model.{Q}.bias", torch.ones(32), "is not a part of the adapter"),
        (f"{Q}.lora_A.weight", torch.ones(4, 32), r"is not base_model\.model\.<path of a tensor>"),
        (KEY.replace(".weight", ".default.weight"), torch.ones(4, 32), "appears twice"),
        (
            "base_model.model.model.layers.0.self_attn.k_proj.lora_A.other.weight",
            torch.ones(4, 32),
            r"holds several adapters \(None, other\)",
        ),
        (
            "base_model.model.model.embed_tokens.lora_embedding_A",
            torch.ones(4, 40),
            "adapts an embedding",
        ),
    ],
)
def test_a_tensor_that_does_not_belong_is_refused(key, value, message, written):
    with pytest.raises(ValueError, match=message) as error:
        read_stock_adapter(written(tensors={key: value}))
    assert "adapter_model.safetensors" in str(error.value)


def test_biases_must_belong_to_what_is_adapted(written):
    folder = written({"bias": "lora_only"}, {"base_model.model.model.norm.bias": torch.ones(32)})
    with pytest.raises(ValueError, match=r"model\.norm has a bias, but is not adapted"):
        read_stock_adapter(folder)


def test_names_of_patterns_are_the_ends_of_paths_or_whole_ones(written):
    adapter = read_stock_adapter(
        written({"alpha_pattern": {f"^{Q}$": 7, r"layers\.1\.self_attn\.q_proj": 9, "^v_proj": 5}})
    )
    assert {path: alpha_of(adapter.config, path) for path in adapter.weights} == {
        Q: 7,
        Q.replace("0", "1"): 9,
        Q.replace("q_", "v_"): 6,
        Q.replace("0", "1").replace("q_", "v_"): 6,
    }


def test_a_pattern_of_target_modules_is_never_run(written):
    begun = time.process_time()
    adapter = read_stock_adapter(written({"target_modules": "(.*)*(.*)*(.*)*x"}))
    assert (adapter.targets, len(adapter.weights)) == (None, 4)
    assert time.process_time() - begun < 5


# The pickled form


def as_pickle(folder, content):
    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin")
    return folder


class Attack:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_a_pickle_that_would_run_something_is_refused(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = as_pickle(written(), {KEY: Attack()})
    with pytest.raises(
        ValueError, match=r"adapter_model\.bin: not a readable file of plain tensors"
    ):
        read_stock_adapter(folder)
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds a list, not tensors by name"),
        ({KEY: 3.0}, "is no plain, dense tensor"),
        ({KEY: torch.ones(2, 2).to_sparse()}, "not a readable file of plain tensors"),
        ({}, "holds no tensors"),
    ],
)
def test_a_pickle_of_other_things_is_refused(content, message, written):
    with pytest.raises(ValueError, match=message):
        read_stock_adapter(as_pickle(written(), content))


def test_a_cut_pickle_is_refused_by_its_name(written, made):
    folder = as_pickle(written(), made[0])
    file = folder / "adapter_model.bin"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"adapter_model\.bin: not a readable file of plain tensors"
    ):
        read_stock_adapter(folder)


def compressed(file):
    """The same records, deflated: such a file can unfold to any size."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def a_pipe(file):
    file.unlink()
    os.mkfifo(file)


@pytest.mark.parametrize(
    ("damage", "words"), [(compressed, "are compressed"), (a_pipe, "is a pipe")]
)
def test_a_pickle_without_bounds_is_refused_before_it_is_loaded(damage, words, written, made):
    folder = as_pickle(written(), made[0])
    damage(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=words):
        read_stock_adapter(folder)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (harm.shared_lists, "unfolds to more than 4 times its size"),
        (harm.tuples_for_a_key, "refers to one tuple twice"),
        (harm.one_number, "unfolds to more than 4 times its size"),
    ],
)
def test_a_pickle_that_unfolds_to_more_than_its_file_is_refused(damage, words, written, made):
    folder = as_pickle(written(), made[0])
    damage(folder / "adapter_model.bin")
    message = harm.refusal(lambda: read_stock_adapter(folder), folder)
    assert message.startswith(f"{folder / 'adapter_model.bin'}: ")
    assert words in message


def test_a_value_that_unfolds_without_end_is_shown_at_once():
    shared = [1]
    for _ in range(40):
        shared = [shared] * 8
    begun = time.process_time()
    assert shown(shared).startswith("[[[[[[")
    assert time.process_time() - begun < 1


def test_a_pickle_of_half_precision_parameters_is_read(written, made):
    parameters = {key: torch.nn.Parameter(value.bfloat16()) for key, value in made[0].items()}
    adapter = read_stock_adapter(as_pickle(written(), parameters))
    assert len(adapter.weights) == 4


def test_safetensors_go_before_a_pickle(written):
    folder = written()
    (folder / "adapter_model.bin").write_bytes(b"never opened")
    assert len(read_stock_adapter(folder).weights) == 4


# What a folder holds


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("files", "kind", "adapters"),
    [
        (["adapter_config.json"], "adapter", ["."]),
        (["adapter_model.bin"], "adapter", ["."]),
        (["adapter_config.json", "model.safetensors"], "adapter", ["."]),
        (
            [f"{name}/adapter_config.json" for name in ("expert_10", "expert_2", "other")],
            "adapters",
            ["expert_2", "expert_10", "other"],
        ),
        (
            ["peft_adapters/expert_0/expert_0/adapter_config.json", "dylo_moe_state/router.pt"],
            "older mixture",
            ["peft_adapters/expert_0/expert_0"],
        ),
        (
            ["peft_adapters/expert_0/adapter_config.json", "router.safetensors", "config.json"],
            "older mixture",
            ["peft_adapters/expert_0"],
        ),
        (
            ["peft_adapters/expert_0/adapter_config.json", "pytorch_model-00001-of-00002.bin"],
            "adapters",
            ["peft_adapters/expert_0"],
        ),
        (
            ["peft_adapters/expert_0/adapter_config.json", "manifest.json", "router.safetensors"],
            "mixture",
            ["peft_adapters/expert_0"],
        ),
        (["model-00001-of-00002.safetensors", "dylo_moe_state/router.pt"], "whole model", []),
        (["pytorch_model.bin"], "whole model", []),
    ],
)
def test_a_folder_is_recognised_by_its_files(files, kind, adapters, tmp_path):
    touch(tmp_path, *files)
    found = detect_format(tmp_path)
    assert found.kind == kind
    assert found.adapters == [tmp_path / name for name in adapters]


def test_the_folder_of_the_adapters_is_as_good_as_the_one_around_it(tmp_path):
    touch(tmp_path, "peft_adapters/expert_0/adapter_config.json", "dylo_moe_state/router.pt")
    assert detect_format(tmp_path / "peft_adapters") == detect_format(tmp_path)


def test_a_mixture_of_ours_that_lost_its_manifest_is_no_older_one(tmp_path):
    touch(tmp_path, "peft_adapters/expert_0/adapter_config.json", "router.safetensors")
    (tmp_path / "config.json").write_text('{"format_version": 2}')
    assert detect_format(tmp_path).kind == "mixture"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("readme.md", r"neither adapter_config\.json nor peft_adapters/ in it"),
        ("peft_adapters/expert_0.pt", r"expert_0\.pt is a pickle without an adapter_config\.json"),
    ],
)
def test_a_folder_without_adapters_is_refused_with_what_is_missing(file, message, tmp_path):
    touch(tmp_path, file)
    with pytest.raises(ValueError, match=message):
        find_adapters(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        find_adapters(tmp_path / "nowhere")

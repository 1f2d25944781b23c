"""The adapter files we write are peft's own, and those we read are checked strictly."""

import copy
import json
import os

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dylora.storage.peft_config import CONFIG_FILE, adapter_config, scaling_of
from dylora.storage.peft_format import (
    WEIGHTS_FILE,
    PeftAdapter,
    portable_form,
    read_adapter,
    write_adapter,
)

FAMILIES = ("llama", "gemma", "qwen3", "gpt2", "gpt_neox", "phi3", "falcon")
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def key(path, matrix):
    """The name of a matrix in PEFT's files."""
    return f"base_model.model.{path}.lora_{matrix}.weight"


@pytest.fixture
def adapter():
    """A plain LoRA of rank 3 on two projections."""
    draw = torch.Generator().manual_seed(5)

    def matrix(*shape):
        return torch.randn(shape, generator=draw)

    config = adapter_config(
        r=3, lora_alpha=5, target_modules=["q_proj", "k_proj"], base_model_name_or_path="some/base"
    )
    return PeftAdapter(config, {Q: (matrix(3, 8), matrix(6, 3)), K: (matrix(3, 8), matrix(4, 3))})


@pytest.fixture
def folder(adapter, tmp_path):
    """That LoRA on disk."""
    write_adapter(tmp_path / "adapter", adapter)
    return tmp_path / "adapter"


@pytest.fixture
def stock(tiny_base, mixture_on, tmp_path):
    """Builds the same plain LoRA by us and by peft: folders (ours, theirs)."""

    def build(family, **settings):
        base = tiny_base(family)
        base.name_or_path = base.config.name_or_path = "some/base"
        ours = mixture_on(base, use_moe_routing=False, num_experts=1, lora_dropout=0.1, **settings)
        ours.save_pretrained(tmp_path / "ours")
        folder = tmp_path / "ours" / "peft_adapters" / "expert_0"
        written = json.loads((folder / CONFIG_FILE).read_text())
        config = LoraConfig(
            r=3,
            lora_alpha=5,
            lora_dropout=0.1,
            target_modules=written["target_modules"],
            fan_in_fan_out=family == "gpt2",
            task_type="CAUSAL_LM",
            **settings,
        )
        theirs = get_peft_model(copy.deepcopy(base), config)
        theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
        return folder, tmp_path / "theirs"

    return build


pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


# What we write


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_our_configuration_has_the_value_that_peft_writes(family, use_rslora, stock):
    ours, theirs = (
        json.loads((folder / CONFIG_FILE).read_text())
        for folder in stock(family, use_rslora=use_rslora)
    )
    theirs["target_modules"].sort()  # a set in peft
    assert ours == {name: theirs.get(name, "absent") for name in ours}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_have_the_names_shapes_and_precision_of_peft(family, stock):
    ours, theirs = (
        {name: (t.shape, t.dtype) for name, t in load_file(folder / WEIGHTS_FILE).items()}
        for folder in stock(family)
    )
    assert ours == theirs


def test_tensor_names_are_spelt_out(folder):
    """The other tests compare with peft; this one holds both to the names of FORMATS."""
    assert set(load_file(folder / WEIGHTS_FILE)) == {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
        "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight",
    }


def test_peft_reads_our_configuration_and_means_the_same(folder):
    config = PeftConfig.from_pretrained(folder)  # unknown keys warn, and warnings are errors here
    assert isinstance(config, LoraConfig)
    found = (config.r, config.lora_alpha, config.target_modules, config.use_rslora, config.bias)
    assert found == (3, 5, {"q_proj", "k_proj"}, False, "none")


def test_configuration_keys_are_sorted(folder):
    keys = list(json.loads((folder / CONFIG_FILE).read_text()))
    assert keys == sorted(keys)


def test_a_whole_alpha_is_written_as_an_integer():
    """peft declares lora_alpha an int, and so do vLLM and llama.cpp."""
    config = adapter_config(
        r=4, lora_alpha=32.0, target_modules=["q_proj"], base_model_name_or_path=None
    )
    assert json.dumps(config["lora_alpha"]) == "32"


def test_safetensors_carry_the_format_of_pytorch(folder):
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_are_float32_whatever_the_base_is(tiny_base, mixture_on, tmp_path):
    base = tiny_base("llama").to(torch.bfloat16)
    mixture_on(base).save_pretrained(tmp_path / "saved")
    tensors = load_file(tmp_path / "saved" / "peft_adapters" / "expert_0" / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_other_precisions_are_written_as_float32(adapter, tmp_path):
    halves = {path: (A.half(), B.bfloat16()) for path, (A, B) in adapter.weights.items()}
    write_adapter(tmp_path, PeftAdapter(adapter.config, halves))
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("gpt2", ["attn.c_proj", "c_attn"]),
        ("gpt_neox", ["dense", "query_key_value"]),
        ("phi3", ["o_proj", "qkv_proj"]),
    ],
)
def test_target_modules_are_as_short_as_they_can_be(
    family, targets, tiny_base, mixture_on, tmp_path
):
    mixture_on(tiny_base(family)).save_pretrained(tmp_path / "saved")
    config = read_adapter(tmp_path / "saved" / "peft_adapters" / "expert_0").config
    assert config["target_modules"] == targets


@pytest.mark.parametrize("family", FAMILIES)
def test_fan_in_fan_out_marks_conv1d_alone(family, tiny_base, mixture_on, tmp_path):
    mixture_on(tiny_base(family)).save_pretrained(tmp_path / "saved")
    config = read_adapter(tmp_path / "saved" / "peft_adapters" / "expert_0").config
    assert config["fan_in_fan_out"] is (family == "gpt2")


# What we read


def test_an_adapter_is_read_as_it_was_written(adapter, folder):
    found = read_adapter(folder)
    assert found.config == adapter.config
    assert found.weights.keys() == adapter.weights.keys()
    for path, pair in adapter.weights.items():
        assert all(map(torch.equal, found.weights[path], pair))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_peft_saved_is_read(family, stock):
    _, theirs = stock(family)
    found, tensors = read_adapter(theirs), load_file(theirs / WEIGHTS_FILE)
    read = {key(path, "A"): A for path, (A, _) in found.weights.items()}
    read |= {key(path, "B"): B for path, (_, B) in found.weights.items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_the_portable_form_is_the_same_update_at_scale_one(adapter):
    config = adapter.config | {"use_rslora": True}
    folded = portable_form(PeftAdapter(config, adapter.weights))
    assert scaling_of(folded.config) == 1
    for path, (A, B) in adapter.weights.items():
        expected = 5 / 3**0.5 * (B.double() @ A.double())
        update = folded.weights[path][1].double() @ folded.weights[path][0].double()
        torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-6)


BROKEN_TENSORS = {
    "A missing": lambda t: t.pop(key(Q, "A")),
    "B missing": lambda t: t.pop(key(Q, "B")),
    "no tensor at all": lambda t: t.clear(),
    "A of another rank": lambda t: t.update({key(Q, "A"): torch.ones(2, 8)}),
    "B of another rank": lambda t: t.update({key(Q, "B"): torch.ones(6, 2)}),
    "A and B of another rank than r": lambda t: t.update(
        {key(Q, "A"): torch.ones(2, 8), key(Q, "B"): torch.ones(6, 2)}
    ),
    "A transposed": lambda t: t.update({key(Q, "A"): torch.ones(8, 3)}),
    "base weight": lambda t: t.update({f"base_model.model.{Q}.weight": torch.ones(6, 8)}),
    "base weight of peft": lambda t: t.update(
        {f"base_model.model.{Q}.base_layer.weight": torch.ones(6, 8)}
    ),
    "bias": lambda t: t.update({f"base_model.model.{Q}.base_layer.bias": torch.ones(6)}),
    "bias of B": lambda t: t.update({f"base_model.model.{Q}.lora_B.bias": torch.ones(6)}),
    "magnitude of DoRA": lambda t: t.update(
        {f"base_model.model.{Q}.lora_magnitude_vector": torch.ones(6)}
    ),
    "adapter name in the key": lambda t: t.update(
        {f"base_model.model.{Q}.lora_A.default.weight": t.pop(key(Q, "A"))}
    ),
    "no prefix": lambda t: t.update({f"{Q}.lora_A.weight": t.pop(key(Q, "A"))}),
    "embedding": lambda t: t.update(
        {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(3, 8)}
    ),
    "text around the key": lambda t: t.update({f"x{key(Q, 'A')}x": t.pop(key(Q, "A"))}),
    "NaN": lambda t: t[key(Q, "A")][1, 2].fill_(torch.nan),
    "infinity": lambda t: t[key(Q, "B")][1, 2].fill_(-torch.inf),
    "one dimension": lambda t: t.update({key(Q, "A"): torch.ones(24)}),
    "three dimensions": lambda t: t.update({key(Q, "A"): torch.ones(3, 8, 1)}),
}


@pytest.mark.parametrize("kind", BROKEN_TENSORS)
def test_broken_tensors_are_refused_with_the_name_of_their_file(kind, folder):
    file = folder / WEIGHTS_FILE
    tensors = load_file(file)
    BROKEN_TENSORS[kind](tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        read_adapter(folder)
    assert str(file) in str(error.value)


BROKEN_CONFIGS = {
    "other peft_type": {"peft_type": "LOHA"},
    "no peft_type": {"peft_type": ...},
    "no r": {"r": ...},
    "no lora_alpha": {"lora_alpha": ...},
    "no target_modules": {"target_modules": ...},
    "a rank that is no number": {"rank_pattern": {"q_proj": "8"}},
    "an alpha that is not finite": {"alpha_pattern": {"q_proj": float("inf")}},
    "patterns that are no map": {"alpha_pattern": [1]},
    "a regular expression": {"alpha_pattern": {r"(a+)+\.q_proj": 8}},
    "a bias nobody knows": {"bias": "some"},
    "modules to save": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", BROKEN_CONFIGS)
def test_broken_configurations_are_refused_with_the_name_of_their_file(kind, folder):
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text()) | BROKEN_CONFIGS[kind]
    file.write_text(json.dumps({name: v for name, v in config.items() if v is not ...}))
    with pytest.raises(ValueError) as error:
        read_adapter(folder)
    assert str(file) in str(error.value)


NOT_PLAIN = {
    "principal values taken from the base": {"init_lora_weights": "pissa"},
    "the same by a fast method": {"init_lora_weights": "pissa_niter_4"},
    "QR taken from the base": {"init_lora_weights": "olora"},
    "directions of the data taken from the base": {"init_lora_weights": "corda"},
    "quantised base": {"init_lora_weights": "loftq"},
    "repeated layers": {"layer_replication": [[0, 1], [0, 1]]},
    "active after some tokens only": {"alora_invocation_tokens": [5, 6]},
    "cleared base": {"kasa_config": {}},
}


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_lora_that_is_more_than_its_tensors_is_refused(kind, folder):
    """From the same A and B, peft 0.21 computes something else with each of these, or nothing."""
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | NOT_PLAIN[kind]))
    with pytest.raises(ValueError) as error:
        read_adapter(folder)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("value", [5, True, "x", {}])
def test_an_option_that_nobody_knows_is_refused_unless_it_is_unset(value, folder):
    file = folder / CONFIG_FILE
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"use_tomorrow": False, "tomorrow": None}))
    read_adapter(folder)
    file.write_text(json.dumps(config | {"use_tomorrow": value}))
    with pytest.raises(ValueError, match=r"use_tomorrow'? is .*, which is not known: remove it"):
        read_adapter(folder)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"rank_pattern": {"q_proj": 8}}])
def test_tensors_that_do_not_fit_the_configuration_are_refused(change, folder):
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError) as error:
        read_adapter(folder)
    assert str(folder / WEIGHTS_FILE) in str(error.value)


@pytest.mark.parametrize("value", [None, "5", float("nan"), float("inf"), [5]])
@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_rank_and_alpha_that_are_no_numbers_are_refused(name, value, folder):
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError) as error:
        read_adapter(folder)
    assert str(folder) in str(error.value)


def test_a_rank_of_zero_is_refused(folder):
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 0}))
    empty = {key(Q, "A"): torch.ones(0, 8), key(Q, "B"): torch.ones(6, 0)}
    save_file(empty, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError) as error:
        read_adapter(folder)
    assert str(folder) in str(error.value)


BROKEN_JSON = {
    "empty": b"",
    "cut short": b'{"peft_type": "LORA", "r": ',
    "garbage": b"\x00\xff\xfe{}",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "nested without end": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_a_configuration_that_is_no_json_object_is_refused_with_its_name(kind, folder):
    (folder / CONFIG_FILE).write_bytes(BROKEN_JSON[kind])
    with pytest.raises(ValueError) as error:
        read_adapter(folder)
    assert str(folder / CONFIG_FILE) in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_safetensors_file_is_refused_with_its_name(share, folder):
    file = folder / WEIGHTS_FILE
    os.truncate(file, int(share * file.stat().st_size))
    with pytest.raises(ValueError) as error:
        read_adapter(folder)
    assert str(file) in str(error.value)


def test_a_pickle_under_the_name_of_safetensors_is_refused(adapter, folder):
    torch.save(adapter.weights, folder / WEIGHTS_FILE)
    with pytest.raises(ValueError) as error:
        read_adapter(folder)
    assert str(folder / WEIGHTS_FILE) in str(error.value)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as error:
        read_adapter(folder)
    assert str(folder / name) in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_adapter(tmp_path / "absent")
    assert str(tmp_path / "absent") in str(error.value)

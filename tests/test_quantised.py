"""Experts on a base whose linear layers are quantised; all of it on the CPU."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora import base_models as bases_module
from dylora.base_models import BaseSpec, load_base
from dylora.cli.main import main
from dylora.storage.tensors import read_tensors

for package in ("accelerate", "bitsandbytes", "torchao"):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install 'dylora[quant]'")

KINDS = ("bnb-4bit", "bnb-8bit", "torchao-int8")
DTYPES = ("float32", "bfloat16")
EXACT = {("bnb-4bit", "float32"), ("torchao-int8", "float32")}  # the same numbers, made whole
EMBEDDED = "tiny-code-llama"


@pytest.fixture(scope="module")
def folder(llama, tmp_path_factory) -> str:
    """A tiny Llama on disk, wide enough for a whole block of 64 quantised values a row."""
    path = tmp_path_factory.mktemp("base")
    llama(hidden_size=64, initializer_range=0.1).save_pretrained(path)
    return str(path)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def quantised(folder, kind) -> Callable[..., PreTrainedModel]:
    """The tiny Llama, quantised; equal calls, equal weights."""
    return lambda dtype="float32": load_base(folder, quantization=kind, dtype=getattr(torch, dtype))


@pytest.fixture
def experts_on() -> Callable[[PreTrainedModel], DyLoRA_MoE]:
    """Random experts and routers on a base, the same at every call."""

    def build(base: PreTrainedModel) -> DyLoRA_MoE:
        model = DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=3, r=2, lora_alpha=4))
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in [*model.named_expert_parameters(), *model.router_parameters()]:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
        return model

    return build


def plain_tensors(value: Tensor) -> list[Tensor]:
    """What a tensor consists of: a torchao one of several, with their bytes."""
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()
        return [part for name in names for part in plain_tensors(getattr(value, name))]
    return [value.detach()]


def stored_bytes(base: PreTrainedModel) -> int:
    return sum(part.nbytes for value in base.parameters() for part in plain_tensors(value))


def base_hash(base: PreTrainedModel) -> str:
    """Of every byte of the base's weights, its codes and their scales included."""
    digest = hashlib.sha256()
    for name, value in base.state_dict().items():
        if "dylora" not in name and isinstance(value, Tensor):
            for part in plain_tensors(value):
                digest.update(name.encode() + part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# Loading


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_quantised_base_is_smaller_frozen_and_close_to_the_whole_one(folder, kind, dtype, ids):
    whole = load_base(folder, dtype=getattr(torch, dtype))
    base = load_base(folder, quantization=kind, dtype=getattr(torch, dtype))
    assert stored_bytes(base) < 0.9 * stored_bytes(whole)  # embeddings and head stay whole
    assert not base.training
    assert not any(parameter.requires_grad for parameter in base.parameters())
    ours, theirs = base(ids).logits, whole(ids).logits
    assert not torch.equal(ours, theirs)
    assert ours.dtype == getattr(torch, dtype)
    error = (ours - theirs).float().norm() / theirs.float().norm()
    # Wide weights amplify what rounding does; unrelated logits would be 1.4 apart.
    assert error < (0.4 if kind == "bnb-4bit" else 0.05)


def test_the_head_stays_whole(quantised, folder):
    assert torch.equal(quantised().lm_head.weight, load_base(folder).lm_head.weight)


@pytest.mark.parametrize(
    ("kind", "package"),
    [("bnb-4bit", "bitsandbytes"), ("bnb-8bit", "bitsandbytes"), ("torchao-int8", "torchao")],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(
    folder, kind, package, monkeypatch
):
    installed = bases_module.find_spec
    monkeypatch.setattr(
        bases_module, "find_spec", lambda name: None if name == package else installed(name)
    )
    with pytest.raises(ValueError, match=rf"needs {package}: pip install 'dylora\[quant\]'") as e:
        load_base(folder, quantization=kind)
    assert len(str(e.value).splitlines()) == 1


def test_a_base_without_a_layer_that_torchao_quantises_is_refused(gpt2, tmp_path):
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"torchao quantises nn\.Linear alone"):
        load_base(str(tmp_path), quantization="torchao-int8")


# bitsandbytes on a CPU that multiplies bfloat16; the layers ask once, when they are made


@pytest.fixture
def four_bits(folder, monkeypatch) -> Callable[[], PreTrainedModel]:
    """A 4-bit base as such a CPU has it, loaded by transformers and not by us."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)

    def load() -> PreTrainedModel:
        settings = bases_module.quantization_config("bnb-4bit", torch.float32)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=settings, device_map="cpu", dtype=torch.float32
        ).eval()

    return load


@pytest.mark.parametrize("ours", [True, False])
def test_no_pass_packs_a_4_bit_base_anew(folder, four_bits, experts_on, ids, ours):
    base = load_base(folder, quantization="bnb-4bit") if ours else four_bits()
    with pytest.raises(AssertionError, match="block_n"), torch.no_grad():
        four_bits()(ids)  # what it is kept from: its 16 rows of v_proj cannot be packed
    model = experts_on(base)
    before = base_hash(base)
    with torch.no_grad():
        model.eval()(ids)
    assert base_hash(base) == before
    loss = model.train()(ids, labels=ids).loss
    loss.backward()
    first = next(parameter for _, parameter in model.named_expert_parameters())
    assert first.grad is not None
    assert first.grad.any()


def test_a_base_that_is_packed_already_is_refused(four_bits):
    base = four_bits()
    layer = base.model.layers[1].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp\.up_proj were packed .*load .* anew"
    ):
        DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=2, r=2))
    layer.weight.quant_state.packing_format_for_cpu = False
    DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=2, r=2))


# Injection


def test_sizes_are_those_of_the_layer_and_not_of_its_packed_weight(quantised, folder):
    config = MoELoraConfig(num_experts=2, r=2)
    ours = DyLoRA_MoE.from_base(quantised(), config)
    whole = DyLoRA_MoE.from_base(load_base(folder), config)
    for expert in range(2):
        shapes = [
            {path: (A.shape, B.shape) for path, (A, B) in model.expert_weights(expert).items()}
            for model in (ours, whole)
        ]
        assert shapes[0] == shapes[1]
    assert ours.count_parameters() == whole.count_parameters()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_mixture_has_the_logits_of_its_quantised_base_bit_for_bit(quantised, dtype, ids):
    base = quantised(dtype)
    before = base(ids).logits
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=3, r=2))
    after = model(ids).logits
    assert after.dtype == before.dtype
    assert torch.equal(after, before)
    assert all(p.dtype == torch.float32 for _, p in model.named_expert_parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_update_of_a_projection_is_that_of_a_whole_layer_with_the_same_output(
    quantised, experts_on, dtype, ids
):
    """A projection's output is its quantised product plus the mixture of B_e A_e x."""
    model = experts_on(quantised(dtype))
    path = model.site_names[0] + ".q_proj"
    projection = model.base.get_submodule(path)
    seen = {}
    handle = projection.register_forward_hook(lambda m, args, out: seen.update(x=args[0], y=out))
    gates = model(ids).routing.gates[:, :, 0]  # [B, S, E]
    handle.remove()
    with torch.no_grad(), model.disable_adapters():
        plain = projection(seen["x"].clone())
    x = seen["x"].detach().float()
    update = torch.zeros_like(plain, dtype=torch.float32)
    for expert in range(3):
        A, B = model.expert_weights(expert)[path]
        scale = model.config.lora_alpha / model.config.r
        update += gates[..., expert, None] * scale * (x @ A.T @ B.T)
    assert seen["y"].dtype == plain.dtype
    assert update.abs().max() > 0.1
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(seen["y"].float(), plain.float() + update, **close)


def test_unload_gives_the_quantised_base_back(quantised, experts_on, ids):
    base = quantised()
    before, names = base(ids).logits, list(base.state_dict())
    model = experts_on(base)
    assert not torch.equal(model(ids).logits, before)
    assert model.unload() is base
    assert list(base.state_dict()) == names
    assert torch.equal(base(ids).logits, before)


@pytest.mark.parametrize("kind", ["bnb-4bit", "bnb-8bit"])
def test_the_projections_of_a_quantised_gpt2_are_found(gpt2, kind, ids, tmp_path):
    """Its Conv1D become bitsandbytes' layers, which have other names for their sizes."""
    gpt2(n_embd=64).save_pretrained(tmp_path)
    base = load_base(str(tmp_path), quantization=kind)
    before = base(ids).logits
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=2, r=2))
    shapes = [(A.shape[1], B.shape[0]) for A, B in model.expert_weights(0).values()]
    assert shapes == [(64, 192), (64, 64)] * 2
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("kind", ["bnb-4bit", "torchao-int8"])  # LLM.int8 looks at whole batches
def test_a_token_sees_neither_later_ones_nor_other_sequences(kind):
    """On the embedded base, whose activations have outliers."""
    model = DyLoRA_MoE.from_base(
        load_base(EMBEDDED, quantization=kind), MoELoraConfig(num_experts=2, r=2)
    )
    ids = torch.randint(3, 1000, (2, 24))
    with torch.no_grad():
        together, alone = model(ids).logits, model(ids[:1, :12]).logits
    torch.testing.assert_close(together[:1, :12], alone, rtol=1e-4, atol=1e-4)


# Training


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_lowers_the_loss_and_leaves_every_byte_of_the_base(quantised, dtype, ids):
    base = quantised(dtype)
    model = DyLoRA_MoE.from_base(base, MoELoraConfig(num_experts=3, r=4)).train()
    before = base_hash(base)
    ours = [p for _, p in [*model.named_expert_parameters(), *model.router_parameters()]]
    optimizer = torch.optim.AdamW(ours, lr=2e-2)
    losses = []
    for _ in range(8):
        output = model(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output.lm_loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert base_hash(base) == before


def test_the_hash_of_a_base_sees_a_single_changed_code(quantised):
    base = quantised()
    before = base_hash(base)
    weight = base.get_submodule("model.layers.0.mlp.up_proj").weight
    codes = max(plain_tensors(weight), key=lambda part: part.numel())
    with torch.no_grad():
        codes.view(-1)[0] ^= 1
    assert base_hash(base) != before


def test_checkpointed_activations_give_the_same_gradients(quantised, experts_on, ids):
    gradients = []
    for checkpointing in (False, True):
        model = experts_on(quantised()).train()
        if checkpointing:
            model.enable_checkpointing()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for _, p in model.named_expert_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# Files


def test_a_saved_mixture_has_the_same_logits_on_the_base_quantised_anew(
    quantised, experts_on, folder, kind, ids, tmp_path
):
    model = experts_on(quantised())
    model.save_pretrained(tmp_path / "mixture")
    for chosen in (kind, None):  # None: as the checkpoint says
        again = DyLoRA_MoE.from_pretrained(tmp_path / "mixture", folder, quantization=chosen)
        assert torch.equal(again(ids).logits, model(ids).logits)
    whole = DyLoRA_MoE.from_pretrained(tmp_path / "mixture", folder, quantization="none")
    assert not torch.equal(whole(ids).logits, model(ids).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("expert", range(3))
def test_peft_computes_the_same_on_the_same_quantised_base(
    quantised, experts_on, kind, expert, ids, tmp_path
):
    import peft

    model = experts_on(quantised())
    model.save_pretrained(tmp_path / "mixture")
    weights = torch.eye(3)[[expert] * len(ids)]
    ours = model(ids, routing_weights=weights).logits
    base = quantised()
    plain = base(ids).logits
    theirs = peft.PeftModel.from_pretrained(
        base, tmp_path / "mixture" / "peft_adapters" / f"expert_{expert}"
    )
    # LLM.int8 rounds activations to 8 bits: a last bit of them may move one.
    tolerance = 1e-4 if kind == "bnb-8bit" else 1e-5
    assert (ours - theirs(ids).logits).abs().max() < tolerance * ours.abs().max()
    assert (ours - plain).abs().max() > 0.1


# Runs


def test_a_run_trains_on_a_quantised_base_and_resumes_exactly(tmp_path, monkeypatch):
    loaded = []  # the classes of a projection of every base that a command loads

    load = BaseSpec.load

    def watched_load(spec):
        base = load(spec)
        loaded.append(type(base.get_submodule("model.layers.0.self_attn.q_proj")).__name__)
        return base

    monkeypatch.setattr(BaseSpec, "load", watched_load)
    config = tmp_path / "small.yaml"
    config.write_text(
        f"""
name: small
output_dir: {tmp_path}
model: {{base: {EMBEDDED}, dtype: float32, device: cpu}}
moe: {{num_experts: 2, r: 2}}
data: {{sources: [{{name: skill/json, rows: 20}}], max_length: 256}}
train: {{max_steps: 3, batch_size: 2, save_steps: 2}}
eval: {{eval_subset: 2, batch_size: 2}}
"""
    )
    command = ["train", "--config", str(config), "--model.quantization", "bnb-8bit"]
    assert main(command) == 0
    last = tmp_path / "small" / "checkpoint-3"
    straight = trained_tensors(last)
    shutil.rmtree(last)
    assert main([*command, "--resume_from_checkpoint", "latest"]) == 0
    again = trained_tensors(last)
    assert straight.keys() == again.keys()
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    kept = yaml.safe_load((tmp_path / "small" / "config.yaml").read_text())
    assert kept["model"]["quantization"] == "bnb-8bit"

    prompt = ["--prompt", "x", "--max_new_tokens", "2", "--quantization", "bnb-8bit"]
    assert main(["generate", "--checkpoint", str(last), *prompt]) == 0
    assert main(["evaluate", *command[1:], "--checkpoint", str(last)]) == 0
    assert loaded == ["Linear8bitLt"] * 4  # train, resume, generate, evaluate


def trained_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint's experts and routers, by file and name."""
    return {
        f"{file.relative_to(folder)}: {name}": tensor
        for file in folder.rglob("*.safetensors")
        for name, tensor in read_tensors(file).items()
    }


# Merging


def test_merging_into_a_quantised_base_is_refused_and_changes_nothing(quantised, experts_on, ids):
    model = experts_on(quantised())
    before = base_hash(model.base)
    with pytest.raises(ValueError, match="--dequantize"):
        model.merge_and_unload(expert=1)
    assert base_hash(model.base) == before
    assert model(ids).routing is not None


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_dequantised_merge_is_a_plain_model_of_the_quantised_values(
    quantised, experts_on, kind, dtype, ids, tmp_path
):
    model = experts_on(quantised(dtype))
    weights = torch.tensor([[0.5, 0.2, 0.3]] * len(ids))
    expected = model(ids, routing_weights=weights).logits.float()
    merged = model.merge_and_unload(weights=weights[0], dequantize=True)
    assert {parameter.dtype for parameter in merged.parameters()} == {getattr(torch, dtype)}
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    error = (again(ids).logits.float() - expected).norm() / expected.norm()
    # bnb-8bit rounds activations as well, and bf16 has 8 bits; unrelated logits would be 1.4 apart.
    assert error < (1e-5 if (kind, dtype) in EXACT else 0.1)

"""The estimate of a run's memory, held against a mixture of real tensors."""

import math
import re

import pytest
import torch

from dylora import DyLoRA_MoE
from dylora.cli.config_file import load_run_config
from dylora.cli.main import main
from dylora.training.memory import (
    LiveBytes,
    base_bytes,
    build_fake,
    estimate,
    explained,
    pass_bytes,
)
from dylora.training.optim import build_optimizer

OVERRIDES = ["model.dtype=float32", "model.device=cpu", "data.max_length=24", "train.batch_size=3"]


def config_of(*overrides: str):
    return load_run_config("configs/token_routing.yaml", [*OVERRIDES, *overrides])


def real(config) -> DyLoRA_MoE:
    dtype = getattr(torch, config.model.dtype)
    model = DyLoRA_MoE.from_base(config.model.base, config.moe, dtype=dtype)
    if config.train.gradient_checkpointing:
        model.enable_checkpointing()
    ids = torch.ones(1, 2, dtype=torch.long)
    model(ids, labels=ids, keep_logits=False)  # finds out how logits are made
    return model.train()


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("moe.num_experts=9", "moe.r=3", "moe.router_hidden_size=5"),
        ("moe.adapter_type=loha",),
        ("train.gradient_checkpointing=true",),
        ("model.dtype=bfloat16",),
        ("moe.lora_dropout=0.1",),
        ("train.optim=adamw_8bit", "moe.num_experts=3"),
        ("train.optim=muon",),
        ("train.optim=adafactor", "train.adam_beta2=0.999"),
    ],
    ids=" ".join,
)
def test_each_part_is_to_the_byte_what_real_tensors_take(overrides):
    config = config_of(*overrides)
    model, found = real(config), estimate(config)
    own = {id(p): p for _, p in model.own_parameters()}
    assert found.experts == sum(p.nbytes for p in own.values())
    parameters = [p for p in model.base.parameters() if id(p) not in own]
    buffers = list(model.base.buffers())
    assert found.base == sum(t.nbytes for t in (*parameters, *buffers))
    assert (found.activations, found.logits) == pass_bytes(model, 3, 24)
    assert found.gradients == sum(p.grad.nbytes for p in own.values() if p.grad is not None)
    optimizer = build_optimizer(model, config.train)
    optimizer.step()
    moments = [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    assert found.optimizer == sum(t.nbytes for t in moments if t.ndim)


@pytest.mark.parametrize("scope", ["prompt", "running_mean"])
def test_where_prompts_route_all_experts_count_as_mixed_densely(scope):
    moe = ("moe.num_experts=5", "moe.shared_experts=1", "moe.top_k_experts=1")
    routed = config_of(f"moe.router_scope={scope}", "moe.router_temperature=2.0", *moe)
    dense = config_of("moe.router_type=fixed", "moe.router_temperature=2.0", moe[0])
    found, wanted = estimate(routed), estimate(dense)
    assert found.experts == wanted.experts
    assert found.activations == pytest.approx(wanted.activations, rel=0.01)


def test_recomputing_activations_holds_less_and_a_batch_of_twice_the_rows_about_twice():
    once, twice = (estimate(config_of(f"train.batch_size={rows}")) for rows in (8, 16))
    assert twice.activations == pytest.approx(2 * once.activations, rel=0.2)
    recomputed = estimate(config_of("train.batch_size=8", "train.gradient_checkpointing=true"))
    assert recomputed.activations < 0.7 * once.activations


def test_rows_with_padding_hold_the_mask_of_attention_in_each_layer():
    model = build_fake(config_of())
    (one, _), (two, _) = (pass_bytes(model, rows, 256) for rows in (1, 2))
    masks = len(model.site_names) * 2 * 256 * 256 * 4
    assert two - 2 * one > masks


def test_what_is_held_counts_once_and_no_longer_than_it_is_held():
    model = torch.nn.Linear(4, 4)
    with LiveBytes() as counter:
        x = torch.ones(100, 4)
        view = x[10:].T
        assert counter.live == counter.peak == x.nbytes
        y = model.weight @ view
        assert counter.live == x.nbytes + y.nbytes
        del y
        assert counter.live == x.nbytes
        del x, view
    assert (counter.live, counter.peak) == (0, 1600 + 1440)


def test_a_quantised_base_counts_packed_linear_layers_and_a_whole_head():
    model = build_fake(config_of())
    ours = {id(p) for _, p in model.own_parameters()}
    head = model.base.get_output_embeddings()
    layers = [m.weight for m in model.base.modules() if isinstance(m, torch.nn.Linear)]
    packed = sum(w.numel() for w in layers if w is not head.weight and id(w) not in ours)
    whole = base_bytes(model.base, ours, "none")
    assert whole - base_bytes(model.base, ours, "bnb-8bit") == 3 * packed
    assert whole - base_bytes(model.base, ours, "bnb-4bit") == math.floor((4 - 0.5625) * packed)


def test_the_command_prints_every_part_and_their_sum(capsys):
    words = [f"--{override}" for override in OVERRIDES]
    assert main(["info", "--estimate", "--config", "configs/token_routing.yaml", *words]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    sizes = {row[0]: float(row[1]) for row in rows}
    parts = sum(size for name, size in sizes.items() if name not in ("logits", "total"))
    assert sizes["total"] == pytest.approx(parts, abs=0.005)
    assert sizes["process"] > 0.1


def test_an_estimate_of_stages_of_dora_or_of_a_checkpoint_is_refused(capsys):
    assert main(["info", "--estimate", "--config", "configs/continual.yaml"]) == 2
    assert "estimate one without them" in capsys.readouterr().err
    words = ["--config", "configs/token_routing.yaml", "--moe.use_dora", "true"]
    assert main(["info", "--estimate", *words]) == 2
    assert "is not estimated" in capsys.readouterr().err
    assert main(["info", "--estimate", "--checkpoint", "x"]) == 2
    assert "give --config FILE" in capsys.readouterr().err


# Out of memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore."),
        RuntimeError("[enforce fail] not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_memory_names_settings_and_what_a_run_takes_with_them(error):
    config = config_of("train.batch_size=8", "train.gradient_accumulation_steps=3")
    with pytest.raises(ValueError) as raised, explained(config):
        raise error
    text = str(raised.value)
    assert "\n" not in text
    now, *less = [float(size) for size in re.findall(r"about (\S+) GB", text)]
    assert less
    assert max(less) <= now
    assert "train.batch_size 4 with train.gradient_accumulation_steps 6: about" in text
    assert "train.gradient_checkpointing true: about" in text
    assert "data.max_length 12: about" in text


def test_where_there_is_no_estimate_an_error_of_memory_still_names_the_settings():
    with pytest.raises(ValueError, match=r"less with train.batch_size 1 with"):  # noqa: SIM117
        with explained(config_of("moe.use_dora=true")):
            raise MemoryError


def test_other_errors_pass_as_they_are():
    with pytest.raises(RuntimeError, match=r"^shape"), explained(config_of()):
        raise RuntimeError("shape")


def test_a_step_out_of_memory_ends_the_command_in_one_line(tmp_path, monkeypatch, capsys):
    def fail(run):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("dylora.training.loop.run_step", fail)
    words = [f"--{override}" for override in OVERRIDES]
    words += ["--data.sources", "[{name: skill/lists, rows: 9}]", "--eval.eval_subset", "2"]
    words += ["--output_dir", str(tmp_path), "--train.max_steps", "1", "--data.max_length", "64"]
    assert main(["train", "--config", "configs/token_routing.yaml", *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory (CUDA out of memory.). The run takes about")

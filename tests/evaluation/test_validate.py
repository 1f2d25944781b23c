"""`run.py validate`: sound checkpoints pass, and each check fails on a model broken for it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dylora import DyLoRA_MoE
from dylora.cli.main import main
from dylora.evaluation.validate import run
from dylora.evaluation.validate.checks import TIED_SHARE, Check, compare_routed
from dylora.evaluation.validate.cost import n_passes, peak_bytes
from dylora.evaluation.validate.reference import (
    TokenOutputs,
    largest,
    largest_gap,
    loop_logits,
    relative_difference,
    rounding_noise,
)
from dylora.routing.router import DynamicHybridRouter
from dylora.training.memory import LiveBytes

JUDGED = {
    "folded = loop",
    "one-hot = single expert",
    "one pass = N passes",
    "decode = prefill",
    "causality",
    "left padding = right padding",
    "batch = its rows",
    "disabled = base",
    "experts = their files",
    "all is finite",
    "manifest",
}
EXACT = {"causality", "disabled = base", "experts = their files", "all is finite", "manifest"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory, mixture) -> Callable[..., list[str]]:
    """Saves a random mixture and its base; the command that validates it."""

    def save(base=None, **settings) -> list[str]:
        folder = tmp_path_factory.mktemp("validate")
        model = mixture(base, **settings)
        model.save_pretrained(folder / "checkpoint")
        model.unload().save_pretrained(folder / "base")
        return [
            *("validate", "--checkpoint", str(folder / "checkpoint"), "--tokens", "8"),
            *("--base", str(folder / "base"), "--device", "cpu"),
        ]

    return save


@pytest.fixture(scope="module")
def sound(saved) -> list[str]:
    return saved()


@pytest.fixture
def rows(capsys) -> Callable[..., tuple[int, dict[str, str]]]:
    """Runs the command; its exit code, and the verdict of every row of its table."""

    def run(command: list[str]) -> tuple[int, dict[str, str]]:
        code = main(command)
        lines = capsys.readouterr().out.splitlines()
        verdicts = {}
        for line in lines:
            cells = line.split("  ")
            if cells[-1] in ("ok", "FAILED", "reported"):
                verdicts[cells[0]] = cells[-1]
        return code, {name: verdict for name, verdict in verdicts.items() if name}

    return run


@pytest.fixture
def broken(monkeypatch) -> Callable[[Callable[[DyLoRA_MoE], None]], None]:
    """Lets every model that is loaded be broken first."""

    def install(breaks: Callable[[DyLoRA_MoE], None]) -> None:
        load = DyLoRA_MoE.from_pretrained

        def load_and_break(*args, **kwargs) -> DyLoRA_MoE:
            model = load(*args, **kwargs)
            breaks(model)
            return model

        monkeypatch.setattr(DyLoRA_MoE, "from_pretrained", load_and_break)

    return install


def change_gates(model: DyLoRA_MoE, change: Callable[[Tensor], Tensor]) -> None:
    """Every adapter gets other gates [B, S, E] than its site chose."""
    for block in model.mixture.blocks:

        def begin(pass_, decision, dtype, real=block.begin, block=block):
            real(pass_, decision, dtype)
            run = pass_.blocks[block.index]
            plan, shape = run.plan(), decision.gates.shape
            run._plan = plan._replace(gates=change(plan.gates.view(shape)).flatten(0, 1))
            run.decode = None

        block.begin = begin


# Sound checkpoints


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k_experts": 1},
        {"top_k_experts": 3, "use_rslora": True},
        {"routing_mode": "sparse", "num_experts": 5, "maturity": [1.0] * 5},
        {"router_scope": "shared"},
        {"router_type": "fixed", "fixed_routing_weights": [0.5, 2.0, 0.0]},
        {"use_moe_routing": False},
        {"layers_to_transform": [1]},
        {"expert_ranks": [1, 4, 2], "rank_pattern": {"v_proj": 3}},
        {"use_dora": True},
        {"share_A": True},
        {"router_hidden_size": 8, "router_noise": 1.0},
    ],
    ids=str,
)
def test_a_sound_checkpoint_passes_every_check(saved, rows, settings):
    code, verdicts = rows(saved(**settings))
    assert code == 0
    assert {name for name, verdict in verdicts.items() if verdict == "ok"} == JUDGED


@pytest.mark.parametrize("settings", [{}, {"bias": "all", "use_dora": True}], ids=str)
def test_a_sound_gpt2_passes(saved, rows, gpt2, settings):
    code, verdicts = rows(saved(gpt2(), **settings))
    assert (code, verdicts.keys() >= JUDGED) == (0, True)


def test_a_pool_that_has_grown_and_shrunk_passes(tmp_path, mixture, rows):
    model = mixture()
    model.experts.create_expert(rank=4, share=0.3)
    model.experts.freeze(0)
    model.experts.retire(1)
    for _, parameter in model.named_expert_parameters():
        nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "checkpoint")
    model.unload().save_pretrained(tmp_path / "base")
    command = ["validate", "--checkpoint", str(tmp_path / "checkpoint"), "--tokens", "8"]
    code, verdicts = rows([*command, "--base", str(tmp_path / "base"), "--device", "cpu"])
    assert code == 0
    assert {name for name, verdict in verdicts.items() if verdict == "ok"} == JUDGED


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_sound_checkpoint_passes_in_half_precision(saved, rows, dtype):
    sparse = saved(routing_mode="sparse", num_experts=5, maturity=[1.0] * 5)
    code, verdicts = rows([*sparse, "--dtype", dtype])
    assert (code, verdicts.keys() >= JUDGED) == (0, True)


def test_mixing_logits_is_reported_and_not_judged(sound, rows):
    assert rows(sound)[1]["one pass ~ N passes"] == "reported"
    assert Check("", "", math.inf, None).ok is None


def test_the_report_is_written_as_json(sound, tmp_path, capsys):
    assert main([*sound, "--out", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    found = {check["name"]: check for check in report["checks"] if check["ok"] is not None}
    assert report["passed"]
    assert found.keys() == JUDGED
    assert all(check["worst"] <= check["tolerance"] for check in found.values())
    assert {name for name, check in found.items() if check["tolerance"] == 0} == EXACT
    assert report["effect"] > 1e4 * report["tolerance"]  # else these tests could see nothing
    assert report["cost"]["passes"] == 3
    assert report["cost"]["ratio"] > 1


def test_the_texts_hold_code_where_a_tokenizer_loads(mixture):
    from dylora.base_models import load_base

    base = load_base("tiny-code-llama")
    ids, texts = run.sample_texts(base, "tiny-code-llama", None, 100)
    again, _ = run.sample_texts(base, "tiny-code-llama", None, 100)
    assert ids.shape == (3, 100)
    assert "1 of code" in texts
    assert torch.equal(ids, again)


# Broken models


def scale_one_expert(model):
    change_gates(model, lambda gates: gates * torch.tensor([1.0, 1.05, 1.0]))


def leave_no_expert_out(model):
    change_gates(model, lambda gates: gates.clamp_min(0.01))


def route_as_the_first_row(model):
    change_gates(model, lambda gates: gates[:1].expand_as(gates))


def route_by_the_mean_of_the_sequence(model):
    change_gates(model, lambda gates: gates.mean(1, keepdim=True).expand_as(gates))


def route_by_the_latest_token(model):
    change_gates(model, lambda gates: gates + 1e-3 * gates[:, -1:])


def route_by_the_place_in_the_row(model):
    def change(gates: Tensor) -> Tensor:
        return gates * torch.linspace(1, 1.1, gates.shape[1])[:, None]

    change_gates(model, change)


def average_in_the_routers(model):
    def average(router, args, output):
        gates = output.gates.mean(1, keepdim=True).expand_as(output.gates)
        return output._replace(gates=gates, probabilities=gates)

    for module in model.base.modules():
        if isinstance(module, DynamicHybridRouter):
            module.register_forward_hook(average)


def leak_while_disabled(model):
    path = next(iter(model.mixture.adapters))
    projection = model.base.get_submodule(path)
    projection.register_forward_hook(lambda module, args, output: output * (1 + 1e-6))


def stay_after_unload(model):
    unload = model.unload

    def unload_and_leak() -> nn.Module:
        base = unload()
        base.get_output_embeddings().weight.mul_(1 + 1e-6)
        return base

    model.unload = unload_and_leak


def change_an_expert(model):
    _, parameter = list(model.named_expert_parameters())[-1]
    parameter.detach().view(-1)[-1] += 1e-6


def spoil_an_expert(model):
    _, parameter = next(model.named_expert_parameters())
    parameter.detach().view(-1)[0] = math.nan


def spoil_the_base(model):
    model.base.get_output_embeddings().weight.detach()[0, 0] = math.inf


@pytest.mark.parametrize(
    ("breaks", "failing"),
    [
        (scale_one_expert, {"folded = loop", "one-hot = single expert"}),
        (leave_no_expert_out, {"one-hot = single expert"}),
        (route_as_the_first_row, {"one pass = N passes", "batch = its rows"}),
        (route_by_the_mean_of_the_sequence, {"causality", "decode = prefill"}),
        (average_in_the_routers, {"causality", "decode = prefill", "left padding = right padding"}),
        (route_by_the_latest_token, {"causality"}),
        (route_by_the_place_in_the_row, {"left padding = right padding", "decode = prefill"}),
        (leak_while_disabled, {"disabled = base"}),
        (stay_after_unload, {"disabled = base"}),
        (change_an_expert, {"experts = their files"}),
        (spoil_an_expert, {"all is finite", "experts = their files"}),
        (spoil_the_base, {"all is finite"}),
    ],
)
def test_a_broken_model_fails_the_check_made_for_it(sound, rows, broken, breaks, failing):
    broken(breaks)
    code, verdicts = rows(sound)
    assert code == 1
    assert failing <= {name for name, verdict in verdicts.items() if verdict == "FAILED"}


def test_a_leak_while_disabled_fails_nothing_else(sound, rows, broken):
    broken(leak_while_disabled)
    _, verdicts = rows(sound)
    failed = {name for name, verdict in verdicts.items() if verdict == "FAILED"}
    assert failed == {"disabled = base"}


def test_files_that_change_meanwhile_fail_the_manifest(saved, rows, broken):
    command = saved()
    folder = Path(command[2])
    broken(lambda model: (folder / "config.json").write_text("{}"))
    code, verdicts = rows(command)
    assert (code, verdicts["manifest"]) == (1, "FAILED")


def test_a_failure_is_named_in_the_last_line(sound, broken, capsys):
    broken(leak_while_disabled)
    assert main(sound) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAILED: disabled = base"


def test_not_finite_is_told_before_anything_is_compared(sound, broken, capsys, tmp_path):
    broken(spoil_an_expert)
    assert main([*sound, "--out", str(tmp_path / "report.json")]) == 1
    assert "folded" not in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["passed"], report["effect"], report["cost"]) == (False, None, None)


def test_experts_that_change_nothing_are_told(saved, capsys):
    assert main(saved(fresh=True)) == 0
    assert "a wrong mixture would not be seen" in capsys.readouterr().out


# Ties


def passes(logit: float, moved: int, apart: float = 0.0) -> TokenOutputs:
    """100 decisions, of which some went the other way."""
    gates = torch.zeros(50, 2, 2)
    gates.view(100, 2)[:moved] = 0.5
    return TokenOutputs(torch.full((50, 4), logit), gates, torch.full((50, 2, 2), 0.5 + apart))


def test_a_few_ties_are_judged_with_equal_gates():
    held = []

    def second(gates: Tensor | None) -> TokenOutputs:
        held.append(gates)
        return passes(1.5, moved=2) if gates is None else passes(1.0, moved=0)

    assert compare_routed(passes(1.0, moved=0), second, 0.1) == (0.0, " (2 of 100 decisions tie)")
    assert torch.equal(held[1], passes(1.0, moved=0).gates)


@pytest.mark.parametrize(
    "free",
    [
        passes(1.5, moved=int(100 * TIED_SHARE) + 1),  # too many
        passes(1.5, moved=0),  # none that could explain it
        passes(1.5, moved=2, apart=0.1),  # no tie: the probabilities differ
    ],
    ids=["many", "none", "no tie"],
)
def test_a_difference_that_no_tie_explains_stands(free):
    worst, ties = compare_routed(passes(1.0, moved=0), lambda gates: free, 0.1)
    assert (worst, ties) == (0.5, "")


# Parts


def test_the_loop_is_the_folded_mixture_only_with_its_own_gates(mixture, ids):
    model = mixture()
    with torch.no_grad():
        gates = model.get_routing_weights(ids)
        folded = model(ids).logits
        assert relative_difference(loop_logits(model, ids, gates), folded) < 1e-5
        assert relative_difference(loop_logits(model, ids, gates.flip(-1)), folded) > 1e-2


def test_the_tolerance_grows_with_the_unit_of_rounding_and_not_with_the_adapters(mixture, ids):
    model, idle = mixture(), mixture(fresh=True)
    with torch.no_grad():
        single = rounding_noise(model, ids)
        assert single == rounding_noise(idle, ids)
        assert 1e-7 < single < 1e-5
        model.base.bfloat16()
        half = rounding_noise(model, ids)
    unit = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float32).eps
    assert unit / 4 < half / single < 4 * unit


def test_n_passes_mix_logits_and_not_updates(mixture, ids):
    model = mixture()
    weights = torch.full((2, 1, 3), 1 / 3)
    with torch.no_grad():
        alone = [model(ids, routing_weights=torch.eye(3)[[e, e]]).logits for e in range(3)]
        mixed = n_passes(model, ids, weights)
        assert relative_difference(mixed, torch.stack(alone).mean(0)) < 1e-6
        assert relative_difference(mixed, model(ids, routing_weights=weights[:, 0]).logits) > 1e-3


def test_a_nan_is_the_largest_gap_and_equal_infinities_are_none():
    one, nan, infinity = (torch.tensor([1.0, value]) for value in (1.0, math.nan, math.inf))
    assert math.isnan(largest_gap(one, nan))
    assert largest_gap(infinity, infinity) == 0
    assert largest_gap(infinity, one) == math.inf
    assert math.isnan(largest([0.0, math.nan, 1.0]))
    assert Check("", "", math.nan, 0.0).ok is False


def test_the_peak_counts_what_is_held_at_once():
    with LiveBytes() as memory:
        first = torch.ones(1000)  # 4,000 bytes
        view = first.view(10, 100)
        view += 1
        second = first * 2
        del second
        third = first * 3
        assert memory.live == 8000
        del first, third
        assert memory.live == 4000, "the view holds the first one's bytes"
        del view
        assert memory.live == 0
    assert memory.peak == 8000


def test_the_peak_leaves_out_what_was_there_before():
    there = torch.ones(1000)
    assert peak_bytes(lambda: there.view(10, 100).t(), there.device) == 0
    assert peak_bytes(lambda: there + 1, there.device) == 4000


# What users get wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "3"], "--tokens is 3, but must be at least 4"),
        (["--tokens", "33"], "--tokens is 33, but the base takes at most 32"),
        (["--dtype", "int8"], "--dtype is 'int8', but must be one of float32, bfloat16, float16"),
        (["--device", "gpu"], "--device gpu cannot be used ("),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used ("),
        (["--out", "no/such/x.json"], "--out is 'no/such/x.json', but must be a file in a folder"),
        (["--base", "no/such/base"], "cannot load the model 'no/such/base'"),
        (["--checkpoint", "no/such/one"], "checkpoint no/such/one does not exist"),
    ],
)
def test_a_users_mistake_is_one_line(sound, capsys, options, message):
    assert main([*sound, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith(f"error: {message}")  # a bar of loading may precede it


def test_a_damaged_file_is_a_users_error_that_names_it(saved, capsys):
    command = saved()
    file = Path(command[2]) / "router.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(command) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"error: {file} has changed since it was written"

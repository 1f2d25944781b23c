"""Routing of a checkpoint by the command line: what takes effect, and what is refused by name."""

import pytest
import torch

from dylora import DyLoRA_MoE, MoELoraConfig, SkillLibrary, load_tokenizer
from dylora.cli.benchmark import BenchmarkCommand
from dylora.cli.evaluate import EvaluateOptions
from dylora.cli.generate import GenerateOptions
from dylora.cli.main import main
from dylora.cli.options import read_options
from dylora.data.prompts import encode_prompts, format_prompt
from dylora.evaluation.loading import change_routing, load_checkpoint
from dylora.run_config import ModelConfig
from dylora.tasks import generate_tasks

BASE = ModelConfig(base="tiny-code-llama", dtype="float32", device="cpu")
COMMANDS = {
    EvaluateOptions: "--config x --checkpoint c",
    BenchmarkCommand: "--config x --checkpoint c --tasks mbpp",
    GenerateOptions: "--checkpoint c --prompt p",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of three experts whose updates differ."""
    torch.manual_seed(0)
    settings = MoELoraConfig(num_experts=3, r=2, init_lora_weights="orthogonal")
    mixture = DyLoRA_MoE.from_base(BASE.base, settings)
    path = tmp_path_factory.mktemp("routing") / "c"
    mixture.save_pretrained(path)
    return str(path)


def gates(model: DyLoRA_MoE) -> torch.Tensor:
    """Of three tokens at every site, [tokens·N, E]."""
    return model.get_routing_weights(torch.tensor([[5, 6, 7]])).flatten(0, 2)


@pytest.mark.parametrize("section", ["moe", "routing"])
@pytest.mark.parametrize("command", COMMANDS)
def test_routing_is_set_in_the_section_moe_or_routing(command, section):
    words = f"--{section}.top_k_experts 1 --{section}.router-temperature=0.5"
    words += f" --{section}.routing_mode sparse"
    options, overrides = read_options(command, [*COMMANDS[command].split(), *words.split()])
    assert options.routing() == {"top_k": 1, "temperature": 0.5, "mode": "sparse"}
    assert overrides == []


@pytest.mark.parametrize("command", COMMANDS)
def test_experts_and_constant_weights_are_lists(command):
    place = COMMANDS[command].split()
    options, _ = read_options(command, [*place, "--routing.experts", "0,2"])
    assert options.routing() == {"experts": [0, 2]}
    options, _ = read_options(command, [*place, "--routing.weights", "0.5,0.5,0"])
    assert options.routing() == {"weights": [0.5, 0.5, 0.0]}


def test_without_options_nothing_of_the_routing_changes(folder):
    options, _ = read_options(GenerateOptions, ["--checkpoint", "c", "--prompt", "p"])
    assert options.routing() == {}
    plain, same = load_checkpoint(folder, BASE), load_checkpoint(folder, BASE, {})
    assert torch.equal(gates(plain), gates(same))


def test_constant_weights_are_the_gates_of_every_token(folder):
    model = load_checkpoint(folder, BASE, {"weights": [0.5, 0.25, 0.0]})
    expected = torch.tensor([0.5, 0.25, 0.0])
    assert torch.equal(gates(model), expected.expand_as(gates(model)))
    ids = torch.tensor([[5, 6, 7]])
    given = load_checkpoint(folder, BASE)(ids, routing_weights=expected[None]).logits
    torch.testing.assert_close(model(ids).logits, given)


def test_the_experts_that_are_named_share_all_of_the_gates(folder):
    shares = gates(load_checkpoint(folder, BASE, {"experts": [0, 2]}))
    assert (shares[:, 1] == 0).all()
    assert (shares[:, [0, 2]] > 0).all()
    torch.testing.assert_close(shares.sum(-1), torch.ones(len(shares)))


def test_generate_routes_as_it_is_told(folder, capsys):
    words = ["generate", "--checkpoint", folder, "--prompt", "a", "--max_new_tokens", "2"]
    assert main([*words, "--show_routing", "--routing.weights", "0.25,0.75,0"]) == 0
    assert "mean shares: 25% 75% 0%" in capsys.readouterr().out
    assert main([*words, "--show_routing", "--routing.experts", "2"]) == 0
    assert "mean shares: 0% 0% 100%" in capsys.readouterr().out


def test_generate_says_which_skill_a_prompt_asks_for_and_when_it_is_unlike_all(tmp_path, capsys):
    settings = MoELoraConfig(r=2, num_experts=2, router_scope="prompt")
    model, tokenizer = DyLoRA_MoE.from_base(BASE.base, settings), load_tokenizer(BASE.base)
    library = SkillLibrary(model)
    for number, skill in enumerate(("lists", "sql")):
        parts = [generate_tasks(skill, split, 20) for split in ("train", "validation")]
        rows = [encode_prompts(tokenizer, [format_prompt(t.instruction) for t in p]) for p in parts]
        library.add(skill, *rows, expert=number)
    model.save_pretrained(tmp_path / "m")
    words = ["generate", "--checkpoint", str(tmp_path / "m"), "--max_new_tokens", "2"]
    asked = generate_tasks("sql", "test", 1)[0].instruction
    assert main([*words, "--prompt", asked, "--show_routing"]) == 0
    told = capsys.readouterr()
    assert "skill: sql, expert 1\nsql 100.0%, lists 0.0%" in told.out
    assert "unlike" not in told.err
    assert main([*words, "--raw", "--prompt", "zq zq zq zq zq"]) == 0
    assert "the prompt is unlike every known skill" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--routing.weights 1,0", "weights have shape [2], but must hold one value for each of"),
        ("--routing.weights 0,0,0", "all weights are 0"),
        ("--routing.experts 3", "there is no expert 3, only 0 to 2"),
        ("--moe.top_k_experts 4", "top_k_experts is 4, but must be from 1 to num_experts (3)"),
    ],
)
def test_routing_that_does_not_fit_the_checkpoint_is_refused(folder, capsys, words, message):
    place = ["generate", "--checkpoint", folder, "--prompt", "p", "--allow_other_base"]
    assert main([*place, *words.split()]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--routing.top_k_experts 0", "--routing.top_k_experts is 0, but must be at least 1"),
        ("--moe.router_temperature 0", "--routing.router_temperature is 0"),
        ("--routing.weights 1,-1", "--routing.weights is [1, -1], but must be numbers at"),
        ("--routing.top_k 1", "command line: unknown option --routing.top_k; did you mean"),
        ("--routing.weights 1,0 --moe.top_k_experts 1", "--routing.weights are all of the routing"),
    ],
)
def test_routing_that_cannot_be_is_refused_before_a_base_is_loaded(refusal, words, message):
    place = ["generate", "--checkpoint", "c", "--prompt", "p"]
    assert refusal(*place, *words.split()).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("info --checkpoint c --moe.top_k_experts 1", "--moe.top_k_experts changes a config"),
        ("info --checkpoint c --routing.experts 1", "--routing.experts is an option of evaluate, "),
        ("export --checkpoint c --out o --moe.r 1", "unknown option --moe.r"),
        ("train --config x --routing.experts 1", "--routing.experts is an option of evaluate, ben"),
    ],
)
def test_commands_that_do_not_route_refuse_it_by_name(refusal, words, message):
    assert refusal(*words.split()).startswith(f"command line: {message}")


def test_a_plain_lora_has_no_routing_to_change_but_a_weight():
    settings = MoELoraConfig(use_moe_routing=False, num_experts=1, r=2)
    model = DyLoRA_MoE.from_base(BASE.base, settings)
    with pytest.raises(ValueError, match="nothing is routed here"):
        change_routing(model, top_k=1)
    change_routing(model, weights=[0.5])
    assert (gates(model) == 0.5).all()

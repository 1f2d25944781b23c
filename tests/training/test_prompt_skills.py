"""A joint run whose sources are routed by their prompts."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from dylora import DyLoRA_MoE
from dylora.run_config import DataConfig, SourceConfig
from dylora.training.loop import train
from parallel_runs import train_here
from processes import results_of
from runs import all_tensors, rows_of

SKILLS = ("lists", "sql")


@pytest.fixture
def joint(make_config):
    """A few steps on two embedded skills; a shared expert beside one for each."""

    def make(name="a", *, experts=3, packing=False, rows=40, eval_subset=24, **changes):
        moe = {"num_experts": experts, "shared_experts": 1, "router_scope": "prompt"}
        moe |= {"top_k_experts": 1, "expert_dropout": 0.0, "maturity_mode": "manual"}
        moe |= {"expert_ranks": [4, *[2] * (experts - 1)]}
        config = make_config(name, moe=moe, max_steps=6, eval_subset=eval_subset, **changes)
        sources = [SourceConfig(name=f"skill/{skill}", rows=rows) for skill in SKILLS]
        return dataclasses.replace(
            config,
            data=DataConfig(sources=sources, max_length=200, packing=packing),
            model=dataclasses.replace(config.model, base="tiny-code-llama"),
        )

    return make


def test_every_source_trains_an_expert_of_its_own_beside_the_shared_one(joint):
    run = train(joint())
    last = next(row for row in reversed(rows_of(run.folder)) if "val/loss" in row)
    assert last["val/information"] == pytest.approx(0.6931, abs=0.01)  # log 2: they take skills
    library = run.model.skill_library
    assert [library.expert_of(f"skill/{skill}") for skill in SKILLS] == [1, 2]
    assert [row.skill for row in run.model.experts.table] == [None, "skill/lists", "skill/sql"]
    for _, parameter in run.model.named_expert_parameters():
        assert parameter.abs().sum() > 0


def test_a_conversation_that_begins_with_an_answer_is_left_out_and_told(joint, tmp_path, capsys):
    file = tmp_path / "chats.jsonl"
    asked = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It."}]
    chats = [[{**asked[0], "value": f"What is {n}?"}, asked[1]] for n in range(60)]
    chats[17].reverse()
    file.write_text("".join(json.dumps({"conversations": chat}) + "\n" for chat in chats))
    config = joint(rows=40)
    chats_source = SourceConfig(name="chats", path=str(file), split="50/50")
    sources = [config.data.sources[0], chats_source]
    data = dataclasses.replace(config.data, sources=sources, template="plain")
    train(dataclasses.replace(config, data=data))
    assert f"{file}:18: nothing comes before its first answer" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"packing": True, "gradient_accumulation_steps": 3}])
def test_two_processes_train_the_experts_that_their_own_prompts_choose(joint, changes):
    """An expert that the prompts of one process leave out has its gradient from the other."""
    alone = train_here(joint("alone", **changes))
    both = results_of(2, train_here, joint("both", parallel="ddp", **changes))
    assert both[0] == both[1]
    assert alone.losses == pytest.approx(both[0].losses, rel=0, abs=1e-5)


def test_clusters_of_the_prompts_find_the_skills_that_no_source_names(joint):
    """The first expert of a group of clusters does not matter; that it holds one skill does."""
    config = joint(rows=200, prompt_clusters=6, eval_subset=96)
    run = train(config)
    last = next(row for row in reversed(rows_of(run.folder)) if "val/loss" in row)
    assert last["val/information"] == pytest.approx(0.6931, abs=0.03)
    library = run.model.skill_library
    assert {library.expert_of(name) for name in library.skills} == {1, 2}
    assert len(library) > 2
    assert [row.skill for row in run.model.experts.table] == [None, "prompts-1", "prompts-2"]
    assert all(name.startswith("prompts-") for name in library.skills)


def test_too_few_rows_for_as_many_clusters_as_experts_are_refused(joint):
    with pytest.raises(ValueError, match=r"1 clusters have 16 each, for 2 .*num_experts 2"):
        train(joint(prompt_clusters=2, eval_subset=8))


def test_clusters_beside_a_library_that_is_given_are_refused(joint):
    first = train(joint()).folder / "checkpoint-6"
    with pytest.raises(ValueError, match=r"prompt_clusters is 4, but train.init_from has a skill"):
        train(joint("b", init_from=str(first), prompt_clusters=4))


def test_fewer_clusters_than_experts_are_refused(joint):
    with pytest.raises(ValueError, match=r"prompt_clusters.*at least 4, as many as there are"):
        joint(experts=5, prompt_clusters=3)


def test_clusters_without_routing_by_the_prompt_are_refused(make_config):
    with pytest.raises(ValueError, match="prompt_clusters"):
        make_config("a", prompt_clusters=4)


def test_taking_a_skills_expert_away_costs_that_skill_and_not_the_other(joint):
    """Values that matter: experts are given large ones, as six steps teach little."""
    run = train(joint())
    model, loss = run.model.eval(), {}
    with torch.no_grad():
        for name, parameter in model.named_expert_parameters():
            if name.endswith("lora_B"):
                parameter.add_(0.05 * torch.randn_like(parameter))
    for without in (None, 1, 2):
        others = [expert for expert in range(3) if expert != without]
        for place, rows in enumerate(run.data.validation):
            row = rows[0]
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            gates = torch.tensor([[1.0, *(float(e == 1 + place) for e in range(1, 3))]])
            gates[:, [e for e in range(3) if e not in others]] = 0
            loss[without, place] = model(ids, labels=labels, routing_weights=gates).loss.item()
            if without is None:
                routed = model(ids, labels=labels)
                assert routed.loss.item() == pytest.approx(loss[None, place], abs=1e-5)
                assert torch.equal(routed.routing.gates[0, 0, 0], gates[0])
    assert loss[1, 1] == loss[None, 1]
    assert loss[2, 0] == loss[None, 0]
    assert loss[1, 0] != loss[None, 0]
    assert loss[2, 1] != loss[None, 1]


def test_a_joint_run_that_resumes_ends_with_the_same_bits(joint):
    whole = train(joint("whole"))
    cut = joint("cut", save_steps=3)
    folder = train(cut).folder
    shutil.rmtree(folder / "checkpoint-6")
    assert train(cut, "latest").progress.step == 6
    ours, theirs = (all_tensors(one / "checkpoint-6") for one in (folder, whole.folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_of_a_joint_run_knows_its_skills(joint):
    run = train(joint())
    model = DyLoRA_MoE.from_pretrained(run.folder / "checkpoint-6", "tiny-code-llama")
    assert list(model.skill_library.skills) == [f"skill/{skill}" for skill in SKILLS]


def test_other_numbers_of_experts_than_sources_are_refused_before_anything_is_trained(joint):
    config = joint(experts=4)
    with pytest.raises(ValueError, match="num_experts is 4, 1 of them shared"):
        train(config)
    assert not list(Path(config.output_dir).glob("*/checkpoint-*"))


@pytest.mark.parametrize("changes", [{"eval_subset": 4}, {"rows": 4}], ids=str)
def test_one_expert_asks_for_as_many_rows_as_a_library_can_be_read_with(joint, changes):
    with pytest.raises(ValueError, match=r"prompt_clusters is 2, but .* of each: give more rows"):
        train(joint(experts=2, prompt_clusters=2, **changes))

"""A base with experts in TRL's trainers, with default arguments on a CPU."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from dylora import DyLoRA_MoE
from dylora.base_models import load_base
from dylora.integrations.reference import experts_of

trl = pytest.importorskip("trl", reason="trl is not installed: pip install 'dylora[trl]'")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]
PREFERENCES = [
    {"prompt": f"add {n}", "chosen": f" x + {n}", "rejected": f" x - {n}"} for n in range(8)
]
JUDGED = [{"prompt": f"add {n}", "completion": f" x + {n}", "label": n % 2 == 0} for n in range(16)]
TEXTS = [{"text": f"def f{n}(x): return x + {n}"} for n in range(12)]
PROMPTS = [{"prompt": f"add {n}"} for n in range(8)]


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def options_of(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    given = {"use_cpu": True, "max_steps": 4, "logging_steps": 1, "disable_tqdm": True}
    return {"output_dir": str(folder)} | given | changes


def sft(base, folder, **changes):
    args = trl.SFTConfig(**options_of(folder, changes))
    return trl.SFTTrainer(base, args=args, train_dataset=Dataset.from_list(TEXTS))


def packed(base, folder, **changes):
    return sft(base, folder, packing=True, max_length=64, **changes)


def dpo(base, folder, reference=None, **changes):
    args = trl.DPOConfig(**options_of(folder, changes))
    rows = Dataset.from_list(PREFERENCES)
    return trl.DPOTrainer(base, reference, args=args, train_dataset=rows)


def kto(base, folder, **changes):
    args = trl.KTOConfig(**options_of(folder, changes))
    return trl.KTOTrainer(base, args=args, train_dataset=Dataset.from_list(JUDGED))


def grpo(base, folder, **changes):
    args = trl.GRPOConfig(**options_of(folder, {"max_completion_length": 8} | changes))
    return trl.GRPOTrainer(base, reward, args=args, train_dataset=Dataset.from_list(PROMPTS))


def rloo(base, folder, **changes):
    args = trl.RLOOConfig(**options_of(folder, {"max_completion_length": 8} | changes))
    return trl.RLOOTrainer(base, reward, args=args, train_dataset=Dataset.from_list(PROMPTS))


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch) -> None:
    monkeypatch.setenv("CI", "1")


@pytest.fixture
def policy(mixture, base_folder) -> Callable[..., DyLoRA_MoE]:
    """A mixture that differs from its base, which trainers can load by its name."""
    return lambda **settings: mixture(load_base(str(base_folder)), maturity=[0, 0, 0], **settings)


def own(model: DyLoRA_MoE) -> list[Tensor]:
    return [parameter.detach().clone() for _, parameter in model.own_parameters()]


def logs(trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "make",
    [sft, packed, dpo] + [pytest.param(make, marks=pytest.mark.slow) for make in (kto, grpo, rloo)],
)
def test_trl_trains_saves_and_loads_a_mixture(policy, ids, tmp_path, make):
    model = policy()
    before = own(model)
    trainer = make(model.base, tmp_path)
    trainer.train()
    assert sum(not torch.equal(a, b) for a, b in zip(before, own(model), strict=True)) > 10
    assert [round(entry["expert/0/maturity"], 3) for entry in logs(trainer)] == [0.125, 0.75, 1, 1]
    assert all(entry["aux_loss"] > 0.9 for entry in logs(trainer))
    again = DyLoRA_MoE.from_pretrained(tmp_path / "checkpoint-4")
    vars(model.base).pop("forward")  # which casts to bfloat16
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
    assert all(map(torch.equal, again.maturity, model.maturity))


def test_trl_adds_the_routers_losses_to_its_own(policy, tmp_path):
    entries = [
        logs_of_one_step(sft, policy(), tmp_path),
        logs_of_one_step(sft, policy(), tmp_path, router_aux_loss_coef=0.0),
    ]
    assert "aux_loss" not in entries[1]
    difference = entries[0]["loss"] - entries[1]["loss"]
    assert difference == pytest.approx(0.01 * entries[0]["aux_loss"], rel=0.02)


def logs_of_one_step(make, model, folder, **changes) -> dict[str, float]:
    trainer = make(model.base, folder, max_steps=1, save_strategy="no", bf16=False, **changes)
    trainer.train()
    return logs(trainer)[0]


@pytest.mark.parametrize("given", [False, True])
def test_policy_and_reference_are_equal_before_the_first_step(policy, tmp_path, caplog, given):
    model = policy()
    reference = model.reference_model() if given else None
    with caplog.at_level(logging.WARNING, "dylora"):
        # In bfloat16, the default of TRL, roundings are as large as the first margins are here.
        trainer = dpo(model.base, tmp_path, reference, bf16=False, learning_rate=1e-2)
        trainer.train()
    said = [record.message for record in caplog.records if "the reference of" in record.message]
    assert len(said) == (not given)
    margins = [entry["rewards/margins"] for entry in logs(trainer)]
    assert margins[0] == pytest.approx(0, abs=1e-5)
    assert margins[-1] > 0.1
    theirs = experts_of(trainer.ref_model).mixture
    assert theirs.maturity.maturity.tolist() == [0, 0, 0]
    for (name, mine), (_, other) in zip(
        model.base.named_parameters(), trainer.ref_model.named_parameters(), strict=True
    ):
        assert (mine.data_ptr() == other.data_ptr()) == ("dylora" not in name)


def test_a_bare_base_that_is_given_as_the_reference_stays_what_it_is(policy, base_folder, tmp_path):
    model, given = policy(), load_base(str(base_folder))
    trainer = dpo(model.base, tmp_path, given, save_strategy="no")
    trainer.train()
    assert experts_of(trainer.ref_model) is None
    assert logs(trainer)[0]["rewards/margins"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("make", [kto, rloo])
def test_the_reference_that_other_trainers_load_is_the_policy_too(policy, tmp_path, make):
    trainer = make(policy().base, tmp_path, save_strategy="no", bf16=False)
    trainer.train()
    first = logs(trainer)[0]
    assert first["rewards/margins" if make is kto else "kl"] == pytest.approx(0, abs=1e-5)
    assert experts_of(trainer.ref_model) is not None


@pytest.mark.slow
def test_a_resumed_dpo_has_the_reference_that_it_began_with(policy, tmp_path):
    whole, resumed = policy(), policy()
    first = dpo(whole.base, tmp_path, save_steps=2)
    first.train()
    second = dpo(resumed.base, tmp_path, save_steps=2)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for ours, theirs in zip(own(resumed), own(whole), strict=True):
        assert torch.equal(ours, theirs)
    margins = [[entry["rewards/margins"] for entry in logs(t)] for t in (first, second)]
    assert margins[0] == margins[1]


def test_a_reference_that_follows_the_policy_is_refused(policy, tmp_path):
    model = policy()
    with pytest.raises(ValueError, match="sync_ref_model would move base weights"):
        dpo(model.base, tmp_path, model.reference_model(), sync_ref_model=True)


def test_the_mixture_itself_is_no_model_for_trl(policy, tmp_path):
    with pytest.raises(ValueError, match=r"model\.base"):
        sft(policy(), tmp_path)

"""Training by hand: what `observe` keeps, and what `set_routing` changes."""

from contextlib import nullcontext

import pytest
import torch

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.data.tokenize import TokenizedSet
from dylora.training.run import Run, prepare
from dylora.training.step import next_batches, run_step
from dylora.training.validation import validate

PLAIN = {"lora_dropout": 0.0, "expert_dropout": 0.0, "maturity_mode": "usage"}


def step_by_hand(run: Run) -> float:
    """As a notebook writes it: two micro-batches a step, `observe` once."""
    model, seen, loss = run.model.train(), None, 0.0
    batches, totals = next_batches(run)
    for batch in batches:
        output = model(**batch, totals=totals, keep_logits=False)
        output.loss.backward()
        loss += output.loss.item()
        seen = output.observation(batch["labels"]).plus(seen)
    rate = run.optimizer.param_groups[0]["lr"] / run.config.train.learning_rate
    torch.nn.utils.clip_grad_norm_([p for _, p in model.own_parameters()], 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.scheduler.step()
    model.observe(seen, steps=run.steps, target_tokens=run.target_tokens, rate=rate)
    return loss


def test_observing_by_hand_keeps_what_a_run_keeps(make_config):
    run = prepare(make_config("run", moe=PLAIN), fresh=True)
    hand = prepare(make_config("hand", moe=PLAIN), fresh=True)
    for _ in range(3):
        assert step_by_hand(hand) == pytest.approx(run_step(run).loss, rel=1e-6)
    torch.testing.assert_close(hand.model.maturity, run.model.maturity, rtol=1e-5, atol=1e-9)
    assert run.model.maturity.maturity.max() > 0
    assert [row.steps for row in hand.model.experts.table] == [3, 3, 3]
    assert hand.model.experts.step == 3
    for name, fractions in run.model.carried_fractions().items():
        torch.testing.assert_close(hand.model.carried_fractions()[name], fractions)


def test_observing_a_pass_takes_its_labels_and_the_length_of_the_run(mixture, ids):
    model = mixture(maturity=[0.0] * 3, maturity_mode="schedule")
    output = model(ids, labels=ids)
    model.observe(output, ids, steps=2)
    assert model.experts.progress == 0.5
    assert model.maturity.maturity.tolist() == pytest.approx([0.75] * 3)
    model.observe(output, ids, steps=2)
    assert model.maturity.maturity.tolist() == [1.0] * 3
    with pytest.raises(ValueError, match=r"step is 3, but must be from 1 to steps \(2\)"):
        model.observe(output, ids, steps=2)
    with pytest.raises(ValueError, match="labels are missing"):
        model.observe(output, steps=9)
    with pytest.raises(ValueError, match="nothing to observe"):
        model.observe(model(ids), ids, steps=9)


# Routing


def test_a_changed_top_k_temperature_and_mode_hold_at_once_and_in_the_files(
    mixture, llama, ids, tmp_path
):
    model = mixture(maturity=[1.0] * 3, top_k_experts=2, routing_mode="maturity")
    assert (model.get_routing_weights(ids) > 0).sum(-1).unique().tolist() == [2]
    model.set_routing(top_k=1)
    assert (model.get_routing_weights(ids) > 0).sum(-1).unique().tolist() == [1]
    model.set_routing(mode="dense", temperature=100.0)
    gates = model.get_routing_weights(ids)
    torch.testing.assert_close(gates, torch.full_like(gates, 1 / 3), rtol=0.1, atol=0)
    assert (model.config.top_k_experts, model.config.routing_mode) == (1, "dense")
    model.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=llama())
    assert again.config == model.config
    assert torch.equal(again.eval().get_routing_weights(ids), model.get_routing_weights(ids))


@pytest.mark.parametrize("settings", [{}, {"expert_ranks": [1, 3, 3]}])
def test_a_token_may_keep_as_many_experts_as_there_are_by_now(
    settings, mixture, llama, ids, tmp_path
):
    model = mixture(maturity=[1.0] * 3, top_k_experts=2, **settings)
    for _ in range(2):
        model.experts.create_expert(share=0.2)
    model.set_maturity(model.maturity._replace(maturity=torch.ones(5, dtype=torch.float64)))
    model.set_routing(top_k=4)
    assert (model.get_routing_weights(ids) > 0).sum(-1).unique().tolist() == [4]
    with pytest.raises(ValueError, match=r"top_k_experts is 6, but must be from 1 .* \(5\)"):
        model.set_routing(top_k=6)
    model.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=llama()).eval()
    assert again.config.top_k_experts == 4
    assert torch.equal(again(ids).logits, model(ids).logits)
    again.set_routing(temperature=1.0)
    again.detach_router()
    again.attach_router()
    assert (again.get_routing_weights(ids) > 0).sum(-1).unique().tolist() == [4]


def test_routers_that_were_taken_off_follow_a_change_when_they_are_back(mixture, ids):
    model = mixture(maturity=[1.0] * 3)
    routers = model.detach_router()
    model.set_routing(top_k=1)
    model.attach_router(routers)
    assert (model.get_routing_weights(ids) > 0).sum(-1).unique().tolist() == [1]


def test_routing_that_cannot_be_is_refused_and_changes_nothing(mixture):
    model = mixture()
    before = model.config
    with pytest.raises(ValueError, match="top_k_experts"):
        model.set_routing(top_k=4)
    with pytest.raises(ValueError, match="router_temperature"):
        model.set_routing(temperature=0.0)
    with pytest.raises(ValueError, match="routing_mode"):
        model.set_routing(mode="sparsest")
    with pytest.raises(ValueError, match="router_type is fixed"):
        mixture(router_type="fixed").set_routing(top_k=1)
    with pytest.raises(AttributeError, match="config cannot be assigned: set_routing"):
        model.config = MoELoraConfig()
    assert model.config is before


# Modes


class Stop(Exception):
    """What a signal does to a validation."""


@pytest.mark.parametrize("interrupted", [False, True])
def test_validating_leaves_every_module_in_its_mode(mixture, interrupted):
    model, rows = mixture().train(), TokenizedSet("a", "validation")
    rows.append([1, 5, 6], [7, 2])
    model.base.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    seen = []

    def look() -> None:
        seen.append(any(module.training for module in model.modules()))
        if interrupted:
            raise Stop

    with pytest.raises(Stop) if interrupted else nullcontext():
        validate(model, [rows], batch_size=1, pad_token_id=0, before_batch=look)
    assert seen == [False]
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_a_failed_search_for_the_head_leaves_every_module_in_its_mode(mixture, ids, monkeypatch):
    model = mixture().train()
    monkeypatch.setattr(type(model.base), "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(ids, labels=ids, keep_logits=False)
    assert all(module.training for module in model.modules())

"""What a pass leaves behind: its wishes end with it, and what its sites held of it is let go."""

import copy

import pytest
import torch
from torch import Tensor

from dylora import DyLoRA_MoE
from families import FAMILIES

WITH_DROPOUT = {"lora_dropout": 0.1, "maturity": [1.0, 1.0, 0.0]}


def held(model: DyLoRA_MoE) -> list[str]:
    """What sites hold of a pass, but for their decisions."""
    names = ("few", "_mix", "_input", "_dropped", "outside", "_entries")
    return [n for site in model.mixture.blocks for n in names if getattr(site, n)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_after_a_step_sites_hold_nothing_of_it(checkpointing, mixture, ids):
    model = mixture(**WITH_DROPOUT).train()
    if checkpointing:
        model.enable_checkpointing()
    loss = model(ids, labels=ids).loss
    assert held(model) == []
    decisions = [site.output for site in model.mixture.blocks]
    loss.backward()
    assert held(model) == []
    for site, decision in zip(model.mixture.blocks, decisions, strict=True):
        assert site.output is decision  # not that of a recomputation, which is another graph


def test_a_second_backward_pass_recomputes_again(mixture, ids):
    found = []
    for checkpointing in (False, True):
        model = mixture()
        if checkpointing:
            model.enable_checkpointing()
        model.train()
        output = model(ids, labels=ids)
        output.lm_loss.backward(retain_graph=True)
        output.aux_loss.backward()
        found.append([p.grad for _, p in model.own_parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_a_block_that_a_pass_skips_has_no_stale_decision(mixture, random_base, ids):
    model = mixture(random_base("OPTConfig", **FAMILIES["opt"].sizes, layerdrop=0.999)).train()
    model.eval()(ids, labels=ids).loss.backward()
    model.train()
    with pytest.raises(ValueError, match="took no part in this pass"):
        model(ids, labels=ids)


def test_weights_of_a_caller_end_with_their_pass(mixture, ids):
    model, weights = mixture(), torch.eye(3)[[1, 2]]
    with torch.no_grad():
        expected = model.base.model(ids).last_hidden_state
        model(ids, routing_weights=weights)
        found: Tensor = model.base.model(ids).last_hidden_state
    assert torch.equal(found, expected)


def test_a_model_is_copied_after_a_pass_with_trained_weights_of_a_caller(mixture, ids):
    model = mixture()
    logits = torch.zeros(2, 3, requires_grad=True)
    model(ids, labels=ids, routing_weights=logits.softmax(-1)).loss.backward()
    assert logits.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(copy.deepcopy(model)(ids).logits, model(ids).logits)


def test_a_mask_of_four_dimensions_reaches_the_base_as_it_is(mixture, ids):
    model, length = mixture(), ids.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril().expand(len(ids), 1, -1, -1)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    torch.testing.assert_close(model(ids, mask, labels=ids).loss, model(ids, labels=ids).loss)

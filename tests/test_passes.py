"""Each pass has its own inputs, in its own thread, and leaves nothing behind."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

from families import FAMILIES

WITH_DROPOUT = {"lora_dropout": 0.1, "maturity": [1.0, 1.0, 0.0]}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_leaves_nothing_of_its_pass(checkpointing, mixture, ids):
    model = mixture(**WITH_DROPOUT).train()
    if checkpointing:
        model.enable_checkpointing()
    passes = []
    model.mixture.blocks[0].router.register_forward_pre_hook(
        lambda module, args: passes.append(weakref.ref(args[1]))
    )
    loss = model(ids, labels=ids).loss
    assert model.mixture.state.current() is None
    loss.backward()
    assert model.mixture.state.current() is None
    del loss
    gc.collect()
    assert len(passes) == 1 + checkpointing
    assert [pass_() for pass_ in passes] == [None] * len(passes)


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


def weights_seen(model) -> list:
    """The routing weights of every decision from here on."""
    seen = []
    for block in model.mixture.blocks:

        def decide(x, pass_, real=block.decide):
            seen.append(pass_.routing_weights)
            return real(x, pass_)

        block.decide = decide
    return seen


@pytest.mark.parametrize("checkpointing", ["none", "ours", "the user's"])
def test_weights_of_a_trained_pass_do_not_reach_the_decoder_called_alone(
    checkpointing, mixture, ids
):
    model = mixture().train()
    if checkpointing == "ours":
        model.enable_checkpointing()
    if checkpointing == "the user's":
        # transformers 5.23 renamed the method.
        name = "activation_checkpointing_enable"
        enable = getattr(model.base, name, model.base.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    with torch.no_grad():
        expected = model.base.model(ids).last_hidden_state
    seen = weights_seen(model)
    model(ids, labels=ids, routing_weights=torch.eye(3)[[1, 2]]).loss.backward()
    recomputed = 0 if checkpointing == "none" else 2
    assert len(seen) == 2 + recomputed
    assert all(weights is not None for weights in seen)
    with torch.no_grad():
        found = model.base.model(ids).last_hidden_state
    assert torch.equal(found, expected)
    assert seen[-2:] == [None, None]


def test_the_decoder_called_alone_is_a_pass_with_its_own_mask(mixture, ids):
    model, seen = mixture(), []
    for _, router in model.routers():
        router.register_forward_pre_hook(lambda module, args: seen.append(args[1].token_mask))
    mask = torch.ones_like(ids)
    model.base.model(input_ids=ids, attention_mask=mask)
    model.base.model(input_ids=ids)
    assert [value is mask for value in seen] == [True, True, False, False]
    assert model.mixture.state.current() is None


def in_threads(calls) -> list:
    """The results of all calls, each in a thread of its own; an error of one is raised here."""
    results: list = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"router_scope": "shared"}])
def test_threads_that_generate_with_one_model_do_not_meet(settings, mixture, ids):
    model = mixture(**settings)
    texts = [(ids[:, :n], torch.eye(3)[[n % 3] * 2] if n % 2 else None) for n in (2, 3, 5, 7)]

    def generate(text, weights):
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        return [model.generate(text, routing_weights=weights, **options) for _ in range(4)]

    expected = [generate(*text)[0] for text in texts]
    found = in_threads([lambda text=text: generate(*text) for text in texts])
    for results, right in zip(found, expected, strict=True):
        assert all(torch.equal(result, right) for result in results)


def test_adapters_disabled_in_one_thread_are_on_in_another(mixture, ids):
    model = mixture()
    with torch.no_grad():
        mixed = model(ids).logits
        with model.disable_adapters():
            base = model(ids).logits
            [other] = in_threads([lambda: model(ids).logits.detach()])
            assert torch.equal(model(ids).logits, base)
    assert torch.equal(other, mixed)
    assert not torch.equal(base, mixed)


def test_a_pass_that_fails_ends_all_the_same(mixture, ids):
    model = mixture()
    expected = model(ids).logits

    def fail(module, args):
        raise KeyError("broken")

    handle = model.base.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="broken"):
        model(ids, routing_weights=torch.eye(3)[[0, 0]])
    handle.remove()
    assert model.mixture.state.current() is None
    assert torch.equal(model.base(input_ids=ids).logits, expected)


def test_weights_of_a_pass_that_never_began_do_not_reach_the_next(mixture, ids):
    model = mixture()
    expected = model(ids).logits

    def fail(module, args):
        raise KeyError("broken")

    handle = model.base.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(KeyError, match="broken"):
        model(ids, routing_weights=torch.eye(3)[[0, 0]])
    handle.remove()
    assert torch.equal(model.base(input_ids=ids).logits, expected)


def test_data_parallel_is_refused_in_one_line(mixture, ids):
    model = mixture()
    replica = model.base._replicate_for_data_parallel()
    with pytest.raises(ValueError, match="use DistributedDataParallel"):
        replica(input_ids=ids)

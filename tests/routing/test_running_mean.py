"""Trained routers that read the running mean of the text: against the formula, and however it is
cut into rows, passes and micro-batches."""

import pytest
import torch
from transformers import DynamicCache

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.data.packing import collate_packed

CONTEXT = {"router_scope": "shared", "router_input": "running_mean"}
TEXTS = [[9, 5, 21, 7, 7, 12, 20, 3, 22], [17, 6, 8, 23, 11], [19, 4, 14]]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


def alone(text):
    return torch.tensor([text])


def padded(side):
    """The texts as rows of one length: ids and mask."""
    length = max(map(len, TEXTS))
    ids = torch.full((len(TEXTS), length), 13)  # 0 would be embedded as zeros
    mask = torch.zeros_like(ids)
    for row, text in enumerate(TEXTS):
        own = slice(length - len(text), None) if side == "left" else slice(len(text))
        ids[row, own], mask[row, own] = torch.tensor(text), 1
    return ids, mask


def entering(model, ids):
    """What enters the first routed block, [B, S, D]."""
    seen = []
    first = model.base.get_submodule(model.mixture.blocks[0].name)
    keep = lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    handle = first.register_forward_pre_hook(keep, with_kwargs=True)
    with model.disable_adapters():
        model(ids)
    handle.remove()
    return seen[0].detach()


def probabilities_by_hand(weight, bias, x_SD, temperature=2.0):
    """Token by token: the mean of all states up to it, brought to mean 0 and variance 1, through
    the linear router and a softmax."""
    rows = []
    for end in range(1, len(x_SD) + 1):
        mean_D = sum(x_SD[:end]) / end
        centred_D = mean_D - mean_D.mean()
        normed_D = centred_D / (centred_D.pow(2).mean() + 1e-10).sqrt()
        rows.append((((weight @ normed_D) + bias) / temperature).softmax(-1))
    return torch.stack(rows)


def test_probabilities_and_gradients_are_those_of_the_formula(mixture, llama):
    model = mixture(llama().double(), maturity=[0, 0, 0], **CONTEXT)
    ((_, router),) = model.routers()
    router.double()
    routing = model(alone(TEXTS[0])).routing
    weight, bias = router.outer.weight, router.outer.bias
    expected = probabilities_by_hand(weight, bias, entering(model, alone(TEXTS[0]))[0])
    for site in range(routing.gates.shape[2]):
        torch.testing.assert_close(routing.gates[0, :, site], expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad((routing.gates[0, :, 0] * weights).sum(), [weight, bias])
    theirs = torch.autograd.grad((expected * weights).sum(), [weight, bias])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_the_loss_trains_the_router_whose_input_no_adapter_touches(mixture):
    model = mixture(**CONTEXT).train()
    ids = alone(TEXTS[0])
    model(ids, labels=ids).lm_loss.backward()
    ((_, router),) = model.routers()
    assert router.outer.weight.grad.abs().max() > 0
    before = model(ids).routing.gates.detach()
    with torch.no_grad():
        for name, parameter in model.named_expert_parameters():
            parameter.mul_(3 if name.endswith("lora_B") else 1)
    assert torch.equal(model(ids).routing.gates, before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_of_the_text(side, mixture):
    model = mixture(**CONTEXT)
    ids, mask = padded(side)
    gates = model(ids, mask).routing.gates
    for row, text in enumerate(TEXTS):
        own = gates[row, mask[row] == 1]
        torch.testing.assert_close(own, model(alone(text)).routing.gates[0])


def test_labels_do_not_end_the_text(mixture):
    model, ids = mixture(**CONTEXT), alone(TEXTS[0])
    labels = torch.where(torch.arange(ids.shape[1]) < 4, -100, ids)
    assert torch.equal(model(ids, labels=labels).routing.gates, model(ids).routing.gates)


def test_packed_texts_are_routed_each_by_itself(mixture):
    model = mixture(**CONTEXT)
    packed = collate_packed([[{"input_ids": text, "labels": text} for text in TEXTS]], 0)
    gates = model(packed["input_ids"], position_ids=packed["position_ids"]).routing.gates[0]
    expected = torch.cat([model(alone(text)).routing.gates[0] for text in TEXTS])
    torch.testing.assert_close(gates[: len(expected)], expected)
    mask = torch.ones_like(packed["input_ids"])
    with pytest.raises(ValueError, match="leave it out"):
        model(packed["input_ids"], mask, position_ids=packed["position_ids"])


@pytest.mark.parametrize(
    "options",
    [{}, {"prefill_chunk_size": 2}, {"num_return_sequences": 2}, {"use_cache": False}],
    ids=str,
)
def test_decoding_equals_one_pass_over_the_whole_text(options, mixture):
    model = mixture(**CONTEXT)
    ids, mask = padded("left")
    if "num_return_sequences" in options:
        options = options | {"do_sample": True}
    assert_decodes_as_it_reads(model, ids, mask, **options)


def assert_decodes_as_it_reads(model, ids, mask, **options):
    asked = {"output_logits": True, "return_dict_in_generate": True} | GREEDY | options
    text = model.generate(ids, attention_mask=mask, **asked)
    mask = mask.repeat_interleave(len(text.sequences) // len(ids), 0)
    mask = torch.cat([mask, torch.ones(len(mask), GREEDY["max_new_tokens"])], 1)
    logits = model(text.sequences, mask).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(text.logits, 1), logits, rtol=0, atol=1e-5)


def test_a_static_cache_takes_texts_without_padding_alone(mixture):
    model = mixture(**CONTEXT)
    ids, mask = padded("left")
    assert_decodes_as_it_reads(model, ids, torch.ones_like(mask), cache_implementation="static")
    with pytest.raises(ValueError, match="cannot tell padding with a static cache"):
        model.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)


def test_a_loop_over_a_cache_goes_on_with_the_text(mixture):
    model, ids = mixture(**CONTEXT), alone(TEXTS[0])
    cache = DynamicCache(config=model.base.config)
    parts = [model(part, past_key_values=cache, use_cache=True) for part in ids.split(4, 1)]
    gates = torch.cat([part.routing.gates for part in parts], 1)
    torch.testing.assert_close(gates, model(ids).routing.gates)


def test_a_cache_that_was_cut_is_refused_and_one_that_was_emptied_is_not(mixture):
    model, ids = mixture(**CONTEXT), alone(TEXTS[0])
    cache = DynamicCache(config=model.base.config)
    model(ids[:, :6], past_key_values=cache, use_cache=True)
    cache.crop(-2)
    said = "this cache holds 4 tokens, but routing by the running mean has read 6 of them"
    with pytest.raises(ValueError, match=said):
        model(ids[:, 4:], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=said):
        model.generate(ids, past_key_values=cache, **GREEDY)
    cache.crop(-4)
    again = model(ids, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(again.routing.gates, model(ids).routing.gates)


def test_tokens_that_came_into_a_cache_past_the_router_are_refused(mixture):
    model, ids = mixture(**CONTEXT), alone(TEXTS[0])
    cache = DynamicCache(config=model.base.config)
    model(ids[:, :3], past_key_values=cache, use_cache=True)
    with model.disable_adapters():
        model(ids[:, 3:5], past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"this cache holds 5 tokens, but .* has read 3 of them"):
        model(ids[:, 5:], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"assistant_early_exit": 1},
        {"use_mtp": True},
    ],
    ids=str,
)
def test_what_takes_tokens_back_is_refused(options, mixture):
    with pytest.raises(ValueError, match="the running mean cannot follow beams or assisted"):
        mixture(**CONTEXT).generate(alone(TEXTS[0]), **GREEDY, **options)


def test_tokens_that_are_taken_back_within_generate_are_refused(mixture):
    model, ids = mixture(**CONTEXT), alone(TEXTS[0])
    cache = DynamicCache(config=model.base.config)

    def crop(ids, scores):
        cache.crop(-1)
        return scores

    with pytest.raises(ValueError, match=r"this cache holds \d+ tokens, but .* has read \d+ of"):
        model.generate(ids, past_key_values=cache, logits_processor=[crop], **GREEDY)


def test_recomputation_repeats_the_decisions(mixture):
    model, ids = mixture(**CONTEXT).train(), alone(TEXTS[0])
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for _, p in model.own_parameters()])
        model.gradient_checkpointing_enable()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("router_type", ["learned_with_maturity", "threshold"])
def test_a_checkpoint_routes_as_before(router_type, mixture, llama, tmp_path):
    model = mixture(**CONTEXT, router_type=router_type)
    model.save_pretrained(tmp_path / "m")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "m", llama()).eval()
    ids = alone(TEXTS[0])
    assert torch.equal(again(ids).logits, model(ids).logits)
    token = mixture(router_scope="shared", router_type=router_type)
    assert not torch.equal(token(ids).routing.gates, model(ids).routing.gates)


@pytest.mark.parametrize(
    "settings",
    [
        {"router_scope": "site"},
        {"router_type": "fixed"},
        {"router_scope": "prompt"},
        {"router_scope": "running_mean"},
    ],
    ids=str,
)
def test_where_it_would_not_act_it_is_refused(settings):
    with pytest.raises(ValueError, match="router_input is 'running_mean'"):
        MoELoraConfig(**CONTEXT | settings)

"""Routing by the prompt: one decision a sequence, from the skill library, however it is decoded."""

import copy
import re

import pytest
import torch
from transformers import DynamicCache, StaticCache

from dylora import DyLoRA_MoE, MoELoraConfig, SkillLibrary
from dylora.adapters import block
from dylora.features import embed
from dylora.kernels import decode
from dylora.routing.prompt import PromptRouter
from dylora.routing.prompt_tokens import PromptTokens

SKILLS = 3


def prompt(skill: int, length: int = 9, seed: int = 0) -> list[int]:
    """Ids of a skill: each has eight of its own."""
    draw = torch.Generator().manual_seed(100 * skill + seed)
    low = 4 + 8 * skill
    return torch.randint(low, low + 8, (length,), generator=draw).tolist()


def rows(skill: int, count: int, first: int = 0) -> list[list[int]]:
    return [prompt(skill, 9, first + seed) for seed in range(count)]


@pytest.fixture
def routed(mixture):
    """Three experts with random B, each serving a skill, on a tiny base."""

    def build(base=None, *, skills=SKILLS, **settings):
        settings = {"num_experts": SKILLS, "router_scope": "prompt", "top_k_experts": 1} | settings
        model = mixture(base, **settings)
        library = SkillLibrary(model)
        first = model.config.shared_experts
        for skill in range(skills):
            name, expert = f"skill {skill}", first + skill
            library.add(name, rows(skill, 20), rows(skill, 20, 50), expert=expert)
        return model

    return build


def one_hot(*experts: int, of: int = SKILLS) -> torch.Tensor:
    return torch.eye(of)[list(experts)]


def padded(texts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and mask."""
    length = max(map(len, texts))
    ids = torch.tensor([[0] * (length - len(t)) + t for t in texts])
    mask = torch.tensor([[0] * (length - len(t)) + [1] * len(t) for t in texts])
    return ids, mask


# The decision


def test_every_token_of_a_sequence_has_the_expert_of_its_prompts_skill(routed):
    model = routed()
    ids = torch.tensor([prompt(2, seed=90), prompt(0, seed=91), prompt(1, seed=92)])
    output = model(ids)
    expected = one_hot(2, 0, 1)[:, None, None].expand_as(output.routing.gates)
    assert torch.equal(output.routing.gates, expected)
    given = model(ids, routing_weights=one_hot(2, 0, 1)).logits
    assert torch.equal(output.logits, given)


def test_only_experts_that_some_prompt_has_chosen_are_computed(routed, monkeypatch):
    model = routed(shared_experts=1, num_experts=4)
    model.experts.freeze(1, 2)  # two stacks more
    plans, columns = [], []
    make_plan, dense_layout = block.make_plan, decode.dense_layout
    monkeypatch.setattr(
        block, "make_plan", lambda *given: plans.append(make_plan(*given)) or plans[-1]
    )

    def layout(projections, dtype):
        found = dense_layout(projections, dtype)
        columns.append(found.A_CD.shape[0] // len(projections) // model.config.r)
        return found

    monkeypatch.setattr(decode, "dense_layout", layout)
    for skills, experts in (((2,), 2), ((0, 2), 3), ((0, 1, 2), 4)):
        plans.clear()
        columns.clear()
        ids = torch.tensor([prompt(skill, seed=90) for skill in skills])
        weights = torch.tensor([[1.0, *row] for row in one_hot(*skills).tolist()])
        ours = model.generate(ids, max_new_tokens=5)
        assert {plan.gates.shape[1] for plan in plans if not plan.sparse} == {experts}
        assert set(columns) == {experts}
        assert torch.equal(ours, model.generate(ids, routing_weights=weights, max_new_tokens=5))
        plans.clear()
        model.train()(ids)
        assert {plan.gates.shape[1] for plan in plans} == {experts}
        model.eval()


def test_a_new_expert_that_is_trained_alone_is_computed_alone(routed, monkeypatch):
    model, plans = routed(), []
    model.experts.freeze(0, 1, 2)
    model.experts.activate(model.experts.create_expert())
    make_plan = block.make_plan
    monkeypatch.setattr(
        block, "make_plan", lambda *given: plans.append(make_plan(*given)) or plans[-1]
    )
    model.train()(torch.tensor([prompt(0)])).logits.sum().backward()
    assert {(plan.gates.shape[1], len(plan.dense)) for plan in plans} == {(1, 1)}


def test_soft_gates_are_the_librarys_probabilities(routed):
    model = routed(routing_mode="dense")
    ids = torch.tensor([prompt(0, 5) + prompt(1, 4), prompt(1, 3) + prompt(2, 6)])
    chances = model.skill_library.log_probabilities(embed(model.mixture, list(ids)).prompt).exp()
    gates = model.train()(ids).routing.gates
    torch.testing.assert_close(gates[:, 0, 0], chances.float(), rtol=1e-3, atol=1e-5)
    assert (gates == gates[:, :1, :1]).all()


def test_labels_padding_and_bos_are_not_the_prompts(routed):
    model = routed()
    bos = model.base.config.bos_token_id
    texts = [prompt(0), prompt(1, 5)]
    answer = prompt(2, 9, seed=3)  # of another skill: an answer decides nothing
    rows_ = [[bos, *text, *answer] for text in texts]
    ids, mask = padded(rows_)
    labels = torch.full_like(ids, -100)
    labels[:, -len(answer) :] = ids[:, -len(answer) :]
    gates = model(ids, mask, labels).routing.gates
    assert torch.equal(gates[:, 0, 0], one_hot(0, 1))
    own = PromptTokens((bos,)).mask(ids, mask, labels)
    assert own.sum(-1).tolist() == [9, 5]
    for row, text in zip(zip(ids, own, strict=True), texts, strict=True):
        assert row[0][row[1] > 0].tolist() == text


def test_a_text_that_is_filled_up_without_a_mask_is_routed_as_it_is_alone(routed):
    """As lm-evaluation-harness calls the base; the order of a batch must not decide."""
    model = routed(routing_mode="dense")
    short, long = prompt(0, 4) + prompt(1, 2), prompt(2, 12)
    together = model(torch.tensor([short + [0] * 6, long])).routing.gates
    alone = model(torch.tensor([short])).routing.gates
    torch.testing.assert_close(together[0, :6], alone[0])


def test_what_routes_is_the_mean_that_the_library_knows(routed):
    """The feature in a pass is that of `embed`, to the last digits of float32."""
    model, seen = routed(), []
    router = next(router for _, router in model.routers())
    decide = router._decide
    router._decide = lambda prompts, *rest: seen.append(prompts) or decide(prompts, *rest)
    ids, mask = padded([prompt(0, 9), prompt(1, 4)])
    model(ids, mask)
    expected = embed(model.mixture, [prompt(0, 9), prompt(1, 4)]).prompt
    torch.testing.assert_close(seen[0].double(), expected, rtol=0, atol=1e-5)


def test_the_whole_text_is_the_prompt_where_nothing_says_otherwise(routed):
    model = routed()
    labels = torch.tensor([prompt(1)])  # a target from the first token on: no prompt
    assert torch.equal(model(labels, labels=labels).routing.gates[0, 0, 0], one_hot(1)[0])


def test_the_rule_of_float32_agrees_with_the_library(routed):
    model = routed()
    router = next(router for _, router in model.routers())
    assert isinstance(router, PromptRouter)
    texts = [prompt(skill, 6, seed=n) for skill in range(3) for n in range(20)]
    prompts = embed(model.mixture, texts).prompt
    ours = router.rule.log_probabilities(prompts.float())
    torch.testing.assert_close(
        ours.double(), model.skill_library.log_probabilities(prompts), rtol=1e-3, atol=1e-2
    )


# Which experts are enabled


def test_skills_of_experts_that_take_no_part_do_not_compete(routed):
    model = routed()
    model.experts.activate(0, 2)
    gates = model.train()(torch.tensor([prompt(1)])).routing.gates[0, 0, 0]
    assert gates.sum() == 1
    assert gates[1] == 0


def test_a_new_expert_that_serves_no_skill_yet_is_trained_alone_with_the_gate_one(routed):
    model = routed()
    new = model.experts.create_expert(skill="new")
    ids = torch.tensor([prompt(0)])
    known = model(ids).routing.gates
    assert torch.equal(known[0, 0, 0], one_hot(0, of=4)[0])  # it changes nothing yet
    model.experts.activate(new)
    assert torch.equal(model(ids).routing.gates[0, 0, 0], one_hot(3, of=4)[0])


def test_without_skills_one_expert_takes_all_and_several_are_refused(mixture):
    model = mixture(num_experts=1, router_scope="prompt")
    assert (model(torch.tensor([prompt(0)])).routing.gates == 1).all()
    model.experts.create_expert()
    with pytest.raises(ValueError, match="no enabled expert serves a skill: add skills to"):
        model(torch.tensor([prompt(0)]))


def test_a_new_skill_leaves_the_decisions_between_old_ones_where_they_were(routed):
    model = routed(skills=2)
    ids = torch.tensor([prompt(skill, seed=200 + n) for skill in (0, 1) for n in range(30)])
    before = model(ids).routing.gates
    model.skill_library.add("skill 2", rows(2, 20), rows(2, 20, 50), expert=2)
    assert torch.equal(model(ids).routing.gates, before)


def test_an_expert_may_serve_two_skills_and_a_skill_nobody(routed):
    model = routed(skills=2)
    model.skill_library.add("more", rows(2, 20), rows(2, 20, 50), expert=0)
    ids = torch.tensor([prompt(2), prompt(1)])
    assert torch.equal(model(ids).routing.gates[:, 0, 0], one_hot(0, 1))
    model.skill_library.reassign(0, None)
    gates = model(ids).routing.gates[:, 0, 0]
    assert torch.equal(gates, one_hot(0, 1) * torch.tensor([[0.0], [1.0]]))
    with model.disable_adapters():
        bare = model(ids).logits[0]
    assert torch.equal(model(ids).logits[0], bare)


def test_merged_and_retired_experts_leave_their_skills_to_the_other_and_to_nobody(routed):
    model = routed()
    model.experts.merge(0, 2)
    assert [model.skill_library.expert_of(f"skill {n}") for n in range(3)] == [0, 1, 0]
    model.experts.retire(1)
    assert model.skill_library.expert_of("skill 1") is None
    ids = torch.tensor([prompt(n) for n in range(3)])
    assert torch.equal(model(ids).routing.gates.sum((1, 2, 3)) > 0, torch.tensor([1, 0, 1]) > 0)


def test_a_prompt_that_is_far_from_every_skill_has_no_expert_and_the_library_says_so(routed):
    model = routed()
    strange = torch.tensor([[29] * 9])
    assert not model.skill_library.which(strange[0]).known
    assert model.skill_library.which(prompt(1, seed=77)).known
    assert (model(strange).routing.gates == 0).all()
    with model.disable_adapters():
        bare = model(strange).logits
    assert torch.equal(model(strange).logits, bare)
    assert (model.train()(strange).routing.gates.sum(-1) == 1).all()  # rows to learn from are


# Shared experts


def test_a_shared_expert_has_the_gate_one_beside_the_routed_one(routed):
    model = routed(num_experts=4, shared_experts=1)
    ids = torch.tensor([prompt(1), prompt(0)])
    expected = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 0]])
    assert torch.equal(model(ids).routing.gates[:, 0, 0], expected)
    torch.testing.assert_close(model(ids).logits, model(ids, routing_weights=expected).logits)
    model.experts.activate()
    alone = torch.tensor([[1.0, 0, 0, 0]] * 2)
    assert torch.equal(model(ids).routing.gates[:, 0, 0], alone)
    model.experts.activate(2, shared=False)
    assert torch.equal(model(ids).routing.gates[:, 0, 0], one_hot(2, 2, of=4))


@pytest.mark.parametrize("router_type", ["learned", "learned_with_maturity", "threshold"])
def test_token_routers_choose_among_the_others_beside_a_shared_expert(mixture, router_type, ids):
    settings = {"router_type": router_type, "gate_scale": "sum_to_one"}
    model = mixture(num_experts=4, shared_experts=1, **settings)
    routing = model(ids).routing
    assert (routing.gates[..., 0] == 1).all()
    torch.testing.assert_close(routing.gates[..., 1:].sum(-1), torch.ones(2, 7, 2))
    assert (routing.probabilities[..., 0] == 0).all()
    torch.testing.assert_close(
        model(ids).logits, model(ids, routing_weights=routing.gates).logits, rtol=0, atol=1e-5
    )
    model.experts.activate(2)
    assert torch.equal(model(ids).routing.gates[0, 0, 0], torch.tensor([1.0, 0, 1, 0]))
    model.experts.activate()
    assert torch.equal(model(ids).routing.gates[0, 0, 0], torch.tensor([1.0, 0, 0, 0]))


def test_a_shared_expert_does_not_count_in_the_balance_losses(mixture, ids):
    model = mixture(num_experts=4, shared_experts=1, maturity=[0, 0, 0, 0]).train()
    for _, parameter in model.router_parameters():
        torch.nn.init.zeros_(parameter)
    output = model(ids, labels=ids)
    assert output.aux_loss.item() == pytest.approx(1)
    model.experts.activate(3)
    assert model(ids, labels=ids).aux_loss.item() == 0


# Decoding


TEXTS = [prompt(2, 9, seed=31), prompt(0, 5, seed=32), prompt(1, 7, seed=33)]
EXPERTS = (2, 0, 1)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "top_k": 4},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("whose", ["model", "base"])
def test_generation_holds_the_prompts_experts_to_its_end(routed, options, whose):
    model = routed()
    ids, mask = padded(TEXTS)
    options = GREEDY | {"attention_mask": mask} | options
    torch.manual_seed(1)
    expected = model.generate(ids, routing_weights=one_hot(*EXPERTS), **options)
    torch.manual_seed(1)
    generator = model if whose == "model" else model.base
    assert torch.equal(generator.generate(ids, **options), expected)
    with model.disable_adapters():
        torch.manual_seed(1)
        assert not torch.equal(model.generate(ids, **options), expected)


def test_padding_is_not_the_prompts_with_a_static_cache_either(routed):
    model = routed()
    ids, mask = padded([prompt(2, 12), prompt(0, 2)])
    ids[mask == 0] = 24  # an id of skill 2
    options = GREEDY | {"attention_mask": mask, "cache_implementation": "static"}
    expected = model.generate(ids, routing_weights=one_hot(2, 0), **options)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("assisted", ["assistant", "lookup"])
def test_tokens_that_are_guessed_do_not_count_as_the_prompts(routed, llama, assisted):
    model = routed()
    ids = torch.tensor([prompt(1, 8) * 2])
    expected = model.generate(ids, routing_weights=one_hot(1), **GREEDY | {"max_new_tokens": 12})
    options = {"prompt_lookup_num_tokens": 3} if assisted == "lookup" else {}
    if assisted == "assistant":
        options = {"assistant_model": llama()}
    seen = []
    router = next(router for _, router in model.routers())
    decide = router._decide
    router._decide = lambda prompts, *rest: seen.append(prompts) or decide(prompts, *rest)
    assert torch.equal(model.generate(ids, **GREEDY | {"max_new_tokens": 12}, **options), expected)
    assert len(seen) == 1
    known = embed(model.mixture, [ids[0]]).prompt
    torch.testing.assert_close(seen[0].double(), known, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_a_loop_over_a_cache_goes_on_with_the_prompts_experts(routed, cache_class):
    model = routed()
    config = model.base.config
    cache = cache_class(
        config=config, **({} if cache_class is DynamicCache else {"max_cache_len": 32})
    )
    for skill in (2, 0):  # the second text has the same cache, emptied
        ids = torch.tensor([prompt(skill)])
        expected = model.generate(ids, routing_weights=one_hot(skill), **GREEDY)[0, 9:].tolist()
        if cache_class is DynamicCache:
            cache = DynamicCache(config=config)
        else:
            cache.reset()
        found = []
        with torch.no_grad():
            for _ in range(6):
                output = model.base(ids, past_key_values=cache, use_cache=True)
                ids = output.logits[:, -1:].argmax(-1)
                found.append(int(ids))
        assert found == expected


def test_a_cache_that_the_base_has_made_knows_its_prompt_and_so_do_its_copies(routed):
    model = routed()
    ids, more = torch.tensor([prompt(2)]), torch.tensor([prompt(0)])
    with torch.no_grad():
        whole = model(torch.cat([ids, more], 1), routing_weights=one_hot(2)).logits[:, 9:]
        cache = model.base(ids, use_cache=True).past_key_values
        again = copy.deepcopy(cache)
        for one in (cache, again):
            logits = model.base(more, past_key_values=one, use_cache=True).logits
            torch.testing.assert_close(logits, whole, rtol=0, atol=1e-5)
        two = torch.cat([more, more])
        with pytest.raises((ValueError, RuntimeError)):  # the cache itself is of one text
            model.base(two, past_key_values=cache, use_cache=True)
        held = again._dylora_held
        twice = {name: torch.cat([held[name]] * 2) for name in ("gates", "probabilities")}
        cache._dylora_held = held | twice
        with pytest.raises(ValueError, match="holds the routing of 2 prompts, but 1 sequences"):
            model.base(more, past_key_values=cache, use_cache=True)


def test_a_second_turn_goes_on_with_the_first_ones_experts(routed):
    model = routed()
    ids = torch.tensor([prompt(2)])
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    longer = torch.cat([first.sequences, torch.tensor([prompt(0)])], 1)
    expected = model.generate(longer, routing_weights=one_hot(2), **GREEDY)
    ours = model.generate(longer, past_key_values=first.past_key_values, **GREEDY)
    assert torch.equal(ours, expected)


def test_decoding_equals_one_pass_over_the_whole_text(routed):
    model = routed()
    ids = torch.tensor([prompt(1)])
    text = model.generate(ids, output_scores=True, return_dict_in_generate=True, **GREEDY)
    labels = text.sequences.clone()
    labels[:, :9] = -100
    logits = model(text.sequences, labels=labels).logits[0, 8:-1]
    torch.testing.assert_close(torch.stack(text.scores)[:, 0], logits, rtol=0, atol=1e-5)


# In training


def test_recomputation_repeats_the_decisions(routed):
    ids = torch.tensor([prompt(1) + prompt(0), prompt(2) + prompt(1)])
    labels = ids.clone()
    labels[:, :9] = -100
    found = []
    for checkpointing in (False, True):
        model = routed().train()
        if checkpointing:
            model.enable_checkpointing()
        output = model(ids, labels=labels)
        assert torch.equal(output.routing.gates[:, 0, 0], one_hot(1, 2))
        output.loss.backward()
        found.append([p.grad for _, p in model.named_expert_parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert any(gradient.abs().sum() > 0 for gradient in found[0])


def test_an_expert_learns_from_the_rows_of_its_own_skill_alone(routed):
    model = routed().train()
    ids = torch.tensor([prompt(0), prompt(2)])
    labels = ids.clone()
    labels[:, :4] = -100
    output = model(ids, labels=labels)
    output.loss.backward()
    assert output.aux_loss == output.z_loss == 0
    for name, parameter in model.named_expert_parameters():
        if name.endswith("lora_B"):
            sums = parameter.grad.abs().sum((1, 2))
            assert sums[1] == 0
            assert (sums[[0, 2]] > 0).all()
    assert not any(True for _ in model.router_parameters())


def test_labels_given_to_the_base_itself_end_the_prompt(routed):
    """As transformers' Trainer calls it."""
    model, seen = routed(), []
    block = model.mixture.blocks[0]
    decide = block.decide
    block.decide = lambda x, pass_: seen.append(decide(x, pass_)) or seen[-1]
    ids = torch.tensor([prompt(0) + prompt(2, 20)])
    labels = ids.clone()
    labels[:, :9] = -100
    model.base(input_ids=ids, labels=labels)
    assert torch.equal(seen[0].gates[0, 0], one_hot(0)[0])


def test_a_router_that_is_attached_anew_decides_as_before(routed):
    model, ids = routed(), torch.tensor([prompt(2)])
    before = model(ids).routing.gates
    model.detach_router()
    assert torch.equal(model(ids).routing.gates, torch.full_like(before, 1 / SKILLS))
    model.attach_router()
    assert torch.equal(model(ids).routing.gates, before)


# The running mean


def test_a_running_mean_routes_each_token_by_the_text_up_to_it(routed):
    model = routed(router_scope="running_mean")
    text = prompt(0, 5) + prompt(2, 14)
    ids, mask = padded([text, text[:8]])
    gates = model(ids, mask).routing.gates
    library = model.skill_library
    for length in (1, 5, 8, 19):
        chances = library.log_probabilities(embed(model.mixture, [text[:length]]).prompt)
        known = library.which(text[:length]).known
        expected = one_hot(int(chances.argmax()))[0] * known
        assert torch.equal(gates[0, length - 1, 0], expected)
    assert torch.equal(gates[1, -8:], gates[0, :8])


def test_a_running_mean_goes_on_through_decoding(routed):
    model = routed(router_scope="running_mean")
    ids = torch.tensor([prompt(0, 3) + prompt(1, 4)])
    text = model.generate(ids, output_scores=True, return_dict_in_generate=True, **GREEDY)
    logits = model(text.sequences).logits[0, 6:-1]
    torch.testing.assert_close(torch.stack(text.scores)[:, 0], logits, rtol=0, atol=1e-5)
    asked = GREEDY | {"output_scores": True, "return_dict_in_generate": True}
    for options in ({"prefill_chunk_size": 3}, {"use_cache": False}):
        scores = model.generate(ids, **asked, **options).scores
        torch.testing.assert_close(torch.stack(scores), torch.stack(text.scores))
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="running mean cannot follow beams or assisted"):
            model.generate(ids, **GREEDY, **options)


# Files and settings


def test_a_checkpoint_routes_as_before(routed, llama, tmp_path):
    model = routed(num_experts=4, shared_experts=1)
    model.save_pretrained(tmp_path / "m")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "m", llama()).eval()
    ids, mask = padded(TEXTS)
    assert torch.equal(again(ids, mask).logits, model(ids, mask).logits)
    assert torch.equal(again.generate(ids, attention_mask=mask, **GREEDY),
                       model.generate(ids, attention_mask=mask, **GREEDY))  # fmt: skip
    assert again.experts.create_expert() == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_type": "fixed"}, "router_type .*trains no router"),
        ({"router_noise": 0.1}, "router_noise .*trains no router"),
        ({"router_temperature": 1.0}, "router_temperature .*trains no router"),
        ({"router_hidden_size": 4}, "router_hidden_size .*trains no router"),
        ({"shared_experts": 5}, "shared_experts .*below num_experts"),
        ({"num_experts": 1, "router_scope": "site"}, "num_experts .*unless router_scope is prompt"),
        ({"router_scope": "site", "router_type": "fixed", "shared_experts": 1}, "shared_experts"),
    ],
)
def test_settings_that_would_not_act_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MoELoraConfig(**{"num_experts": 4, "router_scope": "prompt"} | settings)


def test_copies_and_the_bare_base_are_independent(routed):
    model = routed()
    ids = torch.tensor([prompt(1)])
    other = copy.deepcopy(model)
    other.skill_library.reassign(1, 0)
    for one, expert in ((other, 0), (model, 1)):
        expected = model.generate(ids, routing_weights=one_hot(expert), **GREEDY)
        assert torch.equal(one.base.generate(ids, **GREEDY), expected)
    base = model.unload()
    assert "generate" not in vars(base)
    assert re.match("LlamaForCausalLM", type(base).__name__)

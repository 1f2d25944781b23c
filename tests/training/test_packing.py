"""Packed rows: the losses, statistics, routing and gradients of the same rows padded."""

import functools
from itertools import combinations_with_replacement, product

import pytest
import torch

from dylora.data.batching import micro_batches
from dylora.data.packing import collate_packed, fill_up, pack, packed_batches
from dylora.model import BatchTotals
from dylora.routing.losses import fractions_of
from dylora.skills import SkillLibrary
from dylora.training.loop import train
from dylora.training.packing import require_packing
from families import FAMILIES
from runs import rows_of

PAD = 0
LENGTHS = (9, 3, 4, 7, 2, 5, 12, 6)


def examples(seed: int = 0, lengths=LENGTHS) -> list[dict[str, list[int]]]:
    """Rows of some lengths; BOS and about a third are no targets."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = [1, *torch.randint(3, 40, (length - 1,), generator=draw).tolist()]
        found.append(
            {"input_ids": ids, "labels": [-100] * max(1, length // 3) + ids[max(1, length // 3) :]}
        )
    return found


def measured(model, batches):
    """Losses and gradients of all batches together, statistics, and what was seen of experts."""
    tokens = sum(int(one.get("token_mask", one.get("attention_mask")).sum()) for one in batches)
    targets = sum(len(one["target_positions"]) for one in batches)
    totals, losses, seen = BatchTotals(targets, tokens, fractions(model, batches)), {}, None
    model.zero_grad()
    for one in batches:
        output = model(**one, totals=totals, keep_logits=False)
        output.loss.backward()
        for name, loss in {"loss": output.loss, **output.losses}.items():
            losses[name] = losses.get(name, 0) + loss.detach()
        seen = output.observation(one["labels"]).plus(seen)
    grads = {name: p.grad for name, p in model.own_parameters() if p.grad is not None}
    statistics = () if seen.statistics is None else seen.statistics
    return losses, [*seen[:3], *statistics], grads


def fractions(model, batches):
    """f of the balance losses over all batches; None where no router learns."""
    with torch.no_grad():
        found = [model(**one).routing.statistics for one in batches]
    if found[0] is None:
        return None
    return fractions_of(functools.reduce(lambda one, other: one.plus(other), found))


def know_skills(model):
    """A skill for each of three experts, of tokens of its own."""
    library = SkillLibrary(model)
    for skill in range(3):
        low = 3 + 12 * skill
        draw = torch.Generator().manual_seed(skill)
        rows = [
            [1, *torch.randint(low, low + 12, (6,), generator=draw).tolist()] for _ in range(40)
        ]
        library.add(f"skill {skill}", rows[:20], rows[20:], expert=skill)


def assert_same(ours, theirs):
    losses, sums, grads = ours
    for name, loss in theirs[0].items():
        torch.testing.assert_close(losses[name], loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(sums, theirs[1], rtol=1e-5, atol=1e-5)
    assert grads.keys() == theirs[2].keys()
    for name, grad in theirs[2].items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)


# Which share a row


def test_rows_hold_all_sequences_once_and_none_too_many():
    for lengths in (LENGTHS, (5,), (3,) * 7, tuple(range(1, 40))):
        bins = pack(lengths)
        assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
        assert max(sum(lengths[index] for index in one) for one in bins) == max(lengths)


def test_as_few_rows_as_possible_are_taken_up_to_two_ninths_more():
    def fewest(lengths):
        for count in range(1, len(lengths) + 1):
            for places in product(range(count), repeat=len(lengths)):
                sums = [0] * count
                for place, length in zip(places, lengths, strict=True):
                    sums[place] += length
                if max(sums) <= max(lengths):
                    return count
        raise AssertionError

    for lengths in combinations_with_replacement((2, 3, 5, 7), 5):
        assert len(pack(lengths)) <= 11 / 9 * fewest(lengths) + 6 / 9


def test_a_pass_has_no_more_tokens_than_as_many_of_the_longest():
    for rows, one_row in product((1, 2, 3), (False, True)):
        batches = packed_batches(examples(), rows, PAD, one_row=one_row)
        assert all(one["input_ids"].numel() <= rows * max(LENGTHS) for one in batches)
        assert sum(int(one["token_mask"].sum()) for one in batches) == sum(LENGTHS)
        assert all(one["token_mask"].all() for one in batches) or not one_row
    assert len(batches) == 2


def test_nothing_is_learned_of_a_first_token():
    whole = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
    batch = collate_packed([whole, whole[1:]], PAD)
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 9, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["token_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch["target_positions"].tolist() == [0, 1, 3, 5]


# The same numbers


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama", "sdpa"),
        ("llama", "eager"),
        ("gpt2", "sdpa"),  # a table of positions
        ("gemma2", "eager"),  # every other layer slides a window
        ("qwen2_sliding", "sdpa"),
        ("gpt_neox", "eager"),
    ],
)
def test_packed_rows_give_the_losses_gradients_and_statistics_of_padded_ones(
    name, attention, mixture, random_base
):
    family = FAMILIES[name]
    base = random_base(family.config_class, **family.sizes)
    base.set_attn_implementation(attention)
    model = mixture(base)
    require_packing(model)
    rows = examples()
    theirs = measured(model, micro_batches(rows, 2, PAD))
    assert_same(measured(model, packed_batches(rows, 2, PAD)), theirs)
    assert_same(measured(model, packed_batches(rows, 99, PAD, one_row=True)), theirs)


SETTINGS = {
    "shared": {"router_scope": "shared"},
    "threshold": {"router_type": "threshold"},
    "fixed": {"router_type": "fixed"},
    "sparse": {"routing_mode": "sparse", "expert_capacity_factor": None},
    "recomputed": {},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_whatever_routes_packed_rows_are_routed_as_padded_ones(name, mixture):
    model = mixture(**SETTINGS[name])
    if name == "recomputed":
        model.enable_checkpointing()
        model.train()
    theirs = measured(model, micro_batches(examples(), 2, PAD))
    assert_same(measured(model, packed_batches(examples(), 2, PAD)), theirs)


@pytest.mark.parametrize("scope", ["prompt", "running_mean"])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_each_packed_sequence_is_routed_by_its_own_prompt(scope, mode, mixture):
    settings = {"router_scope": scope, "top_k_experts": 1, "routing_mode": mode}
    model = mixture(num_experts=3, **settings).train()
    know_skills(model)
    made = []
    for seed, row in enumerate(examples()):
        low = 3 + 12 * (seed % 3)  # prompts of three skills
        ids = [1, *((token - 3) % 12 + low for token in row["input_ids"][1:])]
        half = max(2, len(ids) // 2)
        made.append({"input_ids": ids, "labels": [-100] * half + ids[half:]})
    theirs = measured(model, micro_batches(made, 2, PAD))
    assert int((theirs[1][0] > 0).sum()) == 3  # all experts are used
    assert_same(measured(model, packed_batches(made, 2, PAD)), theirs)
    model.enable_checkpointing()
    assert_same(
        measured(model.train(), packed_batches(made, 2, PAD)),
        measured(model, micro_batches(made, 2, PAD)),
    )


def test_a_packed_run_learns_what_a_padded_one_learns(make_config):
    still = {"lora_dropout": 0.0, "expert_dropout": 0.0, "router_noise": 0.0}
    runs = []
    for name, packing in (("padded", False), ("packed", True)):
        changes = {"max_steps": 4, "moe": still, "gradient_accumulation_steps": 3}
        runs.append(train(make_config(name, packing=packing, **changes)))
    padded, packed = (rows_of(run.folder) for run in runs)
    for one, other in zip(padded, packed, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert other[name] == pytest.approx(value, rel=1e-4, abs=2e-5), name


@pytest.mark.parametrize("name", ["plain", "capped", *SETTINGS, "prompt", "running_mean"])
def test_a_filling_pass_counts_for_nothing_and_reaches_every_parameter(name, mixture):
    """Those of a prompt's experts alone, where only these are computed."""
    scopes = {name: {"router_scope": name, "num_experts": 3} for name in ("prompt", "running_mean")}
    capped = {"capped": {"routing_mode": "sparse", "expert_capacity_factor": 1.0}}
    model = mixture(**(SETTINGS | scopes | capped).get(name, {})).train()
    if name in scopes:
        know_skills(model)
    for lengths in (LENGTHS, (9, 9, 9)):  # sequences that share rows, and one in each
        batches = packed_batches(examples(lengths=lengths), 2, PAD)
        filled = fill_up(batches, 3)
        assert len(filled) == 3
        assert len(batches) == 2
        tokens = sum(lengths)
        totals = BatchTotals(tokens, tokens, None if name in scopes else fractions(model, batches))
        model.zero_grad()
        output = model(**filled[-1], totals=totals, keep_logits=False)
        output.loss.backward()
        assert output.loss == 0
        seen = output.observation(filled[-1]["labels"])
        assert all(not value.any() for value in (*seen[:3], *(seen.statistics or ())))
        trained = [p for _, p in model.own_parameters() if p.requires_grad]
        given = [p.grad for p in trained if p.grad is not None]
        assert all(not grad.any() for grad in given)
        assert len(given) == len(trained) or name == "prompt"


# Bases that cannot


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon_h1"])
def test_a_base_that_lets_packed_sequences_see_each_other_is_refused(name, mixture, random_base):
    base = random_base(FAMILIES[name].config_class, **FAMILIES[name].sizes)
    with pytest.raises(ValueError, match=r"data\.packing is true, but sequences packed for a"):
        require_packing(mixture(base))

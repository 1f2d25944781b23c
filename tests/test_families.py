"""Every family of `families.py` goes through every check; `docs/families.md` is the result."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from dylora import DyLoRA_MoE, MoELoraConfig
from families import CHECKS, FAMILIES, WINDOW, document

DOCUMENT = Path(__file__).parents[1] / "docs" / "families.md"
LENGTH = 12  # three windows
PROMPT = 7  # longer than a window


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def base(family, random_base):
    """Never changed: `mixture` copies it."""
    return random_base(family.config_class, **family.sizes)


@pytest.fixture(scope="module")
def model(base, mixture):
    """Random experts and routers, between dense and sparse; for tests that change nothing."""
    return mixture(base)


@pytest.fixture(scope="module")
def ids():
    """Input ids [2, 12] without padding, BOS or EOS."""
    return torch.randint(3, 40, (2, LENGTH), generator=torch.Generator().manual_seed(4))


@pytest.fixture(autouse=True)
def _expected(request):
    """A check that a family fails by its entry must fail: else the entry is out of date."""
    if "family" not in request.fixturenames:
        return
    family = request.getfixturevalue("family")
    for check, reason in family.but.items():
        if request.function.__name__ == CHECKS[check].test:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))


def error(actual, expected):
    """Largest difference, as a share of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def one_hot(expert, batch=2, experts=3):
    return torch.eye(experts)[[expert] * batch]


def with_merged_weights(base, model, expert):
    """The base alone, with W + s B A for the weight of every adapted projection."""
    merged = copy.deepcopy(base)
    for path, (A, B) in model.expert_weights(expert).items():
        projection = merged.get_submodule(path)
        update = model.config.lora_alpha / model.config.r * B @ A  # [O, D]
        if isinstance(projection, Conv1D):
            update = update.T
        projection.weight.data += update
    return merged


# What is adapted


def test_the_attention_projections_are_found_and_nothing_else(family, model):
    names = {site: [] for site in model.site_names}
    for path in model.mixture.adapters:
        site, _, name = path.rpartition(".")
        names[site].append(name)
    assert [sorted(found) for found in names.values()] == [sorted(p) for p in family.projections]


def test_a_fresh_mixture_has_the_logits_of_its_base_bit_for_bit(base, mixture, ids):
    assert torch.equal(mixture(base, fresh=True)(ids).logits, base(ids, use_cache=False).logits)


# What is computed


@torch.no_grad()
def test_one_hot_weights_are_that_expert_merged_into_the_base(base, model, ids):
    before = base(ids, use_cache=False).logits
    for expert in range(3):
        alone = model(ids, routing_weights=one_hot(expert)).logits
        assert error(alone, with_merged_weights(base, model, expert)(ids).logits) < 2e-5
        assert error(alone, before) > 0.05


@torch.no_grad()
def test_cached_steps_have_the_logits_of_the_full_pass(model, ids):
    full = model(ids).logits
    output = model.base(ids[:, :PROMPT], use_cache=True)
    steps = [output.logits]
    for position in range(PROMPT, LENGTH):
        output = model.base(
            ids[:, position : position + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        steps.append(output.logits)
    assert error(torch.cat(steps, 1), full) < 2e-5


@torch.no_grad()
def error_of_generate(model, ids):
    """generate asks for the last logits of the prompt alone, so some layers may drop the others."""
    output = model.generate(
        ids[:, :PROMPT],
        attention_mask=torch.ones_like(ids[:, :PROMPT]),
        min_new_tokens=LENGTH - PROMPT,
        max_new_tokens=LENGTH - PROMPT,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    full = model(output.sequences).logits[:, PROMPT - 1 : -1]
    return error(torch.stack(output.logits, 1), full)


def test_generate_has_the_logits_of_the_full_pass(model, ids):
    assert error_of_generate(model, ids) < 2e-5


def test_generate_with_a_shared_router_has_the_logits_of_the_full_pass(base, mixture, ids):
    assert error_of_generate(mixture(base, router_scope="shared"), ids) < 2e-5


@torch.no_grad()
def test_padding_on_either_side_leaves_logits_as_they_are(model, ids):
    padding = LENGTH - (WINDOW + 3)
    alone = model(ids[:, padding:]).logits
    positions = "position_ids" in inspect.signature(model.base.forward).parameters
    right = torch.arange(LENGTH) < LENGTH - padding
    for real in (right, right.flip(0)):
        mask = real.long().expand(2, -1)
        padded = torch.zeros_like(ids).masked_scatter(mask.bool(), ids[:, padding:])
        extra = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if positions else {}
        assert error(model(padded, mask, **extra).logits[:, real], alone) < 2e-5


@torch.no_grad()
def test_a_token_changes_no_logit_before_it(model, ids):
    before = model(ids).logits
    for changed in (1, WINDOW + 2, LENGTH - 1):
        other = ids.clone()
        other[:, changed] = 3 + (other[:, changed] + 5) % 37
        after = model(other).logits
        assert torch.equal(after[:, :changed], before[:, :changed])
        assert (after[:, changed] != before[:, changed]).any(-1).all()


# What is learned


def test_every_expert_and_every_router_learns(base, mixture, ids):
    """From the task alone. B is 0 in a fresh expert, so A and the routers learn from step 2 on."""
    model = mixture(base, fresh=True, maturity=[0.0] * 3)
    before = [
        {path: (A.clone(), B.clone()) for path, (A, B) in model.expert_weights(expert).items()}
        for expert in range(3)
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).lm_loss.backward()
        optimizer.step()
    for expert in range(3):
        for path, (A, B) in model.expert_weights(expert).items():
            assert not torch.equal(A, before[expert][path][0]), (expert, path)
            assert not torch.equal(B, before[expert][path][1]), (expert, path)
    routers = dict(model.router_parameters())
    assert [name for name, parameter in routers.items() if not parameter.grad.any()] == []
    assert {name.rpartition(".outer")[0] for name in routers} == set(model.site_names)


# What goes elsewhere


@torch.no_grad()
def test_an_exported_expert_has_the_same_logits_in_peft(base, model, in_peft, ids, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    for expert in range(3):
        adapted = in_peft(base, tmp_path / "saved" / "peft_adapters" / f"expert_{expert}")
        alone = model(ids, routing_weights=one_hot(expert)).logits
        assert error(adapted(ids, use_cache=False).logits, alone) < 2e-5


def test_unload_restores_the_base_bit_for_bit(base, mixture, ids):
    model = mixture(base)
    model(ids, labels=ids).loss.backward()
    after = model.unload()
    weights = base.state_dict()
    assert list(after.state_dict()) == list(weights)
    assert all(torch.equal(after.state_dict()[name], weights[name]) for name in weights)
    assert is_tied(after) == is_tied(base)
    assert torch.equal(after(ids, use_cache=False).logits, base(ids, use_cache=False).logits)


def is_tied(base):
    return base.get_input_embeddings().weight is base.get_output_embeddings().weight


# The rows are what they say


@pytest.mark.parametrize(
    ("name", "window"),
    [
        (name, window)
        for name, family in FAMILIES.items()
        for window in ("sliding_window", "window_size", "attention_chunk_size")
        if window in family.sizes
    ],
)
@torch.no_grad()
def test_a_window_is_shorter_than_the_sequence(name, window, random_base, ids):
    _, config_class, sizes, *_ = FAMILIES[name]
    slides = random_base(config_class, **sizes)(ids, use_cache=False).logits
    sees_all = random_base(config_class, **sizes | {window: 32})(ids, use_cache=False).logits
    assert error(slides[:, :WINDOW], sees_all[:, :WINDOW]) < 2e-5
    assert error(slides[:, WINDOW:], sees_all[:, WINDOW:]) > 1e-3


# What is not in the table


def test_latent_keys_and_values_are_refused_where_the_cache_is_expanded(random_base):
    _, config_class, sizes, *_ = FAMILIES["deepseek_v3"]
    with pytest.raises(ValueError, match="kv_b_proj expands the cached latents"):
        DyLoRA_MoE.from_base(
            random_base(config_class, **sizes), MoELoraConfig(target_modules=["kv_b_proj"])
        )


def test_bloom_that_reads_weights_past_its_projections_is_refused(random_base):
    _, config_class, sizes, *_ = FAMILIES["bloom"]
    base = random_base(config_class, **sizes, slow_but_exact=True, pretraining_tp=2)
    with pytest.raises(ValueError, match="slow_but_exact=False"):
        DyLoRA_MoE.from_base(base, MoELoraConfig())


def test_cross_attention_is_left_as_it_is(gpt2, mixture, ids):
    model = mixture(gpt2(add_cross_attention=True))
    assert model.site_names == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert model(ids).routing.gates.shape == (2, LENGTH, 2, 3)


def test_a_model_without_attention_is_refused_with_the_names_it_has(random_base):
    base = random_base("MambaConfig", vocab_size=40, hidden_size=32, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"set target_modules to some of dt_proj, in_proj"):
        DyLoRA_MoE.from_base(base, MoELoraConfig())


# The table


def test_the_document_is_the_table():
    assert DOCUMENT.read_text(encoding="utf-8").startswith(document())


def test_every_check_of_the_table_is_a_test_of_every_family():
    families = {
        name
        for name, test in globals().items()
        if name.startswith("test_") and {"base", "model"} & set(inspect.signature(test).parameters)
    }
    assert {check.test for check in CHECKS.values()} == families


def test_every_exception_of_the_table_is_about_a_check():
    assert {check for family in FAMILIES.values() for check in family.but} <= set(CHECKS)

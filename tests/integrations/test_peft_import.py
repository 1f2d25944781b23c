"""Stock PEFT adapters as experts: alone each computes what peft computes with it."""

import copy
import json
import shutil

import pytest
import torch
from peft.tuners.lora import create_arrow_model
from peft.tuners.lora.config import ArrowConfig
from safetensors.torch import load_file, save_file

from dylora import DyLoRA_MoE, MoELoraConfig, load_peft_experts
from dylora.cli.main import main
from dylora.integrations.arrow import leading_direction, readers_of_router_input, set_prototypes
from dylora.storage.checkpoint import Checkpoint
from dylora.storage.peft_format import read_stock_adapter
from peft_folders import make_adapter

# peft reads `is_gradient_checkpointing`, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture
def base_of(random_base):
    """A tiny random base of a family; biases are random, too, so that one that is lost shows."""
    from families import FAMILIES

    def build(family, **changes):
        base = random_base(
            FAMILIES[family].config_class,
            **(FAMILIES[family].sizes | {"initializer_range": 0.1} | changes),
        )
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if name.endswith(".bias"):
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        return base

    return build


def one_hot(expert, experts, ids):
    return torch.eye(experts)[expert].expand(len(ids), -1)


def silent(line):
    """For notes that another test looks at."""


@torch.no_grad()
def difference(mixture, expert, theirs, ids):
    """Largest difference of logits from peft's, after a check that the adapter does anything."""
    ours = mixture(ids, routing_weights=one_hot(expert, len(mixture.experts), ids)).logits
    with mixture.disable_adapters():
        assert (ours - mixture(ids).logits).abs().max() > 0.1
    return (ours - theirs(ids).logits).abs().max().item()


FORMS = {
    "llama": [
        {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 4, "target_modules": QKVO, "use_rslora": True},
        {
            "rank_pattern": {"k_proj": 2, "^model.layers.0.self_attn.q_proj": 6},
            "alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 9.5},
            "target_modules": QKVO,
        },
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\..*(down|o)_proj"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    ],
    "gpt2": [
        {"target_modules": ["c_attn"]},
        {"r": 2, "target_modules": ["c_attn", "attn.c_proj"], "bias": "lora_only"},
        {"target_modules": ["mlp.c_proj", "c_fc"], "use_rslora": True},
    ],
    "gpt_neox": [
        {"r": 2, "target_modules": ["query_key_value"], "bias": "lora_only"},
        {"target_modules": ["query_key_value", "attention.dense"], "alpha_pattern": {"dense": 1}},
        {"target_modules": ["dense_h_to_4h"]},
    ],
}


@pytest.mark.parametrize("family", FORMS)
def test_each_expert_alone_is_its_adapter_in_peft(family, base_of, ids, tmp_path):
    base = base_of(family)
    folders = [tmp_path / f"a{index}" for index in range(len(FORMS[family]))]
    theirs = [
        make_adapter(base, folder, seed=index, **settings)
        for index, (folder, settings) in enumerate(zip(folders, FORMS[family], strict=True))
    ]
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=silent)
    assert [difference(mixture, e, model, ids) < 1e-5 for e, model in enumerate(theirs)] == [
        True for _ in theirs
    ]


def test_rslora_with_other_ranks_in_places_stays_rslora(base_of, ids, tmp_path):
    base = base_of("llama")
    patterns = ({"q_proj": 2}, {"v_proj": 7})
    theirs = [
        make_adapter(base, tmp_path / str(seed), seed=seed, use_rslora=True, rank_pattern=pattern)
        for seed, pattern in enumerate(patterns)
    ]
    mixture = load_peft_experts(
        copy.deepcopy(base), [tmp_path / "0", tmp_path / "1"], report=silent
    )
    assert mixture.config.use_rslora
    assert max(difference(mixture, e, model, ids) for e, model in enumerate(theirs)) < 1e-5


def test_zeros_that_fill_up_a_rank_are_not_counted_as_trainable(base_of, ids, tmp_path):
    base, folders = base_of("llama"), [tmp_path / "0", tmp_path / "1"]
    theirs = [
        make_adapter(base, folder, r=4, rank_pattern={"q_proj": rank}, target_modules=names)
        for folder, rank, names in zip(folders, (2, 7), (["q_proj", "v_proj"], QKVO), strict=True)
    ]
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=silent, freeze=False)
    own = sum(p.numel() for model in theirs for n, p in model.named_parameters() if "lora_" in n)
    routers = sum(p.numel() for _, p in mixture.mixture.router_parameters())
    assert mixture.count_parameters()[0] == own + routers
    before = [p.detach().clone() for _, p in mixture.mixture.named_expert_parameters()]
    optimizer = torch.optim.AdamW(mixture.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        mixture.train()(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [p.detach() for _, p in mixture.mixture.named_expert_parameters()]
    moved = sum(int((a != b).sum()) for a, b in zip(after, before, strict=True))
    assert moved == own  # the count is what a step changes
    mixture.experts.freeze(0, 1)
    assert mixture.count_parameters()[0] == routers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dora_adapters_are_dora_experts(family, base_of, ids, tmp_path):
    base = base_of(family)
    targets = [["q_proj"], QKVO] if family == "llama" else [["c_attn"], ["c_attn", "attn.c_proj"]]
    theirs = [
        make_adapter(base, tmp_path / str(i), seed=i, r=2 + i, use_dora=True, target_modules=names)
        for i, names in enumerate(targets)
    ]
    mixture = load_peft_experts(
        copy.deepcopy(base), [tmp_path / "0", tmp_path / "1"], report=silent
    )
    assert max(difference(mixture, e, model, ids) for e, model in enumerate(theirs)) < 1e-5


@pytest.fixture
def two(base_of, tmp_path):
    """A Llama, two adapter folders on it, and peft's models with them."""
    base = base_of("llama")
    folders = [tmp_path / "sums", tmp_path / "words"]
    theirs = [
        make_adapter(base, folders[0], r=2, target_modules=["q_proj", "k_proj", "v_proj"]),
        make_adapter(base, folders[1], seed=1, r=4, lora_alpha=3, target_modules=QKVO),
    ]
    return base, folders, theirs


def rewrite(folder, change):
    """The tensors of an adapter under other keys."""
    file = folder / "adapter_model.safetensors"
    save_file({change(key): value for key, value in load_file(file).items()}, file)


def test_keys_with_the_adapters_name_are_read(two, ids):
    base, folders, theirs = two
    rewrite(folders[0], lambda key: key.replace(".weight", ".default.weight"))
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=silent)
    assert difference(mixture, 0, theirs[0], ids) < 1e-5


def test_the_old_pickled_form_is_read(two, ids):
    base, folders, theirs = two
    file = folders[1] / "adapter_model.safetensors"
    torch.save(load_file(file), folders[1] / "adapter_model.bin")
    file.unlink()
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=silent)
    assert difference(mixture, 1, theirs[1], ids) < 1e-5


def test_half_precision_adapters_are_read_as_they_are(two):
    base, folders, _ = two
    file = folders[0] / "adapter_model.safetensors"
    halves = {key: value.bfloat16() for key, value in load_file(file).items()}
    save_file(halves, file)
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=silent)
    path = "model.layers.0.self_attn.q_proj"
    expected = halves[f"base_model.model.{path}.lora_A.weight"].float()
    assert torch.equal(mixture.expert_weights(0)[path][0], torch.cat([expected, expected[:0]]))


def test_values_of_a_plain_adapter_are_bit_identical(two):
    base, folders, _ = two
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=silent)
    for expert, folder in enumerate(folders):
        ours = mixture.expert_weights(expert)
        for path, (A, B) in read_stock_adapter(folder).weights.items():
            assert torch.equal(ours[path][0], A)
            assert torch.equal(ours[path][1], B)
    assert [(row.rank, row.alpha) for row in mixture.experts.table] == [(2, 6), (4, 3)]


def test_an_expert_is_zero_where_its_adapter_has_nothing(two):
    base, folders, _ = two
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=silent)
    A, B = mixture.expert_weights(0)["model.layers.0.self_attn.o_proj"]
    assert (A.count_nonzero(), B.count_nonzero()) == (0, 0)


def test_a_saved_import_loads_bit_equal(two, ids, tmp_path):
    base, folders, _ = two
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=silent)
    mixture.save_pretrained(tmp_path / "mixture")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "mixture", copy.deepcopy(base))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, mixture(ids).logits)
    assert [row.state for row in loaded.experts.table] == ["frozen", "frozen"]
    assert [row.skill for row in loaded.experts.table] == ["sums", "words"]


def test_patterns_survive_a_save(base_of, ids, tmp_path):
    base = base_of("llama")
    settings = FORMS["llama"][2]
    theirs = make_adapter(base, tmp_path / "a", **settings)
    make_adapter(base, tmp_path / "b", seed=1, use_rslora=True)
    load_peft_experts(
        copy.deepcopy(base), [tmp_path / "a", tmp_path / "b"], report=silent
    ).save_pretrained(tmp_path / "mixture")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "mixture", copy.deepcopy(base))
    assert difference(loaded, 0, theirs, ids) < 1e-5


def test_one_adapter_is_a_plain_lora(two, ids):
    base, folders, theirs = two
    config = MoELoraConfig(use_moe_routing=False)
    model = load_peft_experts(copy.deepcopy(base), folders[:1], config, report=silent)
    with torch.no_grad():
        gap = (model(ids).logits - theirs[0](ids).logits).abs().max()
    assert gap < 1e-5


# Which base


def test_no_base_names_the_one_that_the_adapters_name(two):
    _, folders, _ = two
    with pytest.raises(ValueError, match="give a base; the adapters were made for some/base"):
        load_peft_experts(None, folders)


def test_adapters_of_different_bases_are_refused_without_one(two, tmp_path):
    base, folders, _ = two
    make_adapter(base, tmp_path / "c", name="other/base")
    with pytest.raises(ValueError, match=r"different bases: some/base \(sums\), other/base \(c\)"):
        load_peft_experts(None, [*folders, tmp_path / "c"])


def test_another_base_than_the_named_one_is_said(two):
    base, folders, _ = two
    notes = []
    load_peft_experts(copy.deepcopy(base), folders, report=notes.append)
    assert notes == [
        "the base is a model without a name; the adapters name some/base (sums)",
    ]


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 5}, "num_experts is 5, but the adapters decide it: 2"),
        ({"r": 8}, "r is 8, but the adapters decide it: 4"),
        ({"rank_pattern": {"q_proj": 1}}, "rank_pattern is"),
        ({"share_A": True}, "share_A is True, but adapters made elsewhere leave no room for it"),
        ({"target_modules": ["q_proj"]}, "target_modules is"),
        ({"use_moe_routing": False}, "use_moe_routing is false, but there are 2 adapters"),
    ],
)
def test_settings_that_the_adapters_decide_are_refused(settings, message, two):
    base, folders, _ = two
    with pytest.raises(ValueError, match=message):
        load_peft_experts(base, folders, MoELoraConfig(**settings), report=silent)


def test_a_dora_beside_a_plain_lora_is_refused(two, tmp_path):
    base, folders, _ = two
    make_adapter(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match=r"dora is a DoRA and .*sums is none"):
        load_peft_experts(base, [folders[0], tmp_path / "dora"], report=silent)


def test_the_same_adapter_twice_is_refused(two):
    base, folders, _ = two
    with pytest.raises(ValueError, match="is given twice"):
        load_peft_experts(base, [folders[0], folders[0]], report=silent)


def test_an_adapter_of_another_width_is_refused_and_the_base_is_as_it_was(two, base_of, tmp_path):
    base, folders, _ = two
    other = base_of("llama", hidden_size=16)
    make_adapter(other, tmp_path / "other")
    before = list(base.state_dict())
    with pytest.raises(ValueError, match="it was made for another base"):
        load_peft_experts(base, [folders[0], tmp_path / "other"], report=silent)
    assert list(base.state_dict()) == before


def test_a_layer_that_the_base_lacks_is_named_with_the_nearest(two, base_of, tmp_path):
    base, folders, _ = two
    make_adapter(base_of("llama", num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(ValueError, match=r"layers\.2\.self_attn\.q_proj, which is no projection"):
        load_peft_experts(base, [folders[0], tmp_path / "deep"], report=silent)


def test_an_adapter_with_a_layer_missing_is_refused(two):
    base, folders, _ = two
    file = folders[0] / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: v for key, v in tensors.items() if "layers.1.self_attn.k" not in key}, file)
    with pytest.raises(ValueError, match=r"names? model\.layers\.1\.self_attn\.k_proj"):
        load_peft_experts(base, folders, report=silent)


# Arrow


def as_matrix(factors):
    return torch.cat([B @ A for A, B in factors])


def test_the_leading_direction_is_that_of_the_whole_matrix():
    draw = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(r, 9, generator=draw), torch.randn(o, r, generator=draw))
        for r, o in ((3, 7), (2, 5), (4, 3))
    ]
    v = leading_direction(factors)
    expected = torch.linalg.svd(as_matrix(factors).double()).Vh[0]
    assert abs(float(v @ expected)) == pytest.approx(1, abs=1e-12)


def test_the_projections_that_read_the_routers_input_are_found(base_of, tmp_path):
    base = base_of("llama")
    make_adapter(base, tmp_path / "a", target_modules="all-linear")
    make_adapter(base, tmp_path / "b", seed=1)
    mixture = load_peft_experts(base, [tmp_path / "a", tmp_path / "b"], report=silent)
    readers = readers_of_router_input(mixture)
    assert {site: [p.rpartition(".")[2] for p in paths] for site, paths in readers.items()} == {
        f"model.layers.{layer}.{block}": names
        for layer in (0, 1)
        for block, names in (
            ("self_attn", ["q_proj", "k_proj", "v_proj"]),
            ("mlp", ["gate_proj", "up_proj"]),
        )
    }


def test_prototypes_weigh_the_projections_by_their_scales(mixture):
    model = mixture(router_logits="absolute", alpha_pattern={"k_proj": 40}, num_experts=2)
    assert set_prototypes(model) == []
    site, router = next(model.routers())
    for expert in (0, 1):
        parts = []
        for name in ("q_proj", "k_proj", "v_proj"):
            A, B = model.expert_weights(expert)[f"{site}.{name}"]
            parts.append(model.mixture.adapters[f"{site}.{name}"].scaling(2, 4) * (B @ A))
        expected = torch.linalg.svd(torch.cat(parts)).Vh[0]
        row = router.outer.weight[expert].detach()
        assert abs(float(row @ expected)) == pytest.approx(1, abs=1e-5)


ARROW_CASES = [("llama", "q_proj", 2), ("gpt2", "c_attn", 3), ("gpt_neox", "query_key_value", 2)]


@pytest.mark.parametrize(("family", "target", "top_k"), ARROW_CASES)
def test_arrow_is_pefts_arrow(family, target, top_k, base_of, ids, tmp_path):
    """With one projection that reads the router's input, Arrow's router is ours."""
    base = base_of(family)
    folders = [tmp_path / str(index) for index in range(3)]
    for index, folder in enumerate(folders):
        make_adapter(base, folder, seed=index, target_modules=[target])
        make_clear(folder)
    arrow = ArrowConfig(top_k=top_k, router_temperature=0.5)
    theirs = create_arrow_model(copy.deepcopy(base), [str(f) for f in folders], arrow).eval()
    config = MoELoraConfig(
        num_experts=3, top_k_experts=top_k, router_temperature=0.5, routing_mode="sparse"
    )
    ours = load_peft_experts(
        copy.deepcopy(base), folders, config, router_init="arrow", report=silent
    )
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids).logits
    uniform = torch.full((len(ids), 3), 1 / 3)
    with torch.no_grad():
        assert (ours(ids, routing_weights=uniform).logits - expected).abs().max() > 1e-2
    assert (found - expected).abs().max() < 1e-5


def make_clear(folder):
    """Let the first singular value stand out: peft iterates fifteen times and is not exact."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if ".lora_A." in key:
            tensors[key][0] *= 20
    save_file(tensors, file)


def test_an_expert_that_adapts_nothing_at_a_site_has_a_row_of_zeros(base_of, tmp_path):
    base = base_of("llama")
    make_adapter(base, tmp_path / "a", target_modules=["q_proj"], layers_to_transform=[1])
    make_adapter(base, tmp_path / "b", seed=1)
    mixture = load_peft_experts(
        base, [tmp_path / "a", tmp_path / "b"], router_init="arrow", report=silent
    )
    rows = [router.outer.weight.norm(dim=1).tolist() for _, router in mixture.routers()]
    assert rows == [[0, pytest.approx(1)], [pytest.approx(1), pytest.approx(1)]]


def test_a_site_whose_router_input_nobody_reads_is_said(base_of, tmp_path):
    base, notes = base_of("llama"), []
    for seed, name in enumerate("ab"):
        make_adapter(base, tmp_path / name, seed=seed, target_modules=["o_proj"])
    load_peft_experts(
        base, [tmp_path / "a", tmp_path / "b"], router_init="arrow", report=notes.append
    )
    assert [note.split(" reads ")[0] for note in notes[1:]] == [
        f"no adapted projection of model.layers.{layer}.self_attn" for layer in (0, 1)
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router_scope": "shared"}, "router_init arrow needs router_scope to be 'site'"),
        ({"router_hidden_size": 4}, "router_init arrow needs router_hidden_size to be None"),
        ({"router_type": "fixed"}, "router_init arrow needs a router_type other than 'fixed'"),
    ],
)
def test_arrow_needs_a_linear_router_at_every_site(settings, message, two):
    base, folders, _ = two
    with pytest.raises(ValueError, match=message):
        load_peft_experts(
            base, folders, MoELoraConfig(**settings), router_init="arrow", report=silent
        )


# Older layouts


@pytest.fixture
def older(two, tmp_path):
    """The layout of an older mixture: peft_adapters/ beside dylo_moe_state/."""
    base, folders, theirs = two
    root = tmp_path / "older"
    for index, folder in enumerate(folders):
        target = root / "peft_adapters" / f"expert_{index}" / f"expert_{index}"
        target.parent.mkdir(parents=True)
        folder.rename(target)
    state = root / "dylo_moe_state"
    state.mkdir()
    (state / "config.json").write_text(json.dumps({"num_experts": 2, "lora_r": 4}))
    gate = torch.nn.Linear(base.config.hidden_size, 2)
    torch.save(
        {"gate_state_dict": gate.state_dict(), "expert_maturity": torch.ones(2), "top_k": 1},
        state / "router.pt",
    )
    torch.save({"embeddings": torch.ones(2, 3)}, state / "skill_library.pt")
    return base, root, theirs, gate


def test_an_older_mixtures_experts_are_kept_and_its_router_is_dropped_aloud(older, ids):
    base, root, theirs, _ = older
    notes = []
    mixture = load_peft_experts(copy.deepcopy(base), [root], report=notes.append)
    assert max(difference(mixture, e, model, ids) for e, model in enumerate(theirs)) < 1e-5
    assert notes[1:] == [
        f"the skill library {root}/dylo_moe_state/skill_library.pt is not read, as no "
        "threshold can be made of it: add the skills again from their rows",
        f"the router {root}/dylo_moe_state/router.pt is dropped and the experts are kept: every "
        "block has a router of its own here (router_scope: shared has one)",
    ]


def test_an_older_mixtures_router_is_taken_where_it_fits(older):
    base, root, _, gate = older
    notes = []
    config = MoELoraConfig(router_scope="shared")
    mixture = load_peft_experts(base, [root], config, report=notes.append)
    [(_, router)] = mixture.routers()
    assert torch.equal(router.outer.weight, gate.weight)
    assert torch.equal(router.outer.bias, gate.bias)
    assert "is taken, but it was trained on the base's last hidden states" in notes[-1]


def test_an_older_router_of_another_shape_is_dropped(older):
    base, root, _, _ = older
    notes = []
    gate = torch.nn.Linear(5, 2)
    torch.save(gate.state_dict(), root / "dylo_moe_state" / "router.pt")
    load_peft_experts(base, [root], MoELoraConfig(router_scope="shared"), report=notes.append)
    assert notes[-1].endswith(": it is [2, 5], and here it would be [2, 32]")


def test_experts_of_a_mixture_of_ours_are_taken_and_its_router_is_not(two, ids, tmp_path):
    base, folders, theirs = two
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=silent)
    mixture.training_record = {"data": {"sources": [{"name": "x", "task_ids": [11]}]}}
    mixture.save_pretrained(tmp_path / "ours")
    notes = []
    again = load_peft_experts(copy.deepcopy(base), [tmp_path / "ours"], report=notes.append)
    assert difference(again, 1, theirs[1], ids) < 1e-5
    assert notes == [
        f"{tmp_path / 'ours'}: its experts are taken, its router is not; from_pretrained reads it "
        "whole"
    ]
    assert again.training_record == {"earlier": [mixture.training_record]}


def test_an_adapter_whose_folder_has_no_printable_name_is_refused(two, tmp_path):
    base, folders, _ = two
    odd = folders[0].rename(tmp_path / "a\u200cb")
    with pytest.raises(ValueError, match=r"'a\\u200cb' in .* is no printable name: rename it"):
        load_peft_experts(copy.deepcopy(base), [odd, folders[1]], report=silent)


def test_adapters_beside_a_whole_model_are_taken_and_the_model_is_not_read(two, ids, tmp_path):
    base, folders, theirs = two
    (folders[0] / "pytorch_model.bin").write_bytes(b"never opened")
    notes = []
    mixture = load_peft_experts(copy.deepcopy(base), folders, report=notes.append)
    assert difference(mixture, 0, theirs[0], ids) < 1e-5
    assert notes[1:] == [f"the whole model in {folders[0]}/pytorch_model.bin is not read"]


def test_a_merged_model_without_adapters_is_explained(base_of, tmp_path):
    base = base_of("llama")
    base.save_pretrained(tmp_path / "merged")
    with pytest.raises(ValueError, match="cannot be taken apart again: give the adapters it was"):
        load_peft_experts(base, [tmp_path / "merged"])


# The command line


def test_the_command_makes_a_mixture(two, ids, tmp_path, capsys):
    base, folders, theirs = two
    base.save_pretrained(tmp_path / "base")
    out, named = tmp_path / "mixture", str(tmp_path / "base")
    adapters = [str(folder) for folder in folders]
    argv = ["import", "--adapters", *adapters, "--out", str(out), "--base", named]
    assert main([*argv, "--moe.router_temperature", "0.5", "--router_init", "arrow"]) == 0
    shown = capsys.readouterr().out
    assert f"note: the base is {named}; the adapters name some/base (sums)" in shown
    assert "expert_1   frozen      4      3    0.000       0  words" in shown
    mixture = DyLoRA_MoE.from_pretrained(out)
    assert difference(mixture, 1, theirs[1], ids) < 1e-5
    assert mixture.config.router_temperature == 0.5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give a base; the adapters were made for some/base, as they say"),
        (["--train.seed", "1"], "--train.seed is no setting of the mixture (--moe.KEY)"),
        (["--moe.top_k_expert", "1"], "did you mean moe.top_k_experts?"),
        (["--router_init", "arow"], "arow"),
        (
            ["--router_init", "arrow", "--moe.gate_scale", "keep_size"],
            "moe.gate_scale is 'keep_size', but --router_init arrow routes with 'sum_to_one'",
        ),
        (["--moe.top_k_experts", "3"], "top_k_experts is 3, but must be from 1 to num_experts (2)"),
    ],
)
def test_the_command_refuses_in_one_line(more, message, two, tmp_path, capsys):
    _, folders, _ = two
    argv = ["import", "--adapters", *map(str, folders), "--out", str(tmp_path / "o"), *more]
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert (shown.err.count("\n"), message in shown.err) == (1, True), shown.err
    assert not (tmp_path / "o").exists()


def test_the_command_checks_settings_against_as_many_experts_as_there_are_adapters(
    two, tmp_path, capsys
):
    base, folders, _ = two
    base.save_pretrained(tmp_path / "base")
    again = [shutil.copytree(one, tmp_path / f"{one.name}{n}") for one in folders for n in "ab"]
    argv = ["import", "--base", str(tmp_path / "base"), "--adapters", *map(str, folders)]
    fixed = ["--moe.router_type", "fixed", "--moe.fixed_routing_weights", "0.25,0.75"]
    assert main([*argv, "--out", str(tmp_path / "o"), *fixed]) == 0
    assert Checkpoint.open(tmp_path / "o").config.fixed_routing_weights == [0.25, 0.75]
    more = ["--adapters", *map(str, again), "--moe.top_k_experts", "5"]
    assert main([*argv, *more, "--out", str(tmp_path / "p")]) == 0
    assert Checkpoint.open(tmp_path / "p").config.top_k_experts == 5


def test_the_command_does_not_replace_what_it_reads(two, tmp_path, capsys):
    _, folders, _ = two
    argv = ["import", "--adapters", *map(str, folders), "--out", str(tmp_path)]
    assert main(argv) == 2
    assert "would replace" in capsys.readouterr().err


def test_the_command_replaces_a_mixture_only_when_asked(two, tmp_path, capsys):
    base, folders, _ = two
    base.save_pretrained(tmp_path / "base")
    out = tmp_path / "mixture"
    argv = ["import", "--adapters", *map(str, folders), "--base", str(tmp_path / "base")]
    argv += ["--out", str(out)]
    assert main(argv) == 0
    before = (out / "manifest.json").read_bytes()
    assert main(argv) == 2
    assert f"{out} holds an earlier result" in capsys.readouterr().err
    assert (out / "manifest.json").read_bytes() == before
    assert main([*argv, "--trainable", "--overwrite"]) == 0
    assert (out / "manifest.json").read_bytes() != before


def test_info_tells_of_adapters_and_older_layouts(older, capsys):
    _, root, _, _ = older
    assert main(["info", "--checkpoint", str(root)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{root}: an older mixture of 2 experts, ")
    assert "expert_1    rank 4, alpha 3, 8 projections, for some/base\n" in shown
    assert f"run.py import --adapters {root} --base NAME --out DIR" in shown


def test_from_pretrained_sends_older_layouts_to_the_import(older):
    base, root, _, _ = older
    with pytest.raises(
        ValueError, match=f"not a mixture of dylora's: run.py import --adapters {root}"
    ):
        DyLoRA_MoE.from_pretrained(root, base)

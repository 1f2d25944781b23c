"""Exports of a live model are those of its checkpoint."""

import json

import pytest
import torch

from dylora import export_mixture, export_peft
from dylora.integrations.peft_export import EXPORT_FILE
from dylora.storage.peft_config import CONFIG_FILE
from dylora.storage.peft_format import WEIGHTS_FILE, read_adapter
from dylora.storage.tensors import read_tensors
from families import FAMILIES

SHARES = (0.5, 0.2, 0.3)


@pytest.mark.parametrize("portable", [False, True])
def test_a_model_and_its_checkpoint_give_the_same_adapters(portable, mixture, tmp_path):
    model = mixture(use_rslora=True, expert_ranks=[1, 3, 2])
    model.experts.retire(1)
    model.save_pretrained(tmp_path / "saved")
    live = export_peft(model, tmp_path / "live", portable=portable)
    saved = export_peft(tmp_path / "saved", tmp_path / "files", portable=portable)
    assert [folder.name for folder in live] == ["expert_0", "expert_2"]
    for one, other in zip(live, saved, strict=True):
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            assert (one / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("settings", [{}, {"share_A": True}, {"bias": "lora_only"}])
def test_a_model_and_its_checkpoint_give_the_same_mixture(settings, random_base, mixture, tmp_path):
    model = mixture(random_base("Qwen2Config", **FAMILIES["qwen2"].sizes), **settings)
    model.save_pretrained(tmp_path / "saved")
    one, other = (
        export_mixture(source, tmp_path / name, SHARES)
        for source, name in ((model, "live"), (tmp_path / "saved", "files"))
    )
    assert (one / CONFIG_FILE).read_bytes() == (other / CONFIG_FILE).read_bytes()
    expected = read_tensors(other / WEIGHTS_FILE)
    for name, tensor in read_tensors(one / WEIGHTS_FILE).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_one_expert_goes_by_its_number(mixture, tmp_path):
    assert export_peft(mixture(), tmp_path, expert=2) == [tmp_path / "expert_2"]
    with pytest.raises(ValueError, match="the model has no expert_3"):
        export_peft(mixture(), tmp_path, expert=3)


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "expert_ranks": [1, 4, 2]}, {"share_A": True}]
)
@torch.no_grad()
def test_weights_by_site_are_what_peft_computes(settings, llama, mixture, in_peft, ids, tmp_path):
    base = llama()
    model = mixture(base, **settings)
    weights = torch.tensor([[0.7, 0.2, 0.1], [0.0, 0.1, 0.9]])
    adapted = in_peft(base, export_mixture(model, tmp_path / "out", weights))
    expected = model(ids, routing_weights=weights.expand(*ids.shape, 2, 3)).logits
    assert (expected - base(ids).logits).abs().max() > 0.1
    assert (adapted(ids).logits - expected).abs().max() < 1e-5


def test_a_mixtures_rank_is_the_sum_over_experts_that_take_part(mixture, tmp_path):
    model = mixture(expert_ranks=[1, 4, 2])
    for weights, rank in (((0.5, 0.2, 0.3), 7), ((0.5, 0.0, 0.5), 3)):
        folder = export_mixture(model, tmp_path / "out", weights, overwrite=True)
        config = read_adapter(folder).config
        assert (config["r"], config["lora_alpha"]) == (rank, rank)


def test_experts_with_one_A_keep_their_rank(mixture, tmp_path):
    folder = export_mixture(mixture(share_A=True, r=2), tmp_path / "out", SHARES)
    assert read_adapter(folder).config["r"] == 2


def test_a_mixture_remembers_its_weights(mixture, tmp_path):
    model = mixture()
    record = json.loads((export_mixture(model, tmp_path / "out", SHARES) / EXPORT_FILE).read_text())
    assert record["experts"] == ["expert_0", "expert_1", "expert_2"]
    assert record["weights"] == {site: list(SHARES) for site in model.site_names}


def test_fixed_weights_are_those_of_the_router(mixture, tmp_path):
    model = mixture(router_type="fixed", fixed_routing_weights=list(SHARES))
    fixed, given = (
        export_mixture(model, tmp_path / "a"),
        export_mixture(model, tmp_path / "b", SHARES),
    )
    assert read_tensors(fixed / WEIGHTS_FILE).keys() == read_tensors(given / WEIGHTS_FILE).keys()
    for name, tensor in read_tensors(given / WEIGHTS_FILE).items():
        torch.testing.assert_close(read_tensors(fixed / WEIGHTS_FILE)[name], tensor)


def test_a_learned_mixture_needs_weights(mixture, tmp_path):
    with pytest.raises(ValueError, match="choose by the token"):
        export_mixture(mixture(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mixture_of_dora_experts_is_refused(mixture, tmp_path):
    with pytest.raises(ValueError, match="expert_0 is a DoRA expert"):
        export_mixture(mixture(use_dora=True), tmp_path / "out", SHARES)
    assert not (tmp_path / "out").exists()

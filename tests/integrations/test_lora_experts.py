"""Experts to PEFT's files and back, and matrices given by hand."""

import pytest
import torch

from dylora import load_lora_experts, save_lora_experts

OPTIONS = {
    "plain": {},
    "unequal ranks": {"expert_ranks": [1, 3, 3], "expert_alphas": [1.0, 2.0, 3.0]},
    "dora": {"use_dora": True},
    "one A": {"share_A": True},
    "loha": {"adapter_type": "loha"},
}


def values(model):
    return [p.clone() for _, p in model.own_parameters()]


def shaken(model):
    """The same experts with other values."""
    with torch.no_grad():
        for _, parameter in model.named_expert_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


@pytest.mark.parametrize("option", OPTIONS)
def test_saved_experts_come_back_bit_for_bit_into_the_experts_of_their_numbers(
    option, mixture, ids, tmp_path
):
    model = shaken(mixture(**OPTIONS[option]))
    saved, kept = values(model), [id(p) for _, p in model.own_parameters()]
    folders = save_lora_experts(model, tmp_path / "saved")
    assert [folder.name for folder in folders] == ["expert_0", "expert_1", "expert_2"]
    shaken(model)
    assert load_lora_experts(model, tmp_path / "saved") == [0, 1, 2]
    assert all(map(torch.equal, values(model), saved))
    assert [id(p) for _, p in model.own_parameters()] == kept


def test_experts_without_an_adapter_stay_as_they_are(mixture, tmp_path):
    model = mixture()
    [_, one, _] = save_lora_experts(model, tmp_path / "saved")
    before = [model.expert_weights(e)["model.layers.0.self_attn.q_proj"][0].clone() for e in (0, 1)]
    shaken(model)
    others = model.expert_weights(0)["model.layers.0.self_attn.q_proj"][0].clone()
    assert load_lora_experts(model, one) == [1]
    assert torch.equal(model.expert_weights(1)["model.layers.0.self_attn.q_proj"][0], before[1])
    assert torch.equal(model.expert_weights(0)["model.layers.0.self_attn.q_proj"][0], others)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"r": 3}, "scale"),
        ({"expert_ranks": [2, 2, 3], "expert_alphas": [4.0, 4.0, 6.0]}, r"has shape \[2, 32\]"),
        ({"adapter_type": "loha"}, "LORA"),
        ({"target_modules": ["q_proj"]}, "fits nothing"),
        ({"num_experts": 2}, "expert_2 is none of expert_0, expert_1"),
    ],
)
def test_adapters_of_another_form_are_refused_and_change_nothing(
    settings, reason, mixture, tmp_path
):
    save_lora_experts(shaken(mixture()), tmp_path / "saved")
    model = mixture(**settings)
    before = values(model)
    with pytest.raises(ValueError, match=reason):
        load_lora_experts(model, tmp_path / "saved")
    assert all(map(torch.equal, values(model), before))


def test_trained_biases_are_left_to_checkpoints(mixture, gpt2, tmp_path):
    model = mixture(gpt2(), bias="lora_only")
    save_lora_experts(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="from_pretrained"):
        load_lora_experts(model, tmp_path / "saved")


# By hand


def test_an_expert_takes_the_matrices_of_another(mixture, ids):
    model = mixture()
    model.experts.load_expert_weights(1, model.expert_weights(2))
    for path, matrices in model.expert_weights(2).items():
        assert all(map(torch.equal, model.expert_weights(1)[path], matrices))
    alone = [model(ids, routing_weights=torch.eye(3)[[e, e]]).logits for e in (1, 2)]
    torch.testing.assert_close(*alone)


def spoilt(weights, how):
    weights = {path: [matrix.clone() for matrix in own] for path, own in weights.items()}
    last = list(weights)[-1]
    if how == "a projection less":
        del weights[last]
    elif how == "a projection more":
        weights["lm_head"] = weights[last]
    elif how == "a matrix less":
        weights[last] = weights[last][:1]
    elif how == "another rank":
        weights[last] = [weights[last][0][:1], weights[last][1][:, :1]]
    else:
        weights[last][1][0, 0] = float("nan")
    return weights


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a projection less", "o_proj' is adapted or given"),
        ("a projection more", "'lm_head' is adapted or given"),
        ("a matrix less", "has 1 matrices, not 2"),
        ("another rank", r"shape \[1, 32\], expected \[2, 32\]"),
        ("not a number", "not finite"),
    ],
)
def test_matrices_of_another_form_are_refused_and_change_nothing(how, reason, mixture):
    model = mixture()
    weights = spoilt(mixture(r=2).expert_weights(2), how)
    before = values(model)
    with pytest.raises(ValueError, match=reason):
        model.experts.load_expert_weights(0, weights)
    assert all(map(torch.equal, values(model), before))


@pytest.mark.parametrize("expert", [0, 1])
def test_another_A_than_the_one_of_all_is_refused_and_changes_nothing(mixture, expert):
    model = mixture(share_A=True)
    weights = {p: (A + 1, B) for p, (A, B) in model.expert_weights(expert).items()}
    before = values(model)
    with pytest.raises(ValueError, match="share_A"):
        model.experts.load_expert_weights(expert, weights)
    assert all(map(torch.equal, values(model), before))
    weights = {p: (A.clone(), B + 1) for p, (A, B) in model.expert_weights(expert).items()}
    model.experts.load_expert_weights(expert, weights)  # with the one A it is taken


def test_another_A_for_all_is_taken_from_a_folder_that_has_all(mixture, tmp_path):
    model = mixture(share_A=True)
    [first, *_] = save_lora_experts(shaken(mixture(share_A=True)), tmp_path / "saved")
    before = values(model)
    with pytest.raises(ValueError, match="share_A"):
        load_lora_experts(model, first)
    assert all(map(torch.equal, values(model), before))
    assert load_lora_experts(model, tmp_path / "saved") == [0, 1, 2]
    model.experts.retire(1, 2)
    shaken(model)
    assert load_lora_experts(model, first) == [0]  # the last one shares it with nobody


def test_the_matrices_of_a_dora_expert_are_not_all_of_it(mixture):
    model = mixture(use_dora=True)
    with pytest.raises(ValueError, match="load_lora_experts"):
        model.experts.load_expert_weights(0, model.expert_weights(1))

"""MoELoraConfig: defaults, rules, the plain-LoRA mode, and the way to JSON and back."""

import json
import math
import warnings
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from dylora import MoELoraConfig
from dylora.run_config import RunConfig


def test_defaults_are_those_of_the_specification():
    config = MoELoraConfig()
    expected = {
        "use_moe_routing": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "router_hidden_size": None,
        "router_aux_loss_coef": 0.01,
        "router_temperature": 2.0,
        "router_type": "learned_with_maturity",
        "expert_capacity_factor": 1.25,
        "expert_dropout": 0.0,
        "load_balance_loss_type": "aux_loss",
    }
    assert {name: getattr(config, name) for name in expected} == expected


REFUSED = {
    "r": [0, -1],
    "lora_alpha": [0, -1.0, math.nan],
    "lora_dropout": [-0.1, 1.0, math.nan],
    "bias": ["some"],
    "rank_pattern": [{"q_proj": 0}],
    "alpha_pattern": [{"q_proj": -4}],
    "expert_ranks": [[4], [4, 4, 4, 0]],
    "expert_alphas": [[4.0, 4.0], [4.0, 4.0, 4.0, -1.0]],
    "router_noise": [-0.1, math.nan],
    "router_switch_loss_coef": [-0.1],
    "init_lora_weights": [False, "pissa"],
    "num_experts": [1, 0, -2],
    "top_k_experts": [0, 5],
    "router_hidden_size": [0],
    "router_type": ["soft"],
    "router_scope": ["global"],
    "routing_mode": ["top"],
    "router_temperature": [0.0, -1.0, math.nan],
    "load_balance_loss_type": ["gshard"],
    "router_aux_loss_coef": [-0.01, math.nan],
    "router_z_loss_coef": [-0.01, math.nan],
    "expert_capacity_factor": [0.0, -1.0, math.nan],
    "expert_dropout": [-0.1, 1.0, math.nan],
    "maturity_mode": ["automatic"],
    "maturity_tau": [0.0, math.nan],
    "maturity_s": [0.0],
    "maturity_fast": [0.0],
    "maturity_slow": [-0.1],
    "maturity_threshold": [0.0, 1.1],
    "maturity_schedule": [(0.6, 0.2), (0.4, 0.4), (-0.1, 0.5)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_a_value_out_of_its_range_is_refused_by_name_and_value(name, value):
    with pytest.raises(ValueError) as caught:
        MoELoraConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is ")
    assert repr(value) in message


ALLOWED = {
    "r": [1],
    "lora_alpha": [0.5],
    "lora_dropout": [0.0, 0.99],
    "init_lora_weights": [True, "gaussian", "orthogonal"],
    "num_experts": [2],
    "top_k_experts": [1, 4],
    "router_hidden_size": [1, None],
    "router_type": ["learned", "learned_with_maturity", "fixed"],
    "router_scope": ["site", "shared"],
    "routing_mode": ["maturity", "dense", "sparse", "dense_train_sparse_eval"],
    "router_temperature": [0.01],
    "load_balance_loss_type": ["aux_loss", "switch", "aux_loss+switch", "z_loss", "none"],
    "bias": ["none", "lora_only", "all"],
    "expert_ranks": [[1, 2, 3, 4]],
    "expert_alphas": [[1.0, 2.0, 0.5, 4.0]],
    "router_aux_loss_coef": [0.0],
    "expert_capacity_factor": [0.1, None],
    "expert_dropout": [0.0, 0.99],
    "maturity_mode": ["manual", "schedule", "usage", "plateau", "hybrid"],
    "maturity_threshold": [1.0],
    "maturity_schedule": [(0.0, 1.0)],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in ALLOWED.items() for value in values]
)
def test_a_value_at_the_edge_of_its_range_is_allowed(name, value):
    assert getattr(MoELoraConfig(**{name: value}), name) == value


def test_top_k_is_at_most_the_number_of_experts():
    with pytest.raises(ValueError, match=r"top_k_experts is 3, .* from 1 to num_experts \(2\)"):
        MoELoraConfig(num_experts=2, top_k_experts=3)


def test_a_misspelt_choice_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'learned_with_maturity'"):
        MoELoraConfig(router_type="learned_with_maturty")


@pytest.mark.parametrize(
    "settings", [{"expert_ranks": [4] * 4}, {"init_lora_weights": "orthogonal"}]
)
def test_experts_with_one_A_have_one_rank_and_no_orthogonal_pairs(settings):
    with pytest.raises(ValueError, match="share_A"):
        MoELoraConfig(share_A=True, **settings)


@pytest.mark.parametrize("settings", [{"r": 3}, {"r": 4, "expert_ranks": [2, 2, 3, 2]}])
def test_orthogonal_pairs_need_even_ranks(settings):
    with pytest.raises(ValueError, match="even"):
        MoELoraConfig(init_lora_weights="orthogonal", **settings)


@pytest.mark.parametrize(
    "weights",
    [[0.5, 0.5], [0.5, 0.5, 0.5, -0.5], [0.5, math.nan, 0.2, 0.3], [math.inf, 0, 0, 0]],
    ids=["too_few", "negative", "nan", "infinite"],
)
def test_fixed_weights_are_one_finite_weight_an_expert(weights):
    with pytest.raises(ValueError, match="fixed_routing_weights is "):
        MoELoraConfig(router_type="fixed", fixed_routing_weights=weights)


def test_fixed_weights_go_with_fixed_routing_only():
    with pytest.raises(ValueError, match="unless router_type is fixed"):
        MoELoraConfig(fixed_routing_weights=[0.25] * 4)


def test_a_config_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        MoELoraConfig().r = 4


# Plain LoRA


@pytest.mark.parametrize("experts", [1, 4])
def test_without_routing_one_expert_is_built_whatever_the_number(experts):
    config = MoELoraConfig(use_moe_routing=False, num_experts=experts)
    assert config.expert_count == 1


def test_with_routing_all_experts_are_built():
    assert MoELoraConfig(num_experts=3).expert_count == 3


def test_without_routing_no_expert_at_all_is_refused():
    with pytest.raises(ValueError, match="num_experts is 0, but must be from 1"):
        MoELoraConfig(use_moe_routing=False, num_experts=0)


UNUSED = {
    "num_experts": 3,
    "top_k_experts": 1,
    "router_hidden_size": 8,
    "router_aux_loss_coef": 0.5,
    "router_z_loss_coef": 0.5,
    "router_temperature": 1.0,
    "router_type": "learned",
    "router_scope": "shared",
    "routing_mode": "dense",
    "expert_capacity_factor": None,
    "expert_dropout": 0.1,
    "load_balance_loss_type": "switch",
}


@pytest.mark.parametrize("name", UNUSED)
def test_without_routing_a_routing_field_that_was_set_is_warned_of(name):
    with pytest.warns(UserWarning, match=f"use_moe_routing is false.*: {name}$"):
        MoELoraConfig(use_moe_routing=False, **{name: UNUSED[name]})


def test_the_warning_points_at_the_line_that_made_the_config():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        MoELoraConfig(use_moe_routing=False, router_temperature=1.0)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("settings", [{}, {"num_experts": 1}, {"r": 4, "lora_alpha": 8}])
def test_without_routing_the_lora_fields_are_not_warned_of(settings):
    MoELoraConfig(use_moe_routing=False, **settings)  # a warning would be an error here


def test_one_expert_without_routing_may_say_that_it_is_the_only_one():
    config = MoELoraConfig(use_moe_routing=False, num_experts=1, top_k_experts=1)
    assert config.expert_count == 1  # a warning would be an error here


# The z loss in the place of a balance loss


def test_the_z_loss_alone_has_the_weight_of_the_balance_loss():
    config = MoELoraConfig(load_balance_loss_type="z_loss", router_aux_loss_coef=0.2)
    assert (config.balance_losses, config.z_loss_coef) == ((), 0.2)
    assert MoELoraConfig(router_aux_loss_coef=0.2).z_loss_coef == 0.001


def test_the_z_loss_alone_has_one_weight():
    with pytest.raises(ValueError, match=r"router_z_loss_coef is 0\.5, but must be unset"):
        MoELoraConfig(load_balance_loss_type="z_loss", router_z_loss_coef=0.5)


# Scale and files


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {"router_type": "fixed", "fixed_routing_weights": [0.1, 0.2, 0.3, 0.4]},
        {"maturity_schedule": (0.1, 0.9), "expert_capacity_factor": None},
        {"expert_ranks": [1, 2, 3, 4], "rank_pattern": {"q_proj": 2}, "use_dora": True},
    ],
)
def test_a_config_comes_back_from_json(settings):
    config = MoELoraConfig(**settings)
    assert MoELoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_dictionary_holds_every_field():
    assert set(MoELoraConfig().to_dict()) == {item.name for item in fields(MoELoraConfig)}


def test_from_dict_leaves_its_argument_alone():
    values = MoELoraConfig().to_dict()
    before = json.dumps(values)
    MoELoraConfig.from_dict(values)
    assert json.dumps(values) == before


def test_an_unknown_field_is_refused_naming_the_nearest():
    with pytest.raises(ValueError, match=r"'num_expert'; did you mean 'num_experts'"):
        MoELoraConfig.from_dict({"num_expert": 4})


def test_an_unknown_field_without_a_near_one_lists_what_there_is():
    with pytest.raises(ValueError, match=r"field 'zzz'; valid are .*lora_alpha.*num_experts"):
        MoELoraConfig.from_dict({"zzz": 1})


def test_a_retired_field_of_an_older_checkpoint_is_read_over():
    old = MoELoraConfig(r=4).to_dict() | {"fan_in_fan_out": None}
    assert MoELoraConfig.from_dict(old) == MoELoraConfig(r=4)


def test_values_from_a_dictionary_are_checked_too():
    with pytest.raises(ValueError, match="router_temperature is 0"):
        MoELoraConfig.from_dict({"router_temperature": 0})


def test_a_threshold_that_a_settled_loss_never_reaches_is_refused():
    with pytest.raises(
        ValueError, match=r"maturity_threshold is 0\.7, but must be at most sigmoid"
    ):
        MoELoraConfig(maturity_s=0.1, maturity_mode="hybrid")
    MoELoraConfig(maturity_s=0.1, maturity_mode="usage")


FOR_ROUTERS = {"router_hidden_size": 8, "router_logits": "absolute", "router_temperature": 1.0}
FOR_ROUTERS |= {"router_noise": 0.1, "gate_scale": "sum_to_one", "expert_dropout": 0.1}


@pytest.mark.parametrize("name", FOR_ROUTERS)
def test_a_run_of_fixed_weights_refuses_what_only_a_router_reads(name):
    moe = MoELoraConfig(router_type="fixed", **{name: FOR_ROUTERS[name]})  # as files may have it
    with pytest.raises(ValueError, match=rf"moe\.{name} is .*with router_type fixed, which has no"):
        RunConfig(moe=moe).check_acts()


def test_what_only_a_trained_router_reads_changes_no_bit_of_fixed_weights(mixture, ids):
    plain = mixture(router_type="fixed").train()
    for name, value in FOR_ROUTERS.items():
        model = mixture(router_type="fixed", **{name: value}).train()
        assert torch.equal(model(ids).logits, plain(ids).logits)

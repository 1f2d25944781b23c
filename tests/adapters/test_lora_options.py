"""Every LoRA option against its formula and against real peft."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from dylora import DyLoRA_MoE, MoELoraConfig
from dylora.adapters.dora import magnitude_ratio, row_norms, weight_OD
from dylora.adapters.stack import orthogonal_pair
from dylora.model_io import load_model
from dylora.routing.gating import RouterOutput
from dylora.storage.checkpoint import Checkpoint

# peft reads `is_gradient_checkpointing`, which transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

RAGGED = {"r": 4, "expert_ranks": [1, 4, 2], "expert_alphas": [1.0, 8.0, 3.0]}
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ragged": RAGGED,
    "ragged rslora": RAGGED | {"use_rslora": True},
    "patterns": {"rank_pattern": {"FIRST": 3}, "alpha_pattern": {"LAST": 1.5}},
    "ragged with patterns": RAGGED | {"rank_pattern": {"FIRST": 5}},
    "dora": {"use_dora": True},
    "ragged dora": RAGGED | {"use_dora": True},
    "dora rslora": {"use_dora": True, "use_rslora": True},
    "lora_only": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "dora with biases": {"use_dora": True, "bias": "all"},
    "one A": {"share_A": True},
    "one A with dora": {"share_A": True, "use_dora": True},
    "A frozen": {"freeze_A": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "MLP too": {"target_modules": ["FIRST", "MLP"]},
    "one layer": {"layers_to_transform": [1]},
}
NAMES = {  # of projections, by family
    "llama": {"FIRST": "q_proj", "LAST": "o_proj", "MLP": "down_proj"},
    "gpt2": {"FIRST": "attn.c_attn", "LAST": "attn.c_proj", "MLP": "mlp.c_proj"},
}
BIASED = {"lora_only", "all biases", "dora with biases"}  # a Llama has no biases


@pytest.fixture
def base_of(llama, gpt2):
    """A tiny base in which all weights and biases are random, and the settings that fit it."""

    def build(family, option):
        base = llama(attention_bias=option in BIASED) if family == "llama" else gpt2()
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.2)
        text = json.dumps(OPTIONS[option])
        for word, name in NAMES[family].items():
            text = text.replace(word, name)
        return base, json.loads(text)

    return build


def randomise(model):
    """Every parameter of the experts random."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_expert_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=draw)
            if "magnitude" in name:
                parameter.mul_(1 + noise)
            elif "bias" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise if name.endswith("lora_B") else noise)


def in_peft(base, folder):
    """An adapter folder loaded by peft; any warning of peft's is an error."""
    return PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()


def one_hot(expert, experts, batch):
    return torch.eye(experts)[[expert] * batch]


def build(base, **settings):
    config = MoELoraConfig(**{"r": 2, "lora_alpha": 3, "num_experts": 3} | settings)
    return DyLoRA_MoE.from_base(copy.deepcopy(base), config).eval()


CASES = [(f, o) for f in ("llama", "gpt2") for o in OPTIONS]


@pytest.mark.parametrize(("family", "option"), CASES)
def test_fresh_experts_change_no_logit(family, option, base_of, ids):
    base, settings = base_of(family, option)
    logits = build(base, **settings)(ids).logits
    if option == "orthogonal":  # B·A is 0 up to rounding only
        torch.testing.assert_close(logits, base(ids).logits, rtol=0, atol=1e-4)
    else:
        assert torch.equal(logits, base(ids).logits)


@pytest.mark.parametrize(("family", "option"), CASES)
def test_each_expert_alone_is_what_peft_makes_of_its_files(family, option, base_of, ids, tmp_path):
    base, settings = base_of(family, option)
    model = build(base, **settings)
    randomise(model)
    model.save_pretrained(tmp_path / "saved")
    for expert in range(3):
        adapted = in_peft(base, tmp_path / "saved" / "peft_adapters" / f"expert_{expert}")
        ours = model(ids, routing_weights=one_hot(expert, 3, len(ids))).logits
        assert (ours - base(ids).logits).abs().max() > 0.05
        torch.testing.assert_close(ours, adapted(ids).logits, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("family", "option"), CASES)
def test_a_saved_mixture_comes_back_bit_for_bit(family, option, base_of, ids, tmp_path):
    base, settings = base_of(family, option)
    model = build(base, **settings)
    randomise(model)
    model.save_pretrained(tmp_path / "saved")
    again = DyLoRA_MoE.from_pretrained(tmp_path / "saved", base=copy.deepcopy(base)).eval()
    for (name, ours), (other, theirs) in zip(
        model.own_parameters(), again.own_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs), name
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o not in ("one layer", "MLP too")])
def test_a_mixture_mixes_what_each_expert_adds_at_every_projection(option, base_of):
    """The sum over experts of gate times (that expert's projection - the base's), in float64."""
    base, settings = base_of("gpt2", option)
    model = build(base, **settings).double()
    randomise(model)
    adapter = model.mixture.adapters["transformer.h.0.attn.c_attn"]
    projection = model.base.get_submodule("transformer.h.0.attn.c_attn")
    W_OD, bias = weight_OD(projection).detach(), projection.bias.detach()
    x = torch.randn(5, W_OD.shape[1], dtype=torch.float64)
    gates = torch.rand(5, 3, dtype=torch.float64)
    expected = x @ W_OD.T + bias
    for expert in range(3):
        stack, place = adapter.stack_of(expert)
        A = adapter.A_of(stack)[0 if settings.get("share_A") else place]
        merged = W_OD + stack.scaling_E[place] * stack.lora_B[place].T @ A
        if settings.get("use_dora"):
            merged = stack.lora_magnitude[place][:, None] * merged / merged.norm(dim=1)[:, None]
        shift = 0 if stack.lora_bias is None else stack.lora_bias[place]
        expected = expected + gates[:, [expert]] * (x @ (merged - W_OD).T + shift)
    state = model.mixture.state
    pass_ = state.begin_block(0)
    adapter.block.begin(pass_, RouterOutput(gates, gates, None), x.dtype)
    ours = adapter.add_update(projection, (x,), x @ W_OD.T + bias)
    state.end_block(adapter.block.index)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


# Ranks


@pytest.mark.parametrize("adapter_type", ["lora", "loha"])
def test_experts_of_unequal_rank_have_the_parameters_that_their_ranks_add_up_to(
    adapter_type, llama, ids
):
    ranks = [9, 2, 2, 3]
    settings = {"adapter_type": adapter_type, "num_experts": 4}
    model, one = (build(llama(), **settings | {"expert_ranks": r}) for r in (ranks, [1, 1, 1, 1]))
    routers = sum(p.numel() for _, p in model.router_parameters())
    trainable, frozen = model.count_parameters()
    assert trainable - routers == sum(ranks) * (one.count_parameters()[0] - routers) // 4
    assert frozen == one.count_parameters()[1]
    for _ in range(2):  # B is 0 at first, and so is the gradient of A
        optimizer = torch.optim.AdamW([p for _, p in model.named_expert_parameters()], lr=0.01)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in model.named_expert_parameters():
        assert parameter.grad.abs().amax(-1).min() > 0, name  # no row that never learns
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_each_expert_and_projection_has_its_own_scale(llama):
    model = build(llama(), **RAGGED, alpha_pattern={"k_proj": 6.0}, rank_pattern={"v_proj": 3})
    scales = {
        path.rpartition(".")[2]: [float(s) for stack in adapter.stacks for s in stack.scaling_E]
        for path, adapter in model.mixture.adapters.items()
    }
    assert scales["q_proj"] == pytest.approx([1 / 1, 8 / 4, 3 / 2])
    assert scales["k_proj"] == pytest.approx([6 / 1, 6 / 4, 6 / 2])
    assert scales["v_proj"] == pytest.approx([1 / 3, 8 / 3, 3 / 3])


# DoRA


def dora_pair(base):
    """One DoRA expert by us and by peft, the same values, in float64."""
    ours = build(base, use_moe_routing=False, num_experts=1, use_dora=True).double()
    randomise(ours)
    settings = LoraConfig(
        r=2,
        lora_alpha=3,
        use_dora=True,
        fan_in_fan_out=True,
        target_modules=list(ours.mixture.adapters),
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(
        copy.deepcopy(base).double(), settings, autocast_adapter_dtype=False
    ).double()
    with torch.no_grad():
        for path, (A, B) in ours.expert_weights(0).items():
            layer = theirs.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(A)
            layer.lora_B["default"].weight.copy_(B)
            stack = ours.mixture.adapters[path].stacks[0]
            layer.lora_magnitude_vector["default"].weight.copy_(stack.lora_magnitude[0])
    return ours, theirs


def test_one_dora_expert_has_the_gradients_of_peft(gpt2, ids):
    ours, theirs = dora_pair(gpt2())  # a Llama computes its norms in float32
    weights = torch.randn(*ids.shape, 40, dtype=torch.float64)
    for model in (ours, theirs):
        (model(ids).logits * weights).sum().backward()
    for path, adapter in ours.mixture.adapters.items():
        [stack] = adapter.stacks
        layer = theirs.base_model.model.get_submodule(path)
        magnitude = layer.lora_magnitude_vector["default"].weight.grad
        for grad, expected in (
            (stack.lora_A.grad[0], layer.lora_A["default"].weight.grad),
            (stack.lora_B.grad[0].T, layer.lora_B["default"].weight.grad),
            (stack.lora_magnitude.grad[0], magnitude),
        ):
            assert expected.abs().max() > 1e-6
            torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)


def test_the_lengths_of_dora_are_those_of_the_merged_weight(llama):
    model = build(llama(), use_dora=True)
    randomise(model)
    path, adapter = next(iter(model.mixture.adapters.items()))
    [stack] = adapter.stacks
    weight = model.base.get_submodule(path).weight
    ratio = magnitude_ratio(stack, stack.lora_A, weight)
    for expert in range(3):
        update = stack.scaling_E[expert] * stack.lora_B[expert].T @ stack.lora_A[expert]
        expected = stack.lora_magnitude[expert] / row_norms(weight + update)
        torch.testing.assert_close(ratio[expert], expected, rtol=1e-5, atol=1e-6)


def test_lengths_are_found_once_a_decoding(llama, ids, monkeypatch):
    model = build(llama(), use_dora=True).eval()
    found = []
    real = magnitude_ratio
    monkeypatch.setattr(
        "dylora.adapters.projection.magnitude_ratio", lambda *a: found.append(a) or real(*a)
    )
    for _ in range(2):
        found.clear()
        model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)
        # of the prompt, and of the first token after it
        assert len(found) == 2 * len(model.mixture.adapters)


def test_a_row_of_zeros_in_the_base_does_not_break_dora(llama, ids):
    base = llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    model = build(base, use_dora=True)
    assert torch.equal(model(ids).logits, base(ids).logits)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for _, p in model.named_expert_parameters())


# Biases


def test_trained_biases_need_a_bias_in_the_base(llama):
    for bias in ("lora_only", "all"):
        with pytest.raises(ValueError, match="bias"):
            build(llama(), bias=bias)


def test_lora_only_trains_a_bias_of_each_expert_and_all_one_more_for_every_other_module(gpt2, ids):
    names = {}
    for bias in ("lora_only", "all"):
        model = build(gpt2(), bias=bias)
        model(ids, labels=ids).loss.backward()
        names[bias] = {name for name, p in model.named_expert_parameters() if "bias" in name}
        assert all(p.grad.any() for name, p in model.named_expert_parameters() if "bias" in name)
    assert all(name.endswith("lora_bias") for name in names["lora_only"])
    more = {name.removesuffix(".bias_shift") for name in names["all"] - names["lora_only"]}
    base = gpt2()
    adapted = set(build(gpt2()).mixture.adapters)
    biased = {n for n, m in base.named_modules() if getattr(m, "bias", None) is not None}
    assert more == biased - adapted


def test_the_base_keeps_its_biases_while_they_are_trained(gpt2, ids):
    model = build(gpt2(), bias="all")
    before = {n: p.clone() for n, p in model.base.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for _, p in model.named_expert_parameters()], lr=1.0)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert (model(ids).logits - gpt2()(ids).logits).abs().max() > 1e-3
    assert all(torch.equal(dict(model.base.named_parameters())[n], p) for n, p in before.items())
    assert torch.equal(model.unload()(ids).logits, gpt2()(ids).logits)


def test_disabled_adapters_leave_out_trained_biases(gpt2, ids):
    model = build(gpt2(), bias="all")
    randomise(model)
    with model.disable_adapters():
        assert torch.equal(model(ids).logits, gpt2()(ids).logits)


def test_a_layer_called_by_itself_has_no_trained_biases_while_adapters_are_disabled(gpt2):
    model = build(gpt2(), bias="all")
    randomise(model)
    x = torch.randn(2, 7, 32)
    with model.disable_adapters():
        ours = model.base.transformer.h[0](x)
    assert torch.equal(ours, gpt2().transformer.h[0](x))


# A: frozen, or one for all


def test_lora_fa_trains_B_alone(llama, ids):
    model = build(llama(), freeze_A=True)
    before = {n: p.clone() for n, p in model.named_expert_parameters()}
    trained = [p for _, p in model.own_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    for name, parameter in model.named_expert_parameters():
        assert torch.equal(parameter, before[name]) == name.endswith("lora_A"), name


def saved_bytes(model, ids):
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids).loss
    loss.backward()
    return sum(kept.values())


def test_lora_fa_keeps_less_for_the_backward_pass(llama):
    ids = torch.randint(3, 40, (4, 32))
    # The input of an attention projection is kept by the router or by attention in any case.
    settings = {"target_modules": ["down_proj"]}
    less = saved_bytes(build(llama(), freeze_A=True, **settings), ids)
    inputs = 2 * ids.numel() * 40 * 4  # two layers, 40 wide, float32
    assert saved_bytes(build(llama(), **settings), ids) == less + inputs


def test_a_shared_A_is_one_parameter_of_each_projection(llama):
    model = build(llama(), share_A=True)
    shapes = {n.rpartition(".")[2]: list(p.shape) for n, p in model.named_expert_parameters()}
    assert shapes.keys() == {"shared_A", "lora_B"}
    assert shapes["shared_A"][:2] == [1, 2]
    assert shapes["lora_B"][:2] == [3, 2]


def test_files_with_different_A_are_refused_where_experts_share_one(llama, tmp_path):
    model = build(llama())
    randomise(model)
    model.save_pretrained(tmp_path / "saved")
    other = build(llama(), share_A=True)
    with pytest.raises(ValueError, match="share_A"):
        load_model(other.experts, Checkpoint.open(tmp_path / "saved"))


# Initial values


def test_orthogonal_pairs_cancel_each_other_and_are_as_large_as_those_of_peft():
    A, B = orthogonal_pair(8, 300, 200, None)
    assert (B.T @ A).abs().max() < 1e-6
    layer = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(300, 200)),
        LoraConfig(r=8, target_modules=["0"], init_lora_weights="orthogonal"),
    ).base_model.model[0]
    for ours, theirs in ((A, layer.lora_A), (B, layer.lora_B)):
        torch.testing.assert_close(ours.std(), theirs["default"].weight.std(), rtol=0.1, atol=0)


def test_files_hold_the_rank_and_alpha_of_their_expert(llama, tmp_path):
    build(llama(), **RAGGED).save_pretrained(tmp_path / "saved")
    for expert, (rank, alpha) in enumerate([(1, 1), (4, 8), (2, 3)]):
        folder = tmp_path / "saved" / "peft_adapters" / f"expert_{expert}"
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (rank, alpha)
        tensors = load_file(folder / "adapter_model.safetensors")
        assert {min(t.shape) for t in tensors.values()} == {rank}


def test_experts_mixed_evenly_are_one_lora_of_their_ranks_and_of_the_same_alpha(mixture, ids):
    """So alpha means the same for every number of experts: 3 of rank 2 are one of rank 6."""
    many = mixture(router_type="fixed", router_temperature=2.0).double()
    one = mixture(use_moe_routing=False, r=6).double()
    for path, adapter in one.mixture.adapters.items():
        [whole], [parts] = adapter.stacks, many.mixture.adapters[path].stacks
        with torch.no_grad():
            whole.lora_A.copy_(parts.lora_A.flatten(0, 1)[None])
            whole.lora_B.copy_(parts.lora_B.flatten(0, 1)[None])
    torch.testing.assert_close(many(ids).logits, one(ids).logits)
    with many.disable_adapters():
        assert (many(ids).logits - one(ids).logits).abs().max() > 1e-3

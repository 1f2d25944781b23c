"""train.compile and train.tf32: what they change, and what they refuse."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters

from dylora.training.check import check
from dylora.training.compilation import compiled_passes
from dylora.training.environment import tf32_products
from dylora.training.loop import train
from dylora.training.run import prepare
from dylora.training.step import run_step
from parallel_runs import Grow, train_here
from processes import results_of
from runs import rows_of

LONG = {"max_steps": 12, "gradient_accumulation_steps": 2, "eval_steps": 6}
MOE = {"maturity_mode": "usage", "router_z_loss_coef": 1e-2, "lora_dropout": 0.1}
OTHERS = (
    {},
    {"router_type": "threshold"},
    {"router_scope": "shared", "router_input": "running_mean"},
)
LOSSES = ("train/loss", "val/loss", "router/entropy")


@pytest.fixture(autouse=True)
def _fresh():
    """No test finds what another one has compiled."""
    torch.compiler.reset()
    counters.clear()
    with torch._inductor.config.patch({"compile_threads": 1}):
        yield
    torch.compiler.reset()


@pytest.fixture
def quick(monkeypatch):
    """Passes are traced, and computed by torch's own operations instead of compiled code."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, dynamic=True, backend="eager"))


@pytest.mark.parametrize(
    "moe",
    [MOE, *(pytest.param(moe, marks=pytest.mark.slow) for moe in OTHERS)],
)
def test_a_compiled_run_logs_the_numbers_of_one_that_is_not(make_config, quick, moe):
    plain = rows_of(train(make_config("plain", moe=moe, **LONG)).folder)
    compiled = rows_of(train(make_config("compiled", moe=moe, compile=True, **LONG)).folder)
    assert counters["stats"]["unique_graphs"] > 0
    assert len(plain) == len(compiled) > 12
    for name in LOSSES:
        ours, theirs = ([row[name] for row in rows if name in row] for rows in (compiled, plain))
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_code_trains_as_operations_do(make_config):
    """By torch's own compiler, while an expert is frozen and one is added."""
    long = LONG | {"max_steps": 30, "moe": MOE}
    plain = train_here(make_config("plain", **long), None, (Grow,))
    compiled = train_here(make_config("compiled", compile=True, **long), None, (Grow,))
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled.losses == pytest.approx(plain.losses, abs=1e-5)
    assert compiled.maturity == pytest.approx(plain.maturity, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_compile_and_have_the_losses_of_one(make_config, parallel):
    long = LONG | {"moe": MOE, "gradient_accumulation_steps": 4}
    alone = train_here(make_config("alone", **long), None, ())
    config = make_config("pair", parallel=parallel, compile=True, **long)
    pair = results_of(2, train_here, config, None, ())
    assert pair[0].losses == pytest.approx(alone.losses, abs=1e-5)
    assert pair[0] == pair[1]


def test_layers_are_traced_with_and_without_padding_and_anew_when_experts_mature(
    make_config, quick
):
    """And for no other length or maturity, and without a break."""
    run = prepare(make_config(moe={"maturity_mode": "manual"}, max_steps=40), fresh=True)
    layers = len(run.model.site_names)
    traces = []
    with compiled_passes(run.model, True):
        shapes = {run_step(run).tokens for _ in range(8)}
        assert len(shapes) > 2
        for maturity in ([0, 0, 0], [0.5, 0, 0], [1, 0, 0], [1, 1, 0.1], [1, 1, 1], [0, 1, 0]):
            values = torch.tensor(maturity, dtype=torch.float64)
            run.model.set_maturity(run.model.maturity._replace(maturity=values))
            run_step(run)
            run_step(run)
            traces.append(counters["stats"]["unique_graphs"])
    assert traces[0] == 2 * layers
    assert traces[-1] <= 4 * layers
    assert not counters["graph_break"]
    run.log.close()


def test_evaluation_and_what_comes_after_run_as_they_are(make_config, quick, ids):
    run = prepare(make_config(), fresh=True)
    layer = run.model.base.model.layers[0]
    before = layer.forward
    with compiled_passes(run.model, True):
        run.model.eval()(ids)
        with torch.no_grad():
            run.model.train()(ids)
        assert not counters["stats"]
    assert layer.forward == before
    with pytest.raises(KeyError), compiled_passes(run.model, True):
        raise KeyError
    assert layer.forward == before
    copy.deepcopy(run.model)
    run.log.close()


def test_recomputed_activations_are_refused(make_config):
    with pytest.raises(ValueError, match=r"the compiler has no train\.gradient_checkpointing"):
        train(make_config(compile=True, gradient_checkpointing=True))


def test_a_check_refuses_what_training_would(make_config):
    with pytest.raises(ValueError, match=r"the compiler has no"):
        check(make_config(compile=True, gradient_checkpointing=True))
    with pytest.raises(ValueError, match=r"train\.tf32 is true"):
        check(make_config(tf32=True))


def test_tf32_is_refused_where_there_is_none_and_put_back_where_there_is(make_config):
    with pytest.raises(ValueError, match=r"train\.tf32 is true, but the run is on cpu"):
        train(make_config(tf32=True))
    with tf32_products(True, torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"

"""A base with experts in transformers' Trainer, with default arguments."""

import logging
import shutil
import subprocess
import sys
from types import MethodType, SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub.utils import filter_repo_objects
from torch import Tensor
from transformers import Trainer, TrainingArguments

from dylora import DyLoRA_MoE
from dylora.integrations import base_methods
from dylora.integrations.trainer import MixtureCallback, added_over_processes
from dylora.storage import folders
from dylora.storage.manifest import verify
from parallel_runs import train_by_trainer
from processes import results_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning"),
]
STEPS = 4


def rows_of(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in ids]


def trainer_of(model: DyLoRA_MoE, ids: Tensor, folder, **changes) -> Trainer:
    """A Trainer of four steps, one row in each, without a shuffle of its own kind."""
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
    arguments |= {"logging_steps": 1, "save_steps": 2, "disable_tqdm": True} | changes
    taken = {
        name: arguments.pop(name)
        for name in ("callbacks", "eval_dataset", "compute_loss_func")
        if name in arguments
    }
    return Trainer(
        model.base,
        TrainingArguments(str(folder), **arguments),
        train_dataset=rows_of(ids),
        **taken,
    )


def own(model: DyLoRA_MoE) -> list[Tensor]:
    return [parameter.detach().clone() for _, parameter in model.own_parameters()]


# The loss of a base


@pytest.mark.parametrize("balance", ["aux_loss", "switch", "aux_loss+switch", "z_loss", "none"])
def test_a_base_that_trains_has_the_loss_of_the_mixture(mixture, ids, balance):
    model = mixture(load_balance_loss_type=balance).train()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    theirs = model.base(ids, attention_mask=mask, labels=labels).loss
    ours = model(ids, mask, labels)
    torch.testing.assert_close(theirs, ours.loss, rtol=1e-6, atol=1e-7)
    assert theirs > ours.lm_loss
    gradients = [
        torch.autograd.grad(loss, [p for _, p in model.own_parameters()])
        for loss in (theirs, ours.loss)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_in_evaluation_its_loss_is_the_cross_entropy_alone(mixture, ids):
    model = mixture()
    torch.testing.assert_close(model.base(ids, labels=ids).loss, model(ids, labels=ids).lm_loss)


@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_output_router_logits_gives_what_mixtral_gives(mixture, ids, by):
    model = mixture(router_z_loss_coef=0.1)
    base, config, given = model.base, model.base.config, {}
    expected = model(ids, labels=ids)
    if by == "argument":
        given = {"output_router_logits": True}
    else:
        config.output_router_logits = True
    output = base(ids, labels=ids, **given)
    assert config.output_router_logits == (by == "configuration")
    assert config.router_aux_loss_coef == 0.01
    extra = config.router_aux_loss_coef * output.aux_loss
    torch.testing.assert_close(output.loss, expected.lm_loss + extra)
    torch.testing.assert_close(output.loss, expected.loss)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(ids.numel(), 3)] * 2
    torch.testing.assert_close(
        output.router_logits[1].view(*ids.shape, 3), expected.routing.logits[:, :, 1]
    )
    assert "aux_loss" not in base(ids, labels=ids, output_router_logits=False)
    with pytest.raises(Exception):  # noqa: B017 - whatever the base raises
        base(ids[0], labels=ids, attention_mask=torch.ones(3, 3, 3))
    assert config.output_router_logits == (by == "configuration")


def test_micro_batches_share_the_routers_losses_by_their_targets(mixture, ids):
    model = mixture().train()
    labels = ids.clone()
    labels[1, 3:] = -100
    counts = [6, 2]
    parts = [model(ids[i : i + 1], labels=labels[i : i + 1]) for i in range(2)]
    expected = sum(part.loss * count / 8 for part, count in zip(parts, counts, strict=True))
    losses = [
        model.base(ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=8).loss
        for i in range(2)
    ]
    torch.testing.assert_close(sum(losses), expected)


def test_unload_leaves_nothing_of_it_at_the_base(llama, mixture, random_base):
    plain = llama()
    model = mixture(plain)
    assert model.base.config.router_aux_loss_coef == 0.01
    base = model.unload()
    assert vars(base).keys() == vars(plain).keys()
    assert base.config.to_dict() == plain.config.to_dict()
    assert base.save_pretrained.__func__ is type(base).save_pretrained


def test_packed_sequences_beside_a_mask_are_refused_where_the_prompt_decides(mixture, ids):
    model = mixture(router_scope="prompt", fresh=True)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(2, -1)
    with pytest.raises(ValueError, match="several packed sequences"):
        model.base(ids, attention_mask=torch.ones_like(ids), position_ids=positions)


# Steps


def test_ten_steps_of_the_trainer_are_ten_steps_of_a_plain_loop(mixture, ids, tmp_path):
    plain, trained = mixture(fresh=True).train(), mixture(fresh=True)
    before = {k: v.clone() for k, v in trained.base.state_dict().items() if "dylora" not in k}
    expected = []
    parameters = [parameter for _, parameter in plain.own_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
    for _ in range(10):
        output = plain(ids, labels=ids)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        plain.observe(output, ids, steps=10)
        expected.append(output.loss.item())

    trainer = trainer_of(
        trained,
        ids,
        tmp_path,
        max_steps=10,
        per_device_train_batch_size=len(ids),
        learning_rate=2e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0, atol=2e-4)
    for ours, theirs in zip(own(trained), own(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(trained.maturity, plain.maturity, rtol=1e-4, atol=1e-4)
    assert [row.steps for row in trained.experts.table] == [10] * 3
    after = trained.base.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_its_logs_tell_of_routing_and_experts(mixture, ids, tmp_path):
    trainer = trainer_of(mixture(fresh=True), ids, tmp_path)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [round(entry["expert/1/maturity"], 3) for entry in entries] == [0.125, 0.75, 1, 1]
    assert sum(entries[0][f"expert/{expert}/load"] for expert in range(3)) == pytest.approx(1)
    assert [entry["router/active_experts"] for entry in entries] == [3, 3, 3, 2]


@pytest.mark.parametrize(
    "changes", [{"gradient_accumulation_steps": 2}, {"bf16": True, "use_cpu": True}]
)
def test_accumulation_and_bfloat16_train_experts_and_maturity(mixture, ids, tmp_path, changes):
    model = mixture(fresh=True)
    before = own(model)
    trainer_of(model, ids, tmp_path, **changes).train()
    assert sum(not torch.equal(a, b) for a, b in zip(before, own(model), strict=True)) > 10
    assert model.maturity.maturity.tolist() == [1, 1, 1]


def test_activations_are_recomputed_with_the_inputs_of_their_own_pass(mixture, ids):
    """A pass without gradient may come between, as in KTO's loss."""
    weights = torch.tensor([[0.9, 0.0, 0.1], [0.0, 0.5, 0.5]])
    gradients = []
    for recompute in (False, True):
        model = mixture().train()
        if recompute:
            model.base.gradient_checkpointing_enable()
        loss = model(ids, labels=ids, routing_weights=weights).lm_loss
        with torch.no_grad():
            model.base(ids[:1, :2])
        loss.backward()
        gradients.append([p.grad for _, p in model.named_expert_parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_trainer_recomputes_activations_without_another_result(mixture, ids, tmp_path):
    results = []
    for recompute in (False, True):
        model = mixture(fresh=True)
        folder = tmp_path / str(recompute)
        trainer_of(model, ids, folder, gradient_checkpointing=recompute).train()
        results.append(own(model))
    assert all(map(torch.equal, *results))


def test_reentrant_checkpointing_is_refused(mixture):
    with pytest.raises(ValueError, match="leave out use_reentrant=True"):
        mixture().base.gradient_checkpointing_enable({"use_reentrant": True})


# Files


def test_a_resumed_trainer_ends_with_the_same_bits(mixture, ids, tmp_path):
    options = {"lora_dropout": 0.2, "expert_dropout": 0.2, "fresh": True}
    whole, resumed = mixture(**options), mixture(**options)
    first = trainer_of(whole, ids, tmp_path / "a")
    first.train()
    second = trainer_of(resumed, ids, tmp_path / "a")
    second.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    for ours, theirs in zip(own(resumed), own(whole), strict=True):
        assert torch.equal(ours, theirs)
    assert all(map(torch.equal, resumed.maturity, whole.maturity))
    assert all(
        torch.equal(resumed.mixture.fractions[k], f) for k, f in whole.mixture.fractions.items()
    )
    assert resumed.experts.state_dict() == whole.experts.state_dict()
    loss = [
        [entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (first, second)
    ]
    assert loss[0] == loss[1]


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"share_A": True, "bias": "all"}])
def test_what_a_trainer_saves_is_the_mixture(mixture, gpt2, ids, tmp_path, options):
    base = gpt2()
    model = mixture(base, **options)
    trainer_of(model, ids, tmp_path).train()
    folder = tmp_path / "checkpoint-4"
    assert {"optimizer.pt", "trainer_state.json", "peft_adapters"} <= {
        p.name for p in folder.iterdir()
    }
    verify(folder)
    again = DyLoRA_MoE.from_pretrained(folder, gpt2())
    model.eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert all(map(torch.equal, again.maturity, model.maturity))
    ours = sum(parameter.numel() for _, parameter in model.own_parameters())
    assert (folder / "model.safetensors").stat().st_size < 4 * ours + 12_000


def test_experts_that_were_made_and_frozen_come_back_from_a_state_dict(mixture, ids, tmp_path):
    model = mixture()
    model.experts.create_expert(rank=4, share=0.3, skill="sql")
    model.experts.freeze(0)
    model.experts.retire(1)
    model.base.save_pretrained(tmp_path / "saved")
    from safetensors.torch import load_file

    other = mixture(fresh=True)
    result = other.base.load_state_dict(
        load_file(tmp_path / "saved/model.safetensors"), strict=False
    )
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert other.experts.state_dict() == model.experts.state_dict()
    assert torch.equal(other(ids).logits, model(ids).logits)
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]


def test_a_mixture_of_another_form_is_not_resumed(mixture, ids, tmp_path):
    trainer_of(mixture(fresh=True), ids, tmp_path).train()
    other = trainer_of(mixture(fresh=True, target_modules=["q_proj"]), ids, tmp_path)
    with pytest.raises(ValueError, match="the saved mixture does not fit this one"):
        other.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_taken_back_at_the_end(mixture, ids, tmp_path):
    model = mixture(fresh=True)
    trainer = trainer_of(
        model,
        ids,
        tmp_path,
        eval_dataset=rows_of(ids),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that it is not the last
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best = DyLoRA_MoE.from_pretrained(tmp_path / "checkpoint-2", mixture().unload())
    for ours, theirs in zip(own(model), own(best), strict=True):
        assert torch.equal(ours, theirs)
    assert all(map(torch.equal, model.maturity, best.maturity))


def test_a_save_beside_checkpoints_and_over_an_earlier_one(mixture, ids, tmp_path):
    model = mixture(fresh=True)
    trainer = trainer_of(model, ids, tmp_path)
    trainer.save_model()
    trainer.train()
    (tmp_path / "README.md").write_text("notes")
    trainer.save_model()
    verify(tmp_path)
    assert (tmp_path / "README.md").read_text() == "notes"
    assert (tmp_path / "checkpoint-2").is_dir()
    again = DyLoRA_MoE.from_pretrained(tmp_path, mixture().unload())
    assert all(torch.equal(a, b) for a, b in zip(own(again), own(model), strict=True))
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}.*"))


def test_the_checkpoint_of_a_run_is_not_replaced(mixture, tmp_path):
    from dylora.storage.manifest import write_manifest

    model = mixture()
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "run/trainer_state.json").write_text("{}")
    write_manifest(tmp_path / "run")
    with pytest.raises(FileExistsError, match="is a run's checkpoint"):
        model.base.save_pretrained(tmp_path / "run")


# The callback


def test_the_callback_is_there_once_and_first(mixture, ids, tmp_path):
    given = MixtureCallback()
    for changes in ({}, {"callbacks": [given]}, {"callbacks": [MixtureCallback]}):
        found = trainer_of(mixture(), ids, tmp_path, **changes).callback_handler.callbacks
        assert [isinstance(callback, MixtureCallback) for callback in found].count(True) == 1
        assert isinstance(found[0], MixtureCallback)


def test_a_model_without_experts_is_trained_as_before(llama, ids, tmp_path):
    trainer = trainer_of(SimpleNamespace(base=llama()), ids, tmp_path)
    assert not any(isinstance(c, MixtureCallback) for c in trainer.callback_handler.callbacks)


def test_the_mixture_itself_is_no_model_for_a_trainer(mixture, tmp_path):
    with pytest.raises(ValueError, match=r"give the trainer model\.base"):
        Trainer(mixture(), TrainingArguments(str(tmp_path)))


def test_what_takes_the_labels_away_is_refused(mixture, ids, tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor takes the labels"):
        trainer_of(mixture(), ids, tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="torch_compile would hide passes"):
        trainer_of(mixture(), ids, tmp_path, torch_compile=True)
    trainer_of(mixture(use_moe_routing=False), ids, tmp_path, label_smoothing_factor=0.1).train()
    trainer = trainer_of(
        mixture(), ids, tmp_path, compute_loss_func=lambda output, *_, **__: output.logits.mean()
    )
    with pytest.raises(ValueError, match="no pass of this step had labels"):
        trainer.train()


def test_a_collapse_is_said_once(mixture, ids, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dylora.integrations.trainer.COLLAPSE_STEPS", 2)
    monkeypatch.setattr("dylora.routing.metrics.COLLAPSED_ABOVE", 0.0)
    with caplog.at_level(logging.WARNING, "dylora"):
        trainer_of(mixture(fresh=True), ids, tmp_path).train()
    said = [
        record.message for record in caplog.records if "collapsed for 2 steps" in record.message
    ]
    assert len(said) == 2  # once for each block


def test_what_several_processes_have_seen_is_added_up(mixture, ids, monkeypatch):
    output = mixture()(ids, labels=ids)
    seen = output.observation(ids)
    assert added_over_processes(seen) is seen
    dist = torch.distributed
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.mul_(2))
    both = added_over_processes(seen)
    expected = seen.plus(seen)
    assert all(map(torch.equal, both[:2], expected[:2]))
    assert both.target_tokens == expected.target_tokens
    assert all(map(torch.equal, both.statistics, expected.statistics))


@pytest.mark.slow
def test_two_processes_hold_one_mixture_and_resume_to_the_same_bits(tmp_path):
    dropout = {"lora_dropout": 0.2, "expert_dropout": 0.2}
    first, second = results_of(2, train_by_trainer, str(tmp_path), 2, None, dropout)
    assert first == second
    middle, end = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4"
    assert {path.name for path in middle.glob("rng*")} == {"rng_state_0.pth", "rng_state_1.pth"}
    verify(middle)
    shutil.rmtree(end)
    assert results_of(2, train_by_trainer, str(tmp_path), 2, str(middle), dropout) == [first] * 2
    verify(end)


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(tmp_path):
    without = {"load_balance_loss_type": "none"}  # as its f are of each micro-batch
    both = results_of(2, train_by_trainer, str(tmp_path / "two"), 2, None, without)
    [alone] = results_of(1, train_by_trainer, str(tmp_path / "one"), 4, None, without)
    torch.testing.assert_close(both[0][0], alone[0], rtol=0, atol=2e-4)


def test_what_others_write_into_a_folder_while_it_is_saved_stays(mixture, tmp_path, monkeypatch):
    model = mixture()
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()  # as a trainer does, in each of its processes
    write = base_methods.write_model

    def write_beside(*args):
        write(*args)
        (folder / "rng_state_1.pth").write_text("of another process")

    monkeypatch.setattr(base_methods, "write_model", write_beside)
    model.base.save_pretrained(folder)
    assert (folder / "rng_state_1.pth").read_text() == "of another process"
    verify(folder)


def test_a_mixture_that_is_saved_over_one_with_more_files_verifies(mixture, tmp_path):
    model = mixture()
    model.training_record["text_hashes"] = "0123456789ab"
    model.base.save_pretrained(tmp_path)
    assert (tmp_path / "text_hashes.bin").exists()
    mixture().base.save_pretrained(tmp_path)
    assert not (tmp_path / "text_hashes.bin").exists()
    verify(tmp_path)


def test_an_upload_that_runs_meanwhile_takes_nothing_half_written(mixture, tmp_path, monkeypatch):
    """By the patterns that transformers' Trainer gives to its uploads of its whole folder."""
    base, seen = mixture().base, set()
    original = folders.write_manifest

    def look(folder, *rest):
        seen.update(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
        return original(folder, *rest)

    monkeypatch.setattr(folders, "write_manifest", look)
    for folder in (tmp_path / "checkpoint-1", tmp_path):
        folder.mkdir(exist_ok=True)
        base.save_pretrained(folder)
    assert any("writing" in path for path in seen)
    assert list(filter_repo_objects(seen, ignore_patterns=["_*", "checkpoint-*"])) == []


def test_a_loss_that_is_not_finite_changes_no_maturity(mixture, ids, tmp_path):
    model = mixture(fresh=True)
    weight = [p for name, p in model.named_expert_parameters() if name.endswith("lora_B")][-1]
    weight.data.fill_(torch.nan)
    trainer_of(model, ids, tmp_path, save_strategy="no").train()
    assert model.maturity.maturity.tolist() == [0, 0, 0]


class Growing(transformers.TrainerCallback):
    """Makes an expert after the second step."""

    def __init__(self, model: DyLoRA_MoE, attach: bool):
        self.model, self.attach = model, attach

    def on_train_begin(self, args, state, control, optimizer, **kwargs) -> None:
        if self.attach:
            self.model.experts.attach_optimizer(optimizer)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            self.model.experts.create_expert(rank=4, share=0.3)


@pytest.mark.parametrize("attach", [True, False])
def test_an_expert_that_comes_in_mid_run_is_trained_or_refused(mixture, ids, tmp_path, attach):
    model = mixture(fresh=True)
    trainer = trainer_of(model, ids, tmp_path, callbacks=[Growing(model, attach)])
    if not attach:
        with pytest.raises(ValueError, match=r"the optimizer holds .* 0 times"):
            trainer.train()
        return
    trainer.train()
    assert model.experts[3].steps == 2
    assert all(B.abs().max() > 0 for _, B in model.expert_weights(3).values())
    again = DyLoRA_MoE.from_pretrained(tmp_path / "checkpoint-4", mixture().unload())
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


# The reference


def test_a_reference_is_the_mixture_as_it_was_with_the_base_shared(mixture, ids, tmp_path):
    model = mixture()
    before = model(ids).logits
    reference = model.reference_model()
    ours = {id(p) for _, p in model.own_parameters()}
    shared = {p.data_ptr() for p in model.base.parameters() if id(p) not in ours}
    theirs = {p.data_ptr() for name, p in reference.named_parameters() if "dylora" not in name}
    assert theirs == shared
    assert not any(p.requires_grad for p in reference.parameters())
    trainer_of(model, ids, tmp_path).train()
    assert torch.equal(reference(ids).logits, before)
    model.eval()
    assert (model(ids).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_copies_what_of_the_base_is_trained_and_leaves_it_to_be(
    mixture, llama, ids, tied
):
    model = mixture(llama(tie_word_embeddings=tied))
    head = model.base.lm_head.requires_grad_(True)
    before, reference = model(ids).logits, model.reference_model()
    assert head.weight.requires_grad
    assert not any(p.requires_grad for p in reference.parameters())
    assert (reference.lm_head.weight is reference.model.embed_tokens.weight) is tied
    model(ids, labels=ids).loss.backward()
    with torch.no_grad():
        head.weight -= head.weight.grad
    assert torch.equal(reference(ids).logits, before)


def test_a_reference_does_not_run_the_forward_that_a_trainer_has_put_on_its_policy(mixture, ids):
    model = mixture()
    expected = model(ids).logits
    model.base.forward = MethodType(lambda self, *args, **kwargs: None, model.base)
    assert torch.equal(model.reference_model()(ids).logits, expected)


AFTERWARDS = """
import sys
from dylora import DyLoRA_MoE, MoELoraConfig
model = DyLoRA_MoE.from_base("tiny-code-llama", MoELoraConfig(num_experts=2, r=2))
assert "transformers.trainer_callback" not in sys.modules, "it takes a second"
from transformers import Trainer, TrainingArguments
trainer = Trainer(model.base, TrainingArguments(sys.argv[1]))
print(type(trainer.callback_handler.callbacks[0]).__name__)
"""


@pytest.mark.slow
def test_it_is_installed_where_the_trainer_is_imported_after_the_model_was_made(tmp_path):
    command = [sys.executable, "-c", AFTERWARDS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "MixtureCallback", done.stderr[-2000:]

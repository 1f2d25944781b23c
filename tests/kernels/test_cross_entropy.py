"""The loss in chunks at the target positions is the loss of the whole logits, of every family."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dylora.kernels import cross_entropy as head_module
from dylora.kernels.cross_entropy import (
    LogitTransform,
    chunked_token_losses,
    find_logit_transform,
    target_positions,
)
from families import FAMILIES


def labels_for(ids):
    labels = ids.clone()
    labels[0, :4] = -100
    labels[1, -2:] = -100
    return labels


def gradients(model):
    found = {n: p.grad.clone() for n, p in model.own_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_same_loss_and_gradients_without_its_logits(
    family, random_base, mixture, ids, monkeypatch
):
    monkeypatch.setattr(head_module, "CHUNK_NUMBERS", {"cpu": 1, "cuda": 1})
    model = mixture(random_base(FAMILIES[family].config_class, **FAMILIES[family].sizes))
    labels = labels_for(ids)
    whole = model(ids, labels=labels, label_smoothing=0.1)
    whole.loss.backward()
    expected = gradients(model)
    ours = model(ids, labels=labels, label_smoothing=0.1, keep_logits=False)
    assert ours.logits is None
    ours.loss.backward()
    torch.testing.assert_close(ours.loss, whole.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.token_losses, whole.token_losses, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("chunk", [16, 17, 1000])
def test_chunks_change_nothing_in_float64(chunk, mixture, gpt2, monkeypatch):
    monkeypatch.setattr(head_module, "CHUNK_NUMBERS", {"cpu": chunk * 40, "cuda": 1})
    model = mixture(gpt2()).double()
    ids = torch.randint(3, 40, (4, 20))
    results = []
    for keep in (True, False):
        output = model(ids, labels=labels_for(ids), keep_logits=keep)
        output.lm_loss.backward()
        results.append((output.token_losses, *gradients(model).values()))
    for whole, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-10, atol=1e-12)


def test_no_tensor_holds_a_logit_for_every_token(mixture, llama, monkeypatch):
    class Largest(TorchDispatchMode):
        numbers, weight = 0, None

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if not isinstance(tensor, torch.Tensor) or tensor.shape[-1:] != (5000,):
                    continue
                if tensor.untyped_storage().data_ptr() != self.weight.untyped_storage().data_ptr():
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    monkeypatch.setattr(head_module, "CHUNK_NUMBERS", {"cpu": 16 * 5000, "cuda": 1})
    model = mixture(llama(vocab_size=5000))
    ids = torch.randint(3, 5000, (4, 30))
    model(ids, labels=ids, keep_logits=False)  # the head has been found
    found = {}
    for keep in (True, False):
        with Largest() as largest:
            largest.weight = model.base.lm_head.weight
            model(ids, labels=ids, keep_logits=keep).loss.backward()
        found[keep] = largest.numbers
    assert found[True] >= 4 * 30 * 5000
    assert found[False] == 16 * 5000


def test_a_batch_without_targets_has_a_loss_of_zero(mixture, ids):
    labels = torch.full_like(ids, -100)
    for keep in (True, False):
        output = mixture()(ids, labels=labels, keep_logits=keep)
        assert output.lm_loss.item() == 0
        output.loss.backward()


def test_positions_have_their_target_after_them():
    labels = torch.tensor([[5, -100, 7, 8], [-100, -100, -100, 4]])
    assert target_positions(labels).tolist() == [1, 2, 6]


def test_a_head_that_is_trained_keeps_its_logits_and_says_so(mixture, random_base, ids):
    base = random_base("PhiConfig", **FAMILIES["phi"].sizes)
    model = mixture(base, bias="all")
    with pytest.warns(UserWarning, match="computed whole"):
        output = model(ids, labels=ids, keep_logits=False)
    assert output.logits is not None
    torch.testing.assert_close(output.loss, model(ids, labels=ids).loss)


def test_a_head_that_is_trained_again_has_its_gradient(mixture, random_base, ids):
    model = mixture(random_base("PhiConfig", **FAMILIES["phi"].sizes), bias="all")
    model.experts.freeze(0, 1, 2)
    assert model(ids, labels=ids, keep_logits=False).logits is None
    model.experts.unfreeze(0, 1, 2)
    with pytest.warns(UserWarning, match="computed whole"):
        model(ids, labels=ids, keep_logits=False).loss.backward()
    assert model.mixture.biases["lm_head"].shift.grad is not None


def test_a_copy_has_its_own_head_and_new_embeddings_are_read(mixture, ids, tmp_path):
    model = mixture()
    model(ids, labels=ids, keep_logits=False)
    torch.save(model, tmp_path / "model.pt")
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(model.base.lm_head.weight)
    whole, chunked = (twin(ids, labels=ids, keep_logits=keep).loss for keep in (True, False))
    torch.testing.assert_close(chunked, whole)
    words = twin.base.lm_head.out_features
    twin.base.resize_token_embeddings(words + 8, mean_resizing=False)
    twin.base.requires_grad_(False)
    ids = torch.full_like(ids, words + 7)
    whole, chunked = (twin(ids, labels=ids, keep_logits=keep).loss for keep in (True, False))
    torch.testing.assert_close(chunked, whole)


def test_looking_for_the_head_leaves_every_module_in_its_mode(mixture, ids):
    model = mixture()
    model.train()
    model.base.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    model(ids, labels=ids, keep_logits=False)
    assert [module.training for module in model.modules()] == before


def test_a_form_that_is_not_known_is_not_guessed(llama):
    base = llama().requires_grad_(False)
    base.lm_head.register_forward_hook(lambda module, args, output: output)
    assert find_logit_transform(base) is not None
    real = base.forward

    def odd(*args, **kwargs):
        output = real(*args, **kwargs)
        output.logits = output.logits.sin()
        return output

    base.forward = odd
    assert find_logit_transform(base) is None


def test_weights_of_a_caller_hold_for_the_first_pass_in_chunks_as_well(mixture, ids):
    weights = torch.eye(3)[[1, 2]]
    expected = mixture()(ids, labels=ids, routing_weights=weights).loss
    ours = mixture()(ids, labels=ids, routing_weights=weights, keep_logits=False).loss
    torch.testing.assert_close(ours, expected)


def test_a_head_on_another_device_than_the_labels_gives_losses_where_these_are():
    """As of a base that is spread over two GPUs; FakeTensorMode knows devices and no values."""
    with FakeTensorMode(), torch.no_grad():
        labels, positions = torch.ones(2, 5, dtype=torch.long), torch.arange(3)
        hidden, head = torch.ones(2, 5, 8, device="meta"), nn.Linear(8, 11, device="meta")
        losses = chunked_token_losses(LogitTransform(), head, hidden, labels, positions)
    assert (losses.shape, losses.device) == (labels.shape, labels.device)

"""Distillation in chunks equals the direct form, and never holds logits of a whole batch."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from surgery.train.losses import IGNORE, Head, TopK, Weights, distil, hidden_match, squared_error

B, T, D, V = 2, 9, 8, 37


def inputs(requires_grad=True):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    h, w, b = random(B, T, D), random(V, D), random(V)
    for tensor in (h, w, b):
        tensor.requires_grad_(requires_grad)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[:, 0] = labels[0, 4] = IGNORE
    return h, w, b, random(B, T, D + 3), random(V, D + 3), labels


def direct(h, w, b, parent_h, parent_w, labels, weights, scale, softcap):
    """The definition, on whole logits."""

    def logits(x, weight, bias=None):
        z = scale * F.linear(x, weight, bias)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    wanted = labels[:, 1:] != IGNORE
    z = logits(h, w, b)[:, :-1][wanted]
    z_t = logits(parent_h, parent_w)[:, :-1][wanted]
    log_p, log_q = ((x / weights.temperature).log_softmax(-1) for x in (z_t, z))
    kl = (log_p.exp() * (log_p - log_q)).sum() * weights.temperature**2
    nll = F.cross_entropy(z, labels[:, 1:][wanted], reduction="sum")
    return weights.kl * kl + weights.ce * nll, kl, nll, F.cross_entropy(z_t, labels[:, 1:][wanted], reduction="sum")


@pytest.mark.parametrize("chunk", [V, 5 * V, 10**6])
@pytest.mark.parametrize(
    ("weights", "scale", "softcap"),
    [
        (Weights(), 1.0, None),
        (Weights(kl=0.7, ce=0.3, temperature=2.0), 0.5, None),
        (Weights(kl=0.0, ce=1.0), 1.0, 3.0),
        (Weights(kl=1.0, ce=0.5), 2.0, 3.0),
    ],
)
def test_chunks_equal_the_direct_form_in_value_and_gradient(chunk, weights, scale, softcap):
    h, w, b, parent_h, parent_w, labels = inputs()
    head = Head(weight_VD=w, bias_V=b, scale=scale, softcap=softcap)
    parent_head = Head(weight_VD=parent_w, scale=scale, softcap=softcap)
    found = distil(h, head, labels, parent_h, parent_head, weights, chunk_logits=chunk)
    grads = torch.autograd.grad(3.0 * found.total, (h, w, b))
    wanted = direct(h, w, b, parent_h, parent_w, labels, weights, scale, softcap)
    wanted_grads = torch.autograd.grad(3.0 * wanted[0], (h, w, b))
    for value, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
    for value, reference in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)


def test_the_divergence_is_the_forward_one():
    parent, model = torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.5])
    eye = torch.eye(2)
    labels = torch.tensor([[IGNORE, 0]])

    def hidden(p):
        return p.log().expand(1, 2, 2)

    found = distil(hidden(model), Head(weight_VD=eye), labels, hidden(parent), Head(weight_VD=eye))
    forward = float((parent * (parent / model).log()).sum())
    reverse = float((model * (model / parent).log()).sum())
    assert abs(forward - reverse) > 0.1
    assert float(found.kl) == pytest.approx(forward, rel=1e-5)


def test_no_tensor_is_larger_than_a_chunk_of_logits():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    h, w, _, parent_h, parent_w, labels = inputs()
    h, parent_h, labels = (x.repeat(8, 4, *[1] * (x.dim() - 2)) for x in (h, parent_h, labels))
    tokens = labels.numel()
    h = h.detach().requires_grad_()
    with Largest() as largest:
        head = Head(weight_VD=w.detach())
        distil(h, head, labels, parent_h, Head(weight_VD=parent_w), chunk_logits=16 * V).total.backward()
    assert largest.numbers <= max(16 * V, tokens * (D + 3))
    assert largest.numbers < tokens * V


def test_a_model_without_a_parent_learns_from_the_text_alone():
    h, w, _, _, _, labels = inputs()
    found = distil(h, Head(weight_VD=w), labels, weights=Weights(kl=0.0, ce=1.0))
    assert found.total == found.nll
    assert found.kl == found.parent_nll == 0


def test_nothing_predicted_is_no_loss_and_no_gradient():
    h, w, _, parent_h, parent_w, labels = inputs()
    found = distil(h, Head(weight_VD=w), torch.full_like(labels, IGNORE), parent_h, Head(weight_VD=parent_w))
    found.total.backward()
    assert found.total == 0
    assert not h.grad.any()


def test_layer_errors_are_sums_over_tokens_so_halves_of_a_batch_add_up():
    y, target = torch.randn(4, 3, D), torch.randn(4, 3, D)
    whole = squared_error(y, target, 2.0)
    halves = squared_error(y[:2], target[:2], 2.0) + squared_error(y[2:], target[2:], 2.0)
    torch.testing.assert_close(whole, halves)
    torch.testing.assert_close(whole, (y - target).square().sum() / 2)


def test_hidden_match_is_relative_and_counts_predicting_positions_only():
    h, _, _, _, _, labels = inputs(requires_grad=False)
    predicted = int((labels[:, 1:] != IGNORE).sum())
    assert float(hidden_match(2 * h, h, labels)) == pytest.approx(predicted, rel=1e-5)
    assert float(hidden_match(h, h, labels)) == 0


@pytest.mark.parametrize("weights", [Weights(), Weights(kl=0.7, ce=0.3, temperature=2.0)])
def test_all_tokens_kept_is_the_whole_divergence(weights):
    h, w, _, parent_h, parent_w, labels = inputs()
    logits = parent_h @ parent_w.T
    log_p, ids = (logits / weights.temperature).log_softmax(-1).topk(V, -1)
    kept = TopK(ids, log_p, torch.zeros(B, T))
    found = distil(h, Head(weight_VD=w), labels, weights=weights, kept=kept)
    wanted = distil(h, Head(weight_VD=w), labels, parent_h, Head(weight_VD=parent_w), weights)
    torch.testing.assert_close(found[:3], wanted[:3], rtol=1e-4, atol=1e-4)
    for a, b in zip(*(torch.autograd.grad(f.total, (h, w)) for f in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_few_kept_tokens_and_the_rest_as_one_are_a_lower_bound_with_its_own_gradient():
    h, w, _, parent_h, parent_w, labels = inputs()
    log_p, ids = (parent_h @ parent_w.T).log_softmax(-1).topk(5, -1)
    kept = TopK(ids, log_p, torch.zeros(B, T))
    found = distil(h, Head(weight_VD=w), labels, kept=kept, chunk_logits=3 * V)
    grad = torch.autograd.grad(found.total, h)[0]
    wanted = labels[:, 1:] != IGNORE
    q = (h @ w.T).softmax(-1).gather(-1, ids)[:, :-1][wanted]
    p = log_p.exp()[:, :-1][wanted]
    rest_p, rest_q = 1 - p.sum(-1), 1 - q.sum(-1)
    direct = (p * (p / q).log()).sum() + (rest_p * (rest_p / rest_q).log()).sum()
    torch.testing.assert_close(found.total, direct.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad, torch.autograd.grad(direct, h)[0], rtol=1e-3, atol=1e-4)
    whole = distil(h, Head(weight_VD=w), labels, parent_h, Head(weight_VD=parent_w))
    assert 0 < float(found.kl) < float(whole.kl)

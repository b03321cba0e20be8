"""The chunked cross-entropy against plain torch in fp64 on the same values: losses, counts and every gradient.

Errors are relative to the largest entry of the reference. Planted once to see these tests fail: one-hot not subtracted;
beta always 0 and always 1; the loss's gradient not applied to hidden state or head; the scales of the two distillation
losses exchanged; the feature gradient always in the first rows; the last of equal words; a head's gradient not cleared
without tokens; gradients formed under no_grad; features against the bf16 copy; blocks not copied back; one chunk for
all tokens; log-sum-exp without its maximum; targets not checked; a head's gradient handed out twice.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_haplovl.kernels import linear_cross_entropy as module
from megatron_haplovl.kernels.linear_cross_entropy import distill_tokens, linear_cross_entropy

M, V, L = 37, 101, 24

# Measured worst cases over 20 seeds: losses 2.6e-7 and gradients 1.2e-6 in fp32; 5.3e-16 and 2.2e-15 in fp64.
TOLERANCE = {torch.float32: 4e-6, torch.float64: 1e-14}


def make(dtype, trained=True, tokens=M, seed=0, scale=1.0):
    """hidden, weight, target; sharp enough that some tokens are nearly right and some nearly wrong."""
    random = torch.Generator().manual_seed(seed)
    hidden = (scale * torch.randn(tokens, L, generator=random)).to(dtype).requires_grad_()
    weight = torch.randn(V, L, generator=random).to(dtype).requires_grad_(trained)
    return hidden, weight, torch.randint(0, V, (tokens,), generator=random)


def plain(hidden, weight, target):
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target, reduction="sum"), (logits.argmax(dim=-1) == target).sum()


def plain_features(student, teacher):
    """Eq. 3 from its definition; no gradient where the distance is zero."""
    distance = (student - teacher).pow(2).sum(-1)
    distance = torch.where(distance > 0, distance.clamp_min(1e-300).sqrt(), 0.0)
    cosine = (student * teacher).sum(-1) / (student.pow(2).sum(-1) * teacher.pow(2).sum(-1)).sqrt()
    return (1 + distance - cosine).sum()


def in_fp64(*tensors):
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def error(got, expected):
    return float((got.double() - expected).detach().abs().max() / expected.detach().abs().max())


def set_chunks(monkeypatch, rows, block, dtype):
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", rows * V * dtype.itemsize)
    monkeypatch.setitem(module.BLOCK_BYTES, "cpu", block * V * 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("rows", "block"), [(M, M), (M, 3), (5, 2), (1, 1), (10**6, 10**6)])
def test_equals_the_plain_form(monkeypatch, dtype, trained, rows, block):
    set_chunks(monkeypatch, rows, block, dtype)
    hidden, weight, target = make(dtype, trained)
    loss, correct = linear_cross_entropy(hidden, weight, target)
    (0.37 * loss).backward()
    hidden64, weight64 = in_fp64(hidden, weight)
    expected, hits = plain(hidden64, weight64, target)
    (0.37 * expected).backward()
    assert loss.dtype == dtype and error(loss, expected) < TOLERANCE[dtype]
    assert correct == hits
    assert error(hidden.grad, hidden64.grad) < TOLERANCE[dtype]
    assert (weight.grad is None) == (not trained)
    if trained:
        assert error(weight.grad, weight64.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("rows", [M, 4])
def test_bf16_is_no_worse_than_the_plain_form_in_bf16(monkeypatch, rows):
    """Measured over 20 seeds: the loss at most 1.4e-7 further from fp64 than the plain form, the gradient of the hidden
    state 1.00 times and that of the head, added up over ten chunks, 1.55 times as far."""
    set_chunks(monkeypatch, rows, 3, torch.bfloat16)
    hidden, weight, target = make(torch.bfloat16)
    ours = [x.detach().clone().requires_grad_() for x in (hidden, weight)]
    loss, _ = linear_cross_entropy(*ours, target)
    loss.backward()
    expected = in_fp64(hidden, weight)
    loss64, _ = plain(*expected, target)
    loss64.backward()
    loss16, _ = plain(hidden, weight, target)
    loss16.backward()
    assert error(loss, loss64) < error(loss16, loss64) + 1e-6
    for got, reference, yardstick in zip(ours, expected, (hidden, weight), strict=True):
        assert got.grad.dtype == torch.bfloat16
        assert error(got.grad, reference.grad) < 2 * error(yardstick.grad, reference.grad)


def test_a_trained_bf16_head_is_rounded_a_bounded_number_of_times(monkeypatch):
    set_chunks(monkeypatch, 1, 1, torch.bfloat16)
    head = make(torch.bfloat16)[1]
    assert -(-1000 // module._chunk_rows(1000, 2 * V, head, trained=True)) == module.MOST_ROUNDINGS
    assert module._chunk_rows(1000, 2 * V, head, trained=False) == 1
    assert module._chunk_rows(1000, 4 * V, head.float(), trained=True) == 1


def test_only_the_head_may_be_trained():
    hidden, weight, target = make(torch.float64)
    linear_cross_entropy(hidden.detach(), weight, target)[0].backward()
    weight64 = weight.detach().clone().requires_grad_()
    plain(hidden.detach(), weight64, target)[0].backward()
    assert hidden.grad is None and error(weight.grad, weight64.grad) < 1e-14


def test_gradcheck_of_both_losses(monkeypatch):
    set_chunks(monkeypatch, 2, 1, torch.float64)
    hidden, weight, target = make(torch.float64, trained=False, tokens=3)
    student = hidden.detach().clone().requires_grad_()
    torch.autograd.gradcheck(lambda h: linear_cross_entropy(h, weight, target)[0], hidden)
    torch.autograd.gradcheck(lambda s, h: distill_tokens(s, h, weight, target)[::2], (student, hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [M, 5])
def test_distillation_losses_share_chunks_and_scale_apart(monkeypatch, dtype, rows):
    set_chunks(monkeypatch, rows, 2, dtype)
    student, weight, target = make(dtype, trained=False)
    with torch.no_grad():
        student[3] = weight[target[3]]
    log_scale = torch.tensor([0.3], dtype=dtype, requires_grad=True)
    ctp, correct, feature = distill_tokens(student, student * log_scale.exp(), weight, target)
    (0.37 * ctp + 1.9 * feature).backward()
    student64, weight64, scale64 = in_fp64(student, weight, log_scale)
    ctp64, hits = plain(student64 * scale64.exp(), weight64, target)
    feature64 = plain_features(student64, weight64[target])
    (0.37 * ctp64 + 1.9 * feature64).backward()
    assert error(ctp, ctp64) < TOLERANCE[dtype] and error(feature, feature64) < TOLERANCE[dtype]
    assert correct == hits
    assert error(student.grad, student64.grad) < TOLERANCE[dtype]
    assert error(log_scale.grad, scale64.grad) < TOLERANCE[dtype]


def test_each_distillation_loss_has_its_own_gradient():
    student, weight, target = make(torch.float64, trained=False)
    other = student.detach().clone().requires_grad_()
    ctp, _, feature = distill_tokens(student, other, weight, target)
    feature.backward(retain_graph=True)
    assert not other.grad.any()
    found = student.grad.clone()
    ctp.backward()
    assert torch.equal(student.grad, found) and other.grad.any()
    (reference,) = torch.autograd.grad(plain_features(student, weight[target]), student)
    assert error(found, reference) < 1e-14


def test_features_in_bf16_are_computed_in_fp32():
    student, weight, target = make(torch.bfloat16, trained=False)
    _, _, feature = distill_tokens(student, student, weight, target)
    student64, weight64 = in_fp64(student, weight)
    assert feature.dtype == torch.float32
    assert error(feature, plain_features(student64, weight64[target])) < 1e-6  # Measured 1.2e-7.


def test_of_equal_logits_the_first_word_is_the_answer():
    hidden, weight, _ = make(torch.float32)
    weight = weight.detach()
    weight[[50, 7, 90]] = 10 * weight[50]
    logits = hidden @ weight.t()
    best = logits.argmax(dim=1)
    assert (best == 7).any() and not (best == 50).any()
    for target in (best, torch.full_like(best, 50), torch.full_like(best, 7)):
        assert linear_cross_entropy(hidden, weight, target)[1] == (best == target).sum()


def test_large_logits_do_not_overflow():
    hidden, weight, target = make(torch.float32, scale=1e4)
    loss, _ = linear_cross_entropy(hidden, weight, target)
    loss.backward()
    hidden64, weight64 = in_fp64(hidden, weight)
    expected, _ = plain(hidden64, weight64, target)
    expected.backward()
    # Measured over 20 seeds: 2.6e-7 and 5.6e-8.
    assert error(loss, expected) < 1e-6 and error(hidden.grad, hidden64.grad) < 1e-6


@pytest.mark.parametrize("trained", [False, True])
def test_no_tokens_give_zero_losses_and_zero_gradients(trained):
    hidden, weight, target = make(torch.bfloat16, trained, tokens=0)
    loss, correct = linear_cross_entropy(hidden, weight, target)
    loss.backward()
    assert loss == 0 and correct == 0 and hidden.grad.shape == (0, L)
    if trained:
        assert torch.equal(weight.grad, torch.zeros_like(weight))
    student = hidden.detach().clone().requires_grad_()
    losses = distill_tokens(student, hidden, weight.detach(), target)
    (losses[0] + losses[2]).backward()
    assert all(value == 0 for value in losses) and student.grad.shape == (0, L)


def test_without_grad_no_gradient_is_formed(monkeypatch):
    hidden, weight, target = make(torch.float32)
    expected = linear_cross_entropy(hidden, weight, target)
    monkeypatch.delattr(module, "_logits_to_gradient")
    with torch.no_grad():
        assert linear_cross_entropy(hidden, weight, target) == expected
        assert distill_tokens(hidden, hidden, weight.detach(), target)[:2] == expected
    frozen = linear_cross_entropy(hidden.detach(), weight.detach(), target)
    assert frozen == expected and not frozen[0].requires_grad


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_never_exist(monkeypatch, dtype):
    set_chunks(monkeypatch, 3, 1, dtype)
    hidden, weight, target = make(dtype, trained=False)
    with LargestTensor() as largest:
        ctp, _, feature = distill_tokens(hidden, hidden, weight, target)
        (ctp + feature).backward()
    assert largest.elements == weight.numel() < M * V


def test_autocast_is_that_of_a_linear_layer():
    hidden, weight, target = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, correct = linear_cross_entropy(hidden, weight, target)
        features = distill_tokens(hidden, hidden, weight.detach(), target)[2]
    loss.backward()
    bf16 = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    expected = linear_cross_entropy(*bf16, target)
    expected[0].backward()
    assert (loss, correct) == expected and loss.dtype == torch.float32
    for got, reference in zip((hidden, weight), bf16, strict=True):
        assert got.grad.dtype == torch.float32 and torch.equal(got.grad, reference.grad.float())
    # Features are compared with the embedding itself, not with its bf16 copy.
    assert features == distill_tokens(hidden, hidden, weight.detach(), target)[2]


def test_strided_inputs():
    hidden, weight, target = make(torch.float64)
    ours = hidden.detach().t().contiguous().t().requires_grad_()
    wide = torch.stack([weight.detach(), weight.detach()], dim=2)[..., 0].requires_grad_()
    linear_cross_entropy(ours, wide, target)[0].backward()
    plain(hidden, weight, target)[0].backward()
    assert error(ours.grad, hidden.grad) < 1e-14 and error(wide.grad, weight.grad) < 1e-14


def test_a_trained_heads_gradient_is_given_away_once():
    hidden, weight, target = make(torch.float32)
    loss, _ = linear_cross_entropy(hidden, weight, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed over"):
        loss.backward()


def test_what_does_not_fit_is_refused():
    hidden, weight, target = make(torch.float32)
    for wrong in (-100, -1, V):
        bad = target.clone()
        bad[5] = wrong
        with pytest.raises(ValueError, match=rf"outside the vocabulary of {V} words: \[{wrong}\]"):
            linear_cross_entropy(hidden, weight, bad)
    with pytest.raises(ValueError, match="do not fit"):
        linear_cross_entropy(hidden[:-1], weight, target)
    with pytest.raises(ValueError, match="bfloat16"):
        linear_cross_entropy(hidden.bfloat16(), weight, target)
    with pytest.raises(ValueError, match="goes with a group"):
        linear_cross_entropy(hidden, weight, target, vocab_size=V)
    with pytest.raises(ValueError, match=f"{V} words from 1 on"):
        linear_cross_entropy(hidden, weight, target, vocab_start=1)
    with pytest.raises(ValueError, match="frozen"):
        distill_tokens(hidden, hidden, weight, target)

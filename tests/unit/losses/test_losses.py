"""Paper Eq. 1-4 against numpy in fp64, token by token."""

import numpy as np
import torch

from megatron_haplovl.config.schema import LossConfig
from megatron_haplovl.losses.distillation import distillation_loss
from megatron_haplovl.losses.language_modeling import next_token_loss
from megatron_haplovl.losses.terms import LANGUAGE_MODELING_TERMS, distillation_terms


def log_softmax(x):
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()


def cos(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


def test_distillation_loss_is_equations_2_to_4():
    rng = np.random.default_rng(0)
    student_v, teacher_v = rng.normal(size=(6, 5)), rng.normal(size=(6, 5))
    student_t, embedding = rng.normal(size=(4, 7)), rng.normal(size=(9, 7))
    tokens, log_scale = np.array([3, 0, 8, 3]), 0.7
    losses = distillation_loss(
        torch.tensor(student_v),
        torch.tensor(teacher_v),
        torch.tensor(student_t),
        torch.tensor(tokens),
        torch.tensor(embedding),
        torch.tensor([log_scale]),
    )
    vision = 6 * (1 - sum(cos(s, t) for s, t in zip(student_v, teacher_v, strict=True)) / 6)
    targets = embedding[tokens]
    feature = 4 * (
        1 + sum(np.sqrt(((s - t) ** 2).sum()) - cos(s, t) for s, t in zip(student_t, targets, strict=True)) / 4
    )
    logits = np.exp(log_scale) * student_t @ embedding.T
    ctp = -sum(log_softmax(row)[token] for row, token in zip(logits, tokens, strict=True))
    expected = [vision, feature, ctp, float((logits.argmax(axis=1) == tokens).sum())]
    got = [float(losses[term.name]) for term in distillation_terms(LossConfig())]
    # The losses are computed in fp32; measured worst case 1e-7 relative over 20 seeds.
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_perfect_students_have_no_loss():
    embedding = torch.eye(5) * 4
    tokens = torch.tensor([1, 4])
    visual = torch.randn(3, 6)
    losses = distillation_loss(visual, 2 * visual, embedding[tokens], tokens, embedding, torch.tensor([3.0]))
    assert float(losses["vision loss"]) < 1e-5
    # The gradient of the norm at zero distance is defined (zero), the loss 1 + 0 - 1.
    assert float(losses["feature loss"]) < 1e-5
    assert float(losses["ctp loss"]) < 1e-5
    assert float(losses["ctp accuracy"]) == 2


def test_an_exact_match_has_a_finite_gradient():
    embedding = torch.eye(5)
    tokens = torch.tensor([1])
    student = embedding[tokens].clone().requires_grad_()
    losses = distillation_loss(torch.ones(1, 2), torch.ones(1, 2), student, tokens, embedding, torch.zeros(1))
    losses["feature loss"].backward()
    assert torch.isfinite(student.grad).all()


def test_batches_without_images_or_text_give_zero_and_a_gradient():
    weight = torch.randn(3, 4, requires_grad=True)
    none = torch.zeros(0, 4) @ weight.T
    losses = distillation_loss(
        none, torch.zeros(0, 3), none, torch.zeros(0, dtype=torch.long), torch.randn(5, 3), torch.zeros(1)
    )
    assert all(value.item() == 0.0 for value in losses.values())
    sum(losses[t.name] for t in distillation_terms(LossConfig()) if t.weight is not None).backward()
    assert torch.equal(weight.grad, torch.zeros(3, 4))


def test_next_token_loss_is_summed_cross_entropy():
    rng = np.random.default_rng(1)
    hidden, weight, labels = rng.normal(size=(5, 4)), rng.normal(size=(6, 4)), np.array([0, 5, 2, 2, 1])
    losses = next_token_loss(torch.tensor(hidden), torch.tensor(weight), torch.tensor(labels))
    logits = hidden @ weight.T
    expected = -sum(log_softmax(row)[label] for row, label in zip(logits, labels, strict=True))
    np.testing.assert_allclose(float(losses["lm loss"]), expected, rtol=2e-6)
    assert float(losses["lm token accuracy"]) == (logits.argmax(axis=1) == labels).sum()
    assert [t.name for t in LANGUAGE_MODELING_TERMS] == list(losses)

import pytest
import torch
from torch.testing import assert_close

from agents.core.kl import adapt_kl_coef, kl_estimate
from textenv import kl_penalty

LOGP = torch.tensor([-0.7, -2.4, -0.5, -1.0, -0.9])
REF = torch.tensor([-1.1, -2.0, -0.6, -1.2, -0.8])


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.4, -0.4, 0.1, 0.2, -0.1]),
        ("k2", [0.08, 0.08, 0.005, 0.02, 0.005]),
        ("k3", [0.070320, 0.091825, 0.004837, 0.018731, 0.005171]),
    ],
)
def test_estimators_agree_with_verl(estimator, expected):
    assert_close(kl_estimate(LOGP, REF, estimator), torch.tensor(expected), atol=1e-6, rtol=0)


def bandit():
    """A policy over four arms, its reference, and each arm's estimator weighted by the arm's fixed probability."""
    logits = torch.tensor([0.3, -0.5, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.1, 0.4, -0.2, 0.9], dtype=torch.float64), dim=0)
    return logits, torch.log_softmax(logits, dim=0), ref


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    _, logp, ref = bandit()
    expected = (logp.exp() * (logp - ref)).sum()
    assert_close((logp.exp() * kl_estimate(logp, ref, estimator)).sum(), expected)


@pytest.mark.parametrize(
    ("estimator", "exact"),
    [
        ("k1", lambda logp, ref: 0 * logp.sum()),
        ("k2", lambda logp, ref: (logp.exp() * (logp - ref)).sum()),
        ("k3", lambda logp, ref: (ref.exp() * (ref - logp)).sum()),
    ],
)
def test_expected_gradient_in_the_loss_is_that_of_the_exact_divergence(estimator, exact):
    logits, logp, ref = bandit()
    sampled = (logp.exp().detach() * kl_estimate(logp, ref, estimator)).sum()
    (got,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(exact(logp, ref), logits)
    assert_close(got, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_large_differences_give_finite_values_and_no_gradient(estimator):
    logp = torch.tensor([-1000.0, 0.0], requires_grad=True)
    estimate = kl_estimate(logp, torch.tensor([0.0, -1000.0]), estimator)
    assert estimate.isfinite().all()
    estimate.sum().backward()
    assert logp.grad.tolist() == [0, 0]


def test_k3_is_at_most_ten():
    assert kl_estimate(torch.tensor(-5.0), torch.tensor(0.0), "k3") == 10


def test_an_unknown_estimator_is_refused():
    with pytest.raises(ValueError, match="'k1', 'k2' or 'k3'"):
        kl_estimate(LOGP, REF, "abs")


def test_the_reward_of_a_token_agrees_with_openrlhf():
    kl_BT = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, float("nan")]])  # the last entry is padding
    sampled_BT = torch.tensor([[True, True, True], [True, True, False]])
    paid_BT = torch.tensor([[0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    got = paid_BT + torch.where(sampled_BT, kl_penalty(REF.mean() + kl_BT, REF.mean(), beta=0.05), 0.0)
    assert_close(got, torch.tensor([[-0.005, -0.01, 0.985], [-0.005, -1.01, 0.0]]))


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (7.0, 0.202),  # 40 % too large, of which 20 % count: .2 (1 + .2 · 50/1000)
        (4.5, 0.199),  # .2 (1 - .1 · 50/1000)
        (5.0, 0.2),
        (-1.0, 0.198),  # an estimate from few samples can be negative
    ],
)
def test_the_coefficient_follows_the_kl_as_verls_does(kl, expected):
    assert adapt_kl_coef(0.2, kl, target=5.0, episodes=50, horizon=1000) == pytest.approx(expected)


def test_a_batch_as_large_as_the_horizon_moves_the_coefficient_by_a_fifth_at_most():
    assert adapt_kl_coef(0.1, 1e9, target=6.0, episodes=10_000) == pytest.approx(0.12)
    assert adapt_kl_coef(0.1, 0.0, target=6.0, episodes=10_000) == pytest.approx(0.08)

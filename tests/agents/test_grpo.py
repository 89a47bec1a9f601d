"""GRPO: its loss and advantages by hand, and what it learns. What it shares with every agent is in test_every_agent.py."""

import pytest
import torch
from torch.testing import assert_close

from agents.core.advantages import group_advantages
from agents.core.learner import Scored
from agents.core.losses import count_denominators
from agents.core.policy_gradient import policy_loss
from agents.grpo import GRPO, GRPOConfig

# Two sequences of three and two tokens; the last entry of the second row is padding and holds junk.
SAMPLED_BT = torch.tensor([[True, True, True], [True, True, False]])
OLD_BT = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.7, -9.0]])
REFERENCE_BT = torch.tensor([[-1.1, -2.0, -0.6], [-1.2, -0.8, -9.0]])
ADVANTAGE_B = torch.tensor([1.0, -0.5])


def loss_and_gradient(**changes):
    logp_BT = torch.tensor([[-0.7, -2.4, -0.5], [-1.0, -0.9, -9.0]], requires_grad=True)
    loss, metrics = policy_loss(
        Scored(torch.arange(2), SAMPLED_BT, logp_BT, torch.zeros(2, 3)),
        **{
            "config": GRPOConfig(),
            "advantage": ADVANTAGE_B,
            "old_BT": OLD_BT,
            "reference_BT": None,
            "denominators": count_denominators(SAMPLED_BT, 4),
        }
        | changes,
    )
    loss.backward()
    return loss.item(), logp_BT.grad, metrics


def test_the_loss_is_the_papers():
    # r = exp(.3), exp(-.4), 1 | exp(.5), exp(-.2); clipped at .8 and 1.2:
    # row 1, A = 1: -(1.2 + .670320 + 1)/3; row 2, A = -.5: (.824361 + .409365)/2; their mean
    loss, gradient, _ = loss_and_gradient()
    assert loss == pytest.approx(-0.169955, abs=1e-6)
    expected = torch.tensor([[0.0, -0.670320 / 6, -1 / 6], [0.824361 / 4, 0.409365 / 4, 0.0]])
    assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_the_kl_term_is_k3_times_its_coefficient():
    loss, gradient, metrics = loss_and_gradient(kl_loss_coef=0.04, reference_BT=REFERENCE_BT)
    assert loss == pytest.approx(-0.168603, abs=1e-6)
    expected = torch.tensor([[0.002198, -0.114999, -0.166032], [0.207903, 0.101290, 0.0]])
    assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    # k3 by hand: .070320 + .091825 + .004837 and .018731 + .005171, a sequence
    assert metrics["kl_k3"].item() == pytest.approx((0.166982 + 0.023902) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"aggregation": "token_mean"}, -0.327319),
        ({"aggregation": "token_mean", "clip_high": 0.28}, -0.343319),
        ({"aggregation": "constant"}, -0.204574),
    ],
    ids=["PPO", "DAPO", "Dr. GRPO"],
)
def test_its_settings_reach_the_losses_of_its_relatives(changes, expected):
    assert loss_and_gradient(config=GRPOConfig(**changes))[0] == pytest.approx(expected, abs=1e-6)


def test_a_batch_that_is_fresh_has_ratio_one():
    loss, gradient, metrics = loss_and_gradient(old_BT=None)
    assert loss == pytest.approx(-(1.0 - 0.5) / 2)
    assert_close(gradient, torch.tensor([[-1 / 6] * 3, [0.125, 0.125, 0.0]]))
    assert metrics["clip_low_fraction"] == metrics["clip_high_fraction"] == 0


def test_the_advantage_of_an_ungraded_completion_is_zero():
    reward_B = torch.tensor([1.0, 0.0, torch.nan, 1.0, 1.0], dtype=torch.float64)
    advantage_B = group_advantages(reward_B, torch.tensor([0, 0, 0, 1, 1]))
    half = 0.5 / (0.5**0.5 + 1e-6)
    assert_close(advantage_B, torch.tensor([half, -half, 0.0, 0.0, 0.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("task_id", "family", "lr", "episodes", "at_least"),
    [
        ("textenv/ProbeOneHot-v0", "llama", 1e-2, 1500, 0.95),
        ("textenv/ProbeDelayedCopy-v0", "llama", 5e-3, 8000, 0.9),
        ("textenv/ProbeLength-v0", "llama", 1e-2, 1500, 0.95),
        # Rotary positions alone cannot tell the prompt "a" from the prompt and its answer "aa".
        ("textenv/ProbeSubstring-v0", "gpt2", 2e-3, 4000, 0.95),
    ],
)
@pytest.mark.slow
def test_it_learns_the_probes(fresh_model, config, task_id, family, lr, episodes, at_least):
    settings = config(
        fresh_model(task_id, family),
        total_episodes=episodes,
        prompts_per_step=8,
        group_size=8,
        learning_rate=lr,
        eval_episodes=64,
        checkpoint_every=10**6,
    )
    assert GRPO(task_id, settings).learn().evaluate().reward >= at_least


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size must be 2 or more, since a lone completion"),
        ({"temperature": 0.0}, "temperature must be more than 0"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"prompts_per_step": 0}, "prompts_per_step must be at least 1, got 0"),
        ({"learning_rate": -1e-3}, "learning_rate must be 0 or more"),
        ({"kl_loss_coef": -1.0}, "kl_loss_coef"),
        ({"max_ungraded": 1.0}, "max_ungraded"),
    ],
)
def test_settings_that_cannot_train_are_refused_when_written(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)

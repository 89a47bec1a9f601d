"""What policy-gradient agents share: the KL to the start, in the reward and adapted, and settings that are refused."""

from dataclasses import replace

import pytest
import torch

from agents.core.trajectories import concatenate
from agents.grpo import GRPO, GRPOConfig


@pytest.fixture
def agent(fresh_model, config):
    settings = config(fresh_model("textenv/GuessNumber-v0"), kl_reward_coef=0.1, max_tokens=64)
    return GRPO("textenv/GuessNumber-v0", settings)


def test_the_kl_penalty_takes_beta_times_the_log_ratio_off_each_token(agent):
    reference = agent.reference()
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(0.5)
    plain = agent.sample(agent.rollout(), 0, (0,))
    penalised = agent.penalise(plain, reference)
    reference_BT, _ = reference.logprobs(plain.tokens_BT, plain.sampled_BT, 1.0)
    log_ratio_BT = torch.where(plain.sampled_BT, plain.logp_BT - reference_BT, 0.0).double()
    torch.testing.assert_close(penalised.reward_BT, plain.reward_BT - 0.1 * log_ratio_BT, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(penalised.return_B, penalised.reward_BT.sum(dim=1))
    torch.testing.assert_close(penalised.kl_B, log_ratio_BT.sum(dim=1), rtol=1e-5, atol=1e-5)
    assert penalised.kl_B.abs().max() > 0.1
    assert [score.value for score in penalised.scores] == [score.value for score in plain.scores]


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_a_policy_that_is_its_own_reference_pays_no_penalty_at_any_temperature(fresh_model, config, temperature):
    settings = config(fresh_model("textenv/ProbeOneHot-v0"), kl_reward_coef=1.0, temperature=temperature)
    agent = GRPO("textenv/ProbeOneHot-v0", settings)
    batch = agent.penalise(agent.sample(agent.rollout(), 0, (0,)), agent.policy)
    assert batch.penalty_B.abs().max() < 1e-4


def test_rounding_between_engine_and_learner_is_no_penalty(fresh_model, config):
    agent = GRPO("textenv/ProbeOneHot-v0", config(fresh_model("textenv/ProbeOneHot-v0"), kl_reward_coef=1.0))
    batch = agent.sample(agent.rollout(), 0, (0,))
    noisy = replace(batch, logp_BT=batch.logp_BT + 1e-6 * torch.randn(batch.logp_BT.shape))
    assert agent.penalise(noisy, agent.reference()).penalty_B.abs().max() == 0


def test_joined_batches_keep_every_episode_and_part_their_groups(agent):
    one, other = (agent.sample(agent.rollout(), index, (index,), prompts=2) for index in (0, 2))
    narrow = replace(
        one, **{name: getattr(one, name)[:, :-1] for name in ("tokens_BT", "source_BT", "logp_BT", "reward_BT")}
    )
    both = concatenate([narrow, other])
    assert len(both) == 16
    assert both.group_B.tolist() == [g for g in range(4) for _ in range(4)]
    assert torch.equal(both.return_B, torch.cat([one.return_B, other.return_B]))
    assert both.length_B.tolist() == [*narrow.length_B.tolist(), *other.length_B.tolist()]
    assert both.completions == one.completions + other.completions
    assert torch.equal(both.sampled_BT[8:, : other.tokens_BT.shape[1]], other.sampled_BT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_ratio_max": 1.1}, r"clip_ratio_max must be more than 1 \+ clip_high = 1.2, got 1.1"),
        ({"kl_target": 3.0}, "kl_reward_coef or kl_loss_coef must be above 0 when there is a kl_target"),
        ({"kl_target": 0.0, "kl_loss_coef": 0.1}, "kl_target must be more than 0"),
        ({"kl_loss_coef": -1.0}, "kl_loss_coef must be 0 or more"),
        ({"min_group_std": -1.0}, "min_group_std must be 0 or more"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)

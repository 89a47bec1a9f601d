"""The price on length."""

from __future__ import annotations

import pytest
import torch

from agents.dapo.dapo import soft_overlong_penalty
from rewards import score_samples
from rewards.verifiers.soft_overlong import SoftOverlong, punish_length


def test_vectors(sample):  # those of TRL's get_soft_overlong_punishment
    lengths = (0, 80, 85, 90, 100, 101, 1000)
    scores = score_samples(SoftOverlong(max_tokens=100, buffer=20), [sample(tokens=(7,) * n) for n in lengths])
    assert [score.value for score in scores] == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0, -1.0]
    assert [score.parts["length"] for score in scores] == [score.value for score in scores]
    assert {score.correct for score in scores} == {False}


def test_a_buffer_of_everything_is_a_price_on_every_token(sample):
    scores = score_samples(SoftOverlong(10, buffer=10), [sample(tokens=(7,) * n) for n in range(12)])
    assert [score.value for score in scores] == pytest.approx([-n / 10 for n in range(11)] + [-1])


@pytest.mark.parametrize(("budget", "share"), [(100, 0.2), (10, 0.3), (7, 0.5), (50, 0.99)])
def test_it_is_what_the_dapo_agent_applies_at_every_length(budget, share):
    sampled_BT = torch.arange(budget) < torch.arange(budget + 1)[:, None]  # row n has n tokens
    agent_B = soft_overlong_penalty(sampled_BT, budget, share).sum(dim=1)
    ours = [punish_length(n, budget, share * budget) for n in range(budget + 1)]
    assert agent_B.tolist() == ours


def test_text_without_tokens_is_ungraded(sample):
    (score,) = score_samples(SoftOverlong(10, 2), [sample("text")])
    assert "tokens" in score.error


@pytest.mark.parametrize(("max_tokens", "buffer"), [(10, 0), (10, -1), (10, 11), (0, 0), (10, float("nan"))])
def test_a_buffer_that_makes_no_sense_is_refused(max_tokens, buffer):
    with pytest.raises(ValueError, match="buffer must be above 0 and at most max_tokens"):
        SoftOverlong(max_tokens, buffer)

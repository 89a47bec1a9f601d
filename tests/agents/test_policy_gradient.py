"""What policy-gradient agents share: the KL to the start, in the reward and adapted, and settings that are refused."""

import json
from dataclasses import replace

import pytest
import torch

from agents.core.policy_gradient import compare_in_groups
from agents.core.trajectories import concatenate
from agents.dapo import DAPOConfig
from agents.grpo import GRPO, GRPOConfig
from rewards import Score, ungraded
from tests.agents.scripted import batch_of
from textenv.cli import main


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


# --- Parts weighed by themselves ---


def with_parts(*parts):
    """One group, whose scores have these parts; None is ungraded."""
    batch = batch_of([0.0] * len(parts))
    return replace(batch, scores=[ungraded("?") if part is None else Score(0.0, part) for part in parts])


WEIGHED = GRPOConfig(part_weights={"answer": 1.0, "form": 0.5})


def test_parts_are_weighed_by_their_names_whatever_the_scores_are():
    batch = with_parts(*({"answer": a, "form": f, "more": 9.0} for a, f in ((1, 0), (0, 1), (1, 1), (0, 0))))
    assert compare_in_groups(batch, GRPOConfig()).tolist() == [0.0] * 4
    expected = [0.387298, -0.387298, 1.161895, -1.161895]  # as with TRL's deviations, less its epsilon of 1e-4
    assert compare_in_groups(batch, WEIGHED).tolist() == pytest.approx(expected, abs=2e-6)


def test_what_is_not_kept_and_what_is_not_graded_has_no_say_in_any_part():
    of_four = [{"answer": 1.0, "form": 0.0}, {"answer": 0.0, "form": 0.0}, {"answer": 9.0, "form": 9.0}, None]
    kept_B = torch.tensor([True, True, False, True])
    expected = [0.5**0.5, -(0.5**0.5), 0.0, 0.0]  # of the two that have a say: ±1 / sqrt 2, and their deviation is 1
    assert compare_in_groups(with_parts(*of_four), WEIGHED, kept_B).tolist() == pytest.approx(expected, abs=3e-6)


def test_a_part_that_no_score_has_stops_the_run_and_names_those_there_are():
    with pytest.raises(
        ValueError, match="names 'form', but no score of the step has such a part; there are answer, tone"
    ):
        compare_in_groups(with_parts({"answer": 1.0, "tone": 0.0}, {"answer": 0.0}), WEIGHED)
    assert compare_in_groups(with_parts(None, None), WEIGHED).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("config_class", "settings", "wanted"),
    [
        (GRPOConfig, {"part_weights": {"a": float("nan")}}, "part_weights must be finite for every part"),
        (GRPOConfig, {"part_weights": {"a": 0.0, "b": 0.0}}, "not all 0"),
        (GRPOConfig, {"part_weights": {"a": 1.0}, "kl_reward_coef": 0.1}, "kl_reward_coef must be 0 with part_weights"),
        (DAPOConfig, {"part_weights": {"a": 1.0}}, "overlong_buffer must be 0 with part_weights"),
    ],
)
def test_weights_that_make_no_sense_are_refused(config_class, settings, wanted):
    with pytest.raises(ValueError, match=wanted):
        config_class(**settings)


def test_part_weights_are_typed_as_names_and_numbers(fresh_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = "--total-episodes 16 --prompts-per-step 4 --group-size 4 --eval-episodes 4 --run-dir run --reward exact"
    model = fresh_model("textenv/ProbeOneHot-v0")
    flags = f"--model {model} {small} --part-weights correct 1 more 0.5"
    with pytest.raises(SystemExit):  # there is no part named more
        main(["train", "grpo", "textenv/ProbeOneHot-v0", *flags.split()])
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert settings["part_weights"] == {"correct": 1.0, "more": 0.5}

"""The gradient belongs to the batch: not to how it is split, padded or ordered, and not to what stands beside it."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from agents.core.critic import Critic
from agents.core.learner import Learner, Scored, mean_metrics, shuffled_parts
from agents.core.losses import count_denominators
from agents.core.policy_gradient import policy_loss
from agents.grpo import GRPOConfig
from tests.agents.test_rollout import make_rollout
from textenv import Source

MODES = ["sequence_mean", "token_mean", "sequence_sum", "constant"]


@pytest.fixture
def rolled():
    rollout, policy = make_rollout("textenv/GuessNumber-v0")
    batch = rollout.collect(0, 4, 3, temperature=1.0, seed=(0,))
    advantage_B = torch.linspace(-1, 1, len(batch))
    return policy.double(), batch, advantage_B


def gradient(policy, batch, advantage_B, mode="sequence_mean", tokens_per_microbatch=10**9, **changes):
    """The gradient of one GRPO step, its weights left alone."""
    learner = Learner(policy, max_grad_norm=1e9, tokens_per_microbatch=tokens_per_microbatch)
    loss = partial(
        policy_loss,
        **{
            "config": GRPOConfig(aggregation=mode),
            "advantage": advantage_B,
            "old_BT": batch.logp_BT,
            "denominators": count_denominators(batch.sampled_BT, 8),
        }
        | changes,
    )
    metrics = learner.step(batch, torch.arange(len(batch)), loss)  # at learning rate 0
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}, metrics


def assert_same(one, other):
    for name, expected in one.items():
        assert_close(other[name], expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 100, 250])
def test_the_gradient_does_not_depend_on_micro_batches(rolled, mode, tokens):
    whole, metrics = gradient(*rolled, mode)
    split, split_metrics = gradient(*rolled, mode, tokens_per_microbatch=tokens)
    assert_same(whole, split)
    for name, value in metrics.items():
        assert split_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("tokens", [1, 100])
def test_the_gradient_does_not_depend_on_how_many_rows_go_through_the_head_at_once(rolled, monkeypatch, tokens, known):
    policy, batch, _ = rolled
    if not known:
        monkeypatch.setattr(policy, "decoder", lambda: None)
    sizes, readout = [], policy.readout
    monkeypatch.setattr(policy, "readout", lambda *arguments: sizes.append(len(arguments[1])) or readout(*arguments))
    whole, metrics = gradient(*rolled)
    assert sizes == [batch.sampled_BT.sum()]
    sizes.clear()
    monkeypatch.setattr("agents.core.learner.KEPT", tokens * policy.vocab_size)
    split, split_metrics = gradient(*rolled)
    assert len(sizes) == len(batch) if tokens == 1 else 1 < len(sizes) < len(batch) and max(sizes) <= tokens
    assert_same(whole, split)
    for name, value in metrics.items():
        assert split_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_does_not_depend_on_the_order_of_episodes(rolled, mode):
    policy, batch, advantage_B = rolled
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    names = ("tokens_BT", "source_BT", "logp_BT", "reward_BT", "group_B")
    shuffled = replace(batch, **{name: getattr(batch, name)[order] for name in names})
    assert_same(gradient(policy, batch, advantage_B, mode)[0], gradient(policy, shuffled, advantage_B[order], mode)[0])


@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_does_not_depend_on_padding(rolled, mode):
    policy, batch, advantage_B = rolled

    def widen(x_BT, value):
        return torch.cat([x_BT, x_BT.new_full((len(x_BT), 5), value)], dim=1)

    padded = replace(
        batch,
        tokens_BT=widen(batch.tokens_BT, 3),
        source_BT=widen(batch.source_BT, int(Source.PAD)),
        logp_BT=widen(batch.logp_BT, torch.nan),
        reward_BT=widen(batch.reward_BT, 0),
    )
    learner = Learner(policy)
    assert torch.equal(learner.logprobs(batch, torch.arange(12)), learner.logprobs(padded, torch.arange(12))[:, :-5])
    assert_same(gradient(policy, batch, advantage_B, mode)[0], gradient(policy, padded, advantage_B, mode)[0])


def test_prompt_padding_and_reply_tokens_have_no_gradient(rolled):
    policy, batch, advantage_B = rolled
    elsewhere_BT = ~batch.sampled_BT
    expected, _ = gradient(policy, batch, advantage_B)
    junk = batch.logp_BT.masked_fill(elsewhere_BT, torch.inf)
    assert_same(expected, gradient(policy, batch, advantage_B, old_BT=junk)[0])


def test_every_token_that_was_sampled_has_gradient(rolled):
    policy, batch, _advantage_B = rolled
    seen = []

    def loss(scored):
        scored.logp_RT.retain_grad()
        seen.append(scored)
        return -(scored.logp_RT * scored.sampled_RT).sum(), {}

    Learner(policy).step(batch, torch.arange(len(batch)), loss)
    for scored in seen:
        assert torch.equal(scored.logp_RT.grad != 0, scored.sampled_RT)
    ends = (batch.tokens_BT == 0) & batch.sampled_BT
    assert ends.any(), "end tokens among the sampled ones were wanted"


def test_rows_without_advantage_may_be_left_out_when_they_stay_in_the_denominators(rolled):
    policy, batch, advantage_B = rolled
    advantage_B = advantage_B.masked_fill(torch.arange(len(batch)) % 3 == 0, 0.0)
    whole, _ = gradient(policy, batch, advantage_B)
    learner = Learner(policy, max_grad_norm=1e9)
    denominators = count_denominators(batch.sampled_BT, 8)
    loss = partial(
        policy_loss,
        config=GRPOConfig(),
        advantage=advantage_B,
        old_BT=batch.logp_BT,
        denominators=denominators,
    )
    learner.step(batch, advantage_B.nonzero().squeeze(1), loss)
    assert_same(whole, {name: p.grad for name, p in policy.named_parameters() if p.grad is not None})


def test_micro_batches_hold_every_row_once_within_their_tokens(rolled):
    policy, batch, _ = rolled
    parts = list(Learner(policy, tokens_per_microbatch=200).microbatches(batch, torch.arange(len(batch))))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(batch)))
    assert len(parts) > 1
    for part in parts:
        assert len(part) == 1 or len(part) * int(batch.length_B[part].max()) <= 200


def test_a_gradient_that_is_not_finite_stops_and_leaves_the_weights(rolled):
    policy, batch, _ = rolled
    before = {name: p.clone() for name, p in policy.named_parameters()}
    learner = Learner(policy)
    learner.set_learning_rate(0.1)
    with pytest.raises(FloatingPointError, match="the weights were left as they were"):
        learner.step(batch, torch.arange(2), lambda scored: (scored.logp_RT.sum() * torch.inf, {}))
    for name, p in policy.named_parameters():
        assert torch.equal(p, before[name])


def test_a_step_climbs_what_has_positive_advantage(rolled):
    policy, batch, _ = rolled
    learner = Learner(policy)
    learner.set_learning_rate(1e-3)
    rows = torch.tensor([0])
    before = learner.logprobs(batch, rows).sum()
    denominators = count_denominators(batch.sampled_BT[rows], 8)
    loss = partial(
        policy_loss,
        config=GRPOConfig(),
        advantage=torch.ones(len(batch)),
        old_BT=None,
        denominators=denominators,
    )
    learner.step(batch, rows, loss)
    assert learner.logprobs(batch, rows).sum() > before


def test_the_optimiser_goes_on_exactly_where_it_was_saved(rolled, tmp_path):
    policy, batch, _advantage_B = rolled
    learner = Learner(policy)
    learner.set_learning_rate(1e-3)
    step = partial(learner.step, batch, torch.arange(4), lambda scored: (-scored.logp_RT.sum(), {}))
    step()
    learner.save(tmp_path)
    weights = {name: p.clone() for name, p in policy.state_dict().items()}
    step()
    expected = {name: p.clone() for name, p in policy.state_dict().items()}
    policy.load_state_dict(weights)
    again = Learner(policy)
    again.load(tmp_path)
    again.set_learning_rate(1e-3)
    again.step(batch, torch.arange(4), lambda scored: (-scored.logp_RT.sum(), {}))
    for name, p in policy.state_dict().items():
        assert torch.equal(p, expected[name]), name


def test_parts_are_disjoint_and_whole():
    parts = list(shuffled_parts(torch.arange(10), 3, (0, 1)))
    assert sorted(torch.cat(parts).tolist()) == list(range(10))
    assert [len(part) for part in parts] == [4, 3, 3]


def test_metrics_are_the_mean_of_the_updates_and_the_gap_that_of_the_first():
    updates = [{"logp_gap": 0.3, "logp_gap_max": 2.0, "loss": 1.0}, {"logp_gap": 9.0, "logp_gap_max": 9.0, "loss": 3.0}]
    assert mean_metrics(updates) == {"logp_gap": 0.3, "logp_gap_max": 2.0, "loss": 2.0}


def test_the_gap_is_measured_where_there_is_no_step_too(rolled):
    policy, batch, _ = rolled
    shifted = replace(batch, logp_BT=batch.logp_BT + 0.25)
    gap = Learner(policy).measure_gap(shifted, torch.arange(4))
    assert gap["logp_gap"] == pytest.approx(0.25, abs=1e-4)


def test_the_clock_tells_where_the_time_of_a_step_goes(rolled):
    policy, batch, _ = rolled
    learner = Learner(policy)
    learner.step(batch, batch.rows, lambda scored: (scored.logp_RT.sum(), {}))
    seconds = learner.clock.take()
    assert list(seconds) == ["forward", "backward", "optimise"]
    assert min(seconds.values()) > 0


def test_a_loss_that_does_not_move_the_policy_leaves_it_without_gradient(rolled):
    policy, batch, _ = rolled
    critic = Critic(policy.hidden_size, policy.device).double()
    critic.detached = True
    learner = Learner(policy, critic=critic)
    learner.step(batch, batch.rows, lambda scored: (scored.value_RT.sum(), {}))
    assert critic.head.weight.grad.any()
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("tokens", [1, 10**9])
def test_a_steps_gradient_is_that_of_the_loss_on_policy_and_critic_as_a_whole(rolled, monkeypatch, tokens):
    policy, batch, _ = rolled
    critic = Critic(policy.hidden_size, policy.device)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))

    def loss(scored):
        weight_RT = torch.linspace(-1, 1, scored.logp_RT.shape[1])
        return (weight_RT * scored.logp_RT).sum() + scored.value_RT.square().sum(), {}

    logp_BT, entropy_BT, hidden_NH = policy.score(batch.tokens_BT, batch.sampled_BT, 1.0)
    value_BT = critic(batch.tokens_BT, batch.sampled_BT, hidden_NH)
    loss(Scored(batch.rows, batch.sampled_BT, logp_BT, entropy_BT, value_BT))[0].backward()
    named = [*policy.named_parameters(), *critic.named_parameters()]
    expected = {name: p.grad.clone() for name, p in named}
    monkeypatch.setattr("agents.core.learner.KEPT", tokens * policy.vocab_size)
    Learner(policy, critic=critic, max_grad_norm=1e9).step(batch, batch.rows, loss)
    for name, p in named:
        assert (p.grad - expected[name]).norm() <= 1e-5 * expected[name].norm(), name

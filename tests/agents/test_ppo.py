"""PPO: its loss by hand, what reaches the advantages, what the critic may and may not move, and that it learns."""

import json
import math
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import agents.core.agent as core_agent
import agents.ppo.ppo as ppo_module
import textenv
from agents import warmup
from agents.core.advantages import whiten
from agents.core.kl import adapt_penalty_coef
from agents.core.learner import Learner, Scored
from agents.core.losses import Denominators, count_denominators
from agents.core.rollout import Rollout
from agents.core.stepping import sampling, step_episodes
from agents.ppo import PPO, PPOConfig
from agents.ppo.ppo import explained_variance, ppo_loss
from agents.ppo.pretraining import draw_texts, read_texts, text_batch
from rewards import ungraded
from tests.agents.test_critic import make_critic, make_reward_model
from tests.agents.test_rollout import make_rollout
from tests.agents.test_stepping import Chat, TimeLimit
from textenv import Finish, Source
from textenv.cli import main

# The loss. Two sequences of three and two tokens; the last entry of the second row is padding and holds junk.

SAMPLED_BT = torch.tensor([[True, True, True], [True, True, False]])
ADVANTAGE_BT = torch.tensor([[1.0, 1.0, 1.0], [-0.5, -0.5, 9e9]])
OLD_BT = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.7, -9.0]])
OLD_VALUE_BT = torch.tensor([[0.2, 0.4, 0.6], [0.5, 0.1, 9e9]])
RETURN_BT = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.5, -9e9]])


def loss_and_gradients(config=None, **changes):
    logp_BT = torch.tensor([[-0.7, -2.4, -0.5], [-1.0, -0.9, -9.0]], requires_grad=True)
    value_BT = torch.tensor([[0.5, 0.4, 0.3], [0.5, 0.1, 9.0]], requires_grad=True)
    loss, metrics = ppo_loss(
        Scored(torch.arange(2), SAMPLED_BT, logp_BT, torch.zeros(2, 3), value_BT),
        **{
            "config": config or PPOConfig(),
            "advantage_BT": ADVANTAGE_BT,
            "old_BT": OLD_BT,
            "old_value_BT": OLD_VALUE_BT,
            "return_BT": RETURN_BT,
            "denominators": count_denominators(SAMPLED_BT, 4),
        }
        | changes,
    )
    loss.backward()
    return loss.item(), logp_BT.grad, value_BT.grad, metrics


# ((.36 + .36 + .49) + (.25 + .16)) / 2 over five tokens: of the first token .25 would be nearer, but the value left its clip.
VALUE_LOSS = 0.162
VALUE_GRADIENT = torch.tensor([[0.0, -0.12, -0.14], [0.1, -0.08, 0.0]])


def test_the_loss_is_the_clipped_surrogate_and_a_tenth_of_the_clipped_squared_error():
    # The surrogate, over five tokens: -(1.2 + .670320 + 1) and .5 (1.648721 + .818731)
    loss, of_logp, of_value, metrics = loss_and_gradients()
    assert loss == pytest.approx(-0.327319 + 0.1 * VALUE_LOSS, abs=1e-6)
    assert_close(of_logp, torch.tensor([[0.0, -0.134064, -0.2], [0.164872, 0.081873, 0.0]]), atol=1e-6, rtol=0)
    assert_close(of_value, 0.1 * VALUE_GRADIENT, atol=1e-6, rtol=0)
    assert metrics["value_loss"].item() == pytest.approx(VALUE_LOSS)
    assert metrics["clip_high_fraction"] == pytest.approx(
        1 / 5
    )  # the first token of row 1; row 2's rises are not bound
    assert metrics["clip_low_fraction"] == 0


def test_values_clipped_at_their_old_ones_agree_with_verl():
    # V = .5 .4 .3, from .2 .4 .6, towards 1: max(.25, .36) + .36 + max(.49, .36), half their mean
    loss, *_ = loss_and_gradients(
        PPOConfig(value_loss_coef=1.0),
        advantage_BT=torch.zeros(2, 3),
        old_value_BT=torch.tensor([[0.2, 0.4, 0.6], [0.5, 0.1, 0.0]]),
        return_BT=torch.tensor([[1.0, 1.0, 1.0], [0.5, 0.1, 0.0]]),  # row 2 is where it should be
        denominators=Denominators(tokens=3, sequences=1, max_new_tokens=3),
    )
    assert loss == pytest.approx(0.201667, abs=1e-6)


def test_without_a_clip_of_values_the_error_is_plain():
    # (.25 + .36 + .49 + .25 + .16) / 2 / 5
    loss, _, of_value, _ = loss_and_gradients(PPOConfig(value_clip=None))
    assert loss == pytest.approx(-0.327319 + 0.1 * 0.151, abs=1e-6)
    assert of_value[0, 0].item() == pytest.approx(0.1 * -0.5 / 5)


def test_while_only_the_critic_learns_the_loss_is_its_alone():
    loss, of_logp, of_value, metrics = loss_and_gradients(policy_moves=False)
    assert loss == pytest.approx(0.1 * VALUE_LOSS)
    assert of_logp is None
    assert_close(of_value, 0.1 * VALUE_GRADIENT, atol=1e-6, rtol=0)
    assert set(metrics) == {"value_loss"}


@pytest.mark.parametrize(("coef", "expected"), [(1.0, -0.357291 + 0.057526), (4.0, -0.357291 + 4 * 0.057526)])
def test_ppo_penalty_is_the_plain_surrogate_and_the_kl_of_its_update(coef, expected):
    # Surrogate: -(1.349859 + .670320 + 1) + .5 (1.648721 + .818731), over five
    # (r - 1) - log r: (.049859 + .070320 + 0 + .148721 + .018731), over five
    config = PPOConfig(kl_step_target=0.01, value_loss_coef=1e-9)
    loss, of_logp, _, metrics = loss_and_gradients(config, kl_step_coef=coef)
    assert loss == pytest.approx(expected, abs=3e-6)
    # -A r + coef (r - 1), over five
    by_hand = torch.tensor([[-1.349859, -0.670320, -1.0], [0.824361, 0.409365, 0.0]])
    by_hand += coef * torch.tensor([[0.349859, -0.329680, 0.0], [0.648721, -0.181269, 0.0]])
    assert_close(of_logp, by_hand / 5, atol=1e-6, rtol=0)
    assert set(metrics) == {"value_loss"}


@pytest.mark.parametrize("target", [None, 0.01], ids=["clip", "penalty"])
def test_the_first_update_has_the_gradient_of_the_policy_gradient_alone(target):
    fresh = torch.tensor([[-0.7, -2.4, -0.5], [-1.0, -0.9, -9.0]])
    _, of_logp, _, _ = loss_and_gradients(PPOConfig(kl_step_target=target), old_BT=fresh, kl_step_coef=100.0)
    assert_close(of_logp, torch.where(SAMPLED_BT, -ADVANTAGE_BT / 5, 0.0))


def test_the_penalty_is_halved_below_its_target_and_doubled_above():
    assert adapt_penalty_coef(1.0, 0.0099, 0.015) == 0.5
    assert adapt_penalty_coef(1.0, 0.0101, 0.015) == 1.0
    assert adapt_penalty_coef(1.0, 0.0224, 0.015) == 1.0
    assert adapt_penalty_coef(1.0, 0.0226, 0.015) == 2.0


def test_explained_variance_by_hand():
    # Var(1 2 5) = 13/3, of the errors 0 0 2 it is 4/3
    assert explained_variance(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 5.0])) == pytest.approx(9 / 13)
    assert explained_variance(torch.tensor([4.0, 5.0, 8.0]), torch.tensor([1.0, 2.0, 5.0])) == pytest.approx(1.0)
    assert explained_variance(torch.tensor([5.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 5.0])) < 0
    assert math.isnan(explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0])))
    assert math.isnan(explained_variance(torch.tensor([1.0]), torch.tensor([3.0])))


@pytest.mark.parametrize("target", [None, 0.01], ids=["clip", "penalty"])
@pytest.mark.parametrize("kind", ["shared", "separate", "lora", "reward model"])
def test_the_gradient_of_the_whole_loss_does_not_depend_on_micro_batches(kind, target, tmp_path):
    rollout, policy = make_rollout("textenv/GuessNumber-v0")
    batch = rollout.collect(0, 4, 2, temperature=1.0, seed=(0,))
    critic = make_critic(kind, policy, tmp_path).double()
    policy.double()
    shape = batch.tokens_BT.shape
    generator = torch.Generator().manual_seed(0)
    advantage_BT, change_BT, old_value_BT, return_BT = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(4)
    )

    def gradients(tokens_per_microbatch):
        learner = Learner(policy, critic=critic, max_grad_norm=1e9, tokens_per_microbatch=tokens_per_microbatch)
        metrics = learner.step(
            batch,
            batch.rows,
            partial(
                ppo_loss,
                config=PPOConfig(kl_step_target=target),
                advantage_BT=advantage_BT,
                old_BT=batch.logp_BT + 0.3 * change_BT,
                old_value_BT=old_value_BT,
                return_BT=return_BT,
                denominators=count_denominators(batch.sampled_BT, 8),
            ),
        )  # at learning rate 0
        trained = [p for group in learner.optimizer.param_groups for p in group["params"] if p.grad is not None]
        return [p.grad.clone() for p in trained], metrics

    whole, metrics = gradients(10**9)
    assert metrics["grad_norm"] > 0
    assert metrics["critic_grad_norm"] > 0
    for tokens in (1, 250):
        split, split_metrics = gradients(tokens)
        for got, expected in zip(split, whole, strict=True):
            assert_close(got, expected, rtol=1e-6, atol=1e-8)
        for name, value in metrics.items():
            assert split_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


# What reaches the advantages.


@pytest.fixture
def ppo_config(tmp_path):
    """A PPO config for a few quick steps, its run kept under the test's folder."""

    def make(model, **changes):
        defaults = {
            "prompts_per_step": 8,
            "total_episodes": 32,
            "eval_episodes": 8,
            "learning_rate": 3e-3,
            "warmup_steps": 0,
            "learning_rate_decay": "constant",
            "critic_warmup_steps": 0,
            "updates_per_batch": 2,
            "epochs_per_batch": 2,
            "run_dir": str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"),
        }
        return PPOConfig(**{"model": model} | defaults | changes)

    return make


@pytest.fixture
def reward_model(tmp_path):
    """Saves a reward model for a task's tokenizer, as it is loaded beside a policy, and gives its folder."""

    def save(task_id, **changes):
        tokenizer = textenv.make_task(task_id).tokenizer()
        return make_reward_model(tmp_path / "reward-model", tokenizer, **changes)

    return save


@pytest.fixture
def make_agent(fresh_model, ppo_config, reward_model):
    """A PPO agent with a critic of a kind."""

    def make(task_id, critic="shared", agent_class=PPO, family="llama", **changes):
        if critic == "lora":
            changes = {"lora_rank": 4} | changes
        if critic == "reward model":
            critic = reward_model(task_id)
        return agent_class(task_id, ppo_config(fresh_model(task_id, family), critic=critic, **changes))

    return make


@pytest.fixture
def seen(monkeypatch):
    """What goes into and out of the advantage estimates, step by step."""
    steps = []
    real = ppo_module.gae

    def spied(reward_BT, value_BT, sampled_BT, **options):
        advantage_BT, return_BT = real(reward_BT, value_BT, sampled_BT, **options)
        steps.append({"reward": reward_BT, "value": value_BT, "learned": sampled_BT, **options})
        steps[-1] |= {"advantage": advantage_BT, "return": return_BT}
        return advantage_BT, return_BT

    monkeypatch.setattr(ppo_module, "gae", spied)
    return steps


@pytest.fixture
def batches(monkeypatch):
    """What was sampled, step by step, as it is trained on."""
    kept = []
    real = PPO.penalise
    monkeypatch.setattr(PPO, "penalise", lambda *arguments: kept.append(real(*arguments)) or kept[-1])
    return kept


@pytest.fixture
def chat():
    textenv.register("test/Chat-v0", Chat)
    yield "test/Chat-v0"
    del textenv.registry["test/Chat-v0"], gym.registry["test/Chat-v0"]


def test_a_critic_that_knows_nothing_leaves_the_rewards_to_come(make_agent, chat, seen, batches):
    make_agent(chat, total_episodes=8, gae_lambda=0.9).learn()
    batch = batches[0]
    assert not seen[0]["value"].any()
    assert (batch.source_BT == Source.REPLY).any()
    assert (batch.reward_BT != 0).sum(dim=1).min() > 1
    for n in range(len(batch)):
        paid = batch.reward_BT[n, batch.sampled_BT[n]].tolist()
        expected = [sum(0.9**k * r for k, r in enumerate(paid[t:])) for t in range(len(paid))]
        assert seen[0]["advantage"][n, batch.sampled_BT[n]].tolist() == pytest.approx(expected, abs=1e-6)


def test_replies_cost_nothing_and_their_values_are_never_read(make_agent, chat, seen, batches, monkeypatch):
    real = Learner.logprobs_and_values

    def with_junk(self, batch, rows):
        logp_BT, value_BT = real(self, batch, rows)
        return logp_BT, torch.where(batch.sampled_BT, value_BT, 1e9)

    agent = make_agent(chat, total_episodes=16)
    torch.nn.init.normal_(agent.learner.critic.head.weight)
    weights = {name: p.clone() for name, p in agent.policy.state_dict().items()}
    head = {name: p.clone() for name, p in agent.learner.critic.state_dict().items()}
    agent.learn()
    batch, step = batches[0], seen[0]
    for n in range(len(batch)):
        chosen = batch.sampled_BT[n]
        paid, valued = batch.reward_BT[n, chosen].tolist(), [*step["value"][n, chosen].tolist(), 0.0]
        advantage = 0.0
        for t in reversed(range(len(paid))):
            advantage = paid[t] + valued[t + 1] - valued[t] + 0.95 * advantage
            assert step["advantage"][n, chosen][t].item() == pytest.approx(advantage, abs=1e-5)

    monkeypatch.setattr(Learner, "logprobs_and_values", with_junk)
    again = make_agent(chat, total_episodes=16)
    again.policy.load_state_dict(weights)
    again.learner.critic.load_state_dict(head)
    again.learn()
    for name, parameter in agent.policy.state_dict().items():
        assert torch.equal(parameter, again.policy.state_dict()[name]), name


def test_the_kl_to_the_start_is_taken_off_each_tokens_reward_and_so_reaches_its_advantage(
    make_agent, seen, batches, monkeypatch
):
    def moved_reference(self):
        reference = self.frozen_reference()
        with torch.no_grad():
            reference.model.lm_head.weight.mul_(0.5)
        return reference

    monkeypatch.setattr(PPO, "reference", moved_reference)
    make_agent("textenv/ProbeLength-v0", total_episodes=8, kl_reward_coef=0.3, gae_lambda=0.5).learn()
    (batch,) = batches
    kl_BT = torch.where(batch.sampled_BT, batch.logp_BT - batch.reference_BT, 0.0)
    assert kl_BT.abs().max() > 0.1
    for n, score in enumerate(batch.scores):
        reward = -0.3 * kl_BT[n, batch.sampled_BT[n]]
        reward[-1] += score.value
        by_hand = [sum(0.5**k * r for k, r in enumerate(reward[t:].tolist())) for t in range(len(reward))]
        assert seen[0]["advantage"][n, batch.sampled_BT[n]].tolist() == pytest.approx(by_hand, abs=1e-5)


def test_advantages_are_whitened_over_the_tokens_that_are_learned_from(make_agent, seen, monkeypatch):
    given = []
    real = ppo_loss
    monkeypatch.setattr(
        ppo_module, "ppo_loss", lambda scored, **more: given.append(more["advantage_BT"]) or real(scored, **more)
    )
    make_agent("textenv/ProbeLength-v0", total_episodes=8).learn()
    expected = whiten(seen[0]["advantage"], seen[0]["learned"])
    assert all(torch.equal(advantage_BT, expected) for advantage_BT in given)
    assert expected[seen[0]["learned"]].mean().abs() < 1e-6
    assert expected[seen[0]["learned"]].std() == pytest.approx(1, abs=1e-4)


# Endings.


class Continuing(PPO):
    """Takes a spent budget for a cut from outside."""

    bootstrapped = frozenset({Finish.NONE, Finish.LENGTH})


@pytest.mark.parametrize("agent_class", [PPO, Continuing])
@pytest.mark.parametrize("finish", list(Finish))
def test_only_a_cut_from_outside_is_bootstrapped_unless_an_agent_says_otherwise(make_agent, agent_class, finish):
    agent = make_agent("textenv/ProbeLength-v0", agent_class=agent_class)
    torch.nn.init.normal_(agent.learner.critic.head.weight, generator=torch.Generator().manual_seed(0))
    batch = agent.sample(agent.rollout(), 0, (0,))
    batch.finish_B[:] = Finish.EOS
    batch.finish_B[2] = finish
    got_B = agent.values_after_the_end(batch)
    expected = torch.zeros(8)
    if finish in agent_class.bootstrapped:
        row_1T = torch.cat([batch.tokens_BT[2, : batch.length_B[2]], torch.tensor([3])]).unsqueeze(0)
        chosen_1T = torch.arange(row_1T.shape[1]).unsqueeze(0) == batch.length_B[2]
        with torch.no_grad():
            hidden = agent.policy.score(row_1T, chosen_1T, 1.0)[2]
            expected[2] = agent.learner.critic(row_1T, chosen_1T, hidden)[0, -1]
        assert expected[2].abs() > 0.01
    assert_close(got_B, expected, atol=1e-5, rtol=1e-5)


class Hasty(PPO):
    """Steps the token-level environment, which a wrapper cuts after three tokens."""

    def sample(self, rollout, index, seed, prompts=None):
        envs = gym.make_vec(
            self.env_id,
            num_envs=self.config.prompts_per_step,
            level="token",
            autoreset_mode="Disabled",
            tokenizer=self.policy.tokenizer,
            vocab_size=self.policy.vocab_size,
        )
        rng = np.random.default_rng((self.config.seed, *seed))
        draws = (rng.random(envs.num_envs) for _ in range(100))
        choose = sampling(self.policy, self.temperature, draws)
        return step_episodes(TimeLimit(envs, 3), choose, seed=self.config.seed, options={"index": index})


def test_an_episode_that_a_time_limit_cut_is_worth_what_the_critic_hopes_for(make_agent, seen, batches):
    agent = make_agent("textenv/ProbeLength-v0", agent_class=Hasty, total_episodes=16, gae_lambda=1.0)
    torch.nn.init.normal_(agent.learner.critic.head.weight, generator=torch.Generator().manual_seed(0))
    agent.learn()
    batch, step = batches[0], seen[0]
    cut_B = torch.from_numpy(batch.finish_B == Finish.NONE)
    assert 0 < cut_B.sum() < len(batch)
    assert (step["last_value_B"] != 0).tolist() == cut_B.tolist()
    for n in range(len(batch)):
        # With lambda 1 a target is all that came, and what is still to come.
        expected = batch.scores[n].value + step["last_value_B"][n].item()
        assert step["return"][n, batch.sampled_BT[n]].tolist() == pytest.approx(
            [expected] * int(batch.sampled_BT[n].sum()), abs=1e-5
        )
    assert batch.graded_B.all()


def test_an_ungraded_episode_leaves_baseline_and_gradient(make_agent, seen, monkeypatch):
    rows, given = [], []
    collect, step = Rollout.collect, Learner.step

    def collect_with_one_ungraded(*arguments, **options):
        batch = collect(*arguments, **options)
        batch.scores[1] = ungraded("time-out")
        return batch

    def watched(self, batch, trained, loss, **more):
        rows.extend(trained.tolist())
        given.append(loss.keywords)
        return step(self, batch, trained, loss, **more)

    monkeypatch.setattr(Rollout, "collect", collect_with_one_ungraded)
    monkeypatch.setattr(Learner, "step", watched)
    agent = make_agent("textenv/ProbeLength-v0", total_episodes=8, kl_reward_coef=0.1, epochs_per_batch=1).learn()
    assert metrics_of(agent)[0]["trained_share"] == 7 / 8
    assert sorted(rows) == [0, *range(2, 8)]
    assert not seen[0]["learned"][1].any()
    others = [0, *range(2, 8)]
    alone_BT = whiten(seen[0]["advantage"][others], seen[0]["learned"][others])
    assert torch.equal(given[0]["advantage_BT"][others], alone_BT)
    assert sum(keywords["denominators"].tokens for keywords in given) == seen[0]["learned"].sum()


# The warm-up of the critic.


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("kind", ["shared", "separate", "lora", "reward model"])
def test_while_the_critic_warms_up_its_error_falls_and_the_policy_does_not_move_by_a_bit(make_agent, kind):
    settings = {"total_episodes": 8 * 14, "critic_warmup_steps": 12, "weight_decay": 0.1, "value_clip": None}
    agent = make_agent("textenv/ProbeLength-v0", kind, **settings)
    critic = agent.learner.critic
    batch = agent.sample(agent.rollout(), 1000, (1000,), prompts=32)
    mine = {id(p) for p in critic.trained_parameters()}
    before = {name: p.detach().clone() for name, p in agent.policy.named_parameters() if id(p) not in mine}
    errors, moved = [], []

    def watch(training):
        _, value_BT = agent.learner.logprobs_and_values(batch, batch.rows)
        error_BT = (value_BT - batch.return_B.float().unsqueeze(1))[batch.sampled_BT]
        errors.append(error_BT.square().mean().item())
        now = dict(agent.policy.named_parameters())
        moved.append(any(not torch.equal(now[name], old) for name, old in before.items()))

    watch(None)
    agent.learn(callback=watch)
    assert moved == [False] * 13 + [True] * 2
    assert errors[12] < 0.7 * errors[0]
    lines = metrics_of(agent)
    assert [line["grad_norm"] > 0 for line in lines] == [False] * 12 + [True] * 2
    assert all(line["critic_grad_norm"] > 0 for line in lines)
    assert all(("clip_high_fraction" in line) == (line["step"] > 12) for line in lines)


def metrics_of(agent):
    with open(f"{agent.config.run_dir}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def test_critics_start_at_the_policy_or_at_the_reward_model(make_agent, tmp_path):
    separate = make_agent("textenv/ProbeLength-v0", "separate")
    for name, parameter in separate.policy.model.get_decoder().named_parameters():
        trunk = separate.learner.critic.trunk.get_parameter(name)
        assert torch.equal(trunk, parameter)
        assert trunk.data_ptr() != parameter.data_ptr()
    judged = make_agent("textenv/ProbeLength-v0", "reward model").learner.critic
    from transformers import AutoModelForSequenceClassification

    judge = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward-model")
    assert torch.equal(judged.head.weight, judge.score.weight)
    assert all(torch.equal(judged.trunk.get_parameter(name), p) for name, p in judge.base_model.named_parameters())


def test_both_adapters_are_trained_and_the_weights_under_them_are_not(make_agent):
    agent = make_agent("textenv/ProbeLength-v0", "lora")
    before = snapshot(agent.policy)
    agent.learn()
    for name, parameter in agent.policy.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name), name


def test_a_critic_has_its_own_learning_rate(make_agent):
    agent = make_agent("textenv/ProbeLength-v0", "separate", critic_learning_rate=0.03)
    agent.learner.set_learning_rate(1e-3)
    assert [group["lr"] for group in agent.learner.optimizer.param_groups] == pytest.approx([1e-3, 1e-2])


# PPO-penalty.


def test_the_penalty_follows_the_kl_of_each_batchs_updates_once_the_policy_moves(make_agent):
    target = 2e-2
    agent = make_agent(
        "textenv/ProbeDelayedCopy-v0", kl_step_target=target, critic_warmup_steps=3, total_episodes=8 * 12
    ).learn()
    lines = metrics_of(agent)
    assert all("kl_step" not in line for line in lines[:3])
    coef, ways = 1.0, set()
    for line in lines[3:]:
        assert line["kl_step_coef"] == coef
        assert line["kl_step"] > 0
        expected = adapt_penalty_coef(coef, line["kl_step"], target)
        ways.add(expected / coef)
        coef = expected
    assert agent.kl_step_coef == coef
    assert len(ways) > 1, "a coefficient that moves was wanted"


def test_a_heavier_penalty_keeps_the_updates_of_a_batch_nearer(make_agent):
    def kl_step(target):
        agent = make_agent("textenv/ProbeDelayedCopy-v0", kl_step_target=target, total_episodes=8 * 12)
        return np.mean([line["kl_step"] for line in metrics_of(agent.learn())[6:]])

    assert kl_step(1e-5) < kl_step(1.0)


# PPO-ptx.


@pytest.fixture
def texts_file(tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = ["abc", "..d..", "a", "bcbcbcbcbcbcbcbcbcbcbcbcbc", "dcba"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    return str(path)


def test_texts_are_ended_and_cut_and_all_but_their_first_token_is_learned(texts_file):
    tokenizer = textenv.make_task("textenv/ProbeOneHot-v0").tokenizer()
    texts = read_texts(texts_file, tokenizer, 16)
    assert [tokenizer.decode(text) for text in texts] == [
        "abc<eos>",
        "..d..<eos>",
        "a<eos>",
        "bcbcbcbcbcbcbcbc",
        "dcba<eos>",
    ]
    batch = text_batch(texts)
    assert batch.length_B.tolist() == [4, 6, 2, 16, 5]
    assert batch.sampled_BT.sum(dim=1).tolist() == [3, 5, 1, 15, 4]
    assert not batch.sampled_BT[:, 0].any()


@pytest.mark.parametrize("tokens_per_microbatch", [1, 20, 10**9])
def test_the_gradient_of_ppo_ptx_is_ppos_and_the_coefficient_times_the_texts(
    make_agent, texts_file, tokens_per_microbatch
):
    agent = make_agent("textenv/ProbeLength-v0")
    policy = agent.policy.double()
    batch = agent.sample(agent.rollout(), 0, (0,))
    texts = read_texts(texts_file, policy.tokenizer, 16)
    loss = partial(
        ppo_loss,
        config=PPOConfig(value_clip=None),
        advantage_BT=torch.ones_like(batch.logp_BT),
        old_BT=batch.logp_BT,
        old_value_BT=torch.zeros_like(batch.logp_BT),
        return_BT=torch.ones_like(batch.logp_BT),
        denominators=count_denominators(batch.sampled_BT, 6),
    )

    def gradient(beside):
        learner = Learner(
            policy, critic=agent.learner.critic, max_grad_norm=1e9, tokens_per_microbatch=tokens_per_microbatch
        )
        metrics = learner.step(batch, batch.rows, loss, beside=beside)  # at learning rate 0
        return torch.cat([p.grad.flatten() for p in policy.parameters()]), metrics

    beside = draw_texts(texts, (3, 4), 7, coef=5.0, device=policy.device)
    alone, _ = gradient(None)
    both, metrics = gradient(beside)

    # The mean over all tokens of the drawn texts, by the model's own log-probabilities.
    policy.zero_grad()
    drawn = [text[: text[1:].index(0) + 2] if 0 in text[1:] else text for text in beside[0].tokens_BT.tolist()]
    logp = [
        torch.log_softmax(policy.model(torch.tensor([text])).logits[0], dim=-1)[:-1].gather(
            1, torch.tensor(text[1:]).unsqueeze(1)
        )
        for text in drawn
    ]
    nll = -torch.cat(logp).mean()
    nll.backward()
    of_texts = torch.cat([p.grad.flatten() for p in policy.parameters()])
    assert {tuple(text) for text in drawn} <= {tuple(text) for text in texts}
    assert_close(both, alone + 5.0 * of_texts, rtol=1e-5, atol=1e-6)
    assert metrics["ptx_nll"] == pytest.approx(nll.item(), rel=1e-5)


def test_texts_are_drawn_anew_for_every_update_and_by_their_seed_alone(make_agent, texts_file, monkeypatch):
    drawn = []
    real = Learner.step

    def watched(self, batch, rows, loss, *, beside=None):
        drawn.append(None if beside is None else beside[0].tokens_BT)
        assert beside is None or len(beside[0]) == len(rows)
        return real(self, batch, rows, loss, beside=beside)

    monkeypatch.setattr(Learner, "step", watched)
    steps = {"critic_warmup_steps": 1, "total_episodes": 16, "updates_per_batch": 2, "epochs_per_batch": 2}
    for _ in range(2):
        make_agent("textenv/ProbeLength-v0", ptx_coef=1.0, ptx_file=texts_file, **steps).learn()
    first, second = drawn[:8], drawn[8:]
    assert [tokens is None for tokens in first] == [True] * 4 + [False] * 4  # not while only the critic learns
    assert all(torch.equal(one, other) for one, other in zip(first[4:], second[4:], strict=True))
    assert len({str(tokens.tolist()) for tokens in first[4:]}) == 4


def test_pretraining_text_becomes_likelier(make_agent, texts_file):
    def text_nll(coef):
        ptx = {"ptx_coef": coef, "ptx_file": texts_file} if coef else {}
        agent = make_agent("textenv/ProbeConstant-v0", total_episodes=8 * 20, **ptx)
        batch = text_batch(read_texts(texts_file, agent.policy.tokenizer, 16))
        start = -agent.learner.logprobs(batch, batch.rows)[batch.sampled_BT].mean().item()
        agent.learn()
        return start, -agent.learner.logprobs(batch, batch.rows)[batch.sampled_BT].mean().item()

    start, plain = text_nll(0.0)
    assert text_nll(1.0)[1] < 0.7 * min(start, plain)


# Learning.


@pytest.mark.parametrize(
    ("task_id", "family", "critic", "lr", "episodes"),
    [
        ("textenv/ProbeOneHot-v0", "llama", "reward model", 3e-3, 1500),
        ("textenv/ProbeOneHot-v0", "llama", "lora", 1e-2, 1500),
        ("textenv/ProbeLength-v0", "llama", "shared", 3e-3, 1000),
        ("textenv/ProbeDelayedCopy-v0", "llama", "shared", 3e-3, 4000),
        # Rotary positions alone cannot tell the prompt "a" from the prompt and its answer "aa".
        ("textenv/ProbeSubstring-v0", "gpt2", "separate", 5e-3, 3000),
    ],
)
@pytest.mark.slow
def test_it_learns_the_probes(make_agent, task_id, family, critic, lr, episodes):
    agent = make_agent(
        task_id,
        critic,
        family=family,
        total_episodes=episodes,
        prompts_per_step=64,
        learning_rate=lr,
        learning_rate_decay="linear",
        critic_warmup_steps=2,
        eval_episodes=64,
        checkpoint_every=10**6,
    )
    assert agent.learn().last_training.after.reward >= 0.95


def test_a_constant_reward_leaves_the_policy_once_the_critic_knows_it(make_agent):
    agent = make_agent("textenv/ProbeConstant-v0", "separate", total_episodes=8 * 4)
    agent.learn()
    assert metrics_of(agent)[0]["value_loss"] > 0
    # Before the critic knows, all tokens of all episodes share one advantage but for lambda's discount.
    agent = make_agent("textenv/ProbeConstant-v0", "separate", total_episodes=8 * 4, gae_lambda=1.0)
    with torch.no_grad():
        agent.learner.critic.head.bias.fill_(1.0)
    before = snapshot(agent.policy)
    agent.learn()
    assert all(torch.equal(p, before[name]) for name, p in agent.policy.named_parameters())
    assert {line["value_loss"] for line in metrics_of(agent)} == {0.0}


def test_a_saved_agent_predicts_the_same_and_can_go_on(make_agent, tmp_path):
    agent = make_agent("textenv/ProbeDelayedCopy-v0", "lora").learn()
    agent.save(tmp_path / "saved")
    again = PPO.load(tmp_path / "saved")
    observation, _ = gym.make_vec("textenv/ProbeDelayedCopy-v0", num_envs=4, level="sequence").reset(seed=0)
    np.testing.assert_array_equal(agent.predict(observation)[0], again.predict(observation)[0])
    assert again.config.critic == "lora"


def test_a_step_says_how_its_critic_does(make_agent):
    agent = make_agent("textenv/ProbeLength-v0", kl_reward_coef=0.1, kl_target=1.0).learn()
    for line in metrics_of(agent):
        assert {"value_loss", "explained_variance", "critic_grad_norm", "kl", "kl_factor", "entropy"} <= set(line)
    assert metrics_of(agent)[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert metrics_of(agent)[0]["explained_variance"] == 0.0  # the head starts at nothing


# Bad input.


@pytest.fixture
def only_sequences():
    """An environment of Gymnasium's own, one completion a step."""

    class Whole(gym.Env):
        action_space = gym.spaces.MultiDiscrete([5] * 4)
        observation_space = gym.spaces.MultiDiscrete([5] * 4)

    gym.register("test/Whole-v0", entry_point=Whole)
    yield
    del gym.registry["test/Whole-v0"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ("test/Whole-v0", "'test/Whole-v0' is a Gymnasium environment without a token-level view"),
        ("CartPole-v1", "'CartPole-v1' is a Gymnasium environment without a token-level view"),
        ("textenv/Arithmetik-v0", "no environment 'textenv/Arithmetik-v0'; did you mean textenv/Arithmetic-v0"),
        ("{env} --env-options level sequence", "has no option 'level'"),
        ("{env} --critic other", "speaks another vocabulary"),
        ("{env} --critic model", "begins as a sequence classifier with one label, but 'model' is a LlamaForCausalLM"),
        ("{env} --critic nowhere", "critic must be 'shared', 'separate', 'lora', a folder or a hub name (owner/name)"),
        ("{env} --critic ./nowhere", "there is none at './nowhere'"),
        ("{env} --critic lora", 'critic "lora" must be used with lora_rank above 0'),
        ("{env} --critic lora --lora-rank 2 --save-memory recompute", "save_memory 'recompute' computes layers again"),
        ("{env} --kl-target 6", "kl_reward_coef must be above 0 when there is a kl_target"),
        ("{env} --kl-reward-coef -1", "kl_reward_coef must be 0 or more"),
        ("{env} --kl-step-target 0.01 --clip-ratio-max 3", "clip_ratio_max must be left out with kl_step_target"),
        ("{env} --gae-lambda 1.1", "gae_lambda must be from 0 to 1, got 1.1"),
        ("{env} --value-clip 0", "value_clip must be more than 0"),
        ("{env} --critic-warmup-steps -1", "critic_warmup_steps must be 0 or more"),
        ("{env} --ptx-coef 1", "ptx_coef and ptx_file must be given together"),
        ("{env} --ptx-file good.jsonl", "ptx_coef and ptx_file must be given together"),
        ("{env} --ptx-coef 1 --ptx-file no.jsonl", "no data file no.jsonl"),
        ("{env} --ptx-coef 1 --ptx-file empty.jsonl", "empty.jsonl has no rows"),
        ("{env} --ptx-coef 1 --ptx-file broken.jsonl", "broken.jsonl, row 2: not JSON"),
        ("{env} --ptx-coef 1 --ptx-file nameless.jsonl", 'nameless.jsonl, row 1: wanted an object with a "text"'),
        ("{tiny} --ptx-coef 1 --ptx-file foreign.jsonl", "foreign.jsonl, row 3: the character 'X'"),
    ],
)
def test_bad_input_gets_one_clear_line_before_anything_loads(
    only_sequences, fresh_model, tmp_path, monkeypatch, capsys, arguments, wanted
):
    (tmp_path / fresh_model("textenv/ProbeOneHot-v0")).rename(tmp_path / "model")
    make_reward_model(tmp_path / "other", textenv.make_task("textenv/Arithmetic-v0").tokenizer())
    for name, text in {
        "good": '{"text": "abc"}\n',
        "empty": "",
        "broken": '{"text": "abc"}\n{"text": "ab\n',
        "nameless": '{"words": "abc"}\n',
        "foreign": '{"text": "a"}\n\n{"text": "aXb"}\n',
    }.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(core_agent, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(warmup, "embedded_policy", lambda *_, **__: pytest.fail("a model was made"))
    tiny = "textenv/ProbeOneHot-v0"
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["train", "ppo", *arguments.format(tiny=tiny, env=f"{tiny} --model model").split()])
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert wanted in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert not shown.out


@pytest.mark.parametrize("changes", [{"kl_reward_coef": 0.1}, {"critic": "separate"}])
def test_a_run_whose_start_is_gone_has_no_reference_and_is_not_resumed(make_agent, monkeypatch, tmp_path, changes):
    agent = make_agent("textenv/ProbeOneHot-v0", total_episodes=8, **changes).learn()
    (tmp_path / agent.config.model).rename(tmp_path / "elsewhere")
    monkeypatch.setattr(core_agent, "load_model", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(
        ValueError, match=r"needs the model that it started from, for its KL or its critic: .*not exist"
    ):
        PPO("textenv/ProbeOneHot-v0", agent.config, resume=True)

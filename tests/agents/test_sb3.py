"""Stable-Baselines3's own algorithms on a language model: what they learn, and that they see the policy's distribution."""

import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch.testing import assert_close

import textenv  # noqa: F401 - registers the environments
from agents.core.models import load_model
from agents.core.policy import Policy
from agents.sb3 import CausalLMPolicy
from tests.agents.conftest import ALPHABET, Undecodable, make_model
from textenv import make_task
from textenv.tokenizer import CharTokenizer

TASK = "textenv/ProbeOneHot-v0"
LETTERS = "textenv/ProbeDelayedCopy-v0"  # contexts of several lengths
SETTINGS = {"gamma": 1.0, "seed": 0, "learning_rate": 1e-3, "device": "cpu"}
ROLLOUT = {"n_steps": 32, "batch_size": 64, "n_epochs": 4}
PAIRS = [("12+3=", "1"), ("7+7=1", "\0"), ("0+1+2+3=", "6"), ("4", "=")]  # a context and the token taken in it


def fresh_policy(task_id=TASK):
    tokenizer = make_task(task_id).tokenizer()
    return Policy(make_model("llama", vocab_size=tokenizer.vocab_size), tokenizer)


def token_envs(task_id=TASK, num=8, **options):
    return make_vec_env(lambda: gym.make(task_id, level="token", **options), n_envs=num, seed=0)


def reward_of(agent, **options):
    return evaluate_policy(agent, token_envs(), 64, deterministic=False, **options)[0]


def policy_around(lm, width=12, policy_class=CausalLMPolicy):
    """The policy class alone, for contexts of up to ``width`` tokens."""
    observations = spaces.Dict(
        tokens=spaces.Box(0, lm.vocab_size - 1, (width,), np.int64), length=spaces.Box(0, width, (1,), np.int64)
    )
    return policy_class(observations, spaces.Discrete(lm.vocab_size), lambda _: 1e-3, model=lm)


def contexts(tokenizer, width=12, padding=0):
    """The contexts of ``PAIRS`` as observations, and the tokens taken."""
    tokens_BT = torch.full((len(PAIRS), width), padding)
    length_B1 = torch.tensor([[len(context)] for context, _ in PAIRS])
    for row, (context, _) in enumerate(PAIRS):
        tokens_BT[row, : len(context)] = torch.tensor(tokenizer.encode(context))
    action_B = torch.tensor([0 if taken == "\0" else tokenizer.encode(taken)[0] for _, taken in PAIRS])
    return {"tokens": tokens_BT, "length": length_B1}, action_B


def collected(agent):
    """The agent after one rollout, on which it did not train."""
    agent.train = lambda: None
    return agent.learn(agent.n_steps * agent.n_envs)


# Learning ---------------------------------------------------------------------------------------------------------


def test_ppo_learns_in_ten_lines():
    env = gym.make(TASK, level="token")
    agent = PPO(CausalLMPolicy, env, n_steps=256, policy_kwargs={"model": fresh_policy()}, **SETTINGS)
    before = reward_of(agent)
    agent.learn(total_timesteps=1024)
    assert before < 0.5
    assert reward_of(agent) > 0.9


def test_a2c_learns_on_vectorised_environments():
    agent = A2C(CausalLMPolicy, token_envs(), n_steps=8, policy_kwargs={"model": fresh_policy()}, **SETTINGS)
    before = reward_of(agent)
    agent.learn(1024)
    assert before < 0.5
    assert reward_of(agent) > 0.9
    assert isinstance(agent.policy.optimizer, torch.optim.RMSprop)  # A2C's own choice


def test_the_policy_that_was_given_is_trained_in_place_and_stays_in_eval_mode():
    lm = fresh_policy()
    before = {name: weight.clone() for name, weight in lm.named_parameters()}
    agent = PPO(CausalLMPolicy, token_envs(), policy_kwargs={"model": lm}, **SETTINGS, **ROLLOUT).learn(256)
    assert agent.policy.lm is lm
    assert not any(torch.equal(weight, before[name]) for name, weight in lm.named_parameters())
    assert not any(module.training for module in lm.modules())


# The distribution -------------------------------------------------------------------------------------------------


def test_its_logprobs_and_entropies_are_those_of_the_policy(policy, tokenizer):
    observation, action_B = contexts(tokenizer)
    last_B = observation["length"].squeeze(1)
    tokens_BT = observation["tokens"].clone().scatter(1, last_B.unsqueeze(1), action_B.unsqueeze(1))
    sampled_BT = torch.arange(12) == last_B.unsqueeze(1)
    expected_BT, expected_entropy_BT = policy.logprobs(tokens_BT, sampled_BT, 1.0)
    _, logp_B, entropy_B = policy_around(policy).evaluate_actions(observation, action_B)
    assert_close(logp_B, expected_BT[sampled_BT], atol=1e-5, rtol=0)
    assert_close(entropy_B, expected_entropy_BT[sampled_BT], atol=1e-5, rtol=0)


def test_padding_changes_nothing(policy, tokenizer):
    narrow, wide = policy_around(policy), policy_around(policy, width=20)
    observation, action_B = contexts(tokenizer)
    other, _ = contexts(tokenizer, width=20, padding=7)
    for net in (narrow, wide):
        torch.nn.init.ones_(net.value_net.weight)
    for got, expected in zip(
        wide.evaluate_actions(other, action_B), narrow.evaluate_actions(observation, action_B), strict=True
    ):
        assert_close(got, expected, atol=1e-5, rtol=0)
    for row in range(len(PAIRS)):  # and no row sees its neighbours
        alone = {name: rows[row : row + 1] for name, rows in other.items()}
        got = wide.get_distribution(alone).distribution.logits
        assert_close(got, narrow.get_distribution(observation).distribution.logits[[row]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", [PPO, A2C])
def test_on_a_fresh_rollout_the_ratio_is_one_and_the_ids_are_exact(algorithm):
    options = {"n_steps": 32, "policy_kwargs": {"model": fresh_policy(LETTERS)}}
    agent = collected(algorithm(CausalLMPolicy, token_envs(LETTERS), **options, **SETTINGS))
    torch.nn.init.normal_(agent.policy.value_net.weight)
    agent = collected(agent)
    read = []
    agent.policy.lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    for data in agent.rollout_buffer.get(64):
        action_B = data.actions.long().flatten()
        value_B1, logp_B, _ = agent.policy.evaluate_actions(data.observations, action_B)
        assert_close(torch.exp(logp_B - data.old_log_prob), torch.ones(64), atol=1e-5, rtol=0)
        assert_close(value_B1.flatten(), data.old_values, atol=1e-5, rtol=0)
        longest = int(data.observations["length"].max())
        assert read[-1].dtype == torch.int64
        assert torch.equal(read[-1].float(), data.observations["tokens"][:, :longest].float())


def test_a_token_that_cannot_be_decoded_is_never_taken():
    tokenizer = Undecodable()
    lm = Policy(make_model("llama", vocab_size=tokenizer.vocab_size + 3), tokenizer)  # and logits beyond all ids
    policy = policy_around(lm)
    observation, action_B = contexts(tokenizer)
    impossible_V = ~lm.allowed_V
    assert impossible_V.sum() == 5
    distribution = policy.get_distribution(observation).distribution
    assert (distribution.probs[:, impossible_V] == 0).all()
    many = {name: rows.repeat(500, 1) for name, rows in observation.items()}
    predicted_B, _ = policy.predict({name: rows.numpy() for name, rows in many.items()})
    for taken_B in (policy(many)[0], policy(many, deterministic=True)[0], torch.from_numpy(predicted_B)):
        assert lm.allowed_V[taken_B].all()
    _, logp_B, entropy_B = policy.evaluate_actions(observation, action_B)
    allowed_BV = distribution.probs[:, lm.allowed_V]
    assert_close(entropy_B, -(allowed_BV * allowed_BV.log()).sum(1))
    (logp_B.sum() + 100 * entropy_B.sum()).backward()
    assert all(weight.grad.isfinite().all() for weight in lm.parameters())


def test_a_rollout_takes_no_token_that_the_environment_refuses():
    tokenizer = CharTokenizer(ALPHABET)
    tokenizer.decodable_V = np.isin(np.arange(tokenizer.vocab_size), [tokenizer.encode("9")[0]], invert=True)
    lm = Policy(make_model("llama", vocab_size=16), tokenizer)
    envs = token_envs("textenv/Arithmetic-v0", tokenizer=tokenizer, vocab_size=16, max_tokens=16)
    agent = PPO(CausalLMPolicy, envs, policy_kwargs={"model": lm}, ent_coef=0.01, **SETTINGS, **ROLLOUT).learn(512)
    assert np.isfinite(agent.logger.name_to_value["train/entropy_loss"])


# The critic -------------------------------------------------------------------------------------------------------


def test_the_critic_reads_the_state_that_the_logits_come_from(llama, tokenizer):
    policy = policy_around(llama)
    observation, _ = contexts(tokenizer)
    with torch.no_grad():  # the head's row for id 4, so the value must be the logit of id 4
        policy.value_net.weight.copy_(llama.model.lm_head.weight[4:5])
    for row, (context, _) in enumerate(PAIRS):
        logits_TV = llama.model(torch.tensor([tokenizer.encode(context)])).logits[0]
        assert_close(policy.predict_values(observation)[row, 0], logits_TV[-1, 4], atol=1e-5, rtol=1e-5)


def test_the_critic_starts_at_zero_and_its_loss_leaves_the_language_model_alone_then(llama, tokenizer):
    policy = policy_around(llama)
    observation, action_B = contexts(tokenizer)
    value_B1, _, _ = policy.evaluate_actions(observation, action_B)
    assert not value_B1.any()
    ((value_B1 - 1) ** 2).mean().backward()
    assert policy.value_net.weight.grad.any()
    assert not any(weight.grad is not None and weight.grad.any() for weight in llama.parameters())


# Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (lambda: gym.make(TASK, level="sequence"), r"at token level.*make it with gym.make\(id, level='token'\)"),
        (lambda: gym.make("CartPole-v1"), "observations of tokens and length"),
        (lambda: gym.make(TASK, level="token", vocab_size=9), "has 9 actions, but the model 6 logits.*vocab_size=6"),
        (lambda: gym.make(TASK, level="token", max_tokens=65), "context of 64 tokens is smaller.*max_tokens=65"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused_in_one_line(env, message):
    with pytest.raises(ValueError, match=message) as refused:
        PPO(CausalLMPolicy, env(), policy_kwargs={"model": fresh_policy()}, **SETTINGS)
    assert "\n" not in str(refused.value)


def test_a_model_that_is_no_policy_is_refused_in_one_line():
    env = gym.make(TASK, level="token")
    with pytest.raises(TypeError, match=r"got LlamaForCausalLM; wrap a model"):
        PPO(CausalLMPolicy, env, policy_kwargs={"model": fresh_policy().model}, **SETTINGS)
    with pytest.raises(ValueError, match="neither a model folder"):
        PPO(CausalLMPolicy, env, policy_kwargs={"model": "/no/such/folder"}, **SETTINGS)


def test_a_vocabulary_that_float32_cannot_count_is_refused(llama):
    llama.vocab_size = 2**24 + 1
    with pytest.raises(ValueError, match="a vocabulary of 16777217 is too large"):
        policy_around(llama)


# Keeping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["policy", "folder"])
def test_what_is_saved_acts_the_same_and_trains_on(given, fresh_model, tmp_path):
    model = fresh_policy() if given == "policy" else fresh_model(TASK)
    agent = PPO(CausalLMPolicy, token_envs(), policy_kwargs={"model": model}, **SETTINGS, **ROLLOUT).learn(512)
    agent.save(tmp_path / "agent")
    loaded = PPO.load(tmp_path / "agent", env=token_envs(), device="cpu")
    observation = token_envs(num=64).reset()
    for deterministic in (True, False):
        torch.manual_seed(5)
        expected, _ = agent.predict(observation, deterministic=deterministic)
        torch.manual_seed(5)
        assert (loaded.predict(observation, deterministic=deterministic)[0] == expected).all()
    tensors, _ = agent.policy.obs_to_tensor(observation)
    assert torch.equal(loaded.policy.predict_values(tensors), agent.policy.predict_values(tensors))
    assert loaded.policy.lm is not agent.policy.lm
    for each in (agent, loaded):  # the optimiser came along too
        each.set_random_seed(1)
        each.set_env(token_envs())
        each.learn(256)
    for name, weight in agent.policy.lm.named_parameters():
        assert_close(loaded.policy.lm.get_parameter(name), weight)


def test_the_policy_alone_can_be_saved_and_so_can_its_language_model(tmp_path):
    agent = PPO(CausalLMPolicy, token_envs(), policy_kwargs={"model": fresh_policy()}, **SETTINGS, **ROLLOUT).learn(256)
    observation = token_envs(num=64).reset()
    expected, _ = agent.policy.predict(observation, deterministic=True)
    agent.policy.save(tmp_path / "policy")
    loaded = CausalLMPolicy.load(tmp_path / "policy", device="cpu")
    assert (loaded.predict(observation, deterministic=True)[0] == expected).all()
    agent.policy.lm.save(tmp_path / "folder")
    again = PPO(CausalLMPolicy, token_envs(), policy_kwargs={"model": tmp_path / "folder"}, **SETTINGS, **ROLLOUT)
    assert (again.predict(observation, deterministic=True)[0] == expected).all()
    for name, weight in load_model(tmp_path / "folder").named_parameters():
        assert torch.equal(weight, agent.policy.lm.get_parameter(name))


# Masks ------------------------------------------------------------------------------------------------------------


class Only(gym.Wrapper):
    """Leaves to choose from, at each place in the completion, only some of the ids; remembers what was taken."""

    def __init__(self, env, *choices):
        super().__init__(env)
        self.choices, self.place, self.taken = choices, 0, []

    def reset(self, **options):
        self.place = 0
        return super().reset(**options)

    def step(self, action):
        self.taken.append((self.place, int(action)))
        self.place += 1
        return super().step(action)

    def action_masks(self):
        return self.env.get_wrapper_attr("action_masks")() & np.isin(np.arange(6), self.choices[self.place])


@pytest.fixture
def maskable():
    return pytest.importorskip("sb3_contrib").MaskablePPO


def test_maskable_ppo_learns_and_never_takes_a_masked_token(maskable):
    from agents.sb3 import MaskableCausalLMPolicy

    choices = ([1, 2, 3], [0, 4])  # a, b or c; the end, or d
    envs = make_vec_env(lambda: Only(gym.make(TASK, level="token"), *choices), n_envs=8, seed=0)
    agent = maskable(
        MaskableCausalLMPolicy, envs, policy_kwargs={"model": fresh_policy()}, ent_coef=0.01, **SETTINGS, **ROLLOUT
    ).learn(1024)
    taken = [taken for env in envs.envs for taken in env.get_wrapper_attr("taken")]
    assert len(taken) == 1024
    assert {token for place, token in taken if place == 0} == {1, 2, 3}
    assert {token for place, token in taken if place == 1} == {0, 4}
    observation, masks_BV = envs.reset(), np.stack(envs.env_method("action_masks"))
    assert (agent.predict(observation, deterministic=True, action_masks=masks_BV)[0] == 2).all()  # "b", which pays
    masks_BV[:, 2] = False
    assert np.isin(agent.predict(observation, action_masks=masks_BV)[0], [1, 3]).all()


def test_the_masks_of_a_token_environment_are_enough_for_maskable_ppo(maskable):
    from agents.sb3 import MaskableCausalLMPolicy

    agent = maskable(
        MaskableCausalLMPolicy, token_envs(), policy_kwargs={"model": fresh_policy()}, **SETTINGS, **ROLLOUT
    )
    agent.learn(1024)
    assert evaluate_policy(agent, token_envs(), 64, deterministic=False)[0] > 0.9


def test_a_mask_renormalises_and_cannot_allow_what_cannot_be_decoded(maskable):
    from agents.sb3 import MaskableCausalLMPolicy

    tokenizer = Undecodable()
    policy = policy_around(
        Policy(make_model("llama", vocab_size=tokenizer.vocab_size), tokenizer), policy_class=MaskableCausalLMPolicy
    )
    observation, _ = contexts(tokenizer)
    mask_BV = np.tile(np.isin(np.arange(tokenizer.vocab_size), (3, 4, 7)), (len(PAIRS), 1))  # 3 has no text
    unmasked_BV = policy.get_distribution(observation).distribution.probs
    probs_BV = policy.get_distribution(observation, mask_BV).distribution.probs
    pair_B2 = unmasked_BV[:, [4, 7]]
    assert_close(probs_BV[:, [4, 7]], pair_B2 / pair_B2.sum(1, keepdim=True))
    assert set(probs_BV.sum(0).nonzero().flatten().tolist()) == {4, 7}
    _, logp_B, entropy_B = policy.evaluate_actions(observation, torch.full((len(PAIRS),), 7), mask_BV)
    assert_close(logp_B, probs_BV[:, 7].log())
    assert_close(entropy_B, torch.special.entr(probs_BV).sum(1))
    (logp_B.sum() + entropy_B.sum()).backward()
    assert all(weight.grad.isfinite().all() for weight in policy.lm.parameters())


def test_without_sb3_contrib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sb3_contrib.common.maskable.policies", None)
    monkeypatch.delitem(sys.modules, "agents.sb3.maskable", raising=False)
    with pytest.raises(ImportError, match=r'needs sb3-contrib: pip install "textenv\[sb3\]"'):
        from agents.sb3 import MaskableCausalLMPolicy  # noqa: F401

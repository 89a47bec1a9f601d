"""The silent faults of other trainers: none of the four agents has one, and a trainer that has one is found out."""

import copy
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import torch

from agents.core import policy, policy_gradient, rollout
from agents.core.engines import native
from agents.core.engines.native import NativeEngine
from agents.core.kl import kl_estimate
from agents.core.learner import Learner
from agents.core.losses import aggregate, count_denominators
from agents.core.policy import Policy
from agents.core.trajectories import Trajectories
from agents.dapo import dapo
from agents.grpo import grpo
from agents.ppo import ppo
from benchmarks.conform.cases import BOS, EOS, Lacks, Remembering
from benchmarks.conform.checks import CHECKS, ELSEWHERE, Fault
from benchmarks.conform.ours import Ours
from textenv.episodes import Episodes, Source
from textenv.tokenizer import TransformersTokenizer

BY_NUMBER = {check.number: check for check in CHECKS}
CRITIC = {24, 29, 30}
GROUPS = {16, 17}
LACKS = {"grpo": CRITIC, "dapo": CRITIC, "raft": CRITIC | GROUPS, "raft++": CRITIC | GROUPS, "ppo": GROUPS}
AGENTS = ["grpo", "ppo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dapo", "raft", "raft++"))]


def ours(name, **settings):
    (entry,) = entry_points(group="textenv.agents", name=name.removesuffix("++"))
    if name == "raft++":
        settings["variant"] = name
    return Ours(entry.load(), name, **settings)


@pytest.fixture(scope="module")
def trainers():
    """The agents, each with the runs that it did for the tests before."""
    return {name: Remembering(ours(name)) for name in LACKS}


@pytest.mark.parametrize("name", AGENTS)
@pytest.mark.parametrize("check", [pytest.param(c, id=f"{c.number:02d}-{c.name}") for c in CHECKS])
def test_trap(trainers, check, name):
    if check.number in LACKS[name]:
        with pytest.raises(Lacks):
            check.run(trainers[name])
    else:
        check.run(trainers[name])


def test_every_trap_is_checked_here_or_said_to_be_elsewhere():
    assert set(BY_NUMBER) | set(ELSEWHERE) == set(range(1, 35))
    assert len(CHECKS) == len(BY_NUMBER) == 31


# Broken trainers ----------------------------------------------------------------------------------------------------


def before(owner, name, change):
    """A replacement of ``owner.name`` that hands the original and its arguments to ``change``."""
    original = getattr(owner, name)

    def changed(*arguments, **options):
        return change(original, *arguments, **options)

    return owner, name, changed


def double_bos(encode, self, *arguments):
    return [BOS, *encode(self, *arguments)]


def mask_by_ids(pack, tokens_BT, sampled_BT):
    packed = pack(tokens_BT, sampled_BT)
    kept_U11 = (packed.tokens_U != EOS)[:, None, None]

    def attend(layer, query_NHD, key_NKD, value_NKD, scale):
        return packed.attend(layer, query_NHD, key_NKD, value_NKD * kept_U11, scale)

    return replace(packed, attend=attend)


def no_temperature(readout, self, states, tokens_N, temperature):
    return readout(self, states, tokens_N, 1.0)


def report_without_temperature(choose, logits_BV, uniform_B, sampling, allowed_V):
    token_B, _ = choose(logits_BV, uniform_B, sampling, allowed_V)
    return token_B, logits_BV.log_softmax(dim=1).gather(1, token_B.unsqueeze(1)).squeeze(1)


def recommended_top_k(write, self, *arguments):
    self.sampling = replace(self.sampling, top_k=self.policy.model.generation_config.top_k or 0)
    return write(self, *arguments)


def depends_on_batch(readout, self, states, tokens_N, temperature):
    logp_N, entropy_N = readout(self, states, tokens_N, temperature)
    return logp_N * (1 + 1e-3 * len(tokens_N)), entropy_N


def shifted(readout, self, *arguments):
    logp_N, entropy_N = readout(self, *arguments)
    return logp_N.roll(1), entropy_N


def product_of_ratios(update, self, batch, loss, step, **options):
    log_ratio_BT = self.learner.logprobs(batch, batch.rows) - batch.logp_BT
    weight_B = torch.where(batch.sampled_BT, log_ratio_BT, 0.0).sum(dim=1).exp()
    loss.keywords["advantage"] *= weight_B
    return update(self, batch, loss, step, **options)


def own_denominators(x_RT, sampled_RT, mode, denominators):
    return aggregate(x_RT, sampled_RT, mode, count_denominators(sampled_RT, denominators.max_new_tokens))


def always_token_mean(x_RT, sampled_RT, mode, denominators):
    return aggregate(x_RT, sampled_RT, "token_mean", denominators)


def tiny_deviations(advantages, reward_B, group_B, *arguments, **options):
    return 100 * advantages(reward_B, group_B, *arguments, **options)


def raw_singletons(advantages, reward_B, group_B, *arguments, **options):
    alone_B = torch.tensor([(~reward_B[group_B == group].isnan()).sum() == 1 for group in group_B])
    return torch.where(alone_B & ~reward_B.isnan(), reward_B, advantages(reward_B, group_B, *arguments, **options))


def never_zero(advantages, *arguments, **options):
    return advantages(*arguments, **options) + 1e-4


def none_is_zero(self, number):
    return torch.tensor([0.0 if score.value is None else number(score) for score in self.scores], dtype=torch.float64)


def k1_in_the_loss(logp_RT, ref_RT, _):
    return kl_estimate(logp_RT, ref_RT, "k1")


def wrong_way(surrogate, *arguments):
    return -surrogate(*arguments)


def other_mode(logprobs, self, *arguments, **options):
    return logprobs(self, *arguments, **options) + 0.01


def gaps_count(gae, reward_BT, value_BT, sampled_BT, **options):
    advantage_BT, return_BT = gae(reward_BT, value_BT, torch.ones_like(sampled_BT), **options)
    return advantage_BT * sampled_BT, return_BT * sampled_BT


def encoded_again(extend, self, completions, rows=None):
    texts = [self.tokenizer.decode(tokens.tolist()) for tokens in completions]
    return extend(self, [torch.tensor(self.tokenizer.encode(text)).numpy() for text in texts], rows)


def paid_one_early(from_episodes, *arguments):
    batch = from_episodes(*arguments)
    return replace(batch, reward_BT=batch.reward_BT.roll(-1, dims=1))


def whitened_with_padding(whiten, advantage_BT, sampled_BT):
    return whiten(advantage_BT, torch.ones_like(sampled_BT))


def rounded_up(summary, batch):
    return summary(batch) | {"reward": 1.0}


class StaleEngine(NativeEngine):
    """Goes on with the weights that it began with, whatever it is told to take."""

    def __init__(self, policy):
        super().__init__(policy)
        self._began_with = copy.deepcopy(policy)

    def _weights(self):
        return dict(self._began_with.model.state_dict())


def without_end(self):
    return (self.source_BT == Source.SAMPLED) & (self.tokens_BT != EOS)


def with_replies(self):
    return self.source_BT >= Source.SAMPLED


def all_allowed(choose, logits_BV, uniform_B, sampling, _):
    return choose(logits_BV, uniform_B, sampling, None)


MUTANTS = {
    1: ("grpo", before(TransformersTokenizer, "encode_prompt", double_bos)),
    2: ("grpo", (Trajectories, "sampled_BT", property(without_end))),
    3: ("grpo", before(policy, "pack", mask_by_ids)),
    4: ("grpo", before(Policy, "readout", no_temperature)),
    5: ("grpo", before(native, "choose", report_without_temperature)),
    7: ("grpo", before(native._Batch, "write", recommended_top_k)),
    8: ("grpo", before(Policy, "readout", depends_on_batch)),
    9: ("grpo", before(grpo.GRPO, "update", product_of_ratios)),
    12: ("grpo", (native, "NativeEngine", StaleEngine)),
    13: ("grpo", (policy_gradient, "aggregate", own_denominators)),
    14: ("grpo", (policy_gradient, "aggregate", always_token_mean)),
    15: ("grpo", before(policy_gradient, "group_advantages", tiny_deviations)),
    16: ("grpo", before(policy_gradient, "group_advantages", raw_singletons)),
    17: ("grpo", before(policy_gradient, "group_advantages", never_zero)),
    18: ("dapo", (Trajectories, "_per_score", none_is_zero)),
    19: ("grpo", (policy_gradient, "kl_estimate", k1_in_the_loss)),
    20: ("grpo", before(policy_gradient, "clipped_surrogate", wrong_way)),
    21: ("dapo", before(Learner, "logprobs", other_mode)),
    22: ("grpo", before(Policy, "readout", shifted)),
    23: ("grpo", (Trajectories, "sampled_BT", property(with_replies))),
    24: ("ppo", before(ppo, "gae", gaps_count)),
    25: ("grpo", before(Episodes, "extend", encoded_again)),
    26: ("grpo", (Trajectories, "cut_B", property(lambda self: torch.zeros(len(self), dtype=torch.bool)))),
    27: ("ppo", before(rollout, "from_episodes", paid_one_early)),
    29: ("ppo", before(ppo, "whiten", whitened_with_padding)),
    32: ("dapo", before(dapo, "summary", rounded_up)),
    33: ("grpo", (Learner, "load", lambda self, folder: None)),
    34: ("grpo", before(native, "choose", all_allowed)),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [pytest.param(n, id=f"{n:02d}-{BY_NUMBER[n].name}") for n in MUTANTS])
def test_a_broken_agent_is_found_out(number, monkeypatch):
    name, patch = MUTANTS[number]
    broken = ours(name, max_logp_gap=1e9)  # without the agents' own guard
    monkeypatch.setattr(*patch)
    # What an engine gives is looked at before any check can see it.
    with pytest.raises(RuntimeError, match="stands for no text") if number == 34 else pytest.raises(Fault):
        BY_NUMBER[number].run(broken)


class UncutScores(Ours):
    """Takes a cut of the distribution and scores as if there were none."""

    def train(self, case):
        return super().train(replace(case, top_k=0))


@pytest.mark.parametrize(
    ("number", "trainer"),
    [
        (6, UncutScores(grpo.GRPO)),
        (10, ours("grpo", learning_rate=1e-3)),
        (30, ours("ppo", critic_warmup_steps=0)),
    ],
)
def test_a_trainer_with_other_settings_is_found_out(number, trainer):
    with pytest.raises(Fault):
        BY_NUMBER[number].run(trainer)

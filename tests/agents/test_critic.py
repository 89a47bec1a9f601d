"""Critics of every kind: what a value is of, whose gradient it has, and where its weights come from."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from agents.core.critic import AdapterCritic, Critic, SeparateCritic, check_reward_model_fits, critic_from_reward_model
from agents.core.learner import Learner
from agents.core.lora import add_lora
from agents.core.policy import Policy
from tests.agents.conftest import ALPHABET, SIZES, make_model
from tests.agents.test_rollout import make_rollout
from textenv.tokenizer import CharTokenizer

TOKENS_BT = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 0, 0]])
# Prompts of two and three tokens; row 1 has a reply in the middle, row 2 two columns of padding.
SAMPLED_BT = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 0, 0]], dtype=torch.bool)
KINDS = ["shared", "separate", "lora", "reward model"]


def make_reward_model(folder, tokenizer, family="llama", seed=1, **changes):
    """Save a scalar sequence classifier of a width of its own, with a head that says something."""
    shape = {"num_attention_heads": 4, "num_hidden_layers": 1}
    config = {
        "llama": partial(LlamaConfig, hidden_size=24, intermediate_size=32, num_key_value_heads=2, **shape),
        "qwen2": partial(Qwen2Config, hidden_size=24, intermediate_size=32, num_key_value_heads=2, **shape),
        "gpt2": partial(GPT2Config, n_embd=24, n_layer=1, n_head=4, n_positions=64),
        "bert": partial(BertConfig, hidden_size=24, intermediate_size=32, **shape),
    }[family](**SIZES | {"vocab_size": tokenizer.vocab_size, "num_labels": 1} | changes)
    torch.manual_seed(seed)
    model_class = BertForSequenceClassification if family == "bert" else AutoModelForSequenceClassification
    model = model_class(config) if family == "bert" else model_class.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.to_transformers().save_pretrained(folder)
    return str(folder)


def make_critic(kind, policy, tmp_path, head_seed=0):
    """A critic with a head that tells states apart."""
    family = policy.model.config.model_type
    if kind == "reward model":
        folder = make_reward_model(tmp_path / "rm", policy.tokenizer, family, max_position_embeddings=512)
        return critic_from_reward_model(folder, policy.device)
    if kind == "shared":
        critic = Critic(policy.hidden_size, policy.device)
    elif kind == "separate":
        sizes = {"vocab_size": policy.vocab_size, "max_position_embeddings": policy.max_context}
        critic = SeparateCritic(make_model(family, **sizes).get_decoder().eval(), policy.hidden_size)
    else:
        add_lora(policy, 4, seed=0)
        critic = AdapterCritic(policy, 4, seed=1)
    torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(head_seed))
    torch.nn.init.constant_(critic.head.bias, 0.3)
    return critic


def values(policy, critic, tokens_BT=TOKENS_BT, sampled_BT=SAMPLED_BT):
    return critic(tokens_BT, sampled_BT, policy.score(tokens_BT, sampled_BT, 1.0)[2])


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_never_sees_the_token_that_was_chosen_there_nor_any_later_one(policy, kind, tmp_path):
    critic = make_critic(kind, policy, tmp_path)
    before = values(policy, critic)
    assert (before[SAMPLED_BT] != 0).all()
    for t in range(TOKENS_BT.shape[1]):
        changed = TOKENS_BT.clone()
        changed[:, t] = (changed[:, t] + 1) % 9
        moved_BT = (values(policy, critic, changed) - before).abs() > 1e-4
        assert not moved_BT[:, : t + 1].any(), t
        later_BT = SAMPLED_BT & (torch.arange(8) > t)
        assert torch.equal(moved_BT[:, t + 1 :], later_BT[:, t + 1 :]), t


@pytest.mark.parametrize("kind", ["shared", "separate", "lora"])
def test_a_value_is_linear_in_the_hidden_state_that_the_tokens_logits_come_from(policy, kind, tmp_path):
    with torch.no_grad():
        hidden_BTH = policy.model(TOKENS_BT, output_hidden_states=True).hidden_states[-1]
    critic = make_critic(kind, policy, tmp_path)
    by_hand_BT = hidden_BTH @ critic.head.weight[0] + 0.3
    got_BT = values(policy, critic)
    assert got_BT.dtype == torch.float32
    assert not got_BT[~SAMPLED_BT].any()
    assert_close(got_BT[:, 1:][SAMPLED_BT[:, 1:]], by_hand_BT[:, :-1][SAMPLED_BT[:, 1:]], atol=1e-5, rtol=1e-5)


def test_a_head_starts_at_exactly_nothing(policy):
    assert not values(policy, Critic(policy.hidden_size, policy.device)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_chosen_token_have_no_values_and_no_error(llama, kind, tmp_path):
    critic = make_critic(kind, llama, tmp_path)
    got_BT = values(llama, critic, sampled_BT=torch.zeros_like(SAMPLED_BT))
    assert not got_BT.any()
    got_BT.sum().backward()


# Whose gradient.


def gradients(policy, critic, of_policy, of_value):
    """The gradients of a loss of log-probabilities and values, by parameter of policy and critic; 0 where there is none."""
    for module in (policy, critic):
        module.zero_grad()
    logp_BT, _, hidden_NH = policy.score(TOKENS_BT, SAMPLED_BT, 1.0)
    value_BT = critic(TOKENS_BT, SAMPLED_BT, hidden_NH)
    (of_policy * logp_BT.sum() + of_value * value_BT.square().sum()).backward()
    named = [*policy.named_parameters(), *((f"critic.{name}", p) for name, p in critic.named_parameters())]
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named if p.requires_grad}


def owned(critic, policy):
    """Names, as in :func:`gradients`, of what is trained as the critic's."""
    ids = {id(parameter) for parameter in critic.trained_parameters()}
    named = [*policy.named_parameters(), *((f"critic.{name}", p) for name, p in critic.named_parameters())]
    return {name for name, p in named if id(p) in ids}


@pytest.mark.parametrize("kind", KINDS)
def test_policy_and_critic_each_have_their_own_gradient_and_share_only_the_shared_trunk(llama, kind, tmp_path):
    critic = make_critic(kind, llama, tmp_path)
    mine = owned(critic, llama)
    both, policys, critics = (gradients(llama, critic, *weights) for weights in ((1, 1), (1, 0), (0, 1)))
    for name in both:
        assert_close(both[name], policys[name] + critics[name], atol=1e-3, rtol=1e-4, msg=name)
        if ".lora_A." not in name:  # whose gradient is 0 as long as B is
            assert policys[name].any() == (name not in mine), name
            in_shared_trunk = kind == "shared" and "lm_head" not in name
            assert critics[name].any() == (name in mine or in_shared_trunk), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_detached_critic_has_its_gradient_and_the_policy_none_of_it(llama, kind, tmp_path):
    critic = make_critic(kind, llama, tmp_path)
    critic.detached = True
    mine = owned(critic, llama)
    for name, gradient in gradients(llama, critic, 0, 1).items():
        if ".lora_A." not in name:
            assert gradient.any() == (name in mine), name


def test_an_adapter_critic_holds_no_weights_but_its_head_and_its_adapter(llama, tmp_path):
    before = {name: p.data_ptr() for name, p in llama.named_parameters()}
    critic = make_critic("lora", llama, tmp_path)
    assert [name for name, _ in critic.named_parameters()] == ["head.weight", "head.bias"]
    after = {name.replace(".base_layer", ""): p.data_ptr() for name, p in llama.named_parameters()}
    assert {name: after[name] for name in before} == before
    names = owned(critic, llama)
    assert len(names) == 2 + 2 * 7 * 2  # a head; A and B of seven layers in two blocks
    assert all(".critic." in name or name.startswith("critic.head") for name in names)


@pytest.mark.parametrize("kind", KINDS)
def test_the_learner_moves_policy_and_critic_each_at_its_own_rate(kind, tmp_path):
    rollout, policy = make_rollout("textenv/GuessNumber-v0")
    critic = make_critic(kind, policy, tmp_path)
    critic.learning_rate_factor = 10.0
    learner = Learner(policy, critic=critic)
    learner.set_learning_rate(1e-4)
    batch = rollout.collect(0, 2, 2, temperature=1.0, seed=(0,))
    mine = owned(critic, policy)

    def named():
        both = [*policy.named_parameters(), *((f"critic.{name}", p) for name, p in critic.named_parameters())]
        return {name: p.detach().clone() for name, p in both if p.requires_grad}

    before = named()
    learner.step(batch, batch.rows, lambda scored: (scored.logp_RT.mean() + scored.value_RT.square().mean(), {}))
    moved = {name: (p - before[name]).abs().max().item() for name, p in named().items()}
    for name, distance in moved.items():
        if ".lora_A." not in name:  # Adam's first step is the rate, whatever the gradient's size
            assert distance == pytest.approx(1e-3 if name in mine else 1e-4, rel=0.02), name


def test_long_gradients_of_the_critic_do_not_shorten_the_policys(tmp_path):
    rollout, policy = make_rollout("textenv/GuessNumber-v0")
    batch = rollout.collect(0, 2, 2, temperature=1.0, seed=(0,))

    def step(weight):
        learner = Learner(policy, critic=make_critic("separate", policy, tmp_path), max_grad_norm=1e-3)
        metrics = learner.step(
            batch, batch.rows, lambda s: (s.logp_RT.mean() + weight * s.value_RT.square().mean(), {})
        )
        return metrics, {name: p.grad.clone() for name, p in policy.named_parameters()}

    (quiet, alone), (loud, beside) = step(0.0), step(1e6)
    assert quiet["grad_norm"] == loud["grad_norm"]
    assert loud["critic_grad_norm"] > 1e3
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


# Values of a batch.


@pytest.mark.parametrize("kind", KINDS)
def test_values_depend_on_neither_micro_batches_nor_padding(kind, tmp_path):
    rollout, policy = make_rollout("textenv/GuessNumber-v0")
    critic = make_critic(kind, policy, tmp_path)
    batch = rollout.collect(0, 3, 2, temperature=1.0, seed=(0,))
    wide = replace(
        batch,
        tokens_BT=torch.nn.functional.pad(batch.tokens_BT, (0, 4), value=3),
        source_BT=torch.nn.functional.pad(batch.source_BT, (0, 4)),
        logp_BT=torch.nn.functional.pad(batch.logp_BT, (0, 4)),
    )
    expected = Learner(policy, critic=critic).logprobs_and_values(batch, batch.rows)
    small = Learner(policy, critic=critic, tokens_per_microbatch=1).logprobs_and_values(wide, batch.rows)
    for got, whole in zip(small, expected, strict=True):
        assert_close(got[:, :-4], whole, atol=1e-5, rtol=1e-5)
        assert not got[:, -4:].any()
    assert expected[1][batch.sampled_BT].std() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_value_is_that_of_the_whole_row(kind, tmp_path):
    rollout, policy = make_rollout("textenv/GuessNumber-v0")
    critic = make_critic(kind, policy, tmp_path)
    batch = rollout.collect(0, 3, 2, temperature=1.0, seed=(0,))
    got_B = Learner(policy, critic=critic).last_values(batch)
    assert len(set(batch.length_B.tolist())) > 1
    for n in range(len(batch)):
        # One more token, of whichever kind, is chosen in the state that the row ends in.
        row_1T = torch.cat([batch.tokens_BT[n, : batch.length_B[n]], torch.tensor([5])]).unsqueeze(0)
        chosen_1T = torch.arange(row_1T.shape[1]).unsqueeze(0) == batch.length_B[n]
        assert_close(got_B[n], values(policy, critic, row_1T, chosen_1T)[0, -1].detach(), atol=1e-5, rtol=1e-5)


# From a reward model.


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_critic_from_a_reward_model_values_a_text_as_that_scores_it(tokenizer, tmp_path, family):
    policy = Policy(make_model(family), tokenizer)
    folder = make_reward_model(tmp_path / "rm", tokenizer, family)
    check_reward_model_fits(folder, tokenizer, 64)
    judge = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    critic = critic_from_reward_model(folder, policy.device)
    assert torch.equal(critic.head.weight, judge.score.weight)
    assert not critic.head.bias.any()
    for name, parameter in judge.base_model.named_parameters():
        assert torch.equal(critic.trunk.get_parameter(name), parameter), name
        assert critic.trunk.get_parameter(name).requires_grad
    text_BT, chosen_BT = torch.tensor([[1, 2, 3, 4, 9]]), torch.tensor([[False] * 4 + [True]])
    scored = judge(input_ids=text_BT[:, :4]).logits[0, 0]
    assert_close(values(policy, critic, text_BT, chosen_BT)[0, 4], scored, atol=1e-5, rtol=1e-5)
    assert scored.abs() > 0.01


def test_a_reward_model_may_have_ids_of_its_own_beside_the_policys(tmp_path, tokenizer):
    folder = make_reward_model(tmp_path / "rm", CharTokenizer(ALPHABET + "#"))
    check_reward_model_fits(folder, tokenizer, 64)


class Relabelled(CharTokenizer):
    """As many ids as the policy's tokenizer, for other characters."""

    def __init__(self):
        super().__init__("abcdefghijkl=")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder, tokenizer: make_reward_model(folder, Relabelled()),
            r"speaks another vocabulary \(14 ids\) than the policy \(14 ids\); take a reward model with the policy's",
        ),
        (
            lambda folder, tokenizer: Policy(make_model("llama"), tokenizer).save(folder),
            "begins as a sequence classifier with one label, but .* is a LlamaForCausalLM with 2; give a reward model",
        ),
        (
            lambda folder, tokenizer: make_reward_model(folder, tokenizer, num_labels=3),
            "is a LlamaForSequenceClassification with 3",
        ),
        (
            lambda folder, tokenizer: make_reward_model(folder, tokenizer, "bert"),
            "is a BertForSequenceClassification, which reads a text as a whole",
        ),
        (
            lambda folder, tokenizer: make_reward_model(folder, tokenizer, max_position_embeddings=16),
            "rm' does not fit: the model's context of 16 tokens is smaller than the environment's max_tokens=64",
        ),
        (lambda folder, tokenizer: None, '"lora", or begins as a reward model, but there is none at .*does not exist'),
        (
            lambda folder, tokenizer: (folder / "vocab.json").write_text("{}"),
            "there is none at .*no config.json in it",
        ),
    ],
    ids=["vocabulary", "language model", "three labels", "both ways", "short", "nothing", "no config"],
)
def test_what_cannot_begin_a_critic_is_refused_in_one_line_without_its_weights(tmp_path, make, message):
    tokenizer = CharTokenizer(ALPHABET)
    folder = tmp_path / "rm"
    if "none at" not in message or "config" in message:
        folder.mkdir()
    make(folder, tokenizer)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(ValueError, match=message) as refused:
        check_reward_model_fits(folder, tokenizer, 64)
    assert len(str(refused.value).splitlines()) == 1


def test_a_reward_model_with_too_few_embeddings_is_refused(tmp_path, tokenizer):
    folder = make_reward_model(tmp_path / "rm", tokenizer)
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    (tmp_path / "rm" / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
    with pytest.raises(ValueError, match="does not fit: the model's vocabulary of 5 is smaller than the 14 ids"):
        check_reward_model_fits(folder, tokenizer, 64)

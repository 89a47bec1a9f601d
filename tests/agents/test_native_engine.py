from collections import Counter

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from torch.testing import assert_close
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM, PretrainedConfig
from transformers.modeling_outputs import CausalLMOutputWithPast

from agents.core.engines import native
from agents.core.engines.base import Sampling
from agents.core.engines.cache import Reading
from agents.core.engines.native import NativeEngine
from agents.core.engines.sampling import Uniforms, choose
from agents.core.policy import Policy
from tests.agents.conftest import ALPHABET, Undecodable, make_model
from textenv.task import Finish
from textenv.tokenizer import CharTokenizer

RAGGED = [[2, 3, 11, 4], [5], [1, 0, 2, 0, 9, 12, 7], [8, 8]]  # 0, the end token, stands inside a prompt too
EVEN = [[2, 3, 11, 4], [5, 1, 1, 6]]


class Endless(CharTokenizer):
    """No id ends a completion."""

    def __init__(self):
        super().__init__(ALPHABET)
        self.eos_ids = ()


def sampling(**fields):
    return Sampling(**{"max_new_tokens": 12} | fields)


def texts(completions):
    return [tokens.tolist() for tokens in completions.tokens]


def scored(policy, prompts, completions, n, temperature):
    """What the learner gives the sampled tokens, one array a completion."""
    rows = [(prompts[i // n], tokens) for i, tokens in enumerate(completions.tokens)]
    width = max(len(prompt) + len(tokens) for prompt, tokens in rows)
    tokens_BT, sampled_BT = (
        torch.zeros(len(rows), width, dtype=torch.int64),
        torch.zeros(len(rows), width, dtype=torch.bool),
    )
    for row, (prompt, tokens) in enumerate(rows):
        tokens_BT[row, : len(prompt) + len(tokens)] = torch.tensor([*prompt, *tokens])
        sampled_BT[row, len(prompt) : len(prompt) + len(tokens)] = True
    logp_BT = policy.logprobs(tokens_BT, sampled_BT, temperature)[0].detach()
    return [logp_T[sampled_T].numpy() for logp_T, sampled_T in zip(logp_BT, sampled_BT, strict=True)]


@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
def test_greedy_tokens_equal_those_of_transformers(policy, prompts):
    completions = NativeEngine(policy).generate(prompts, sampling(temperature=0))
    for prompt, tokens in zip(prompts, completions.tokens, strict=True):
        alone = policy.model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=0, pad_token_id=0
        )
        assert tokens.tolist() == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
def test_behaviour_logprobs_equal_those_of_the_learner(policy, prompts, temperature):
    completions = NativeEngine(policy).generate(prompts, sampling(temperature=temperature, seed=4), n=3)
    expected = scored(policy, prompts, completions, 3, temperature or 1.0)
    for logprobs, rescored in zip(completions.logprobs, expected, strict=True):
        np.testing.assert_allclose(logprobs, rescored, atol=1e-5, rtol=0)


def test_arrays_are_int64_and_float32_and_as_many_as_completions(llama):
    completions = NativeEngine(llama).generate(RAGGED, sampling(), n=2)
    assert len(completions.tokens) == len(completions.logprobs) == len(completions.finish) == 8
    assert {tokens.dtype for tokens in completions.tokens} == {np.dtype(np.int64)}
    assert {logprobs.dtype for logprobs in completions.logprobs} == {np.dtype(np.float32)}
    assert all(isinstance(finish, Finish) for finish in completions.finish)


def test_completions_of_a_prompt_stand_beside_each_other(llama):
    together = NativeEngine(llama).generate(EVEN, sampling(seed=1), n=3)
    one_by_one = NativeEngine(llama).generate([EVEN[0]] * 3 + [EVEN[1]] * 3, sampling(seed=1))
    assert texts(together) == texts(one_by_one)


def test_a_completion_does_not_depend_on_what_else_is_in_the_batch(policy):
    engine = NativeEngine(policy)
    among = engine.generate(RAGGED, sampling(seed=2))
    assert texts(among)[:1] == texts(engine.generate(RAGGED[:1], sampling(seed=2)))
    assert (
        texts(among)[2] == texts(engine.generate([[6, 6, 6]] * 2 + RAGGED[2:3] + [[1] * 20] * 9, sampling(seed=2)))[2]
    )


@pytest.mark.parametrize("leave_share", [1, 2, 1000])
def test_rows_that_leave_early_or_late_change_nothing(policy, monkeypatch, leave_share):
    expected = NativeEngine(policy).generate(RAGGED, sampling(seed=3), n=8)
    assert len(set(map(len, expected.tokens))) > 3
    monkeypatch.setattr(native, "LEAVE_SHARE", leave_share)
    got = NativeEngine(policy).generate(RAGGED, sampling(seed=3), n=8)
    assert texts(got) == texts(expected)
    assert got.finish == expected.finish


def test_finished_rows_leave_the_batch(llama, monkeypatch):
    sizes = []
    attend = Reading.__call__
    monkeypatch.setattr(Reading, "__call__", lambda self, *args: sizes.append(self.span.stop) or attend(self, *args))
    NativeEngine(llama).generate(EVEN, sampling(max_new_tokens=40), n=16)
    assert sizes[0] == 2  # one prefill a prompt
    assert sizes[1] <= 32
    assert sizes[-1] < 8


def test_the_same_seed_draws_the_same_and_another_seed_does_not(llama):
    engine = NativeEngine(llama)
    first, again, other, nested = (texts(engine.generate(EVEN, sampling(seed=seed), n=4)) for seed in (7, 7, 8, (7, 1)))
    assert first == again
    assert first != other
    assert first != nested


def test_a_longer_budget_only_extends_completions(llama):
    short = texts(NativeEngine(llama).generate(EVEN, sampling(max_new_tokens=5), n=4))
    long = texts(NativeEngine(llama).generate(EVEN, sampling(max_new_tokens=40), n=4))
    assert short == [tokens[:5] for tokens in long]
    assert max(map(len, long)) > 5


def test_draws_do_not_repeat_however_long_a_completion():
    uniforms, both = Uniforms(5, 2, 200, torch.device("cpu")), torch.arange(2)
    drawn = [uniforms.at(both, torch.full_like(both, token), token) for token in range(200)]
    assert len(np.unique(drawn)) == 400


def test_torchs_global_random_state_is_neither_used_nor_moved(llama):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = texts(NativeEngine(llama).generate(EVEN, sampling()))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert texts(NativeEngine(llama).generate(EVEN, sampling())) == first


def test_samples_follow_the_probabilities(llama):
    draws = 4000
    completions = NativeEngine(llama).generate([EVEN[0]], sampling(max_new_tokens=1, temperature=1.4, seed=11), n=draws)
    logits = llama.model(torch.tensor([EVEN[0]])).logits[0, -1]
    expected = draws * torch.softmax(logits.double() / 1.4, dim=0).detach().numpy()
    counts = Counter(int(tokens[0]) for tokens in completions.tokens)
    assert chisquare([counts[i] for i in range(14)], expected).pvalue > 0.01


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_extremes_of_the_draw_never_choose_an_id_without_probability(uniform):
    policy = Policy(make_model("llama", vocab_size=20), Undecodable())
    logits_BV = torch.zeros(1, 20)
    logits_BV[0, :2] = logits_BV[0, 12:] = -1e9
    token_B, logp_B = choose(logits_BV, torch.tensor([uniform], dtype=torch.float64), sampling(), policy.allowed_V)
    assert token_B.item() == (2 if uniform == 0 else 11)
    assert logp_B.exp().item() == pytest.approx(1 / 8)


def test_undecodable_ids_are_never_sampled():
    policy = Policy(make_model("llama", vocab_size=20), Undecodable())
    completions = NativeEngine(policy).generate(EVEN, sampling(max_new_tokens=30, temperature=5.0), n=40)
    seen = {int(token) for tokens in completions.tokens for token in tokens}
    assert seen == {*range(14)} - {3, 5}


def test_a_hostile_generation_config_is_ignored(llama):
    expected = NativeEngine(llama).generate(RAGGED, sampling(), n=2)
    llama.model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, repetition_penalty=50.0, eos_token_id=3, max_new_tokens=1
    )
    got = NativeEngine(llama).generate(RAGGED, sampling(), n=2)
    assert texts(got) == texts(expected)
    assert_close(got.logprobs, expected.logprobs)


def test_an_end_token_is_the_last_one_and_says_why(llama):
    completions = NativeEngine(llama).generate(EVEN, sampling(stop_ids=(12, 13)), n=64)
    assert set(completions.finish) == {Finish.EOS, Finish.STOP, Finish.LENGTH}
    for tokens, logprobs, finish in zip(completions.tokens, completions.logprobs, completions.finish, strict=True):
        assert len(tokens) == len(logprobs)
        assert not np.isin(tokens[:-1], (0, 12, 13)).any()
        assert finish == {0: Finish.EOS, 12: Finish.STOP, 13: Finish.STOP}.get(tokens[-1], Finish.LENGTH)
        assert len(tokens) == 12 or finish != Finish.LENGTH


def test_an_end_token_on_the_last_place_of_the_budget_is_an_end(llama):
    completions = NativeEngine(llama).generate(EVEN, sampling(max_new_tokens=1), n=200)
    ends = [finish for tokens, finish in zip(completions.tokens, completions.finish, strict=True) if tokens[0] == 0]
    assert ends
    assert set(ends) == {Finish.EOS}


def test_each_row_keeps_its_own_budget():
    policy = Policy(make_model("llama"), Endless())
    completions = NativeEngine(policy).generate(RAGGED, sampling(), n=2, budgets=[1, 2, 3, 4, 5, 6, 7, 99])
    assert [len(tokens) for tokens in completions.tokens] == [1, 2, 3, 4, 5, 6, 7, 12]
    assert set(completions.finish) == {Finish.LENGTH}


@pytest.mark.parametrize("leave_share", [1, 16])
def test_a_context_can_be_filled_to_its_last_position(tokenizer, monkeypatch, leave_share):
    monkeypatch.setattr(native, "LEAVE_SHARE", leave_share)
    policy = Policy(make_model("gpt2"), Endless())  # its position table has 64 entries
    prompts, budgets = [[1] * 60, [2] * 10, [3] * 63], [4, 54, 1]
    completions = NativeEngine(policy).generate(prompts, sampling(max_new_tokens=60), budgets=budgets)
    assert [len(tokens) for tokens in completions.tokens] == budgets
    for logprobs, rescored in zip(completions.logprobs, scored(policy, prompts, completions, 1, 1.0), strict=True):
        np.testing.assert_allclose(logprobs, rescored, atol=1e-5, rtol=0)


def test_a_sliding_window_model_falls_back_to_transformers_and_says_so(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MistralForCausalLM(
        MistralConfig(vocab_size=14, num_key_value_heads=2, sliding_window=4, max_position_embeddings=64, **sizes)
    )
    policy = Policy(model, tokenizer)
    with pytest.warns(UserWarning, match="this MistralForCausalLM has layers that do not look at the whole context"):
        completions = NativeEngine(policy).generate(RAGGED, sampling(), n=4)
    for logprobs, rescored in zip(completions.logprobs, scored(policy, RAGGED, completions, 4, 1.0), strict=True):
        np.testing.assert_allclose(logprobs, rescored, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("fields", "kept"), [({"top_k": 3}, 3), ({"top_p": 0.5}, None), ({"top_k": 4, "top_p": 0.9}, None)]
)
def test_truncation_draws_from_and_reports_the_cut_distribution(llama, fields, kept):
    completions = NativeEngine(llama).generate([EVEN[0]], sampling(max_new_tokens=1, **fields), n=400)
    probability_V = torch.softmax(llama.model(torch.tensor([EVEN[0]])).logits[0, -1].detach(), dim=0).numpy()
    order = np.argsort(-probability_V)
    if kept is None:
        kept = int((np.cumsum(probability_V[order]) < fields["top_p"]).sum()) + 1
        kept = min(kept, fields.get("top_k", kept))
    support = order[:kept]
    assert {int(tokens[0]) for tokens in completions.tokens} == set(support.tolist())
    for tokens, logprobs in zip(completions.tokens, completions.logprobs, strict=True):
        expected = probability_V[tokens[0]] / probability_V[support].sum()
        assert np.exp(logprobs[0]) == pytest.approx(expected, rel=1e-5)


class Scripted(nn.Module):
    """Says which token follows: after position t of the context comes id t + 1, with a log-probability that names t."""

    def __init__(self, end):
        super().__init__()
        self.head = nn.Linear(14, 14, bias=False)
        nn.init.eye_(self.head.weight)
        self.config = PretrainedConfig(vocab_size=14, num_hidden_layers=1)
        self.end = end

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        batch, width = input_ids.shape
        past = 0
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
            past_key_values.update(torch.zeros(batch, 1, width, 1), torch.zeros(batch, 1, width, 1), 0)
        if position_ids is None:
            position_ids = torch.arange(past, past + width).expand(batch, -1)
        hidden = torch.zeros(batch, width, 14)
        following = (position_ids + 1) * (position_ids + 1 < self.end)
        hidden.scatter_(2, following[..., None], 3.0 + position_ids[..., None].float())
        return CausalLMOutputWithPast(logits=self.head(hidden), past_key_values=past_key_values)


@pytest.mark.parametrize("prompts", [[[1, 1, 1]], [[1, 1, 1], [1], [1, 1]]], ids=["even", "ragged"])
def test_first_last_and_end_token_stand_where_their_logprobs_say(tokenizer, prompts):
    policy = Policy(Scripted(end=7), tokenizer)
    completions = NativeEngine(policy).generate(prompts, sampling(temperature=0), n=2)
    for i, (tokens, logprobs) in enumerate(zip(completions.tokens, completions.logprobs, strict=True)):
        start = len(prompts[i // 2])
        assert tokens.tolist() == [*range(start, 7), 0]
        by_hand = [2 + t - np.log(np.exp(2 + t) + 13) for t in range(start, 8)]  # token at t: logit 3 + (t - 1)
        np.testing.assert_allclose(logprobs, by_hand, atol=1e-6)
        assert completions.finish[i] == Finish.EOS
    for logprobs, rescored in zip(completions.logprobs, scored(policy, prompts, completions, 2, 1.0), strict=True):
        np.testing.assert_allclose(logprobs, rescored, atol=1e-6)


def test_sync_takes_the_new_weights_and_counts(llama, tokenizer):
    engine = NativeEngine(llama)
    before = texts(engine.generate(EVEN, sampling(temperature=0)))
    other = Policy(make_model("llama", seed=1), tokenizer)
    other.version = 7
    engine.sync(other)
    assert engine.version == 7
    after = texts(engine.generate(EVEN, sampling(temperature=0)))
    assert after == texts(NativeEngine(other).generate(EVEN, sampling(temperature=0)))
    assert after != before


def test_weights_changed_in_place_are_used_at_once(llama):
    engine = NativeEngine(llama)
    before = texts(engine.generate(EVEN, sampling(temperature=0)))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(-1.5)
    assert texts(engine.generate(EVEN, sampling(temperature=0))) != before


def test_training_goes_on_after_generation(llama):
    engine = NativeEngine(llama)
    completions = engine.generate(EVEN, sampling())
    tokens_BT = torch.tensor([[*EVEN[0], *completions.tokens[0]]])
    sampled_BT = torch.arange(tokens_BT.shape[1])[None] >= 4
    llama.logprobs(tokens_BT, sampled_BT, 1.0)[0].sum().backward()
    assert llama.model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "at least one token"),
        ([], {}, "at least one token"),
        ([[1] * 60], {}, "60 tokens and 12 new ones exceed the model's context of 64"),
        ([[1], [2]], {"budgets": [3]}, "2 numbers of at least 1"),
        ([[1]], {"budgets": [0]}, "1 numbers of at least 1"),
    ],
)
def test_what_cannot_be_generated_is_refused(llama, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        NativeEngine(llama).generate(prompts, sampling(), **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.1}, "top_p must be in"),
    ],
)
def test_a_sampling_out_of_range_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        sampling(**fields)


@pytest.mark.parametrize("prompts", [EVEN, RAGGED])
def test_each_completion_is_told_once_when_it_ends_the_short_ones_first(llama, prompts):
    told = {}
    engine = NativeEngine(llama)
    completions = engine.generate(
        prompts, sampling(), n=8, on_end=lambda row, tokens: told.update({row: tokens.tolist()})
    )
    assert [told[row] for row in range(len(told))] == [tokens.tolist() for tokens in completions.tokens]
    lengths = [len(tokens) for tokens in told.values()]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]

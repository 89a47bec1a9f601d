"""What is packed is what stands in the rows, each beginning once; and packed, a model says what it says of padded rows."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from agents.core.attention import Segments
from agents.core.lora import AdapterOff, add_lora
from agents.core.packing import pack
from agents.core.policy import Policy
from tests.agents.conftest import SIZES, make_model
from textenv.tokenizer import CharTokenizer

OTHERS = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 8}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}),
}
KNOWN = ["llama", "qwen2", "gpt2", "mistral", "qwen3", "gemma"]


def make_policy(family, tokenizer, **changes):
    if family not in OTHERS:
        return Policy(make_model(family, **changes), tokenizer)
    config_class, model_class, further = OTHERS[family]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES | shape | heads | further | changes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return Policy(model, tokenizer)


def make_rows(shared=5):
    """Rows of 3 to 12 tokens: the first four begin alike, of which two are the same; one has a reply, one is not sampled."""
    tokens_BT = torch.randint(1, 14, (8, 12), generator=torch.Generator().manual_seed(1))
    tokens_BT[:4, :shared] = tokens_BT[0, :shared]
    tokens_BT[3] = tokens_BT[2]
    sampled_BT = torch.zeros(8, 12, dtype=torch.bool)
    for row, (start, end) in enumerate([(5, 12), (5, 7), (5, 10), (5, 10), (1, 3), (4, 11), (2, 2), (3, 8)]):
        sampled_BT[row, start:end] = True
    sampled_BT[5, 6:9] = False
    return tokens_BT, sampled_BT


def without_decoder(policy, monkeypatch):
    monkeypatch.setattr(policy, "decoder", lambda: None)


def prefixes(tokens_BT, sampled_BT):
    """Of each row all prefixes that a sampled token depends on."""
    rows = zip(tokens_BT.tolist(), sampled_BT.tolist(), strict=True)
    return [[tuple(row[: t + 1]) for t in range(len(row)) if any(sampled[t + 1 :])] for row, sampled in rows]


# The layout.


def test_two_answers_to_one_prompt_by_hand():
    tokens_BT = torch.tensor([[7, 8, 1, 2, 0], [7, 8, 1, 0, 9], [7, 8, 3, 4, 5]])
    sampled_BT = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    packed = pack(tokens_BT, sampled_BT)
    # Needed are 7 8 1, 7 8 and 7 8 3 4; by length the second comes first, which is the beginning of both others.
    assert packed.tokens_U.tolist() == [7, 8, 1, 3, 4]
    assert packed.position_U.tolist() == [0, 1, 2, 2, 3]
    assert packed.state_N.tolist() == [1, 2, 1, 1, 3, 4]


@pytest.mark.parametrize("seed", range(5))
def test_every_distinct_prefix_is_there_once_and_each_sampled_token_finds_its_own(seed):
    rng = np.random.default_rng(seed)
    tokens_BT = torch.from_numpy(rng.integers(0, 3, (20, 7)))  # of three ids, so that much is shared
    start_B, end_B = np.sort(rng.integers(1, 8, (2, 20)), axis=0)
    column_T = np.arange(7)
    sampled_BT = torch.from_numpy((start_B[:, None] <= column_T) & (column_T < end_B[:, None]))
    packed = pack(tokens_BT, sampled_BT)
    distinct = {prefix for row in prefixes(tokens_BT, sampled_BT) for prefix in row}
    assert len(packed.tokens_U) == len(distinct)
    wanted = [tuple(tokens_BT[b, :t].tolist()) for b, t in sampled_BT.nonzero().tolist()]
    assert packed.tokens_U[packed.state_N].tolist() == [prefix[-1] for prefix in wanted]
    assert packed.position_U[packed.state_N].tolist() == [len(prefix) - 1 for prefix in wanted]
    assert len(set(packed.state_N.tolist())) == len(set(wanted))


def test_rows_without_common_beginnings_are_just_laid_side_by_side():
    tokens_BT, sampled_BT = make_rows()
    tokens_BT, sampled_BT = tokens_BT[4:], sampled_BT[4:]
    packed = pack(tokens_BT, sampled_BT)
    assert type(packed.attend) is Segments
    assert packed.tokens_U.tolist() == [*tokens_BT[0, :2], *tokens_BT[3, :7], *tokens_BT[1, :10]]  # by length


# What a model says.


def score_and_gradient(policy, tokens_BT, sampled_BT, temperature=0.7):
    policy.zero_grad()
    logp_BT, entropy_BT, hidden_NH = policy.score(tokens_BT, sampled_BT, temperature)
    (logp_BT * torch.linspace(-1, 1, tokens_BT.shape[1])).sum().backward()
    grads = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    return (logp_BT.detach(), entropy_BT, hidden_NH.detach()), grads


@pytest.mark.parametrize("shared", [0, 5])
@pytest.mark.parametrize("family", KNOWN)
def test_packed_and_padded_rows_have_the_same_scores_and_gradients(family, shared, tokenizer, monkeypatch):
    policy = make_policy(family, tokenizer)
    rows = make_rows(shared)
    assert policy.decoder() is not None
    scores, grads = score_and_gradient(policy, *rows)
    without_decoder(policy, monkeypatch)
    expected_scores, expected_grads = score_and_gradient(policy, *rows)
    assert_close(scores, expected_scores, atol=5e-6, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, expected in expected_grads.items():
        assert_close(grads[name], expected, atol=2e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_packed_and_padded_rows_differ_by_rounding(policy, dtype, monkeypatch):
    policy = policy.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert policy.decoder() is not None
    (logp_BT, *_), _ = score_and_gradient(policy, *make_rows())
    without_decoder(policy, monkeypatch)
    (expected_BT, *_), _ = score_and_gradient(policy, *make_rows())
    assert (logp_BT - expected_BT).abs().max() < 0.1
    assert (logp_BT - expected_BT).abs().mean() < 0.02


def test_nothing_after_a_rows_last_sampled_token_is_looked_at(policy):
    tokens_BT, sampled_BT = make_rows()
    after_BT = sampled_BT.flip(1).cumsum(1).flip(1) == 0
    junk_BT = tokens_BT.masked_fill(after_BT, 10**9)  # no such id
    expected, got = (score_and_gradient(policy, x_BT, sampled_BT) for x_BT in (tokens_BT, junk_BT))
    assert_close(got, expected, atol=0, rtol=0)


def test_what_is_computed_is_the_distinct_prefixes(llama, monkeypatch):
    rows, seen = make_rows(), []
    decoder = llama.decoder()
    monkeypatch.setattr(
        decoder, "embed", lambda tokens_N, embed=decoder.embed: seen.append(tokens_N) or embed(tokens_N)
    )
    llama.score(*rows, 1.0)
    assert len(seen[0]) == len({prefix for row in prefixes(*rows) for prefix in row}) < rows[1].numel() // 2


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_take_part_from_when_they_are_added(family, tokenizer, monkeypatch):
    policy = make_policy(family, tokenizer)
    before, _ = score_and_gradient(policy, *make_rows())
    add_lora(policy, 4, seed=0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    scores, grads = score_and_gradient(policy, *make_rows())
    off_BT, _ = AdapterOff(policy).logprobs(*make_rows(), 0.7)
    assert (scores[0] - before[0]).abs().max() > 0.01
    assert_close(off_BT, before[0], atol=5e-6, rtol=1e-5)
    without_decoder(policy, monkeypatch)
    expected_scores, expected_grads = score_and_gradient(policy, *make_rows())
    assert_close(scores, expected_scores, atol=5e-6, rtol=1e-5)
    assert grads.keys() == expected_grads.keys()
    for name, expected in expected_grads.items():
        assert_close(grads[name], expected, atol=2e-5, rtol=1e-4, msg=name)


def test_a_copy_scores_with_its_own_weights(llama):
    before_BT, _ = llama.logprobs(*make_rows(), 1.0)
    other = copy.deepcopy(llama)
    with torch.no_grad():
        other.model.model.embed_tokens.weight.neg_()
    assert (other.logprobs(*make_rows(), 1.0)[0] - before_BT).abs().max() > 0.01
    assert torch.equal(llama.logprobs(*make_rows(), 1.0)[0], before_BT)
    other.model.load_state_dict(llama.model.state_dict())
    assert torch.equal(other.logprobs(*make_rows(), 1.0)[0], before_BT)


# The way back to padded rows.


def test_a_model_of_another_family_is_scored_by_itself_and_says_so_once(tokenizer):
    policy = make_policy("gemma2", tokenizer)
    with pytest.warns(UserWarning, match=r"padded rows and with all logits.*Gemma2ForCausalLM is none of Llama"):
        policy.logprobs(*make_rows(), 1.0)
    warnings.simplefilter("error")
    tokens_BT, sampled_BT = make_rows()
    logp_BT, _ = policy.logprobs(tokens_BT, sampled_BT, 1.0)
    by_hand_BTV = torch.log_softmax(policy.model(tokens_BT[5:6, :10]).logits, dim=2)
    assert_close(logp_BT[5, 10], by_hand_BTV[0, 9, tokens_BT[5, 10]])  # its logits are capped after the head


@pytest.mark.parametrize("change", ["a norm", "a bias of the head"])
def test_a_model_that_is_not_what_its_name_says_is_scored_by_itself(tokenizer, change):
    policy = make_policy("llama", tokenizer)
    if change == "a norm":
        policy.model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: 1.01 * output)
    else:
        policy.model.lm_head.register_forward_hook(lambda module, inputs, output: output + torch.arange(14))
    expected_BT = make_policy("llama", tokenizer).logprobs(*make_rows(), 1.0)[0]
    with pytest.warns(UserWarning, match=r"the logits of this LlamaForCausalLM differ from those expected"):
        logp_BT, _ = policy.logprobs(*make_rows(), 1.0)
    assert (logp_BT - expected_BT).abs().max() > 1e-4


def test_a_tokenizer_of_few_ids_is_enough_for_the_comparison():
    tokenizer = CharTokenizer("ab")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Policy(make_model("llama", vocab_size=3), tokenizer).decoder() is not None

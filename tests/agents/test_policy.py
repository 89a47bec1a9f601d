import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GPT2Config, GPT2LMHeadModel

from agents.core.models import load_model
from agents.core.policy import Policy
from tests.agents.conftest import ALPHABET, Undecodable, make_model
from textenv.tokenizer import CharTokenizer

ROWS = [("12+3=", "15", True), ("7+7=", "14", False), ("0+1+2+3=", "6", True)]  # prompt, answer, ends itself


def batch(tokenizer, padding=0):
    """Right-padded rows and the mask of the tokens that the policy chose."""
    prompts = [tokenizer.encode(prompt) for prompt, _, _ in ROWS]
    answers = [tokenizer.encode(answer) + [0] * ends for _, answer, ends in ROWS]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + padding
    tokens_BT, sampled_BT = torch.zeros(3, width, dtype=torch.int64), torch.zeros(3, width, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        tokens_BT[row, :end] = torch.tensor(prompt + answer)
        sampled_BT[row, len(prompt) : end] = True
    return tokens_BT, sampled_BT


def independent_logprobs(model, tokens_BT, sampled_BT, temperature):
    """One row at a time, without padding, in numpy."""
    logp_BT, entropy_BT = np.zeros(tokens_BT.shape), np.zeros(tokens_BT.shape)
    for row in range(len(tokens_BT)):
        columns = sampled_BT[row].nonzero().squeeze(1).tolist()
        logits_TV = model(tokens_BT[row : row + 1, : columns[-1] + 1]).logits[0].detach().double().numpy() / temperature
        for t in columns:
            logp_V = logits_TV[t - 1] - np.log(np.exp(logits_TV[t - 1]).sum())
            logp_BT[row, t] = logp_V[tokens_BT[row, t]]
            entropy_BT[row, t] = -(np.exp(logp_V) * logp_V).sum()
    return torch.tensor(logp_BT).float(), torch.tensor(entropy_BT).float()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.4])
def test_logprobs_and_entropy_equal_an_independent_computation(policy, tokenizer, temperature):
    tokens_BT, sampled_BT = batch(tokenizer)
    expected_logp, expected_entropy = independent_logprobs(policy.model, tokens_BT, sampled_BT, temperature)
    logp_BT, entropy_BT = policy.logprobs(tokens_BT, sampled_BT, temperature)
    assert_close(logp_BT, expected_logp, atol=2e-6, rtol=1e-6)
    assert_close(entropy_BT, expected_entropy, atol=2e-6, rtol=1e-6)


def test_padding_changes_nothing(policy, tokenizer):
    tokens_BT, sampled_BT = batch(tokenizer)
    wide_BT, wide_sampled_BT = batch(tokenizer, padding=5)
    real_BT = sampled_BT | (wide_sampled_BT.flip(1).cumsum(1).flip(1) > 0)[:, : tokens_BT.shape[1]]
    wide_BT[:, : tokens_BT.shape[1]][~real_BT] = 7  # another padding id
    logp_BT, _ = policy.logprobs(tokens_BT, sampled_BT, 1.0)
    wide_logp_BT, _ = policy.logprobs(wide_BT, wide_sampled_BT, 1.0)
    assert_close(wide_logp_BT[:, : logp_BT.shape[1]], logp_BT, atol=1e-6, rtol=0)
    assert not wide_logp_BT[:, logp_BT.shape[1] :].any()


def test_logprobs_are_the_same_without_logits_to_keep(policy, tokenizer, monkeypatch):
    expected = policy.logprobs(*batch(tokenizer), 1.0)
    monkeypatch.setattr(policy, "decoder", lambda: None)
    assert_close(policy.logprobs(*batch(tokenizer), 1.0), expected, atol=1e-6, rtol=1e-6)
    policy._keeps_logits = False
    assert_close(policy.logprobs(*batch(tokenizer), 1.0), expected, atol=1e-6, rtol=1e-6)


def test_end_tokens_have_gradient_even_where_padding_has_the_same_id(llama, tokenizer):
    tokens_BT, sampled_BT = batch(tokenizer)
    end_BT = sampled_BT & (tokens_BT == 0)
    assert end_BT.sum() == 2
    llama.logprobs(tokens_BT, end_BT, 1.0)[0].sum().backward()
    assert llama.model.lm_head.weight.grad[0].abs().sum() > 0


@pytest.mark.parametrize("temperature", [0.6, 1.4])
def test_gradient_at_a_temperature_agrees_with_finite_differences(llama, tokenizer, temperature):
    weight = llama.model.lm_head.weight

    def total():
        return llama.logprobs(*batch(tokenizer), temperature)[0].double().sum()

    total().backward()
    slope = weight.grad.norm()
    step = 1e-2 * weight.grad / slope
    with torch.no_grad():
        weight += step
        above = total()
        weight -= 2 * step
        below = total()
    assert ((above - below) / 2e-2).item() == pytest.approx(slope.item(), rel=1e-3)


def test_temperature_divides_the_logits(llama):
    logits = torch.tensor([1.0, 3.0] + [0.0] * 12)
    assert_close(llama.distribution(logits, 0.5), torch.log_softmax(2 * logits, dim=0))


def test_half_precision_logits_are_scored_in_float32(llama):
    logits = torch.randn(14, dtype=torch.bfloat16)
    assert_close(llama.distribution(logits, 0.7), torch.log_softmax(logits.float() / 0.7, dim=0))


def test_undecodable_ids_have_no_probability_and_no_gradient():
    tokenizer = Undecodable()
    policy = Policy(make_model("llama"), tokenizer)
    logp_V = policy.distribution(torch.randn(14), 1.0)
    assert logp_V[[3, 5]].tolist() == [-torch.inf, -torch.inf]
    assert logp_V.exp().sum().item() == pytest.approx(1)
    tokens_BT, sampled_BT = batch(tokenizer)
    sampled_BT &= (tokens_BT != 3) & (tokens_BT != 5)
    logp_BT, entropy_BT = policy.logprobs(tokens_BT, sampled_BT, 1.0)
    assert entropy_BT.isfinite().all()
    logp_BT.sum().backward()
    gradient = policy.model.lm_head.weight.grad
    assert gradient.isfinite().all()
    assert not gradient[[3, 5]].any()


def test_ids_beyond_the_tokenizer_have_no_probability(tokenizer):
    policy = Policy(make_model("llama", vocab_size=20), tokenizer)
    assert policy.vocab_size == 20
    assert policy.distribution(torch.zeros(20), 1.0).exp()[14:].sum() == 0


def test_a_vocabulary_smaller_than_the_tokenizers_ids_is_refused():
    with pytest.raises(ValueError, match="vocabulary smaller than tokenizer's ids: the model has 14 logits"):
        Policy(make_model("llama"), CharTokenizer(ALPHABET + "x"))


def test_a_sampled_token_without_context_is_refused(llama):
    with pytest.raises(ValueError, match="first column"):
        llama.logprobs(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool), 1.0)


def test_a_batch_without_sampled_tokens_can_be_scored_and_trained_on(llama):
    logp_BT, entropy_BT = llama.logprobs(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.bool), 1.0)
    assert not logp_BT.any()
    assert not entropy_BT.any()
    logp_BT.sum().backward()


def test_dropout_is_off_in_modules_attention_and_config(tokenizer):
    rates = {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=14, n_embd=32, n_layer=2, n_head=4, n_positions=64, **rates))
    for policy in (Policy(gpt2, tokenizer), Policy(make_model("llama", attention_dropout=0.5), tokenizer)):
        policy.train()
        assert_close(policy.logprobs(*batch(tokenizer), 1.0), policy.logprobs(*batch(tokenizer), 1.0), atol=0, rtol=0)
        assert not [name for name, rate in policy.model.config.to_dict().items() if "drop" in name and rate]


def test_the_context_limit_is_the_models(policy):
    assert policy.max_context == 64


def test_a_saved_policy_loads_the_transformers_way_with_identical_logits(policy, tokenizer, tmp_path):
    policy.save(tmp_path)
    tokens_BT, _ = batch(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(model(tokens_BT).logits, policy.model(tokens_BT).logits, atol=0, rtol=0)
    again = load_model(tmp_path, tokenizer)
    assert_close(again.logprobs(*batch(tokenizer), 1.0), policy.logprobs(*batch(tokenizer), 1.0), atol=0, rtol=0)


def test_a_saved_policy_brings_its_tokenizer_and_its_end_tokens(llama, tokenizer, tmp_path):
    tokenizer.eos_ids = (0, 4)
    llama.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("12+3= 4") == tokenizer.encode("12+3= 4")
    assert load_model(tmp_path).tokenizer.eos_ids == (0, 4)


def test_a_generation_config_that_transformers_would_refuse_to_save_does_not_stop_saving(llama, tmp_path):
    llama.model.generation_config = GenerationConfig(do_sample=False, temperature=0.3)
    llama.save(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).temperature != 0.3

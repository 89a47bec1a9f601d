"""LoRA: what an adapter changes and what it leaves alone, on models of three families."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from agents.core.engines.base import Sampling
from agents.core.engines.native import NativeEngine
from agents.core.lora import (
    AdapterOff,
    adapters,
    add_lora,
    check_lora_installed,
    load_adapters,
    merged_state,
    save_adapters,
    using_adapter,
)
from agents.core.models import build_tiny, load_model
from agents.core.policy import Policy
from tests.agents.conftest import make_model

TOKENS_BT = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]])
SAMPLED_BT = torch.arange(7).expand(2, 7) >= 3


def logits(policy):
    return policy.model(TOKENS_BT).logits


def logprobs(policy):
    return policy.logprobs(TOKENS_BT, SAMPLED_BT, 1.0)[0]


def own_weights(policy):
    """The model's parameters without those of its adapters."""
    return {name: p for name, p in policy.model.named_parameters() if ".lora_" not in name}


def adapter_weights(policy, name="policy"):
    return {key: p for key, p in policy.model.named_parameters() if f".{name}." in key}


def perturb(policy, name="policy", seed=1):
    """Give the adapter a change to make, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in adapter_weights(policy, name).items():
            if ".lora_B." in key:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted(policy):
    """A policy of each family with an adapter that changes its logits."""
    add_lora(policy, 4, seed=0)
    perturb(policy)
    return policy


def test_a_fresh_adapter_changes_no_logit_and_no_torch_state_and_warns_of_nothing(policy):
    before, model_class, head = logits(policy), type(policy.model), policy.model.get_output_embeddings()
    random_state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(policy, 4, seed=0)
        add_lora(policy, 4, seed=1, name="critic")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(logits(policy), before)
    assert type(policy.model) is model_class
    assert policy.model.get_output_embeddings() is head
    assert not any(module.training for module in policy.model.modules())


def test_every_linear_layer_but_the_head_has_an_adapter_of_the_rank_asked_for_scaled_by_two(policy):
    head = policy.model.get_output_embeddings()
    linear = {
        name
        for name, module in policy.model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    add_lora(policy, 3, seed=0)
    first = [name for name in adapter_weights(policy) if ".lora_A." in name]
    assert {name.split(".lora_A.")[0] for name in first} == linear
    assert {adapter_weights(policy)[name].shape[0] for name in first} == {3}
    assert {policy.model.get_submodule(name).scaling["policy"] for name in linear} == {2.0}


def test_an_adapter_is_a_function_of_its_seed_alone(tokenizer):
    def drawn(seed, global_seed):
        policy = Policy(make_model("llama"), tokenizer)
        torch.manual_seed(global_seed)
        add_lora(policy, 4, seed=seed)
        return torch.cat([p.flatten() for p in adapter_weights(policy).values()])

    assert torch.equal(drawn(5, global_seed=0), drawn(5, global_seed=1))
    assert not torch.equal(drawn(5, global_seed=0), drawn(6, global_seed=0))


def test_training_moves_the_adapter_and_no_weight_of_the_model(adapted):
    before = {name: p.clone() for name, p in adapted.model.named_parameters()}
    optimizer = torch.optim.AdamW(adapted.parameters(), lr=1e-2, weight_decay=0.1)
    logprobs(adapted).sum().backward()
    optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in adapter_weights(adapted).values())
    assert all(p.grad is None and not p.requires_grad for p in own_weights(adapted).values())
    for name, parameter in adapted.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (".lora_" not in name)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_adapter_off_is_the_model_before_training_and_the_adapter_is_on_again_after(policy, grad_mode):
    before = logprobs(policy).detach()
    add_lora(policy, 4, seed=0)
    perturb(policy)
    trained = logprobs(policy).detach()
    assert (trained - before).abs().max() > 0.1
    reference = AdapterOff(policy)
    with grad_mode():
        logp_BT, entropy_BT = reference.logprobs(TOKENS_BT, SAMPLED_BT, 1.0)
    assert torch.equal(logp_BT, before)
    assert not logp_BT.requires_grad
    assert entropy_BT.shape == TOKENS_BT.shape
    assert reference.device == policy.device
    assert torch.equal(logprobs(policy), trained)
    assert all(p.requires_grad for p in adapter_weights(policy).values())


def test_the_reference_shares_every_weight(adapted):
    def held():
        return {name: (p.data_ptr(), p.requires_grad) for name, p in adapted.named_parameters()}

    before = held()
    reference = AdapterOff(adapted)
    reference.logprobs(TOKENS_BT, SAMPLED_BT, 1.0)
    assert held() == before
    assert vars(reference) == {"policy": adapted}


def test_a_failure_with_the_adapter_off_leaves_it_on(adapted):
    trained = logprobs(adapted).detach()
    with pytest.raises(ValueError, match="first column"):
        AdapterOff(adapted).logprobs(TOKENS_BT, torch.ones_like(SAMPLED_BT), 1.0)
    assert torch.equal(logprobs(adapted), trained)
    assert all(p.requires_grad for p in adapter_weights(adapted).values())


def test_two_adapters_do_not_touch_each_other_and_nesting_goes_back_one_by_one(adapted):
    policys = logits(adapted)
    add_lora(adapted, 2, seed=1, name="critic")
    perturb(adapted, "critic", seed=2)
    assert torch.equal(logits(adapted), policys)  # the first one stays the active one
    with using_adapter(adapted.model, "critic"):
        critics = logits(adapted)
        with using_adapter(adapted.model, None):
            off = logits(adapted)
            with using_adapter(adapted.model, "policy"):
                assert torch.equal(logits(adapted), policys)
            assert torch.equal(logits(adapted), off)
        assert torch.equal(logits(adapted), critics)
    assert torch.equal(logits(adapted), policys)
    assert min((a - b).abs().max() for a, b in [(off, policys), (off, critics), (policys, critics)]) > 0.1


def test_one_backward_reaches_both_adapters_and_each_gets_its_own_gradient(llama):
    add_lora(llama, 4, seed=0)
    add_lora(llama, 4, seed=1, name="critic")
    perturb(llama), perturb(llama, "critic", seed=2)

    def gradients(of_policy, of_critic):
        llama.zero_grad()
        loss = of_policy * logprobs(llama).sum()
        with using_adapter(llama.model, "critic"):
            loss = loss + of_critic * logits(llama).square().mean()
        AdapterOff(llama).logprobs(TOKENS_BT, SAMPLED_BT, 1.0)
        loss.backward()
        return {name: p.grad.clone() for name, p in llama.model.named_parameters() if p.requires_grad}

    both, policys, critics = gradients(1, 1), gradients(1, 0), gradients(0, 1)
    assert both.keys() == adapter_weights(llama).keys() | adapter_weights(llama, "critic").keys()
    for name, gradient in both.items():
        mine, other = (policys, critics) if ".policy." in name else (critics, policys)
        assert_close(gradient, mine[name])
        assert gradient.abs().sum() > 0
        assert other[name].abs().sum() == 0


def test_generation_moves_with_each_adapter_matrix_and_scores_as_the_learner(adapted):
    def generated():
        sampling = Sampling(max_new_tokens=8, seed=3)
        return NativeEngine(adapted).generate([[1, 2, 3], [4]], sampling, n=3)

    completions = generated()
    for i, (tokens, expected) in enumerate(zip(completions.tokens, completions.logprobs, strict=True)):
        prompt = [[1, 2, 3], [4]][i // 3]
        row_BT = torch.tensor([[*prompt, *tokens]])
        scored_BT = adapted.logprobs(row_BT, torch.arange(row_BT.shape[1])[None] >= len(prompt), 1.0)[0]
        np.testing.assert_allclose(scored_BT[0, len(prompt) :].detach(), expected, atol=1e-5, rtol=0)

    before = completions.logprobs[0][0]
    for name, parameter in adapter_weights(adapted).items():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter))
            assert generated().logprobs[0][0] != before, name
            parameter.copy_(kept)


def test_a_saved_policy_is_a_plain_model_that_speaks_as_with_its_adapter(adapted, tmp_path, monkeypatch, tokenizer):
    plain_names = make_model(adapted.model.config.model_type).state_dict().keys()
    add_lora(adapted, 2, seed=1, name="critic")
    perturb(adapted, "critic")
    with torch.no_grad():
        expected = logits(adapted)
    live = {name: (p.clone(), p.data_ptr(), p.requires_grad) for name, p in adapted.model.named_parameters()}

    adapted.save(tmp_path)

    for name, parameter in adapted.model.named_parameters():
        value, address, requires_grad = live[name]
        assert torch.equal(parameter, value)
        assert (parameter.data_ptr(), parameter.requires_grad) == (address, requires_grad)
    assert torch.equal(logits(adapted), expected)
    monkeypatch.setitem(sys.modules, "peft", None)
    loaded = load_model(tmp_path, tokenizer)
    assert type(loaded.model) is type(adapted.model)
    assert loaded.model.state_dict().keys() == plain_names
    assert_close(logits(loaded), expected, atol=1e-5, rtol=0)


def test_what_is_loaded_is_bit_by_bit_what_was_merged(adapted, tmp_path, tokenizer):
    adapted.save(tmp_path)
    merged, loaded = merged_state(adapted.model), load_model(tmp_path, tokenizer).model.state_dict()
    assert merged.keys() == loaded.keys()
    assert all(torch.equal(merged[name], loaded[name]) for name in merged)
    assert not any(tensor.requires_grad for tensor in merged.values())


def test_tied_embeddings_stay_tied_in_what_is_saved(tokenizer, tmp_path):
    policy = Policy(build_tiny(tokenizer, seed=0), tokenizer)
    add_lora(policy, 4, seed=0)
    perturb(policy)
    policy.save(tmp_path)
    loaded = load_model(tmp_path, tokenizer)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert_close(logits(loaded), logits(policy), atol=1e-5, rtol=0)


def test_the_experts_of_a_mixture_are_merged_too(tokenizer, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=14, num_key_value_heads=2, num_local_experts=4, **sizes))
    policy = Policy(model, tokenizer)
    before = logits(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        add_lora(policy, 4, seed=0)
    perturb(policy)
    assert any(".experts." in name for name in adapter_weights(policy))
    policy.save(tmp_path)
    assert_close(logits(load_model(tmp_path, tokenizer)), logits(policy), atol=1e-5, rtol=0)
    assert (logits(policy) - before).abs().max() > 0.01


def test_an_adapter_is_float32_beside_bfloat16_weights_and_merges_into_their_type(tokenizer):
    policy = Policy(make_model("llama").to(torch.bfloat16), tokenizer)
    add_lora(policy, 4, seed=0)
    perturb(policy)
    assert {p.dtype for p in adapter_weights(policy).values()} == {torch.float32}
    assert logits(policy).dtype == torch.bfloat16
    layer = policy.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["policy"].weight, layer.lora_B["policy"].weight
    by_hand = (layer.base_layer.weight.float() + 2 * b @ a).bfloat16()
    assert torch.equal(merged_state(policy.model)["model.layers.0.self_attn.q_proj.weight"], by_hand)


def test_without_adapters_what_is_saved_is_the_models_own_state(llama):
    state = llama.model.state_dict()
    assert adapters(llama.model) == []
    assert {name: t.data_ptr() for name, t in merged_state(llama.model).items()} == {
        name: t.data_ptr() for name, t in state.items()
    }


def test_all_adapters_are_kept_bit_by_bit_and_loaded_into_the_same_parameters(adapted, tmp_path, tokenizer):
    add_lora(adapted, 2, seed=1, name="critic")
    perturb(adapted, "critic")
    save_adapters(adapted, tmp_path)

    resumed = Policy(make_model(adapted.model.config.model_type), tokenizer)
    add_lora(resumed, 4, seed=8)
    add_lora(resumed, 2, seed=9, name="critic")
    parameters = list(resumed.parameters())
    load_adapters(resumed, tmp_path)
    assert all(p is now for p, now in zip(parameters, resumed.parameters(), strict=True))
    for name in ("policy", "critic"):
        with using_adapter(resumed.model, name), using_adapter(adapted.model, name):
            assert torch.equal(logits(resumed), logits(adapted))


@pytest.mark.parametrize(
    ("rank", "names", "message"),
    [
        (5, ["policy", "critic"], r"layers.0.mlp.down_proj.lora_A.critic.weight is \(4, 64\) there, \(5, 64\) here"),
        (4, ["policy"], r"down_proj.lora_A.critic.weight is \(4, 64\) there, missing here"),
        (4, ["policy", "critic", "judge"], r"down_proj.lora_A.judge.weight is missing there, \(4, 64\) here"),
    ],
)
def test_adapters_of_another_rank_or_name_are_refused_before_any_is_changed(
    llama, tokenizer, tmp_path, rank, names, message
):
    add_lora(llama, 4, seed=0)
    add_lora(llama, 4, seed=0, name="critic")
    save_adapters(llama, tmp_path)
    other = Policy(make_model("llama"), tokenizer)
    for name in names:
        add_lora(other, rank, seed=1, name=name)
    before = {name: p.clone() for name, p in other.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load_adapters(other, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())


def test_an_adapter_that_is_not_there_or_there_already_is_refused(llama):
    for name in (None, "policy"):
        with pytest.raises(ValueError, match=r"holds the adapters \[\], not"), using_adapter(llama.model, name):
            pass
    add_lora(llama, 4, seed=0)
    with (
        pytest.raises(ValueError, match=r"\['policy'\], not 'critic'; add it by add_lora"),
        using_adapter(llama.model, "critic"),
    ):
        pass
    with pytest.raises(ValueError, match="an adapter 'policy' already"):
        add_lora(llama, 4, seed=0)


def test_a_policy_built_on_an_adapted_model_speaks_alike(adapted, tokenizer):
    expected = logprobs(adapted)
    assert torch.equal(logprobs(Policy(adapted.model, tokenizer)), expected)


def test_without_peft_one_line_names_the_extra(monkeypatch):
    check_lora_installed()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"^LoRA needs peft: pip install 'textenv\[lora\]'$"):
        check_lora_installed()

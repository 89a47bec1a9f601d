"""The forward pass written out, held to transformers' own."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from agents.core.attention import Segments
from agents.core.decoder import FAMILIES, Decoder, unsupported
from agents.core.linear import PackedLinear, linear
from agents.core.lora import add_lora, merged_state, using_adapter
from agents.core.policy import Policy

VOCABULARY = 14
LENGTHS = [5, 6, 6, 9, 30, 3]
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
LONG_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2_SIZES = {"vocab_size": VOCABULARY, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 64}
OPT = OPTConfig(
    vocab_size=14, hidden_size=16, num_hidden_layers=1, ffn_dim=16, num_attention_heads=2, word_embed_proj_dim=16
)
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases, tied": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama with a longer rope": LlamaConfig(**SIZES, rope_parameters=LONG_ROPE),
    "llama with a padding id": LlamaConfig(**SIZES | {"pad_token_id": 3}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
    "gemma": GemmaConfig(**SIZES, head_dim=16),
    "gpt2": GPT2Config(**GPT2_SIZES, bos_token_id=None, eos_token_id=0),
}


def make(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
        else:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # norms and biases have a say
    return model


@pytest.fixture(params=CONFIGS)
def model(request):
    return make(CONFIGS[request.param])


def sequences():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def flat_logits(decoder, parts):
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    return decoder.head(decoder(torch.cat(parts), positions, Segments([len(part) for part in parts])))


def own_logits(model, parts):
    return torch.cat([model(part[None]).logits[0] for part in parts])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_known_family_is_tested():
    assert {type(make(config)).__name__ for config in CONFIGS.values()} == set(FAMILIES)


def test_flat_tokens_get_the_logits_and_gradients_of_transformers(model):
    parts = sequences()
    ours, theirs = flat_logits(Decoder(model), parts), own_logits(model, parts)
    assert_close(ours, theirs, rtol=0, atol=5e-5)
    ours, theirs = (gradients(model, logits.square().sum()) for logits in (ours, theirs))
    for name, grad in theirs.items():
        assert (ours[name] - grad).norm() <= 1e-4 * grad.norm(), name


@torch.no_grad()
def test_packed_weights_give_the_same_logits_whatever_the_model_s_own(model):
    parts = sequences()
    expected = own_logits(model, parts)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.mul_(0.3)
    decoder = Decoder(model, state)
    assert_close(flat_logits(decoder, parts), expected, rtol=0, atol=5e-5)


def test_a_sequence_does_not_see_its_neighbours(model):
    parts = sequences()
    decoder = Decoder(model)
    alone = flat_logits(decoder, parts[:1])
    parts[1] = (parts[1] + 1) % VOCABULARY
    assert_close(flat_logits(decoder, parts)[: LENGTHS[0]], alone, rtol=0, atol=5e-5)


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1], [1, 1, 7], [9, 3, 4, 5], [30, 31, 16, 40, 41]])
def test_segments_in_any_order_and_of_any_lengths_attend_alone(lengths):
    torch.manual_seed(0)
    query, key, value = (torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2))
    together = Segments(lengths)(0, query, key, value, 0.3)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        alone = torch.nn.functional.scaled_dot_product_attention(
            *(x[None, rows].transpose(1, 2) for x in (query, key, value)), is_causal=True, scale=0.3, enable_gqa=True
        )
        assert_close(together[rows], alone[0].transpose(0, 1).reshape(length, -1), rtol=0, atol=1e-5)
        start += length


def test_recomputed_layers_give_the_same_gradients(model):
    parts, decoder = sequences(), Decoder(model)
    plain = gradients(model, flat_logits(decoder, parts).square().sum())
    decoder.recompute = True
    again = gradients(model, flat_logits(decoder, parts).square().sum())
    for name, grad in plain.items():
        assert torch.equal(again[name], grad), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_part_of_the_model_live_and_merged(family, tokenizer):
    policy = Policy(make(CONFIGS[family]), tokenizer)
    parts, model = sequences(), policy.model
    before = own_logits(model, parts).detach()
    add_lora(policy, rank=2, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(2))
    ours, theirs = flat_logits(Decoder(model), parts), own_logits(model, parts)
    assert (ours - before).abs().max() > 0.1
    assert_close(ours, theirs, rtol=0, atol=1e-4)
    ours, theirs = (gradients(model, logits.square().sum()) for logits in (ours, theirs))
    assert all((ours[name] - grad).norm() <= 1e-4 * grad.norm() for name, grad in theirs.items() if "lora" in name)
    with torch.no_grad():
        packed = flat_logits(Decoder(model, merged_state(model)), parts)
        assert_close(packed, own_logits(model, parts), rtol=0, atol=1e-4)
        with using_adapter(model, None):
            assert_close(flat_logits(Decoder(model), parts), before, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (OPT, "OPTForCausalLM is none of LlamaForCausalLM"),
        (
            MistralConfig(**SIZES, sliding_window=8),
            "MistralForCausalLM has layers that do not look at the whole context",
        ),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
            "Qwen2ForCausalLM has layers that do not look at the whole context",
        ),
        (GPT2Config(**GPT2_SIZES, scale_attn_by_inverse_layer_idx=True), "scales its attention by layers"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rotary embedding 'dynamic' depends on the length",
        ),
    ],
    ids=["opt", "mistral", "qwen2", "gpt2", "rope"],
)
def test_a_model_that_is_not_known_is_refused_with_the_reason(config, reason):
    model = AutoModelForCausalLM.from_config(config)
    assert reason in unsupported(model)
    with pytest.raises(ValueError, match=reason):
        Decoder(model)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_product_with_weights_is_that_of_torch_gradients_included(rows, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 24, requires_grad=True), torch.randn(7, 24, requires_grad=True)
    bias = torch.randn(7, requires_grad=True) if bias else None
    inputs = [x, weight] if bias is None else [x, weight, bias]
    expected = torch.nn.functional.linear(x, weight, bias)
    got = linear(x, weight, bias)
    assert_close(got, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(rows, 7)
    for ours, theirs in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    added = torch.randn(rows, 7)
    with torch.no_grad():
        packed = PackedLinear(weight.detach(), None if bias is None else bias.detach())
        assert_close(packed(x), expected, rtol=1e-5, atol=1e-5)
        assert_close(packed(x, added.clone()), expected + added, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_packed_product_is_right_for_large_weights_too():
    torch.manual_seed(0)
    weight, x = torch.randn(700, 300), torch.randn(3, 300)
    assert_close(PackedLinear(weight)(x), x @ weight.t(), rtol=1e-4, atol=1e-4)


def test_what_was_computed_without_gradients_serves_with_them():
    model, parts = make(CONFIGS["llama"]), sequences()
    decoder = Decoder(model)
    with torch.inference_mode():
        flat_logits(decoder, parts)
    flat_logits(decoder, parts).sum().backward()
    assert model.model.embed_tokens.weight.grad.abs().sum() > 0

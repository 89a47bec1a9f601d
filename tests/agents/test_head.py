"""Log-probabilities from states and head: those of the full logits, with their gradient, whatever is kept of them."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from agents.core import head
from agents.core.head import token_logprobs
from agents.core.policy import Policy
from tests.agents.conftest import Undecodable, make_model

N, E, V = 16, 5, 14


@pytest.fixture(params=["kept", "recomputed", "piece by piece"])
def bounds(request, monkeypatch):
    """Enough for all probabilities; too little for them; and too little for more than two tokens' logits besides."""
    if request.param != "kept":
        monkeypatch.setattr(head, "KEPT", N * V - 1)
    if request.param == "piece by piece":
        monkeypatch.setattr(head, "AT_ONCE", 2 * V)


def make_inputs(dtype=torch.float32, bias=True, width=V):
    draw = torch.Generator().manual_seed(0)
    hidden_NE = torch.randn(N, E, dtype=dtype, generator=draw).requires_grad_()
    weight_VE = torch.randn(width, E, dtype=dtype, generator=draw).requires_grad_()
    bias_V = torch.randn(width, dtype=dtype, generator=draw).requires_grad_() if bias else None
    return (hidden_NE, weight_VE, bias_V), torch.randint(6, width, (N,), generator=draw)


def plain(policy, inputs, tokens_N, temperature):
    """By the policy's definition, from full logits."""
    logp_NV = policy.distribution(torch.nn.functional.linear(*inputs), temperature)
    entropy_N = torch.special.entr(logp_NV.exp()).sum(dim=1)
    return logp_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1), entropy_N


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("masked", [False, True])
def test_all_is_as_from_full_logits(bounds, llama, bias, temperature, masked):
    policy = Policy(make_model("llama"), Undecodable()) if masked else llama
    inputs, tokens_N = make_inputs(bias=bias)
    learned = [x for x in inputs if x is not None]
    weight_N = torch.linspace(-1, 1, N)
    expected_logp, expected_entropy = plain(policy, inputs, tokens_N, temperature)
    expected = torch.autograd.grad((expected_logp * weight_N).sum(), learned)
    allowed_V = policy.allowed_V if masked else None
    logp_N, entropy_N = token_logprobs(*inputs, tokens_N, temperature, allowed_V)
    assert not entropy_N.requires_grad
    assert_close(logp_N, expected_logp, atol=1e-6, rtol=1e-6)
    assert_close(entropy_N, expected_entropy.detach(), atol=1e-6, rtol=1e-6)
    for got, wanted in zip(torch.autograd.grad((logp_N * weight_N).sum(), learned), expected, strict=True):
        assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert_close(token_logprobs(*inputs, tokens_N, temperature, allowed_V), (logp_N, entropy_N), atol=0, rtol=0)


def test_the_gradient_agrees_with_finite_differences_in_double_precision(bounds):
    inputs, tokens_N = make_inputs(torch.float64)
    allowed_V = torch.arange(V) != 3
    assert torch.autograd.gradcheck(lambda *x: token_logprobs(*x, tokens_N, 0.7, allowed_V)[0], inputs)


def test_a_second_backward_pass_gives_the_same_gradient(bounds):
    inputs, tokens_N = make_inputs()
    logp_N, _ = token_logprobs(*inputs, tokens_N, 1.0, None)
    first, second = (torch.autograd.grad(logp_N.sum(), inputs, retain_graph=True) for _ in range(2))
    assert_close(first, second, atol=1e-6, rtol=1e-6)


def test_only_what_is_learned_has_a_gradient(bounds):
    (hidden_NE, weight_VE, bias_V), tokens_N = make_inputs()
    for learned in itertools.product([True, False], repeat=3):
        inputs = [x.detach().requires_grad_(on) for x, on in zip((hidden_NE, weight_VE, bias_V), learned, strict=True)]
        logp_N, _ = token_logprobs(*inputs, tokens_N, 1.0, None)
        assert logp_N.requires_grad == any(learned)
        if any(learned):
            logp_N.sum().backward()
        assert [x.grad is not None for x in inputs] == list(learned)


def test_a_disallowed_token_has_no_probability_and_its_row_of_the_head_no_gradient(bounds):
    (hidden_NE, weight_VE, bias_V), tokens_N = make_inputs()
    allowed_V = torch.arange(V) != tokens_N[0]
    logp_N, entropy_N = token_logprobs(hidden_NE, weight_VE, bias_V, tokens_N, 1.0, allowed_V)
    assert logp_N[0] == -torch.inf
    assert entropy_N.isfinite().all()
    logp_N[tokens_N != tokens_N[0]].sum().backward()
    assert not weight_VE.grad[tokens_N[0]].any()
    assert weight_VE.grad.isfinite().all()


def test_half_precision_rounds_the_logits_alone(bounds, llama):
    inputs, tokens_N = make_inputs(torch.bfloat16)
    expected_logp, expected_entropy = plain(llama, inputs, tokens_N, 0.8)
    logp_N, entropy_N = token_logprobs(*inputs, tokens_N, 0.8, None)
    assert logp_N.dtype == entropy_N.dtype == torch.float32
    assert_close(logp_N, expected_logp, atol=1e-6, rtol=1e-6)
    assert_close(entropy_N, expected_entropy, atol=1e-6, rtol=1e-6)
    weight_N = torch.linspace(-1, 1, N)
    expected = torch.autograd.grad((expected_logp * weight_N).sum(), inputs)
    for got, wanted in zip(torch.autograd.grad((logp_N * weight_N).sum(), inputs), expected, strict=True):
        assert got.dtype == torch.bfloat16
        assert_close(got, wanted, atol=0.02, rtol=0.02)


def test_a_sure_token_keeps_its_small_gradient_in_half_precision():
    """1 - p is 1e-4, which p in half precision, 1, would not tell."""
    hidden_NE = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight_VE = torch.tensor([[9.25], [0.0]], dtype=torch.bfloat16)
    token_logprobs(hidden_NE, weight_VE, None, torch.tensor([0]), 1.0, None)[0].sum().backward()
    assert hidden_NE.grad.item() == pytest.approx(9.25 * 9.6e-5, rel=0.02)


def test_no_tokens_have_no_logprobs_and_no_error(bounds):
    inputs, tokens_N = make_inputs()
    logp_N, entropy_N = token_logprobs(inputs[0][:0], *inputs[1:], tokens_N[:0], 1.0, None)
    assert len(logp_N) == len(entropy_N) == 0
    logp_N.sum().backward()


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if any(returned.alias_info is not None for returned in func._schema.returns):
            return made  # a view, or what was there before
        sizes = [x.numel() for x in (made if isinstance(made, tuple | list) else [made]) if isinstance(x, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return made


def test_beyond_the_bound_nothing_as_large_as_the_logits_is_ever_made(monkeypatch):
    inputs, tokens_N = make_inputs(width=200)
    monkeypatch.setattr(head, "AT_ONCE", 8 * 200)
    for kept, most in ((N * 200, N * 200), (N * 200 - 1, 8 * 200)):
        monkeypatch.setattr(head, "KEPT", kept)
        with Largest() as largest:
            token_logprobs(*inputs, tokens_N, 0.7, None)[0].sum().backward()
        assert largest.entries == most


def test_a_frozen_head_costs_no_gradient_of_its_own(monkeypatch):
    (hidden_NE, weight_VE, bias_V), tokens_N = make_inputs(width=200)
    monkeypatch.setattr(head, "KEPT", 0)
    monkeypatch.setattr(head, "AT_ONCE", 8 * 200)
    with Largest() as largest:
        token_logprobs(hidden_NE, weight_VE.detach(), bias_V.detach(), tokens_N, 0.7, None)[0].sum().backward()
    assert largest.entries == 8 * 200

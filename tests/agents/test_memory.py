"""What a training takes is told before it, a micro-batch that the memory does not hold is halved, and no result changes."""

import json
import multiprocessing
import re
import resource
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from agents.core import linear, memory
from agents.core.critic import Critic
from agents.core.head import AT_ONCE, KEPT
from agents.core.learner import Learner
from agents.core.lora import add_lora
from agents.core.memory import Forecast, _Alive, head_bytes, is_out_of_memory, longest, microbatch_bytes, needing
from agents.core.usage import memory_peak_mb
from agents.grpo import GRPO
from agents.ppo import PPO
from agents.sft import SFT
from tests.agents.test_critic import make_critic
from tests.agents.test_learner_memory import gradient, make_batch, step
from tests.agents.test_packing import make_policy
from textenv import Source

ENV = "textenv/ProbeLength-v0"
NO_MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    "onednn": RuntimeError("could not create a primitive"),
    "python": MemoryError("Unable to allocate 2.00 GiB"),
}


@contextmanager
def scarce(policy, most, kind="cuda", moment="forward"):
    """Within, a micro-batch of more than ``most`` tokens, padding included, finds no memory. Gives what sizes were tried."""
    states, tried = policy.states, []

    def watched(tokens_RT, sampled_RT):
        tried.append(tokens_RT.numel())
        if moment == "forward" and tried[-1] > most:
            raise NO_MEMORY[kind]
        return states(tokens_RT, sampled_RT)

    def fail(grad):
        if tried[-1] > most:
            raise NO_MEMORY[kind]

    policy.states = watched
    # The last parameter that has its gradient: all others have been added to theirs by then.
    hook = policy.model.get_input_embeddings().weight.register_hook(fail) if moment == "backward" else None
    try:
        yield tried
    finally:
        del policy.states
        if hook is not None:
            hook.remove()


# --- What the memory does not hold is halved ---


@pytest.mark.parametrize("kind", NO_MEMORY)
@pytest.mark.parametrize("moment", ["forward", "backward"])
def test_without_memory_for_a_micro_batch_it_is_halved_and_the_gradient_is_that_of_small_ones(kind, moment, capsys):
    policy, batch = make_batch()
    learner = Learner(policy, critic=Critic(policy.hidden_size, policy.device), tokens_per_microbatch=10**9)
    width = int(batch.length_B.max())
    with scarce(policy, 3 * width, kind, moment) as tried:
        metrics = step(learner, batch)
    failed = [tokens for tokens in tried if tokens > 3 * width]
    assert failed[0] == 8 * width
    limit = learner.tokens_per_microbatch
    assert limit == failed[-1] // 2  # of what was tried, not of the limit
    assert f"a micro-batch of 8 rows of {width} tokens found no memory: from now on" in capsys.readouterr().out
    kept = gradient(policy), gradient(learner.critic)
    small = Learner(policy, critic=Critic(policy.hidden_size, policy.device), tokens_per_microbatch=limit)
    assert step(small, batch) == metrics
    assert_close((gradient(policy), gradient(small.critic)), kept, atol=0, rtol=0)


def test_what_the_first_attempt_noted_of_the_episodes_is_written_over():
    policy, batch = make_batch()
    with scarce(policy, 3 * int(batch.length_B.max()), moment="backward"):
        step(Learner(policy), batch)
    halved = batch.noted.copy()
    batch.noted.clear()
    step(Learner(policy), batch)
    assert_close(halved, batch.noted, equal_nan=True, atol=1e-5, rtol=1e-5)


def test_another_batch_beside_it_is_halved_too():
    policy, batch = make_batch()
    learner, width = Learner(policy), int(batch.length_B.max())

    def loss(scored):
        return -scored.logp_RT.sum() / 100, {}

    with scarce(policy, 3 * width) as tried:
        learner.step(batch, torch.tensor([0]), loss, beside=(batch, loss))
    assert tried[1] == 8 * width
    halved = gradient(policy)
    Learner(policy).step(batch, torch.tensor([0]), loss, beside=(batch, loss))
    assert_close(halved, gradient(policy), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("what", ["logprobs", "logprobs_and_values"])
def test_passes_without_a_gradient_are_halved_too(what):
    policy, batch = make_batch()
    width = int(batch.length_B.max())
    learner = Learner(policy, critic=Critic(policy.hidden_size, policy.device))
    whole = getattr(learner, what)(batch, batch.rows)
    with scarce(policy, 2 * width) as tried:
        halved = getattr(learner, what)(batch, batch.rows)
    assert tried[0] > 2 * width >= learner.tokens_per_microbatch
    assert_close(halved, whole, atol=1e-5, rtol=1e-5)


def test_a_single_row_without_memory_is_an_error_that_says_what_to_do():
    policy, batch = make_batch()
    learner = Learner(policy)
    with (
        scarce(policy, 1),
        pytest.raises(RuntimeError, match=r"a single row, of \d+ tokens, found no memory \(CUDA .*\); lower") as raised,
    ):
        step(learner, batch)
    assert raised.value.__cause__ is NO_MEMORY["cuda"]
    assert not is_out_of_memory(raised.value)


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    policy, batch = make_batch()
    learner = Learner(policy)
    monkeypatch.setattr(policy, "states", lambda *_: 1 + torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        step(learner, batch)
    assert learner.tokens_per_microbatch == 16_384


def test_without_memory_for_the_optimisers_state_nothing_is_halved(monkeypatch):
    policy, batch = make_batch()
    learner = Learner(policy)
    monkeypatch.setattr(learner.optimizer, "step", lambda: (_ for _ in ()).throw(NO_MEMORY["cuda"]))
    with pytest.raises(RuntimeError, match=r"the optimiser's state found no memory .*; set save_memory to 'offload'"):
        step(learner, batch)
    assert (learner.tokens_per_microbatch, policy.version) == (16_384, 0)


def starve(folder, share):
    """Two steps on rows of 200 tokens, in a process with this share of the memory that a whole micro-batch of them takes."""
    torch.set_num_threads(1)
    linear._by_onednn = lambda *_: False  # a program that it had no memory to make it may never make again
    policy = make_batch()[0]
    learner = Learner(policy, tokens_per_microbatch=10**9)
    learner.set_learning_rate(1e-3)
    batch = longest(learner, 96, 200, 100)
    needed = microbatch_bytes(learner, 96, 200, 100) / memory.GAPS
    limit = psutil.Process().memory_info().vms + int(share * needed)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for _ in range(2):
        step(learner, batch)
    save_file({"limit": torch.tensor(learner.tokens_per_microbatch)} | policy.model.state_dict(), folder / f"{share}")


@pytest.mark.slow
def test_a_process_without_memory_learns_the_same(tmp_path):
    context = multiprocessing.get_context("forkserver")
    for share in (0.4, 10):
        process = context.Process(target=starve, args=(tmp_path, share))
        process.start()
        process.join(300)
        assert process.exitcode == 0
    starved, free = (load_file(tmp_path / f"{share}") for share in (0.4, 10))
    assert starved.pop("limit") <= 96 * 200 / 2
    assert free.pop("limit") == 10**9
    assert_close(starved, free, atol=1e-5, rtol=1e-4)


# --- What it will take ---


def pass_of(family, lora=False):
    policy = make_policy(family, make_batch()[0].tokenizer, vocab_size=97, max_position_embeddings=512)
    if lora:
        add_lora(policy, 4, seed=0)
    return policy


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"save_memory": "recompute"}),
        ("llama", {"lora": True}),
        ("llama", {"critic": "separate"}),
        ("llama", {"critic": "lora"}),
        ("qwen2", {}),
        ("gpt2", {}),
        ("gemma2", {}),
        ("gemma2", {"save_memory": "recompute"}),
    ],
    ids=str,
)
def test_small_passes_tell_what_a_large_one_keeps(family, options, tmp_path, monkeypatch):
    policy = pass_of(family, options.pop("lora", False))
    critic = options.pop("critic", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tokens are scored by the model itself")
        learner = Learner(policy, critic=critic and make_critic(critic, policy, tmp_path), **options)
        told = microbatch_bytes(learner, 9, 251, 125)
        monkeypatch.setattr(memory, "PROBE", 10**6)
        policy.max_context = None
        measured = microbatch_bytes(learner, 9, 251, 125)
    assert told == pytest.approx(measured, rel=0.1)
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_what_three_passes_tell_worked_by_hand(llama, monkeypatch):
    """Of two operations: 1,000 and for each row 3 T + T²; 5,000 and for each row T."""

    def alive(learner, batch):
        rows, tokens = len(batch), batch.tokens_BT.shape[1] - 1
        return np.array([0, 1000 + rows * (3 * tokens + tokens**2), 5000 + rows * tokens], dtype=float)

    monkeypatch.setattr(memory, "alive_after_each", alive)
    monkeypatch.setattr(memory, "GAPS", 1)
    monkeypatch.setattr(memory, "head_bytes", lambda *_: 0)
    assert microbatch_bytes(Learner(llama), 7, 1001, 10) == 1000 + 7 * (3 * 1000 + 1000**2)
    monkeypatch.setattr(memory, "head_bytes", lambda *_: 10**9)
    assert microbatch_bytes(Learner(llama), 7, 1001, 10) == 10**9


def test_what_is_alive_worked_by_hand():
    held = torch.ones(10)
    with _Alive() as alive:
        view = held.view(2, 5)
        kept = view + 1
        (kept * 2).add_(1)
        del kept
    assert alive.after == [0, 40, 80, 80]
    assert alive.now == 0


def test_the_head_worked_by_hand(llama):
    learner = Learner(llama)
    # 14 ids of width 32: the slopes of 300 tokens, twice their logits, the weight's gradient, and the states' and its pieces.
    assert head_bytes(learner, 3, 100) == 4 * (300 * 14 + 2 * 300 * 14 + 14 * 32 + 2 * 300 * 32)
    # Of a long row more than is kept: no slopes, and the logits of one piece.
    tokens = KEPT // 14 + 1
    assert head_bytes(learner, 3, tokens) == 4 * (2 * AT_ONCE + 14 * 32 + 2 * 3 * tokens * 32)


def test_the_parts_of_a_forecast_worked_by_hand():
    mib = 2**20
    held, in_turn = {"gradient": 4 * mib, "optimiser": 8 * mib}, {"micro-batch": 100 * mib, "generation": 30 * mib}
    forecast = Forecast(300 * mib, 200 * mib, held, in_turn)
    assert (forecast.more, forecast.peak) == (112 * mib, 312 * mib)
    parts = "now 200, gradient 4, optimiser 8, micro-batch 100 or generation 30"
    assert str(forecast) == f"312 MiB predicted at the peak, were all answers as long as may be ({parts})"
    grown = Forecast(400 * mib, 200 * mib, held, in_turn)
    assert grown.peak == 400 * mib
    assert str(grown).endswith(f"({parts}; it was 400 before)")


@pytest.fixture
def agent(tmp_path, fresh_model, config):
    model = fresh_model(ENV)

    def agent(run="run", agent_class=GRPO, *, resume=False, **changes):
        quick = {
            "prompts_per_step": 2,
            "group_size": 4,
            "eval_episodes": 2,
            "checkpoint_every": 1,
            "total_episodes": 48,
        }
        if agent_class is SFT:
            del quick["group_size"]
        settings = config(model, agent_class, **quick | {"run_dir": str(tmp_path / run)} | changes)
        return agent_class(ENV, settings, resume=resume)

    return agent


def test_what_is_held_depends_on_the_settings(agent):
    parameters = sum(parameter.numel() for parameter in agent("one").policy.parameters())
    plain = memory.predict(agent("two"))
    assert plain.held == {"gradient": 4 * parameters, "optimiser": 8 * parameters}
    assert plain.in_turn.keys() == {"micro-batch", "generation"}
    assert memory.predict(agent("three", staleness=1)).held.keys() == {"gradient", "optimiser", "generation"}
    offloading = agent("four")
    offloading.learner.offloads = True
    assert memory.predict(offloading).in_turn.keys() == {"micro-batch", "generation", "optimiser"}
    adapted = memory.predict(agent("five", lora_rank=2))
    assert adapted.held["gradient"] < plain.held["gradient"]
    critics = memory.predict(agent("six", PPO, critic="separate"))
    assert critics.held["gradient"] > 1.5 * plain.held["gradient"]


def test_the_fullest_micro_batch_is_of_the_longest_rows(agent):
    task = agent("one").task
    length, new = task.max_tokens, task.max_new_tokens
    assert memory.fullest(agent("two")) == (8, length, new)
    assert memory.fullest(agent("three", updates_per_batch=3)) == (3, length, new)
    assert memory.fullest(agent("four", tokens_per_microbatch=2 * length + 1)) == (2, length, new)
    assert memory.fullest(agent("five", tokens_per_microbatch=1)) == (1, length, new)
    assert memory.fullest(agent("six", SFT)) == (2, length, new)


def test_rows_that_are_tried_share_no_beginning(llama):
    batch = longest(Learner(llama), 12, 30, 20)
    assert len(batch.tokens_BT[:, 0].unique()) == 12
    assert batch.sampled_BT.sum(dim=1).tolist() == [20] * 12
    assert (batch.source_BT != Source.PAD).all()


def told(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("memory: ")]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"save_memory": "recompute"}], ids=str)
def test_the_prediction_is_near_the_peak_of_a_process(options):
    """What a process reaches, with the gaps that its heap happens to have."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=reach, args=(theirs, options))
    process.start()
    predicted, reached = ours.recv()
    process.join(60)
    assert 0.7 < predicted / reached < 1.4


def reach(pipe, options):
    torch.set_num_threads(1)
    learner = Learner(pass_of("llama"), tokens_per_microbatch=10**9, **options)
    rows = 400
    predicted = memory.in_use(torch.device("cpu")) + microbatch_bytes(learner, rows, 200, 100)
    learner.rehearse(longest(learner, rows, 200, 100))
    pipe.send((predicted / 2**20, memory_peak_mb(torch.device("cpu"))))


# --- The dry run ---


@pytest.mark.parametrize("agent_class", [GRPO, PPO, SFT], ids=lambda agent_class: agent_class.name)
def test_a_run_with_a_dry_run_is_bit_by_bit_one_without(agent, monkeypatch, capsys, agent_class):
    runs, rehearse = {}, Learner.rehearse
    for tight in (0, 10**9, None):
        monkeypatch.setattr(memory, "TIGHT", tight or 0)
        monkeypatch.setattr(Learner, "rehearse", (lambda *_: None) if tight is None else rehearse)
        trained = agent(f"{agent_class.name}-{tight}", agent_class)
        state = torch.get_rng_state()
        trained.learn()
        assert torch.equal(torch.get_rng_state(), state)
        lines = [json.loads(line) for line in Path(trained.config.run_dir, "metrics.jsonl").read_text().splitlines()]
        measured = re.compile("seconds|tokens_per_second|time_.*|memory_peak_mb|mfu")
        kept = [{name: line[name] for name in line if not measured.fullmatch(name)} for line in lines]
        runs[tight] = kept, trained.policy.model.state_dict()
        shown = told(capsys)
        assert len(shown) == 2
        assert ("the dry run of 1 ×" in shown[0]) == (tight == 10**9)
        assert re.fullmatch(r"memory: [\d,]+ MiB at the peak, [\d,]+ predicted", shown[1])
    for tight in (0, 10**9):
        assert runs[tight][0] == runs[None][0]
        assert_close(runs[tight][1], runs[None][1], atol=0, rtol=0)


def test_a_dry_run_leaves_nothing_behind(agent, monkeypatch):
    monkeypatch.setattr(memory, "TIGHT", 0)
    tried = agent()
    before = {name: tensor.clone() for name, tensor in tried.policy.model.state_dict().items()}
    memory.foresee(tried)
    assert_close(tried.policy.model.state_dict(), before, atol=0, rtol=0)
    assert all(parameter.grad is None for parameter in tried.policy.parameters())
    assert (tried.policy.version, tried.flops, len(tried.learner.optimizer.state)) == (0, 0.0, 0)


def test_what_is_too_much_is_said_with_what_to_do_and_the_training_goes_on(agent, monkeypatch, capsys):
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    assert agent().learn().last_training.step == 6
    warning, forecast, _ = told(capsys)
    assert (
        "MiB more, but 0 are free; lower tokens_per_microbatch from 16384, lower max_tokens, set save_memory" in warning
    )
    assert "the dry run of 8 ×" in forecast


def test_a_dry_run_without_memory_halves_before_the_first_step(agent, monkeypatch, capsys):
    monkeypatch.setattr(memory, "TIGHT", 0)
    starved = agent()
    length = starved.task.max_tokens
    with scarce(starved.policy, 4 * length):
        memory.foresee(starved)
    assert starved.learner.tokens_per_microbatch == 4 * length
    shown = capsys.readouterr().out
    assert (
        f"a micro-batch of 8 rows of {length} tokens found no memory: from now on one has at most {4 * length}" in shown
    )
    assert f"the dry run of 4 × {length} tokens reached" in shown


@pytest.mark.parametrize("agent_class", [GRPO, pytest.param(PPO, marks=pytest.mark.slow)], ids=["grpo", "ppo"])
def test_a_run_that_was_halved_goes_on_with_small_micro_batches(agent, monkeypatch, agent_class):
    """On a machine that would hold large ones, whose sums differ in their last digits."""
    monkeypatch.setattr(memory, "microbatch_bytes", lambda *_: 0)  # which passes of many tokens tell
    whole = agent("whole", agent_class)
    with scarce(whole.policy, 20):
        whole.learn()
    limit = whole.learner.tokens_per_microbatch
    assert limit <= 20
    stopped = agent("run", agent_class)
    with scarce(stopped.policy, 20):
        stopped.learn(callback=lambda training: training.step < 3)
    resumed = agent("run", agent_class, resume=True)
    assert resumed.learner.tokens_per_microbatch == limit
    resumed.learn()
    assert_close(resumed.policy.model.state_dict(), whole.policy.model.state_dict(), atol=0, rtol=0)


def test_what_found_no_memory_is_named():
    with (
        pytest.raises(RuntimeError, match=r"a tower found no memory \(Unable to allocate 2.00 GiB\); build lower"),
        needing("a tower", "build lower"),
    ):
        raise NO_MEMORY["python"]
    with pytest.raises(ValueError, match="other"), needing("a tower"):
        raise ValueError("other")

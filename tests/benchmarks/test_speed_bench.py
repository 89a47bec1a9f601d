"""`textenv bench speed`: its arguments, its tables and its parts at toy sizes. No test looks at a clock."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch

from agents.core.engines import native
from agents.core.engines.base import Sampling
from agents.core.engines.native import NativeEngine
from agents.core.learner import Learner
from agents.grpo import GRPO
from benchmarks.commands import speed
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import learner as gpu_learner
from benchmarks.gpu import step as gpu_step
from benchmarks.gpu.sizes import HALF_BILLION, ONE_AND_A_HALF_BILLION, SCRATCH
from benchmarks.sample_efficiency import ENV_ID, ENV_OPTIONS, OURS, Goal, Point, arithmetic, fresh_policy
from benchmarks.speed import arithmetic as arithmetic_part
from benchmarks.speed import bench as suite
from benchmarks.speed import generation, limits, logprobs, packing, step, sync
from benchmarks.speed.memory import extra_peak
from benchmarks.speed.report import Settings, Table
from benchmarks.speed.shapes import (
    LARGE,
    MIDDLE,
    SMALL,
    TOY,
    Shape,
    random_batch,
    random_prompts,
    tokenizer_of,
    uneven_lengths,
)

QUICK = Settings(rounds=1, quick=True)
BY_HAND = Shape("by hand", hidden=4, layers=2, heads=2, intermediate=8, vocab=10, kv_heads=1)


class EnoughError(Exception):
    """Ends a program that measures for ever."""


def turns(num):
    """A turn in this process that wants ``num`` measurements, and the measurements."""
    results = []

    def turn(result):
        results.append(result)
        if len(results) > num:
            raise EnoughError
        return None

    return turn, results


@pytest.fixture
def alone(monkeypatch):
    """Nothing of the peers is installed."""
    for module in (generation, step, sync, arithmetic_part, gpu_step):
        monkeypatch.setattr(module, "find_spec", lambda name: None)


# The command


def test_an_unknown_part_is_refused_with_the_nearest_name():
    with pytest.raises(
        ValueError, match="no part 'genration'; did you mean generation\\? there are generation, step, "
    ):
        speed(only=("step", "genration"))
    with pytest.raises(ValueError, match="no part 'learn'; did you mean learner\\?"):
        gpu.main(only=("learn",), device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="torch finds no GPU"):
        speed(device="cuda")
    with pytest.raises(ValueError, match="torch finds no GPU"):
        gpu.main(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("setting", ["rounds", "threads"])
def test_nothing_is_measured_less_than_once(setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, got 0"):
        speed(**{setting: 0})


def test_a_file_without_a_folder_is_refused_before_anything_is_measured(tmp_path):
    with pytest.raises(ValueError, match=r"no folder .*missing to write speed\.md to"):
        speed(out=tmp_path / "missing" / "speed.md")


def test_tables_are_shown_and_kept_with_command_and_machine(tmp_path, capsys, monkeypatch, alone):
    monkeypatch.setattr(sys, "argv", ["textenv", "bench", "speed", "--only", "packing"])
    out = tmp_path / "speed.md"
    speed(only=("packing", "sync"), rounds=1, quick=True, out=out)
    printed, written = capsys.readouterr().out, out.read_text()
    assert written.startswith("`textenv bench speed --only packing`\n\n2")
    assert ", threads 1\n" in written
    assert "| the learner's step | " in written
    assert "Not measured: there is no vllm" in written
    for title in ("## a learner's step on 24", "## in-place sync of vLLM"):
        assert title in written
        assert title.removeprefix("## ") in printed


def test_a_table_as_markdown():
    table = Table("title", ("a", "b"), [["1", "2"], ["3", "4"]], ("A note.",))
    assert table.markdown() == "## title\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n\nA note.\n"
    assert Table("title", ("a",), (), ("Nothing.",)).markdown() == "## title\n\nNothing.\n"


def test_every_part_is_a_module_that_runs():
    for package, parts in (("benchmarks.speed", suite.PARTS), ("benchmarks.gpu", gpu.PARTS)):
        for part in parts:
            assert callable(suite.import_module(f"{package}.{part}").run)


# Shapes and limits


def test_flops_and_bytes_of_a_token_by_hand():
    # a layer: 4·4 for queries and output each, 4·2 for keys and values each, 3·4·8 in the feed-forward part
    assert BY_HAND.layer_weights == 2 * (16 + 16 + 8 + 8 + 96) == 288
    assert BY_HAND.head_weights == 40
    assert BY_HAND.token_flops(3) == 2 * (288 + 40) + 2 * (2 * 2 * 4 * 3) == 752
    assert BY_HAND.weight_bytes(4) == 1312
    assert BY_HAND.cache_bytes(4) == 2 * 2 * 2 * 4 == 32
    # three times the forward: weights of layers for 3 tokens, of the head for 2, and 1 + 2 + 3 tokens attended to
    assert BY_HAND.update_flops(np.array([3]), np.array([2])) == pytest.approx(
        3 * (2 * 288 * 3 + 2 * 40 * 2 + 4 * 2 * 4 * 4.5)
    )


def test_costs_of_a_generation_by_hand():
    flops_T, bytes_T = limits.step_costs(BY_HAND, prompt=2, length_B=np.array([1, 3]), itemsize=4)
    assert flops_T.tolist() == [2 * 752, 656 + 128, 656 + 160]
    assert bytes_T.tolist() == [1312 + 2 * 3 * 32, 1312 + 4 * 32, 1312 + 5 * 32]


def test_each_step_is_bound_by_what_takes_longer():
    flops_T, bytes_T = np.array([10.0, 10.0]), np.array([4.0, 40.0])
    assert limits.least_seconds(flops_T, bytes_T, flop_rate=10, byte_rate=10) == (1 + 4, "bytes")
    assert limits.least_seconds(flops_T, bytes_T, flop_rate=1, byte_rate=10) == (10 + 10, "flops")


def test_rates_are_of_what_is_asked():
    assert limits.matmul_rate("cpu", torch.float32, 16) > 0
    assert limits.read_rate("cpu", torch.float32, 100) > 0


@pytest.mark.parametrize(
    "shape", [TOY, dataclasses.replace(TOY, kv_heads=1, tied=True), SMALL], ids=["toy", "tied", "0.8M"]
)
def test_a_model_has_the_weights_that_its_shape_counts(shape):
    named = dict(shape.policy().model.named_parameters())
    matrices = {name: weight.numel() for name, weight in named.items() if weight.dim() == 2}
    assert sum(size for name, size in matrices.items() if ".layers." in name) == shape.layer_weights
    assert ("lm_head.weight" in matrices) != shape.tied
    assert matrices["model.embed_tokens.weight" if shape.tied else "lm_head.weight"] == shape.head_weights


@pytest.mark.parametrize(
    "shape", [SMALL, MIDDLE, LARGE, logprobs.SHAPE, HALF_BILLION, ONE_AND_A_HALF_BILLION, SCRATCH], ids=lambda s: s.name
)
def test_a_shape_is_named_after_its_parameters(shape):
    total = shape.layer_weights + shape.head_weights * (1 if shape.tied else 2)
    named = float(shape.name[:-1]) * {"M": 1e6, "B": 1e9}[shape.name[-1]]
    assert total == pytest.approx(named, rel=0.04)


@pytest.mark.parametrize("vocab", [10, 97, 512])
def test_a_tokenizer_of_any_size(vocab):
    tokenizer = tokenizer_of(vocab)
    assert tokenizer.vocab_size == vocab
    assert tokenizer.encode(tokenizer.decode([1, vocab - 1])) == [1, vocab - 1]


def test_a_random_batch_has_the_lengths_that_are_asked():
    batch = random_batch(97, 3, np.array([2, 5]))
    assert batch.length_B.tolist() == [5, 8]
    assert batch.sampled_BT.sum(dim=1).tolist() == [2, 5]
    assert not batch.sampled_BT[:, :3].any()


# Generation


def test_generation_compares_the_engines(alone):
    (table,) = generation.run(QUICK)
    engines = {row[1] for row in table.rows}
    assert {generation.NATIVE, "native, 1 a prompt", "transformers generate", "vLLM"} - engines == {"vLLM"}
    assert any(engine.startswith("limit, float32 (") for engine in engines)
    assert {row[0] for row in table.rows} == {"8 × 2 tokens", "16 of 1 to 6 tokens"}
    assert "vLLM is not installed, so it is not measured." in table.notes


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_is_measured_where_the_processor_is_able(able, alone, monkeypatch):
    for module in (generation, native):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda device: able)
    (table,) = generation.run(QUICK)
    assert (generation.HALF in {row[1] for row in table.rows}) == able


def test_native_writes_as_many_tokens_as_it_is_credited_with():
    written = []

    class Noting(NativeEngine):
        def generate(self, *arguments, **named):
            written.append(super().generate(*arguments, **named))

    length_B = uneven_lengths(16, 12)
    generation.native(Noting(TOY.policy()), random_prompts(2, 4, TOY.vocab), 8, length_B)
    assert [len(tokens) for tokens in written[0].tokens] == length_B.tolist()
    assert len(np.unique(length_B)) > 1


def test_transformers_writes_until_the_longest_ends(monkeypatch):
    policy = TOY.policy()
    written = []
    generate = policy.model.generate
    monkeypatch.setattr(policy.model, "generate", lambda *given, **named: written.append(generate(*given, **named)))
    generation.transformers_generate(policy, random_prompts(2, 4, TOY.vocab), np.array([1, 5]))
    assert written[0].shape == (2, 4 + 5)


# A step


def test_laps_are_means_of_the_steps_of_a_turn():
    turn, results = turns(2)
    laps = step.Laps(turn, steps=2)

    def train():
        for number in range(100):
            laps.add({"tokens": number})
            laps.end_step()

    with pytest.raises(EnoughError):
        train()
    assert results[0] is None  # the steps that set things up count nowhere
    first = step.WARM_UP
    assert [result["tokens"] for result in results[1:]] == [first + 0.5, first + 2.5]
    assert all(result["seconds"] >= 0 for result in results[1:])


def test_an_agent_is_measured_step_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr(step, "WARM_UP", 1)
    fresh_policy(arithmetic()).save(tmp_path)
    turn, results = turns(1)
    settings = {**OURS, "prompts_per_step": 2, "group_size": 2, "model": str(tmp_path), "env_options": ENV_OPTIONS}
    with pytest.raises(EnoughError):
        step.train_agent(step.Laps(turn, 1), GRPO, ENV_ID, settings)
    assert 4 <= results[1]["tokens"] <= 4 * 8  # of two problems with two completions of at most eight tokens
    assert results[1]["seconds"] > 0


def test_the_tables_of_a_step_by_hand():
    def figures(seconds, tokens, **parts):
        return [{"seconds": seconds, "tokens": tokens, **parts}] * 2

    measured = {name: figures(0.2, 100.0) for name in step.AGENTS} | {step.TRL_GRPO: figures(0.6, 1.0)}
    measured[step.OUR_GRPO] = figures(0.1, 50.0, time_generate=0.02, time_score=0.03)
    measured["DAPO"] = figures(0.3, 100.0)
    trainers = step.trainers_table(measured, "title")
    assert trainers.rows[1] == [step.TRL_GRPO, "0.6000 [0.6000–0.6000]", "6.00 [6.00–6.00]"]
    parts = {row[0]: row[2] for row in step.parts_table(measured[step.OUR_GRPO]).rows}
    assert parts == {
        "generate": "0.20 [0.20–0.20]",
        "score": "0.30 [0.30–0.30]",
        "the rest": "0.50 [0.50–0.50]",
        "whole step": "1.00 [1.00–1.00]",
    }
    agents = {row[0]: row[2:] for row in step.agents_table(measured).rows}
    assert agents["DAPO"] == ["1.50 [1.50–1.50]", "1.3"]  # three times the seconds for twice the tokens
    assert agents["RAFT"] == ["1.00 [1.00–1.00]", "1.3"]


def test_a_peer_that_is_missing_is_named():
    table = step.trainers_table({step.OUR_GRPO: [{"seconds": 1.0}]}, "title")
    assert len(table.rows) == 1
    assert "TRL is not installed" in table.notes[0]


def test_seconds_to_the_goal_are_held_against_ours():
    def run(samples, seconds):
        return [Point(0, 0.0, 0.3), Point(samples, seconds, 0.9)]

    curves = {"grpo": [run(100, 5.0), run(300, 7.0), run(200, 9.0)], "trl-grpo": [run(400, 21.0)]}
    rows = arithmetic_part.table(curves, Goal()).rows
    assert rows == [["grpo", "100 / 300 / 200", "5 / 7 / 9", "1.00 ×"], ["trl-grpo", "400", "21", "3.00 ×"]]
    never = {"grpo": [[Point(0, 0.0, 0.3)]], "trl-grpo": curves["trl-grpo"]}
    assert [row[-1] for row in arithmetic_part.table(never, Goal()).rows] == ["–", "–"]


# The learner


@pytest.mark.parametrize("name", [logprobs.OURS, logprobs.FULL])
def test_a_step_is_measured_in_seconds_and_memory(name):
    turn, results = turns(1)
    with pytest.raises(EnoughError):
        logprobs.step_cost(turn, name, QUICK)
    took, extra = results[1]
    assert results[0] is None
    assert took > 0
    assert extra >= 0


@pytest.mark.parametrize("max_grad_norm", [0.01, math.inf])
def test_both_ways_take_the_same_step(max_grad_norm):
    batch = random_batch(TOY.vocab, 4, np.array([3, 8, 5]))
    gradients = []
    for one_step in (logprobs.own_step, logprobs.full_step):
        learner = Learner(TOY.policy(endless=False), max_grad_norm=max_grad_norm)
        one_step(learner, batch)
        gradients.append(packing.gradient(learner))
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-7)


def test_memory_that_a_call_takes_is_seen_whatever_was_taken_before():
    torch.ones(256 * 2**20 // 4).sum()
    extra = extra_peak("cpu", lambda: torch.ones(64 * 2**20 // 4).sum())
    assert 60 * 2**20 < extra < 80 * 2**20


def test_packing_compares_steps_with_equal_gradients():
    (table,) = packing.run(QUICK)
    assert [row[0] for row in table.rows] == [packing.OURS, packing.PADDED]


def test_packing_refuses_steps_with_other_gradients(monkeypatch):
    def wrong_step(learner, batch):
        logprobs.full_step(learner, batch)
        next(learner.policy.parameters()).grad.mul_(1.01)

    monkeypatch.setattr(packing, "full_step", wrong_step)
    with pytest.raises(RuntimeError, match="the two ways differ"):
        next(packing.run(QUICK))


def test_lengths_are_mixed_and_within_their_bounds():
    length_B = packing.mixed_lengths(24, 16, 512)
    assert length_B.max() == 512
    assert length_B.min() == 16
    assert len(length_B) == 24
    assert np.median(length_B) < 160


# On a GPU, tried on a CPU


def test_the_gpus_programs_run_at_toy_sizes_on_a_cpu(tmp_path, alone):
    gpu.main(only=("generation", "learner"), rounds=1, device="cpu", quick=True, out=tmp_path)
    written = (tmp_path / "results.md").read_text()
    for title in ("## generation, toy", "## memory of generation, toy", "## a learner's step, toy"):
        assert title in written
    assert "share of a matrix product's" in written
    assert "MFU" not in written  # there is no data sheet of a CPU


@pytest.mark.parametrize(
    ("name", "rate"), [("NVIDIA H200", 989e12), ("NVIDIA H100 80GB HBM3", 989e12), ("other", None)]
)
def test_a_data_sheet_is_that_of_the_gpu(name, rate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert gpu_learner.data_sheet("cuda") == rate


def test_a_coin_is_fair_and_always_falls_the_same_way():
    flips = [gpu_step.flip("", str(number), None) for number in range(1000)]
    assert set(flips) == {0.0, 1.0}
    assert abs(np.mean(flips) - 0.5) < 4 * math.sqrt(0.25 / 1000)
    assert flips[7] == gpu_step.flip("another", "7", None)


def test_completions_of_the_saved_model_end_as_often_as_wanted(tmp_path):
    size = gpu_step.sizes(QUICK)
    gpu_step.save_model(size.shapes[0], size, str(tmp_path))
    policy = gpu_step.load_model(tmp_path)
    assert len(policy.tokenizer.eos_ids) == policy.vocab_size / (size.new_tokens // 6)
    completions = NativeEngine(policy).generate([[1]], Sampling(max_new_tokens=200), n=200)
    assert np.mean([len(tokens) for tokens in completions.tokens]) == pytest.approx(size.new_tokens / 6, rel=0.3)


# With their peers, in processes of their own


@pytest.mark.slow
@pytest.mark.parametrize("part", suite.PARTS)
def test_a_part_runs_at_toy_size(part, tmp_path):
    speed(only=(part,), rounds=1, quick=True, out=tmp_path / "speed.md")
    assert "\n## " in (tmp_path / "speed.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_for_the_gpu_runs_at_toy_size_on_a_cpu(part, tmp_path):
    gpu.main(only=(part,), rounds=1, device="cpu", quick=True, out=tmp_path)
    assert "\n## " in (tmp_path / "results.md").read_text()
    if part == "learning":
        assert len(list(tmp_path.glob("*.csv"))) == 5
        assert (tmp_path / "grpo.csv").read_text().startswith("step,episodes,seconds,reward,accuracy\n1,512,")

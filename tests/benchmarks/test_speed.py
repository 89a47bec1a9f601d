"""Each program of benchmarks/speed runs at its smallest size. No test looks at a clock."""

import numpy as np

from agents.core.models import build_tiny
from agents.core.policy import Policy
from benchmarks.measure import medians
from benchmarks.speed import generation, imports, token_steps
from textenv.tokenizer import CharTokenizer


def test_measures_are_taken_in_turns_and_give_their_medians():
    figures = iter([1, 5, 9, 6, 2, 7])
    assert medians({"a": lambda: next(figures), "b": lambda: next(figures)}, rounds=3) == {"a": 2, "b": 6}


def test_token_steps_prints_its_tables(capsys):
    token_steps.main(rounds=1, num_envs=(2,), contexts=(64, 80))
    printed = capsys.readouterr().out
    for title in ("SyncVectorEnv", "must not grow with the context", "bytes for each", "whole episodes"):
        assert title in printed


def test_the_steps_that_are_measured_end_no_episode():
    envs = token_steps.make_envs(3, 64)
    envs.reset(seed=0)
    for action_N in token_steps.random_actions(3):
        _, _, terminated_N, _, _ = envs.step(action_N)
    assert not terminated_N.any()


def test_an_episode_that_is_measured_ends_with_its_last_step():
    envs = token_steps.make_envs(2, 64, max_new_tokens=token_steps.STEPS)
    token_steps.episode_cost(envs)
    assert envs.episodes.done_N.all()


def test_memory_of_episodes_is_a_token_and_its_source():
    alone, everything = token_steps.memory(16, 4096)
    assert 9 <= alone < 9.1
    assert everything > alone + 8  # the observation is a copy


def test_imports_prints_its_table(capsys):
    imports.main(rounds=1)
    printed = capsys.readouterr().out
    assert "import textenv" in printed
    assert printed.count("none") == len(imports.PROGRAMS)


def test_heavy_imports_are_noticed():
    assert imports.heavy_imports("import sys; sys.modules['torch'] = sys") == ["torch"]


def test_generation_prints_its_tables(capsys, tmp_path):
    tokenizer = CharTokenizer()
    Policy(build_tiny(tokenizer, 0), tokenizer).save(tmp_path)
    generation.main(rounds=1, even=2, uneven=8, steps=2, model=str(tmp_path))
    printed = capsys.readouterr().out
    assert "useful tokens per second" in printed
    assert "whole step" in printed


def test_native_writes_as_many_tokens_as_it_is_credited_with():
    policy = generation.never_ending_policy()
    length_B = generation.uneven_lengths(8, 12)
    sampling = generation.Sampling(max_new_tokens=12)
    written = generation.NativeEngine(policy).generate([[1, 2]] * 8, sampling, budgets=length_B.tolist())
    assert [len(tokens) for tokens in written.tokens] == length_B.tolist()
    assert len(np.unique(length_B)) > 1

"""The programs of benchmarks/speed that measure without a model run at their smallest size. No test looks at a clock."""

from benchmarks.speed import imports, token_steps


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

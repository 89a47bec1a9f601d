"""Suites: what is read, and what each mistake gets before anything starts."""

import re
import sys

import pytest

from benchmarks.claims import claim_names
from benchmarks.harness.records import Cell
from benchmarks.harness.suite import AgentSpec, Budget, EnvironmentSpec, EvaluationPlan, load_suite, shipped_suites
from benchmarks.harness.toml_file import nearest

GOOD = """\
title = "sums"
seeds = [0, 1]

[budget]
episodes = 1_000

[evaluation]
points = 4
temperature = 2

[environments.sums]
id = "textenv/Arithmetic-v0"
options = { digits = 1 }

[agents.grpo]

[agents.patient]
kind = "grpo"
settings = { group_size = 4, learning_rate = 1e-4 }
"""


def write(folder, text):
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_a_suite_is_read(tmp_path):
    suite = load_suite(write(tmp_path, GOOD))
    assert (suite.title, suite.seeds) == ("sums", (0, 1))
    assert (suite.budget.kind, suite.budget.amount) == ("episodes", 1000)
    assert suite.evaluation == EvaluationPlan(points=4, problems=128, samples=8, temperature=2)
    assert suite.environments == {"sums": EnvironmentSpec(id="textenv/Arithmetic-v0", options={"digits": 1})}
    assert suite.agents == {
        "grpo": AgentSpec(kind="grpo"),
        "patient": AgentSpec(kind="grpo", settings={"group_size": 4, "learning_rate": 1e-4}),
    }
    assert suite.cells == [Cell("sums", agent, seed) for seed in (0, 1) for agent in ("grpo", "patient")]


def test_programs_run_once_and_claims_with_every_seed(tmp_path):
    text = 'title = "t"\n[programs.list]\ncommand = ["textenv", "list"]\n'
    suite = load_suite(write(tmp_path, text))
    assert suite.programs == {"list": ("textenv", "list")}
    assert suite.cells == [Cell("programs", "list", 0)]
    text = 'title = "t"\nseeds = [3, 4]\n[claims]\nnames = ["clip_higher"]\n'
    assert load_suite(write(tmp_path, text)).cells == [Cell("claims", "clip_higher", seed) for seed in (3, 4)]
    assert list(load_suite("claims").claims) == claim_names()


SLOW = ("agents",)
"""Suites with agents that take seconds to import."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in shipped_suites()]
)
def test_a_shipped_suite_is_right(name):
    suite = load_suite(name)
    assert suite.title
    assert len(set(suite.cells)) == len(suite.cells) > 0


def test_the_suites_that_are_promised_are_shipped():
    assert {"quick", "agents", "rewards", "speed", "claims", "gpu"} <= set(shipped_suites())
    quick = load_suite("quick")
    assert (list(quick.agents), len(quick.environments), len(quick.seeds)) == (["grpo", "dapo", "raft", "ppo"], 2, 3)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        # names
        ('kind = "grpo"', 'kind = "gpro"', 18, "no agent 'gpro'; did you mean grpo? there are "),
        ("[agents.grpo]", "[agents.gpro]", 15, "no agent 'gpro'; did you mean grpo? there are "),
        ("Arithmetic", "Aritmetic", 12, "no environment 'textenv/Aritmetic-v0'; did you mean textenv/Arithmetic-v0"),
        ("digits", "digit", 13, "textenv/Arithmetic-v0 has no option 'digit'; it has digits, operators"),
        ("digits = 1", "digits = 0", 13, "digits must be a whole number from 1 to 18, got 0"),
        ("title", "titel", 1, "no key 'titel'; did you mean title? there are title, seeds"),
        ("episodes", "episode", 5, "no key 'episode'; did you mean episodes? there are episodes, tokens, updates, sec"),
        ("points", "point", 8, "no key 'point'; did you mean points? there are points, problems"),
        ("settings", "setting", 19, "no key 'setting'; did you mean settings? there are kind, settings"),
        ("options", "option", 13, "no key 'option'; did you mean options? there are id, options, model"),
        ("group_size", "group_sise", 19, "no setting 'group_sise' of grpo; did you mean group_size? there are model"),
        # seeds
        ("[0, 1]", "[]", 2, "a suite needs at least one seed, as in seeds = [0, 1, 2]"),
        ("[0, 1]", "[0, 1, 0]", 2, "the seed 0 is there 2 times; each counts once"),
        ("[0, 1]", "[-1]", 2, "a seed is a whole number from 0 to 2**32 - 1, got -1"),
        ("[0, 1]", "[true]", 2, "seeds is a list, and each of it a whole number, got [True]"),
        ("[0, 1]", "3", 2, "seeds is a list, and each of it a whole number, got 3"),
        # budgets
        ("episodes = 1_000", "", 4, "a budget is one of episodes, tokens, updates and seconds, got none"),
        ("1_000", "1_000\ntokens = 5", 4, "a budget is one of episodes, tokens, updates and seconds, got episodes and t"),
        ("1_000", "0", 4, "a budget is above 0, got 0 episodes"),
        ("1_000", "1.5", 5, "episodes is a whole number, got 1.5"),
        ("1_000", "255", 5, "255 episodes are too few for one step of grpo, which samples 256 episodes: prompts_per_s"),
        ("episodes = 1_000", "tokens = 200", 5, "200 tokens are too few for one step of grpo, which samples 256 epis"),
        # settings
        ("group_size = 4", "group_size = 1", 19, "group_size must be 2 or more, since a lone completion has no group"),
        ("group_size = 4", "group_size = '4'", 19, "group_size is a whole number, got '4'"),
        ("group_size = 4", "device = 'tpu'", 19, "device is 'auto' or 'cpu' or 'cuda', got 'tpu'"),
        ("group_size = 4", "seed = 4", 19, "seed"),
        ("points = 4", "points = 1", 7, "points must be at least 2, got 1"),
        ("temperature = 2", "temperature = 0", 7, "temperature must be above 0, got 0; greedy is measured anyway"),
        ('id = "textenv/Arithmetic-v0"', "", 11, "environments.sums.id is missing"),
        ("[agents.patient]", '[agents."gr/po"]\nkind="grpo"\n[agents.gr-po]', 19, "'gr-po' and 'gr/po' would share a fo"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line(tmp_path, old, new, line, message):
    assert GOOD.count(old) > 0
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(f"{path}, line {line}: ") + ".*" + re.escape(message)):
        load_suite(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('title = "t"\nseeds = [0,, 1]', "mine.toml is not valid TOML: Invalid value (at line 2, column 12)"),
        ("seeds = [0]", "mine.toml: title is missing"),
        ('title = "t"', "mine.toml: nothing to run; a suite has tables [agents.NAME], [claims] or [programs.NAME]"),
        ('title = "t"\n[environments.a]\nid = "b"', "line 2: there are environments but no agents; add a table [agent"),
        (GOOD.split("[budget]")[0] + GOOD[GOOD.index("[env") :], "mine.toml: agents need a [budget], one of episodes"),
        ('title = "t"\nseeds = [0]\n[programs.a]\ncommand = ["b"]', "line 2: only agents and claims have seeds"),
        ('title = "t"\n[programs.a]\ncommand = []', "line 3: a command line has at least one word"),
        ('title = "t"\nseeds = [0]\n[claims]\nnames = ["clip_hihger"]', "no claim 'clip_hihger'; did you mean clip_hi"),
        ('title = "t"\nimports = ["no_such_module_here"]', "line 2: no module 'no_such_module_here'"),
    ],
)
def test_what_is_no_suite_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_suite(write(tmp_path, text))


def test_a_line_is_found_where_the_name_stands_before_in_other_places(tmp_path):
    text = "# group_sise\n" + GOOD.replace('"sums"', '"group_sise grpo settings"').replace("group_size", "group_sise")
    with pytest.raises(ValueError, match="line 20: no setting 'group_sise'"):
        load_suite(write(tmp_path, text))


def test_the_nearest_suite_is_named():
    with pytest.raises(ValueError, match="no suite 'quikc'; did you mean quick\\? there are agents, "):
        load_suite("quikc")


def test_a_budget_in_updates_or_seconds_only_has_to_be_above_0(tmp_path):
    for budget in ("updates = 1", "seconds = 0.5"):
        suite = load_suite(write(tmp_path, GOOD.replace("episodes = 1_000", budget)))
        assert f"{suite.budget.kind} = {suite.budget.amount:g}" == budget
    with pytest.raises(ValueError, match=re.escape("got episodes and tokens")):
        Budget(episodes=1, tokens=1)


def test_a_suite_brings_its_own_modules(tmp_path, monkeypatch):
    (tmp_path / "suite_module.py").write_text("loaded = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write(tmp_path, GOOD.replace('title = "sums"', 'title = "sums"\nimports = ["suite_module"]'))
    assert load_suite(path).imports == ("suite_module",)
    assert sys.modules.pop("suite_module").loaded


def test_nearest_says_when_there_is_nothing_alike():
    assert nearest("xyz", ["grpo", "ppo"]) == "there are grpo, ppo"
    assert nearest("b", ["a"]) == "there is a"

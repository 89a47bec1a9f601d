"""The datasets of reasoning-gym as tasks: names, addresses, splits, what an answer earns, and what it cannot do."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time

import pytest

import rewards
import textenv
from rewards import Sample
from rewards.workers import Workers
from tests.textenv.conftest import LEVELS
from textenv.checks import check_environment, check_equivalence
from textenv.task import Finish, Transcript
from textenv.tasks import reasoning_gym
from textenv.tasks.reasoning_gym import NAMES, PREFIX, find_answer, is_expression

SAMPLE = (
    *("ab", "basic_arithmetic", "boxnet", "count_bits", "gsm_symbolic", "isomorphic_strings", "list_functions"),
    *("maze", "pool_matrix", "prime_factorization", "ransom_note", "string_insertion", "sudoku", "word_sorting"),
)
"""Some of all kinds: with and without an answer to show, drawn at once or item by item, from global generators too."""
ADDRESSES = [(seed, split, index) for seed in (0, 1) for split in ("train", "eval") for index in range(4)]


def task_of(name, **options):
    return textenv.make_task(f"{PREFIX}{name}-v0", **options)


def score(task, problem, completion):
    sample = Sample(prompt=problem.prompt, completion=completion, reference=problem.reference)
    return rewards.score_samples(rewards.as_reward(task.reward), [sample])[0]


def shown(task, problem):
    return task.demonstrate(Transcript(problem, (), (), Finish.NONE))


# Registration -----------------------------------------------------------------------------------------------------


def test_the_table_of_names_is_that_of_the_installed_package():
    code = "from reasoning_gym.factory import DATASETS; print(*sorted(DATASETS))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert tuple(listed.split()) == NAMES


def test_the_package_stays_out_of_this_process():
    code = f"import sys, textenv; textenv.make_task('{PREFIX}gcd-v0').problem(0, 'train', 0); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "textenv" in modules
    assert "reasoning_gym" not in modules
    assert "sympy" not in modules


def test_without_the_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'reasoning-gym-gcd-v0 needs reasoning-gym: pip install "textenv\[tasks\]"'):
        task_of("gcd")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gcd", {"digits": 3}, "gcd: no option 'digits'; its own are min_numbers, max_numbers, min_value, max_value"),
        ("gcd", {"seed": 3}, "gcd: no option 'seed'"),
        ("gcd", {"min_numbers": 9}, "gcd: max_numbers must be >= min_numbers"),
        ("gcd", {"curriculum": 9}, "gcd: its curriculum has the levels 0 to 3, got 9"),
        ("gcd", {"curriculum": -1}, "curriculum must be a level from 0 on, got -1"),
        ("gcd", {"template": "Hello"}, "names no field"),
        ("acre", {"curriculum": 0}, "acre: it has no curriculum"),
        ("composite", {}, "composite: Must specify at least one dataset"),
    ],
)
def test_impossible_options_are_refused_when_the_task_is_made(name, options, message):
    with pytest.raises(ValueError, match=message):
        task_of(name, **options)


# Problems ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLE)
def test_an_address_is_one_problem_and_the_splits_share_none(name):
    one, other = task_of(name), task_of(name)
    forward = {address: one.problem(*address) for address in ADDRESSES}
    assert forward == {address: other.problem(*address) for address in reversed(ADDRESSES)}
    train, held_out = ({one.key(forward[a]) for a in ADDRESSES if a[1] == split} for split in ("train", "eval"))
    assert train.isdisjoint(held_out)


@pytest.mark.parametrize("name", ["word_sorting", "list_functions", "pool_matrix"])
def test_neighbouring_seeds_and_indices_share_nothing(name):
    task = task_of(name)
    problems = [task.problem(seed, "train", index) for seed in range(4) for index in range(5)]
    assert len({problem.prompt for problem in problems}) == len(problems)
    seeds = sorted(problem.reference["seed"] for problem in problems)
    assert min(b - a for a, b in itertools.pairwise(seeds)) > 1


def test_addresses_are_the_same_on_every_platform():
    problem = task_of("count_bits").problem(7, "eval", 12345)
    made_from = {"dataset": "count_bits", "config": {}, "curriculum": None, "seed": 1113561601}
    assert problem.reference == {**made_from, "answer": "15"}
    assert "the number 235452093?" in problem.prompt


def digests(names, hash_seed):
    code = (
        "import sys, json, hashlib; from textenv.tasks.reasoning_gym import work\n"
        "for name in sys.argv[1:]:\n"
        "    items = [work({'dataset': name, 'config': {}, 'curriculum': None, 'seed': seed}) for seed in (3, 5, 2**30)]\n"
        "    print(hashlib.md5(json.dumps(items).encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, env=environment
    )
    return dict(zip(names, done.stdout.split(), strict=True))


def test_problems_do_not_depend_on_the_order_of_sets():
    names = ("isomorphic_strings", "ransom_note", "polynomial_multiplication", "word_ladder", "knight_swap")
    assert digests(names, hash_seed=1) == digests(names, hash_seed=2)


def test_the_configuration_and_the_curriculum_reach_the_library():
    numbers = [task_of("gcd", max_numbers=5, min_numbers=5).problem(0, "train", i).info["question"] for i in range(3)]
    assert all(question.count(",") == 4 for question in numbers)
    easy, hard = (task_of("chain_sum", curriculum=level).problem(0, "train", 0).info["question"] for level in (0, 4))
    assert len(easy) < len(hard)
    own = task_of("chain_sum", curriculum=4, min_terms=2, max_terms=2).problem(0, "train", 0).info["question"]
    assert sum(own.count(sign) for sign in ("+ ", "- ")) == 1


def test_a_composite_mixes_the_datasets_that_it_is_given():
    specs = [{"name": "gcd", "weight": 1, "config": {"max_numbers": 3}}, {"name": "lcm", "weight": 1, "config": {}}]
    task = task_of("composite", datasets=specs)
    problems = [task.problem(0, "train", index) for index in range(12)]
    assert {"Greatest" in problem.prompt for problem in problems} == {True, False}
    assert all(score(task, problem, shown(task, problem)).value == 1.0 for problem in problems)


def test_a_template_goes_around_the_question_and_leaves_the_split():
    own, plain = task_of("gcd", template="{question} <answer>?"), task_of("gcd")
    assert own.problem(0, "eval", 1).prompt == plain.problem(0, "eval", 1).info["question"] + " <answer>?"


# Rewards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLE)
def test_the_right_answer_earns_1_and_an_empty_one_less(name):
    task = task_of(name)
    for split in ("train", "eval"):
        problem = task.problem(3, split, 0)
        for completion in ("", "<answer></answer>", "<answer>no idea</answer>"):
            assert score(task, problem, completion).value == 0.0
        if shown(task, problem) is not None:
            result = score(task, problem, f"I think so: {shown(task, problem)}")
            assert (result.value, result.correct) == (1.0, True)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>1</answer>", "1"),
        ("<answer>1</answer> no, <answer>\n2\n</answer>!", "2"),
        ("<think><answer>1</think> <answer>2</answer>", "2"),
        *((text, None) for text in ("", "2", "<answer>2", "2</answer>", "</answer>2<answer>", "<ANSWER>2</ANSWER>")),
        ("<answer>" * 100_000, None),
        ("<answer>\ud800\0</answer>", "\ud800\0"),
    ],
)
def test_the_answer_is_what_the_last_tags_hold(completion, answer):
    assert find_answer(completion) == answer


def test_padding_earns_nothing_unless_partial_credit_is_asked_for():
    for partial, value in ((False, 0.0), (True, 0.5)):
        task = task_of("count_bits", partial=partial)
        problem = task.problem(0, "train", 0)
        answer = problem.reference["answer"]
        result = score(task, problem, f"<answer>{answer}{'?' * len(answer)}</answer>")
        assert (result.value, result.parts) == (value, {"correct": 0.0, "score": 0.5, "readable": 1.0})


def test_a_completion_without_tags_is_no_answer():
    task = task_of("count_bits")
    problem = task.problem(0, "train", 0)
    assert score(task, problem, problem.reference["answer"]).parts["readable"] == 0.0


def test_an_answer_that_breaks_the_librarys_rule_is_wrong_and_not_ungraded():
    task = task_of("prime_factorization")  # its rule reads int("no idea")
    result = score(task, task.problem(0, "train", 0), "<answer>no idea</answer>")
    assert (result.value, result.correct) == (0.0, False)


def test_a_rule_that_takes_anything_is_replaced_by_the_same_text():
    task = task_of("game_of_life_halting")  # its rule compares the truth of texts, and that of "False" is true
    problem = task.problem(0, "train", 0)
    other = {"True": "False", "False": "True"}[problem.reference["answer"]]
    assert score(task, problem, f"<answer>{other}</answer>").value == 0.0
    assert score(task, problem, shown(task, problem)).value == 1.0


@pytest.mark.parametrize("reference", [None, "4", [], {}, {"dataset": "gcd", "answer": "4"}])
def test_an_unreadable_reference_leaves_its_sample_ungraded(reference):
    reward = task_of("gcd").reward
    good = task_of("gcd").problem(0, "train", 0)
    right = Sample(prompt="", completion=f"<answer>{good.reference['answer']}</answer>", reference=good.reference)
    bad, score = reward([Sample(prompt="", completion="<answer>4</answer>", reference=reference), right])
    assert bad.error.startswith("unreadable reference")
    assert score.value == 1.0


def dawdle(item):
    if item["scored"] == "slow":
        time.sleep(60)
    return reasoning_gym.work(item)


def test_an_answer_that_nobody_could_work_out_is_wrong():
    task = task_of("countdown")
    problem = task.problem(0, "train", 0)
    assert score(task, problem, "<answer>9**9**9**9</answer>").value == 0.0


def test_an_answer_that_takes_too_long_is_ungraded_and_harms_no_other(monkeypatch):
    task = task_of("countdown")
    problem = task.problem(0, "train", 0)
    texts = ["<answer>slow</answer>", shown(task, problem)]
    samples = [Sample(prompt="", completion=text, reference=problem.reference) for text in texts]
    monkeypatch.setattr(reasoning_gym, "_workers", lambda: Workers(f"{__name__}:dawdle", seconds=10.0))
    late, right = task.reward(samples)
    assert late.value is None
    assert "took longer than 10 s" in late.error
    assert right.value == 1.0


@pytest.mark.parametrize(
    "name", ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "countdown", "puzzle24"]
)
def test_answers_are_never_run(name, tmp_path):
    task, path = task_of(name), tmp_path / "touched"
    answer = f"<answer>__import__('pathlib').Path({str(path)!r}).touch()</answer>"
    assert score(task, task.problem(0, "train", 0), answer).value == 0.0
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    ["3*X**2 - 2*x*y + 1", "sin(x)/2 + C", "exp(2*x)*log(x)", "(1+3)*6/1", "0.5*x", " 24\n", "(x**2+1)**3", "x^(3/2)"],
)
def test_expressions_are_handed_on(text):
    assert is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        *("9**9**9", "9^9^9", "2**10000", "((9**999)**999)**999", "(" * 300 + "1" + ")" * 300),
        *("x.subs", "x. subs", "1.real", "exec(x)", "chr(41)", "'a'", "[1]", "x=1", "x;y", "lambda: 0", "S.x", "__x__"),
        *(
            "Integral(x, x)",
            "preview(x)",
            "xy",
            "2\u00d73",
            "\u0445",
            "x@y",
            "{1}",
            "a if b else c",
            "x_1",
            "9" * 9 + "!",
        ),
    ],
)
def test_what_is_no_plain_expression_is_not(text):
    assert not is_expression(text)


# Environments -----------------------------------------------------------------------------------------------------


def test_it_is_one_environment_at_both_levels():
    options = {"max_new_tokens": 48, "max_tokens": 512}
    check_equivalence(f"{PREFIX}count_bits-v0", episodes=8, **options)
    for level in LEVELS:
        env = textenv.envs.make_env(f"{PREFIX}count_bits-v0", level=level, **options)
        env.reset(seed=0)
        assert env.episodes.problems[0].reference["dataset"] == "count_bits"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["count_bits", "basic_arithmetic"])
def test_every_check_passes(name):
    results = check_environment(f"{PREFIX}{name}-v0", max_new_tokens=256, max_tokens=2048)
    assert [result for result in results if result.problem] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_draws_and_scores(name):
    task = task_of(name, **({"datasets": [{"name": "gcd", "weight": 1, "config": {}}]} if name == "composite" else {}))
    problems = {split: [task.problem(0, split, index) for index in range(2)] for split in ("train", "eval")}
    for split, drawn in problems.items():
        for problem in drawn:
            assert task.split_of(problem) == split
            json.dumps(problem.reference)
            assert score(task, problem, "<answer></answer>").value == 0.0
            assert score(task, problem, "<answer>no such thing</answer>").value == 0.0
            assert shown(task, problem) is None or score(task, problem, shown(task, problem)).value == 1.0


@pytest.mark.slow
def test_no_dataset_depends_on_the_order_of_sets():
    names = [name for name in NAMES if name != "composite"]
    assert digests(names, hash_seed=1) == digests(names, hash_seed=2)

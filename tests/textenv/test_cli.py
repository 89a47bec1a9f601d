"""The command line: list, check, profile and play."""

import io
import os
import subprocess
import sys

import pytest

import textenv
from rewards.options import parse_options
from textenv.cli import main
from textenv.tasks.reasoning_gym import NAMES, PREFIX

HEAVY = ("torch", "transformers", "stable_baselines3", "tokenizers", "reasoning_gym", "sympy")
ON_ONE = ("play", "check", "profile")
"""Commands about one environment."""


def run(capsys, *arguments):
    """Exit status, stdout and stderr of a command."""
    try:
        main(list(arguments))
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def answers(monkeypatch):
    """Lines that a player types."""
    return lambda *lines: monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


# Importing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [None, ["--help"], ["list"]])
def test_nothing_heavy_is_imported(arguments):
    code = "import textenv" if arguments is None else f"from textenv.cli import main; main({arguments})"
    script = f"{code}\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


# Help and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_maps_the_commands(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, err) == (0, "")
    for command in ("list", "play", "check", "profile", "train", "evaluate", "replay"):
        assert f"\n    {command} " in out
    assert "textenv check me/Mine-v0 --import my_module     what to mend in an environment of yours\n" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("command", ["list", "play", "check", "profile"])
def test_every_command_has_help(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    assert f"usage: textenv {command}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "textenv: no command 'fly'; there are bench, check, "),
        *(([command, "textenv/Kopy-v0"], "did you mean textenv/Copy-v0") for command in ON_ONE),
        *(([command, "textenv/Copy-v0", "--options", "digits", "3"], "has no option 'digits'") for command in ON_ONE),
        (["play", "textenv/Copy-v0", "--seed", "-1"], "a seed is a whole number from 0 on, got -1"),
        (["play", "textenv/Copy-v0", "--options", "max_length", "x"], "max_length must be a whole number"),
        (["list", "--import", "no_such_module"], "no module 'no_such_module' in this folder or on the Python path"),
        (["profile", "textenv/Copy-v0", "--num-envs", "0"], "profile plays at least one episode, got num_envs=0"),
        (["list", "--import"], "--import needs the name of a module"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_clear_line_and_status_2(capsys, arguments, message):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("textenv: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["list", "--nope"], ["play"], ["profile", "textenv/Copy-v0", "--num-envs", "x"]])
def test_an_impossible_command_line_is_status_2(capsys, arguments):
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err


def test_a_traceback_is_shown_on_demand():
    with pytest.raises(ValueError, match="no environment"):
        main(["check", "textenv/Kopy-v0", "--traceback"])


def test_options_are_read_as_json_or_text():
    assert parse_options({"a": "3", "b": "x", "c": "[1]", "d": '"3"', "e": "+-"}) == {
        "a": 3,
        "b": "x",
        "c": [1],
        "d": "3",
        "e": "+-",
    }


# Commands ---------------------------------------------------------------------------------------------------------


def test_list_shows_every_environment_in_100_columns(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0
    for id in textenv.registry:
        assert id.startswith(PREFIX) or f" {id} " in out
    assert f" {PREFIX}NAME-v0 " in out
    names = out[out.index("NAME is one of") :].split()
    assert {name.removesuffix(",") for name in names} >= set(NAMES)
    assert max(map(len, out.splitlines())) <= 100
    assert "``" not in out
    assert ":class:" not in out
    assert "Find a hidden number" in out
    assert "try_again" in out


def test_check_passes(capsys):
    status, out, _ = run(capsys, "check", "textenv/Copy-v0", "--options", "max_length", "4")
    assert status == 0
    assert "equivalence" in out
    assert "mend " not in out.replace("to mend", "")


def test_check_says_what_to_mend_with_status_1(capsys, register):
    register("test/Bare-v0", lambda rng: ("[bold]a", "a"), holdout=0)
    status, out, _ = run(capsys, "check", "test/Bare-v0")
    assert status == 1
    assert "give <lambda> a docstring that says what it asks" in out


@pytest.mark.parametrize("id", ["textenv/Copy-v0", "textenv/GuessNumber-v0", "textenv/ProbeOneHot-v0"])
def test_profile_tells_the_costs(capsys, id):
    status, out, _ = run(capsys, "profile", id, "--num-envs", "4", "--episodes", "8")
    assert status == 0
    assert "µs an episode" in out
    assert "µs a token" in out
    assert "µs a completion" in out


def test_profile_leaves_out_what_never_happens(capsys):
    out = run(
        capsys, "profile", "textenv/Tabular-v0", "--num-envs", "4", "--episodes", "4", "--options", "horizon", "1"
    )[1]
    assert "µs a token" not in out


def test_play_asks_and_scores(capsys, answers):
    task = textenv.make_task("textenv/Copy-v0")
    first, second = (task.problem(3, "train", i) for i in range(2))
    answers(first.reference, "x", "")
    status, out, _ = run(capsys, "play", "textenv/Copy-v0", "--seed", "3")
    assert status == 0
    assert f"{first.prompt} > reward 1, reference {first.reference!r}\n" in out
    assert f"{second.prompt} > reward 0, reference {second.reference!r}\n" in out
    assert out.endswith("2 played, mean reward 0.50\n")


def test_play_shows_each_reply_once_and_nothing_else(capsys, answers):
    secret = int(textenv.make_task("textenv/GuessNumber-v0").problem(0, "train", 0).reference)
    answers(secret - 1, "x", secret + 1, secret)
    out = run(capsys, "play", "textenv/GuessNumber-v0")[1]
    assert out.startswith(
        "an empty line ends the game\nFind the number from 1 to 20. You have 6 guesses.\n"
        f" > \nhigher\n > \nnot a number\n > \nlower\n > reward 1, reference '{secret}'\n"
    )
    assert "<eos>" not in out


def test_play_asks_again_for_what_it_cannot_write(capsys, answers):
    answers("é", "[/red]")
    status, out, _ = run(capsys, "play", "textenv/Copy-v0")
    assert status == 0
    assert "the character 'é'" in out
    assert "1 played, mean reward 0.00" in out


def test_play_tells_an_ungraded_answer_and_a_cut_one_apart(capsys, answers, register):
    register(
        "test/Hard-v0",
        lambda rng: ("a", "a"),
        holdout=0,
        reward=lambda prompt, completion, reference: float(completion),
    )
    answers("x", "2", "3" * 40)
    out = run(capsys, "play", "test/Hard-v0")[1]
    assert "ungraded: ValueError: could not convert string to float: 'x', reference 'a'" in out
    assert "> reward 2, reference 'a'" in out
    assert "(length), reference 'a'" in out
    assert "3 played, mean reward 1" in out


def test_play_ends_with_the_input(capsys, answers):
    answers()
    status, out, _ = run(capsys, "play", "textenv/Copy-v0")
    assert (status, out.splitlines()[-1]) == (0, "0 played")


def test_a_module_of_ones_own_is_imported_from_the_working_folder(tmp_path):
    (tmp_path / "my_tasks.py").write_text(
        "import textenv\n\n\n@textenv.register('me/Reverse-v0')\ndef reverse(rng):\n"
        "    '''Write a word backwards.'''\n"
        "    word = ''.join(rng.choice(list('abcdef'), size=4))\n"
        "    return f'Reverse {word}:', word[::-1]\n"
    )

    def textenv_command(*arguments):
        script = "import sys; from textenv.cli import main; main(sys.argv[1:])"
        return subprocess.run(
            [sys.executable, "-P", "-c", script, *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "100"},
        )  # fmt: skip

    listed = textenv_command("list", "--import", "my_tasks")
    assert listed.returncode == 0
    assert "me/Reverse-v0" in listed.stdout
    checked = textenv_command("--import", "my_tasks.py", "check", "me/Reverse-v0")
    assert (checked.returncode, checked.stderr) == (0, "")
    (tmp_path / "broken.py").write_text("import not_there_at_all\n")
    broken = textenv_command("list", "--import", "broken")
    assert broken.returncode == 2
    assert "No module named 'not_there_at_all'" in broken.stderr
    assert broken.stderr.count("\n") == 1

"""Registering tasks of one's own."""

import gymnasium as gym
import pytest

import textenv
from tests.textenv.conftest import LEVELS, Letters, ids
from textenv import make_task


def reverse(rng):
    """Write a word backwards."""
    word = "".join(rng.choice(list("abcdef"), size=4))
    return f"Reverse {word}:", word[::-1]


class Counted(Letters):
    """Its context depends on an option."""

    def __init__(self, letters=3, max_new_tokens=4):
        self.letters = letters
        self.max_new_tokens = max_new_tokens
        self.max_tokens = letters + 2 * max_new_tokens

    def draw(self, rng):
        return "a" * self.letters, "ref"


@pytest.fixture(params=["decorator", "function", "class", "data"])
def registered(request, register, tmp_path):
    """A task, registered in one of four ways, each with a default of its own."""
    if request.param == "decorator":
        assert register("test/Mine-v0", max_new_tokens=9)(reverse) is reverse
    elif request.param == "function":
        register("test/Mine-v0", reverse, max_new_tokens=9)
    elif request.param == "class":
        register("test/Mine-v0", Letters, max_new_tokens=9)
    else:
        path = tmp_path / "mine.jsonl"
        path.write_text('{"question": "ab", "answer": "c"}\n')
        register("test/Mine-v0", data=path, prompt="question", answer="answer", max_new_tokens=9, holdout=0)
    return "test/Mine-v0"


@pytest.mark.parametrize("level", LEVELS)
def test_every_way_to_register_gives_both_levels_alone_and_vectorised(registered, level):
    options = {"max_tokens": 64}
    env = gym.make(registered, level=level, **options)
    envs = gym.make_vec(registered, num_envs=2, level=level, **options)
    assert env.reset(seed=0)[1]["prompt"] == envs.reset(seed=0)[1]["prompt"][0]
    answer = 1 if level == "token" else [1, 1, 0]
    assert env.step(answer)[2] == (level == "sequence")
    assert env.unwrapped.episodes.task.max_new_tokens == 9


def test_options_of_gym_make_override_those_of_registration(registered):
    env = gym.make(registered, max_new_tokens=3, max_tokens=64, reward=lambda prompt, completion, reference: 0.5)
    assert env.action_space.shape == (3,)
    env.reset(seed=0)
    assert env.step(env.action_space.sample())[1] == 0.5


@pytest.mark.parametrize("level", LEVELS)
def test_the_example_of_the_documentation_works_whole(register, level):
    register("me/Reverse-v0")(reverse)
    env = gym.make("me/Reverse-v0", level=level)
    _, info = env.reset(seed=0)
    tokens = [*env.unwrapped.episodes.tokenizer.encode(info["reference"]), 0]
    if level == "sequence":
        assert env.step(tokens)[1] == 1.0
    else:
        assert [env.step(token)[1] for token in tokens] == [0.0] * 4 + [1.0]
    assert all(result.problem is None for result in textenv.check_environment("me/Reverse-v0"))


def test_an_option_of_the_constructor_stays_with_the_constructor(register):
    register("test/Counted-v0", Counted, letters=2)
    task = make_task("test/Counted-v0", max_new_tokens=5)
    assert (task.letters, task.max_new_tokens, task.max_tokens) == (2, 5, 12)
    assert make_task("test/Counted-v0", max_tokens=40).max_tokens == 40


def test_a_class_that_is_decorated_stays_a_class(register):
    assert register("test/Letters-v0")(Letters) is Letters
    assert isinstance(make_task("test/Letters-v0"), Letters)


def test_tasks_made_twice_share_nothing(letters):
    one, other = make_task(letters), make_task(letters)
    one.max_tokens = 99
    assert other.max_tokens == 10


def test_an_unknown_id_names_the_nearest_ones():
    with pytest.raises(ValueError, match=r"no environment 'textenv/Arithmetik-v0'; did you mean textenv/Arithmetic-v0"):
        make_task("textenv/Arithmetik-v0")
    with pytest.raises(ValueError, match=r"no environment 'zzz'; `textenv list` shows all"):
        make_task("zzz")


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda: textenv.register("textenv/Copy-v0", reverse), "'textenv/Copy-v0' is registered already"),
        (lambda: textenv.register("CartPole-v1", reverse), "'CartPole-v1' is registered already"),
        (lambda: textenv.register("no id!", reverse), "an id is namespace/Name-v0, got 'no id!'"),
        (lambda: textenv.register("test/X-v0", reverse, digits=3), "test/X-v0 has no option 'digits'; it has reward, "),
        (
            lambda: textenv.register("test/X-v0", Counted, digits=3),
            "has no option 'digits'; it has letters, max_new_tokens, ",
        ),
        (lambda: textenv.register("test/X-v0", Letters()), "a Task subclass or data=…, got "),
        (lambda: textenv.register("test/X-v0", "exact"), "takes a function rng -> "),
        (lambda: textenv.register("test/X-v0", reverse, data="x.jsonl"), "or data=…, not both"),
        (
            lambda: textenv.register("test/X-v0", data="x.jsonl", question="q"),
            "has no option 'question'; it has data, prompt",
        ),
    ],
)
def test_what_cannot_be_registered_is_refused_and_leaves_no_trace(add, message):
    before = set(textenv.registry), set(gym.registry)
    with pytest.raises(ValueError, match=message):
        add()
    assert before == (set(textenv.registry), set(gym.registry))


def test_an_option_that_gym_make_would_take_is_refused():
    class Levelled(Letters):
        def __init__(self, level=3):
            self.difficulty = level

    with pytest.raises(ValueError, match=r"gym\.make has an option 'level' of its own; give the task's another name"):
        textenv.register("test/Levelled-v0", Levelled)


def test_a_missing_option_is_named(register):
    class Needy(Letters):
        def __init__(self, size):
            self.size = size

    register("test/Needy-v0", Needy)
    with pytest.raises(ValueError, match=r"test/Needy-v0 cannot be made: missing a required argument: 'size'"):
        make_task("test/Needy-v0")
    assert make_task("test/Needy-v0", size=2).size == 2


def test_stop_texts_can_be_set(register):
    register("test/Letters-v0", Letters, stop=("!",))
    env = gym.make("test/Letters-v0")
    env.reset(seed=0)
    info = env.step(ids("a;!."))[4]
    assert (info["finish"], info["completion"]) == ("stop", "a;")

"""`textenv check` passes what keeps its promises, and names what to mend in what does not."""

import itertools
import random

import numpy as np
import pytest

from rewards import Reward, Score
from tests.textenv.conftest import ALPHABET, IDS, Dialogue, Dice, Letters, PerToken, options_of
from textenv import Problem, check_environment, checks
from textenv.checks import CheckError, check_equivalence


def found(id, **options):
    """What there is to mend, by the name of the check."""
    return {result.name: result.problem for result in check_environment(id, **options) if result.problem is not None}


@pytest.mark.parametrize("id", IDS)
def test_every_registered_environment_passes(id):
    assert found(id, **options_of(id)) == {}


@pytest.mark.parametrize("task", [Letters, Dialogue, Dice])
def test_the_tasks_of_these_tests_pass(register, task):
    register("test/Good-v0", task)
    assert found("test/Good-v0") == {}


class Words(Letters):
    """Words of their own, to be said again."""

    holdout = 0.2
    reward = "exact"
    max_tokens = 12

    def draw(self, rng):
        word = "".join(rng.choice(list(ALPHABET[:8]), size=3))
        return Problem(word, word)

    def demonstrate(self, transcript):
        return transcript.problem.reference


class GlobalRandomness(Words):
    """Draws from Python's own generator."""

    def draw(self, rng):
        word = "".join(random.choice(ALPHABET[:8]) for _ in range(3))
        return Problem(word, word)


class GlobalNumpy(Words):
    """Draws from numpy's global generator."""

    def draw(self, rng):
        word = "".join(np.random.choice(list(ALPHABET[:8]), size=3))
        return Problem(word, word)


class Counting(Words):
    """Counts how often it was asked."""

    def __init__(self):
        self.asked = itertools.count()

    def draw(self, rng):
        return Problem(super().draw(rng).prompt, next(self.asked))


SHARED = {"drawn": 0}


class SharedInfo(Words):
    """Hands out one dictionary again and again, and changes it."""

    def draw(self, rng):
        SHARED["drawn"] += 1
        drawn = super().draw(rng)
        return Problem(drawn.prompt, drawn.reference, SHARED)


class HiddenState(Dialogue):
    """Replies by how often it was asked in its life."""

    def __init__(self):
        self.asked = itertools.count()

    def reply(self, transcript):
        return ALPHABET[next(self.asked) % 8]


class ImpatientReply(Dialogue):
    """Replies at random, from outside the episode."""

    def reply(self, transcript):
        return random.choice("cdefgh")


class PaysNothingSaid(Words):
    """Pays an empty answer as well as a right one."""

    def reward(self, prompt, completion, reference):
        return 1.0


class WrongDemonstration(Words):
    """Shows something else than what it wants."""

    def demonstrate(self, transcript):
        return "j"


class LongDemonstration(Words):
    """Its demonstration does not fit the budget."""

    max_new_tokens = 2


class NotANumber(Words):
    """Divides nothing by nothing."""

    def reward(self, prompt, completion, reference):
        return float("nan")


class Raises(Words):
    """Reads a number where there is none."""

    def reward(self, prompt, completion, reference):
        return float(int(completion))


class RaisesOnNoise(Words):
    """Works for letters alone."""

    def reward(self, prompt, completion, reference):
        if set(completion) & set("?!"):
            raise RuntimeError("what is that?")
        return float(completion == reference)


class MoodyReward(Words):
    """Scores by how often it was asked."""

    def __init__(self):
        self.asked = itertools.count()

    def reward(self, prompt, completion, reference):
        return float(completion == reference) + next(self.asked) * 1e-3


class SpoilsReference(Words):
    """Its reward takes the reference apart."""

    def draw(self, rng):
        word = super().draw(rng).prompt
        return Problem(word, list(word))

    def demonstrate(self, transcript):
        return transcript.problem.prompt

    def reward(self, prompt, completion, reference):
        return float(bool(reference) and completion[:1] == reference.pop(0))


class OverlappingSplits(Words):
    """Tells problems apart by something that is not in them."""

    def __init__(self):
        self.keys = itertools.count()

    def draw(self, rng):
        return "abc"[rng.integers(3)], "a"

    def key(self, problem):
        return str(next(self.keys))


class IgnoresSeeds(Words):
    """One and the same list of problems for every seed."""

    holdout = 0.0

    def problem(self, seed, split, index):
        return super().problem(0, split, index)


class LongPrompts(Words):
    """Sometimes asks at length."""

    def draw(self, rng):
        word = "ab" * int(rng.integers(1, 6))
        return Problem(word, word[:3])


class UnknownCharacters(Words):
    """Asks in letters that its tokenizer lacks."""

    def draw(self, rng):
        return "zebra", "z"


class Unwritable(Words):
    """Its reference is no answer, and not even text that can be written."""

    def draw(self, rng):
        return Problem(super().draw(rng).prompt, "a rubric")


class Unsaid(Words):
    __doc__ = None


class WrongCredit(Words):
    """Credits one token, however many there are."""

    class reward(Reward):  # noqa: N801
        def __call__(self, samples):
            return [Score(1.0, tokens=(1.0,)) for _ in samples]

    reward = reward()


@pytest.mark.parametrize(
    ("task", "check", "mend"),
    [
        (GlobalRandomness, "problems", "draw all randomness from the rng that draw"),
        (GlobalNumpy, "problems", "draw all randomness from the rng that draw"),
        (Counting, "problems", "draw all randomness"),
        (SharedInfo, "problems", "make new objects in it"),
        (IgnoresSeeds, "seeding", "two seeds give the same problems"),
        (HiddenState, "equivalence", "must depend on their arguments alone"),
        (HiddenState, "snapshot", "keep nothing between its calls"),
        (ImpatientReply, "equivalence", "must depend on their arguments alone"),
        (ImpatientReply, "snapshot", "draw reply()'s randomness from transcript.rng"),
        (MoodyReward, "equivalence", "the reward must depend on their arguments alone"),
        (PaysNothingSaid, "reward", "an empty answer earns as much as a demonstration"),
        (WrongDemonstration, "reward", "the demonstration 'j' earns 0 (finish eos) and does not count as right"),
        (LongDemonstration, "reward", "(finish length)"),
        (NotANumber, "reward", "could not grade a demonstration: ValueError: a score's value must be a finite number"),
        (Raises, "reward", "could not grade a demonstration: ValueError: invalid literal for int()"),
        (RaisesOnNoise, "reward", "could not grade a random answer: RuntimeError: what is that?"),
        (SpoilsReference, "equivalence", "playing an episode changed its problem"),
        (OverlappingSplits, "splits", "let key() tell problems apart by their content alone"),
        (LongPrompts, "prompts", "raise max_tokens or shorten the prompt"),
        (UnknownCharacters, "prompts", "the character 'z'"),
        (
            Unwritable,
            "reward",
            "demonstrate() must return text that can be written, or None for no answer: the character ' '",
        ),
        (Unsaid, "described", "give Unsaid a docstring"),
        (WrongCredit, "credit", "gave credit to 1 tokens of a sample with"),
    ],
)
def test_what_is_broken_is_named(register, task, check, mend):
    register("test/Broken-v0", task)
    problem = found("test/Broken-v0").get(check, "")
    assert mend in problem
    assert "\n" not in problem


def test_credit_that_sums_to_the_return_passes(register):
    class Credited(Words):
        """Credits tokens."""

        reward = PerToken()

    register("test/Credited-v0", Credited)
    assert "credit" not in found("test/Credited-v0")


def test_checking_leaves_global_randomness_alone():
    before = np.random.get_state()[1].copy()
    python = random.getstate()
    check_environment("textenv/Copy-v0")
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert random.getstate() == python


def test_options_reach_the_environment(register):
    register("test/Words-v0", Words)
    assert set(found("test/Words-v0", max_tokens=5)) >= {"prompts", "gymnasium", "equivalence"}
    assert found("test/Words-v0", split="eval", max_tokens=20) == {}
    with pytest.raises(ValueError, match="no option 'size'"):
        check_environment("test/Words-v0", size=3)


def test_an_unknown_id_is_an_error_and_not_a_finding():
    with pytest.raises(ValueError, match="did you mean textenv/Copy-v0"):
        check_environment("textenv/Kopy-v0")


def test_equivalence_is_a_check_of_its_own(register):
    register("test/Broken-v0", HiddenState)
    with pytest.raises(CheckError, match=r"episode \d at level token differs in its"):
        check_equivalence("test/Broken-v0")


def test_every_check_says_what_it_promises():
    for check in checks.CHECKS:
        promise = check.__doc__.splitlines()[0]
        assert promise.endswith(".")
        assert len(promise) < 110

"""Small tasks whose every token can be worked out by hand, and what the tests of this floor share."""

import gymnasium as gym
import numpy as np
import pytest

import textenv
from rewards import Reward, Score, ungraded
from textenv import Task
from textenv.tasks.reasoning_gym import PREFIX
from textenv.tokenizer import CharTokenizer

LEVELS = ("token", "sequence")
ON_THE_HUB = [f"textenv/{name}-v0" for name in ("GSM8K", "MATH", "HumanEval", "MBPP", "IFEval", "MultipleChoice")]
IDS = sorted(id for id in textenv.registry if id.startswith("textenv/") and not id.startswith(PREFIX))
"""All that come with textenv, but for those of reasoning-gym: they are one task, with tests of its own."""
ALPHABET = "abcdefghij;?!"
EOS, STOP = 0, ALPHABET.index(";") + 1


def something(prompt, completion, reference):
    """A reward in the place of one that runs programs, which would take these tests minutes."""
    return float(bool(completion))


def options_of(id):
    """What makes a registered id playable with what the package brings along, and quick to play to the end."""
    if id not in ON_THE_HUB:
        return {}
    quick = {"data": "sample", "max_new_tokens": 256, "max_tokens": 1024}
    return {**quick, "reward": something} if id in ("textenv/HumanEval-v0", "textenv/MBPP-v0") else quick


def ids(text):
    """Token ids; ``.`` is the end of sequence."""
    return np.array([EOS if character == "." else ALPHABET.index(character) + 1 for character in text])


class Letters(Task):
    """Any letters; the reward is their number."""

    max_new_tokens = 4
    max_tokens = 10
    stop = (";",)
    holdout = 0.0

    def tokenizer(self):
        return CharTokenizer(ALPHABET)

    def draw(self, rng):
        return "".join(rng.choice(list("abc"), size=2)), "ref"

    def demonstrate(self, transcript):
        return "cde"

    def reward(self, prompt, completion, reference):
        return float(len(completion))


class Dialogue(Letters):
    """Replies ``?`` to whatever is said, three turns long, until somebody says ``b``."""

    max_tokens = 12
    turns = 3

    def reply(self, transcript):
        return None if "b" in transcript.completions[-1] else "?"


class Dice(Letters):
    """Replies a letter at random. The reward is the number of different letters heard so far."""

    max_tokens = 24
    turns = 4

    def reply(self, transcript):
        return ALPHABET[transcript.rng.integers(10)]


class PerToken(Reward):
    """Credits the tokens 0, 1, 2 … with their places; ``a`` as the first letter cannot be graded."""

    def __call__(self, samples):
        return [self._score(sample) for sample in samples]

    def _score(self, sample):
        if sample.completion.startswith("a"):
            return ungraded("starts with a")
        credit = tuple(float(i) for i in range(len(sample.tokens)))
        return Score(sum(credit), {"length": float(len(credit))}, tokens=credit)


@pytest.fixture
def register():
    """Registers a task for the length of a test."""
    added = []

    def add(id, *target, **options):
        decorator = textenv.register(id, *target, **options)
        added.append(id)
        return decorator

    yield add
    for id in added:
        textenv.registry.pop(id, None)
        gym.registry.pop(id, None)


@pytest.fixture
def letters(register):
    register("test/Letters-v0", Letters)
    return "test/Letters-v0"


@pytest.fixture
def dialogue(register):
    register("test/Dialogue-v0", Dialogue)
    return "test/Dialogue-v0"


@pytest.fixture
def dice(register):
    register("test/Dice-v0", Dice)
    return "test/Dice-v0"

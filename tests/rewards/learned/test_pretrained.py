"""Reward models and judges are read from safetensors alone, and nothing that comes with them is run."""

from __future__ import annotations

import re

import pytest
from transformers import AutoModelForCausalLM

from rewards.contract import RewardError, Sample
from rewards.judge import LocalChat, Request
from rewards.learned.fit import FitConfig, begin
from rewards.learned.implicit import ImplicitReward
from rewards.learned.process import ProcessReward
from rewards.learned.reward_model import RewardModel
from rewards.pretrained import read_pretrained
from tests.pickles import KINDS, pickle_weights
from tests.rewards.learned.conftest import letters

SAMPLE = [Sample(prompt="what is 1 ?", completion="a")]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_pickles_are_refused_unread(language_folder, kind):
    folder = language_folder()
    mark = pickle_weights(folder, kind)
    with pytest.raises(
        ValueError, match=r"a pickle, which could run any code; where you trust it|are not .safetensors as"
    ):
        read_pretrained(AutoModelForCausalLM, folder)
    assert not mark.exists()


def test_pickles_beside_safetensors_are_left_unread(language_folder):
    folder = language_folder()
    weights = (folder / "model.safetensors").read_bytes()
    mark = pickle_weights(folder)
    (folder / "model.safetensors").write_bytes(weights)
    read_pretrained(AutoModelForCausalLM, folder)
    assert not mark.exists()


def test_from_the_hub_safetensors_alone_are_asked_for():
    class Auto:
        @staticmethod
        def from_pretrained(source, **options):
            return source, options

    asked = {"use_safetensors": True, "trust_remote_code": False, "dtype": "float32"}
    assert read_pretrained(Auto, "owner/name", dtype="float32") == ("owner/name", asked)


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: RewardModel(folder)(SAMPLE),
        lambda folder: begin(folder, FitConfig()),
    ],
    ids=["reward_model", "fit"],
)
def test_a_reward_model_of_pickles_is_refused_in_a_sentence(reward_folder, read):
    folder = reward_folder()
    mark = pickle_weights(folder)
    with pytest.raises(
        RewardError, match=f"no model can be read from {re.escape(repr(str(folder)))}: its weights are in py"
    ):
        read(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: begin(folder, FitConfig(lm_weight=0.1)),
        lambda folder: ImplicitReward(folder, folder)(SAMPLE),
        lambda folder: ProcessReward(folder, tag="?", good="a", bad="b")(SAMPLE),
        lambda folder: LocalChat(folder).ask([Request([{"role": "user", "content": "a"}], {"max_tokens": 1})]),
    ],
    ids=["fit", "implicit", "process", "judge"],
)
def test_a_language_model_of_pickles_is_refused_in_a_sentence(language_folder, read):
    folder = language_folder(tokenizer=letters(chat=True))
    mark = pickle_weights(folder)
    with pytest.raises(RewardError, match=r"model can be read from .*: its weights are in pytorch_model.bin, a pickle"):
        read(folder)
    assert not mark.exists()

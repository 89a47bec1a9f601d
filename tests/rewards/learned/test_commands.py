"""`textenv fit`."""

import json
import random

import pytest

from rewards import Sample
from rewards.learned.commands import fit
from rewards.learned.reward_model import RewardModel


@pytest.fixture
def preferences(tmp_path):
    """Answers with more a's are better."""
    rng = random.Random(0)
    rows = []
    for number in range(120):
        few, many = sorted(rng.sample(range(7), 2))
        chosen, rejected = ("".join(rng.sample("a" * n + "b" * (6 - n), 6)) for n in (many, few))
        rows.append({"prompt": f"q {number}", "chosen": chosen, "rejected": rejected})
    path = tmp_path / "preferences.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_it_fits_reports_and_saves_a_reward_model_that_scores(preferences, language_folder, tmp_path, capsys):
    out = tmp_path / "fitted"
    settings = ["--epochs", "6", "--learning-rate", "3e-3", "--prompts-per-step", "16", "--device", "cpu"]
    fit(["reward-model", "--data", str(preferences), "--model", str(language_folder()), "--out", str(out), *settings])
    shown = capsys.readouterr().out
    for told in ("rows read", "better answer longer", "better answer scores higher", "calibration", "reward_model"):
        assert told in shown
    good, bad = RewardModel(out)([Sample(prompt="q 7", completion=text) for text in ("aaaaaa", "bbbbbb")])
    assert good.value > bad.value


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_name_it_says_what_can_be_fitted(arguments, capsys):
    fit(arguments)
    assert "textenv fit reward-model" in capsys.readouterr().out


def test_what_cannot_be_fitted_is_one_line():
    with pytest.raises(ValueError, match="nothing called 'judge' can be fitted; there is reward-model"):
        fit(["judge"])

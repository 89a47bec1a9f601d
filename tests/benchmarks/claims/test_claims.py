"""Claims: the logic of verdicts on measurements made by hand, what every claim must hold, and cells on disk."""

import json
import math
from dataclasses import replace

import gymnasium
import pytest
import torch

import benchmarks.claims
import rewards
import textenv
from agents.core.trajectories import Trajectories
from benchmarks.claims import Claim, claim_names, find_claim
from benchmarks.claims.__main__ import main, read_seeds, run, tell
from benchmarks.claims.base import conclude, differences, side
from benchmarks.claims.dropping_all_wrong import plus_minus_one
from benchmarks.claims.process_reward import StepsReward
from benchmarks.claims.proxy_and_gold import beyond
from benchmarks.claims.retries_repeat import repeated
from benchmarks.harness.records import Cell, state
from benchmarks.overoptimisation import Point
from rewards import Score
from rewards.intervals import Share

HERE = [0.3, 0.1, 0.2, 0.4, 0.2, 0.3]
"""Differences of six seeds, all above 0."""
WANTED = (
    "clip_higher",
    "dropping_all_wrong",
    "dynamic_sampling",
    "pass_at_k",
    "process_reward",
    "proxy_and_gold",
    "raft_early_grpo_late",
    "retries_repeat",
    "views_agree",
)


@pytest.fixture
def no_leftovers():
    known = set(textenv.registry)
    yield
    for env_id in set(textenv.registry) - known:
        del textenv.registry[env_id], gymnasium.registry[env_id]


def found(values):
    return differences([{"ours": value, "theirs": 0.0} for value in values], "ours", "theirs")


# Verdicts


def test_six_seeds_above_nought_hold():
    verdict = conclude([found(HERE)], "Seen.")
    assert (verdict.text, verdict.sentence) == ("holds here", "Seen.")
    assert verdict.interval.value == pytest.approx(0.25)
    assert 0.1 < verdict.interval.low < 0.25 < verdict.interval.high < 0.4


def test_six_seeds_below_nought_refute():
    assert conclude([found([-value for value in HERE])], "").text == "does not hold here"


def test_seeds_on_both_sides_tell_nothing():
    assert conclude([found([0.3, -0.1, 0.2, -0.4, 0.2, 0.1])], "").text == "not told apart"


def test_five_seeds_tell_nothing_however_far_from_nought():
    difference = found([1.0, 1.1, 1.2, 0.9, 1.0])
    assert difference.difference.low > 0.8
    assert difference.p == pytest.approx(2 / 2**5)
    verdict = conclude([difference], "Seen.")
    assert (verdict.text, verdict.sentence) == ("not told apart", "Seen. 5 seeds are too few to tell anything apart.")


def test_one_seed_has_no_interval():
    difference = found([1.0])
    assert (difference.p, difference.difference.known, side(difference)) == (1.0, False, 0)
    assert "1 seed is too few" in conclude([difference], "").sentence


def test_a_claim_of_two_parts_needs_both():
    above, below, open_ = found(HERE), found([-value for value in HERE]), found([0.1, -0.1, 0.2, -0.2, 0.3, -0.3])
    assert conclude([above, above], "").text == "holds here"
    assert conclude([above, open_], "").text == "not told apart"
    assert conclude([open_, below], "").text == "does not hold here"
    assert conclude([above, below], "").interval == above.difference


def test_seeds_are_paired():
    measured = [{"ours": seed + 0.1, "theirs": float(seed)} for seed in range(6)]
    assert differences(measured, "ours", "theirs").difference.low == pytest.approx(0.1)


def test_no_seed_is_no_verdict():
    with pytest.raises(ValueError, match="got none"):
        find_claim("views_agree").verdict([])


SEEDS = range(6)
# What each claim would measure if it held: a number, to which a little of each seed's own is added.
HELD = {
    "clip_higher": {
        "higher entropy": 0.9,
        "symmetric entropy": 0.5,
        "entropy at the start": 1.2,
        "higher accuracy": 0.4,
        "symmetric accuracy": 0.4,
    },
    "dropping_all_wrong": {
        **dict.fromkeys(
            ("start", "grpo", "dr_grpo", "reinforce_rej", "raft++", "reinforce", "reinforce_dropping"), 0.3
        ),
        "gain of dropping": 0.2,
        "gain of dividing": 0.01,
    },
    "dynamic_sampling": {
        "plain updates": 90,
        "dynamic updates": 40,
        "plain episodes": 9000,
        "dynamic episodes": 9000,
        "plain reached": 1,
        "dynamic reached": 1,
    },
    "pass_at_k": {"start pass@1": 0.1, "trained pass@1": 0.3, "start pass@most": 0.8, "trained pass@most": 0.4},
    "process_reward": {
        "rare start": 0.01,
        "rare process": 0.3,
        "rare outcome": 0.1,
        "rare outcome seen": 1.0,
        "common start": 0.3,
        "common process": 0.5,
        "common outcome": 0.5,
        "common outcome seen": 900.0,
    },
    "proxy_and_gold": {
        "gold at start": 3.0,
        "gold beyond": 3.0,
        "gold at end": 1.0,
        "kl at end": 9.0,
        "proxy rises": 4.0,
        "gold falls": 2.0,
    },
    "raft_early_grpo_late": {"raft++ early": 0.3, "grpo early": 0.2, "raft++ late": 0.4, "grpo late": 0.5},
    "retries_repeat": {
        **dict.fromkeys(
            f"{who} {what}" for who in ("start", "single", "multi") for what in ("solved", "solved at once")
        ),
        "start repeats": 0.1,
        "single repeats": 0.6,
        "multi repeats": 0.1,
    },
    "views_agree": {
        "completions": 63,
        "difference": 1e-16,
        "difference with lambda 0.95": 0.1,
        "room": 1e-9,
    },
}
DECIDES = {
    "clip_higher": "higher entropy",
    "dropping_all_wrong": "gain of dropping",
    "dynamic_sampling": "plain updates",
    "pass_at_k": "start pass@most",
    "process_reward": "rare process",
    "proxy_and_gold": "gold falls",
    "raft_early_grpo_late": "grpo late",
    "retries_repeat": "single repeats",
    "views_agree": "room",
}
"""What lies in favour of each claim."""


def measurements(name, change=0.0, spread=0.0):
    """Of six seeds: ``change`` and a spread to either side are added to what decides."""
    made = []
    for seed in SEEDS:
        one = {key: float(value or 0) for key, value in HELD[name].items()} | {"k": [1.0, 64.0]}
        one[DECIDES[name]] += change + (spread if seed % 2 else -spread)
        made.append(one)
    return made


@pytest.mark.parametrize("name", WANTED)
def test_each_claim_tells_all_three_outcomes(name):
    claim = find_claim(name)
    size = 1e4 if name == "dynamic_sampling" else 100
    assert claim.verdict(measurements(name)).text == "holds here"
    assert claim.verdict(measurements(name, change=-size)).text == "does not hold here"
    assert claim.verdict(measurements(name, spread=size)).text == "not told apart"


# What every claim holds


def test_the_claims_are_those_published():
    assert set(WANTED) <= set(claim_names())


@pytest.mark.parametrize("name", claim_names())
def test_every_claim_says_what_it_must(name):
    claim = find_claim(name)
    for text in (claim.statement, claim.protocol, claim.refuted_by):
        assert text.endswith(".")
        assert len(text) > 30
    assert "arXiv:" in claim.source


def test_a_new_claim_is_one_file(tmp_path, monkeypatch):
    (tmp_path / "brand_new.py").write_text(
        "from dataclasses import replace\n"
        "from benchmarks.claims.views_agree import CLAIM as OTHER\n"
        "CLAIM = replace(OTHER, name='brand_new')\n"
    )
    monkeypatch.setattr(benchmarks.claims, "__path__", [*benchmarks.claims.__path__, str(tmp_path)])
    assert "brand_new" in claim_names()
    assert find_claim("brand_new").name == "brand_new"


def test_a_file_without_its_claim_is_refused(tmp_path, monkeypatch):
    (tmp_path / "empty_handed.py").write_text("CLAIM = 3\n")
    monkeypatch.setattr(benchmarks.claims, "__path__", [*benchmarks.claims.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"must hold CLAIM = Claim\(name='empty_handed'"):
        find_claim("empty_handed")


def test_an_unknown_claim_gets_the_nearest_name():
    with pytest.raises(ValueError, match="did you mean clip_higher"):
        find_claim("clip_hihger")


# Cells on disk


def toy(experiment):
    return replace(find_claim("views_agree"), experiment=experiment)


def test_a_seed_leaves_a_cell_and_its_measurements(tmp_path):
    folder = tmp_path / Cell("claims", "views_agree", 3).path
    run(find_claim("views_agree"), 3, folder, quick=True)
    cell, done = (json.loads((folder / name).read_text()) for name in ("cell.json", "done.json"))
    assert (cell["environment"], cell["agent"], cell["seed"]) == ("claims", "views_agree", 3)
    assert cell["provenance"]["claim"].startswith("views_agree, quick #")
    assert done["seconds"] > 0
    assert done["measured"]["difference"] < 1e-12
    assert {path.name for path in folder.iterdir()} == {"cell.json", "done.json"}


def test_a_seed_that_fails_says_why(tmp_path):
    def broken(seed, folder, quick):
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match="no luck"):
        run(toy(broken), 0, tmp_path / "cell")
    assert json.loads((tmp_path / "cell" / "failed.json").read_text())["error"] == "RuntimeError: no luck"
    assert state(tmp_path / "cell") == "failed"


def test_verdicts_gather_what_is_whole_and_name_what_is_not(tmp_path, capsys):
    for seed in range(7):
        run(find_claim("views_agree"), seed, tmp_path / Cell("claims", "views_agree", seed).path, quick=True)
    cells = tmp_path / "cells" / "claims" / "views_agree"
    (cells / "5" / "done.json").write_text('{"measured": ')
    (cells / "6" / "done.json").unlink()
    main("verdicts", str(tmp_path))
    (row,) = json.loads((tmp_path / "verdicts.json").read_text())
    assert (row["name"], row["verdict"], row["seeds"]) == ("views_agree", "not told apart", [0, 1, 2, 3, 4])
    assert len(row["interval"]) == 3
    told = capsys.readouterr().out
    assert "views_agree/5 cannot be read" in told
    assert "views_agree/6 is killed" in told


def test_the_interval_of_one_seed_is_no_number(tmp_path):
    run(find_claim("views_agree"), 0, tmp_path / Cell("claims", "views_agree", 0).path, quick=True)
    [row] = tell(tmp_path)
    assert row["interval"][1:] == [None, None]


def test_seeds_of_two_versions_get_no_verdict(tmp_path):
    claim = find_claim("views_agree")
    for seed in (0, 1):
        run(claim, seed, tmp_path / Cell("claims", "views_agree", seed).path, quick=seed == 0)
    with pytest.raises(ValueError, match="different versions"):
        read_seeds(tmp_path, "views_agree")


def test_an_empty_folder_is_no_verdict(tmp_path):
    with pytest.raises(ValueError, match="no claim has a finished seed"):
        tell(tmp_path)


def test_a_command_that_is_none_says_what_is_one():
    with pytest.raises(ValueError, match="NAME SEED FOLDER, or"):
        main("views_agree")


# Parts of the experiments


def test_repeats_are_counted_per_retry():
    # Four retries: "ab" again, "ba" new; "B " is "b" again; "c" new.
    assert repeated([["ab", "ab", "ba"], ["x"], ["b", "B "], ["b", "c"]]) == 0.5
    assert repeated([["ab"]]) == 0.0


@pytest.mark.parametrize(
    ("completion", "tokens", "finish", "credit"),
    [
        ("abc", 4, "eos", (0.25, 0.25, 0.25, 0.25)),
        ("abd", 4, "eos", (0.25, 0.25, 0.0, 0.0)),
        ("ab", 3, "eos", (0.25, 0.25, 0.0)),
        ("abcd", 4, "length", (0.25, 0.25, 0.25, 0.0)),
        ("abc", 3, "length", (0.25, 0.25, 0.25)),
        ("", 1, "eos", (0.0,)),
    ],
)
def test_steps_pay_up_to_the_first_wrong_one(completion, tokens, finish, credit):
    sample = rewards.Sample(
        prompt="Sort cab: ", completion=completion, reference="abc", tokens=tuple(range(tokens)), finish=finish
    )
    [score] = StepsReward()([sample])
    assert score.tokens == credit
    assert score.correct is (credit == (0.25,) * 4)


def point(step, kl):
    return Point(step, kl, proxy=0.0, gold=0.0, gold_error=0.0, accuracy=Share(1, 2))


def test_beyond_is_the_first_look_so_far_away_or_the_last():
    curve = [point(0, 0.0), point(5, 1.9), point(10, 2.1), point(15, 1.0), point(20, 3.0)]
    assert beyond(curve).step == 10
    assert beyond(curve[:2]).step == 5


def test_reinforce_leaves_out_only_groups_without_a_right_answer():
    outcome = [1.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    batch = Trajectories(
        **dict.fromkeys(("tokens_BT", "source_BT", "logp_BT", "reward_BT"), torch.zeros(6, 1)),
        penalty_B=torch.zeros(6, dtype=torch.float64),
        group_B=torch.tensor([0, 0, 1, 1, 2, 2]),
        scores=[Score(value) for value in outcome],
        finish_B=None,
        prompts=[],
        completions=[],
        references=[],
    )
    assert plus_minus_one(batch, drop_all_wrong=False).tolist() == [1, -1, -1, -1, 1, 1]
    assert plus_minus_one(batch, drop_all_wrong=True).tolist() == [1, -1, 0, 0, 1, 1]


# The experiments themselves


@pytest.mark.slow
@pytest.mark.parametrize("name", claim_names())
def test_each_experiment_ends_in_finite_numbers(name, tmp_path, no_leftovers):
    claim = find_claim(name)
    assert isinstance(claim, Claim)
    measured = claim.experiment(0, tmp_path, True)
    values = [x for value in measured.values() for x in (value if isinstance(value, list) else [value])]
    assert values
    assert all(math.isfinite(x) for x in values)
    assert claim.verdict([measured]).text == "not told apart"

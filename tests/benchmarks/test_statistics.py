"""Against scipy's own functions, and against numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks import statistics
from benchmarks.statistics import Interval

SCORES = [[0.1, 0.5, 0.3], [0.9, 0.7, 0.8]]
scores = st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=2, max_size=6)
strata = st.lists(scores, min_size=1, max_size=4)
FEW = settings(max_examples=30, deadline=None)


# A number without an interval is not printed


def test_an_interval_prints_its_number_between_its_ends() -> None:
    assert Interval(0.5, 0.25, 1.0).text(".2f") == "0.50 [0.25, 1.00]"


@pytest.mark.parametrize(
    "interval",
    [
        Interval(0.5, -math.inf, math.inf),
        Interval(0.5, 0.1, math.inf),
        Interval(math.nan, 0.0, 1.0),
        statistics.UNKNOWN,
    ],
    ids=str,
)
def test_a_number_without_an_interval_is_not_printed(interval: Interval) -> None:
    assert interval.text() == "–"


@pytest.mark.parametrize(
    "summary",
    [
        statistics.mean,
        statistics.interquartile_mean,
        statistics.median,
        lambda score_MN: statistics.paired_difference(score_MN, score_MN).difference,
        lambda score_MN: statistics.probability_of_improvement(score_MN, score_MN),
        lambda score_MN: statistics.restricted_mean_time(score_MN, 1.0),
        lambda score_MN: statistics.curve(score_MN)[0],
        lambda score_MN: statistics.performance_profile(score_MN, [0.5])[0],
    ],
    ids=["mean", "interquartile", "median", "paired", "improvement", "time", "curve", "profile"],
)
def test_one_seed_gives_a_number_and_no_interval(summary: Callable[..., Interval]) -> None:
    found = summary([[0.7]])
    assert math.isfinite(found.value)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert found.text() == "–"


def test_one_seed_on_one_of_several_environments_gives_no_interval() -> None:
    assert not statistics.mean([[0.1, 0.2, 0.3], [0.5]]).known


@pytest.mark.parametrize("wrong", [[[0.1, math.nan]], [[0.1, math.inf]]], ids=["nan", "inf"])
def test_what_is_ungraded_is_refused_and_not_averaged(wrong: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="finite"):
        statistics.mean(wrong)


@pytest.mark.parametrize(
    "nothing", [[], [[]], [[0.1, 0.2], []], [0.1, 0.2]], ids=["no sample", "empty", "one empty", "no samples"]
)
def test_a_mean_of_no_samples_is_refused(nothing: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="need samples of at least a number each"):
        statistics.mean(nothing)


def test_samples_that_do_not_fit_in_memory_at_once_have_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics.paired_difference([np.arange(40.0)], [np.arange(40.0)[::-1] + 1])
    monkeypatch.setattr(statistics, "AT_ONCE", 4000)
    pieces = statistics.paired_difference([np.arange(40.0)], [np.arange(40.0)[::-1] + 1])
    assert pieces.difference == whole.difference
    assert pieces.p == pytest.approx(whole.p, abs=0.02)


# Aggregates


def test_the_interval_of_one_sample_is_scipys() -> None:
    score_N = np.random.default_rng(1).normal(size=12)
    theirs = stats.bootstrap(
        (score_N,), np.mean, method="percentile", n_resamples=statistics.RESAMPLES, rng=0
    ).confidence_interval
    ours = statistics.mean([score_N])
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high))


def test_environments_are_resampled_each_for_itself() -> None:
    # Two environments of constant scores: whatever is resampled within them, the mean stays.
    assert statistics.mean([[0.0, 0.0], [1.0, 1.0]]) == Interval(0.5, 0.5, 0.5)


def test_mean_and_median_are_over_environments_of_means_over_seeds() -> None:
    score_MN = [[0.0, 1.0], [0.2, 0.2, 0.2, 0.2], [5.0, 7.0]]
    assert statistics.mean(score_MN).value == pytest.approx((0.5 + 0.2 + 6.0) / 3)
    assert statistics.median(score_MN).value == pytest.approx(0.5)


def test_the_interquartile_mean_is_of_the_middle_half_of_all_runs() -> None:
    score_MN = [[-100.0, 1.0, 2.0, 3.0], [2.0, 3.0, 4.0, 100.0]]
    assert statistics.interquartile_mean(score_MN).value == pytest.approx((2 + 2 + 3 + 3) / 4)
    assert statistics.interquartile_mean(score_MN).value == stats.trim_mean(np.ravel(score_MN), 0.25)


@FEW
@given(strata)
def test_an_interval_lies_within_the_scores_and_holds_shifts_and_scales(score_MN: list[list[float]]) -> None:
    found = statistics.mean(score_MN)
    flat = [score for row in score_MN for score in row]
    assert min(flat) - 1e-6 <= found.low <= found.high + 1e-6 <= max(flat) + 2e-6
    moved = statistics.mean([[2 * score + 3 for score in row] for row in score_MN])
    wanted = [2 * end + 3 for end in (found.value, found.low, found.high)]
    assert [moved.value, moved.low, moved.high] == pytest.approx(wanted, abs=1e-6)


def test_the_same_seed_gives_the_same_interval_and_another_one_hardly_another() -> None:
    first, again, other = (statistics.mean(SCORES, rng=seed) for seed in (0, 0, 1))
    assert first == again
    assert (first.low, first.high) == pytest.approx((other.low, other.high), abs=0.02)


@pytest.mark.parametrize(
    ("environments", "seeds", "least", "most"), [(1, 3, 0.65, 0.83), (1, 20, 0.90, 0.97), (8, 3, 0.82, 0.93)]
)
def test_how_often_the_interval_holds_the_true_mean(environments: int, seeds: int, least: float, most: float) -> None:
    generator = np.random.default_rng(0)
    found = [statistics.mean(generator.normal(size=(environments, seeds))) for _ in range(300)]
    assert least <= np.mean([interval.low <= 0 <= interval.high for interval in found]) <= most


# Comparisons


def test_paired_differences_do_not_see_what_seeds_have_in_common() -> None:
    hard_and_easy = np.array([0.1, 0.5, 0.9])
    found = statistics.paired_difference([hard_and_easy + 0.05], [hard_and_easy])
    assert (found.difference.value, found.difference.low, found.pairs) == (pytest.approx(0.05), pytest.approx(0.05), 3)


def test_the_p_value_is_that_of_swapping_pairs() -> None:
    # All 2^4 ways to swap: as great a difference, either way, only as it is and all swapped.
    assert statistics.paired_difference([[2.0, 3.0, 4.0, 5.0]], [[1.0, 1.0, 1.0, 1.0]]).p == pytest.approx(2 / 16)
    ours, theirs = np.random.default_rng(2).normal(size=(2, 7))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1).T
    means = np.abs((signs * (ours - theirs)).mean(axis=1))
    wanted = np.mean(means >= abs((ours - theirs).mean()) - 1e-12)
    assert statistics.paired_difference([ours], [theirs]).p == pytest.approx(wanted)


def test_environments_weigh_alike_in_a_paired_difference() -> None:
    found = statistics.paired_difference([[1.0, 1.0], [0.0] * 6], [[0.0, 0.0], [0.0] * 6])
    assert (found.difference.value, found.pairs) == (0.5, 8)
    # In the test too: 1 and half of 1.5 and of -1 come to 1.25, and with other signs to 2.25, 1.25, 0.75 and 0.25 either way.
    assert statistics.paired_difference([[1.0], [1.5, -1.0]], [[0.0], [0.0, 0.0]]).p == pytest.approx(4 / 8)


def test_pairs_that_do_not_pair_up_are_refused() -> None:
    with pytest.raises(ValueError, match="same number, got 2 and 3"):
        statistics.paired_difference([[0.1, 0.2]], [[0.1, 0.2, 0.3]])
    with pytest.raises(ValueError, match="same number"):
        statistics.paired_difference([[0.1]], [[0.1], [0.2]])


def test_probability_of_improvement_is_scipys_mann_whitney() -> None:
    ours, theirs = np.random.default_rng(3).integers(0, 5, size=(2, 3, 6)).astype(float)
    wanted = np.mean([stats.mannwhitneyu(x, y).statistic / 36 for x, y in zip(ours, theirs, strict=True)])
    assert statistics.probability_of_improvement(ours, theirs).value == pytest.approx(wanted)


@FEW
@given(strata, st.randoms())
def test_improvement_over_one_and_of_it_add_up_to_one(score_MN: list[list[float]], random: object) -> None:
    theirs = [[score + random.choice([-1.0, 0.0, 1.0]) for score in row] for row in score_MN]  # type: ignore[attr-defined]
    there = statistics.probability_of_improvement(score_MN, theirs).value
    back = statistics.probability_of_improvement(theirs, score_MN).value
    assert there + back == pytest.approx(1.0)


def test_a_performance_profile_counts_runs_above_each_threshold() -> None:
    profile = statistics.performance_profile([[0.1, 0.5], [0.9, 0.7, 0.5, 0.3]], [0.0, 0.4, 0.5, 1.0])
    assert [at.value for at in profile] == pytest.approx([1.0, (1 / 2 + 3 / 4) / 2, (0 + 2 / 4) / 2, 0.0])


@FEW
@given(strata)
def test_a_performance_profile_falls(score_MN: list[list[float]]) -> None:
    profile = statistics.performance_profile(score_MN, np.linspace(-1e3, 1e3, 20))
    for first, second in pairwise(profile):
        assert first.value >= second.value
        assert first.low >= second.low
        assert first.high >= second.high


def test_holm_by_hand() -> None:
    # In order .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .04, and none below the one before.
    assert statistics.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert statistics.holm([0.6, 0.5]) == pytest.approx([1.0, 1.0])
    assert len(statistics.holm([])) == 0


@FEW
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_lies_between_the_raw_and_bonferronis_and_above_the_false_discovery_rate(p_N: list[float]) -> None:
    corrected = statistics.holm(p_N)
    assert (corrected >= np.array(p_N)).all()
    assert (corrected <= np.minimum(np.array(p_N) * len(p_N), 1) + 1e-12).all()
    assert (corrected >= stats.false_discovery_control(p_N) - 1e-12).all()


# Learning curves


def test_the_area_is_by_the_trapezoid_rule_over_the_share_of_the_budget() -> None:
    # 0 to 1 over a quarter is 1/8, then 1 for the other three.
    assert statistics.area_under_curve([0.0, 0.25, 1.0], [0.0, 1.0, 1.0]) == pytest.approx(1 / 8 + 3 / 4)
    # A curve that ends early is averaged over what there is.
    assert statistics.area_under_curve([0.0, 0.5], [0.0, 1.0]) == pytest.approx(0.5)


def test_the_time_to_a_threshold_is_linear_between_points() -> None:
    at, score = [0.0, 100.0, 300.0], [0.1, 0.2, 0.6]
    assert statistics.time_to(0.4, at, score) == pytest.approx(200.0)
    assert statistics.time_to(0.2, at, score) == 100.0
    assert statistics.time_to(0.05, at, score) == 0.0
    assert statistics.time_to(0.6, at, score) == 300.0
    assert statistics.time_to(0.7, at, score) == math.inf


def test_the_first_time_counts_where_a_curve_falls_again() -> None:
    assert statistics.time_to(0.5, [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 0.0, 1.0]) == pytest.approx(0.5)


def test_who_never_gets_there_counts_with_the_budget() -> None:
    found = statistics.restricted_mean_time([[100.0, math.inf]], 400.0)
    assert (found.value, found.low, found.high) == (250.0, 100.0, 400.0)


@pytest.mark.parametrize("share", [[0.0], [0.5, 0.5], [1.0, 0.0]], ids=str)
def test_what_is_no_learning_curve_is_refused(share: list[float]) -> None:
    with pytest.raises(ValueError, match="two points at least, one after the other"):
        statistics.area_under_curve(share, share)


def test_a_curve_resamples_seeds_whole() -> None:
    score_NK = np.array([[0.0, 1.0, 0.5], [0.2, 0.0, 0.7], [0.4, 0.1, 0.0]])
    curve = statistics.curve(score_NK)
    assert [at.value for at in curve] == pytest.approx(score_NK.mean(axis=0))
    # Where two points are alike in every seed, so are their bands: both were made of the same seeds.
    alike, too = statistics.curve(np.random.default_rng(0).normal(size=(8, 1)).repeat(2, axis=1))
    assert alike == too


def test_the_frontier_is_the_root_of_the_kl_against_the_reward() -> None:
    (start, _), (distance, reward) = statistics.kl_reward_frontier([[0.0, 4.0], [0.0, 16.0]], [[0.1, 0.5], [0.1, 0.7]])
    assert start.value == 0.0
    assert (distance.value, distance.low, distance.high) == (3.0, 2.0, 4.0)
    assert reward.value == pytest.approx(0.6)


# Samples of a problem


def test_pass_at_k_of_the_reference_values() -> None:
    found = [float(statistics.pass_at_k([10], [3], k)[0]) for k in (1, 2, 5, 8)]
    assert found == pytest.approx([0.3, 0.533333, 0.916667, 1.0], abs=1e-6)


@FEW
@given(st.integers(1, 40), st.data())
def test_pass_at_k_is_the_hypergeometric_chance_of_any(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    wanted = 1 - stats.hypergeom(n, c, k).pmf(0)
    assert statistics.pass_at_k([n], [float(c)], k) == pytest.approx([wanted])


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert statistics.pass_at_k([5000], [1], 2500) == pytest.approx([0.5])


@pytest.mark.parametrize(
    ("n", "c", "k", "why"), [(4, 1, 5, "at most, got 5"), (4, 1, 0, "got 0"), (4, 5, 2, "0 to n are right")]
)
def test_pass_at_k_of_too_few_samples_is_refused(n: int, c: int, k: int, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        statistics.pass_at_k([n], [c], k)


def test_majority_at_k_by_hand() -> None:
    answers, right = ["4", "4", "5"], [True, True, False]
    assert statistics.majority_at_k(answers, right, 1) == pytest.approx(2 / 3)
    assert statistics.majority_at_k(answers, right, 2) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert statistics.majority_at_k(answers, right, 3) == 1.0


def test_a_vote_of_all_samples_does_not_depend_on_their_order() -> None:
    assert statistics.majority_at_k(["5", "4", "5", "4"], [False, True, False, True], 4) == 0.5


def test_choices_drawn_at_random_come_close_to_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = list("aaaaabbbbbcdefg")
    right = [answer == "a" for answer in answers]
    drawn = statistics.majority_at_k(answers, right, 7)
    monkeypatch.setattr(statistics, "SUBSETS", math.comb(15, 7))
    assert statistics.majority_at_k(answers, right, 7) == pytest.approx(drawn, abs=0.05)
    assert statistics.majority_at_k(answers, right, 7) != drawn


# Comparisons by a judge


def games(*wins: float) -> np.ndarray:
    """Two agents, a game a prompt."""
    return np.array([[[math.nan, win], [1 - win, math.nan]] for win in wins])


def test_a_win_rate_averages_over_both_orders() -> None:
    # A judge for whom the first is always better has no say.
    assert statistics.win_rate([[1.0, 0.0], [1.0, 0.0]]) == Interval(0.5, 0.5, 0.5)
    assert statistics.win_rate([[1.0, 1.0], [1.0, 0.5], [0.0, 0.0], [0.0, 0.5]]).value == pytest.approx(0.5)


def test_a_judge_that_likes_length_alone_finds_no_winner_at_equal_length() -> None:
    generator = np.random.default_rng(0)
    longer = generator.normal(1.0, 1.0, size=400)
    wins = (generator.random(400) < 1 / (1 + np.exp(-3 * np.tanh(longer / longer.std())))).astype(float)
    assert wins.mean() > 0.65
    found = statistics.length_controlled_win_rate(wins, longer)
    assert found.low < 0.5 < found.high


def test_lengths_that_do_not_matter_leave_the_win_rate_as_it_is() -> None:
    wins = np.tile([1.0, 1.0, 1.0, 0.0], 50)
    longer = np.repeat([-1.0, 1.0], 100)
    # 150 wins and half of a made-up tie in 201 games
    assert statistics.length_controlled_win_rate(wins, longer).value == pytest.approx(150.5 / 201, abs=1e-4)


def test_equal_lengths_are_no_division_by_zero() -> None:
    found = statistics.length_controlled_win_rate([1.0, 1.0, 1.0, 0.0], [0.0] * 4)
    assert found.value == pytest.approx(3.5 / 5, abs=1e-4)


def test_elo_after_one_game() -> None:
    assert [rating.value for rating in statistics.elo(games(1.0))] == [1002.0, 998.0]


def test_elo_of_a_judge_without_preference_stays_where_it_was() -> None:
    for rating in statistics.elo(games(*[0.5] * 20)):
        assert rating == Interval(1000.0, 1000.0, 1000.0)


def test_elo_is_averaged_over_orders_of_the_games() -> None:
    # By hand: the second game is expected at 1 / (1 + 10^(-4 / 400)), whichever comes first.
    expected = 1 / (1 + 10 ** (-4 / 400))
    win_then_loss, loss_then_win = 1002 - 4 * expected, 998 + 4 * expected
    first, second = statistics.elo(games(1.0, 0.0))
    assert win_then_loss < first.value < loss_then_win
    assert first.value + second.value == pytest.approx(2000)
    assert first.value == pytest.approx(1000, abs=0.01)
    assert statistics.elo(games(1.0, 1.0))[0].value == pytest.approx(1002 + 4 * (1 - expected), abs=1e-9)


def test_bradley_terry_of_three_wins_to_one() -> None:
    strong, weak = statistics.bradley_terry_ratings(games(1.0, 1.0, 1.0, 0.0), pseudo_ties=0)
    assert strong - weak == pytest.approx(190.848502, abs=1e-6)
    assert strong + weak == pytest.approx(2000)


def test_a_made_up_tie_keeps_who_never_lost_finite() -> None:
    strong, weak = statistics.bradley_terry(games(1.0, 1.0, 1.0))
    # 3.5 wins to 0.5
    assert strong.value - weak.value == pytest.approx(400 * math.log10(7))
    assert strong.known


def test_ratings_of_one_prompt_have_no_interval() -> None:
    for rating in (*statistics.elo(games(1.0)), *statistics.bradley_terry(games(1.0))):
        assert not rating.known


def test_ratings_find_the_order_that_games_were_drawn_from() -> None:
    strength = np.array([0.0, 0.6, 1.2])
    chance = 1 / (1 + np.exp(strength[None, :] - strength[:, None]))
    drawn = (np.random.default_rng(0).random((200, 3, 3)) < chance).astype(float)
    upper = np.triu(np.ones((3, 3), dtype=bool), 1)
    win_PAA = np.where(upper, drawn, np.nan)  # what lies below is the same game
    ratings = statistics.bradley_terry(win_PAA)
    wanted = 1000 + 400 / math.log(10) * (strength - strength.mean())
    for rating, true in zip(ratings, wanted, strict=True):
        assert rating.low < true < rating.high
    elo = [rating.value for rating in statistics.elo(win_PAA)]
    assert elo == sorted(elo)


def test_games_that_were_not_played_do_not_count() -> None:
    missing = np.full((1, 2, 2), math.nan)
    played = games(1.0, 1.0, 0.0)
    for rate in (statistics.bradley_terry, statistics.elo):
        with_gap = [rating.value for rating in rate(np.concatenate([played, missing]))]
        assert with_gap == pytest.approx([rating.value for rating in rate(played)], abs=0.01)


def test_what_is_no_table_of_games_is_refused() -> None:
    with pytest.raises(ValueError, match="prompts × agents × agents"):
        statistics.elo([[1.0, 0.0]])

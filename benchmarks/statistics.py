"""Statistics of few runs: every number with its interval.

Intervals are 95 % percentile bootstraps, by scipy. What is resampled decides what an interval speaks of: seeds, of another
training like this one; problems or prompts, of these policies on other ones. With a single seed (or problem) nothing is known
of the spread: the interval is infinitely wide, and :meth:`Interval.text` does not print the number.

Bootstraps of few seeds are too narrow: that of three seeds goes from the least to the greatest of them, and holds the
mean in about 75 % of experiments. Several environments together do better, as strata of one bootstrap (arXiv:2108.13264).

Shapes: M environments (strata), N seeds, K points, P problems or prompts, A agents. ``score_MN`` is a sequence of M samples
whose sizes may differ. Numbers must be finite: what is ungraded has to be left out first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special, stats

from rewards.judge.pairwise import bradley_terry as strengths

RESAMPLES = 5000
AT_ONCE = 10_000_000
"""Numbers of resamples in memory at once."""
REFITS = 500
"""Resamples where each needs a fit."""
SHUFFLES = 10
"""Orders of the games over which Elo is averaged in each resample."""
SUBSETS = 1000
"""Most subsets of a problem's samples that a majority vote is averaged over."""

Statistic = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and its 95 % interval; infinitely wide where there is too little to tell.

    Example:
        >>> Interval(0.5, 0.25, 0.75).text(".0%")
        '50% [25%, 75%]'
        >>> Interval(0.5, -math.inf, math.inf).text()
        '–'
    """

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there is a number and an interval that says something about it."""
        return math.isfinite(self.value) and math.isfinite(self.low) and math.isfinite(self.high)

    def text(self, form: str = ".3f") -> str:
        """The number with its interval, each by that format specification; a dash without an interval."""
        if not self.known:
            return "–"
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


UNKNOWN = Interval(math.nan, -math.inf, math.inf)
"""Of nothing."""


# Aggregates over runs


def mean(score_MN: Sequence[ArrayLike], *, rng: int = 0) -> Interval:
    """Mean over environments of the mean over seeds, with a stratified bootstrap: seeds are resampled in each environment.

    Example:
        >>> mean([[1.0, 2.0, 3.0]]).text(".1f")
        '2.0 [1.0, 3.0]'
    """
    return _one(_bootstrap(score_MN, _mean_of_means, rng))


def interquartile_mean(score_MN: Sequence[ArrayLike], *, rng: int = 0) -> Interval:
    """Mean of the middle half of all runs, with a stratified bootstrap (arXiv:2108.13264, section 4.3).

    A quarter of the runs, rounded down, goes from each end: of fewer than four it is the mean.
    """
    return _one(_bootstrap(score_MN, _interquartile_mean, rng))


def median(score_MN: Sequence[ArrayLike], *, rng: int = 0) -> Interval:
    """Median over environments of the mean over seeds, with a stratified bootstrap (arXiv:2108.13264)."""
    return _one(_bootstrap(score_MN, _median_of_means, rng))


def curve(score_NK: ArrayLike, *, rng: int = 0) -> list[Interval]:
    """Mean over seeds at each point. A resample takes whole curves, so the band of one point fits that of the next."""
    return _each(_bootstrap([np.asarray(score_NK, dtype=float).T], _mean_of_means, rng))


def performance_profile(score_MN: Sequence[ArrayLike], threshold_K: ArrayLike, *, rng: int = 0) -> list[Interval]:
    """Share of runs that score above each threshold, environments weighing alike (arXiv:2108.13264, section 4.2)."""
    above = np.asarray(threshold_K, dtype=float)[:, None]
    above_MKN = [np.where(np.asarray(score_N, dtype=float) > above, 1.0, 0.0) for score_N in score_MN]
    return _each(_bootstrap(above_MKN, _mean_of_means, rng))


def probability_of_improvement(
    ours_MN: Sequence[ArrayLike], theirs_MN: Sequence[ArrayLike], *, rng: int = 0
) -> Interval:
    """How likely a run of ours scores above one of theirs on an environment drawn at random (arXiv:2108.13264, section 4.3).

    The Mann–Whitney statistic over the number of pairs, a tie being half, averaged over environments; seeds of both are
    resampled independently in each environment. Where all of ours are above all of theirs they are so in every resample: the
    interval then is a point, which with few seeds says too much.

    Example:
        >>> round(probability_of_improvement([[1, 2, 3]], [[0, 2, 2]]).value, 6)
        0.666667
    """
    environments = len(_same_length(ours_MN, theirs_MN))

    def statistic(*samples: np.ndarray, axis: int) -> np.ndarray:
        pairs = zip(samples[:environments], samples[environments:], strict=True)
        return np.mean([_share_above(ours, theirs, axis) for ours, theirs in pairs], axis=0)

    return _one(_bootstrap([*ours_MN, *theirs_MN], statistic, rng))


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Ours less theirs.

    Attributes:
        difference: mean of the differences, with its interval.
        p: of the two-sided test that the sign of each difference is an even chance; with n pairs at least ``2 / 2**n``.
        pairs: how many.
    """

    difference: Interval
    p: float
    pairs: int


def paired_difference(
    ours_MN: Sequence[ArrayLike], theirs_MN: Sequence[ArrayLike], *, rng: int = 0
) -> PairedDifference:
    """Mean over environments of the mean difference between runs of the same seed (or of scores on the same problem).

    The interval resamples pairs in each environment; the test swaps the two of a pair (:func:`scipy.stats.permutation_test`),
    exactly where there are few enough pairs.

    Raises:
        ValueError: the two do not pair up.

    Example:
        >>> found = paired_difference([[2.0, 3.0, 4.0]], [[1.0, 1.0, 1.0]])
        >>> found.difference.text(".1f"), found.p
        ('2.0 [1.0, 3.0]', 0.25)
    """
    ours = [_finite(ours_N) for ours_N in ours_MN]
    theirs = [_finite(theirs_N) for theirs_N in theirs_MN]
    for ours_N, theirs_N in zip(ours, _same_length(theirs, ours), strict=True):
        _same_length(ours_N, theirs_N)
    weights = np.concatenate([np.full(len(ours_N), 1 / len(ours_N)) for ours_N in ours])

    def statistic(ours: np.ndarray, theirs: np.ndarray, axis: int) -> np.ndarray:
        return np.average(ours - theirs, axis=axis, weights=weights)

    differences = [ours_N - theirs_N for ours_N, theirs_N in zip(ours, theirs, strict=True)]
    if len(weights) < 2:  # either sign is as likely
        return PairedDifference(mean(differences, rng=rng), 1.0, len(weights))
    test = stats.permutation_test(
        (np.concatenate(ours), np.concatenate(theirs)),
        statistic,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=_batch(len(weights)),
        axis=-1,
        rng=rng,
    )
    return PairedDifference(mean(differences, rng=rng), float(test.pvalue), len(weights))


def holm(p_N: ArrayLike) -> np.ndarray:
    """P-values corrected for their number: the share of families with any false finding stays below the level (Holm 1979).

    For the share of false ones among the findings there is :func:`scipy.stats.false_discovery_control`.

    Example:
        >>> holm([0.01, 0.04, 0.03]).round(6).tolist()
        [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_N, dtype=float)
    order = np.argsort(p)
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return corrected


# Learning curves


def area_under_curve(share_K: ArrayLike, score_K: ArrayLike) -> float:
    """Mean height of a learning curve over the budget, by the trapezoid rule.

    Args:
        share_K: of the budget, at each point, upwards.
        score_K: there.

    Raises:
        ValueError: fewer than two points, or points that do not go upwards.

    Example:
        >>> area_under_curve([0.0, 0.5, 1.0], [0.0, 1.0, 1.0])
        0.75
    """
    share, score = _curve(share_K, score_K)
    return float(np.trapezoid(score, share) / (share[-1] - share[0]))


def time_to(threshold: float, spent_K: ArrayLike, score_K: ArrayLike) -> float:
    """What is spent when a learning curve first reaches a threshold, linear between points; infinite if it never does.

    Raises:
        ValueError: see :func:`area_under_curve`.

    Example:
        >>> time_to(0.5, [0, 100, 200], [0.0, 0.4, 0.8])
        125.0
    """
    spent, score = _curve(spent_K, score_K)
    reached = np.flatnonzero(score >= threshold)
    if not len(reached):
        return math.inf
    after = reached[0]
    if after == 0:
        return float(spent[0])
    part = (threshold - score[after - 1]) / (score[after] - score[after - 1])
    return float(spent[after - 1] + part * (spent[after] - spent[after - 1]))


def restricted_mean_time(time_MN: Sequence[ArrayLike], budget: float, *, rng: int = 0) -> Interval:
    """Mean of ``min(time, budget)``: a run that never got there counts as if it had at the end of its budget.

    This is the restricted mean of survival analysis. It makes slow runs look faster than they are and so is to be read beside
    the number of runs that got there; the budget must be the same for all that are compared.
    """
    return mean([np.minimum(np.asarray(time_N, dtype=float), budget) for time_N in time_MN], rng=rng)


def kl_reward_frontier(kl_NK: ArrayLike, reward_NK: ArrayLike, *, rng: int = 0) -> list[tuple[Interval, Interval]]:
    """Where a training stands at each point: square root of the KL to its start, and reward (arXiv:2210.10760).

    Args:
        kl_NK: nats an episode, at each point of each seed.
        reward_NK: there.
    """
    return list(zip(curve(np.sqrt(_finite(kl_NK)), rng=rng), curve(reward_NK, rng=rng), strict=True))


# Samples of a problem


def pass_at_k(samples_P: ArrayLike, right_P: ArrayLike, k: int) -> np.ndarray:
    """Chance that of k samples of a problem one is right: ``1 - C(n - c, k) / C(n, k)``, unbiased (arXiv:2107.03374, eq. 1).

    Its interval is that of :func:`mean` over problems, since the samples of one problem do not count as independent.

    Args:
        samples_P: graded samples of each problem, at least k.
        right_P: how many of them are right.
        k: samples of one attempt.

    Returns:
        ``(P,)``.

    Raises:
        ValueError: too few samples, or more right ones than samples.

    Example:
        >>> pass_at_k([10], [3], 5).round(6).tolist()
        [0.916667]
    """
    samples, right = ([int(count) for count in np.asarray(counts)] for counts in (samples_P, right_P))
    _enough(min(samples, default=k), k)
    if not all(0 <= c <= n for n, c in zip(samples, right, strict=True)):
        raise ValueError(f"of n samples 0 to n are right, got {right} of {samples}")
    return np.array([1 - math.comb(n - c, k) / math.comb(n, k) for n, c in zip(samples, right, strict=True)])


def majority_at_k(answers_N: Sequence[Hashable], right_N: Sequence[bool], k: int, *, rng: int = 0) -> float:
    """Chance that the most frequent of k answers to one problem is right: maj@k (arXiv:2203.11171).

    Averaged over all choices of k of the N samples, or over some drawn at random where there are many. Of answers that are
    equally frequent each has the same chance.

    Args:
        answers_N: as they are to be counted, so normalised: "1/2" and "0.5" are two answers here.
        right_N: whether each is right.
        k: samples of one vote.

    Raises:
        ValueError: too few samples.

    Example:
        >>> majority_at_k(["4", "4", "5"], [True, True, False], 2)  # of three choices two are draws
        0.6666666666666666
    """
    _enough(len(answers_N), k)
    if math.comb(len(answers_N), k) <= SUBSETS:
        choices = list(combinations(range(len(answers_N)), k))
    else:
        generator = np.random.default_rng(rng)
        choices = [tuple(generator.permutation(len(answers_N))[:k]) for _ in range(SUBSETS)]
    return float(np.mean([_vote(answers_N, right_N, chosen) for chosen in choices]))


def _vote(answers_N: Sequence[Hashable], right_N: Sequence[bool], chosen: Sequence[int]) -> float:
    votes = Counter(answers_N[i] for i in chosen)
    most = max(votes.values())
    winners = {answers_N[i]: bool(right_N[i]) for i in chosen if votes[answers_N[i]] == most}
    return sum(winners.values()) / len(winners)


# Comparisons by a judge


def win_rate(win_PO: ArrayLike, *, rng: int = 0) -> Interval:
    """Share of comparisons won, a tie being half, averaged over both orders of showing; prompts are resampled.

    Args:
        win_PO: of each prompt, in each order: 1 if ours wins, 0.5 for a tie, 0.
    """
    return mean([_finite(win_PO).mean(axis=1)], rng=rng)


def length_controlled_win_rate(win_P: ArrayLike, longer_P: ArrayLike, *, rng: int = 0) -> Interval:
    """Win rate as it would be at equal lengths (arXiv:2404.04475); prompts are resampled.

    ``sigmoid(a + b tanh(d))`` is fitted to the wins by maximum likelihood, d being the difference of the lengths over its
    standard deviation, and read at d = 0. Half a made-up tie at each end of the length term keeps both coefficients finite.
    The paper's term for the difficulty of each prompt needs many models, and is left out.

    Args:
        win_P: of each prompt, averaged over both orders.
        longer_P: how much longer ours is than theirs.
    """
    win, longer = _finite(win_P), _finite(longer_P)
    _same_length(win, longer)
    length = np.tanh(longer / (longer.std() or 1.0))

    def at_equal_length(row: np.ndarray) -> float:
        return _win_rate_at_zero(np.append(win[row], [0.5, 0.5]), np.append(length[row], [-1.0, 1.0]))

    rows = _resampled(len(win), rng)
    return _percentiles(
        at_equal_length(np.arange(len(win))), np.array([at_equal_length(row) for row in rows]), len(win)
    )


def _win_rate_at_zero(win: np.ndarray, length: np.ndarray) -> float:
    weight = np.ones(len(win))
    weight[-2:] = 0.5
    design = np.stack([np.ones(len(win)), length])

    def loss(coefficients: np.ndarray) -> tuple[float, np.ndarray]:
        logit = coefficients @ design
        gradient = design @ (weight * (special.expit(logit) - win))
        return float(weight @ (np.logaddexp(0.0, logit) - win * logit)), gradient

    found = optimize.minimize(loss, np.zeros(2), jac=True, method="BFGS")
    return float(special.expit(found.x[0]))


def bradley_terry(win_PAA: ArrayLike, *, rng: int = 0) -> list[Interval]:
    """Ratings of agents on the scale of Elo, 1000 in the mean; prompts are resampled, with all their games.

    Only differences mean something. See :func:`bradley_terry_ratings`, with its made-up tie.

    Args:
        win_PAA: on each prompt, the row's agent against the column's: 1 if it wins, 0.5 for a tie, 0; NaN for no game. An
            average over both orders is one game. What lies on and below the diagonal is not read.

    Returns:
        A rating for each agent.
    """
    win, *_ = _games(win_PAA)
    drawn_RA = np.array([bradley_terry_ratings(win[row]) for row in _resampled(len(win), rng)])
    values = bradley_terry_ratings(win).tolist()
    return [_percentiles(value, drawn, len(win)) for value, drawn in zip(values, drawn_RA.T, strict=True)]


def bradley_terry_ratings(win_PAA: ArrayLike, pseudo_ties: float = 1.0) -> np.ndarray:
    """The same without intervals: who is ``400 / ln 10 · s`` points ahead wins with probability sigmoid(s).

    Maximum likelihood; see :func:`rewards.judge.pairwise.bradley_terry`.

    Args:
        win_PAA: see :func:`bradley_terry`.
        pseudo_ties: made-up ties added to each pair, which keep finite who never lost.

    Returns:
        ``(A,)``.
    """
    win, first_Q, second_Q = _games(win_PAA)
    win_PQ = win[:, first_Q, second_Q]
    won_AA = np.zeros(win.shape[1:])
    won_AA[first_Q, second_Q] = np.nansum(win_PQ, axis=0)
    won_AA[second_Q, first_Q] = np.nansum(1 - win_PQ, axis=0)
    return 1000 + 400 / math.log(10) * np.array(strengths(list(won_AA), pseudo_ties))


def elo(win_PAA: ArrayLike, *, k: float = 4.0, start: float = 1000.0, rng: int = 0) -> list[Interval]:
    """Elo ratings after all games, averaged over random orders of them; prompts are resampled, with all their games.

    After a game the winner takes ``k (result - expected)`` points from the loser. Ratings depend on the order and, with
    few games, have hardly left the start: prefer :func:`bradley_terry`.

    Args:
        win_PAA: see :func:`bradley_terry`.
        k: most that one game moves a rating.
        start: rating of all before the first game.

    Returns:
        A rating for each agent.

    Example:
        >>> [rating.value for rating in elo([[[math.nan, 1.0], [0.0, math.nan]]])]
        [1002.0, 998.0]
    """
    win, first_Q, second_Q = _games(win_PAA)
    win_PQ = win[:, first_Q, second_Q]
    prompts, pairs = win_PQ.shape
    generator = np.random.default_rng(rng)
    rows = np.concatenate([np.arange(prompts)[None], _resampled(prompts, rng)])
    # First the games as they are, then resamples of them.
    row_RP = np.repeat(rows, [REFITS, *[SHUFFLES] * REFITS], axis=0)
    order_RG = generator.permuted(np.tile(np.arange(prompts * pairs), (len(row_RP), 1)), axis=1)
    rating_RA = np.full((len(row_RP), win.shape[1]), float(start))
    every = np.arange(len(row_RP))
    for order in order_RG.T:
        first, second = first_Q[order % pairs], second_Q[order % pairs]
        expected = 1 / (1 + 10 ** ((rating_RA[every, second] - rating_RA[every, first]) / 400))
        moved = np.nan_to_num(k * (win_PQ[row_RP[every, order // pairs], order % pairs] - expected))
        rating_RA[every, first] += moved
        rating_RA[every, second] -= moved
    drawn_RA = rating_RA[REFITS:].reshape(REFITS, SHUFFLES, -1).mean(axis=1)
    values = rating_RA[:REFITS].mean(axis=0)
    return [_percentiles(float(value), drawn, prompts) for value, drawn in zip(values, drawn_RA.T, strict=True)]


def _games(win_PAA: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The games as an array, and the two agents of each of the Q pairs."""
    win = np.asarray(win_PAA, dtype=float)
    if win.ndim != 3 or win.shape[1] != win.shape[2] or not len(win):
        raise ValueError(f"games are an array of prompts × agents × agents, got the shape {win.shape}")
    first, second = np.triu_indices(win.shape[1], k=1)
    return win, first, second


# Shared


def _bootstrap(samples: Sequence[ArrayLike], statistic: Statistic, rng: int) -> tuple[Any, Any, Any]:
    """A statistic, and the ends of its interval when each sample is resampled along its last axis."""
    arrays = [_finite(sample) for sample in samples]
    if not arrays or not all(array.ndim and array.size for array in arrays):
        raise ValueError(f"statistics need samples of at least a number each, got {list(samples)}")
    value = statistic(*arrays, axis=-1)
    if min(array.shape[-1] for array in arrays) < 2:
        return value, np.full_like(value, -math.inf), np.full_like(value, math.inf)
    ends = stats.bootstrap(
        arrays,
        statistic,
        vectorized=True,
        axis=-1,
        n_resamples=RESAMPLES,
        batch=_batch(sum(array.size for array in arrays)),
        method="percentile",
        rng=rng,
    ).confidence_interval
    return value, ends.low, ends.high


def _batch(size: int) -> int:
    """Resamples of so many numbers that are held in memory at once."""
    return max(1, AT_ONCE // size)


def _one(bounds: tuple[Any, Any, Any]) -> Interval:
    return Interval(*map(float, bounds))


def _each(bounds: tuple[Any, Any, Any]) -> list[Interval]:
    return [_one(bound) for bound in zip(*bounds, strict=True)]


def _resampled(size: int, rng: int) -> np.ndarray:
    return np.random.default_rng(rng).integers(size, size=(REFITS, size))


def _percentiles(value: float, drawn_R: np.ndarray, size: int) -> Interval:
    """The interval of a statistic by what it is in resamples of ``size`` things."""
    low, high = np.percentile(drawn_R, [2.5, 97.5]) if size > 1 else (-math.inf, math.inf)
    return Interval(value, float(low), float(high))


def _mean_of_means(*samples: np.ndarray, axis: int) -> np.ndarray:
    return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)


def _median_of_means(*samples: np.ndarray, axis: int) -> np.ndarray:
    return np.median([sample.mean(axis=axis) for sample in samples], axis=0)


def _interquartile_mean(*samples: np.ndarray, axis: int) -> np.ndarray:
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def _share_above(ours: np.ndarray, theirs: np.ndarray, axis: int) -> np.ndarray:
    above = stats.mannwhitneyu(ours, theirs, axis=axis, method="asymptotic").statistic
    return above / (ours.shape[axis] * theirs.shape[axis])


def _finite(values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if not np.isfinite(array).all():
        raise ValueError("statistics need finite numbers; leave out what is ungraded, got one that is NaN or infinite")
    return array


def _curve(at_K: ArrayLike, score_K: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    at, score = _finite(at_K), _finite(score_K)
    _same_length(at, score)
    if len(at) < 2 or not (np.diff(at) > 0).all():
        raise ValueError(
            f"a learning curve needs two points at least, one after the other, got points at {at.tolist()}"
        )
    return at, score


def _same_length(first: Sequence[Any] | np.ndarray, second: Sequence[Any] | np.ndarray) -> Any:
    if len(first) != len(second):
        raise ValueError(f"both sides need the same number, got {len(first)} and {len(second)}")
    return first


def _enough(samples: int, k: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k is 1 at least and the number of samples, {samples}, at most, got {k}")

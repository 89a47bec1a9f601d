"""Numbers worked out by hand."""

import math

import pytest
import torch

from rewards.learned.losses import answer_nll, bradley_terry, centring, ranked_pairs, squared_error


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_a_pair_costs_minus_log_sigmoid_of_its_gap():
    # d = 1.2 - 0.3 = 0.9: log(1 + exp(-0.9)) = 0.341154
    assert bradley_terry(numbers(1.2), numbers(0.3)).item() == pytest.approx(0.341154, abs=1e-6)


def test_a_margin_is_to_be_won_by():
    # d = 0.9 - 0.5: log(1 + exp(-0.4)) = 0.513015
    assert bradley_terry(numbers(1.2), numbers(0.3), numbers(0.5)).item() == pytest.approx(0.513015, abs=1e-6)


def test_label_smoothing_takes_a_share_of_the_pairs_to_be_the_wrong_way_round():
    # 0.9 · 0.341154 + 0.1 · (0.341154 + 0.9)
    got = bradley_terry(numbers(1.2), numbers(0.3), label_smoothing=0.1)
    assert got.item() == pytest.approx(0.431154, abs=1e-6)


def test_label_smoothing_has_its_least_at_the_smoothed_odds():
    gap = torch.linspace(-5, 5, 10001, dtype=torch.float64)
    best = gap[bradley_terry(gap, torch.zeros_like(gap), label_smoothing=0.2).argmin()].item()
    assert best == pytest.approx(math.log(0.8 / 0.2), abs=1e-3)


def test_centring_is_the_square_of_the_sum():
    # 0.341154 + 0.01 · 1.5² = 0.363654
    better, worse = numbers(1.2), numbers(0.3)
    got = bradley_terry(better, worse) + 0.01 * centring(better, worse)
    assert got.item() == pytest.approx(0.363654, abs=1e-6)


def test_a_ranking_costs_the_mean_over_its_pairs():
    # gaps 1, 2, 1: (0.313262 + 0.126928 + 0.313262) / 3
    score_N = numbers(2, 1, 0)
    better_P, worse_P, weight_P = ranked_pairs([3])
    got = (weight_P * bradley_terry(score_N[better_P], score_N[worse_P])).sum()
    assert got.item() == pytest.approx(0.251151, abs=1e-6)


def test_every_prompt_weighs_the_same_however_many_answers_it_has():
    better_P, worse_P, weight_P = ranked_pairs([2, 4])
    assert list(zip(better_P.tolist(), worse_P.tolist(), strict=True)) == [
        (0, 1), (2, 3), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5),
    ]  # fmt: skip
    torch.testing.assert_close(weight_P, torch.tensor([1.0, *[1 / 6] * 6]))


def test_regression_costs_the_square_of_the_error():
    # ((1 - 1)² + (0.5 - 0)²) / 2
    assert squared_error(numbers(1, 0.5), numbers(1, 0)).mean().item() == pytest.approx(0.125)


def test_the_language_loss_is_the_mean_over_the_answer():
    # p = 3/4 and 1/2: (0.287682 + 0.693147) / 2
    logits_TV = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    assert answer_nll(logits_TV, torch.tensor([0, 1])).item() == pytest.approx(0.490415, abs=1e-6)


def test_losses_stay_finite_far_out():
    far = numbers(1e4, -1e4)
    assert bradley_terry(far, -far, label_smoothing=0.1).isfinite().all()

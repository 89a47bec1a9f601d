"""The price on repetition."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import WeightedSum, score_samples
from rewards.verifiers.repetition import Repetition, repeated_share


@pytest.mark.parametrize(
    ("tokens", "ngram", "value"),
    [
        ((5, 5, 5, 5, 5), 2, -0.75),  # the vectors of TRL's get_repetition_penalty_reward
        ((1, 2, 3, 4), 2, 0.0),
        ((5, 5, 5, 5, 5), 3, -2 / 3),
        ((5, 5), 3, 0.0),
        ((5, 5), 2, 0.0),
        ((5, 5), 1, -0.5),
        ((1, 2, 1, 2, 1), 2, -0.5),
        ((1, 2, 3, 1, 2, 3), 3, -0.25),
    ],
)
def test_vectors(tokens, ngram, value, sample):
    (score,) = score_samples(Repetition(ngram=ngram), [sample("text", tokens=tokens)])
    assert score.value == pytest.approx(value)
    assert score.parts == {"repetition": pytest.approx(-value)}


def test_the_penalty_scales_and_its_part_does_not(sample):
    (score,) = score_samples(Repetition(ngram=2, max_penalty=-0.1), [sample("text", tokens=(5,) * 5)])
    assert (score.value, score.parts) == (pytest.approx(-0.075), {"repetition": 0.75})


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3)), st.integers(1, 4))
def test_a_share_is_from_zero_to_below_one_and_zero_without_a_repeated_ngram(tokens, n):
    share = repeated_share(tokens, n)
    assert 0 <= share < 1
    repeats = any(tokens[i : i + n] == tokens[j : j + n] for j in range(len(tokens) - n + 1) for i in range(j))
    assert (share > 0) == repeats


def test_it_never_counts_as_accuracy(sample):
    clean = sample("42", "42", tokens=(1, 2))
    assert score_samples(Repetition(), [clean])[0].correct is False
    both = WeightedSum({"exact": 1.0, "repetition": 0.1})
    assert score_samples(both, [clean])[0].correct is True


def test_text_without_tokens_is_ungraded_and_no_text_is_not(sample):
    missing, empty = score_samples(Repetition(), [sample("text"), sample("")])
    assert (missing.value, empty.value) == (None, 0.0)
    assert "tokens" in missing.error


@pytest.mark.parametrize(
    "options", [{"ngram": 0}, {"ngram": 2.5}, {"max_penalty": 0.1}, {"max_penalty": float("nan")}], ids=repr
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Repetition(**options)

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agents.core.advantages import group_advantages

NAN = float("nan")
TWO_GROUPS = torch.tensor([1, 0, 0, 1, 1, 1, 1, 0.0], dtype=torch.float64)
OF_FOUR = torch.tensor([7, 7, 7, 7, -2, -2, -2, -2])


def advantages(rewards, groups=None, **options):
    reward_B = torch.tensor(rewards, dtype=torch.float64)
    return group_advantages(reward_B, torch.tensor(groups or [0] * len(rewards)), **options)


def test_advantages_worked_by_hand():
    # mean 1, std sqrt((0 + 1 + 1) / 2) = 1
    assert_close(advantages([1, 0, 2]), torch.tensor([0, -1, 1.0], dtype=torch.float64), atol=2e-6, rtol=0)


def test_group_normalisation_agrees_with_verl():
    expected = [0.866024, -0.866024, -0.866024, 0.866024, 0.499999, 0.499999, 0.499999, -1.499997]
    assert_close(group_advantages(TWO_GROUPS, OF_FOUR).float(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_batch_normalisation_agrees_with_trl():
    expected = [0.965905, -0.965905, -0.965905, 0.965905, 0.482953, 0.482953, 0.482953, -1.448858]
    got = group_advantages(TWO_GROUPS, OF_FOUR, "batch", eps=1e-4)
    assert_close(got.float(), torch.tensor(expected), atol=1e-6, rtol=0)


def test_without_normalisation_only_the_mean_is_taken_off():
    assert advantages([1, 0, 2, 5], normalise="none").tolist() == [-1, -2, 0, 3]


def test_members_of_a_group_need_not_be_neighbours():
    order = torch.tensor([3, 4, 0, 7, 1, 5, 2, 6])
    assert_close(group_advantages(TWO_GROUPS[order], OF_FOUR[order]), group_advantages(TWO_GROUPS, OF_FOUR)[order])


@pytest.mark.parametrize("normalise", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "rewards",
    [
        [3.7],
        [0.0] * 4,
        [0.95] * 7,
        [0.95] * 7 + [0.95 + 1e-17],
        [0.1 + 0.2, 0.3],
        [1e300] * 5,
        [1e300] * 5 + [np.nextafter(1e300, np.inf)],
        [NAN] * 3,
        [NAN, 2.0],
    ],
)
def test_a_group_without_spread_gets_exactly_zero(rewards, normalise):
    assert advantages(rewards, normalise=normalise).tolist() == [0.0] * len(rewards)


def test_a_flat_group_beside_another_gets_exactly_zero():
    got = advantages([0.1, 0.1, 0.1, 5, 7, 1e300, 1e300], [1, 1, 1, 2, 2, 3, 3], normalise="batch")
    assert got[[0, 1, 2, 5, 6]].tolist() == [0.0] * 5


@pytest.mark.parametrize("normalise", ["group", "batch", "none"])
def test_ungraded_episodes_leave_the_others_as_if_they_were_not_there(normalise):
    got = advantages([1, NAN, 0, 2, NAN], [4, 4, 4, 4, 9], normalise=normalise)
    assert got[[1, 4]].tolist() == [0, 0]
    assert_close(got[[0, 2, 3]], advantages([1, 0, 2], normalise=normalise))


def test_the_type_of_the_rewards_is_kept():
    assert group_advantages(torch.tensor([0.0, 1.0]), torch.tensor([0, 0])).dtype == torch.float32


def test_infinite_rewards_are_refused():
    with pytest.raises(ValueError, match="finite"):
        advantages([0, float("inf")])


def test_an_unknown_normalisation_is_refused():
    with pytest.raises(ValueError, match="'group', 'batch' or 'none'"):
        advantages([0, 1], normalise="std")


rewards_of_a_group = st.lists(
    st.floats(-1e300, 1e300) | st.sampled_from([0.0, 1.0, 0.95, 0.95 + 1e-16, 1e-300, -1e300]), min_size=1, max_size=12
)


@given(rewards_of_a_group)
@settings(max_examples=300, deadline=None)
def test_advantages_are_bounded_for_any_finite_rewards(rewards):
    size = len(rewards)
    advantage_B = advantages(rewards)
    assert advantage_B.abs().max() <= (size - 1) / size**0.5 + 1e-9
    assert abs(advantage_B.sum()) < 1e-6
    assert advantages([*rewards, 1.0, 3.0], [0] * size + [1, 1], normalise="batch").isfinite().all()


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=8), st.integers(-100, 100), st.integers(1, 50))
@settings(max_examples=200, deadline=None)
def test_shifting_and_scaling_a_groups_rewards_change_nothing(rewards, shift, scale):
    moved = advantages([scale * reward + shift for reward in rewards])
    assert_close(moved, advantages(rewards), atol=1e-5, rtol=0)

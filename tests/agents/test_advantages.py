import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agents.core.advantages import gae, group_advantages, part_advantages, whiten

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


# Parts of a reward, each normalised by itself.

PARTS_KB = torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.float64)
ONE_GROUP = torch.zeros(4, dtype=torch.int64)


def test_parts_normalised_by_themselves_agree_with_trl():
    expected = torch.tensor([0.387264, -0.387264, 1.161791, -1.161791], dtype=torch.float64)
    assert_close(part_advantages(PARTS_KB, [1, 0.5], ONE_GROUP, eps=1e-4), expected, atol=1e-6, rtol=0)
    # here both deviations are equal, so that the order hardly matters: first the sum, then its normalisation
    summed_B = PARTS_KB[0] + 0.5 * PARTS_KB[1]
    expected = torch.tensor([0.387238, -0.387238, 1.161715, -1.161715], dtype=torch.float64)
    assert_close(group_advantages(summed_B, ONE_GROUP, eps=1e-4), expected, atol=1e-6, rtol=0)


def test_a_part_ten_times_as_large_weighs_no_more():
    larger_KB = PARTS_KB * torch.tensor([[10.0], [1.0]], dtype=torch.float64)
    expected = part_advantages(PARTS_KB, [1, 0.5], ONE_GROUP)
    assert_close(part_advantages(larger_KB, [1, 0.5], ONE_GROUP), expected, atol=1e-5, rtol=0)
    assert (group_advantages(larger_KB.T @ torch.tensor([1, 0.5], dtype=torch.float64), ONE_GROUP) - expected)[1] < -0.1


def test_the_batch_is_normalised_once_more_over_all_groups():
    # group 1: (1, 0) -> 1 / sqrt 2 each way; group 2: flat in the first part, (0, 4) in the second, of weight 2 -> sqrt 2;
    # the squares 1/2 + 1/2 + 2 + 2 over 3: deviation sqrt(5/3)
    part_KB = torch.tensor([[1.0, 0, 5, 5], [3.0, 3, 0, 4]], dtype=torch.float64)
    got = part_advantages(part_KB, [1, 2], torch.tensor([1, 1, 2, 2]))
    expected = torch.tensor([0.5**0.5, -(0.5**0.5), -(2**0.5), 2**0.5], dtype=torch.float64) / (5 / 3) ** 0.5
    assert_close(got, expected, atol=2e-6, rtol=0)


def test_a_missing_part_is_left_out_of_the_sum_and_of_its_own_mean():
    part_KB = torch.tensor([[1.0, 0, 1, 0], [0, 1, NAN, NAN]], dtype=torch.float64)
    first_B = group_advantages(part_KB[0], ONE_GROUP)
    second_B = group_advantages(part_KB[1, :2], ONE_GROUP[:2])
    sum_B = first_B + torch.tensor([*second_B.tolist(), 0, 0], dtype=torch.float64)
    assert_close(part_advantages(part_KB, [1, 1], ONE_GROUP), sum_B / (sum_B.std() + 1e-6))


def test_an_episode_without_any_part_leaves_the_others_as_if_it_were_not_there():
    nan_K1 = torch.full((2, 1), NAN, dtype=torch.float64)
    got = part_advantages(torch.cat([PARTS_KB, nan_K1], dim=1), [1, 0.5], torch.zeros(5, dtype=torch.int64))
    assert got[4] == 0
    assert_close(got[:4], part_advantages(PARTS_KB, [1, 0.5], ONE_GROUP))


@pytest.mark.parametrize("values", [[0.3, 0.3, 0.3], [NAN, NAN, NAN], [1.0, NAN, NAN]])
def test_where_no_part_differs_every_advantage_is_exactly_zero(values):
    part_KB = torch.tensor([values, values], dtype=torch.float64)
    assert part_advantages(part_KB, [1, 3], torch.zeros(3, dtype=torch.int64)).tolist() == [0.0] * 3


# Groups that differ too little.


def test_a_group_whose_deviation_is_too_small_gets_zero():
    # deviations 0.0707, 0.7071 and 0
    rewards, groups = [0.5, 0.6, 0.0, 1.0, 2.0, 2.0], [0, 0, 1, 1, 2, 2]
    kept = advantages(rewards, groups)
    got = advantages(rewards, groups, min_std=0.08)
    assert got[[0, 1, 4, 5]].tolist() == [0.0] * 4
    assert got[2:4].tolist() == kept[2:4].tolist() != [0.0, 0.0]
    assert advantages(rewards, groups, min_std=0.07).tolist() == kept.tolist()


@pytest.mark.parametrize("normalise", ["group", "batch", "none"])
def test_the_smallest_deviation_is_in_units_of_reward(normalise):
    rewards = [0.0, 1e-3, 0.0, 1e3]
    got = advantages(rewards, [0, 0, 1, 1], normalise=normalise, min_std=1.0)
    assert got[:2].tolist() == [0.0, 0.0]
    assert got[2] < 0 < got[3]


def test_advantages_tell_mixed_groups_from_those_all_right_or_all_wrong():
    # Reinforce-Rej: raw rewards where a group is mixed, else 0
    reward_B, group_B = torch.tensor([1, 0, 0, 1, 1, 1, 1, 1.0]), torch.tensor([0] * 4 + [1] * 4)
    mixed_B = group_advantages(reward_B, group_B) != 0
    assert torch.where(mixed_B, reward_B, 0.0).tolist() == [1, 0, 0, 1, 0, 0, 0, 0]


# Generalised advantage estimation.


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


ALL_THREE = torch.ones(1, 3, dtype=torch.bool)


def test_gae_agrees_with_verl_and_openrlhf():
    # last to first: 1 - .3 = .7; .3 - .4 + .95 · .7 = .565; .4 - .5 + .95 · .565 = .43675
    advantage_BT, return_BT = gae(tensor([0, 0, 1]), tensor([0.5, 0.4, 0.3]), ALL_THREE, lam=0.95)
    assert_close(advantage_BT, tensor([0.43675, 0.565, 0.7]))
    assert_close(return_BT, tensor([0.93675, 0.965, 1]))


def test_gae_skips_a_tools_token_as_verl_does():
    sampled_BT = torch.tensor([[True, False, True, True]])
    advantage_BT, return_BT = gae(tensor([0, 0, 0, 1]), tensor([0.5, 9, 0.4, 0.3]), sampled_BT, lam=0.95)
    assert_close(advantage_BT, tensor([0.43675, 0, 0.565, 0.7]))
    assert_close(return_BT, tensor([0.93675, 0, 0.965, 1]))


def test_gae_takes_the_value_of_the_state_that_an_episode_was_cut_off_in():
    # row 1: .3 - .4 = -.1, then .4 - .5 - .095 = -.195; row 2 ended: -.4, then .4 - .5 - .38
    value_BT = tensor([0.5, 0.4], [0.5, 0.4])
    both_BT = torch.ones(2, 2, dtype=torch.bool)
    advantage_BT, return_BT = gae(0 * value_BT, value_BT, both_BT, lam=0.95, last_value_B=tensor(0.3, 0.0))
    assert_close(advantage_BT, tensor([-0.195, -0.1], [-0.48, -0.4]))
    assert_close(return_BT, tensor([0.305, 0.3], [0.02, 0.0]))


def test_a_critic_that_knows_nothing_leaves_the_discounted_rewards():
    # A_t = r_t + .5 r_t+1 + .25 r_t+2
    advantage_BT, _ = gae(tensor([1, 2, 4]), tensor([0, 0, 0]), ALL_THREE, lam=0.5)
    assert advantage_BT.tolist() == [[3, 4, 4]]


def test_lambda_one_trusts_the_rewards_and_lambda_zero_the_critic():
    reward_BT, value_BT = tensor([1, 2, 4]), tensor([0.5, 0.25, 3])
    _, return_BT = gae(reward_BT, value_BT, ALL_THREE, lam=1.0)
    assert return_BT.tolist() == [[7, 6, 4]]
    _, return_BT = gae(reward_BT, value_BT, ALL_THREE, lam=0.0)
    assert return_BT.tolist() == [[1.25, 5, 4]]


def episodes(seed=0):
    """Five episodes of up to six tokens, one of them empty: rewards, values, which tokens were chosen, last values."""
    rng = np.random.default_rng(seed)
    length_B = torch.tensor([6, 1, 0, 4, 3])
    reward_BT, value_BT = (torch.from_numpy(rng.normal(size=(5, 6))) for _ in range(2))
    return reward_BT, value_BT, torch.arange(6) < length_B[:, None], torch.from_numpy(rng.normal(size=5))


def test_gae_is_the_sum_of_its_definition():
    reward_BT, value_BT, sampled_BT, last_B = episodes()
    advantage_BT, return_BT = gae(reward_BT, value_BT, sampled_BT, lam=0.9, last_value_B=last_B)
    for b, length in enumerate(sampled_BT.sum(dim=1).tolist()):
        values = [*value_BT[b, :length].tolist(), last_B[b].item()]
        delta = [reward_BT[b, t].item() + values[t + 1] - values[t] for t in range(length)]
        expected = [sum(0.9 ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
        assert advantage_BT[b].tolist() == pytest.approx(expected + [0.0] * (6 - length))
        assert return_BT[b, :length].tolist() == pytest.approx([a + v for a, v in zip(expected, values, strict=False)])


@pytest.mark.parametrize("junk", [9.0, 1e30, float("inf"), NAN])
@pytest.mark.parametrize("inserted", [1, 10, 100])
def test_tokens_that_the_policy_did_not_choose_leave_gae_unchanged(inserted, junk):
    reward_BT, value_BT, sampled_BT, last_B = episodes()
    width = 6 + inserted
    place_T = torch.from_numpy(np.sort(np.random.default_rng(inserted).permutation(width)[:6]))  # before, among, after
    wide_reward, wide_value = (torch.full((5, width), junk, dtype=torch.float64) for _ in range(2))
    wide_sampled = torch.zeros(5, width, dtype=torch.bool)
    wide_reward[:, place_T] = torch.where(sampled_BT, reward_BT, junk)
    wide_value[:, place_T] = torch.where(sampled_BT, value_BT, junk)
    wide_sampled[:, place_T] = sampled_BT
    expected = gae(reward_BT, value_BT, sampled_BT, last_value_B=last_B)
    for got, plain in zip(gae(wide_reward, wide_value, wide_sampled, last_value_B=last_B), expected, strict=True):
        assert torch.equal(got[:, place_T], plain)
        assert not got[~wide_sampled].any()


def test_gae_takes_each_row_by_itself():
    reward_BT, value_BT, sampled_BT, last_B = episodes()
    order = torch.tensor([3, 0, 4, 2, 1])
    whole = gae(reward_BT, value_BT, sampled_BT, last_value_B=last_B)
    moved = gae(reward_BT[order], value_BT[order], sampled_BT[order], last_value_B=last_B[order])
    for got, expected in zip(moved, whole, strict=True):
        assert torch.equal(got, expected[order])


# Whitening.


def test_whitened_advantages_agree_with_verl():
    # the critic's example above: mean .567250, deviation .131640
    assert_close(
        whiten(tensor([0.43675, 0.565, 0.7]), ALL_THREE), tensor([-0.991344, -0.017092, 1.008436]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("junk", [9.0, 1e30, float("inf"), NAN])
def test_whitening_is_over_the_sampled_tokens_of_the_whole_batch(junk):
    x_BT, _, sampled_BT, _ = episodes()
    x_N = x_BT[sampled_BT].numpy()
    expected = torch.zeros(5, 6, dtype=torch.float64)
    expected[sampled_BT] = torch.from_numpy((x_N - x_N.mean()) / np.sqrt(x_N.var(ddof=1) + 1e-8))
    got = whiten(torch.where(sampled_BT, x_BT, junk), sampled_BT)
    assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert not got[~sampled_BT].any()


def test_whitening_does_not_depend_on_order_padding_shift_or_scale():
    x_BT, _, sampled_BT, _ = episodes()
    order = torch.tensor([3, 0, 4, 2, 1])
    padded_BT = torch.nn.functional.pad(7 + 3 * x_BT[order], (0, 4), value=NAN)
    got = whiten(padded_BT, torch.nn.functional.pad(sampled_BT[order], (0, 4)))
    assert_close(got[:, :6], whiten(x_BT, sampled_BT)[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampled", [[False, False, False], [False, True, False], [True, False, True]])
@pytest.mark.parametrize("value", [0.5, 1000.1])
def test_whitening_gives_zero_where_there_is_no_spread(sampled, dtype, value):
    got = whiten(torch.tensor([[value, 2.0, value]], dtype=dtype), torch.tensor([sampled]))
    assert got.tolist() == [[0.0, 0.0, 0.0]]
    assert got.dtype == dtype

import math

import pytest
import torch
from torch.testing import assert_close

from agents.core.kl import kl_estimate
from agents.core.losses import (
    aggregate,
    clip_fractions,
    clipped_surrogate,
    count_denominators,
    token_ratio,
    value_loss,
)

MODES = ["token_mean", "sequence_mean", "sequence_sum", "constant"]
JUNK = -9.0

# Two answers of three and two tokens; the last entry is padding.
SAMPLED = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
ADVANTAGE = torch.tensor([1, -0.5])
OLD = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.7, JUNK]])
LOGP = torch.tensor([[-0.7, -2.4, -0.5], [-1.0, -0.9, JUNK]])
REF = torch.tensor([[-1.1, -2.0, -0.6], [-1.2, -0.8, JUNK]])
COUNTS = count_denominators(SAMPLED, max_new_tokens=3)
OF_ROW_1 = count_denominators(SAMPLED[:1], max_new_tokens=3)


def loss_and_gradient(
    mode,
    low=0.2,
    high=0.2,
    ratio_max=None,
    beta=0.0,
    max_new_tokens=3,
    old=OLD,
    logp=LOGP,
    ref=REF,
    advantage=ADVANTAGE,
):
    logp = logp.clone().requires_grad_()
    term_BT = clipped_surrogate(logp, old, advantage, low, high, ratio_max) + beta * kl_estimate(logp, ref, "k3")
    loss = aggregate(term_BT, SAMPLED, mode, count_denominators(SAMPLED, max_new_tokens))
    loss.backward()
    return loss.item(), logp.grad


@pytest.mark.parametrize(
    ("mode", "expected"), [("token_mean", 3.0), ("sequence_sum", 7.5), ("sequence_mean", 3.25), ("constant", 2.5)]
)
def test_averages_worked_by_hand(mode, expected):
    # token 15/5; sequences (6 + 9)/2; (2 + 4.5)/2; 15/(2·3)
    x = torch.tensor([[1, 2, 3], [4, 5, 100.0]])
    assert aggregate(x, SAMPLED, mode, COUNTS).item() == pytest.approx(expected)


def test_ppo_loss_and_gradient_agree_with_verl():
    loss, gradient = loss_and_gradient("token_mean")
    assert loss == pytest.approx(-0.327319, abs=1e-6)
    assert_close(gradient, torch.tensor([[0, -0.134064, -0.2], [0.164872, 0.081873, 0]]), atol=1e-6, rtol=0)


def test_clip_higher_agrees_with_dapo():
    loss, gradient = loss_and_gradient("token_mean", high=0.28)
    assert loss == pytest.approx(-0.343319, abs=1e-6)
    assert_close(gradient, torch.tensor([[0, -0.134064, -0.2], [0.164872, 0.081873, 0]]), atol=1e-6, rtol=0)


def test_grpo_loss_agrees_with_trl():
    assert loss_and_gradient("sequence_mean")[0] == pytest.approx(-0.169955, abs=1e-6)


def test_grpo_loss_with_kl_agrees_with_trl():
    loss, gradient = loss_and_gradient("sequence_mean", beta=0.04)
    assert loss == pytest.approx(-0.168603, abs=1e-6)
    expected = torch.tensor([[0.002198, -0.114999, -0.166032], [0.207903, 0.101290, 0]])
    assert_close(gradient, expected, atol=1e-6, rtol=0)


def test_dr_grpo_loss_agrees_with_trl():
    assert loss_and_gradient("constant", max_new_tokens=4)[0] == pytest.approx(-0.204574, abs=1e-6)


@pytest.mark.parametrize(("mode", "expected"), [("token_mean", -0.342191), ("sequence_mean", -0.188545)])
def test_a_largest_ratio_agrees_with_verls_dual_clip_and_trls_delta(mode, expected):
    # r = exp(.5) = 1.648721 at the token with A = -.5 becomes 1.5: the loss there .75, without gradient
    loss, gradient = loss_and_gradient(mode, ratio_max=1.5)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert gradient[1, 0] == 0
    unbound = loss_and_gradient(mode)[1]
    unbound[1, 0] = 0
    assert gradient.tolist() == unbound.tolist()


def test_a_ratio_that_does_not_reach_the_largest_is_left_alone():
    loss, gradient = loss_and_gradient("token_mean", ratio_max=3.0)
    assert loss == pytest.approx(-0.327319, abs=1e-6)
    assert gradient.tolist() == loss_and_gradient("token_mean")[1].tolist()


def test_a_largest_ratio_does_not_touch_tokens_that_are_to_become_likelier():
    loss, gradient = loss_and_gradient("token_mean", high=2.0, ratio_max=1.1, advantage=ADVANTAGE.abs())
    plain_loss, plain_gradient = loss_and_gradient("token_mean", high=2.0, advantage=ADVANTAGE.abs())
    assert loss == plain_loss
    assert gradient.tolist() == plain_gradient.tolist()


def test_raft_with_a_ratio_agrees_with_verl():
    # row 1 kept: clipped 1.2, .670320 and 1, over all five tokens or over its own three
    loss, gradient = loss_and_gradient("token_mean", advantage=torch.tensor([1.0, 0.0]))
    assert loss == pytest.approx(-0.574064, abs=1e-6)
    assert gradient[1].tolist() == [0.0, 0.0, 0.0]
    kept = aggregate(clipped_surrogate(LOGP[:1], OLD[:1], torch.ones(1), 0.2, 0.2), SAMPLED[:1], "token_mean", OF_ROW_1)
    assert kept.item() == pytest.approx(-0.956773, abs=1e-6)


def test_raft_without_a_ratio_is_supervised_on_what_is_kept():
    # (.7 + 2.4 + .5)/3
    assert aggregate(-LOGP[:1], SAMPLED[:1], "token_mean", OF_ROW_1).item() == pytest.approx(1.2)


def test_an_advantage_a_token_is_taken_token_by_token():
    loss, gradient = loss_and_gradient("token_mean", advantage=ADVANTAGE[:, None].expand(2, 3))
    assert (loss, gradient.tolist()) == (
        loss_and_gradient("token_mean")[0],
        loss_and_gradient("token_mean")[1].tolist(),
    )
    # -(1 · 1.2 + 2 · .670320 - 1 · 1) + .5 · 1.648721 - 1 · .818731, over 5
    loss, _ = loss_and_gradient("token_mean", advantage=torch.tensor([[1, 2, -1], [-0.5, 1, JUNK]]))
    assert loss == pytest.approx(-0.307002, abs=1e-6)


def test_ratios_are_clamped_far_from_any_normal_one():
    log_ratio = torch.tensor([0.0, 18.0, 1e9, -18.0, -1e9], dtype=torch.float64)
    expected = [1.0, math.exp(18), math.exp(20), math.exp(-18), math.exp(-20)]
    assert token_ratio(log_ratio - 1, -torch.ones(5)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("ratio_max", [None, 1.5])
def test_policy_gradient_at_ratio_one_is_minus_the_advantage(ratio_max):
    _, gradient = loss_and_gradient("token_mean", old=LOGP, ratio_max=ratio_max)
    assert_close(gradient, torch.tensor([[-0.2, -0.2, -0.2], [0.1, 0.1, 0]]))


def test_the_clip_keeps_the_gradient_that_leads_back():
    # r = 1.65 with A = -0.5 and r = 0.67 with A = 1 lie outside the clip and still move.
    gradient = loss_and_gradient("token_mean")[1]
    assert gradient[1, 0] != 0
    assert gradient[0, 1] != 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("junk", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_junk_where_nothing_was_sampled_changes_neither_loss_nor_gradient(mode, junk):
    options = {"beta": 0.04, "ratio_max": 1.5}
    expected_loss, expected_gradient = loss_and_gradient(mode, **options)
    for name, clean in (("logp", LOGP), ("old", OLD), ("ref", REF)):
        dirty = torch.where(SAMPLED, clean, junk)
        loss, gradient = loss_and_gradient(mode, **options, **{name: dirty})
        assert loss == expected_loss
        assert gradient.tolist() == expected_gradient.tolist()


def update_batch():
    """Nine rows of up to seven tokens, one of them without any sampled token."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(5, dtype=torch.float64, generator=generator).requires_grad_()
    feature = torch.randn(9, 7, 5, dtype=torch.float64, generator=generator)
    length = torch.tensor([7, 1, 4, 0, 3, 7, 2, 5, 6])
    old = -torch.rand(9, 7, dtype=torch.float64, generator=generator)
    advantage = torch.randn(9, dtype=torch.float64, generator=generator)
    return weight, feature, old, advantage, torch.arange(7) < length[:, None]


def batch_gradient(mode, splits, order, padding=0):
    weight, feature, old, advantage, sampled = update_batch()
    denominators = count_denominators(sampled, max_new_tokens=7)
    for part in torch.tensor(order).split(splits):
        logp, old_part, sampled_part = feature[part] @ weight, old[part], sampled[part]
        if padding:
            logp, old_part = (torch.nn.functional.pad(x, (0, padding), value=5.0) for x in (logp, old_part))
            sampled_part = torch.nn.functional.pad(sampled_part, (0, padding))
        term = clipped_surrogate(logp, old_part, advantage[part], 0.2, 0.2, ratio_max=1.5)
        term = term + 0.1 * kl_estimate(logp, old_part, "k3") + 0.1 * value_loss(logp, old_part, -old_part, clip=0.5)
        aggregate(term, sampled_part, mode, denominators).backward()
    return weight.grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("splits", [1, 2, 4, [2, 6, 1]])
def test_gradient_does_not_depend_on_micro_batches_order_or_padding(mode, splits):
    whole = batch_gradient(mode, 9, list(range(9)))
    assert whole.abs().min() > 0
    got = batch_gradient(mode, splits, [4, 0, 8, 2, 7, 3, 1, 6, 5], padding=3)
    assert_close(got, whole, atol=1e-12, rtol=1e-6)


def test_rows_without_a_sampled_token_are_not_counted_as_sequences():
    counts = count_denominators(torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool), max_new_tokens=2)
    assert (counts.tokens, counts.sequences) == (3, 2)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_without_sampled_tokens_has_loss_zero(mode):
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    assert aggregate(OLD, nothing, mode, count_denominators(nothing, 3)) == 0


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="sequence_mean"):
        aggregate(OLD, SAMPLED, "mean", COUNTS)


@pytest.mark.parametrize("junk", [JUNK, float("inf"), float("-inf")])
def test_clip_fractions_count_only_where_the_clip_binds(junk):
    # r = [1.35, 0.67, 1 | 1.65, 0.82]; A > 0 binds 1.35. With A negated 0.67 binds below and 1.65 above.
    logp = torch.where(SAMPLED, LOGP, junk)
    low, high = clip_fractions(logp, OLD, ADVANTAGE, SAMPLED, 0.2, 0.2, COUNTS)
    assert (low.item(), high.item()) == (0, pytest.approx(1 / 5))
    low, high = clip_fractions(logp, OLD, -ADVANTAGE, SAMPLED, 0.2, 0.2, COUNTS)
    assert (low.item(), high.item()) == (pytest.approx(1 / 5), pytest.approx(1 / 5))
    low, high = clip_fractions(logp, OLD, -ADVANTAGE, SAMPLED, 0.4, 0.7, COUNTS)
    assert (low.item(), high.item()) == (0, 0)


def test_clip_fractions_of_micro_batches_sum_to_the_batchs():
    parts = [
        clip_fractions(LOGP[i : i + 1], OLD[i : i + 1], -ADVANTAGE[i : i + 1], SAMPLED[i : i + 1], 0.2, 0.2, COUNTS)
        for i in range(2)
    ]
    whole = clip_fractions(LOGP, OLD, -ADVANTAGE, SAMPLED, 0.2, 0.2, COUNTS)
    assert_close(torch.tensor(parts).sum(dim=0), torch.stack(whole))


# The critic's loss.

VALUE = torch.tensor([[0.5, 0.4, 0.3], [0.0, 0.0, JUNK]])
OLD_VALUE = torch.tensor([[0.2, 0.4, 0.6], [0.0, 0.0, JUNK]])
RETURN = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, JUNK]])
ROW_1 = torch.tensor([[True, True, True], [False, False, False]])


def critic_loss_and_gradient(clip, sampled=ROW_1, value=VALUE, old=OLD_VALUE, target=RETURN):
    value = value.clone().requires_grad_()
    loss = aggregate(value_loss(value, old, target, clip), sampled, "token_mean", count_denominators(sampled, 3))
    loss.backward()
    return loss.item(), value.grad


def test_value_loss_agrees_with_verl():
    # .5 -> .4, .4 and .3 -> .4 after the clip; the larger errors .6, .6 and .7: (.36 + .36 + .49)/6
    loss, gradient = critic_loss_and_gradient(clip=0.2)
    assert loss == pytest.approx(0.201667, abs=1e-6)
    # a value that has come as far as it may has no gradient, one that has gone the wrong way has: -.6/3 and -.7/3
    assert_close(gradient[0], torch.tensor([0.0, -0.2, -0.233333]), atol=1e-6, rtol=0)


def test_value_loss_without_a_clip_is_half_the_squared_error():
    loss, gradient = critic_loss_and_gradient(clip=None)
    assert loss == pytest.approx((0.25 + 0.36 + 0.49) / 6)
    assert_close(gradient[0], torch.tensor([-0.5, -0.6, -0.7]) / 3)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_before_the_first_update_the_clip_of_values_does_nothing(clip):
    loss, gradient = critic_loss_and_gradient(clip, old=VALUE)
    assert loss == pytest.approx((0.25 + 0.36 + 0.49) / 6)
    assert_close(gradient[0], torch.tensor([-0.5, -0.6, -0.7]) / 3)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("junk", [JUNK, 1e30, -1e30])
def test_junk_values_where_nothing_was_sampled_change_neither_loss_nor_gradient(clip, junk):
    expected_loss, expected_gradient = critic_loss_and_gradient(clip, SAMPLED)
    for name, clean in (("value", VALUE), ("old", OLD_VALUE), ("target", RETURN)):
        loss, gradient = critic_loss_and_gradient(clip, SAMPLED, **{name: torch.where(SAMPLED, clean, junk)})
        assert loss == expected_loss
        assert gradient.tolist() == expected_gradient.tolist()

"""Every line of the table of estimators holds, would fall with a wrong estimator, and stands in the docs."""

from pathlib import Path

import numpy as np
import pytest

import agents
from agents.core.advantages import gae, group_advantages, whiten
from agents.core.kl import kl_estimate
from agents.core.losses import Denominators, aggregate, clipped_surrogate, value_loss
from benchmarks import estimators
from textenv.tasks.tabular import expected_return, log_probability, policy_gradient

DOCS = Path(agents.__file__).parent / "ESTIMATORS.md"


@pytest.fixture(scope="module")
def lines():
    return [line for part in estimators.PARTS for line in part()]


def test_every_estimator_is_what_it_is_said_to_be(lines):
    assert {line.estimator: line.difference for line in lines if not line.difference < 1e-6} == {}


def test_no_line_is_about_nothing(lines):
    assert [line.estimator for line in lines if np.abs(line.claimed).max() < 1e-2] == ["k1 in the loss"]
    assert min(np.abs(line.exact).max() for line in lines) > 1e-2


def test_the_table_in_the_docs_is_the_programs(lines):
    in_docs = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    assert in_docs == estimators.table(lines).splitlines(), "print it again: python -m benchmarks.estimators"


def biased_deviation(reward_B, group_B, normalise="group", **options):
    size = len(group_B) / len(group_B.unique())
    return group_advantages(reward_B, group_B, normalise, **options) * (size / (size - 1)) ** 0.5


def clipped_on_both_sides(logp, old, advantage, low, high, ratio_max=None):
    ratio = (logp - old).exp().clamp(1 - low, 1 + high)
    return -ratio * (advantage if advantage.dim() == 2 else advantage[:, None])


WRONG = {
    "the advantage's size alone": (
        "clipped_surrogate",
        lambda logp, old, advantage, *rest, **options: clipped_surrogate(logp, old, advantage.abs(), *rest, **options),
        ["baselines", "deviations", "critics"],
    ),
    "a clip on both sides": ("clipped_surrogate", clipped_on_both_sides, ["ratios"]),
    "no cap on the ratio": (
        "clipped_surrogate",
        lambda *rest, ratio_max=None, **options: clipped_surrogate(*rest, **options),
        ["ratios"],
    ),
    "a deviation over G": ("group_advantages", biased_deviation, ["baselines", "deviations", "filters"]),
    "no min_std": (
        "group_advantages",
        lambda reward_B, group_B, *rest, min_std=0.0: group_advantages(reward_B, group_B, *rest),
        ["deviations"],
    ),
    "tokens for sequences": (
        "aggregate",
        lambda x, sampled, mode, counts: aggregate(x, sampled, mode, Denominators(1, counts.tokens, 3)),
        ["baselines", "aggregations", "selections"],
    ),
    "lengths left out": (
        "aggregate",
        lambda x, sampled, mode, counts: (
            aggregate(x, sampled, mode.replace("_mean", "_sum"), counts)
            if mode == "sequence_mean"
            else aggregate(x, sampled, mode, counts)
        ),
        ["aggregations", "deviations"],
    ),
    "another lam": ("gae", lambda *rest, lam=0.95, **options: gae(*rest, lam=lam**2, **options), ["critics"]),
    "no last value": ("gae", lambda *rest, lam=0.95, last_value_B=None: gae(*rest, lam=lam), ["critics"]),
    "a critic that is not asked": (
        "gae",
        lambda reward, value, *rest, **options: gae(reward, 0 * value, *rest, **options),
        ["critics", "ratios"],
    ),
    "a variance over N": (
        "whiten",
        lambda x, sampled: whiten(x, sampled) * (1 - 1 / sampled.sum()) ** -0.5,
        ["critics"],
    ),
    "an error that is not halved": ("value_loss", lambda *rest, clip: 2 * value_loss(*rest, clip), ["critics"]),
    "another estimator of the KL": (
        "kl_estimate",
        lambda logp, ref, name: kl_estimate(logp, ref, {"k1": "k2", "k2": "k3", "k3": "k1"}[name]),
        ["divergences"],
    ),
    "a KL that is paid for": (
        "kl_penalty",
        lambda logp, ref, beta: beta * (logp - ref),
        ["divergences"],
    ),
}


@pytest.mark.parametrize(
    ("name", "wrong", "part"),
    [
        pytest.param(name, wrong, part, id=f"{title} in {part}")
        for title, (name, wrong, parts) in WRONG.items()
        for part in parts
    ],
)
def test_a_wrong_estimator_does_not_pass(monkeypatch, name, wrong, part):
    monkeypatch.setattr(estimators, name, wrong)
    assert "WRONG" in [line.verdict for line in getattr(estimators, part)()]


def test_the_program_prints_its_table_and_ends_well_only_if_every_line_holds(monkeypatch, capsys):
    monkeypatch.setattr(estimators, "PARTS", (estimators.divergences,))
    estimators.main()
    assert capsys.readouterr().out == estimators.table(estimators.divergences()) + "\n"
    monkeypatch.setattr(estimators, "kl_penalty", lambda logp, ref, beta: 0 * logp)
    with pytest.raises(SystemExit, match="not what they are said to be: k1 in the reward, REINFORCE; k1 in the reward"):
        estimators.main()
    assert "| WRONG |" in capsys.readouterr().out


# The side that is compared with.


def test_values_visits_and_returns_agree_with_the_sum_over_completions():
    world = estimators.random_world(0)
    assert world.mean_return == pytest.approx(expected_return(world.logits_SV, world.task.choice_CSV, world.return_C))
    assert world.value_S[0] == pytest.approx(world.mean_return)
    passing_CS = world.task.choice_CSV.sum(axis=2)
    np.testing.assert_allclose(world.visits_S, world.probability_C @ passing_CS, rtol=1e-12)
    np.testing.assert_allclose(
        world.visits_S * world.value_S, (world.probability_C * world.return_C) @ passing_CS, rtol=1e-12
    )
    np.testing.assert_allclose(world.score(world.visits_S, world.q_SV), world.exact_SV, atol=1e-12)


def test_the_gradient_with_a_kl_penalty_agrees_with_finite_differences():
    world, step = estimators.random_world(0), 1e-5
    choice_CSV, beta = world.task.choice_CSV, 0.1
    reference_C = log_probability(np.random.default_rng(1).normal(size=world.logits_SV.shape), choice_CSV)

    def objective(logits_SV):
        ratio_C = log_probability(logits_SV, choice_CSV) - reference_C
        return expected_return(logits_SV, choice_CSV, world.return_C - beta * ratio_C)

    slope_SV = np.zeros_like(world.logits_SV)
    for index in np.ndindex(slope_SV.shape):
        bump_SV = np.zeros_like(slope_SV)
        bump_SV[index] = step
        slope_SV[index] = (objective(world.logits_SV + bump_SV) - objective(world.logits_SV - bump_SV)) / (2 * step)
    shaped_C = world.return_C - beta * (world.logp_C - reference_C)
    np.testing.assert_allclose(policy_gradient(world.logits_SV, choice_CSV, shaped_C), slope_SV, atol=1e-9)


@pytest.mark.parametrize("p", [0.03, 0.3, 0.5, 0.98])
def test_the_weight_of_a_prompt_under_grpo(p):
    # groups of 2: k = 1 with probability 2p(1 - p), s_1 = 1/√2; of 3: 3p(1 - p) and s_1 = s_2 = 1/√3
    assert estimators.grpo_weight(p, 2) == pytest.approx(2**-0.5, rel=1e-5)
    assert estimators.grpo_weight(p, 3) == pytest.approx(2 * 3**-0.5, rel=1e-5)
    assert estimators.grpo_weight(p, 100_000) == pytest.approx((p * (1 - p)) ** -0.5, rel=1e-3)


def test_every_batch_is_listed_once_with_its_probability():
    world = estimators.random_world(0)
    pairs = estimators.every_batch([world], 2)
    assert len(pairs.weight_K) == 15**2
    assert pairs.weight_K.sum().item() == pytest.approx(1.0)
    both = estimators.every_batch(estimators.easy_and_hard(), 2)
    assert len(both.weight_K) == 4**4
    assert both.weight_K.sum().item() == pytest.approx(1.0)
    right_KWG = both.return_R.view(-1, 2, 2)
    easy, hard = (world.mean_return for world in estimators.easy_and_hard())
    assert (both.weight_K @ right_KWG[:, 0, 1]).item() == pytest.approx(easy) == pytest.approx(0.754, abs=1e-3)
    assert (both.weight_K @ right_KWG[:, 1, 0]).item() == pytest.approx(hard) == pytest.approx(0.039, abs=1e-3)

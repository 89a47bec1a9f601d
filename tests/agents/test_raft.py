"""Rejection sampling: which samples are learned from, its losses by hand, and what it learns."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from agents.core.learner import Scored
from agents.core.losses import count_denominators
from agents.core.policy_gradient import policy_loss
from agents.raft import RAFT, RAFTConfig
from agents.raft.raft import rank_in_group, rejection_advantages, supervised_loss
from agents.sft.sft import sft_step
from tests.agents.scripted import batch_of, cycle, metrics_of, script, watch_updates

PROBE = "textenv/ProbeDelayedCopy-v0"
RIGHT, WRONG, MIXED = [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]

# Two sequences of three and two tokens; the last entry of the second row is padding and holds junk.
SAMPLED_BT = torch.tensor([[True, True, True], [True, True, False]])
OLD_BT = torch.tensor([[-1.0, -2.0, -0.5], [-1.5, -0.7, -9.0]])
FIRST_ROW = torch.tensor([1.0, 0.0])


@pytest.fixture
def raft(fresh_model, tmp_path):
    """An agent for one quick step of 2 groups of 4, its run kept under the test's folder."""

    def make(env_id=PROBE, **changes):
        defaults = {"prompts_per_step": 2, "group_size": 4, "total_episodes": 8, "eval_episodes": 8, "warmup_steps": 0}
        run = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        quick = defaults | {"run_dir": str(run), "learning_rate": 1e-2} | changes
        return RAFT(env_id, RAFTConfig(**{"model": fresh_model(env_id)} | quick))

    return make


def advantages(batch, **changes):
    return rejection_advantages(batch, RAFTConfig(group_size=4, **changes)).tolist()


# The losses.


def loss_and_gradient(loss, **changes):
    logp_BT = torch.tensor([[-0.7, -2.4, -0.5], [-1.0, -0.9, -9.0]], requires_grad=True)
    arguments = {
        "config": RAFTConfig(),
        "advantage": FIRST_ROW,
        "old_BT": OLD_BT,
        "denominators": count_denominators(SAMPLED_BT, 4),
    }
    value, metrics = loss(Scored(torch.arange(2), SAMPLED_BT, logp_BT, torch.zeros(2, 3)), **arguments | changes)
    value.backward()
    return value.item(), logp_BT.grad, metrics


def test_the_loss_of_raft_is_the_likelihood_of_what_is_accepted():
    # (.7 + 2.4 + .5)/3, whatever the policy that sampled it
    value, gradient, metrics = loss_and_gradient(supervised_loss, denominators=count_denominators(SAMPLED_BT[:1], 4))
    assert value == pytest.approx(1.2)
    assert metrics["nll"].item() == pytest.approx(1.2)
    assert_close(gradient, torch.tensor([[-1 / 3] * 3, [0.0] * 3]))


@pytest.mark.parametrize(("counted", "expected"), [(2, -0.574064), (1, -0.956773)], ids=["all", "accepted"])
def test_the_loss_of_raft_plus_plus_by_hand(counted, expected):
    # -(1.2 + .670320 + 1), over all five tokens or the three accepted
    config = RAFTConfig(variant="raft++")
    denominators = count_denominators(SAMPLED_BT[:counted], 4)
    value, gradient, _ = loss_and_gradient(policy_loss, config=config, denominators=denominators)
    assert value == pytest.approx(expected, abs=1e-6)
    tokens = 5 if counted == 2 else 3
    assert_close(gradient, torch.tensor([[0, -0.670320, -1.0], [0, 0, 0]]) / tokens, atol=1e-6, rtol=0)


def test_raft_plus_plus_at_ratio_one_is_supervised():
    fresh = loss_and_gradient(policy_loss, config=RAFTConfig(variant="raft++"), old_BT=None)[1]
    assert_close(fresh, loss_and_gradient(supervised_loss)[1])


def weights(agent):
    return torch.cat([p.flatten() for p in agent.policy.parameters()]).detach().clone()


@pytest.mark.parametrize("changes", [{"variant": "raft"}, {"variant": "raft++", "denominator": "accepted"}])
def test_a_step_is_one_of_supervised_fine_tuning_on_the_accepted(raft, fresh_model, changes):
    model = fresh_model(PROBE)
    agent, other = raft(model=model, accept="correct", **changes), raft(model=model)
    script(agent, cycle(MIXED, RIGHT))
    seen, update = [], agent.update
    agent.update = lambda batch, *rest, **more: seen.append(batch) or update(batch, *rest, **more)
    before = weights(agent)
    agent.learn()
    other.learner.set_learning_rate(1e-2)
    metrics = sft_step(other.learner, seen[0], torch.tensor([1, 3, 4, 5, 6, 7]))
    assert_close(weights(agent), weights(other), rtol=0, atol=1e-6)
    assert (weights(agent) - before).abs().max() > 1e-3
    assert metrics_of(agent)[0]["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=1e-5)
    if changes["variant"] == "raft":
        assert metrics_of(agent)[0]["nll"] == pytest.approx(metrics["nll"], rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "sequences"),
    [
        ({"variant": "raft"}, 2),
        ({"variant": "raft", "denominator": "all"}, 8),
        ({"variant": "raft++"}, 8),
        ({"variant": "raft++", "denominator": "accepted"}, 2),
        ({"variant": "reinforce-rej"}, 8),
        ({"variant": "reinforce-rej", "denominator": "accepted"}, 2),
        ({"variant": "reinforce-rej", "denominator": "accepted", "wrong_advantage": -1.0}, 4),
    ],
)
def test_the_denominators_are_those_of_the_accepted_or_of_all(raft, changes, sequences):
    agent = raft(accept="correct" if changes["variant"] == "raft" else None, **changes)
    script(agent, cycle(MIXED, WRONG))
    updates = watch_updates(agent)
    agent.learn()
    ((rows, denominators, _),) = updates
    assert denominators.sequences == sequences
    assert sorted(rows) == ([0, 1, 2, 3] if "wrong_advantage" in changes else [1, 3])


# What is accepted.

RETURNS = [0.1, 0.7, 0.9, 0.7, 0.4, 0.4, 0.2, 0.0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 0, 1, 0, 1, 0, 0, 0]),
        ({"accept_k": 4}, [0, 0, 1, 0, 1, 0, 0, 0]),
        ({"accept_k": 3}, [0, 0, 1, 0, 1, 0, 0, 0]),
        ({"accept_k": 2}, [0, 1, 1, 0, 1, 1, 0, 0]),
        ({"accept": "correct"}, [1, 0, 0, 1, 0, 1, 1, 0]),
        ({"accept": "above", "accept_above": 0.4}, [0, 1, 1, 1, 0, 0, 0, 0]),
        ({"variant": "raft++"}, [1, 0, 0, 1, 0, 1, 1, 0]),
        ({"variant": "raft++", "accept": "best"}, [0, 0, 1, 0, 1, 0, 0, 0]),
        ({"variant": "reinforce-rej"}, [1, 0, 0, 1, 0, 1, 1, 0]),
        ({"variant": "reinforce-rej", "wrong_advantage": -0.5}, [1, -0.5, -0.5, 1, -0.5, 1, 1, -0.5]),
    ],
)
def test_what_is_accepted_worked_by_hand(changes, expected):
    # ties go to the first: 1 before 3, 4 before 5
    batch = batch_of([1, 0, 0, 1], [0, 1, 1, 0], returns=RETURNS)
    assert advantages(batch, **changes) == expected


def test_reinforce_rej_drops_groups_that_are_all_right():
    assert advantages(batch_of([1, 0, 0, 1], RIGHT), variant="reinforce-rej") == [1, 0, 0, 1, 0, 0, 0, 0]
    assert advantages(batch_of([1, 0, 0, 1], RIGHT), variant="raft++") == [1, 0, 0, 1, 1, 1, 1, 1]
    assert advantages(batch_of([1, 0, 0, 1], RIGHT), variant="raft") == [1, 0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("outcomes", [[1, 2, 1, 1], [0.2, 0.5, 0.2, 0.2]])
def test_reinforce_rej_tells_right_from_wrong_and_not_grades(outcomes):
    assert advantages(batch_of(outcomes), variant="reinforce-rej", wrong_advantage=-1.0) == [0] * 4


def test_the_better_of_graded_answers_are_learned_from():
    assert advantages(batch_of([0.2, 0.5, 0.2, 0.4])) == [0, 1, 0, 0]
    assert advantages(batch_of([0.2, 0.5, 0.2, 0.4]), accept="above", accept_above=0.3) == [0, 1, 0, 1]
    assert advantages(batch_of([0.5] * 4), accept="above", accept_above=0.3) == [0] * 4
    assert advantages(batch_of([0.2, 0.5, 0.2, 0.4]), variant="raft++") == [0] * 4


@pytest.mark.parametrize(
    "changes", [{}, {"accept_k": 2}, {"accept": "above", "accept_above": -9.0}, {"variant": "raft++"}]
)
def test_ungraded_samples_are_never_accepted(changes):
    got = advantages(batch_of([None, 1, None, None], [None] * 4), **changes)
    assert got == [0, 1, 0, 0, 0, 0, 0, 0]


def test_groups_that_differ_too_little_are_not_trained_on():
    # deviations .5 and .05
    batch = batch_of([1, 0, 1, 1], [1, 1, 1, 0], returns=[1, 0, 1, 1, 1, 1, 1, 0.9])
    assert advantages(batch, variant="raft++", min_group_std=0.1) == [1, 0, 1, 1, 0, 0, 0, 0]
    assert advantages(batch, variant="reinforce-rej", min_group_std=0.1) == [1, 0, 1, 1, 0, 0, 0, 0]
    assert advantages(batch, min_group_std=0.1) == [1, 0, 0, 0, 0, 0, 0, 0]
    assert advantages(batch) == [1, 0, 0, 0, 1, 0, 0, 0]


def every_config():
    """Every variant with every acceptance it takes."""
    acceptances = (
        {},
        {"accept": "best", "accept_k": 2},
        {"accept": "correct"},
        {"accept": "above", "accept_above": -9.0},
    )
    for variant, acceptance in itertools.product(("raft", "raft++"), acceptances):
        yield RAFTConfig(group_size=4, variant=variant, **acceptance)
    for wrong_advantage in (0.0, -1.0):
        yield RAFTConfig(group_size=4, variant="reinforce-rej", wrong_advantage=wrong_advantage)


outcomes_of_a_group = st.lists(st.sampled_from([0, 0, 0, 1, None]), min_size=4, max_size=4)


@given(
    st.lists(outcomes_of_a_group, min_size=1, max_size=4).flatmap(
        lambda groups: st.tuples(
            st.just(groups), st.lists(st.floats(-5, 5), min_size=4 * len(groups), max_size=4 * len(groups))
        )
    )
)
@settings(max_examples=200, deadline=None)
def test_a_group_that_is_all_wrong_is_never_trained_on(drawn):
    groups, returns = drawn
    outcomes = [outcome for group in groups for outcome in group]
    batch = batch_of(
        *groups, returns=[None if x is None else value for x, value in zip(outcomes, returns, strict=True)]
    )
    for config in every_config():
        advantage_B = rejection_advantages(batch, config)
        for number, group in enumerate(groups):
            if 1 not in group:
                assert not advantage_B[4 * number : 4 * number + 4].any(), config
        assert not advantage_B[~batch.graded_B].any()
        if config.acceptance in ("correct", "mixed"):
            assert [x > 0 for x in advantage_B.tolist()] <= [x == 1 for x in outcomes]


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 1.0, 2.0, float("nan")])), min_size=1, max_size=12))
def test_ranks_agree_with_sorting_each_group(drawn):
    groups, returns = zip(*drawn, strict=True)
    return_B = torch.tensor(returns, dtype=torch.float64)
    got = rank_in_group(return_B, torch.tensor(groups)).tolist()
    for group in set(groups):
        rows = [row for row in range(len(groups)) if groups[row] == group]
        best_first = sorted(rows, key=lambda row: (return_B[row].isnan().item(), -return_B[row].nan_to_num(), row))
        assert [got[row] for row in best_first] == list(range(len(rows)))


@pytest.mark.parametrize("variant", ["raft", "raft++", "reinforce-rej"])
def test_only_accepted_samples_go_through_the_learner(raft, variant):
    agent = raft(variant=variant, prompts_per_step=4)
    script(agent, cycle(WRONG, MIXED, [None] * 4, WRONG))
    updates = watch_updates(agent)
    agent.learn(total_episodes=16)
    ((rows, _, _),) = updates
    assert sorted(rows) == ([5] if variant == "raft" else [5, 7])
    assert metrics_of(agent)[0]["accepted_share"] == len(rows) / 16


@pytest.mark.parametrize(("denominator", "rows"), [("accepted", [1, 3]), ("all", [0, 1, 2, 3, 4, 6, 7])])
def test_with_a_kl_term_every_graded_sample_that_counts_goes_through_the_learner(raft, denominator, rows):
    agent = raft(kl_loss_coef=0.1, accept="correct", denominator=denominator)
    script(agent, cycle(MIXED, [0, None, 0, 0]))
    updates = watch_updates(agent)
    agent.learn()
    assert sorted(updates[0][0]) == rows
    assert metrics_of(agent)[0]["trained_share"] == len(rows) / 8


def test_pushed_down_samples_do_not_count_as_accepted(raft):
    agent = raft(variant="reinforce-rej", wrong_advantage=-1.0)
    script(agent, cycle(MIXED, WRONG))
    agent.learn()
    assert metrics_of(agent)[0]["accepted_share"] == 2 / 8
    assert metrics_of(agent)[0]["trained_share"] == 4 / 8


# Steps without an accepted sample.


@pytest.mark.parametrize(
    ("group", "advice"),
    [
        (
            WRONG,
            "0% of the answers were right, the mean reward was 0 and 0% of the answers were cut; begin from a model",
        ),
        (
            RIGHT,
            "100% of the answers were right, the mean reward was 1 and 0% of the answers were cut; the task is solved",
        ),
    ],
)
def test_a_run_that_accepts_nothing_for_long_stops_with_what_was_seen(raft, capsys, group, advice):
    agent = raft(variant="reinforce-rej", max_barren_steps=3, total_episodes=1000)
    script(agent, cycle(group))
    before = weights(agent)
    agent.learn()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "stopped" in line]
    assert line.startswith("training stopped after step 3: no completion was accepted in 3 steps; in the last one ")
    assert advice in line
    assert agent.last_training.after.episodes == 8
    assert torch.equal(weights(agent), before)


def test_an_accepted_sample_begins_the_count_of_barren_steps_anew(raft):
    agent = raft(max_barren_steps=3, total_episodes=8 * 9)
    script(agent, lambda problem: MIXED if problem in (4, 10) else WRONG)  # in the third step and the sixth
    agent.learn()
    accepted = [line["accepted_share"] > 0 for line in metrics_of(agent)]
    assert accepted == [False, False, True, False, False, True, False, False, False]
    assert agent.last_training.stopped is not None


def test_barren_steps_are_counted_on_after_a_resume(raft):
    agent = raft(max_barren_steps=3, total_episodes=8 * 9, checkpoint_every=2)
    script(agent, cycle(WRONG))
    agent.learn(callback=lambda training: training.step < 2)
    again = RAFT(PROBE, agent.config, resume=True)
    script(again, cycle(WRONG))
    again.learn()
    assert len(metrics_of(again)) == 3


# Settings that mean nothing.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size must be 2 or more"),
        ({"variant": "reinforce-rej", "accept": "best"}, "accept must be left out: reinforce-rej keeps"),
        ({"wrong_advantage": -1.0}, "wrong_advantage must be 0 in raft, which has no wrong samples"),
        ({"variant": "reinforce-rej", "wrong_advantage": 1.0}, "wrong_advantage must be 0 or less, got 1.0"),
        ({"accept_k": 1}, 'accept_k must be from 2 to group_size=8, with accept "best", got 1'),
        ({"accept_k": 9}, "accept_k must be from 2 to group_size=8"),
        ({"accept_k": 2, "accept": "correct"}, "accept_k must be .* with accept"),
        ({"accept": "above"}, 'accept_above must be given with accept "above", and only then, got None'),
        ({"accept_above": 0.5}, "accept_above must be given"),
        ({"max_barren_steps": 0}, "max_barren_steps must be at least 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RAFTConfig(**changes)


# What it learns.


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["raft", "raft++", "reinforce-rej"])
@pytest.mark.parametrize(
    ("env_id", "family", "lr", "episodes", "at_least"),
    [
        ("textenv/ProbeOneHot-v0", "llama", 1e-2, 1500, 0.95),
        # With no push downwards a higher rate ends all trying before every letter is found.
        (PROBE, "llama", 2e-3, 4000, 0.9),
        ("textenv/ProbeLength-v0", "llama", 1e-2, 1500, 0.95),
        # Rotary positions alone cannot tell the prompt "a" from the prompt and its answer "aa".
        ("textenv/ProbeSubstring-v0", "gpt2", 2e-3, 4000, 0.95),
    ],
)
@pytest.mark.slow
def test_it_learns_the_probes(raft, fresh_model, variant, env_id, family, lr, episodes, at_least):
    agent = raft(
        env_id,
        model=fresh_model(env_id, family),
        variant=variant,
        total_episodes=episodes,
        prompts_per_step=8,
        group_size=8,
        learning_rate=lr,
        eval_episodes=64,
        checkpoint_every=10**6,
    )
    assert agent.learn().last_training.after.reward >= at_least

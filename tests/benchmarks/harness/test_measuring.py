"""What is measured, against numbers worked by hand and against the definitions computed the long way."""

import math

import pytest
import torch

from agents.core.models import build_tiny
from agents.core.policy import Policy
from benchmarks.harness import measuring
from benchmarks.harness.measuring import (
    Answer,
    PolicyPlayer,
    divergence,
    diversity,
    kl_and_entropy,
    measure,
    summary,
)
from benchmarks.harness.suite import EvaluationPlan
from rewards import Score, ungraded
from tests.benchmarks.harness import playground  # noqa: F401 - registers its tasks
from textenv import Finish, make_task
from textenv.tokenizer import CharTokenizer

PLAN = EvaluationPlan(points=2, problems=5, samples=3)


RIGHT = Score(1.0)


def answer(text="7", score=RIGHT, finish=Finish.EOS, tokens=2, turns=None):
    return Answer(turns or (text,), score, finish, tokens)


def policy(seed=0, stirred=0.0):
    made = Policy(build_tiny(CharTokenizer(), seed), CharTokenizer())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=stirred)
    return made


def test_kl_and_entropy_are_those_worked_by_hand():
    p, q = (
        torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log(),
        torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]]).log(),
    )
    kl, entropy = kl_and_entropy(p, q)
    assert kl.tolist() == pytest.approx([0.5 * math.log(2) + 0.5 * math.log(2 / 3), math.log(2)])  # 0.143841, 0.693147
    assert entropy.tolist() == pytest.approx([math.log(2), 0])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_divergence_is_the_sum_over_the_vocabulary_at_each_sampled_token_alone(temperature, monkeypatch):
    ours, start = policy(stirred=0.05), policy()
    tokens_BT = torch.randint(1, 97, (5, 9))
    sampled_BT = torch.rand(5, 9) < 0.5
    sampled_BT[:, 0] = False
    with torch.no_grad():
        p, q = ((each.model(tokens_BT).logits.double() / temperature).log_softmax(-1) for each in (ours, start))
    kl_BT, entropy_BT = (p.exp() * (p - q)).sum(-1), -(p.exp() * p).sum(-1)
    wanted = sampled_BT[:, 1:]  # the logits at a token are those of the next
    # In pieces of a row, and of a few logits.
    monkeypatch.setattr(measuring, "TOKENS_AT_ONCE", 10)
    monkeypatch.setattr(measuring, "AT_ONCE", 300)
    kl_N, entropy_N = divergence(ours, start, tokens_BT, sampled_BT, temperature)
    torch.testing.assert_close(kl_N, kl_BT[:, :-1][wanted], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy_N, entropy_BT[:, :-1][wanted], rtol=1e-4, atol=1e-6)


def test_the_kl_of_a_policy_is_that_of_an_answer_and_its_entropy_that_of_a_token():
    task, ours, start = make_task("playground/Digits-v0"), policy(stirred=0.05), policy()
    player = PolicyPlayer(task, ours, seed=0, start=start)
    (batch,) = player.batches(PLAN, 3, 1.0)
    kl_N, entropy_N = divergence(ours, start, batch.tokens_BT, batch.sampled_BT, 1.0)
    metrics = player.play(PLAN, 3, 1.0).metrics
    assert metrics["kl"] == pytest.approx(float(kl_N.sum()) / 15)
    assert metrics["entropy"] == pytest.approx(float(entropy_N.mean()))
    assert metrics["kl"] > 0.01


def test_the_exact_kl_agrees_with_the_log_ratio_of_what_was_sampled():
    task, ours, start = make_task("playground/Digits-v0"), policy(stirred=0.05), policy()
    plan = EvaluationPlan(points=2, problems=8, samples=64)
    player = PolicyPlayer(task, ours, seed=0, start=start)
    ratio_B = torch.cat(
        [
            (
                ours.logprobs(batch.tokens_BT, batch.sampled_BT, 1.0)[0]
                - start.logprobs(batch.tokens_BT, batch.sampled_BT, 1.0)[0]
            ).sum(dim=1)
            for batch in player.batches(plan, 64, 1.0)
        ]
    ).detach()
    error = float(ratio_B.std()) / math.sqrt(len(ratio_B))
    assert abs(player.play(plan, 64, 1.0).metrics["kl"] - float(ratio_B.mean())) < 3 * error


def test_answers_are_counted_as_different_by_what_was_extracted_case_and_spaces_aside():
    group = [answer(" 4"), answer("4 "), answer("x^2"), answer("so it is 7", Score(0.0, info={"extracted": "X^2"}))]
    assert diversity([[answer(text) for text in "4457"]])["unique_share"] == 0.75
    assert diversity([group])["unique_share"] == 0.5


def test_pass_at_k_is_unbiased_and_needs_k_samples_that_are_told():
    right, wrong, silent = answer(), answer(score=Score(0.0)), answer(score=Score(0.9, {"style": 0.9}))
    found = diversity([[right, wrong, wrong, wrong], [right, right, silent, answer(score=ungraded("time-out"))]])
    # 1/4 and 2/2 right; 1 - C(3,2)/C(4,2) = 1/2 and 1; of the first problem alone, 1.
    assert [found[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx([0.625, 0.75, 1.0])
    assert diversity([[silent, silent]])["pass@1"] is None


def test_ungraded_answers_count_in_their_share_and_in_no_mean():
    found = summary(
        [
            [answer(score=Score(1.0, {"correct": 1.0, "format": 0.5}), tokens=4), answer(score=ungraded("time-out"))],
            [
                answer(score=Score(0.0, {"correct": 0.0, "format": 0.0}), finish=Finish.LENGTH),
                answer(finish=Finish.CONTEXT),
            ],
        ]
    )
    assert found["reward"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["reward/correct"], found["reward/format"]) == (0.5, 0.25)
    assert (found["length"], found["cut_share"], found["ungraded_share"]) == (2.5, 0.5, 0.25)


def test_what_nothing_tells_is_none_and_not_zero():
    found = summary([[answer(score=ungraded("time-out"))], [answer(score=ungraded("time-out"))]])
    assert (found["reward"], found["accuracy"], found["ungraded_share"]) == (None, None, 1.0)
    assert summary([[answer(score=Score(0.5, {"style": 0.5}))]])["accuracy"] is None


def test_retries_that_repeat_themselves_are_told_where_there_are_several_turns():
    assert summary([[answer(turns=("3", " 3", "5"))], [answer(turns=("5",))]])["unique_turn_share"] == pytest.approx(
        5 / 6
    )
    assert "unique_turn_share" not in summary([[answer()]])


def test_a_point_keeps_the_numbers_of_each_problem_and_completion():
    task, start = make_task("playground/Digits-v0"), policy()
    measured = measure(PolicyPlayer(task, start, 0, start), PLAN)
    assert len(measured.greedy["reward"]) == len(measured.rows) == 5
    assert [len(group) for group in measured.sampled["correct"]] == [3] * 5
    row = measured.rows[0]
    assert row["prompt"] == task.problem(measuring.HELD_OUT_SEED, "eval", 0).prompt
    assert [each["reward"] for each in row["sampled"]] == measured.sampled["reward"][0]
    assert set(row["greedy"]) == {"text", "reward", "correct", "parts", "error", "finish", "tokens"}
    mean = sum(sum(group) for group in measured.sampled["reward"]) / 15
    assert measured.metrics["sampled/reward"] == pytest.approx(mean)
    assert {"greedy/reward", "sampled/pass@1", "sampled/pass@2", "sampled/entropy", "sampled/kl"} <= set(
        measured.metrics
    )
    assert "sampled/pass@4" not in measured.metrics


def test_measuring_in_batches_changes_nothing_but_the_draws(monkeypatch):
    task, start = make_task("playground/Digits-v0"), policy()
    whole = PolicyPlayer(task, start, 0).play(PLAN, 1, 0.0)
    monkeypatch.setattr(measuring, "EVAL_BATCH", 2)
    assert PolicyPlayer(task, start, 0).play(PLAN, 1, 0.0).answers_PG == whole.answers_PG
    assert len(PolicyPlayer(task, start, 0).play(PLAN, 3, 1.0).answers_PG) == 5


def test_dialogues_are_measured_over_all_their_turns():
    task, start = make_task("playground/Dialogue-v0"), policy()
    found = measure(PolicyPlayer(task, start, 0, start), PLAN)
    assert 1 / 3 <= found.metrics["greedy/unique_turn_share"] <= 1
    assert found.metrics["greedy/length"] > 2
    assert found.rows[0]["greedy"]["text"].count("\n") >= 2


def test_a_small_data_set_is_gone_through_once():
    task = make_task("playground/Digits-v0")
    task.size = lambda split: 2
    assert len(PolicyPlayer(task, policy(), 0).play(PLAN, 1, 0.0).answers_PG) == 2

"""Sums, layers, gates, caps and ensembles, with numbers worked by hand."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Gate, Reward, RewardError, Sample, Score, WeightedSum, score_samples, ungraded
from rewards.compose import Cap, Ensemble, Layered

SOLVED = "<think>6 times 7</think><answer>42</answer>"


def test_a_sum_weighs_values_and_reports_them_unweighted(fixed, sample):
    # 2 * 1.0 + 0.5 * 0.5 - 1 * 0.25 = 2.0
    mixed = WeightedSum({"a": (2, fixed(Score(1.0))), "b": (0.5, fixed(Score(0.5))), "c": (-1, fixed(Score(0.25)))})
    (score,) = mixed([sample()])
    assert score == Score(2.0, {"a": 1.0, "b": 0.5, "c": 0.25})


def test_a_sum_takes_registered_names(sample):
    wrong, right = WeightedSum({"exact": 1.0, "format_tags": 0.2})([sample(SOLVED, "42"), sample("42", "42")])
    assert wrong == Score(0.2, {"exact": 0.0, "format_tags": 1.0, "correct": 0.0})
    assert right == Score(1.0, {"exact": 1.0, "format_tags": 0.0, "correct": 1.0})


def test_form_never_counts_as_accuracy_beside_a_verifier(sample):
    (score,) = WeightedSum({"format_tags": 5.0, "exact": 1.0})([sample(SOLVED, "42")])
    assert score.value == 5.0
    assert score.correct is False


def test_correct_is_that_of_the_first_component_that_names_it(fixed, sample):
    first, second = fixed(Score(0.3, {"correct": 1.0})), fixed(Score(0.9, {"correct": 0.0}))
    (score,) = WeightedSum({"form": (1, fixed(Score(1.0))), "first": (1, first), "second": (1, second)})([sample()])
    assert score.parts["correct"] == 1.0


def test_an_ungraded_component_leaves_its_sample_ungraded_and_no_other(fixed, sample):
    flaky = fixed(Score(1.0), ungraded("time-out"))
    good, bad = WeightedSum({"exact": 1.0, "judge": (1.0, flaky)})([sample("a", "a"), sample("a", "a")])
    assert good.value == 2.0
    assert (bad.value, bad.error) == (None, "judge: time-out")


def test_a_component_that_raises_leaves_its_samples_ungraded(sample):
    class Broken(Reward):
        def __call__(self, samples):
            raise OSError("gone")

    (score,) = WeightedSum({"exact": 1.0, "broken": (1.0, Broken())})([sample("a", "a")])
    assert score.value is None
    assert score.error.startswith("broken: ")
    assert "OSError: gone" in score.error


@pytest.mark.parametrize("values", [(1e308, 1e308), (1e308, -1e308)])
def test_a_sum_too_large_to_add_up_is_ungraded(values, fixed, sample):
    huge = WeightedSum({"a": (10.0, fixed(Score(values[0]))), "b": (10.0, fixed(Score(values[1])))})
    (score,) = huge([sample()])
    assert score.value is None
    assert score.error.startswith("weighted_sum: ")


def test_token_credit_is_weighed_and_a_bare_value_goes_to_the_last_token(fixed, sample):
    # 2 * (0.25, 0.5, 0.25) + 0.5 * (0, 0, 3) = (0.5, 1.0, 2.0)
    dense, bare = fixed(Score(1.0, tokens=(0.25, 0.5, 0.25))), fixed(Score(3.0))
    (score,) = WeightedSum({"dense": (2, dense), "bare": (0.5, bare)})([sample(tokens=(7, 8, 9))])
    assert score.tokens == (0.5, 1.0, 2.0)
    assert score.value == 3.5


def test_without_token_credit_a_sum_gives_none(fixed, sample):
    (score,) = WeightedSum({"a": (1, fixed(Score(1.0)))})([sample(tokens=(7, 8))])
    assert score.tokens is None


def test_token_credit_that_does_not_fit_the_tokens_is_a_broken_contract(fixed, sample):
    with pytest.raises(RewardError, match="credit to 1 tokens of a sample with 2"):
        WeightedSum({"a": (1, fixed(Score(1.0, tokens=(1.0,))))})([sample(tokens=(7, 8))])


CREDIT = st.lists(st.floats(-10, 10), min_size=3, max_size=3)


@settings(max_examples=50, deadline=None)
@given(credit=CREDIT, value=st.floats(-10, 10), weights=st.tuples(st.floats(-5, 5), st.floats(-5, 5)))
def test_the_tokens_of_a_sum_sum_to_its_value(credit, value, weights):
    class Dense(Reward):
        def __call__(self, samples):
            return [Score(sum(credit), tokens=tuple(credit)) for _ in samples]

    mixed = WeightedSum({"dense": (weights[0], Dense()), "bare": (weights[1], lambda p, c, r: value)})
    (score,) = mixed([Sample(prompt="", completion="", tokens=(1, 2, 3))])
    assert score.value == pytest.approx(weights[0] * sum(credit) + weights[1] * value)
    assert sum(score.tokens) == pytest.approx(score.value, abs=1e-9)


@pytest.mark.parametrize(
    "components", [{}, {"correct": (1.0, "exact")}, {"exact": float("nan")}, {"exact": "exact"}, {"exat": 1.0}]
)
def test_a_sum_that_makes_no_sense_is_refused(components):
    with pytest.raises(ValueError, match=r"components|finite weight|no reward is named"):
        WeightedSum(components)


def test_an_empty_batch_has_no_scores():
    assert WeightedSum({"exact": 1.0})([]) == []
    assert Gate("exact", "exact")([]) == []


def test_a_reward_counts_only_behind_an_open_gate(fixed, sample):
    gate, reward = fixed(Score(1.0), Score(0.99), Score(2.0)), fixed(Score(0.5), Score(0.25))
    first, second, third = Gate(gate, reward)([sample("a"), sample("b"), sample("c")])
    assert first == Score(0.5, {"gate": 1.0, "reward": 0.5, "correct": 0.0})
    assert second == Score(0.0, {"gate": 0.99, "reward": 0.0, "correct": 0.0})
    assert third == Score(0.25, {"gate": 2.0, "reward": 0.25, "correct": 0.0})


def test_behind_a_closed_gate_the_reward_is_not_called(fixed, sample):
    gate, reward = fixed(Score(0.0), Score(1.0)), fixed(Score(1.0))
    Gate(gate, reward)([sample("shut"), sample("open")])
    assert gate.seen == ["shut", "open"]
    assert reward.seen == ["open"]


def test_an_ungraded_gate_or_reward_leaves_the_sample_ungraded(fixed, sample):
    gate, reward = fixed(ungraded("unclear"), Score(1.0), Score(0.0)), fixed(ungraded("time-out"))
    first, second, third = Gate(gate, reward)([sample(), sample(), sample()])
    assert (first.value, first.error) == (None, "gate: unclear")
    assert (second.value, second.error) == (None, "reward: time-out")
    assert third.value == 0.0


@pytest.mark.parametrize(
    ("completion", "reference", "value", "correct"),
    [(SOLVED, SOLVED, 1.0, 1.0), (SOLVED, "42", 0.0, 0.0), ("42", "42", 0.0, 0.0)],
)
def test_behind_a_format_gate_correct_is_that_of_the_verifier(completion, reference, value, correct, sample):
    (score,) = Gate("format_tags", "exact")([sample(completion, reference)])
    assert (score.value, score.parts["correct"]) == (value, correct)


@pytest.mark.parametrize(("completion", "correct"), [("42", 1.0), ("41", 0.0)])
def test_behind_a_verifier_as_gate_correct_is_that_of_the_gate(completion, correct, sample):
    (score,) = Gate("exact", lambda prompt, completion, reference: 0.1)([sample(completion, "42")])
    assert score.parts["correct"] == correct


def test_token_credit_passes_an_open_gate(fixed, sample):
    gate, reward = fixed(Score(1.0), Score(0.0)), fixed(Score(1.0, tokens=(0.25, 0.75)))
    passed, stopped = Gate(gate, reward)([sample(tokens=(1, 2)), sample(tokens=(1, 2))])
    assert passed.tokens == (0.25, 0.75)
    assert stopped.tokens is None


def test_compositions_nest(sample):
    nested = WeightedSum({"gated": (1.0, Gate("format_tags", "exact")), "format_tags": 0.5})
    solved, bare = score_samples(nested, [sample(SOLVED, SOLVED), sample("42", "42")])
    assert (solved.value, solved.parts["correct"]) == (1.5, 1.0)
    assert (bare.value, bare.parts["correct"]) == (0.0, 0.0)


# --- Weights that change while running ---


def test_new_weights_hold_from_the_next_batch_on_and_the_vector_stays(fixed, sample):
    mixed = WeightedSum({"a": (2, fixed(Score(1.0))), "b": (0.5, fixed(Score(4.0)))})
    assert mixed([sample()])[0].value == 4.0
    mixed.weights = {"b": -1, "a": 3}  # in any order
    assert mixed.weights == {"a": 3.0, "b": -1.0}
    assert mixed([sample()]) == [Score(-1.0, {"a": 1.0, "b": 4.0})]


def test_a_batch_under_way_keeps_the_weights_it_began_with(sample):
    class ChangesItsMind(Reward):
        def __call__(self, samples):
            mixed.weights = {"first": 100.0, "second": 100.0}
            return [Score(1.0) for _ in samples]

    mixed = WeightedSum({"first": (1.0, ChangesItsMind()), "second": (1.0, lambda p, c, r: 1.0)})
    assert [score.value for score in mixed([sample(), sample()])] == [2.0, 2.0]
    assert mixed([sample()])[0].value == 200.0


@pytest.mark.parametrize(
    "weights", [{}, {"exact": 1.0}, {"exact": 1.0, "format_tags": 1.0, "regex": 1.0}, {"exact": 1, "format_tags": None}]
)
def test_weights_for_other_components_or_without_a_number_are_refused_and_the_old_ones_stay(weights):
    mixed = WeightedSum({"exact": 1.0, "format_tags": 0.2})
    with pytest.raises(ValueError, match=r"weights must be given for all of|needs a finite weight"):
        mixed.weights = weights
    with pytest.raises(TypeError):
        mixed.weights["exact"] = 5.0
    assert mixed.weights == {"exact": 1.0, "format_tags": 0.2}


# --- Layers ---


def layers(fixed, correct, steps, form, length):
    scores = [fixed(Score(value)) for value in (correct, steps, form, length)]
    return Layered(
        dict(zip(["answer", "steps", "form", "length"], zip([10, 5, 1, -0.5], scores, strict=True), strict=True))
    )


@pytest.mark.parametrize(
    ("values", "worth"),
    [((1, 0, 0, 1), 9.5), ((0, 1, 1, 0), 6.0), ((0, 0.6, 0, 1), 2.5), ((0, 0, 1, 0), 1.0), ((1, 1, 1, 0), 16.0)],
)
def test_layers_are_worth_what_their_table_says(values, worth, fixed, sample):
    (score,) = layers(fixed, *values)([sample()])
    assert score.value == worth
    assert score.parts == dict(zip(["answer", "steps", "form", "length"], values, strict=True))


UNIT = st.floats(0, 1)


def constant(value, prompt, completion, reference):
    return value


@settings(max_examples=100, deadline=None)
@given(below=st.tuples(UNIT, UNIT, UNIT), other=st.tuples(UNIT, UNIT, UNIT))
def test_nothing_below_a_layer_outweighs_it(below, other):
    def worth(values):
        weighed = zip("abcd", [10, 5, 1, -0.5], values, strict=True)
        layered = Layered({name: (weight, partial(constant, value)) for name, weight, value in weighed})
        return layered([Sample(prompt="", completion="")])[0].value

    assert worth((1, *below)) > worth((0, *other))
    assert worth((0, 1, *below[1:])) > worth((0, 0, *other[1:]))


@pytest.mark.parametrize("weights", [[10, 10], [6, 5, 1], [1, -1], [0], [float("nan")]])
def test_a_layer_that_does_not_outweigh_those_below_is_refused(weights, fixed):
    with pytest.raises(ValueError, match=r"must weigh more than all below it|finite weight"):
        Layered({f"layer {n}": (weight, fixed(Score(1.0))) for n, weight in enumerate(weights)})


def test_weights_of_layers_may_change_but_not_their_order(fixed, sample):
    tiers = layers(fixed, 1, 1, 1, 0)
    tiers.weights = {"answer": 20, "steps": 2, "form": 1, "length": -0.5}
    assert tiers([sample()])[0].value == 23.0
    with pytest.raises(ValueError, match=r"layer 'answer' weighs 1, and must weigh more than all below it, 3\.5"):
        tiers.weights = {"answer": 1, "steps": 2, "form": 1, "length": -0.5}


@pytest.mark.parametrize("value", [-0.1, 1.1, 10.0])
def test_a_layer_outside_0_to_1_leaves_its_sample_ungraded(value, fixed, sample):
    (score,) = layers(fixed, 1, value, 1, 0)([sample()])
    assert score.error == f"steps: a layer takes values from 0 to 1, got {value:g}"


# --- Caps ---


@pytest.mark.parametrize(
    ("shape", "limit", "value", "capped"),
    [
        ("min", 2.0, 1.5, 1.5),
        ("min", 2.0, 7.0, 2.0),
        ("min", -1.0, 0.0, -1.0),
        ("tanh", 2.0, 1.0, 0.924234),  # 2 tanh(1/2)
        ("tanh", 2.0, -50.0, -2.0),
        ("sigmoid", 3.0, 3.0, 0.5),
        ("sigmoid", 1.0, 3.0, 0.880797),  # 1 / (1 + e^-2)
        ("sigmoid", 0.0, 1e6, 1.0),
        ("sigmoid", 0.0, -1e6, 0.0),
    ],
)
def test_a_cap_holds_by_its_shape(shape, limit, value, capped, fixed, sample):
    (score,) = Cap(fixed(Score(value, {"style": 0.5})), limit, shape)([sample()])
    assert score.value == pytest.approx(capped, abs=1e-6)
    assert score.parts == {"style": 0.5, "uncapped": value}


def test_a_cap_leaves_the_verdict_as_it_was(sample):
    right, wrong = Cap("exact", 0.25)([sample("a", "a"), sample("b", "a")])
    assert (right.value, right.correct) == (0.25, True)
    assert (wrong.value, wrong.correct) == (0.0, False)


def test_what_cannot_be_graded_cannot_be_capped(fixed, sample):
    assert Cap(fixed(ungraded("time-out")), 1.0)([sample()])[0].error == "time-out"


def test_the_last_token_takes_what_a_cap_takes_off(fixed, sample):
    (score,) = Cap(fixed(Score(3.0, tokens=(0.5, 1.5, 1.0))), 2.0)([sample(tokens=(7, 8, 9))])
    assert score.tokens == (0.5, 1.5, 0.0)


def test_credit_too_large_to_be_capped_is_ungraded(fixed, sample):
    (score,) = Cap(fixed(Score(1e300, tokens=(1.0, 1e300))), 2.0)([sample(tokens=(1, 2))])
    assert "token credit must sum to the value" in score.error


@pytest.mark.parametrize(
    ("limit", "shape"), [(1.0, "max"), (float("inf"), "min"), (float("nan"), "sigmoid"), (0.0, "tanh"), (-1.0, "tanh")]
)
def test_a_cap_that_makes_no_sense_is_refused(limit, shape):
    with pytest.raises(ValueError, match="a cap's"):
        Cap("exact", limit, shape)


# --- Ensembles ---


@pytest.mark.parametrize(
    ("how", "k", "value"), [("mean", None, 2.0), ("lower", 0.5, 1.5), ("lower", 0, 2.0), ("min", None, 1.0)]
)
def test_an_ensemble_agrees_by_how(how, k, value, fixed, sample):
    (score,) = Ensemble([fixed(Score(member)) for member in (1.0, 2.0, 3.0)], how, k)([sample()])
    assert score == Score(value, {"member_0": 1.0, "member_1": 2.0, "member_2": 3.0, "std": 1.0})


@pytest.mark.parametrize(("second", "correct"), [({"correct": 1.0}, 1.0), ({"correct": 0.0}, 0.0), ({}, 1.0)])
def test_an_ensemble_is_right_where_all_say_so_that_say_anything(second, correct, fixed, sample):
    (score,) = Ensemble([fixed(Score(1.0, {"correct": 1.0})), fixed(Score(0.5, second))])([sample()])
    assert score.parts["correct"] == correct


def test_an_ungraded_member_leaves_its_sample_ungraded_and_no_other(fixed, sample):
    flaky = fixed(Score(1.0), ungraded("time-out"))
    good, bad = Ensemble(["exact", flaky], "min")([sample("a", "a"), sample("a", "a")])
    assert good.value == 1.0
    assert bad.error == "member_1: time-out"


def test_an_ensembles_credit_is_the_mean_and_the_last_token_takes_the_difference(fixed, sample):
    # mean credit (0.5, 0.5 + 1.5) of (1, 1) and a bare 3; mean 2.5, less 0.5 standard deviations of 1 / sqrt 2
    dense, bare = fixed(Score(2.0, tokens=(1.0, 1.0))), fixed(Score(3.0))
    (score,) = Ensemble([dense, bare], "lower", 0.5)([sample(tokens=(1, 2))])
    assert score.value == pytest.approx(2.5 - 0.5 * 0.5**0.5)
    assert score.tokens == pytest.approx((0.5, 2.0 - 0.5 * 0.5**0.5))


def test_members_too_far_apart_to_compare_are_ungraded(fixed, sample):
    (score,) = Ensemble([fixed(Score(1e308)), fixed(Score(-1e308))], "lower", 10.0)([sample()])
    assert score.value is None


@pytest.mark.parametrize(
    ("members", "how", "k"),
    [
        (["exact"], "mean", None),
        ("exact", "mean", None),
        (["exact", "exact"], "max", None),
        (["exact", "exact"], "lower", None),
        (["exact", "exact"], "lower", -0.5),
        (["exact", "exact"], "min", 0.5),
        (["exact", "exat"], "min", None),
    ],
)
def test_an_ensemble_that_makes_no_sense_is_refused(members, how, k):
    with pytest.raises(ValueError, match=r"ensemble|k goes with|no reward is named"):
        Ensemble(members, how, k)


@pytest.mark.parametrize("made", [Layered({"exact": 1}), Cap("exact", 1.0), Ensemble(["exact", "exact"])])
def test_an_empty_batch_stays_empty(made):
    assert made([]) == []

"""The kit that tests rewards: it must see every fault planted here, and find none in what is sound."""

import random
import time

import pytest

from rewards import Reward, RewardError, Sample, Score, make, names, ungraded
from textenv.testing import Case, VerifierKit, adversarial, make_cases, near_misses

GOLD = [Case("42", "42", prompt="What is 6 times 7?"), Case("7", "7", prompt="3 + 4"), Case("Paris", "Paris")]


def right_of(reward):
    """A plain function as a reward."""
    return VerifierKit(lambda prompt, completion, reference: float(reward(completion, reference)))


# --- The cases ---


def test_near_misses_worked_by_hand():
    missed = near_misses([Case("It is 42.", "42"), Case("x^2+19", "x^2+19"), Case("Oz", "Oz"), Case("10", "10")])
    assert [(case.completion, case.reference) for case in missed] == [
        ("x^2+19", "42"),
        ("It is 43.", "42"),
        ("It is 4", "42"),
        ("Oz", "x^2+19"),
        ("x^2+10", "x^2+19"),
        ("x^2+1", "x^2+19"),
        ("10", "Oz"),
        ("Oa", "Oz"),
        ("O", "Oz"),
        ("It is 42.", "10"),
        ("11", "10"),
    ]
    assert {(case.kind, case.correct) for case in missed} == {("near miss", False)}


def test_adversarial_answers_try_what_policies_try():
    tried = [case.completion for case in adversarial(GOLD) if case.reference == "42"]
    for attack in (
        "",
        " \n",
        "What is 6 times 7?",
        "<think>42",
        "42, 42, 7, Paris, 7",
        "42 or 7",
        "42\n7",
        "\0",
        "\ud800",
    ):
        assert attack in tried
    assert max(map(len, tried)) == 10**6
    assert any("{" * 1_000 in text for text in tried)
    assert len(tried) == len(set(tried))


def test_what_is_right_after_all_is_no_wrong_case():
    echo = [Case("ab", "ab", prompt="ab"), Case("ac", "ac", prompt="ac"), Case("", "nothing"), Case("ad", "ab")]
    right = {(case.completion, case.reference) for case in echo}
    assert right & {(case.completion, case.reference) for case in make_cases(echo) if not case.correct} == set()


def test_references_may_be_of_any_type():
    gold = [Case('{"a": 1}', {"type": "object"}), Case("[1]", {"type": "array"})]
    report = VerifierKit(lambda p, c, reference: float(c[:1] == {"object": "{"}.get(reference["type"], "["))).run(gold)
    assert report.false_negatives == []
    assert {case.kind for case in make_cases(gold)} == {"gold", "near miss", "adversarial"}


def test_cases_need_two_problems():
    with pytest.raises(ValueError, match="two different problems or more, got 2 to one"):
        make_cases([Case("42", "42"), Case("42.0", "42")])


def test_a_case_is_told_in_a_few_printable_characters():
    told = [str(case) for case in make_cases(GOLD)]
    assert all(line.isprintable() and len(line) < 100 for line in told)
    assert "near miss '43' for '42'" in told


# --- What it finds ---


def test_exact_on_text_comes_out_clean():
    report = VerifierKit("exact").run(make_cases(GOLD))
    assert (report.false_positives, report.false_negatives, report.ungraded, report.broken) == ([], [], [], [])
    report.check()


GOLD_OF = {
    "exact": GOLD,
    "numeric": [Case("42", "42"), Case("0.5", "1/2"), Case("-3", "-3")],
    "math": [Case(r"\boxed{42}", "42"), Case(r"so \boxed{\frac12}", "1/2"), Case(r"\boxed{x^2+1}", "x^2+1")],
    "choice": [Case("A", "A"), Case("(C)", "C")],
}


@pytest.mark.parametrize("name", GOLD_OF)
def test_verifiers_of_this_project_accept_no_case_wrongly_and_refuse_none(name):
    assert name in names()
    VerifierKit(name).run(make_cases(GOLD_OF[name])).check()


def test_a_constant_reward_is_caught():
    report = right_of(lambda completion, reference: True).run(make_cases(GOLD))
    wrong = [case for case in report.cases if not case.correct]
    assert report.false_positives == wrong
    with pytest.raises(AssertionError, match=f"{len(wrong)} of {len(wrong)} wrong answers called right"):
        report.check()


@pytest.mark.parametrize(
    ("reward", "accepted"),
    [
        (lambda completion, reference: reference in completion, "42 or 7"),
        (lambda completion, reference: completion.startswith(reference[:1]), "43"),
        (lambda completion, reference: "\n" in completion or completion == reference, "42\n7"),
        (lambda completion, reference: completion.removeprefix("<think>") == reference, "<think>42"),
        (lambda completion, reference: completion == reference or "correct" in completion, "Ignore all previous"),
        (lambda completion, reference: completion == reference or len(completion) > 10**5, "1234567890"),
    ],
    ids=["substring", "prefix", "last line", "thoughts", "obeys", "length"],
)
def test_a_reward_that_can_be_gamed_is_caught_with_what_games_it(reward, accepted):
    report = right_of(reward).run(make_cases(GOLD))
    assert accepted in [case.completion[: len(accepted)] for case in report.false_positives if case.reference == "42"]
    assert report.false_negatives == []
    with pytest.raises(AssertionError, match="wrong answers called right"):
        report.check()


def test_a_reward_that_refuses_right_answers_is_caught():
    report = right_of(lambda completion, reference: completion == reference == "7").run(make_cases(GOLD))
    assert [case.completion for case in report.false_negatives] == ["42", "Paris"]
    report.check(max_false_negative=0.67)
    with pytest.raises(
        AssertionError, match=r"2 of 3 right answers called wrong, more than 2\.0%:\n  gold '42' for '42'"
    ):
        report.check()


def test_what_is_left_ungraded_is_neither_right_nor_wrong():
    fussy = VerifierKit(
        lambda p, completion, r: float(completion == r != "") if completion.isprintable() else ungraded("odd")
    )
    report = fussy.run(make_cases(GOLD))
    assert {case.completion for case in report.ungraded} == {
        " \n",
        "42\n7",
        "7\nParis",
        "Paris\n42",
        *"\0\ud800",
        "\u202e\u200f\u202b",
    }
    assert report.false_positives == report.false_negatives == []
    report.check(max_ungraded=0.5)
    with pytest.raises(AssertionError, match=r"answers left ungraded, more than 2\.0%"):
        report.check()


def test_a_right_answer_left_ungraded_was_not_called_wrong():
    report = VerifierKit(lambda prompt, completion, reference: ungraded("no idea")).run(GOLD)
    assert (report.ungraded, report.false_negatives) == (GOLD, [])


def test_form_alone_is_never_called_right():
    report = VerifierKit("format_tags").run(make_cases(GOLD))
    assert report.false_positives == []


# --- The contract ---


class Broken(Reward):
    """Exact, until a subclass spoils it."""

    name = "broken"

    def __call__(self, samples):
        return make("exact")(samples)


class Moody(Broken):
    def __call__(self, samples):
        return [Score(random.random(), {"correct": 0.0}) for _ in samples]


class ByPlace(Broken):
    def __call__(self, samples):
        return [Score(float(place % 2)) for place, _ in enumerate(samples)]


class ByCompany(Broken):
    def __call__(self, samples):
        return [Score(1 / len(samples)) for _ in samples]


class Raises(Broken):
    def __call__(self, samples):
        return [Score(float(sample.completion.encode() == sample.reference.encode())) for sample in samples]


class Silent(Broken):
    def __call__(self, samples):
        return [ungraded(" ") for _ in samples]


class Contained(Broken):
    def __call__(self, samples):
        return [Score(float(sample.reference in sample.completion)) for sample in samples]


@pytest.mark.parametrize(
    ("reward", "promise"),
    [
        (Moody(), "scored twice"),
        (ByPlace(), "scored in another order"),
        (ByCompany(), "scored alone"),
        (Raises(), "it raised UnicodeEncodeError"),
        (Silent(), "ungraded without a reason"),
        (Contained(), "'1' is right for an empty reference"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Reward) else "",
)
def test_a_broken_promise_is_named(reward, promise):
    report = VerifierKit(reward).run(make_cases(GOLD))
    assert any(promise in line for line in report.broken)
    with pytest.raises(AssertionError, match=f"broken promise: .*{promise}"):
        report.check(1.0, 1.0, 1.0)


def test_a_reward_that_returns_too_little_is_refused():
    class Short(Broken):
        def __call__(self, samples):
            return super().__call__(samples)[1:]

    with pytest.raises(RewardError, match="must return a list with one Score a sample"):
        VerifierKit(Short()).run(make_cases(GOLD))


def test_without_cases_there_is_nothing_to_run():
    with pytest.raises(ValueError, match="no case to run"):
        VerifierKit("exact").run([])


# --- The report ---


def test_a_report_prints_counts_cases_and_time(capsys, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", iter([10.0, 10.5]).__next__)
    cases = [Case("42", "42"), Case("[7]", "7"), Case("8", "7", correct=False, kind="near miss")]
    report = right_of(lambda completion, reference: completion == "8").run(cases)
    assert report.seconds_per_sample == pytest.approx(0.5 / 3)
    print(report)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert rows == [["gold", "2", "0", "2", "0"], ["near miss", "1", "1", "0", "0"]]
    at = lines.index("false positives: 1")
    assert lines[at:] == [
        "false positives: 1",
        "  near miss '8' for '7'",
        "false negatives: 2",
        "  gold '42' for '42'",
        "  gold '[7]' for '7'",
        "ungraded: 0",
        "broken promises: 0",
        "time a sample: 167 ms",
        "",
    ]


@pytest.mark.parametrize("case", make_cases(GOLD), ids=str)
def test_a_case_a_test(case):
    VerifierKit("exact").run([case]).check()


def test_a_case_reaches_the_reward_as_a_sample():
    seen = []

    class Remembers(Broken):
        def __call__(self, samples):
            seen.extend(samples)
            return super().__call__(samples)

    VerifierKit(Remembers()).run(GOLD[:1])
    assert seen[0] == Sample(prompt="What is 6 times 7?", completion="42", reference="42", turns=("42",))

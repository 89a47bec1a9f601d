"""The tasks: addresses, splits, demonstrations, replies and rewards."""

import doctest
import pkgutil
import subprocess
import sys
from fractions import Fraction

import pytest

import rewards
import textenv
import textenv.datasets
import textenv.tasks
from rewards import Reward, Sample, Score, ungraded
from tests.textenv.conftest import IDS, ON_THE_HUB, options_of
from textenv.task import Finish, Problem, Task, Transcript
from textenv.tasks import Arithmetic, Countdown, GuessNumber, Reverse, Sort, TryAgain
from textenv.tasks.countdown import CountdownReward, evaluate
from textenv.tasks.guess_number import HIGHER, LOWER, UNREADABLE, read_guess
from textenv.tasks.reasoning_gym import NAMES, PREFIX
from textenv.tasks.try_again import FEEDBACK, TryAgainReward

HELD_OUT = [id for id in IDS if textenv.make_task(id, **options_of(id)).holdout]
MODULES = [
    "textenv.datasets",
    *(f"textenv.tasks.{module.name}" for module in pkgutil.iter_modules(textenv.tasks.__path__)),
]


def make(id):
    return textenv.make_task(id, **options_of(id))


def play(task, problem, answer):
    """The completions and replies of an episode in which ``answer(transcript)`` writes each completion."""
    transcript = Transcript(problem, (), (), Finish.NONE)
    while True:
        completions = (*transcript.completions, answer(transcript))
        transcript = Transcript(problem, completions, transcript.replies, Finish.EOS)
        reply = task.reply(transcript) if len(completions) < task.turns else None
        if reply is None:
            return transcript
        transcript = Transcript(problem, completions, (*transcript.replies, reply), Finish.EOS)


def score(task, transcript):
    problem, completions = transcript.problem, transcript.completions
    sample = Sample(
        prompt=problem.prompt,
        completion=completions[-1],
        reference=problem.reference,
        turns=completions,
        info=problem.info,
    )
    return rewards.score_samples(rewards.as_reward(task.reward), [sample])[0]


# All of them ------------------------------------------------------------------------------------------------------


def test_every_built_in_task_is_registered():
    drawn = ("Arithmetic", "Countdown", "Reverse", "Sort", "Copy", "GuessNumber", "TryAgain", "WordProblems", "Tabular")
    probes = ("ProbeConstant", "ProbeOneHot", "ProbeDelayedCopy", "ProbeLength", "ProbeSubstring")
    names = (*drawn, *probes, *(f"reasoning-gym-{name}" for name in NAMES))
    built_in = {id for id in textenv.registry if id.startswith("textenv/")}
    assert built_in == {*(f"textenv/{name}-v0" for name in names), *ON_THE_HUB}
    assert len(built_in) == len(IDS) + len([id for id in built_in if id.startswith(PREFIX)])


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_the_documentation_run(module):
    __import__(module)
    assert doctest.testmod(sys.modules[module]).failed == 0


def test_importing_the_tasks_is_light():
    heavy = ("torch", "pyarrow", "datasets", "sympy", "reasoning_gym")
    code = f"import sys, textenv.tasks; sys.exit(any(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("id", IDS)
def test_every_task_documents_itself_with_an_example(id):
    task = textenv.make_task(id)
    assert ">>>" in (type(task).__doc__ or "")
    assert task.licence


@pytest.mark.parametrize("id", IDS)
def test_an_address_is_one_problem(id):
    one, other = make(id), make(id)
    addresses = [(seed, split, index) for seed in (0, 9) for split in ("train", "eval") for index in (0, 1, 77)]
    assert [one.problem(*address) for address in addresses] == [
        other.problem(*address) for address in reversed(addresses)
    ][::-1]


@pytest.mark.parametrize("id", HELD_OUT)
def test_train_and_eval_share_no_problem(id):
    task = make(id)
    train, held_out = (
        {task.key(task.problem(seed, split, index)) for seed in (0, 1) for index in range(300)}
        for split in ("train", "eval")
    )
    assert train
    assert held_out
    assert train.isdisjoint(held_out)


@pytest.mark.parametrize("id", HELD_OUT)
def test_seeds_and_indices_give_other_problems(id):
    task = make(id)
    problems = {seed: [task.key(task.problem(seed, "train", index)) for index in range(20)] for seed in (0, 1)}
    assert problems[0] != problems[1]
    assert problems[0][1:] != problems[1][:-1]  # neighbouring seeds are not one sequence, shifted
    assert len(set(problems[0])) > 5


@pytest.mark.parametrize(
    ("id", "address", "prompt", "reference"),
    [
        ("Arithmetic", (0, "train", 0), "86+67=", "153"),
        ("Arithmetic", (7, "eval", 12345), "87+56=", "143"),
        ("Reverse", (0, "train", 1), "Reverse chbb: ", "bbhc"),
        ("Sort", (7, "eval", 12345), "Sort dae: ", "ade"),
        ("Copy", (0, "train", 1), "Copy dadge: ", "dadge"),
        ("GuessNumber", (7, "eval", 12345), "Find the number from 1 to 20. You have 6 guesses.\n", "13"),
        ("TryAgain", (7, "eval", 12345), "87+56=", "143"),
        ("ProbeDelayedCopy", (7, "eval", 12345), "c", "c"),
        (
            "Countdown",
            (0, "train", 0),
            "Use 7, 13, 16, 22, each at most once, with + - * / and ( ) to make 403: ",
            {"numbers": [7, 13, 16, 22], "target": 403, "solution": "((22+16)-7)*13"},
        ),
        (
            "WordProblems",
            (0, "train", 0),
            "A train has 7 coaches with 64 seats each. 389 seats are taken. How many are free?\n"
            "Work step by step, then end with a line of #### and the number.\n",
            "59",
        ),
    ],
)
def test_addresses_are_the_same_on_every_platform(id, address, prompt, reference):
    problem = textenv.make_task(f"textenv/{id}-v0").problem(*address)
    assert (problem.prompt, problem.reference) == (prompt, reference)


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("id", [id for id in IDS if id not in ("textenv/ProbeConstant-v0", "textenv/IFEval-v0")])
def test_demonstrations_are_worth_all_there_is_and_fit(id, split):
    task = make(id)
    tokenizer = task.tokenizer()
    for index in range(40):
        shown = play(task, task.problem(3, split, index), task.demonstrate)
        result = score(task, shown)
        assert (result.value, result.correct) == (1.0, True), (shown, result)
        # The end token needs no room when the budget ends the completion.
        assert max(len(tokenizer.encode(text)) for text in shown.completions) <= task.max_new_tokens


@pytest.mark.parametrize("id", IDS)
def test_the_context_holds_the_longest_episode(id):
    task = make(id)
    tokenizer = task.tokenizer()
    replies = {"textenv/GuessNumber-v0": UNREADABLE, "textenv/TryAgain-v0": FEEDBACK}
    turn = task.max_new_tokens + len(tokenizer.encode(replies.get(id, "")))
    for index in range(200):
        prompt = len(tokenizer.encode(task.problem(0, "train", index).prompt))
        assert (
            prompt + task.turns * task.max_new_tokens + (task.turns - 1) * (turn - task.max_new_tokens)
            <= task.max_tokens
        )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Arithmetic(digits=0), "digits must be a whole number from 1 to 18, got 0"),
        (
            lambda: textenv.make_task("textenv/Arithmetic-v0", digits="2"),
            "digits must be a whole number from 1 to 18, got '2'",
        ),
        (lambda: Arithmetic(operators="+/"), r"operators must be some of \+-\*, got '\+/'"),
        (lambda: Arithmetic(operators=""), "operators must be some of"),
        (lambda: Reverse(max_length=65), "max_length must be a whole number from 1 to 64, got 65"),
        (lambda: Sort(min_length=6), "min_length must be a whole number from 1 to 5, got 6"),
        (lambda: Countdown(numbers=1), "numbers must be a whole number from 2 to 6, got 1"),
        (lambda: Countdown(largest=100), "largest must be a whole number from 1 to 99, got 100"),
        (lambda: GuessNumber(high=1), "high must be a whole number from 2 to 999999, got 1"),
        (lambda: GuessNumber(turns=1), "turns must be a whole number from 2 to 100, got 1"),
        (lambda: TryAgain(turns=1), "turns must be a whole number from 2 to 100, got 1"),
        (lambda: TryAgain(decay=2), "decay must be from 0 to 1, got 2"),
        (lambda: TryAgain(repetition=-1), "repetition must be 0 or more, got -1"),
        (
            lambda: TryAgain(inner="textenv/GuessNumber-v0"),
            "inner must be a task with one turn, got GuessNumber with 6",
        ),
        (lambda: TryAgain(inner=TryAgain()), "inner must be a task with one turn, got TryAgain with 5"),
    ],
)
def test_impossible_options_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Arithmetic and strings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("digits", [1, 3, 18])
def test_arithmetic_is_right_in_every_size_and_fits(digits):
    task = Arithmetic(digits=digits, operators="+-*")
    seen = set()
    for index in range(200):
        problem = task.problem(0, "train", index)
        sign = next(c for c in problem.prompt if not c.isdigit())
        a, b = map(int, problem.prompt[:-1].split(sign))
        assert int(problem.reference) == {"+": a + b, "-": a - b, "*": a * b}[sign]
        assert max(a, b) < 10**digits
        assert len(problem.reference) < task.max_new_tokens
        assert len(problem.prompt) + task.max_new_tokens <= task.max_tokens
        seen.add(sign)
    assert seen == set("+-*")


def test_word_lengths_keep_to_their_bounds():
    task = Reverse(min_length=2, max_length=4)
    lengths = {len(task.problem(0, "train", index).reference) for index in range(100)}
    assert lengths == {2, 3, 4}


# Countdown --------------------------------------------------------------------------------------------------------

REFERENCE = {"numbers": [3, 5, 5, 10], "target": 25}


@pytest.mark.parametrize(
    "answer",
    [
        *("5*5", " 5*5 \n", "(3*5)+10", "10/(5-3)*5", "3*10-5", "((5*5))", "5 * 5"),
        "First 5*4=20, no.\nThen:\n5*5",
    ],
)
def test_countdown_pays_for_solutions(answer):
    assert CountdownReward().grade(answer, REFERENCE).value == 1.0


@pytest.mark.parametrize(
    "answer",
    [
        *("", "25", "(25)", "20+5", "5*5*5/5", "3+5", "10+10+5", "5*5=25", "5*5\nis it", "5x5"),
        *("5**2", "25**1", "10**9", "50//2", "5*5%26", "5*5or 1", "+5*5", "5*(+5)", "-(-5*5)", "5*--5", "~-26"),
        *("5.0*5", "5e0*5", "0x5*5", "05*5", "5_0/5", "5*5j", "True*25", "'5'*5", "[5*5][0]", "5,5", "5(5)", "(5)(5)"),
        *("٥*٥", "5*5;", "5*5#", "lambda:25", "__import__('os').system('true')", "eval('5*5')", "(x:=25)", "5\n*5"),
        *(
            "10/5*3*5-5",
            "5/0",
            "5/(5-5)",
            "(5*5",
            "5*5)",
            "()",
            "5 5",
            "9" * 5000,
            "(" * 50 + "5*5" + ")" * 50,
            "(" * 10_000,
            "5+" * 5000,
        ),
    ],
)
def test_countdown_pays_no_cheater(answer):
    result = CountdownReward().grade(answer, REFERENCE)
    assert (result.value, result.correct) == (0.0, False)


@pytest.mark.parametrize("nested", [10, 45])
def test_countdown_reads_nested_parentheses_up_to_the_limit(nested):
    assert CountdownReward().grade("(" * nested + "5*5" + ")" * nested, REFERENCE).value == 1.0


def test_countdown_divides_exactly():
    reference = {"numbers": [1, 3, 3, 49], "target": 1}
    assert CountdownReward().grade("1/3*3", reference).value == 1.0
    assert CountdownReward().grade("1/49*49", reference).value == 0.0  # 49 is there once
    assert evaluate("1/3+1/7")[1] == Fraction(10, 21)


@pytest.mark.parametrize(
    "reference", [None, "24", [], {}, {"numbers": [1]}, {"numbers": "12", "target": 3}, {"numbers": ["1"], "target": 1}]
)
def test_countdown_does_not_grade_against_an_unreadable_reference(reference):
    result = CountdownReward().grade("1", reference)
    assert result.value is None
    assert str(result.error).startswith("unreadable reference")


@pytest.mark.parametrize(("numbers", "largest"), [(2, 1), (2, 99), (4, 25), (6, 99)])
def test_countdown_problems_have_a_solution_that_is_no_given_number_and_fits(numbers, largest):
    task = Countdown(numbers=numbers, largest=largest)
    task.holdout = 0
    for index in range(100):
        problem = task.problem(0, "train", index)
        reference = problem.reference
        assert CountdownReward().grade(reference["solution"], reference).value == 1.0
        assert len(reference["numbers"]) == numbers
        assert 1 <= reference["target"] <= 999
        assert reference["target"] not in reference["numbers"]
        assert len(reference["solution"]) < task.max_new_tokens
        assert len(problem.prompt) + task.max_new_tokens <= task.max_tokens


# Guessing ---------------------------------------------------------------------------------------------------------


def guess(task, secret, *guesses):
    left = iter(guesses)
    return play(task, Problem(task.prompt, str(secret)), lambda transcript: next(left))


def test_guesses_are_answered_until_one_is_right():
    shown = guess(GuessNumber(), 7, "3", "12", "seven", "7")
    assert shown.replies == (HIGHER, LOWER, UNREADABLE)
    assert score(GuessNumber(), shown).value == 1.0


def test_guesses_run_out():
    shown = guess(GuessNumber(turns=3), 7, "1", "2", "3")
    assert shown.replies == (HIGHER, HIGHER)
    assert score(GuessNumber(turns=3), shown).value == 0.0


def test_the_last_guess_can_be_right():
    task = GuessNumber(turns=2)
    shown = guess(task, 7, "1", "7")
    assert task.reply(shown) is None
    assert score(task, shown).value == 1.0


@pytest.mark.parametrize("text", ["", "7 or 8", "07", "+7", "-7", "7.0", "٧", "7\n8", "9" * 5000])
def test_a_guess_is_read_as_the_reward_reads_it(text):
    assert read_guess(text) is None
    assert guess(GuessNumber(), 7, text, "7").replies == (UNREADABLE,)
    assert rewards.make("exact")([Sample(prompt="", completion=text, reference="7")])[0].value == 0.0


@pytest.mark.parametrize(("high", "turns"), [(20, 6), (15, 4), (2, 2)])
def test_binary_search_finds_every_number_in_time(high, turns):
    task = GuessNumber(high=high, turns=turns)
    for secret in range(1, high + 1):
        assert score(task, play(task, Problem(task.prompt, str(secret)), task.demonstrate)).value == 1.0


def test_binary_search_goes_on_from_anybodys_guesses():
    task = GuessNumber(high=20)
    shown = Transcript(
        Problem(task.prompt, "9"),
        ("99", "five", "4", "2", "11"),
        (LOWER, UNREADABLE, HIGHER, HIGHER, LOWER),
        Finish.EOS,
    )
    assert task.demonstrate(shown) == "7"  # 5 to 10 are left


# Trying again -----------------------------------------------------------------------------------------------------


def try_again_score(*turns, reference="5", inner=None):
    reward = TryAgainReward(inner or rewards.make("exact"), decay=0.5, repetition=0.5)
    return reward([Sample(prompt="2+3=", completion=turns[-1] if turns else "", reference=reference, turns=turns)])[0]


@pytest.mark.parametrize(
    ("turns", "value", "correct"),
    [
        (("3", "3", "5"), 0.25 - 0.5 * (1 - 2 / 3), True),  # 0.083333
        (("3", "3", "3", "3", "3"), -0.4, False),
        (("5",), 1.0, True),
        (("3", "5"), 0.5, True),
        (("1", "2", "3", "4", "6"), 0.0, False),
        (("a b", "A  B ", "5"), 0.25 - 0.5 / 3, True),  # one answer, written twice
        (("", "", "5"), 0.25 - 0.5 / 3, True),  # no answer is an answer, so a turn is never free
    ],
)
def test_try_again_decays_with_turns_and_charges_for_repetition(turns, value, correct):
    result = try_again_score(*turns)
    assert result.value == pytest.approx(value, abs=1e-12)
    assert result.correct is correct
    assert result.parts["turns"] == len(turns)


class Refuses(Reward):
    """Exact, but cannot grade question marks."""

    name = "refuses"

    def __init__(self):
        self.batches = []

    def __call__(self, samples):
        self.batches.append(len(samples))
        return [
            ungraded("a question") if s.completion == "?" else Score(float(s.completion == s.reference))
            for s in samples
        ]


def test_try_again_asks_its_inner_reward_once_for_the_whole_batch():
    inner = Refuses()
    samples = [
        Sample(prompt="", completion=t[-1], reference="5", turns=t) for t in (("1", "5"), ("5",), ("1", "1", "2"))
    ]
    scores = TryAgainReward(inner, 0.5, 0.0)(samples)
    assert [score.value for score in scores] == [0.5, 1.0, 0.0]
    assert inner.batches == [6]


def test_an_answer_that_cannot_be_graded_leaves_the_episode_ungraded():
    result = try_again_score("1", "?", "5", inner=Refuses())
    assert result.value is None
    assert result.error == "turn 1: a question"
    assert try_again_score().error.startswith("the sample has no turns")


def test_try_again_replies_one_line_until_right_ungraded_or_out_of_turns():
    inner = Arithmetic()
    inner.reward = Refuses()
    task = TryAgain(inner=inner, turns=3)
    problem = Problem("2+3=", "5")

    def replies(*answers):
        left = iter(answers)
        return play(task, problem, lambda transcript: next(left)).replies

    assert replies("1", "5") == (FEEDBACK,)
    assert replies("5") == ()
    assert replies("1", "?") == (FEEDBACK,)
    assert replies("1", "2", "3") == (FEEDBACK, FEEDBACK)
    assert task.reply(Transcript(problem, ("1", "2", "3"), (FEEDBACK, FEEDBACK), Finish.EOS)) is None


def test_try_again_takes_problems_and_their_split_from_the_inner_task():
    task, inner = TryAgain(inner="textenv/Countdown-v0"), textenv.make_task("textenv/Countdown-v0")
    assert [task.problem(1, "eval", i) for i in range(5)] == [inner.problem(1, "eval", i) for i in range(5)]
    assert task.split_of(task.problem(1, "eval", 0)) == "eval"
    assert score(task, play(task, task.problem(1, "eval", 0), task.demonstrate)).value == 1.0


def test_holdout_of_try_again_is_that_of_the_inner_task():
    task = textenv.make_task("textenv/TryAgain-v0", holdout=0.5)
    assert isinstance(task, TryAgain)
    assert task.holdout == task.inner.holdout == 0.5


def test_try_again_takes_a_dataset_and_a_task_of_ones_own():
    class Double(Task):
        def draw(self, rng):
            n = int(rng.integers(100))
            return f"2*{n}=", str(2 * n)

    for inner in ("textenv/WordProblems-v0", Double()):
        task = TryAgain(inner=inner, turns=2)
        problem = task.problem(0, "train", 0)
        assert score(task, play(task, problem, lambda transcript: "wrong")).value == -0.25
        assert score(task, play(task, problem, task.demonstrate)).value == 1.0

"""The transition rule, by hand on tiny tasks and by property on every registered one."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards import Reward, RewardError, Score
from tests.textenv.conftest import ALPHABET, EOS, IDS, STOP, Dialogue, Letters, PerToken, ids, options_of
from textenv import Episodes, Finish, Problem, ProblemStream, Source, Task, make_task
from textenv.tokenizer import CharTokenizer

PAD, PROMPT, SAMPLED, REPLY = Source.PAD, Source.PROMPT, Source.SAMPLED, Source.REPLY


def begin(task, *prompts, **options):
    """An episode a prompt."""
    episodes = Episodes(task, len(prompts), **options)
    episodes.begin(range(len(prompts)), [Problem(prompt, "ref") for prompt in prompts], [(0,)] * len(prompts))
    return episodes


def by_token(episodes, n, completion):
    """Extend episode ``n`` token by token, until its completion ends: the reward."""
    turn, total = len(episodes.completions[n]), 0.0
    for token in completion:
        action_N = np.full(episodes.num, -7)  # what the others do must not matter, so they have to be done
        action_N[n] = token
        total += episodes.step(action_N)[n]
        if len(episodes.completions[n]) > turn:
            break
    return total


@pytest.fixture(params=["step", "extend"])
def play(request):
    """Plays one episode's completions, in either way: its total reward."""

    def run(episodes, *completions):
        if request.param == "step":
            return sum(by_token(episodes, 0, ids(completion)) for completion in completions)
        return sum(episodes.extend([ids(completion)])[0] for completion in completions)

    return run


# One completion ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "text", "finish", "length"),
    [
        (".", "", Finish.EOS, 3),
        ("ab.", "ab", Finish.EOS, 5),
        ("ab;", "ab", Finish.STOP, 5),
        ("abcd", "abcd", Finish.LENGTH, 6),
        ("abc.", "abc", Finish.EOS, 6),  # the end token on the budget's last place is an end
        ("abc;", "abc", Finish.STOP, 6),
        ("ab.cd", "ab", Finish.EOS, 5),
        ("a;.", "a", Finish.STOP, 4),
        ("abcd.", "abcd", Finish.LENGTH, 6),
    ],
)
def test_a_completion_ends_at_its_first_end_token_or_its_budget(play, completion, text, finish, length):
    episodes = begin(Letters(), "ab")
    assert play(episodes, completion) == len(text)
    assert episodes.completions == [[text]]
    assert episodes.finish_N[0] == finish
    assert episodes.length_N[0] == length
    assert episodes.done_N.all()


def test_the_end_of_the_context_is_its_own_ending(play):
    task = Dialogue()
    task.max_tokens = 9  # prompt 2, completion 2, reply 1, and 4 left of which the budget is 5
    task.max_new_tokens = 5
    episodes = begin(task, "ab")
    play(episodes, "a.", "acdef")
    assert episodes.completions == [["a", "acde"]]
    assert episodes.finish_N[0] == Finish.CONTEXT
    assert episodes.length_N[0] == 9


def test_when_budget_and_context_end_together_it_is_the_budget(play):
    task = Letters()
    task.max_tokens = 6
    episodes = begin(task, "ab")
    play(episodes, "abcd")
    assert episodes.finish_N[0] == Finish.LENGTH


def test_finish_is_none_while_an_episode_goes_on():
    episodes = begin(Letters(), "ab")
    episodes.step(ids("a"))
    assert episodes.finish_N[0] == Finish.NONE
    assert not episodes.done_N[0]


@pytest.mark.parametrize("after", [[-1, -5], [10_000], [3]])
def test_what_follows_the_end_is_not_looked_at(after):
    task = Letters()
    tokenizer = task.tokenizer()
    tokenizer.decodable_V = np.arange(tokenizer.vocab_size) != 3
    episodes = begin(task, "ab", tokenizer=tokenizer)
    episodes.extend([np.array([1, EOS, *after])])
    assert episodes.context(0).tolist() == [1, 2, 1, EOS]


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ([], "without an end"),
        ([1, 2, 4], "fills its budget of 4 tokens, got 3 tokens without an end"),
        ([1, -1, EOS], "an id from 0 to 13, got -1"),
        ([-1, 1, EOS], "an id from 0 to 13, got -1"),
        ([1, 14, EOS], "an id from 0 to 13, got 14"),
        ([1, 3, EOS], "the token id 3 stands for no text"),
        ("ab", "a flat array of whole numbers, got 'ab' of type str"),
        ([[1, 0]], "a flat array of whole numbers"),
        ([1.0, 0.0], "a flat array of whole numbers"),
        ([True, False], "a flat array of whole numbers"),
    ],
)
def test_an_impossible_completion_is_refused_and_changes_nothing(completion, message):
    tokenizer = Letters().tokenizer()
    tokenizer.decodable_V = np.arange(tokenizer.vocab_size) != 3
    episodes = begin(Letters(), "ab", "ba", tokenizer=tokenizer)
    before = [episodes.state_key(n) for n in range(2)]
    with pytest.raises(ValueError, match=message):
        episodes.extend([np.array([1, EOS]), completion])
    assert [episodes.state_key(n) for n in range(2)] == before


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([1, -1], "an id from 0 to 13"),
        ([1, 14], "an id from 0 to 13"),
        ([1, 3], "stands for no text"),
        ([1], "a token for each of the 2 episodes, got 1"),
        ([1, 1, 1], "a token for each of the 2 episodes, got 3"),
        ([1.0, 1.0], "whole numbers"),
        ([[1], [1]], "a flat array"),
    ],
)
def test_an_impossible_step_is_refused_and_changes_nothing(action, message):
    tokenizer = Letters().tokenizer()
    tokenizer.decodable_V = np.arange(tokenizer.vocab_size) != 3
    episodes = begin(Letters(), "ab", "ba", tokenizer=tokenizer)
    before = [episodes.state_key(n) for n in range(2)]
    with pytest.raises(ValueError, match=message):
        episodes.step(np.array(action))
    assert [episodes.state_key(n) for n in range(2)] == before


def test_a_finished_episode_takes_no_completion_and_ignores_tokens():
    episodes = begin(Letters(), "ab", "ab")
    episodes.extend([ids("a.")], [0])
    with pytest.raises(ValueError, match="episode 0 is done"):
        episodes.extend([ids("a.")], [0])
    before = episodes.state_key(0)
    assert episodes.step(np.array([-3, 1])).tolist() == [0.0, 0.0]
    assert episodes.state_key(0) == before
    assert episodes.context(1).tolist() == ids("aba").tolist()


def test_there_must_be_a_completion_for_each_row():
    with pytest.raises(ValueError, match="for each of the 2 episodes, got 1"):
        begin(Letters(), "ab", "ab").extend([ids(".")])


def test_the_rest_of_a_completion_begun_by_tokens_can_be_appended_whole():
    episodes = begin(Letters(), "ab")
    episodes.step(ids("a"))
    episodes.extend([ids("cde")])
    assert episodes.completions == [["acde"]]
    assert episodes.finish_N[0] == Finish.LENGTH


def test_extended_rows_are_the_ones_named():
    episodes = begin(Letters(), "ab", "ba", "cc")
    reward_N = episodes.extend([ids("abc."), ids("a.")], [2, 0])
    assert reward_N.tolist() == [1.0, 0.0, 3.0]
    assert episodes.running == [1]


# The context ------------------------------------------------------------------------------------------------------


def test_contexts_are_right_padded_and_every_token_has_its_source():
    episodes = begin(Letters(), "ab", "c")
    episodes.extend([ids("d."), ids("efgh")])
    assert episodes.tokens_NT[0].tolist() == [*ids("abd."), *[0] * 6]
    assert episodes.source_NT[0].tolist() == [PROMPT] * 2 + [SAMPLED] * 2 + [PAD] * 6
    assert episodes.tokens_NT[1].tolist() == [*ids("cefgh"), *[0] * 5]
    assert episodes.source_NT[1].tolist() == [PROMPT] + [SAMPLED] * 4 + [PAD] * 5


def test_a_new_episode_leaves_nothing_of_the_old_one():
    episodes = begin(Letters(), "ab", "ab")
    fresh = begin(Letters(), "c", "ab")
    episodes.extend([ids("efgh"), ids("a.")])
    episodes.begin([0], [Problem("c", "ref")], [(0,)])
    assert episodes.snapshot(0) == fresh.snapshot(0)
    np.testing.assert_array_equal(episodes.tokens_NT[0], fresh.tokens_NT[0])
    np.testing.assert_array_equal(episodes.source_NT[0], fresh.source_NT[0])
    assert episodes.done_N.tolist() == [False, True]


def test_the_members_of_a_group_start_alike_and_part(monkeypatch):
    encoded = []
    tokenizer = Letters().tokenizer()
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    episodes = Episodes(Letters(), 4, tokenizer=tokenizer)
    stream = ProblemStream(episodes.task, "train")
    stream.start(0)
    drawn = stream.take(4, {"repeat": 2})
    encoded.clear()
    episodes.begin(range(4), [problem for problem, _ in drawn], [seed for _, seed in drawn])
    assert len(encoded) == 2  # a prompt is encoded once a group
    assert episodes.state_key(0) == episodes.state_key(1)
    assert episodes.episode_seeds == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1)]
    episodes.step(ids("abaa"))
    assert episodes.state_key(0) != episodes.state_key(1)


def test_a_prompt_that_leaves_no_room_is_refused_before_anything_changes():
    episodes = begin(Letters(), "ab", "ab")
    before = episodes.snapshot(0)
    with pytest.raises(ValueError, match="is 7 tokens long, but the context of max_tokens=10 has room for 6"):
        episodes.begin([0, 1], [Problem("c"), Problem("abcdefg")], [(0,), (0,)])
    assert episodes.snapshot(0) == before
    assert begin(Letters(), "abcdef").length_N[0] == 6


def test_a_system_message_stands_before_the_prompt():
    task = Letters()
    task.system = "i"
    task.tokenizer = lambda: CharTokenizer(ALPHABET + "\n")
    assert begin(task, "ab").text(0) == "i\nab"


def test_prompts_can_be_checked_before_anything_begins():
    task = Letters()
    task.max_tokens = 5
    with pytest.raises(ValueError, match="has room for 1 beside"):
        Episodes(task, 1).check_prompts()


# Turns ------------------------------------------------------------------------------------------------------------


def test_replies_join_the_context_between_completions(play):
    episodes = begin(Dialogue(), "a")
    assert play(episodes, "c.", "def;", "g.") == 1.0
    assert episodes.text(0) == "ac<eos>?def;?g<eos>"
    sources = [PROMPT, SAMPLED, SAMPLED, REPLY, SAMPLED, SAMPLED, SAMPLED, SAMPLED, REPLY, SAMPLED, SAMPLED]
    assert episodes.source_NT[0].tolist() == [*sources, PAD]
    assert episodes.completions == [["c", "def", "g"]]
    assert episodes.replies == [["?", "?"]]
    assert episodes.sample(0).turns == ("c", "def", "g")
    assert episodes.sample(0).tokens == tuple(ids("c.def;g."))


def test_every_completion_has_a_budget_of_its_own(play):
    task = Dialogue()
    task.max_tokens = 20
    episodes = begin(task, "a")
    play(episodes, "cdef", "ghij", "acde")
    assert episodes.completions == [["cdef", "ghij", "acde"]]
    assert episodes.finish_N[0] == Finish.LENGTH


def test_none_ends_the_episode_and_so_does_the_last_turn(play):
    episodes = begin(Dialogue(), "a")
    play(episodes, "c.", "b.")
    assert episodes.done_N[0]
    assert episodes.replies == [["?"]]


def test_a_reply_that_leaves_no_room_for_an_answer_ends_the_episode_with_context(play):
    task = Dialogue()
    task.max_tokens = 6
    episodes = begin(task, "a")
    play(episodes, "cdef")  # five of six places; the reply would take the last
    assert episodes.done_N[0]
    assert episodes.finish_N[0] == Finish.CONTEXT
    assert episodes.replies == [[]]
    assert episodes.text(0) == "acdef"


def test_a_task_sees_what_was_said_and_why_it_ended(play):
    seen = []

    class Curious(Dialogue):
        def reply(self, transcript):
            seen.append((transcript.completions, transcript.replies, transcript.finish))
            return super().reply(transcript)

    play(begin(Curious(), "a"), "c;", "defg", ".")
    assert seen == [(("c",), (), Finish.STOP), (("c", "defg"), ("?",), Finish.LENGTH)]


def test_a_reply_that_is_no_text_is_refused():
    class Wrong(Dialogue):
        def reply(self, transcript):
            return 5

    with pytest.raises(ValueError, match=r"Wrong.reply\(\) must return text, or None to end the episode, got 5"):
        begin(Wrong(), "a").extend([ids(".")])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": 1}, "has a reply.. but turns=1"),
        ({"max_new_tokens": 0}, "and that at least 1"),
        ({"max_new_tokens": 12}, "must be a whole number larger than max_new_tokens=12"),
        ({"max_tokens": 12.5}, "max_tokens=12.5"),
        ({"max_new_tokens": "4"}, "max_new_tokens='4'"),
        ({"stop": "ab"}, "stop must be a sequence of texts, got the text 'ab'"),
        ({"stop": ("ab",)}, "a stop text must be one token, but 'ab' is 2"),
    ],
)
def test_an_impossible_task_is_refused(changes, message):
    task = Dialogue()
    for name, value in changes.items():
        setattr(task, name, value)
    with pytest.raises(ValueError, match=message):
        Episodes(task, 1)


def test_the_vocabulary_may_be_wider_than_the_tokenizer_but_not_narrower():
    episodes = begin(Letters(), "ab", vocab_size=20)
    with pytest.raises(ValueError, match="the token id 15 stands for no text in the tokenizer"):
        episodes.step(np.array([15]))
    with pytest.raises(ValueError, match=r"a vocabulary of 13 is smaller than the ids of the tokenizer .* up to 13"):
        Episodes(Letters(), 1, vocab_size=13)
    assert episodes.stop_ids == (STOP,)
    assert episodes.ordinary_ids.tolist() == sorted({*range(14)} - {EOS, STOP})


# Scores and credit ------------------------------------------------------------------------------------------------


def test_an_ungraded_episode_earns_nothing_and_says_why():
    episodes = begin(Letters(), "ab", "ab", reward=PerToken())
    assert episodes.extend([ids("a."), ids("bc.")]).tolist() == [0.0, 3.0]
    assert episodes.scores[0].value is None
    assert episodes.scores[0].error == "starts with a"
    assert episodes.credit(0).tolist() == [0.0, 0.0]
    assert episodes.credit(1).tolist() == [0.0, 1.0, 2.0]


def test_without_credit_of_its_own_a_score_belongs_to_the_last_token():
    episodes = begin(Letters(), "ab", "ab")
    episodes.extend([ids("cd."), ids("efgh")])
    assert episodes.credit(0).tolist() == [0.0, 0.0, 2.0]
    assert episodes.credit(1).tolist() == [0.0, 0.0, 0.0, 4.0]


def test_credit_leaves_out_replies():
    episodes = begin(Dialogue(), "a", reward=PerToken())
    for completion in ("c.", "d.", "ef."):
        episodes.extend([ids(completion)])
    assert episodes.credit(0).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_credit_for_another_number_of_tokens_is_an_error():
    class Short(Reward):
        def __call__(self, samples):
            return [Score(1.0, tokens=(1.0,)) for _ in samples]

    with pytest.raises(RewardError, match="credit to 1 tokens of a sample with 3"):
        begin(Letters(), "ab", reward=Short()).extend([ids("cd.")])


def test_rewards_are_asked_once_for_all_episodes_that_end_together():
    batches = []

    class Counting(Reward):
        def __call__(self, samples):
            batches.append(len(samples))
            return [Score(0.0) for _ in samples]

    episodes = begin(Letters(), "ab", "ab", "ab", reward=Counting())
    episodes.step(ids("a.."))
    episodes.step(ids(".aa"))
    assert batches == [2, 1]


def test_a_sample_is_the_whole_episode():
    class Told(Letters):
        def draw(self, rng):
            return Problem("ab", ["x"], {"level": 3})

    task = Told()
    episodes = Episodes(task, 1)
    episodes.begin([0], [task.problem(0, "train", 0)], [(0,)])
    episodes.extend([ids("cd;")])
    sample = episodes.sample(0)
    assert (sample.prompt, sample.completion, sample.turns) == ("ab", "cd", ("cd",))
    assert (sample.reference, sample.info, sample.finish) == (["x"], {"level": 3}, "stop")
    assert sample.tokens == tuple(ids("cd;"))


# Every registered task --------------------------------------------------------------------------------------------


def completion_kinds(task, tokenizer, stop_ids):
    """Completions of every kind: random, ended soon, filling the budget, demonstrated."""
    allowed = np.flatnonzero(tokenizer.decodable_V).tolist()
    ordinary = sorted(set(allowed) - {*tokenizer.eos_ids, *stop_ids})
    size = task.max_new_tokens
    some = st.integers(0, 2**32 - 1).map(np.random.default_rng)
    random = some.map(lambda rng: rng.choice(allowed, size))
    filling = some.map(lambda rng: rng.choice(ordinary, size))
    ending = st.tuples(filling, st.integers(0, min(3, size - 1))).map(
        lambda drawn: np.where(np.arange(size) == drawn[1], tokenizer.eos_ids[0], drawn[0])
    )
    last = filling.map(lambda tokens: np.array([*tokens[:-1], tokenizer.eos_ids[0]]))
    return st.one_of(random, filling, ending, last)


@pytest.mark.parametrize("id", IDS)
@settings(max_examples=6, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_tokens_and_completions_are_the_same_mdp(id, data):
    task = make_task(id, **options_of(id))
    whole, stepped = Episodes(task, 3), Episodes(make_task(id, **options_of(id)), 3)
    for episodes in (whole, stepped):
        stream = ProblemStream(episodes.task, "train")
        stream.start(5)
        drawn = stream.take(3)
        episodes.begin(range(3), [problem for problem, _ in drawn], [seed for _, seed in drawn])
    kinds = completion_kinds(task, whole.tokenizer, whole.stop_ids)
    whole_N, stepped_N = np.zeros(3), np.zeros(3)
    while not whole.done_N.all():
        rows = whole.running
        completions = {n: data.draw(kinds) for n in rows}
        if data.draw(st.integers(0, 3)) == 0 and (shown := task.demonstrate(whole.transcript(rows[0]))) is not None:
            completions[rows[0]] = np.resize([*whole.tokenizer.encode(shown), EOS], task.max_new_tokens)
        whole_N += whole.extend([completions[n] for n in rows], rows)
        # Token by token, all rows side by side; who has ended a turn waits for the others by being stepped alone.
        for n in rows:
            turn = len(stepped.completions[n])
            state = {m: stepped.snapshot(m) for m in stepped.running if m != n}
            for token in completions[n]:
                stepped_N[n] += stepped.step(np.full(3, token))[n]
                if len(stepped.completions[n]) > turn:
                    break
            for m, kept in state.items():
                stepped.restore(m, kept)
    np.testing.assert_array_equal(whole_N, stepped_N)
    np.testing.assert_array_equal(whole.tokens_NT, stepped.tokens_NT)
    np.testing.assert_array_equal(whole.source_NT, stepped.source_NT)
    np.testing.assert_array_equal(whole.finish_N, stepped.finish_N)
    assert whole.completions == stepped.completions
    assert whole.replies == stepped.replies
    for n in range(3):
        assert whole.credit(n).sum() == pytest.approx(whole_N[n])


# Cost -------------------------------------------------------------------------------------------------------------


class Long(Task):
    """A long context."""

    max_new_tokens = 1_000

    def __init__(self, max_tokens):
        self.max_tokens = max_tokens

    def tokenizer(self):
        return CharTokenizer(ALPHABET)

    def draw(self, rng):
        return "a", "a"


def test_memory_is_nine_bytes_a_place_of_the_context():
    def total(num, max_tokens):
        arrays = vars(Episodes(Long(max_tokens), num)).values()
        return sum(array.nbytes for array in arrays if isinstance(array, np.ndarray))

    assert total(64, 2_002) - total(64, 1_002) == 64 * 1_000 * 9
    assert total(128, 2_002) - total(64, 2_002) < 64 * 2_002 * 9 + 64 * 64


def test_a_step_touches_nothing_of_the_size_of_the_context():
    def peak(max_tokens):
        episodes = begin(Long(max_tokens), *["a"] * 64)
        episodes.step(np.ones(64, dtype=np.int64))
        tracemalloc.start()
        for _ in range(5):
            episodes.step(np.ones(64, dtype=np.int64))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(8_000) < peak(1_001) + 2_000
    assert peak(8_000) < 64 * 8_000 / 8


# Branching --------------------------------------------------------------------------------------------------------


def test_a_state_is_named_by_its_problem_context_and_place():
    episodes = begin(Dialogue(), "a", "a", "a", "b")
    names = lambda: [episodes.state_key(n) for n in range(4)]  # noqa: E731
    assert len(set(names()[:3])) == 1
    assert names()[3] != names()[0]
    episodes.problems[2] = Problem("a", "ref", {"other": 1})
    assert names()[2] != names()[0]
    episodes.step(ids("ccac"))
    assert names()[0] == names()[1]
    episodes.step(ids(".;ac"))
    assert len(set(names())) == 4


def test_an_empty_reply_still_makes_another_state():
    class Silent(Dialogue):
        def reply(self, transcript):
            return ""

    longer = Silent()
    longer.max_new_tokens = 5
    ended, running = begin(Silent(), "a"), begin(longer, "a")
    ended.extend([ids("cdef")])
    for token in ids("cdef"):
        running.step(np.array([token]))
    assert ended.context(0).tolist() == running.context(0).tolist()
    assert ended.running == running.running == [0]
    assert ended.state_key(0) != running.state_key(0)

"""Programs graded by their tests. Hostile ones are in test_code_hostile.py."""

from __future__ import annotations

import textwrap

import pytest

from benchmarks.code_cases import PROBLEMS, TARGET, TARGET_ASSERTS, TARGET_PAIRS, continuation
from rewards import Sample, make, score_samples
from rewards.sandbox import Unavailable
from rewards.verifiers.code import Code
from rewards.verifiers.code.program import find_program
from rewards.verifiers.code.task import undefined_names

RIGHT = [pytest.param(problem, id=problem.name) for problem in PROBLEMS]
WRONG = [
    pytest.param(problem, body, id=f"{problem.name}-{number}")
    for problem in PROBLEMS
    for number, body in enumerate(problem.wrong)
]


def grade(verifier, completion, reference):
    (score,) = score_samples(verifier, [Sample(prompt="", completion=completion, reference=reference)])
    return score


@pytest.fixture(scope="module")
def code():
    return make("code", seconds=2, workers=2)


@pytest.fixture
def outcome(code):
    """The outcome of a program for its tests, with its value."""

    def of(program, *tests, setup=""):
        score = grade(code, textwrap.dedent(program), {"tests": [*map(textwrap.dedent, tests)], "setup": setup})
        return (score.value, score.info.get("outcome") or score.error)

    return of


PASSED, FAILED = (1.0, "passed"), (0.0, "failed")


# The three formats.


@pytest.mark.parametrize("problem", RIGHT)
def test_a_right_function_passes_whole_fenced_or_as_a_continuation(problem, code):
    bare = problem.right.removeprefix(problem.before)
    texts = [
        continuation(problem.body),
        problem.right,
        f"Here it is:\n```python\n{problem.right}```\nIt works.",
        f"```\n{bare}```",
        continuation(problem.body) + "\n# It works.\nI hope that this helps!\n",
    ]
    scores = code([Sample(prompt="", completion=text, reference=problem.reference) for text in texts])
    assert [(score.value, score.info["why"]) for score in scores] == [(1.0, "")] * len(texts)
    assert dict(scores[0].parts) == {"correct": 1.0, "passed": 1.0, "readable": 1.0}


@pytest.mark.parametrize(("problem", "body"), WRONG)
def test_a_wrong_function_fails(problem, body, code):
    score = grade(code, problem.program(body), problem.reference)
    assert (score.value, score.parts["readable"]) == (0.0, 1.0)


def test_asserts_are_counted_one_by_one():
    share, whole = Code(score="share", seconds=2), Code(score="all", seconds=2)
    half_right = "def span(values):\n    return max(values) - min(values) if len(values) > 2 else 0"
    scores = grade(share, half_right, TARGET_ASSERTS), grade(whole, half_right, TARGET_ASSERTS)
    assert [score.value for score in scores] == [pytest.approx(1 / 3), 0.0]
    assert all(score.parts["passed"] == pytest.approx(1 / 3) and score.parts["correct"] == 0.0 for score in scores)
    assert grade(whole, TARGET.right, TARGET_ASSERTS).value == grade(share, TARGET.right, TARGET_ASSERTS).value == 1.0


def test_mbpp_rows_are_read_as_they_are(code):
    row = {"task_id": 3, "text": "…", "test_list": ["assert f(2) == n"], "test_setup_code": "n = 4"}
    assert grade(code, "def f(x): return x + x", row).value == 1.0


def test_output_is_compared_without_white_space_at_the_ends():
    share = make("code", score="share", seconds=2)
    right = "values = list(map(float, input().split()))\nprint('%g  ' % (max(values) - min(values)), end='\\n\\n')"
    assert grade(share, right, TARGET_PAIRS).value == 1.0
    assert grade(share, right.replace("%g", " %g"), TARGET_PAIRS).value == 0.0
    assert grade(share, "print('1 \\r\\n2')", {"inputs": [""], "outputs": ["1\n2  "]}).value == 1.0
    assert grade(share, "print('1\\n\\n2')", {"inputs": [""], "outputs": ["1\n2"]}).value == 0.0
    assert grade(share, "print(2)", TARGET_PAIRS).value == 0.5
    assert grade(share, "print('2\\n9')", TARGET_PAIRS).value == 0.0


def test_a_script_that_ends_with_an_error_fails_whatever_it_printed():
    share = make("code", score="share", seconds=2)
    assert grade(share, "print(2)\nexit(0)", TARGET_PAIRS).value == 0.5
    assert grade(share, "print(2)\nexit(1)", TARGET_PAIRS).value == 0.0
    score = grade(share, "print(2)\n1 / 0", TARGET_PAIRS)
    assert (score.value, score.info["outcome"]) == (0.0, "error")
    assert "ZeroDivisionError" in score.info["why"]


def test_a_long_output_can_be_right_and_a_wrong_one_is_shown_where_it_differs(code):
    lines = {"inputs": [""], "outputs": ["\n".join(map(str, range(200_000)))]}
    program = "for i in range(200_000): print(i, end=' \\r\\n')"
    assert grade(code, program, lines).value == 1.0
    assert grade(code, program.replace("(i,", "(i if i < 199_999 else 'x',"), lines).value == 0.0
    assert grade(code, "print(1)", lines).info["why"] == "input 1: line 1: printed '1', wanted '0'"
    assert grade(code, "print(0)", lines).info["why"] == "input 1: line 2: printed '', wanted '1'"


def test_pairs_that_no_time_is_left_for_are_a_time_out():
    slow = {"inputs": [""] * 9, "outputs": ["1"] * 9}
    score = grade(Code(seconds=0.5, workers=2), "import time\ntime.sleep(0.2)\nprint(1)", slow)
    assert (score.value, score.info["outcome"]) == (0.0, "time-out")
    assert 0 < score.parts["passed"] < 1


@pytest.mark.parametrize(
    "reference",
    [
        None,
        "assert f() == 1",
        {},
        {"tests": []},
        {"tests": "assert f() == 1"},
        {"tests": [1]},
        {"tests": ["assert f() == 1"], "setup": None},
        {"prompt": "def f():\n", "test": "def check(f): pass"},
        {"prompt": "def f():\n", "test": "def check(f): pass", "entry_point": "f()"},
        {"inputs": ["1"], "outputs": []},
        {"inputs": ["1"], "outputs": [1]},
    ],
)
def test_any_other_reference_is_ungraded(reference, code):
    assert grade(code, "def f(): return 1", reference).error.startswith("unreadable reference: wanted {'prompt'")


# Which text is the program.


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\nor\n```python\nx = 2\n```\nprints\n```\n2\n```", "x = 2\n"),
        ("```\nx = 1\n```\n```\nx = 2\n```", "x = 2\n"),
        ("~~~Python\r\nx = 1\r\n~~~", "x = 1\r\n"),
        ("1. So:\n   ```python\n   if 1:\n       x = 1\n   ```", "if 1:\n    x = 1\n"),
        ("```python\nx = 1", "x = 1\n"),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''\n"),
        ("<think>```python\nx = 1\n```</think>\n```python\nx = 2\n```", "x = 2\n"),
        ("<think>```python\nx = 1\n```", None),
        ("<thinking>```python\nx = 1\n```", None),
        ("```python\nx = 1\n```\n<think>or rather", None),
        ("x = 1<|im_end|>\n", "x = 1"),
        ("```python\nx = 1\n```</s>", "x = 1\n"),
        ("```python\nx = '''\n```\n'''\n```\nThat's it.", "x = '''\n```\n'''\n"),
        ("```python\nx = '''\n```\nNo:\n```python\nx = 2\n```", "x = 2\n"),
        ("```python\nx = \"'''\"\n```\nSo x = '''.", "x = \"'''\"\n"),
        ("The answer is 5.", None),
        ("```python\nx = = 1\n```", None),
        ("x = '\0'", None),
        ("x = '\ud800'", None),
        ("(" * 100_000, None),
        ("-" * 100_000 + "1", None),
        ("x = 1\n" * 200_000, None),
    ],
)
def test_what_the_program_is(completion, program):
    assert find_program(completion) == program


F, WRONG_F, USAGE = "def f(x):\n    return x\n", "def f(x):\n    return 0\n", "print(f(1))\n"


@pytest.mark.parametrize(
    ("blocks", "program"),
    [
        ([("python", F), ("python", USAGE)], F),
        ([("python", WRONG_F), ("python", F), ("python", USAGE), ("", "1\n")], F),
        ([("", F), ("python", USAGE)], F),
        ([("python", F), ("", WRONG_F)], F),
        ([("python", "f = abs\n"), ("python", "f == 1\n"), ("python", USAGE)], "f = abs\n"),
        ([("python", "class f: pass\n"), ("python", "def f2(): pass\n")], "class f: pass\n"),
        ([("python", "x = 1\n"), ("python", USAGE), ("bash", "ls\n")], USAGE),
    ],
)
def test_the_program_is_the_last_block_that_defines_what_is_asked_for(blocks, program, code):
    text = "\n".join(f"So:\n```{language}\n{block}```" for language, block in blocks)
    assert find_program(text, names={"g", "f"}) == program
    if program == F:
        check = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f(1) == 1", "entry_point": "f"}
        assert [grade(code, text, task).value for task in (check, {"tests": ["assert f(1) == 1"]})] == [1.0, 1.0]


@pytest.mark.parametrize("margin", ["\t", " ", "  ", "   ", "        "])
@pytest.mark.parametrize("opening", ["def f(x):\n", "def f(x):\n{}'''Twice x.'''\n", "def f(x):\n{}if x:\n"])
def test_prompts_and_bodies_may_have_any_indentation(opening, margin, code):
    prompt = opening.format(margin)
    reference = {"prompt": prompt, "test": "def check(f):\n    assert f(2) == 4", "entry_point": "f"}
    deeper = margin * (1 + prompt.count("if"))
    assert grade(code, f"{deeper}x += x\n{deeper}return x", reference).value == 1.0
    assert grade(code, "def f(x): return x + x", reference).value == 1.0


@pytest.mark.parametrize(
    "body", ["\tx += x\n\treturn x", "x += x\n    return x", "x += x\nreturn x", " x += x\n return x"]
)
def test_a_body_may_be_indented_otherwise_than_its_prompt(body, code):
    prompt = "def f(x):\n    '''Twice x.'''\n"
    reference = {"prompt": prompt, "test": "def check(f):\n    assert f(2) == 4", "entry_point": "f"}
    for text in (body, f"```python\n{body}\n```", body + "<|endoftext|>"):
        assert grade(code, text, reference).value == 1.0


def test_no_program_scores_low_and_is_told_from_a_wrong_one(code):
    score = grade(code, "I cannot do that.", TARGET_ASSERTS)
    assert (score.value, score.parts) == (0.0, {"correct": 0.0, "passed": 0.0, "readable": 0.0})
    assert (score.info["outcome"], score.info["stage"]) == ("no program", "program")


def test_what_follows_a_continuation_is_not_run(code):
    follows = "\n\nif __name__ == '__main__':\n    print(f(input(\n"
    reference = {"prompt": "def f():\n", "test": "def check(f):\n    assert f() == 1", "entry_point": "f"}
    assert grade(code, "    return 1" + follows, reference).value == 1.0


@pytest.mark.parametrize("end", ["del span", "span = None", "span = 5"])
def test_a_program_without_the_function_fails(end, code):
    score = grade(code, f"{TARGET.right}\n{end}", TARGET.reference)
    assert (score.value, score.info["outcome"]) == (0.0, "failed")


@pytest.mark.parametrize(("unit", "times"), [("", 0), ("\0", 1), ("\ud800", 1), ("x", 3_000_000), ("```", 500_000)])
@pytest.mark.parametrize(
    "reference", [TARGET.reference, TARGET_ASSERTS, TARGET_PAIRS], ids=["check", "asserts", "pairs"]
)
def test_any_text_is_survived(unit, times, reference, code):
    assert grade(code, unit * times, reference).value == 0.0
    assert grade(code, f"```python\n{unit * times}", reference).value == 0.0


# What a test can do with what comes back.


@pytest.mark.parametrize(
    "value",
    [
        "None",
        "True",
        "-(10**30)",
        "0.1",
        "1e400",
        "2j",
        "'é\\ud800\\0'",
        "b'\\xff'",
        "[(1, [2])]",
        "{(1, 2): {3}}",
        "frozenset({1})",
    ],
)
def test_values_come_back_as_they_are(value, outcome):
    tests = (f"assert f() == {value} and type(f()) is type({value})", f"assert same({value}) == {value}")
    assert outcome(f"def f(): return {value}\ndef same(x): return x", *tests) == PASSED


def test_counters_and_the_like_come_back_as_dicts(outcome):
    program = """
        from collections import Counter, OrderedDict, defaultdict
        def f(): return [Counter("aab"), OrderedDict(a=1), defaultdict(int, a=1)]
    """
    assert outcome(program, "assert f() == [{'a': 2, 'b': 1}, {'a': 1}, {'a': 1}]") == PASSED


def test_arguments_changed_in_place_are_changed_for_the_test(outcome):
    program = """
        def f(a, b, *, c):
            a.sort(); b["x"].append(1); c -= {"a", "b"}
    """
    test = """
        a, b, c = [2, 1], {"x": []}, set("abcdefgh")
        alias, inner = a, b
        assert f(a, b, c=c) is None
        assert (a, b, c) == ([1, 2], {"x": [1]}, set("cdefgh")) and alias is a
    """
    assert outcome(program, test) == PASSED


@pytest.mark.parametrize("raised", ["ValueError", "KeyError", "ZeroDivisionError", "UnicodeDecodeError", "OSError"])
def test_exceptions_arrive_as_the_builtin_kind(raised, outcome):
    program = f"""
        class Mine({raised}): pass
        def f(): raise {raised}.__new__({raised})
        def g(): raise Mine.__new__(Mine)
    """
    test = "try: {}()\nexcept " + raised + ": pass\nelse: assert False"
    assert outcome(program, test.format("f"), test.format("g"), "assert f()") == (0.0, "failed")
    assert outcome(program, test.format("f"), test.format("g")) == PASSED


@pytest.mark.parametrize(
    "raised", ["SystemExit", "KeyboardInterrupt", "GeneratorExit", "StopIteration", "BaseException"]
)
def test_exceptions_that_would_end_more_than_the_test_end_only_the_test(raised, outcome):
    program = f"def f(x): raise {raised}"
    for test in ("for _ in map(f, [1]): pass", "assert all(map(f, [1]))", "f(1)"):
        assert outcome(program, test) == FAILED


@pytest.mark.parametrize(
    "test",
    [
        "try: f()\nexcept Exception: pass\nelse: assert False",
        "try: f()\nexcept: pass\nelse: assert False",
        "while True:\n    try: f()\n    except Exception: continue",
    ],
)
def test_a_test_that_wants_an_exception_is_not_served_by_the_end_of_the_process(test, outcome):
    assert outcome("import os\ndef f(): os._exit(0)", test) == (0.0, "exit")
    assert outcome("import os\ndef f(): os._exit(0)", test, "assert True") == (0.0, "exit")


def test_objects_of_the_program_can_be_used_but_not_compared(outcome):
    program = """
        class Node:
            kind = "tree"
            def __init__(self, value): self.value, self.left = value, None
            def depth(self): return 1 + (self.left.depth() if self.left is not None else 0)
            def __len__(self): return 3
            def __getitem__(self, key): return [self.value, key]
            def __iter__(self): yield from "abc"
            def __bool__(self): return False
            def __str__(self): return "node"
            def __eq__(self, other): return True
            __contains__ = __lt__ = __sub__ = __eq__
        def depth(node): return node.depth()
        def numbers():
            yield from range(3)
        root = Node(0)
        def the_root(): return root
    """
    setup = "import itertools\nnode = Node(1)\nnode.left = Node(2)\nnode.left.left = Node(3)"
    tests = [
        "assert depth(node) == node.depth() == 3",
        "assert node.left.left.value == 3 and Node.kind == 'tree'",
        "assert len(node) == 3 and node[5] == [1, 5] and list(node) == ['a', 'b', 'c'] and str(node) == 'node'",
        "assert not node and node is node and node == node",
        "assert 'b' in node and 'd' not in node",
        "assert list(numbers()) == [0, 1, 2] and sum(numbers()) == 3 and sorted(numbers(), reverse=True)[0] == 2",
        "assert list(itertools.islice(numbers(), 2)) == [0, 1] and next(numbers()) == 0",
        "assert root.value == 0 and root.left is None",
        "assert root is the_root() and root == the_root() and {root: 1}[the_root()] == 1 and root != node",
        "assert not hasattr(node, 'right')",
    ]
    assert [test for test in tests if outcome(program, test, setup=setup) != PASSED] == []
    for lie in ("node == 1", "1 == node", "node in [1]", "[node] == [1]", "node < 1", "node - 1", "{node} == {1}"):
        assert outcome(program, f"assert {lie}", setup=setup) == FAILED, lie


LIES = """
    class Any:
        def __getattr__(self, name): return lambda *a, **k: True
        def __iter__(self): return iter(())
    class Array:
        __array_interface__ = {"shape": (10**9,), "typestr": "<f8", "data": (4096, True), "version": 3}
    def f(): return Any()
    def array(): return Array()
"""


@pytest.mark.parametrize(
    "test",
    [
        "f().startswith('a')",
        "f().isdigit()",
        "f().issubset({1})",
        "f().is_integer()",
        "f().__eq__(5)",
        "f().__lt__(5)",
        "f().__ge__(5)",
        "f().__contains__(5)",
        "f() >= 5",
        "f() == 5",
        "f() == 'a'",
        "f() == [1]",
    ],
)
def test_no_object_of_the_program_answers_a_comparison(test, outcome):
    assert outcome(LIES, f"assert {test}") == FAILED


@pytest.mark.parametrize(
    "test", ["np.allclose(array(), [1, 2, 3])", "np.asarray(array())[9] == 1", "np.allclose(f(), 1)"]
)
def test_numpy_reads_no_memory_where_a_program_says(test, outcome):
    assert outcome(LIES, f"assert {test}", setup="import numpy as np") == FAILED


VALUES = """
    import datetime, decimal, enum, fractions
    from collections import OrderedDict, deque, namedtuple
    Point = namedtuple("Point", "x y")
    class Level(enum.IntEnum): LOW = 1
    class Name(str, enum.Enum): A = "a"
    class Texts(list): pass
    class Table(dict): pass
    class Members(set): pass
    class Half(float): pass
    def value(text): return eval(text)
"""


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        ("Point(1, 2)", "(1, 2)"),
        ("[Point(1, Level.LOW)]", "[(1, 1)]"),
        ("Level.LOW", "1"),
        ("Level.LOW", "1.0"),
        ("Level.LOW", "True"),
        ("Name.A", "'a'"),
        ("Texts('ab')", "['a', 'b']"),
        ("Table(a=1)", "{'a': 1}"),
        ("Members('ab')", "{'a', 'b'}"),
        ("Members('ab')", "frozenset('ab')"),
        ("Half(0.5)", "0.5"),
        ("decimal.Decimal('1.10')", "decimal.Decimal('1.1')"),
        ("decimal.Decimal('2')", "2"),
        ("fractions.Fraction(2, 4)", "fractions.Fraction(1, 2)"),
        ("fractions.Fraction(2, 4)", "0.5"),
        ("fractions.Fraction(4, 2)", "2"),
        ("datetime.date(2024, 2, 29)", "datetime.date(2024, 2, 29)"),
        ("datetime.datetime(2024, 2, 29, 12)", "datetime.datetime(2024, 2, 29, 12)"),
    ],
)
def test_objects_of_builtin_kinds_equal_their_values(value, ours, outcome):
    setup = "import datetime, decimal, fractions"
    tests = f"assert value({value!r}) == {ours} == value({value!r})", f"assert not value({value!r}) != {ours}"
    assert outcome(VALUES, *tests, setup=setup) == PASSED


@pytest.mark.parametrize(
    ("value", "ours"),
    [
        ("Point(1, 2)", "(1, 3)"),
        ("Point(1, 2)", "[1, 2]"),
        ("deque([1, 2])", "[1, 2]"),
        ("range(2)", "[0, 1]"),
        ("{'a': 1}.values()", "[1]"),
        ("Level.LOW", "2"),
        ("Level.LOW", "'1'"),
        ("Texts('ab')", "('a', 'b')"),
        ("decimal.Decimal('1.1')", "1.1"),
        ("fractions.Fraction(1, 3)", "0.3333"),
        ("datetime.datetime(2024, 2, 29)", "datetime.date(2024, 2, 29)"),
        ("iter([1])", "[1]"),
        ("value", "None"),
    ],
)
def test_and_nothing_that_python_would_not_call_equal(value, ours, outcome):
    assert outcome(VALUES, f"assert value({value!r}) == {ours}", setup="import datetime") == FAILED


def test_nor_a_value_of_millions_of_things():
    problem = {"tests": ["assert value('Texts(range(3 * 10**6))') == []"], "setup": "import datetime"}
    patient = make("code", seconds=30, workers=1)  # to look at them all takes its time beside other work
    assert grade(patient, textwrap.dedent(VALUES), problem).info["outcome"] == "failed"


@pytest.mark.parametrize("text", ["1e999999999", "1/0", "x", "1/2/3", "9" * 5_000, "9" * 10**5, "\\ud800"])
def test_an_object_whose_text_is_no_number_equals_none(text, outcome):
    program = f"""
        class Fraction:
            def __str__(self): return "{text}"
        class Decimal(Fraction): pass
        def f(): return Fraction()
        def g(): return Decimal()
    """
    assert outcome(program, "assert f() == 0.5") == outcome(program, "assert g() == 0.5") == FAILED


def test_a_program_does_not_learn_what_its_object_is_compared_with(outcome):
    program = """
        seen = []
        class Spy(list):
            def __eq__(self, other): seen.append(str(other)); return True
            def __iter__(self): seen.append("iter"); return iter([1])
        spy = Spy([1])
        def f(): return spy
        def all_seen(): return seen
    """
    assert outcome(program, "assert f() != [7, 8] and all_seen() == ['iter']") == PASSED


def test_objects_that_the_program_puts_into_arguments_can_be_used(outcome):
    program = """
        class Node:
            def __init__(self, value): self.value = value
        def add(nodes, value): nodes.append(Node(value))
        def put(nodes, value): nodes[value] = (Node(value),)
        def order(nodes): nodes.sort(key=lambda node: node.value)
    """
    setup = "nodes, table = [], {}"
    tests = [
        "add(nodes, 3); add(nodes, 1)\nassert [node.value for node in nodes] == [3, 1]",
        "order(nodes)\nassert [node.value for node in nodes] == [1, 3]",
        "put(table, 3); put(table, 1)\nassert table[3][0].value == 3 and table[1][0].value == 1",
    ]
    assert outcome(program, *tests, setup=setup) == PASSED
    assert outcome(program, "add(nodes, 3)\nassert nodes[0].number == 0", setup=setup) == FAILED


def test_functions_can_be_handed_back_and_builtins_handed_over(outcome):
    program = "def twice(f, x): return f(f(x))\ndef inc(x): return x + 1"
    assert (
        outcome(program, "assert twice(inc, 1) == 3", "assert twice(str, 1) == '1'", "assert twice(abs, -1) == 1")
        == PASSED
    )


def test_functions_have_their_names(outcome):
    assert outcome("def f(): pass", "assert f.__name__ == 'f' and callable(f)") == PASSED


def test_programs_print_and_read_without_harm(outcome, capfd):
    program = "import sys\nprint('hey')\ndef f():\n    print('x' * 1000, file=sys.stderr)\n    return sys.stdin.read()"
    assert outcome(program, "print(f())\nassert f() == ''") == PASSED
    assert capfd.readouterr().out == ""


def test_a_program_that_guards_its_main_part_is_not_main(outcome):
    assert (
        outcome("def f(): return 1\nif __name__ == '__main__':\n    raise SystemExit(input())", "assert f() == 1")
        == PASSED
    )


def test_asserts_of_the_test_count_under_python_o(outcome, monkeypatch):
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    score = Code(seconds=2, workers=3).grade("def f(): return 1", {"tests": ["assert f() == 2"]})
    assert score.value == 0.0


# Whose names.


@pytest.mark.parametrize(
    ("tests", "program", "modules"),
    [
        ("assert f(2) == 4", {"f"}, set()),
        ("assert abs(f(2) - 4) < 1e-9", {"f"}, set()),
        ("assert abs(-3) == 3", {"abs"}, set()),
        ("assert abs(max(3, 4)) == 3", set(), set()),
        ("import math as m\nassert m.isclose(f(2), 4)", {"f"}, set()),
        ("assert sys.getsizeof(f(2)) == 28", {"f"}, {"sys"}),
        ("assert select([1]) == 1", {"select"}, set()),
        ("x = f(2)\ndef g(y, *z): return h(y, z)\nassert [g(w) for w in x]", {"f", "h"}, set()),
        ("try: f()\nexcept ValueError as error: assert error.args", {"f"}, set()),
        ("root = Node(1)\nassert depth(root) == 1", {"Node", "depth"}, set()),
    ],
)
def test_a_test_asks_the_program_for_what_is_not_ours(tests, program, modules):
    assert undefined_names(tests) == (program, modules)


def test_the_program_cannot_stand_in_for_builtins_modules_or_helpers_of_the_prompt(outcome, code):
    liar = "class math:\n    isclose = lambda *a: True\nabs = lambda x: 0\ndef f(): return 9\n"
    assert outcome(liar, "assert abs(f() - 1) < 0.5") == FAILED
    assert outcome(liar, "assert math.isclose(f(), 1)") == FAILED
    (root,) = (problem for problem in PROBLEMS if problem.name == "root")
    liar = "def value(coefficients, x): return 0\ndef root(coefficients): return 1"
    assert grade(code, liar, root.reference).value == 0.0


def test_a_function_may_have_the_name_of_a_builtin(outcome):
    assert outcome("def sum(a, b): return a + b", "assert sum(2, 3) == 5") == PASSED


def test_a_star_import_does_not_hide_the_one_name_asked_for_but_of_more_its_own_stay(outcome):
    star = "from math import *"
    assert outcome("def gcd(a, b): return 7", "assert gcd(4, 6) == 2", setup=star) == FAILED
    assert outcome("def gcd(a, b): return 7", "assert gcd(4, 6) == 7", setup=star) == PASSED
    liar = "def isclose(*a): return True\ndef area(r): return 0"
    assert outcome(liar, "assert isclose(area(2), 12.56)", setup=star) == FAILED
    assert outcome(liar.replace("0", "12.56"), "assert isclose(area(2), 12.56)", setup=star) == PASSED


# Whose fault.


@pytest.mark.parametrize(
    ("setup", "test"),
    [
        ("", "assert f( == 1"),
        ("1 / 0", "assert f() == 1"),
        ("import no_such_module", "assert f() == 1"),
        ("", "assert f([].pop()) == 1"),
        ("", "assert 1 == 2"),
        ("exit()", "assert f() == 1"),
        ("", "assert f(lambda: 1) == 1"),
        ("from math import *", "assert gcd(4, 6) == 2 and lcm(1, 2) == 2"),
    ],
)
def test_a_test_that_breaks_before_it_asks_anything_is_ungraded(setup, test, code):
    reference = {"tests": [test], "setup": setup}
    program = "def f(x=1): return 1\ndef gcd(a, b): return 1\nlcm = gcd"
    assert grade(code, program, reference).error.startswith("broken test: ")


@pytest.mark.parametrize(
    "reference",
    [
        {"prompt": "def f(:\n", "test": "def check(f): assert f() == 1", "entry_point": "f"},
        {"prompt": "def f():\n", "test": "def check(f) assert f() == 1", "entry_point": "f"},
        {"prompt": "def f():\n", "test": "def verify(f): assert f() == 1", "entry_point": "f"},
    ],
)
def test_so_is_a_broken_check(reference, code):
    assert grade(code, "def f(): return 1", reference).error.startswith("broken test: ")


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def g(): return 1", "assert f() == 1"),
        ("def f(): return 'x'", "assert f() + 1 == 2"),
        ("def f(): return []", "assert f()[0] == 1"),
        ("def f(): return {'k': 1}", "for k in f(): assert {'j': 1}[k]"),
    ],
)
def test_a_test_that_breaks_on_what_the_program_gave_it_has_failed(program, test, outcome):
    assert outcome(program, test) == FAILED


def test_a_program_that_cannot_be_loaded_fails_with_an_error(outcome):
    assert outcome("1 / 0\ndef f(): return 1", "assert f() == 1") == (0.0, "error")


def test_a_test_that_a_lie_keeps_busy_is_a_time_out():
    code = Code(seconds=0.5, workers=2)
    score = grade(code, "def f(): return 10**9", {"tests": ["assert 10 ** f() == 1"]})
    assert (score.value, score.info["outcome"]) == (0.0, "time-out")
    assert grade(code, "def f(): return 1", {"tests": ["assert 10 ** f() == 10"]}).value == 1.0


def test_a_loop_is_stopped_and_costs_its_own_sample_only(code):
    texts = ["def f(): return 1", "def f():\n    while True: pass", "def f(): return 1", "while True: pass"]
    scores = code([Sample(prompt="", completion=text, reference={"tests": ["assert f() == 1"]}) for text in texts])
    assert [score.value for score in scores] == [1.0, 0.0, 1.0, 0.0]
    assert [score.info["stage"] for score in scores] == ["tests", "tests", "tests", "load"]
    assert {scores[1].info["outcome"], scores[3].info["outcome"]} == {"time-out"}


# Many at once, and options.


def test_many_programs_come_back_in_order(code):
    reference = [{"tests": [f"assert f() == {number}"]} for number in range(40)]
    samples = [
        Sample(prompt="", completion=f"def f(): return {number // 2 * 2}", reference=reference[number])
        for number in range(40)
    ]
    assert [score.value for score in code(samples)] == [1.0, 0.0] * 20


def test_programs_do_not_share_anything(code):
    leaves = "import math, builtins\nmath.pi = builtins.left = 3\nopen('left', 'w').close()\ndef f(): return 1"
    looks = "import builtins, math, os\ndef f(): return [math.pi > 3, hasattr(builtins, 'left'), os.listdir()]"
    looks += " == [True, False, []]"
    test = {"tests": ["assert f()"]}
    assert [code.grade(text, test).value for text in (leaves, looks, leaves, looks)] == [1.0] * 4


@pytest.mark.parametrize(
    "bad", [{"score": "some"}, {"seconds": 0}, {"backend": "no such backend"}, {"memory_bytes": -1}]
)
def test_bad_options_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make("code", **bad)


def test_programs_never_run_without_isolation():
    with pytest.raises(Unavailable, match="backend='bare' does not keep files"):
        make("code", backend="bare")

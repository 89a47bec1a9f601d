"""Small programming problems for the code verifier, written for this project: right answers, wrong ones, hostile ones."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import indent
from typing import Any


@dataclass(frozen=True)
class Problem:
    """A function to write, in HumanEval's shape: what opens it, its body, wrong bodies, the lines of its test."""

    name: str
    signature: str
    task: str
    body: str
    wrong: tuple[str, ...]
    asserts: str
    before: str = ""

    @property
    def prompt(self) -> str:
        return f'{self.before}def {self.name}{self.signature}:\n    """{self.task}"""\n'

    @property
    def reference(self) -> dict[str, str]:
        test = f"def check(candidate):\n{indent(self.asserts.strip(), '    ')}\n"
        return {"prompt": self.prompt, "test": test, "entry_point": self.name}

    def program(self, body: str) -> str:
        """A whole program with this body, by default without what the prompt brings along."""
        return f"{self.before}def {self.name}{self.signature}:\n{continuation(body)}"

    @property
    def right(self) -> str:
        return self.program(self.body)


def continuation(body: str) -> str:
    """A body as it would follow the prompt."""
    return indent(body.strip(), "    ") + "\n"


PROBLEMS = (
    Problem(
        "span",
        "(values)",
        "The largest value minus the smallest. ValueError if there is none.",
        "return max(values) - min(values)",
        ("return max(values)", "return len(values) and max(values) - min(values)", "return min(values) - max(values)"),
        """
assert candidate([3, 1, 2]) == 2
assert candidate((7,)) == 0
try:
    candidate([])
except ValueError:
    pass
else:
    raise AssertionError("no ValueError")
""",
    ),
    Problem(
        "mean_step",
        "(values)",
        "The mean difference between neighbours.",
        "return sum(b - a for a, b in zip(values, values[1:])) / (len(values) - 1)",
        ("return sum(values) / len(values)", "return 0.0", "return 'nan'", "return float('nan')"),
        """
import math
assert math.isclose(candidate([0.1, 0.2, 0.4]), 0.15)
assert abs(candidate([1, 4]) - 3) < 1e-9
""",
    ),
    Problem(
        "vowel_places",
        "(text)",
        "The places of the vowels, as a tuple.",
        "return tuple(i for i, letter in enumerate(text.lower()) if letter in 'aeiou')",
        (
            "return [i for i, letter in enumerate(text.lower()) if letter in 'aeiou']",
            "return tuple(i for i, letter in enumerate(text) if letter in 'aeiou')",
        ),
        """
assert candidate("Banana") == (1, 3, 5)
assert candidate("Ace") == (0, 2)
assert candidate("") == ()
assert isinstance(candidate("x"), tuple)
""",
    ),
    Problem(
        "shared_letters",
        "(first, second)",
        "The set of letters that both words have.",
        "return set(first) & set(second)",
        ("return set(first) | set(second)", "return sorted(set(first) & set(second))"),
        """
assert candidate("cart", "tram") == {"t", "r", "a"}
assert candidate("ab", "cd") == set()
assert type(candidate("a", "a")) is set
""",
    ),
    Problem(
        "evens_first",
        "(values)",
        "Sort the list in place, even values before odd ones. Return nothing.",
        "values.sort(key=lambda value: (value % 2, value))",
        ("return sorted(values, key=lambda value: (value % 2, value))", "values.sort()", "values[:] = []"),
        """
values = [5, 2, 8, 1]
assert candidate(values) is None
assert values == [2, 8, 1, 5]
same = nested = [3, 2]
candidate(nested)
assert same == [2, 3]
""",
    ),
    Problem(
        "count_by_length",
        "(words)",
        "How many words there are of each length, as a dict.",
        "counts = {}\nfor word in words:\n    counts[len(word)] = counts.get(len(word), 0) + 1\nreturn counts",
        ("return {len(word): 1 for word in words}", "return len(words)", "return {}"),
        """
assert candidate(["a", "bc", "d"]) == {1: 2, 2: 1}
assert list(candidate(["ccc", "b"])) == [3, 1]
assert candidate([]) == {}
""",
    ),
    Problem(
        "collatz",
        "(start)",
        "Yield the Collatz numbers from start down to 1.",
        "while start != 1:\n    yield start\n    start = 3 * start + 1 if start % 2 else start // 2\nyield 1",
        ("yield start\nyield 1", "while True:\n    yield start", "return [6, 3, 10, 5, 16, 8, 4, 2]"),
        """
assert list(candidate(6)) == [6, 3, 10, 5, 16, 8, 4, 2, 1]
assert sum(1 for _ in candidate(27)) == 112
""",
    ),
    Problem(
        "to_base",
        "(number: int, base: int) -> str",
        "Digits of a number from 0 on in a base from 2 to 10.",
        "digits = ''\nwhile number:\n    number, digit = divmod(number, base)\n    digits = str(digit) + digits\n"
        "return digits or '0'",
        ("return str(number)", "return bin(number)[2:]", "return int(str(number), base)"),
        """
assert candidate(10, 2) == "1010"
assert candidate(0, 7) == "0"
assert candidate(number=48, base=7) == "66"
""",
    ),
    Problem(
        "merge",
        "(first: List[int], second: List[int]) -> List[int]",
        "Merge two sorted lists into a new one; the arguments stay as they are.",
        "return sorted(first + second)",
        ("first.extend(second)\nfirst.sort()\nreturn first", "return first + second"),
        """
first, second = [1, 5], [2, 7]
assert candidate(first, second) == [1, 2, 5, 7]
assert (first, second) == ([1, 5], [2, 7])
""",
        before="from typing import List\n\n\n",
    ),
    Problem(
        "root",
        "(coefficients)",
        "A number where the polynomial of odd degree is zero.",
        """
low, high = -100.0, 100.0
for _ in range(200):
    middle = (low + high) / 2
    if value(coefficients, middle) * value(coefficients, high) <= 0:
        low = middle
    else:
        high = middle
return low
""",
        ("return 0.0", "return float('nan')", "return None"),
        """
for coefficients in ([-2, 1], [3, -1, 0, 2], [-27, 0, 0, 1]):
    assert abs(value(coefficients, candidate(coefficients))) < 1e-6
""",
        before="def value(coefficients, x):\n    return sum(c * x**i for i, c in enumerate(coefficients))\n\n\n",
    ),
    Problem(
        "nested_depth",
        "(text)",
        "How deep round brackets nest; None if they do not match.",
        """
depth = deepest = 0
for letter in text:
    depth += (letter == "(") - (letter == ")")
    deepest = max(deepest, depth)
    if depth < 0:
        return None
return None if depth else deepest
""",
        ("return text.count('(')", "return max(1, text.count('('))", "return 0"),
        """
assert candidate("(()())") == 2
assert candidate(")(") is None
assert candidate("((") is None
assert candidate("") == 0
""",
    ),
    Problem(
        "primes_below",
        "(limit)",
        "All primes below the limit.",
        "return [n for n in range(2, limit) if all(n % d for d in range(2, int(n**0.5) + 1))]",
        (
            "return [n for n in range(2, limit) if n % 2]",
            "return [n for n in range(limit) if all(n % d for d in range(2, n))]",
            "return list(range(2, limit))",
        ),
        """
assert candidate(20) == [2, 3, 5, 7, 11, 13, 17, 19]
assert candidate(2) == []
assert len(candidate(1000)) == 168
""",
    ),
    Problem(
        "transpose",
        "(rows)",
        "Rows to columns.",
        "return [list(column) for column in zip(*rows)]",
        ("return [row[::-1] for row in rows]", "return rows", "return list(zip(*rows))"),
        """
assert candidate([[1, 2, 3], [4, 5, 6]]) == [[1, 4], [2, 5], [3, 6]]
assert candidate([]) == []
""",
    ),
    Problem(
        "caesar",
        "(text, shift=3)",
        "Shift the letters a to z round the alphabet; leave the others.",
        "return ''.join(chr((ord(c) - 97 + shift) % 26 + 97) if 'a' <= c <= 'z' else c for c in text)",
        (
            "return ''.join(chr(ord(c) + shift) for c in text)",
            "return text",
            "return ''.join(chr((ord(c) - 97 + 3) % 26 + 97) for c in text if 'a' <= c <= 'z')",
        ),
        """
assert candidate("xyz!") == "abc!"
assert candidate("abc", shift=-1) == "zab"
""",
    ),
    Problem(
        "is_leap",
        "(year)",
        "Whether a year is a leap year.",
        "return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)",
        ("return year % 4 == 0", "return True", "return 'no'"),
        """
assert candidate(2024) is True
assert candidate(2000)
assert not candidate(1900)
assert not candidate(2023)
""",
    ),
    Problem(
        "parse_pair",
        "(text)",
        "The key and the number of 'key=number'; ValueError or KeyError('empty') if there is no number or no key.",
        "key, number = text.split('=')\nif not key:\n    raise KeyError('empty')\nreturn key, int(number)",
        (
            "key, number = text.split('=')\nreturn key, int(number)",
            "key, _, number = text.partition('=')\nreturn key, int(number or 0)",
            "key, number = text.split('=')\nif not key:\n    raise KeyError('empty')\nreturn key, float(number) + 0.5",
        ),
        """
assert candidate("a=5") == ("a", 5)
for bad, kind in (("a", ValueError), ("a=", ValueError), ("=5", KeyError)):
    try:
        candidate(bad)
    except kind as error:
        assert kind is ValueError or "empty" in str(error)
    else:
        raise AssertionError(bad)
""",
    ),
    Problem(
        "fib",
        "(n)",
        "The n-th Fibonacci number, exact however large.",
        "a, b = 0, 1\nfor _ in range(n):\n    a, b = b, a + b\nreturn a",
        ("return round(1.618033988749895**n / 5**0.5)", "return n", "return fib(n - 1) + fib(n - 2) if n > 2 else n"),
        """
assert candidate(10) == 55
assert candidate(0) == 0
assert candidate(100) == 354224848179261915075
""",
    ),
    Problem(
        "letters_of",
        "(data: bytes)",
        "ASCII bytes as text, and how many there are.",
        "return data.decode('ascii'), len(data)",
        ("return data, len(data)", "return str(data), len(data)"),
        """
assert candidate(b"abc") == ("abc", 3)
try:
    candidate(b"\\xff")
except UnicodeDecodeError:
    pass
else:
    raise AssertionError("decoded")
""",
    ),
    Problem(
        "common_words",
        "(text, n)",
        "The n most common words with their counts, most common first, ties in order of the alphabet.",
        "counts = Counter(text.split())\nreturn sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:n]",
        ("return Counter(text.split())", "return sorted(Counter(text.split()).items())[:n]"),
        """
assert candidate("b a b c a b", 2) == [("b", 3), ("a", 2)]
assert candidate("", 3) == []
""",
        before="from collections import Counter\n\n\n",
    ),
    Problem(
        "rotate_queue",
        "(values, steps)",
        "Rotate a copy to the right.",
        "queue = deque(values)\nqueue.rotate(steps)\nreturn list(queue)",
        ("return values", "return values[steps:] + values[:steps]"),
        """
assert candidate([1, 2, 3, 4], 1) == [4, 1, 2, 3]
assert candidate([1, 2, 3], -1) == [2, 3, 1]
assert candidate([], 5) == []
""",
        before="from collections import deque\n\n\n",
    ),
)
"""Each passes with its body and fails with each of its wrong bodies."""


TARGET = Problem(
    "span",
    "(values)",
    "The largest value minus the smallest. ValueError if there is none.",
    "return max(values) - min(values)",
    (),
    """
assert candidate([3, 1, 2]) == 2
assert abs(candidate([0.5, 2.75]) - 2.25) < 1e-9
assert not candidate([4, 4])
assert candidate([7, 1]) in (6, 6.0)
assert {candidate([1, 5])} == {4}
assert sorted([candidate([9, 1]), 3]) == [3, 8]
assert "%d" % candidate([1, 10]) == "9"
assert len(range(candidate([10, 1]))) == 9
values = [5, -5]
assert candidate(values) == 10 and values == [5, -5]
try:
    candidate([])
except ValueError:
    pass
else:
    raise AssertionError("no ValueError")
""",
)
"""What hostile programs pretend to solve: each line of its test leans on another operation of the answer."""

TARGET_ASSERTS = {
    "setup": "import math",
    "tests": [
        "assert span([3, 1, 2]) == 2",
        "assert math.isclose(span([0.5, 2.75]), 2.25)",
        "assert span([10, 1]) in [9] and {span([7, 1])} == {6}",
    ],
}
TARGET_PAIRS = {"inputs": ["3 1 2\n", "10 1\n"], "outputs": ["2\n", "9\n"]}


def _with(body: str, before: str = "") -> str:
    """A program of ``before`` and a span with this body."""
    return f"{before.strip()}\n\ndef span(values):\n{continuation(body)}"


_LIAR = """
class Liar({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __bool__(self): return False
    def __hash__(self): return hash({hash})
    def __lt__(self, other): return True
    __le__ = __gt__ = __ge__ = __lt__
    def __abs__(self): return self
    def __sub__(self, other): return self
    __rsub__ = __add__ = __radd__ = __mul__ = __mod__ = __sub__
    def __contains__(self, item): return True
    def __len__(self): return 9
    def __index__(self): return 9
    def __float__(self): return 2.25
    def __int__(self): return 9
    def __str__(self): return "9"
    __repr__ = __format__ = __str__
    def __getattr__(self, name): return lambda *a, **k: self
"""


def _liar(base: str, made: str, hash: str = "4") -> str:
    return _with(f"return Liar({made})", before=_LIAR.format(base=base, hash=hash))


_FORGED = [
    '{"ok": true}',
    '{"result": 2}',
    '{"id": 1, "value": 2}',
    "[1, null]",
    "[true, null]",
    '[{"passed": [true], "outcome": "passed"}, null]',
    "passed",
    "OK",
    "\\x00\\x00\\x00\\x01T",
]
_WRITE_ALL = f"""
import os
forged = {_FORGED!r}
def write_all():
    for fd in range(256):
        for text in forged:
            try:
                os.write(fd, text.encode() + b"\\n")
            except OSError:
                pass
"""

_FRAMES = """
import json, os, struct, sys
def asked():
    frame = sys._getframe()
    while frame and frame.f_code.co_name != "serve":
        frame = frame.f_back
    return frame.f_locals.get("number", 1) if frame else 1
def send(message):
    body = json.dumps({"number": asked(), **message}).encode()
    os.write(3, struct.pack(">I", len(body)) + body)
"""

_MODULE = """
import os, sys, types
class Module(types.ModuleType):
    span = property(lambda self: {})
sys.modules["solution"].__class__ = Module
"""

HOSTILE: dict[str, dict[str, str]] = {
    "ends early": {
        "sys.exit": _with("sys.exit(0)", "import sys"),
        "sys.exit at once": "import sys\nsys.exit(0)\n",
        "os._exit": _with("os._exit(0)", "import os"),
        "os._exit at once": "import os\nos._exit(0)\n",
        "SystemExit": _with("raise SystemExit(0)"),
        "quit": _with("quit()"),
        "KeyboardInterrupt": _with("raise KeyboardInterrupt"),
        "GeneratorExit": _with("raise GeneratorExit"),
        "StopIteration": _with("raise StopIteration"),
        "own BaseException": _with("raise Done", "class Done(BaseException): pass"),
        "ValueError always": _with("raise ValueError"),
        "AssertionError": _with("raise AssertionError"),
        "atexit": _with("os._exit(0)", "import atexit, os\natexit.register(os._exit, 0)"),
        "exec true": _with("os.execv('/bin/true', ['true'])", "import os"),
        "exec python": _with("os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])", "import os, sys"),
        "abort": _with("os.abort()", "import os"),
        "segfault": _with("ctypes.string_at(0)", "import ctypes"),
        "kill itself": _with("os.kill(os.getpid(), 9)", "import os"),
        "kill the parent": _with("os.kill(os.getppid(), 9)\nreturn 2", "import os"),
        "kill the group": _with("os.killpg(0, 9)\nreturn 2", "import os"),
        "kill everything": _with("os.kill(-1, 9)\nreturn 2", "import os"),
        "stop the parent": _with("os.kill(os.getppid(), 19)\nreturn 2", "import os"),
        "signal handlers": _with(
            "signal.raise_signal(signal.SIGTERM)\nreturn 2",
            "import os, signal\nfor n in (1, 2, 15):\n    signal.signal(n, lambda *a: os._exit(0))",
        ),
        "alarm": _with(
            "while True: pass", "import os, signal\nsignal.signal(14, lambda *a: os._exit(0))\nsignal.alarm(1)"
        ),
        "close every file": _with("os.closerange(0, 256)\nreturn 2", "import os"),
        "excepthook": _with("1 / 0", "import os, sys\nsys.excepthook = lambda *a: os._exit(0)"),
    },
    "lying values": {
        "object": _liar("object", ""),
        "int": _liar("int", "1"),
        "float": _liar("float", "'nan'"),
        "str": _liar("str", "'9'"),
        "list": _liar("list", "[1]"),
        "tuple": _liar("tuple", "()"),
        "dict": _liar("dict", "{}"),
        "set": _liar("set", "[4]"),
        "bytes": _liar("bytes", "b'9'"),
        "class attribute": _with(
            "return Fake()", _LIAR.format(base="object", hash="4") + "\nclass Fake(Liar):\n    __class__ = int\n"
        ),
        "metaclass": _with(
            "return Made",
            "class Meta(type):\n    def __eq__(c, o): return True\n    def __hash__(c): return 4\n"
            "    def __bool__(c): return False\n    def __sub__(c, o): return 0\n"
            "class Made(metaclass=Meta): pass",
        ),
        "enum": _with(
            "return Lie.A",
            "import enum\nclass Lie(int, enum.Enum):\n    A = 2\n    __eq__ = lambda s, o: True\n"
            "    __hash__ = int.__hash__",
        ),
        "mock": _with("return MagicMock()", "from unittest.mock import MagicMock"),
        "mock ANY": _with("return ANY", "from unittest.mock import ANY"),
        "nan": _with("return float('nan')"),
        "infinite": _with("return float('inf')"),
        "true": _with("return True"),
        "NotImplemented": _with("return NotImplemented"),
        "itself": _with("return span"),
        "the arguments": _with("return values"),
        "empties the arguments": _with("values.clear()\nreturn values"),
        "rewrites the arguments": _with("values[:] = [2, 2]\nreturn 0"),
        "by number of call": _with("calls.append(1)\nreturn [2, 9, 9, 2][len(calls) % 4]", "calls = []"),
        "contains itself": _with("a = []\na.append(a)\nreturn a"),
        "dict contains itself": _with("a = {}\na[1] = a\nreturn a"),
        "endless generator": _with("while True:\n    yield 2"),
        "endless count": _with("return itertools.count()", "import itertools"),
        "endless map": _with("return iter(int, 1)"),
    },
    "patches": {
        "builtins": _with(
            "return 0",
            "import builtins\nfor name in ('abs', 'len', 'sorted', 'range', 'set'):\n"
            "    setattr(builtins, name, lambda *a, **k: 9)",
        ),
        "shadows": "abs = lambda x: 0\nlen = lambda x: 9\nsorted = lambda x: [3, 8]\nrange = list\n"
        + _with("return 0"),
        "AssertionError": _with(
            "return 0",
            "import builtins\nclass Quiet(Exception):\n    def __new__(cls, *a): import os; os._exit(0)\n"
            "builtins.AssertionError = Quiet",
        ),
        "check": "def check(candidate): pass\n" + _with("return 0"),
        "math": "import math\nmath.isclose = lambda *a, **k: True\n" + _with("return 0"),
        "class called math": "class math:\n    isclose = staticmethod(lambda *a, **k: True)\n" + _with("return 0"),
        "json": _with(
            "return 0",
            "import json\njson.dumps = lambda *a, **k: '[1, null]'\njson.loads = lambda *a, **k: []\n"
            "json.JSONEncoder.encode = json.dumps",
        ),
        "pickle": _with("return Bad()", "class Bad:\n    def __reduce__(self): return (int, (2,))"),
        "import hook": _with(
            "return 0",
            "import sys\nclass Hook:\n    def find_spec(self, name, path=None, target=None): sys.exit(0)\n"
            "sys.meta_path.insert(0, Hook())\nsys.modules.clear()",
        ),
        "builtins import": _with("return 0", "import builtins\nbuiltins.__import__ = lambda *a, **k: exit(0)"),
        "unittest": _with(
            "return 0", "import unittest\nunittest.TestCase.assertEqual = lambda *a: None\nunittest.main = lambda: None"
        ),
        "settrace": _with(
            "return 0",
            "import sys\ndef trace(frame, event, arg):\n    frame.f_trace_opcodes = True\n"
            "    if 'passed' in frame.f_locals: frame.f_locals['passed'] = True\n    return trace\nsys.settrace(trace)",
        ),
        "profile": _with(
            "return 0", "import os, sys\nsys.setprofile(lambda f, e, a: os._exit(0) if e == 'return' else 0)"
        ),
        "main module": _with(
            "return 0",
            "import sys\nfor name in list(sys.modules):\n    if name in ('__main__', 'builtins'):\n"
            "        sys.modules[name].__dict__['check'] = lambda *a: None",
        ),
        "module of another class": _with("return 2", _MODULE.format("os._exit(0)")),
        "module that gives counters": _with(
            "return 2",
            "class Counter:\n    def keys(self): return [Counter()]\n    def __getitem__(self, key): return Counter()\n"
            + _MODULE.format("Counter()"),
        ),
        "module that is a number": _with("return 2", "import sys\nsys.modules['solution'] = 5"),
        "builtins that are numbers": _with(
            "return Mine(2)",
            "import sys, types\nclass Mine(int): pass\n"
            "fake = types.ModuleType('builtins')\nfake.int = 5\nsys.modules['builtins'] = fake",
        ),
        "counters as keys": "class Counter:\n    def keys(self): return []\nspan = {Counter(): 1}",
        "audit hook": _with("return 0", "import os, sys\nsys.addaudithook(lambda *a: os._exit(0))"),
    },
    "looks for the tests": {
        "frames": _with(
            """
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
        if "span([3, 1, 2]) == " in repr(value):
            return 2
    frame = frame.f_back
return 0
""",
            "import sys",
        ),
        "garbage collector": _with(
            """
for thing in gc.get_objects():
    if callable(thing) and getattr(thing, "__name__", "") == "check":
        return {2: 2}.get(len(values), 2)
return 0
""",
            "import gc",
        ),
        "proc memory": _with(
            """
for pid in os.listdir("/proc"):
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as a, open(f"/proc/{pid}/mem", "r+b") as b:
            b.seek(0x400000)
            b.write(b"passed")
    except OSError:
        pass
return 0
""",
            "import os",
        ),
        "proc fds": _with(
            """
for pid in [os.getppid(), os.getpid(), *map(str, range(1, 300))]:
    for fd in range(30):
        try:
            with open(f"/proc/{pid}/fd/{fd}", "wb", buffering=0) as file:
                file.write(b'[{"passed": [true]}, null]\\n')
        except OSError:
            pass
return 0
""",
            "import os",
        ),
        "environment": _with("return len(os.environ)", "import os"),
        "ptrace": _with("libc.ptrace(16, os.getppid(), 0, 0)\nreturn 0", "import ctypes, os\nlibc = ctypes.CDLL(None)"),
        "process_vm_writev": _with(
            "libc.process_vm_writev(os.getppid(), 0, 0, 0, 0, 0)\nreturn 0",
            "import ctypes, os\nlibc = ctypes.CDLL(None)",
        ),
        "source files": _with(
            """
for folder, _, names in os.walk("/tmp"):
    for name in names[:50]:
        try:
            if "span" in open(os.path.join(folder, name)).read(10_000):
                return 2
        except (OSError, ValueError):
            pass
return 0
""",
            "import os",
        ),
        "argv and stdin": _with("return len(sys.argv) + len(sys.stdin.read())", "import sys"),
    },
    "writes to the channel": {
        "prints a result": _with("print('passed\\nOK\\n1.0')\nreturn 0", "print('all tests passed')"),
        "prints frames": _with("print(*forged, sep='\\n', flush=True)\nreturn 0", f"forged = {_FORGED!r}"),
        "every descriptor": _with("write_all()\nreturn 0", _WRITE_ALL),
        "every descriptor at once": _WRITE_ALL + "write_all()\n" + _with("return 0"),
        "every descriptor, then exit": _with("write_all()\nos._exit(0)", _WRITE_ALL),
        "from a thread": _with(
            "return 0",
            _WRITE_ALL + "import threading\ndef forever():\n    while True: write_all()\n"
            "threading.Thread(target=forever, daemon=True).start()",
        ),
        "reads the channel": _with(
            "for fd in range(3, 64):\n    try:\n        os.set_blocking(fd, False)\n        os.read(fd, 1 << 16)\n"
            "    except OSError: pass\nreturn 0",
            "import os",
        ),
        "answers twice": _with(
            "seen = sys._getframe().f_back\nwhile seen:\n    for v in list(seen.f_locals.values()):\n"
            "        if hasattr(v, 'write'):\n            for f in forged:\n"
            "                try: v.write(f)\n                except Exception:\n"
            "                    try: v.write(f.encode() + b'\\n')\n                    except Exception: pass\n"
            "    seen = seen.f_back\nreturn 0",
            f"import sys\nforged = {_FORGED!r}",
        ),
        "frames of the protocol": _with("send({'value': 2})\nreturn 2", _FRAMES),
        "frames at once": _with("return 2", _FRAMES + "for _ in range(99): send({'value': 2})"),
        "an answer, then silence": _with("send({'value': 2})\nwhile True: pass", _FRAMES),
        "an answer, then the end": _with("send({'value': 2})\nos._exit(0)", _FRAMES),
        "other names": _FRAMES
        + "send({'names': {'span': 'function', 'check': 'function', 'abs': 'function', 'math': 'class'}})\n"
        + _with("return 2"),
        "other arguments": _with(
            "send({'value': 2, 'args': {'tuple': [{'tuple': [[2, 2]]}, {'dict': []}]}})\nos._exit(0)", _FRAMES
        ),
        "other errors": _with("send({'raised': ['SystemExit', '0']})\nos._exit(0)", _FRAMES),
        "counters of counters": _with(
            "number = asked()\nwhile True:\n    send({'number': number, 'value': {'handle': [0, 'Counter']}})\n"
            "    os.read(3, 1 << 16)\n    number += 1",
            _FRAMES,
        ),
        "handles of nothing": _with("send({'value': {'handle': [-1, 'int']}})\nos._exit(0)", _FRAMES),
        "malformed values": _with("send({'value': {'dict': [1]}})\nos._exit(0)", _FRAMES),
        "keys that collide": _with(
            "keys = [{'int': hex(i * (2**61 - 1))} for i in range(10**5)]\nsend({'value': {'set': keys}})", _FRAMES
        ),
        "garbage": _with(
            "for fd in range(3, 64):\n    try: os.write(fd, os.urandom(4096))\n    except OSError: pass", "import os"
        ),
    },
    "eats": {
        "loop": _with("while True: pass"),
        "loop at once": "while True: pass\n",
        "loop on the last call": _with("while values == []: pass\nreturn 2"),
        "loop in C": _with("return 10 ** (10**9) % 7"),
        "sleep": _with("time.sleep(1000)", "import time"),
        "a little sleep a call": _with(
            "time.sleep(0.3)\nreturn max(values) - min(values) + (len(values) > 2)", "import time"
        ),
        "regex": _with("return re.match('(a+)+b', 'a' * 60)", "import re"),
        "recursion": _with("return span(values)"),
        "deep recursion": _with("return span(values)", "import sys\nsys.setrecursionlimit(10**9)"),
        "fork bomb": _with("while True:\n    os.fork()", "import os"),
        "fork bomb at once": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n",
        "fork and stay": _with("if os.fork() == 0:\n    time.sleep(1000)\nreturn 0", "import os, time"),
        "daemon": _with(
            "if os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(1000)\n    os._exit(0)\nreturn 0",
            "import os, time",
        ),
        "subprocess": _with("subprocess.Popen(['sleep', '1000'])\nreturn 0", "import subprocess"),
        "multiprocessing": _with("return multiprocessing.Pool(50).map(abs, [1] * 9)[0]", "import multiprocessing"),
        "thread bomb": _with(
            "while True:\n    threading.Thread(target=time.sleep, args=(1000,)).start()", "import threading, time"
        ),
        "threads that stay": _with(
            "threading.Thread(target=time.sleep, args=(1000,)).start()\nreturn 0", "import threading, time"
        ),
        "memory": _with("return len(bytearray(2**40))"),
        "memory bit by bit": _with("hoard = []\nwhile True:\n    hoard.append(bytearray(2**24))"),
        "memory kept": _with(
            "while True:\n    try: hoard.append(bytearray(2**24))\n    except MemoryError: return 2", "hoard = []"
        ),
        "huge integer": _with("return 1 << 10**9"),
        "huge list": _with("return [0] * 10**8"),
        "huge text": _with("return 'x' * 10**9"),
        "huge argument": _with("values.extend([0] * 10**7)\nreturn 2"),
        "huge error": _with("raise ValueError('x' * 10**8)"),
        "deep list": _with("a = []\nfor _ in range(10**5): a = [a]\nreturn a"),
        "wide and deep": _with("a = []\nfor _ in range(60): a = [a, a]\nreturn a"),
        "output": _with("while True: print('x' * 10**6)"),
        "output to stderr": _with("while True: sys.stderr.write('x' * 10**6)", "import sys"),
        "disk": _with("with open('big', 'wb') as file:\n    while True: file.write(bytes(2**24))"),
        "many files": _with("for i in range(10**6): open(f'f{i}', 'w').close()"),
        "descriptors": _with("kept = []\nwhile True: kept.append(os.dup(0))", "import os"),
        "never decodes": _with("return {i: {i: {i: i}} for i in range(10**6)}"),
    },
    "reaches outside": {
        "deletes": _with("os.remove('CANARY')\nreturn 0", "import os"),
        "overwrites": _with("open('CANARY', 'w').write('gone')\nreturn 0"),
        "renames": _with("os.rename('CANARY', 'CANARY.bak')\nreturn 0", "import os"),
        "chmod": _with("os.chmod('CANARY', 0)\nreturn 0", "import os"),
        "deletes its folder": _with("shutil.rmtree(os.path.dirname('CANARY'))\nreturn 0", "import os, shutil"),
        "leaves a file": _with("open('CANARY.left', 'w').close()\nreturn 0"),
        "shell": _with("return os.system('rm -f CANARY')", "import os"),
        "socket": _with("socket.create_connection(('127.0.0.1', 22), 1)\nreturn 0", "import socket"),
        "server": _with(
            "s = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\nreturn s.accept()", "import socket"
        ),
        "unix socket": _with("s = socket.socket(socket.AF_UNIX)\ns.bind('CANARY.sock')\nreturn 0", "import socket"),
        "url": _with("return urllib.request.urlopen('http://127.0.0.1', timeout=1)", "import urllib.request"),
    },
}
"""Programs that earn nothing by what they do, by kind: each must be stopped and none may pass. ``CANARY`` stands for a file
that must stay as it is."""

HOSTILE_SCRIPTS = {
    "prints what it is asked": "print(open(0).read())",
    "prints every number": "print(*range(100))",
    "prints that it passed": "print('passed')\nraise SystemExit(0)",
    "exits": "import os\nos._exit(0)",
    "loops": "while True: pass",
    "waits for more": "while True: open(0).read()",
    "floods": "while True: print('2')",
    "floods stderr": "import sys\nwhile True: sys.stderr.write('x' * 10**6)",
    "eats memory": "x = [bytearray(2**24) for _ in range(10**6)]",
    "forks": "import os\nwhile True: os.fork()",
    "looks for the answers": (
        "import gc, os\nfor o in gc.get_objects():\n    if isinstance(o, list) and o and o[0] == '2\\n': print(o[0])\n"
        "os.listdir('/proc')\nprint(open(f'/proc/{os.getppid()}/environ').read())"
    ),
    "right once, then dies": "print({'3 1 2': 2}[input()])",
}
"""The same for programs that read input and print."""


def hostile_samples(canary: str) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
    """Completion and reference of every hostile program, by kind and name; functions against both kinds of tests."""
    programs = {(kind, name): text for kind, named in HOSTILE.items() for name, text in named.items()}
    samples = {
        (kind, f"{name}, {form}"): (text.replace("CANARY", canary), reference)
        for (kind, name), text in programs.items()
        for form, reference in (("check", TARGET.reference), ("asserts", TARGET_ASSERTS))
    }
    scripts = {("scripts", name): (text, TARGET_PAIRS) for name, text in HOSTILE_SCRIPTS.items()}
    return samples | scripts

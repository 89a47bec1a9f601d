"""The last number of a text, as in GSM8K."""

from __future__ import annotations

import re
from typing import Any

from rewards.contract import Score
from rewards.verifiers.base import Verifier, unreadable, verdict
from rewards.verifiers.number import read_number
from rewards.verifiers.reasoning import without_reasoning

# A run of digits with what may stand inside a number is taken whole: "1,2,3" and "12/3/2024" are no numbers, and must
# not be cut into some. A hyphen behind a letter, a digit or a closing bracket subtracts or joins; elsewhere it is a
# sign.
_RUN = r"""(?: (?<![^\W_]) (?<![)\]}]) [+-] [$€£]? )?
           (?<![^\W_]) (?: (?<!\.) \. )?
           [0-9] (?: [0-9.,/]* [0-9] )? (?: [eE] [+-]? [0-9]+ )?"""
_NUMBERS = re.compile(_RUN, re.VERBOSE)
# Only a number alone behind the marker: "#### 2. Add them up" is a heading. The bounds keep the search linear.
_MARKED = re.compile(rf"\#\#\#\# [^\w\n]{{0,8}}? ({_RUN}) [^\w\n]{{0,8}} $", re.VERBOSE | re.MULTILINE)

# A number behind or before an operator is an operand of something that nobody has worked out. Blanks stand on both sides
# of an operator or on neither, and then a variable is one letter: the stars of "is **18**", the sign of "= +18" and the
# slashes of "w/ 18" and "18/day" are no operators. Nor is a minus, which may be a dash: "x-5", "2024-11-20".
_OPERATOR, _COMMAND, _VARIABLE = r"(?:\*\*?|[×÷^+])", r"\\(?:times|cdot|div)(?![A-Za-z])", "[A-Za-z]"
_BEHIND = re.compile(
    rf"""(?: (?: (?<![^\W0-9_]) {_VARIABLE} | [0-9)\]}}%] ) (?: {_OPERATOR} | [·/] | [ \t]{{0,3}} {_COMMAND} [ \t]{{0,3}} )
           | [\w)\]}}%] (?P<gap>[ \t]{{1,3}}) (?: {_OPERATOR} | [·/] ) (?P=gap)
           | \}}\{{  # \frac{{…}}{{18
         ) [(\[{{$€£]{{0,3}} \Z""",
    re.VERBOSE,
)
_BEFORE = re.compile(
    rf"""{_OPERATOR} {_VARIABLE} (?![^\W_]) | (?P<gap>[ \t]{{1,3}}) {_OPERATOR} (?P=gap) [\w(\\] | [ \t]{{0,3}} {_COMMAND}""",
    re.VERBOSE,
)


class LastNumber(Verifier):
    """``1.0 if the last number of the completion == the reference else 0.0``, in exact arithmetic.

    If the completion has lines that end in ``#### number``, as GSM8K's solutions do, the last of these counts; else the
    last number anywhere. What stands around a number is prose: ``18``, ``18.``, ``$18``, ``18%`` and ``18 km`` are all
    18. Digits inside a word (``CO2``) are none. If the last run of digits is not a well-formed number (``1,23``,
    ``12/4``, a date with slashes), or is a part of a product, quotient, power or sum that was not worked out (``3 * 6``,
    ``2^18``, ``18 + x``, but not ``3 * 6 = 18``), there is no answer: 0.0, with ``parts["readable"]`` 0.0.

    Reasoning between ``<think>`` tags does not count, and reasoning that never ends leaves no answer.

    The reference is a solution that ends in ``#### number``, or a text with exactly one number; any other leaves the
    sample ungraded.

    Every completion is one guess, so listing numbers earns no more than guessing. But the rule does not see whether the
    rest of the text agrees with its last number: where that matters ask for a format, or use ``numeric``.

    Example:
        >>> last = LastNumber()
        >>> [last.grade(text, "18").value for text in ("9 + 9 makes 18.", "#### 18\\nChecked 3 times.", "18, or 19")]
        [1.0, 1.0, 0.0]
    """

    name = "last_number"

    def grade(self, completion: str, reference: Any) -> Score:
        candidates = _candidates(str(reference))
        wanted = read_number(candidates[0]) if len(candidates) == 1 else None
        if wanted is None:
            return unreadable(reference, wanted="one number, or a text that ends in '#### number'")
        found = _candidates(without_reasoning(completion) or "")
        answer = read_number(found[-1]) if found else None
        return verdict(answer == wanted, readable=float(answer is not None))


def _candidates(text: str) -> list[str]:
    """The last marked number of ``text`` if there is one, else all its numbers, empty for operands."""
    text = text.replace("\N{MINUS SIGN}", "-")
    return _MARKED.findall(text)[-1:] or [_read_unless_operand(match) for match in _NUMBERS.finditer(text)]


def _read_unless_operand(match: re.Match[str]) -> str:
    text, (start, end) = match.string, match.span()
    is_operand = _BEHIND.search(text[max(0, start - 24) : start]) or _BEFORE.match(text, end)
    return "" if is_operand else match[0]

"""The verdict on one completion: a pure function, run in a worker that can be killed."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from typing import Any

from rewards.verifiers.math import symbolic
from rewards.verifiers.math.clean import clean
from rewards.verifiers.math.compare import Comparison, is_number, unfinished
from rewards.verifiers.math.extract import MAX_TAIL, extract
from rewards.verifiers.math.node import MAX_CHARS, Node, UnreadableError
from rewards.verifiers.math.read import read

_BEYOND = re.compile(r"\\(?:[lc]?dots|sum|prod|int|lim|begin ?\{cases\}.*\\end ?\{cases\})(?![a-zA-Z])", re.DOTALL)
"""What references say well enough, but beyond what is read here."""
_STYLES = r"\\(?:text|textbf|mathrm|mbox|textrm|mathbf|rm|bf)\b\s*|[*]"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came out.

    Args:
        outcome: ``correct``, ``wrong``, ``no answer``, ``unreadable reference`` or ``missing extra``.
        extracted: the text taken as the answer.
        stage: what decided: ``extraction``, ``text``, ``exact``, ``structure``, ``rounding``, ``symbolic``, ``second opinion``,
            or ``reading`` when one of the two is no mathematics.
        why: the reason, where there is one to tell.
        convention: what it is correct by, besides the rules that always hold.
    """

    outcome: str
    extracted: str = ""
    stage: str = "extraction"
    why: str = ""
    convention: str = ""


def grade_item(item: dict[str, Any]) -> dict[str, str]:
    """:func:`grade` for :class:`rewards.workers.Workers`: a dictionary of its arguments in, a verdict's fields out."""
    return asdict(grade(**item))


def grade(completion: str, reference: str, prompt: str = "", conventions: Collection[str] = ()) -> Verdict:
    """The verdict on ``completion``; see :class:`rewards.verifiers.math.Math` for the rules.

    Example:
        >>> grade("so $x = \\\\frac12$.", "0.5")
        Verdict(outcome='correct', extracted='$x = \\\\frac12$', stage='exact', why='', convention='')
    """
    wanted = _reference(reference)
    if isinstance(wanted, str):
        return Verdict("unreadable reference", why=wanted)
    text, meaning = wanted
    answer = extract(completion, prompt, "last number" in conventions)
    if answer is None or not answer.strip(" $.,*_\n"):
        return Verdict("no answer")
    if len(answer) > 2 * MAX_CHARS:
        return Verdict("wrong", answer[:100], "reading", f"an answer has at most {MAX_CHARS} characters")
    try:
        verdict = _compare(text, meaning, answer, prompt, conventions)
    except symbolic.MissingExtraError as error:
        return Verdict("missing extra", answer, "symbolic", str(error))
    if verdict.outcome == "correct" and "last number" in conventions and extract(completion, prompt) != answer:
        return replace(verdict, convention=", ".join(filter(None, ("last number", verdict.convention))))
    return verdict


def _compare(text: str, meaning: Node | None, answer: str, prompt: str, conventions: Collection[str]) -> Verdict:
    if _plain(answer) == _plain(text):
        return Verdict("correct", answer, "text")
    if (_words(text) and _words(text) == _words(answer)) or (_choice(text) and _choice(text) == _choice(answer)):
        return Verdict("correct", answer, "text")
    if meaning is None:
        return _second_opinion(text, answer)
    try:
        given = read(_without_letter(answer))
    except UnreadableError as error:
        return Verdict("wrong", answer, "reading", str(error))
    comparison = Comparison(conventions)
    same = comparison.same(meaning, given)
    if same and prompt and _echoes(text, meaning, given, answer, prompt):
        return Verdict("wrong", answer, comparison.stage, "it repeats the question")
    if not same:
        return Verdict("wrong", answer, comparison.stage)
    return Verdict("correct", answer, comparison.stage, convention=", ".join(sorted(comparison.used)))


def _second_opinion(text: str, answer: str) -> Verdict:
    """The verdict where this package cannot read the reference, and the answer is not the same text."""
    if not re.search(r"\\(?!text|mathrm|mbox)[a-zA-Z]", text):
        return Verdict("wrong", answer, "text")
    if symbolic.second_opinion(text, answer):
        return Verdict("correct", answer, "second opinion")
    if _BEYOND.search(text):
        return Verdict("wrong", answer, "second opinion")
    return Verdict("unreadable reference", answer, "reading", f"not known here: {text[:100]}")


def _reference(reference: str) -> tuple[str, Node | None] | str:
    """The reference's text and meaning (None for words), or why it is unreadable."""
    text = reference
    if "####" in text or re.search(r"\\(?:boxed|fbox)", text):
        text = extract(text) or ""
    if len(text) > 2 * MAX_CHARS:
        return f"a reference has at most {MAX_CHARS} characters"
    try:
        meaning = read(text)
        if text.strip() == "nan" or not Comparison().same(meaning, meaning):
            return "it has no value"
        return text, meaning
    except UnreadableError as error:
        plain = clean(text)
        if not re.search(r"\w", plain) or plain.count("{") != plain.count("}"):
            return str(error)
        return text, None


def _plain(text: str) -> str:
    """``text`` without the spaces that mean nothing: all but those between two letters or digits."""
    text = clean(re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text))
    text = re.sub(r"\\[lc]?dots(?![a-zA-Z])|\.\.\.|…", r"\\dots", re.sub(r"([_^])\s*\{(\w)\}(?!\w)", r"\1\2", text))
    return re.sub(r"(?<!\w) | (?!\w)", "", text)


def _words(text: str) -> str | None:
    """``text`` as words in lower case; None unless it is made of words."""
    words = re.sub(
        r"\\(?:text|textbf|textit|mathrm|mbox|textrm|textnormal|rm|bf)\b\s*|[{}.,*]", "", clean(text)
    ).strip()
    return " ".join(words.lower().split()) if re.fullmatch(r"[\w\s:'-]*[a-zA-Z]{2}[\w\s:'-]*", words) else None


def _choice(text: str) -> str | None:
    r"""The letter of a choice: ``B``, ``(B)``, ``\text{(B)}``, ``(B) 12``."""
    words = re.sub(_STYLES, " ", clean(text)).strip("{} ")
    match = re.fullmatch(
        r"(?:(?:option|choice|Option|Choice) )?\(?\s*([A-Z]|[a-e](?=[\s)}]*$))[\s}]*(?:\)|[.:](?=\s|$)|$)[\s}]*(.*)",
        words,
    )
    if match is None or re.match(r"[{} ]*(?:[-+*/=<>^_!(,;]|(?:or|and|not)\b)", match[2]):
        return None
    return match[1].upper() if not match[2] or _readable(match[2]) or _words(match[2]) else None


def _without_letter(answer: str) -> str:
    """The value behind the letter of a choice: ``(B) 12``."""
    match = re.match(r"[\s$]*(?:\\(?:text|textbf|mathrm|mathbf)\s*\{)?\s*\([A-E]\)\s*\}?(?=[\s\\]+[-$0-9\\])", answer)
    return answer[match.end() :] if match and _choice(answer) else answer


def _echoes(text: str, meaning: Node, given: Node, answer: str, prompt: str) -> bool:
    """Whether ``answer`` is the question, or arithmetic with its numbers that nobody has done yet."""
    if is_number(meaning) and unfinished(given):
        numbers = set(re.findall(r"[0-9]+", answer))
        return numbers <= set(re.findall(r"[0-9]+", prompt[-MAX_TAIL:]))
    question = _plain(prompt[-MAX_TAIL:])
    return _compound(given) and _plain(answer) in question and _plain(text) not in question


def _readable(text: str) -> bool:
    try:
        return read(text).kind not in ("list", "relation")
    except UnreadableError:
        return False


def _compound(node: Node) -> bool:
    """Whether something is left to do in the answer: more than a number, a name, or a structure of these."""
    if node.kind in ("list", "set", "tuple", "matrix", "row", "union", "neg", "quantity"):
        return any(map(_compound, node.args))
    return node.kind not in ("number", "symbol", "frac", "mixed", "base", "sqrt", "ratio")

r"""Where in a completion the answer stands.

1. Reasoning between ``<think>`` tags does not count; reasoning that never ends is no answer.
2. The last ``\boxed{…}`` or ``\fbox{…}``. Boxes with nothing but "and", commas or blank space between them are one list,
   and so are boxes with "alternatively" between them. What comes later can take a box back: another stated answer counts
   instead, and words like "wait", "actually" or "or any other" leave no answer.
3. The last statement: ``<answer>…</answer>``, ``#### …``, ``Answer: …``, ``the answer is …``.
4. The whole completion if it reads as an answer, else its last sentence with one: what stands behind "is", "are" or ``=``,
   the only formula, or, by convention, the only number. A question is no answer.
"""

from __future__ import annotations

import re

from rewards.verifiers.math.node import UnreadableError, names
from rewards.verifiers.math.read import read
from rewards.verifiers.reasoning import without_reasoning

MAX_TAIL = 20_000
"""The answer is looked for in so many characters at the end."""

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])")
_BETWEEN = re.compile(
    r"(?:[\s$,;.&*]|\\q?quad\b|\\text\{\s*(?:and|or)\s*\}|\\[,;()\[\] \\]|\b(?:and|or)\b|\b[a-zA-Z](?:_\{?\w\}?)?\s*=){0,40}"
)
_RETRACTED = re.compile(
    r"\b(?:wait|actually,|hmm|scratch that|on second thought|mistaken?|(?:is|was|seems|looks) (?:wrong|incorrect)|try again|"
    r"let me (?:re|try)|not sure|could also be|might (?:also )?be|or (?:any|maybe|perhaps|possibly|something)|"
    r"any other (?:number|value|answer)|"
    r"nope|never ?mind|oops|sorry(?=,)|correction(?=:)|I (?:forgot|missed|overlooked))\b|"
    r"\bno[,!] |\b(?:this|that|which|it) (?:does ?n[o\u2019']t work|fails)",
    re.IGNORECASE,
)
_ALTERNATIVE = re.compile(r"\balternatively\b", re.IGNORECASE)
_OR = re.compile(
    r"^[\s$.,()*\]\\]*or\b(?! (?:equivalently|approximately|about|simply|roughly|else|in\b))", re.IGNORECASE
)
_STATED = re.compile(
    r"<answer>|####|(?<!expected )(?<!reference )\banswers?\b(?: choice)?(?: to [^.:\n]{0,80})?"
    r"[\s*_]*(?:\bis\b|\bare\b|:|=)[\s*_]*:?",
    re.IGNORECASE,
)
_CONCLUDED = re.compile(r"(?:^|[.!$)\]]\s|\n)[\s*]*((?:so|thus|therefore|hence)\b[^\n]{0,80})$", re.IGNORECASE)
_SENTENCE_END = re.compile(
    r"(?<!\.)[.!](?=[\s*_)\"”]|$)[*_)\"”]*\s*|\n\s*\n|(?<=[^\s,:=+\-&{(\\])\n(?=\s*[A-Z*])|(?<=[a-z]\?)\s+|(?<=\$\$|\\\]|\ue000\$)\s+(?=[A-Z])"
)
_MATHS = re.compile(
    r"\$\$(?P<a>[^$]+)\$\$|(?<!\\)\$(?P<b>[^$\n]+(?:\n[^$\n]+)*)(?<!\\)\$|\\\[(?P<c>.{1,2000}?)\\\]|\\\((?P<d>.{1,2000}?)\\\)",
    re.DOTALL,
)
_CONNECTIVE = re.compile(
    r"\b(?:is|are|equals|be|get|gives|obtain|have|has|to|exactly|approximately|about)\b"
    r"(?: (?:equal to|therefore|thus|simply|just|then))?[\s*:]*|[:=]\s*",
    re.IGNORECASE,
)
_INTRODUCED = re.compile(r"\s*\\(?:text|mathrm|mbox)\{[^{}]*(?:\b(?:is|are)|[=:])\s*\}")
_PROSE = re.compile(r"[a-zA-Z ,'’-]{3,}")
_NOT_BUT = re.compile(r"^not \S{0,20}[0-9]\S{0,20} but (?:rather )?")
_SECOND = re.compile(r"[^a-zA-Z]{1,80} (?:and|but|while) (?:the|its?|this|that)\b.*\b(?:is|are|=)", re.DOTALL)
_COUNTED = re.compile(r"[^a-zA-Z]*[0-9][^a-zA-Z]* [a-zA-Z ,'-]+ and [a-zA-Z ,'-]+")
_COUNT = re.compile(r"(\$?[0-9][0-9,.]*\$?(?: [a-z]{3,20}){1,4}?) (?:to|of|for|with|such|that)\b[^0-9$\\]*")
_MORE = re.compile(
    r"\b(?:more|less|fewer|times|or|and|but|not|no|if|unless|power|base|each|per|every|wrong|(?:one|two|three|four|five|six))\b"
)
_DENIED = re.compile(
    r"(?:\bnot|cannot|n['’]t|\bnever|rather than|instead of)\s*(?:equal to|equals?|be|exactly|necessarily)?[\s$\\(\[]*$",
    re.IGNORECASE,
)
_BOUND = re.compile(
    r"(?:at (?:least|most)|(?:more|less|fewer|greater|smaller|larger|higher|lower|other) than|between|up to|"
    r"under|over|above|below)"
    r"\s*(?:or equal to)?\s*$",
    re.IGNORECASE,
)
_CONDITION = re.compile(r"\b(?:if|unless|or)\b", re.IGNORECASE)
_REASON = re.compile(
    r",?\s+(?:because|since|as|which|so|where|for)\b|,?\s*\((?:about|approximately|approx|roughly|i\.e|since|because)\b",
    re.IGNORECASE,
)
_CHOSEN = re.compile(r"[\s$*]*(?:\\text(?:bf)?\{)?\s*\([A-E]\)")
_LISTED = re.compile(r"\b(?:option|guess|possibility|candidate|attempt|answer) ?#?[0-9]+\b", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?<![\w.,\\^])[-+]?\\?[$€£]?\s?(?:[0-9]+(?:[,.][0-9]+)*|\.[0-9]+)"
    r"(?:\s?/\s?[0-9]+)?(?:\s?\\?(?:%|percent))?(?![0-9])"
)
_CLOSING = re.compile(
    r"^\W*(?:i hope|let me know|please|note\b|thank|this (?:is|completes)|q\.?e\.?d|\[note)", re.IGNORECASE
)


def extract(completion: str, prompt: str = "", last_number: bool = False) -> str | None:
    """The text of the answer, or None if there is none.

    Example:
        >>> extract("We add: $\\\\boxed{5}$."), extract("So the total is 5 km."), extract("<think> \\\\boxed{5}")
        ('5', '5 km', None)
    """
    text = without_reasoning(completion, prompt)
    if text is None:
        return None
    if len(text) > MAX_TAIL:
        text = text[-MAX_TAIL:].partition("\n")[2] or ""
    text = re.sub(r"\[asy\].*?\[/asy\]|<<[^<>]*>>", " ", text, flags=re.DOTALL)  # drawings, GSM8K's calculator
    text = re.sub(r"^\s*<\|im_start\|>\w*", "", text)
    text = re.split(r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text)\|>", text)[0].strip()
    boxes = [box for box in _boxes(text) if not _DENIED.search(text, max(0, box[0] - 40), box[0])]
    if boxes:
        return _boxed(text, boxes, last_number)
    stated = _statement(text, last_number)
    return stated if stated is not None else _last_sentence(text, last_number)


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """Start, end and content of every box, of nested ones the outer; one that is never closed is empty."""
    boxes: list[tuple[int, int, str]] = []
    for match in _BOX.finditer(text):
        if boxes and match.start() < boxes[-1][1]:
            continue
        at = match.end()
        while text[at : at + 1].isspace():
            at += 1
        end = _closing_brace(text, at) if text[at : at + 1] == "{" else None
        if end is not None:
            boxes.append((match.start(), end + 1, text[at + 1 : end]))
        elif text[at : at + 1] == "{":
            boxes.append((match.start(), len(text), ""))  # cut off
        elif bare := re.match(r"-?[0-9.]+|\w", text[at : at + 50]):
            boxes.append((match.start(), at + bare.end(), bare[0]))
    return boxes


def _closing_brace(text: str, at: int) -> int | None:
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, at):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return match.start()
        if match.start() - at > 5_000:
            return None
    return None


def _boxed(text: str, boxes: list[tuple[int, int, str]], last_number: bool) -> str | None:
    _, end, content = boxes[-1]
    if not content.strip():
        return None
    behind = text[end:]
    later = _statement(behind, last_number)
    if later is None and (concluded := _CONCLUDED.search(behind.strip()[-120:])):
        later = _answer_in(concluded[1].rstrip("."), last_number)
        later = later if later and _has_value(later) else None
    if later is not None and _has_answer(later):
        return later
    if _RETRACTED.search(behind) or _OR.search(behind):
        return None
    together = [content]
    for (_, before_end, before), (begin, _, _) in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = text[before_end:begin]
        if not _BETWEEN.fullmatch(between) and (not _ALTERNATIVE.search(between) or _RETRACTED.search(between)):
            break
        together.insert(0, before)
    if len(together) == 1 and not _has_answer(content) and (introduced := _INTRODUCED.match(content)):
        return content[introduced.end() :]
    unit = re.match(r"\s*\$?\s*(\\?%|percent|pct)", behind)
    return ", ".join(together) + (f" {unit[1]}" if unit and len(together) == 1 and "%" not in content else "")


def _has_answer(text: str) -> bool:
    try:
        return read(text) is not None
    except UnreadableError:
        return False


def _has_value(text: str) -> bool:
    """Whether ``text`` is a value without names, or one that is given to a name."""
    try:
        node = read(text)
    except UnreadableError:
        return False
    return not names(node.args[1] if node.kind == "relation" and node.text == "=" else node)


def _statement(text: str, last_number: bool) -> str | None:
    """What the last "answer is" says."""
    marks = [mark for mark in _STATED.finditer(text) if text[mark.end() :].strip(" \n*_$.")]
    if not marks:
        return None
    mark = marks[-1]
    rest = text[mark.end() :].lstrip()
    if mark[0].lower() == "<answer>":
        inner = re.split("</answer>", rest, maxsplit=1, flags=re.IGNORECASE)[0].strip()
        return _answer_in(inner, last_number) or inner or None
    if _RETRACTED.search(rest):
        return None
    clause = _NOT_BUT.sub("", _clause(rest))
    if clause.endswith("?"):
        return None
    if _SECOND.match(clause):
        return clause
    return _answer_in(clause, last_number) or (clause if len(clause) <= 100 else None)


def _clause(rest: str) -> str:
    """The first sentence or formula of ``rest``."""
    formula = _MATHS.match(rest)
    begin = formula.end() if formula else 0
    if not formula and (environment := re.match(r"\\begin\{(\w+)\*?\}", rest)):
        begin = max(0, rest.find(f"\\end{{{environment[1]}"))
    cut = _SENTENCE_END.search(rest, begin)
    line = rest.find("\n", begin)
    stops = [stop for stop in (cut.start() if cut else -1, line) if stop > 0]
    return rest[: min(stops)].strip() if stops else rest.strip()


def _last_sentence(text: str, last_number: bool) -> str | None:
    """The answer of the last sentence that has one."""
    whole = text.strip().strip("*_ ")
    if not whole or whole.endswith("?"):
        return None
    if len(whole) <= 300 and (
        _has_answer(whole) or ("\n" not in whole and not _MATHS.search(whole) and len(whole.split()) <= 3)
    ):
        return whole
    sentences = [s for s in _SENTENCE_END.split(_protected(text)) if s and s.strip()]
    for sentence in sentences[:-5:-1]:
        sentence = _restored(sentence).strip()
        if sentence.endswith("?") or _RETRACTED.search(sentence) or _LISTED.search(sentence):
            return None
        if _CLOSING.match(sentence):
            continue
        if answer := _answer_in(sentence, last_number):
            return answer
        if re.search(r"[0-9]", sentence):
            return None  # several numbers, none of them stated
        if len(sentence.split()) <= 3 and not sentence.endswith((".", "!", ":")):
            return None  # an answer in words below another one
    return None


def _protected(text: str) -> str:
    """``text`` with the full stops and line breaks inside formulas hidden from the search for sentences."""
    return _MATHS.sub(lambda m: m[0].replace(".", "\ue000").replace("\n", "\ue001").replace("!", "\ue002"), text)


def _restored(text: str) -> str:
    return text.replace("\ue000", ".").replace("\ue001", "\n").replace("\ue002", "!")


def _answer_in(sentence: str, last_number: bool) -> str | None:
    """The answer that one sentence gives."""
    sentence = sentence.strip().strip("*_").strip()
    if not sentence or len(sentence) > 3_000 or sentence.endswith("?"):
        return None
    if _has_answer(sentence) or _CHOSEN.match(sentence):
        return sentence
    reason = _REASON.search(sentence)
    if reason and _has_answer(sentence[: reason.start()]):
        return sentence[: reason.start()]
    if count := _count(sentence):
        return count
    formulas = list(_MATHS.finditer(sentence))
    for match in reversed(list(_CONNECTIVE.finditer(sentence))[-6:]):
        if _DENIED.search(sentence, 0, match.end()):
            return None
        rest = sentence[match.end() :].strip()
        inside = any(formula.start() < match.start() < formula.end() for formula in formulas)
        if rest and not inside and not _PROSE.fullmatch(rest) and not _COUNTED.fullmatch(rest) and _has_answer(rest):
            return rest
        if count := _count(rest):
            return count
    return _only_formula(sentence, formulas) if formulas else _only_number(sentence) if last_number else None


def _count(text: str) -> str | None:
    """``12 ways`` of ``12 ways to do it``."""
    match = _COUNT.fullmatch(text)
    return match[1] if match and not _MORE.search(text) and _has_answer(match[1]) else None


def _only_formula(sentence: str, formulas: list[re.Match[str]]) -> str | None:
    """The formula of a sentence without other numbers, or its last one behind an "is"."""
    last = formulas[-1]
    if not _has_answer(last[0]):
        return None
    if len(formulas) == 1:
        return None if re.search("[0-9]", _MATHS.sub(" ", sentence)) else last[0]
    return last[0] if _CONNECTIVE.search(sentence, formulas[-2].end(), last.start()) else None


def _only_number(sentence: str) -> str | None:
    """The number of a sentence with only one, or with only one behind its last equals sign."""
    sentence = sentence.rpartition("=")[2]
    numbers = {match[0].strip(): match for match in _NUMBER.finditer(sentence)}
    if len(numbers) != 1:
        return None
    text, match = numbers.popitem()
    before = sentence[: match.start()]
    taken_back = _DENIED.search(before) or _BOUND.search(before) or _CONDITION.search(sentence, match.end())
    return None if taken_back else text

"""The 25 instructions of IFEval (arXiv:2311.07911) and their checks, as the authors' ``instructions.py`` has them.

A check is a function of the text and of its instruction's arguments, under their official names. Its search takes linear
time, but for patterns that are arguments: those have a deadline.
"""

from __future__ import annotations

import inspect
import json
import operator
import re
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from typing import Any

import regex  # type: ignore[import-untyped]  # not re: its searches can be stopped, and from any thread

from rewards.verifiers.ifeval.text import (
    LANGUAGES,
    count_capital_words,
    count_sentences,
    detect_language,
    language_detectors,
)
from rewards.verifiers.regex import SECONDS

Check = Callable[[str], bool]
Relation = Callable[[int, int], bool]


def _existence(text: str, keywords: list[Any]) -> bool:
    return all(pattern.search(text, timeout=SECONDS) for pattern in keywords)


def _frequency(text: str, keyword: Any, frequency: int, relation: Relation) -> bool:
    return relation(len(keyword.findall(text, timeout=SECONDS)), frequency)


def _forbidden_words(text: str, forbidden_words: list[Any]) -> bool:
    return not any(pattern.search(text, timeout=SECONDS) for pattern in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return let_relation(text.lower().count(letter), let_frequency)


def _response_language(text: str, language: str) -> bool:
    return detect_language(text) in (language, None)


def _number_sentences(text: str, num_sentences: int, relation: Relation) -> bool:
    return relation(count_sentences(text), num_sentences)


def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    return _count_pieces(text.split("***")) == num_paragraphs


def _number_words(text: str, num_words: int, relation: Relation) -> bool:
    return relation(len(re.findall(r"\w+", text)), num_words)


def _nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = text.split("\n\n")
    if sum(bool(paragraph.strip()) for paragraph in paragraphs) != num_paragraphs:
        return False
    words = paragraphs[nth_paragraph - 1].split(maxsplit=1)  # blank ones count here
    return bool(words) and re.split("[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0].lower() == first_word


def _number_placeholders(text: str, num_placeholders: int) -> bool:
    # The closing bracket is optional here so that a line of opening ones is read once, not once for each.
    return sum(found.endswith("]") for found in re.findall(r"\[[^\]\n]*\]?", text)) >= num_placeholders


def _postscript(text: str, postscript_marker: Any) -> bool:
    return postscript_marker.search(text.lower(), timeout=SECONDS) is not None


def _number_bullet_lists(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^[^\S\n]*\*[^*].*", text, re.MULTILINE)
    return len(stars) + len(re.findall(r"^[^\S\n]*-", text, re.MULTILINE)) == num_bullets


def _constrained_response(text: str) -> bool:
    return any(option in text for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def _number_highlighted_sections(text: str, num_highlights: int) -> bool:
    single = [found.strip("*") for found in re.findall(r"\*[^\n*]*\*", text)]
    double = [found[2:-2] for found in re.findall(r"\*\*[^\n*]*\*\*", text)]
    return sum(bool(found.strip()) for found in single + double) >= num_highlights


def _multiple_sections(text: str, section_spliter: Any, num_sections: int) -> bool:
    return len(section_spliter.split(text, timeout=SECONDS)) - 1 >= num_sections


def _json_format(text: str) -> bool:
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    return any(map(_has_title, text.split("\n")))


def _has_title(line: str) -> bool:
    start, end = line.find("<<"), line.rfind(">>")
    return 0 <= start < end - 2 and bool(line[start : end + 2].lstrip("<").rstrip(">").strip())


def _two_responses(text: str) -> bool:
    pieces = text.split("******")
    return _count_pieces(pieces) == 2 and len({piece.strip() for piece in pieces if piece.strip()}) == 2


def _repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_word_frequency(text: str, capital_frequency: int, capital_relation: Relation) -> bool:
    return capital_relation(count_capital_words(text), capital_frequency)


def _english_capital(text: str) -> bool:
    return text.isupper() and _response_language(text, "en")


def _english_lowercase(text: str) -> bool:
    return text.islower() and _response_language(text, "en")


def _no_comma(text: str) -> bool:
    return "," not in text


def _count_pieces(pieces: list[str]) -> int:
    """How many pieces a divider makes. A blank one may stand first or last, and does not count; elsewhere none do: -1."""
    blank = [not piece.strip() for piece in pieces]
    return -1 if any(blank[1:-1]) else blank.count(False)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not blank")
    return value


def _letter(value: Any) -> str:
    if len(_text(value)) != 1:
        raise ValueError("one letter")
    return value.lower()


def _language(value: Any) -> str:
    if value not in LANGUAGES:
        raise ValueError(f"one of the languages {', '.join(sorted(LANGUAGES))}")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError("an integer of at least 0")
    return int(value)


def _relation(value: Any) -> Relation:
    if value not in ("less than", "at least"):
        raise ValueError("'less than' or 'at least'")
    return operator.lt if value == "less than" else operator.ge


def _pattern(value: Any, template: str = "{}", flags: int = regex.IGNORECASE) -> Any:
    """The checkers put words into their regular expressions as they are: a dot in one stands for any character."""
    try:
        return regex.compile(template.format(_text(value)), flags)
    except regex.error as error:
        raise ValueError(f"a regular expression ({error})") from None


def _patterns(values: Any, template: str = "{}") -> list[Any]:
    if not isinstance(values, list | tuple) or not values:
        raise ValueError("a list of words")
    return [_pattern(value, template) for value in values]


def _marker(value: Any) -> Any:
    known = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    marker = _text(value).strip()
    return _pattern(known.get(marker, marker.lower()), flags=0)


_READERS: dict[str, Callable[[Any], Any]] = {
    "keywords": _patterns,
    "keyword": lambda value: _pattern(_text(value).strip()),
    "forbidden_words": partial(_patterns, template=r"\b{}\b"),
    "letter": _letter,
    "language": _language,
    "first_word": lambda value: _text(value).lower(),
    "postscript_marker": _marker,
    "section_spliter": lambda value: _pattern(_text(value).strip(), r"{}\s?\d+", flags=0),
    "prompt_to_repeat": _text,
    "end_phrase": _text,
    "relation": _relation,
    "let_relation": _relation,
    "capital_relation": _relation,
}
"""How arguments are read, by name; all others are counts."""

_CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat_prompt,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "punctuation:no_comma": _no_comma,
}

_DETECTING = (_response_language, _english_capital, _english_lowercase)


def read_instruction(name: str, kwargs: Mapping[str, Any] | None) -> Check:
    """The check of one instruction.

    Args:
        name: its official id.
        kwargs: its official arguments; those that are None do not count. (The official checkers draw missing and invalid
            ones at random. Here they are errors.)

    Raises:
        ValueError: an unknown id, arguments that are missing, too many or not what they should be.
        ImportError: the check detects languages and langdetect is not installed.

    Example:
        >>> read_instruction("length_constraints:number_words", {"num_words": 3, "relation": "less than"})("Two words")
        True
    """
    if name not in _CHECKS:
        raise ValueError(f"no instruction is named {name!r}; known: {', '.join(_CHECKS)}")
    check = _CHECKS[name]
    if not isinstance(kwargs, Mapping | None):
        raise ValueError(f"{name} takes a mapping of arguments, got {kwargs!r}")
    given = {key: value for key, value in (kwargs or {}).items() if value is not None}
    needed = [key for key in inspect.signature(check).parameters if key != "text"]
    if set(given) != set(needed):
        raise ValueError(f"{name} takes {', '.join(needed) or 'no arguments'}; got {', '.join(given) or 'none'}")
    read = {key: _read(name, key, given[key]) for key in needed}
    if check is _nth_paragraph_first_word and not 1 <= read["nth_paragraph"] <= read["num_paragraphs"]:
        raise ValueError(f"{name}: nth_paragraph must be one of num_paragraphs, got {kwargs!r}")
    if check in _DETECTING:
        language_detectors()
    return partial(check, **read)


def _read(name: str, key: str, value: Any) -> Any:
    try:
        return _READERS.get(key, _count)(value)
    except ValueError as error:
        raise ValueError(f"{name}: {key} must be {error}, got {value!r}") from None

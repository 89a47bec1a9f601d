"""How IFEval counts in a text: sentences, words in capitals, and its language."""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import Any


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CLOSERS = "\"'”’)]}*_"
_OPENERS = "\"'“‘([{*_"
_BEFORE_NAMES = _words("mr mrs ms mx dr prof st gen col capt lt sgt rev hon gov sen rep vs cf e.g i.e")
_ABBREVIATIONS = _words(
    "etc inc ltd co corp jr sr no vol fig ed dept est approx ave blvd a.m p.m u.s u.k u.n d.c ph.d b.c a.d"
)


def count_sentences(text: str) -> int:
    """How many sentences ``text`` has.

    The official checker uses NLTK's Punkt model for English, which has to be downloaded. This is a rule of its kind: a
    sentence ends with a word in ``.``, ``!`` or ``?``, quotes and brackets behind it left aside, or with the text; not
    with an abbreviation or an initial before a name, and with ``etc.``, a number or an ellipsis only before a capital.
    So, as there, lines without punctuation are one sentence, and the ``1.`` of a list is one of its own. It differs
    where Punkt has learned which words are abbreviations or begin sentences (``plan B. Then`` is two there), and where
    Punkt breaks on what is no closing mark to it: ``**Done.**`` is two there, ``“Go.” Then`` one.

    Example:
        >>> count_sentences("Dr. Lee left at 3.15 p.m. on foot. Why? He was ill."), count_sentences("one\\ntwo")
        (3, 1)
    """
    words = text.split()
    return bool(words) + sum(_ends_sentence(word, following) for word, following in pairwise(words))


def _ends_sentence(word: str, following: str) -> bool:
    word = word.rstrip(_CLOSERS)
    if not word.endswith("."):
        return word.endswith(("!", "?"))
    stem = word[:-1].lstrip(_OPENERS).lower()
    if stem in _BEFORE_NAMES or (len(stem) == 1 and stem.isalpha() and stem != "i"):
        return False
    if stem in _ABBREVIATIONS or stem.isdecimal() or stem.endswith("."):
        return following.lstrip(_OPENERS)[:1].isupper()
    return True


# What stands between words, and the words that the Penn Treebank's convention takes apart.
_BETWEEN = re.compile(r"[;@#$%&?!*`\"()<>{}\[\]«»“”„‘’\u2012-\u2015]|[:,](?![0-9])|''|--|\.{2,}")
_CLITIC = re.compile(r"(?<=[^'\s])(?=(?:'[sSmMdD]|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)\.?(?!\S))")
_CONTRACTION = re.compile(
    r"\b(?:can(?=not\b)|d(?='ye\b)|gim(?=me\b)|gon(?=na\b)|got(?=ta\b)|lem(?=me\b)|more(?='n\b)|wan(?=na(?!\S)))", re.I
)


def count_capital_words(text: str) -> int:
    """How many words of ``text`` have capitals only, words being those of NLTK's tokeniser, as in the official checker.

    A word with a hyphen is one. ``I'm`` and ``IT'S`` are two words each, of which one and two are in capitals.

    Example:
        >>> count_capital_words("I'm at the CD-ROM drive, NASA: **IT'S** 5 PM")
        6
    """
    text = _BETWEEN.sub(" ", text)
    text = _CLITIC.sub(" ", text)
    text = _CONTRACTION.sub(r"\g<0> ", text)
    return sum(word.isupper() for word in text.split())


LANGUAGES = _words("ar bg bn de en es fa fi fr gu he hi it ja kn ko ml mr ne pa pl pt ru sw ta te th uk ur vi")
"""The languages that IFEval asks for, as ISO 639-1 codes."""
MAX_CHARS = 100_000
"""The language is detected by the start of longer texts. The detector itself reads the first 10,000, links left out."""


def detect_language(text: str) -> str | None:
    """The ISO 639-1 code of the language of ``text`` by langdetect, the same for the same text; None if there is none to
    detect, as in ``"123"``.

    Raises:
        ImportError: langdetect is not installed.

    Example:
        >>> detect_language("Das ist ein kurzer Satz auf Deutsch."), detect_language("123")
        ('de', None)
    """
    from langdetect import LangDetectException  # type: ignore[import-untyped]

    detector = language_detectors().create()
    try:
        detector.append(text[:MAX_CHARS])
        return detector.detect()
    except LangDetectException:
        return None


@lru_cache(maxsize=1)
def language_detectors() -> Any:
    """langdetect's factory of detectors, ours alone: the seed of the shared one is for others to set."""
    try:
        from langdetect.detector_factory import (  # type: ignore[import-untyped]
            PROFILES_DIRECTORY,
            DetectorFactory,
        )
    except ImportError as error:
        raise ImportError('detecting languages needs langdetect: pip install "textenv[ifeval]"') from error
    factory = DetectorFactory()
    factory.load_profile(PROFILES_DIRECTORY)
    factory.set_seed(0)
    return factory

"""Texts of models and data sets, which nobody has looked at, made safe to show."""

from __future__ import annotations

import html
import re
import unicodedata
from typing import Any

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""characters that turn the direction of what follows them, so that it reads as something else"""
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&$]|(?<=:)/(?=/)|(?<=www)\.|^[#+=-]|(?<=^\d)[.)](?= |$))")
"""what formats, begins a list or a heading, or makes a link"""


def visible(text: Any) -> str:
    """``text`` with nothing in it that acts: control characters as their pictures, half characters and turned directions as �.

    Line breaks and tabs stay.

    Example:
        >>> visible("\x1b[31mred\x00")
        '␛[31mred␀'
    """
    text = str(text)
    return text if text.isascii() and text.isprintable() else "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if character in BIDI or unicodedata.category(character) in ("Cc", "Cs", "Cn"):
        return "\ufffd"
    return "\n" if character in "\u2028\u2029" else character


def shortened(text: str, longest: int) -> str:
    """``text``, its middle left out where it is longer than ``longest`` characters, with a word on how much.

    Example:
        >>> shortened("0123456789", 4)
        '01 … 6 characters left out … 89'
    """
    if len(text) <= longest:
        return text
    head, tail = (longest + 1) // 2, longest // 2
    return f"{text[:head]} … {len(text) - longest:,} characters left out … {text[len(text) - tail :]}"


def html_text(text: Any) -> str:
    """``text`` for the body or an attribute of the page."""
    return html.escape(visible(text))


def markdown_text(text: Any) -> str:
    r"""``text`` for a line or a table cell of markdown, where nothing of it formats, links or is HTML.

    Example:
        >>> print(markdown_text("<b>|*a* 1.5"))
        \<b\>\|\*a\* 1.5
    """
    return _MARKDOWN.sub(r"\\\1", " ".join(visible(text).split()))

"""Texts of models and data sets, which nobody has looked at, made safe to show in a terminal."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
"""characters that turn the direction of what follows them, so that it reads as something else"""


def visible(text: Any) -> str:
    """``text`` with nothing in it that acts: control characters as their pictures, half characters and turned directions as �.

    Line breaks and tabs stay.

    Example:
        >>> visible("\\x1b[31mred\\x00")
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


def plain(text: Any) -> Text:
    """``text`` for a table or a console of rich, where nothing in it is markup, and nothing acts.

    Example:
        >>> plain("[red]\\x1b[31mred").plain
        '[red]␛[31mred'
    """
    from rich.text import Text

    return Text(visible(text))

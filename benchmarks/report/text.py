"""Texts of models and data sets, which nobody has looked at, made safe to show."""

from __future__ import annotations

import html
import re
from typing import Any

from rewards.terminal import visible

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|~&$]|(?<=:)/(?=/)|(?<=www)\.|^[#+=-]|(?<=^\d)[.)](?= |$))")
"""what formats, begins a list or a heading, or makes a link"""


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

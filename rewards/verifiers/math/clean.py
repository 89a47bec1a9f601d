"""One spelling for a text: LaTeX in its variants, Unicode and plain text."""

from __future__ import annotations

import re
import unicodedata

from rewards.verifiers.math.vocabulary import GREEK

_SUPER = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
_SUB = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SIGNS = {
    **dict.fromkeys("−–—‐‑", "-"),
    **dict.fromkeys("·⋅∙•", r"\cdot "),
    **dict.fromkeys("°º", r"^\circ "),
    "×": r"\times ",
    "✕": r"\times ",
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "€": r"\euro ",
    "£": r"\pounds ",
    "′": "'",
    "’": "'",
}
for _name in GREEK:
    _of = "CAPITAL" if _name[0].isupper() else "SMALL"
    _letter = {"Lambda": "LAMDA"}.get(_name.capitalize(), _name.upper())
    if _name not in ("varepsilon", "varphi", "ell", "hbar"):
        _SIGNS[unicodedata.lookup(f"GREEK {_of} LETTER {_letter}")] = f"\\{_name} "
_SIGN = re.compile("[" + re.escape("".join(_SIGNS)) + "]")
_DROPPED = re.compile(
    r"\\(?:(?:left|right)(?:\.|(?![a-zA-Z]))|[bB]igg?[lrm]?(?![a-zA-Z])|(?:displaystyle|textstyle|limits|nolimits|hline"
    r"|mathstrut|strut|null|allowbreak|nonumber|notag|normalsize|large|Large|small|phantom\{[^{}]*\})(?![a-zA-Z]))"
)
_SPACE = re.compile(r"(?<!\\)\\(?:[,;:> ~]|q?quad|hspace\*?\{[^{}]*\}|vspace\*?\{[^{}]*\})|[~\s]+")
_ESCAPED = re.compile(  # LaTeX that went through one round of escaping too many
    r"(?<!\\)\\\\(?=(?:d?frac|sqrt|left|right|pi|text|cdot|times|infty|leq?|geq?|in|cup|pm|boxed|begin|end|circ|theta)(?![a-zA-Z]))"
)
_GROUPED = re.compile(r"\s*\{\s*,\s*\}\s*|,\s*\\!\s*")
_LINES = re.compile(
    r"\\begin\{(?:aligned|align\*?|gathered|split)\}(.{0,2000}?)\\end\{(?:aligned|align\*?|gathered|split)\}", re.DOTALL
)
_COMMA = "\x00"  # a comma that can only be a thousands separator


def clean(text: str) -> str:
    r"""``text`` in one spelling: ASCII and LaTeX commands, no delimiters of mathematics, one space where there were any.

    Example:
        >>> clean("\\left( \\dfrac12 ,\\; π² \\right).")
        '( \\dfrac12 , \\pi ^{2} )'
    """
    text = re.sub(r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+", lambda m: "^{" + m[0].translate(_SUPER) + "}", text)
    text = re.sub(r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: "_{" + m[0].translate(_SUB) + "}", text)
    text = re.sub(
        "[¼½¾⅐-⅞]", lambda m: " \\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text
    )
    text = _SIGN.sub(lambda m: _SIGNS[m[0]], text)
    text = _SIGN.sub(lambda m: _SIGNS[m[0]], unicodedata.normalize("NFKC", text))
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in text)
    text = _LINES.sub(lambda m: _joined(m[1]), text)
    text = _ESCAPED.sub(r"\\", text)
    text = re.sub(r"\\[()\[\]]", " ", re.sub(r"\\\\\s*\[[^\]]{0,8}(?:pt|em|ex|mm|cm)\]", r"\\\\", text))
    price = text.count("$") == 1  # a single sign cannot limit a formula
    text = re.sub(r"\\?\$", r"\\$", text) if price else re.sub(r"(?<!\\)((?:\\\\)*)\$", r"\1 ", text)
    text = _GROUPED.sub(_COMMA, text).replace(r"\!", "")
    text = _SPACE.sub(" ", _DROPPED.sub(" ", text)).strip()
    text = text.replace(_COMMA, "{,}").replace("  ", " ")
    return _without_trimmings(text)


def _joined(lines: str) -> str:
    r"""Aligned ``lines`` as one: a list, or a chain where a line begins with ``=``."""
    if "\\begin" in lines:
        return lines
    lines = re.sub(r"\\\\\s*$", "", lines.replace("&", " ").strip())
    return re.sub(r"\\\\", ", ", re.sub(r"\\\\(?=\s*=)", " ", lines))


def _without_trimmings(text: str) -> str:
    """Without markdown emphasis, quotes and a full stop around it."""
    for _ in range(4):  # what is wrapped deeper is no answer
        text = text.strip().strip('`"“”').strip()
        text = re.sub(r"^(?:\*\*|__)\s*(?=\S)|(?<=[^*\s])\s*(?:\*\*|__)$", "", text)
        if text[-1:] in (".", ",", ";") and not text.endswith(("..", "\\,", "\\;")):
            text = text[:-1]
        if text[-2:] == "\\\\" or text[-1:] == "\\":
            text = text[:-1]
    return text

"""A text cut into numbers, names, signs and words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rewards.verifiers.math.node import UnreadableError
from rewards.verifiers.math.vocabulary import ALIASES, FUNCTIONS, PLAIN, PROSE, TEXT, UNITS

_TOKEN = re.compile(
    r"""(?P<number> [1-9][0-9]{0,2} (?: \{,\} [0-9]{3} )+ (?![0-9]) (?:\.[0-9]+)?
                  | [1-9][0-9]{0,2} (?: [ ] [0-9]{3} )+ (?! [0-9] | [ ]?/ ) (?:\.[0-9]+)?
                  | (?: [0-9]+ (?: \.[0-9]+ | \.(?=\\(?:overline|bar|dot)\b) )? | \.[0-9]+ )
                    (?: [eE][+-]?[0-9]{1,4} (?![0-9a-zA-Z]) )? )
      | (?P<command> \\[a-zA-Z]+ | \\. )
      | (?P<letters> [a-zA-Z]+ '* )
      | (?P<sign> \*\* | <= | >= | != | == | \S )
      | [ ]+""",
    re.VERBOSE,
)
_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?")


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the text."""

    kind: str  # number, name (a command or word with a meaning), letters, sign, text
    text: str
    spaced: bool = False  # white space stands before it


def tokens(text: str) -> list[Token]:
    tokens: list[Token] = []
    depth = at = 0
    spaced = False
    while at < len(text):
        match = _TOKEN.match(text, at)
        assert match is not None
        kind, piece, end = match.lastgroup, match[0], match.end()
        if kind is None:
            spaced, at = True, end
            continue
        if kind == "number" and depth == 0 and (grouped := _THOUSANDS.match(text, at)):
            piece, end = grouped[0], grouped.end()
        if kind == "command":
            name = piece[1:]
            if name in TEXT or name in ("operatorname", "pmod", "color", "textcolor"):
                content, end = _braced(text, end)
                if name in ("color", "textcolor"):
                    at = end
                    continue
                tokens += _from_text(f"mod {content}" if name == "pmod" else content, spaced)
            else:
                name = ALIASES.get(name, name)
                if name == "{":
                    tokens.append(Token("sign", "\\{", spaced))
                elif name == "}":
                    tokens.append(Token("sign", "\\}", spaced))
                elif name == "\\":
                    tokens.append(Token("sign", "\\\\", spaced))
                else:
                    tokens.append(Token("name" if name.isalpha() else "sign", name, spaced))
        elif kind == "letters":
            tokens += _letters(piece, spaced)
        else:
            tokens.append(Token(kind, piece, spaced))
        if kind in ("command", "sign"):
            depth += piece in ("(", "[", "{", "\\{", "\\langle", "\\lbrace", "\\lbrack", "\\begin")
            depth -= piece in (")", "]", "}", "\\}", "\\rangle", "\\rbrace", "\\rbrack", "\\end")
        at, spaced = end, False
    return tokens


def _braced(text: str, at: int) -> tuple[str, int]:
    """The content of the braces that open at ``at``, or the one character there, and where it ends."""
    while text[at : at + 1] == " ":
        at += 1
    if text[at : at + 1] != "{":
        return text[at : at + 1], at + 1
    depth = 0
    for end in range(at, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[at + 1 : end], end + 1
    raise UnreadableError("an opening brace is never closed")


def _from_text(content: str, spaced: bool) -> list[Token]:
    """What stands in ``\\text{…}``: words, unless it is mathematics after all (``\\text{13}``, ``\\text{(B)}``)."""
    plain = content.strip()
    if plain in ("and", "or", ",", ", and", "and/or", ", or", ";"):
        return [Token("sign", "or" if "or" in plain else ",", True)]
    if re.fullmatch(r"[A-Z](?:(?:,| and|, and) [A-Z])+", plain):
        return tokens(plain)
    if plain in ("m", "g", "s", "h", "l", "L"):
        return [Token("text", plain, spaced)]
    if plain.isalpha() and (len(plain) == 1 or plain in FUNCTIONS or plain.lower() in ("or", "and")):
        return [Token("name" if len(plain) > 1 else "letters", plain, spaced)]
    if plain in (".", "!"):
        return []
    if re.fullmatch(r"[0-9][0-9.,]* ?[a-zA-Z ]+", plain) or (plain and not re.search("[a-zA-Z]{2}|[/^]", plain)):
        return tokens(plain)
    return [Token("text", content.strip(), spaced)] if plain else []


def _letters(run: str, spaced: bool) -> list[Token]:
    low = run.lower()
    if low in PROSE and not run.isupper():
        return [Token("text", run, spaced)]
    if low in ("and", "or"):
        return [Token("sign", "or" if low == "or" else ",", True)]
    name = ALIASES.get(run, ALIASES.get(low, run)) if len(run) > 2 else run
    if name in PLAIN or name == "oo":
        return [Token("name", name, spaced)]
    if name in ("%", "circ"):
        return [Token("name" if name == "circ" else "sign", name, spaced)]
    if ((low in UNITS and len(run) > 1) or len(run.strip("'")) > 3) and not run.isupper():
        return [Token("text", run, spaced)]
    letters = re.findall("[a-zA-Z]'*", run)
    return [Token("letters", letter, spaced and n == 0) for n, letter in enumerate(letters)]

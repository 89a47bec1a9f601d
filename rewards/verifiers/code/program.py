"""The program in a completion."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from textwrap import dedent, indent
from types import CodeType

from rewards.verifiers.reasoning import without_reasoning

LONGEST = 200_000
"""Characters. What is longer is not read as a program."""

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+.-]*)")
_PYTHON = ("python", "python3", "py")
# What HumanEval stops sampling at: behind it is no longer the function that was asked for.
_STOP = re.compile(r"\n(?:class|def|#|if|print|```)")
# What a tokenizer may leave at the end: <|im_end|>, </s> and the like.
_END_MARK = re.compile(r"<(?:\|\w+\||｜[\w▁]+｜|/s|eos|end_of_turn)>\s*\Z")


def find_program(completion: str, prompt: str = "", names: Collection[str] = ()) -> str | None:
    """The program that a completion holds; None if it holds none that compiles.

    Reasoning is dropped. The program is a fenced block: of those that define one of ``names`` the last
    that is marked as Python, else the last; if none does, the same of all blocks. Without blocks it is the whole text.
    With a ``prompt`` that opens the function ``names``, the text may also go on where the prompt ends, at any indentation;
    and what follows the function may be cut off, where HumanEval would have stopped.

    Example:
        >>> find_program("So:\\n```python\\nx = 1\\n```\\nThat is it.")
        'x = 1\\n'
        >>> find_program("    return 1\\n# That is it,\\nisn't it?", prompt="def one():\\n", names={"one"})
        'def one():\\n    return 1'
    """
    answer = without_reasoning(completion)
    if answer is None or len(answer) > LONGEST:
        return None
    answer = _END_MARK.sub("", answer)
    blocks = [_block(answer, names, strings_hide_fences) for strings_hide_fences in (False, True)]
    candidates = dict.fromkeys(program for block in blocks for program in _programs(block, prompt, names))
    return next((program for program in candidates if compiled(program) is not None), None)


def _programs(text: str, prompt: str, names: Collection[str]) -> list[str]:
    """What ``text`` can mean, the likeliest first."""
    if not prompt:
        return [text]
    texts = (text, cut(text))
    if _defines(text, names):
        return [*(f"{stub(prompt)}\n{text}" for text in texts), *texts]  # helpers of the prompt come along
    margin = _margin(prompt)
    bodies = [*texts, *(indent(dedent(text), margin) for text in texts), *(margin + text.lstrip() for text in texts)]
    return [prompt + body for body in bodies]


def stub(prompt: str) -> str:
    """A prompt that opens a function, as a program: the function has an empty body."""
    return prompt if compiled(prompt) else f"{prompt}\n{_margin(prompt)} pass\n"


def _margin(prompt: str) -> str:
    """The indentation of the last line that has one."""
    return (re.findall(r"^[ \t]+(?=\S)", prompt, re.MULTILINE) or ["    "])[-1]


def _defines(text: str, names: Collection[str]) -> bool:
    any_name = "|".join(map(re.escape, names)) or "(?!)"
    return bool(
        re.search(rf"^(?:(?:(?:async )?def|class) +(?:{any_name})\b|(?:{any_name}) *=[^=])", text, re.MULTILINE)
    )


def cut(text: str) -> str:
    """The text up to the first of HumanEval's stop words."""
    return _STOP.split(text, maxsplit=1)[0]


def compiled(source: str, name: str = "<program>") -> CodeType | None:
    """``source`` compiled with its asserts, whatever the interpreter's options; None if that is not possible."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compile(source, name, "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):  # a lone surrogate is a ValueError
        return None


def _block(text: str, names: Collection[str], strings_hide_fences: bool) -> str:
    """The fenced block that is the program, else the text.

    With ``strings_hide_fences`` a fence within triple quotes does not close a block. Counting quotes can go wrong too, as in
    a text that ends in the middle of a string.
    """
    best, block = (False, False), text
    lines = iter(text.split("\n"))
    for line in lines:
        if opening := _FENCE.match(line):
            margin, fence, language = opening.groups()
            found, quotes = [], 0
            for inner in lines:
                hidden = strings_hide_fences and quotes % 2
                if not hidden and inner.strip().startswith(fence) and not inner.strip(fence[0] + " \t\r"):
                    break
                quotes += inner.count('"""') + inner.count("'''")
                found.append(inner.removeprefix(margin) + "\n")
            merit = _defines("".join(found), names), language.lower() in _PYTHON
            if found and merit >= best:
                best, block = merit, "".join(found)
    return block

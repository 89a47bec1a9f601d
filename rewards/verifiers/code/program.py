"""The program in a completion."""

from __future__ import annotations

import re
import warnings
from types import CodeType

LONGEST = 200_000
"""Characters. What is longer is not read as a program."""

_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+.-]*)")
_PYTHON = ("python", "python3", "py")
# What HumanEval stops sampling at: behind it is no longer the function that was asked for.
_STOP = re.compile(r"\n(?:class|def|#|if|print|```)")


def find_program(completion: str, prompt: str = "", entry_point: str = "") -> str | None:
    """The program that a completion holds; None if it holds none that compiles.

    Reasoning up to ``</think>`` is dropped. The program is the last fenced block marked as Python, else the last fenced
    block, else the whole text. With a ``prompt`` that opens the function ``entry_point``, the text may also go on where
    the prompt ends; and what follows the function may be cut off, where HumanEval would have stopped.

    Example:
        >>> find_program("So:\\n```python\\nx = 1\\n```\\nThat is it.")
        'x = 1\\n'
        >>> find_program("    return 1\\n# That is it,\\nisn't it?", prompt="def one():\\n", entry_point="one")
        'def one():\\n    return 1'
    """
    answer = completion.rpartition("</think>")[2]
    if len(answer) > LONGEST or answer.lstrip().startswith("<think>"):
        return None
    text = _block(answer)
    if not prompt:
        candidates = [text]
    elif re.search(rf"^(?:(?:async )?def|class) +{re.escape(entry_point)}\b", text, re.MULTILINE):
        texts = (text, cut(text))
        candidates = [*(f"{stub(prompt)}\n{text}" for text in texts), *texts]  # helpers of the prompt come along
    else:
        candidates = [prompt + text, prompt + cut(text)]
    return next((program for program in candidates if compiled(program) is not None), None)


def stub(prompt: str) -> str:
    """A prompt that opens a function, as a program: the function has an empty body."""
    return f"{prompt}\n    pass\n"


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


def _block(text: str) -> str:
    """The last fenced block that is marked as Python, else the last one, else the text."""
    blocks: dict[bool, list[str]] = {}
    lines = iter(text.split("\n"))
    for line in lines:
        if opening := _FENCE.match(line):
            indent, fence, language = opening.groups()
            block = []
            for inner in lines:
                if inner.strip().startswith(fence) and not inner.strip(fence[0] + " \t\r"):
                    break
                block.append(inner.removeprefix(indent) + "\n")
            blocks[language.lower() in _PYTHON] = block
    return "".join(blocks.get(True) or blocks.get(False) or [text])

"""Word problems in the format of GSM8K: worked steps, then ``#### `` and the number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textenv.datasets import SAMPLE, DatasetTask
from textenv.task import Problem, Transcript

MARKER = "####"
INSTRUCTION = f"Work step by step, then end with a line of {MARKER} and the number."


class GSM8K(DatasetTask):
    """Grade-school word problems (Cobbe et al., 2021, arXiv:2110.14168). The answer is a number.

    The prompt is the question and, on a line of its own, :data:`INSTRUCTION`. The reference is the number after
    ``####``, without commas. ``info["solution"]`` holds the worked solution, which ``demonstrate`` shows. The texts are
    not plain ASCII: use a model's tokenizer.

    Args:
        data: the official ``train.jsonl`` or any file with the fields ``question`` and ``answer``; default the hub's;
            ``"sample"`` for the rows of :class:`WordProblems`.
        eval_data: the official ``test.jsonl`` or ``openai/gsm8k:main@test``, to evaluate on it; default a share
            ``holdout`` of ``data``.
        template: the text of a prompt, over the fields of a row.
        shots: worked examples before each problem.

    Raises:
        ValueError: on first use, when a row's answer does not end in ``#### number``; else as :class:`DatasetTask`.

    Example:
        >>> GSM8K().read_row({"question": "2 packs of 600?", "answer": "2*600=1200\\n#### 1,200"}).reference
        '1200'
    """

    reward = "last_number"
    answer_types = (str,)
    licence = "MIT"
    max_new_tokens = 256
    max_tokens = 1024
    template = "{question}\n" + INSTRUCTION + "\n"
    sample = "word_problems.jsonl"

    def __init__(
        self,
        data: str | Path = "openai/gsm8k:main",
        eval_data: str | Path | None = None,
        template: str | None = None,
        shots: int = 0,
    ) -> None:
        super().__init__(data, "question", "answer", eval_data, template, shots)

    def read_row(self, row: Mapping[str, Any]) -> Problem:
        _, marker, number = row["answer"].rpartition(MARKER)
        number = number.strip().replace(",", "")
        if not marker or not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", number):
            raise ValueError(f"the answer must end in {MARKER} and a number, got {row['answer'][-40:]!r}")
        return Problem(self.read_prompt(row), number, {"solution": row["answer"]})

    def demonstrate(self, transcript: Transcript) -> str:
        return transcript.problem.info["solution"]


class WordProblems(GSM8K):
    """Two dozen word problems of our own, to try out at once what trains on :class:`GSM8K`.

    They come with textenv, in plain ASCII and short enough for the character tokenizer.

    Args:
        template: the text of a prompt, over the fields ``question`` and ``answer``.
        shots: worked examples before each problem.

    Example:
        >>> print(WordProblems().problem(seed=0, split="train", index=0).info["solution"])
        There are 7 * 64 = 448 seats.
        448 - 389 = 59 are free.
        #### 59
    """

    def __init__(self, template: str | None = None, shots: int = 0) -> None:
        super().__init__(SAMPLE, template=template, shots=shots)

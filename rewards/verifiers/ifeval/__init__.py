"""Instructions that a rule can verify, as in IFEval."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.contract import Score, ungraded
from rewards.verifiers.base import Verifier
from rewards.verifiers.ifeval.instructions import Check, read_instruction
from rewards.verifiers.regex import SECONDS


class IFEval(Verifier):
    """``1.0 if the completion follows every instruction else 0.0``, by the 25 verifiable instructions of IFEval (Zhou et
    al., arXiv:2311.07911) under their official ids.

    The checks are those of the authors' code, oddities included: keywords are regular expressions and match inside
    words, any line in ``-`` is a bullet, a text whose language cannot be detected (``"123"``) passes for any language,
    and ``NaN`` for JSON. A blank completion follows nothing. One check differs: the official one counts sentences by a
    model that has to be downloaded, this one by a rule (:func:`~rewards.verifiers.ifeval.text.count_sentences` says where
    it shows). Arguments that are missing are errors here; the official code draws them at random. Detecting languages
    needs langdetect (``textenv[ifeval]``), and gives the same answer every time.

    ``parts`` are ``correct``, ``followed`` (the share of the instructions) and 1.0 or 0.0 under each id.

    Args:
        instructions: id -> arguments, for every sample. None takes each sample's reference, a mapping with
            ``instruction_id_list`` and ``kwargs`` as in the official data; one that cannot be read leaves the sample
            ungraded.
        strict: False is the official loose accuracy: an instruction is followed if it is in any of eight variants of the
            completion, which leave out the first line, the last one or both, and asterisks.
        partial_credit: the value is the share of the instructions that are followed.

    Raises:
        ValueError: no instructions, an unknown id, arguments that the instruction does not take.
        ImportError: an instruction needs langdetect.

    Example:
        >>> ifeval = IFEval({"punctuation:no_comma": {}, "keywords:existence": {"keywords": ["tea"]}})
        >>> ifeval.grade("Tea please.", None).value, ifeval.grade("Coffee please.", None).parts["followed"]
        (1.0, 0.5)
    """

    name = "ifeval"

    def __init__(
        self,
        instructions: Mapping[str, Mapping[str, Any]] | None = None,
        strict: bool = True,
        partial_credit: bool = False,
    ) -> None:
        self.checks = None if instructions is None else _read(list(instructions), list(instructions.values()))
        self.strict = strict
        self.partial_credit = partial_credit

    def grade(self, completion: str, reference: Any) -> Score:
        try:
            checks = self.checks or _read(*_unpack(reference))
        except ValueError as error:
            return ungraded(f"unreadable reference: {error}")
        except ImportError as error:
            return ungraded(str(error))
        texts = [text for text in ([completion] if self.strict else _variants(completion)) if text.strip()]
        followed: dict[str, float] = {}
        for name, check in checks:
            try:
                holds = any(map(check, texts))
            except TimeoutError:
                return ungraded(f"{name}: a pattern took longer than {SECONDS} s; write one that backtracks less")
            followed[name] = min(float(holds), followed.get(name, 1.0))
        correct, share = min(followed.values()), sum(followed.values()) / len(followed)
        return Score(share if self.partial_credit else correct, {"correct": correct, "followed": share, **followed})


def _read(names: Sequence[str], kwargs: Sequence[Mapping[str, Any] | None]) -> list[tuple[str, Check]]:
    if not names or len(names) != len(kwargs):
        raise ValueError(f"wanted instructions and arguments for each, got {len(names)} and {len(kwargs)}")
    return [(name, read_instruction(name, given)) for name, given in zip(names, kwargs, strict=True)]


def _unpack(reference: Any) -> tuple[Sequence[str], Sequence[Any]]:
    match reference:
        case {"instruction_id_list": [*names], "kwargs": [*kwargs]}:
            return names, kwargs
    raise ValueError(f"wanted a mapping with instruction_id_list and kwargs, got {reprlib.repr(reference)}")


def _variants(text: str) -> list[str]:
    lines = text.split("\n")
    kept = [text, *("\n".join(some).strip() for some in (lines[1:], lines[:-1], lines[1:-1]))]
    return kept + [variant.replace("*", "") for variant in kept]

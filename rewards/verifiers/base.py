"""What all verifiers share."""

from __future__ import annotations

import reprlib
import traceback
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from rewards.contract import Reward, Sample, Score, ungraded


class Verifier(Reward):
    """A rule that grades every sample by itself. A subclass writes :meth:`grade`.

    Example:
        >>> class Longer(Verifier):
        ...     def grade(self, completion, reference):
        ...         return verdict(len(completion) > len(reference))
        >>> [score.value for score in Longer()([Sample(prompt="", completion="abc", reference="ab")])]
        [1.0]
    """

    @abstractmethod
    def grade(self, completion: str, reference: Any) -> Score:
        """The score of one completion."""

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._grade_or_explain(sample) for sample in samples]

    def _grade_or_explain(self, sample: Sample) -> Score:
        try:
            return self.grade(sample.completion, sample.reference)
        except Exception:  # noqa: BLE001 - one sample that breaks the rule must not take the batch with it
            return ungraded(traceback.format_exc())


def verdict(correct: bool, info: Mapping[str, str] | None = None, **parts: float) -> Score:
    """Right (1.0) or wrong (0.0), with ``parts["correct"]``.

    Example:
        >>> verdict(False, readable=1.0).parts
        {'correct': 0.0, 'readable': 1.0}
    """
    return Score(float(correct), {"correct": float(correct), **parts}, info=info or {})


def unreadable(reference: Any, wanted: str) -> Score:
    """Ungraded, because the reference is not what the verifier needs.

    Example:
        >>> unreadable("many", wanted="a number").error
        "unreadable reference: wanted a number, got 'many'"
    """
    return ungraded(f"unreadable reference: wanted {wanted}, got {reprlib.repr(reference)}")

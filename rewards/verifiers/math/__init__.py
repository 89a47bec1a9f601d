r"""A free-form answer against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Rational, Real
from typing import Any

from rewards.contract import Reward, Sample, Score, ungraded
from rewards.verifiers.base import unreadable, verdict
from rewards.workers import Failure, Workers

CONVENTIONS = ("unit", "percent", "rounding", "decimal comma", "last number")


class Math(Reward):
    r"""1.0 if the answer that a completion gives is equal to the reference, else 0.0.

    The answer is the last ``\boxed``, else a stated one (``####``, ``Answer:``, ``the answer is``), else that of the last
    sentence; :mod:`rewards.verifiers.math.extract` has the rules. It may be LaTeX or plain text. It is compared in stages,
    the cheapest first:

    1. ``text``: the same text, but for its spelling;
    2. ``exact`` and ``structure``: integers and fractions in exact arithmetic; tuples, sets, intervals, matrices, equations,
       bases, percentages and units element by element, by the rules of :mod:`rewards.verifiers.math.compare`;
    3. ``rounding``: a decimal that is an exact number, rounded to the digits it shows;
    4. ``symbolic``: both sides at eight random points, to 50 digits. This one needs the extra: ``textenv[math]``.

    All of it runs in processes that can be killed, on all cores. A score has the parts ``correct`` and ``readable`` (0.0:
    no answer was found, or one that is no mathematics) and tells in its info the ``outcome``, the text ``extracted`` and
    the ``stage``. The reference is a text or a number; of a text with a box or ``####``, what stands there. The sample is
    ungraded if its reference is unreadable, if it took longer than ``seconds``, or if it needs the extra and that is
    missing. Where the reference has sums, products, integrals, limits, cases or dots, the same text is correct
    and of any other math-verify decides.

    An answer that repeats the question is wrong: text of the prompt that is not yet the reference, or a sum, product or
    quotient of numbers that all stand in the prompt.

    Args:
        conventions: what else counts, of ``"unit"`` (the reference's unit may be missing), ``"percent"`` (``10\%`` is also 10
            or 0.1), ``"rounding"`` (a rounded decimal for an exact reference), ``"decimal comma"`` and ``"last number"``
            (where a completion states no answer, the only number of its last sentence). The info names those that
            decided in ``convention``.
        seconds: wall-clock limit for one completion.

    Raises:
        ValueError: an unknown convention, or ``seconds`` that are not positive.

    Example:
        >>> from rewards import Sample
        >>> score = Math()([Sample(prompt="", completion="so $x = \\boxed{\\dfrac{1}{2}}$.", reference="0.5")])[0]
        >>> score.value, score.info["extracted"], score.info["stage"]
        (1.0, '\\dfrac{1}{2}', 'exact')
    """

    name = "math"

    def __init__(self, conventions: Sequence[str] = (), seconds: float = 5.0) -> None:
        if isinstance(conventions, str) or not set(conventions) <= set(CONVENTIONS):
            raise ValueError(f"conventions must be a list with some of {list(CONVENTIONS)}, got {conventions!r}")
        if not seconds > 0:
            raise ValueError(f"seconds must be positive, got {seconds}")
        self.conventions = list(conventions)
        self.workers = Workers("rewards.verifiers.math.grade:grade_item", seconds=seconds)

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        readable = {n: text for n, sample in enumerate(samples) if (text := _text(sample.reference)) is not None}
        items = [
            {
                "completion": samples[n].completion,
                "reference": reference,
                "prompt": samples[n].prompt,
                "conventions": self.conventions,
            }
            for n, reference in readable.items()
        ]
        verdicts = dict(zip(readable, self.workers.map(items), strict=True))
        return [
            _score(sample, verdicts[n]) if n in verdicts else unreadable(sample.reference, wanted="a text or a number")
            for n, sample in enumerate(samples)
        ]


def _text(reference: Any) -> str | None:
    if isinstance(reference, str):
        return reference
    if isinstance(reference, Rational | Real) and not isinstance(reference, bool) and isfinite(reference):
        return str(reference)
    return None


def _score(sample: Sample, result: dict[str, str] | Failure) -> Score:
    if isinstance(result, Failure):
        return ungraded(f"time-out: {result.why}" if result.timed_out else result.why)
    outcome = result["outcome"]
    if outcome == "unreadable reference":
        return unreadable(sample.reference, wanted=f"mathematics or words ({result['why']})")
    if outcome == "missing extra":
        return ungraded(result["why"])
    info = {key: text for key, text in result.items() if text}
    return verdict(outcome == "correct", info, readable=float(outcome != "no answer" and result["stage"] != "reading"))

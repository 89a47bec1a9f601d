"""Rewards made of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

from rewards.contract import Reward, Sample, Score, score_samples, ungraded
from rewards.registry import Spec, as_reward


class WeightedSum(Reward):
    """``value = sum_k weight_k * value_k``.

    ``parts`` hold each component's own value, unweighted, by its name. ``parts["correct"]`` is that of the first
    component which names it, so form and style never count as accuracy beside a verifier. If a component gives credit
    for single tokens, the sum does too; a component without puts its value on the last token.

    A sample that any component could not grade is ungraded, with that component's error: leaving a component out would
    change the scale of the reward for some samples only.

    Args:
        components: name -> weight for registered rewards, or name -> (weight, reward) for others. Weights may be
            negative.

    Raises:
        ValueError: no components, a weight that is not finite, the reserved name "correct", an unknown reward.

    Example:
        >>> def short(prompt, completion, reference):
        ...     return 1 / len(completion)
        >>> mixed = WeightedSum({"exact": 1.0, "short": (0.5, short)})
        >>> score, = mixed([Sample(prompt="6*7=", completion="42", reference="42")])
        >>> score.value, score.parts
        (1.25, {'exact': 1.0, 'short': 0.5, 'correct': 1.0})
    """

    name = "weighted_sum"

    def __init__(self, components: Mapping[str, float | tuple[float, Spec]]) -> None:
        if not components or "correct" in components:
            raise ValueError(f'a sum needs components, none of them named "correct", got {list(components)}')
        self.components: dict[str, tuple[float, Reward]] = {}
        for name, component in components.items():
            weight, spec = component if isinstance(component, tuple) else (component, name)
            if not (isinstance(weight, Real) and math.isfinite(weight)):
                raise ValueError(f"{name!r} needs a finite weight, or a pair (weight, reward); got {component!r}")
            self.components[name] = (weight, as_reward(spec))

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        columns = [score_samples(reward, samples) for _, reward in self.components.values()]
        rows = zip(*columns, strict=True)
        return [self._combine(sample, row) for sample, row in zip(samples, rows, strict=True)]

    def _combine(self, sample: Sample, scores: Sequence[Score]) -> Score:
        values: list[float] = []
        for name, score in zip(self.components, scores, strict=True):
            if score.value is None:
                return ungraded(f"{name}: {score.error}")
            values.append(score.value)
        weights = [weight for weight, _ in self.components.values()]
        parts = dict(zip(self.components, values, strict=True))
        correct = next((score.parts["correct"] for score in scores if "correct" in score.parts), None)
        if correct is not None:
            parts["correct"] = correct
        try:
            tokens = _weigh_tokens(weights, values, scores, len(sample.tokens))
            value = math.fsum(weight * value for weight, value in zip(weights, values, strict=True))
            return Score(value, parts, tokens)
        except (OverflowError, ValueError) as error:  # too large to add up, or credit that does not fit the tokens
            return ungraded(f"{self.name}: {error}")


def _weigh_tokens(
    weights: Sequence[float], values: Sequence[float], scores: Sequence[Score], length: int
) -> tuple[float, ...] | None:
    """The weighted sum of the components' token credit; None where no component gives any."""
    if length == 0 or all(score.tokens is None for score in scores):
        return None
    rows = [(0.0,) * (length - 1) + (v,) if s.tokens is None else s.tokens for v, s in zip(values, scores, strict=True)]
    for row in rows:
        if len(row) != length:
            raise ValueError(
                f"token credit must have one number for each of the {length} sampled tokens, got {len(row)}"
            )
    return tuple(
        math.fsum(w * credit for w, credit in zip(weights, column, strict=True)) for column in zip(*rows, strict=True)
    )


class Gate(Reward):
    """``value = reward`` where the gate's value is 1 or more, else 0.

    Behind a closed gate the reward is not called, so an expensive or a hackable one sees only samples that passed.
    ``parts`` are ``gate``, ``reward`` (0.0 behind a closed gate) and ``correct``: the gate's verdict where the gate
    grades correctness, else that of the reward, and 0.0 behind a closed gate. The reward's token credit passes through.
    A sample that the gate, or the reward behind an open gate, could not grade is ungraded.

    Args:
        gate: what has to be passed: a registered name, a reward or a function ``(prompt, completion, reference)``.
        reward: what counts then, given in the same ways.

    Raises:
        ValueError: an unknown reward.

    Example:
        >>> gated = Gate("format_tags", lambda prompt, completion, reference: 0.5)
        >>> tagged = Sample(prompt="", completion="<think>so</think><answer>4</answer>")
        >>> [score.value for score in gated([tagged, Sample(prompt="", completion="4")])]
        [0.5, 0.0]
    """

    name = "gate"

    def __init__(self, gate: Spec, reward: Spec) -> None:
        self.gate = as_reward(gate)
        self.reward = as_reward(reward)

    def __call__(self, samples: Sequence[Sample]) -> list[Score]:
        gates = score_samples(self.gate, samples)
        passed = [sample for sample, gate in zip(samples, gates, strict=True) if _is_open(gate)]
        rewards = iter(score_samples(self.reward, passed) if passed else [])
        return [_gated(gate, next(rewards) if _is_open(gate) else Score(0.0)) for gate in gates]


def _is_open(gate: Score) -> bool:
    return gate.value is not None and gate.value >= 1.0


def _gated(gate: Score, reward: Score) -> Score:
    if gate.value is None:
        return ungraded(f"gate: {gate.error}")
    if reward.value is None:
        return ungraded(f"reward: {reward.error}")
    correct = gate.parts.get("correct", float(bool(reward.correct)))
    return Score(reward.value, {"gate": gate.value, "reward": reward.value, "correct": correct}, reward.tokens)

"""Fixtures for the rewards' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rewards import Reward, Sample, Score, registry


@pytest.fixture(autouse=True)
def _forget_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))


@pytest.fixture
def sample() -> Callable[..., Sample]:
    """A sample with defaults for what a test does not care about."""

    def build(completion: str = "", reference: Any = None, tokens: tuple[int, ...] = (), prompt: str = "") -> Sample:
        return Sample(prompt=prompt, completion=completion, reference=reference, tokens=tokens)

    return build


@pytest.fixture
def fixed() -> Callable[..., Reward]:
    """A reward that returns the scores it was made with and remembers what it was asked."""

    class Fixed(Reward):
        name = "fixed"

        def __init__(self, *scores: Score) -> None:
            self.scores = scores
            self.seen: list[str] = []

        def __call__(self, samples: Any) -> list[Score]:
            self.seen += [sample.completion for sample in samples]
            return list(self.scores)

    return Fixed

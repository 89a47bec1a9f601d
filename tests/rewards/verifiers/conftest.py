"""Fixtures for the verifiers' tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rewards import Reward, Sample, Score, score_samples


@pytest.fixture
def grade() -> Callable[[Reward, str, Any], Score]:
    """The score of one completion, by the way environments take."""

    def of(verifier: Reward, completion: str, reference: Any = None) -> Score:
        (score,) = score_samples(verifier, [Sample(prompt="", completion=completion, reference=reference)])
        return score

    return of

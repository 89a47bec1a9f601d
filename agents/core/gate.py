"""The gate between engine and learner: a token has the same log-probability when it is sampled and when it is scored.

Shapes: B episodes, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

REACHES = (0, 64, 256, 1024, 4096, 16384)
"""Tokens before a token, at which the parts begin that a long context is told by: rounding adds up, and a position or a window
that is handled in two ways shows from somewhere on."""


def gap_metrics(gap_BT: Tensor, sampled_BT: Tensor) -> dict[str, Tensor]:
    """Mean and largest absolute difference of the sampled tokens, in nats: of all, and by :data:`REACHES` where rows are longer
    than the first part. A part without sampled tokens is left out.

    Args:
        gap_BT: log-probability as scored, minus that as sampled, or the other way round.
        sampled_BT: bool.

    Example:
        >>> gap_metrics(torch.tensor([[0.0, 0.1, -0.3]]), torch.tensor([[False, True, True]]))
        {'logp_gap': tensor(0.2000), 'logp_gap_max': tensor(0.3000)}
    """
    gap_BT = torch.where(sampled_BT, gap_BT.abs(), 0.0)
    count_T, sum_T, max_T = sampled_BT.sum(dim=0), gap_BT.sum(dim=0), gap_BT.amax(dim=0)
    metrics = {"logp_gap": sum_T.sum() / count_T.sum(), "logp_gap_max": max_T.max()}
    if len(count_T) <= REACHES[1]:
        return metrics
    for first, last in pairwise((*REACHES, len(count_T))):
        if count_T[first:last].any():
            metrics[f"logp_gap/from_{first}"] = sum_T[first:last].sum() / count_T[first:last].sum()
            metrics[f"logp_gap_max/from_{first}"] = max_T[first:last].max()
    return metrics


def check_logp_gap(metrics: Mapping[str, float], limit: float) -> None:
    """Hold engine and learner to one distribution, by what was measured on a fresh batch.

    Raises:
        RuntimeError: their log-probabilities differ by more than ``limit`` nats a token in the mean, or are no numbers.
    """
    if metrics["logp_gap"] <= limit:
        return
    parts = [name.removeprefix("logp_gap/from_") for name in metrics if name.startswith("logp_gap/")]
    by_reach = ", ".join(f"{metrics[f'logp_gap/from_{first}']:.3g} from token {first} on" for first in parts)
    raise RuntimeError(
        f"the engine sampled from another distribution than the learner scores: log-probabilities differ by "
        f"{metrics['logp_gap']:.3g} nats a token in the mean{f' ({by_reach})' if len(parts) > 1 else ''}, at most "
        f"{metrics['logp_gap_max']:.3g}, and the limit max_logp_gap is {limit:g}; check that engine and learner hold the same "
        "weights and dtype"
    )

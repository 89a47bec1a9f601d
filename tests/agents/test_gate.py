"""Engine and learner are held to one distribution."""

import itertools
import math

import pytest
import torch

from agents.core.gate import check_logp_gap, gap_metrics


def test_the_gap_is_that_of_sampled_tokens_alone_with_any_sign():
    gap_BT = torch.tensor([[9.0, 0.1, -0.5], [9.0, -0.3, 9.0]])
    sampled_BT = torch.tensor([[False, True, True], [False, True, False]])
    metrics = gap_metrics(gap_BT, sampled_BT)
    assert metrics["logp_gap"].item() == pytest.approx(0.3)
    assert metrics["logp_gap_max"].item() == 0.5
    assert len(metrics) == 2


def test_in_long_contexts_it_is_told_by_the_tokens_before():
    gap_BT, sampled_BT = torch.zeros(1, 300), torch.zeros(1, 300, dtype=torch.bool)
    sampled_BT[0, [70, 71, 256, 299]] = True
    gap_BT[0, [70, 71, 256, 299]] = torch.tensor([0.1, 0.2, 0.5, -0.7])
    metrics = {name: gap.item() for name, gap in gap_metrics(gap_BT, sampled_BT).items()}
    assert metrics == pytest.approx({
        "logp_gap": 1.5 / 4, "logp_gap_max": 0.7,
        "logp_gap/from_64": 0.15, "logp_gap_max/from_64": 0.2, "logp_gap/from_256": 0.6, "logp_gap_max/from_256": 0.7,
    })  # fmt: skip


def test_every_sampled_token_is_in_one_part():
    sampled_BT = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(0)) < 0.5
    gap_BT = torch.rand(3, 20_000, generator=torch.Generator().manual_seed(1))
    metrics = gap_metrics(gap_BT, sampled_BT)
    edges = [0, 64, 256, 1024, 4096, 16384, 20_000]
    counts = [int(sampled_BT[:, first:last].sum()) for first, last in itertools.pairwise(edges)]
    means = [metrics[f"logp_gap/from_{first}"].item() for first in edges[:-1]]
    assert sum(n * mean for n, mean in zip(counts, means, strict=True)) / sum(counts) == pytest.approx(
        metrics["logp_gap"].item(), rel=1e-5
    )


def test_a_gap_within_the_limit_passes_and_one_beyond_it_says_where():
    metrics = {"logp_gap": 0.3, "logp_gap_max": 2.0}
    check_logp_gap(metrics, 0.3)
    with pytest.raises(
        RuntimeError, match=r"differ by 0\.3 nats a token in the mean, at most 2, .*max_logp_gap is 0\.1"
    ):
        check_logp_gap(metrics, 0.1)
    parts = {"logp_gap/from_0": 1e-6, "logp_gap/from_64": 0.9}
    with pytest.raises(RuntimeError, match=r"\(1e-06 from token 0 on, 0\.9 from token 64 on\)"):
        check_logp_gap(metrics | parts, 0.1)


def test_a_gap_that_is_no_number_does_not_pass():
    with pytest.raises(RuntimeError, match="differ by nan"):
        check_logp_gap({"logp_gap": math.nan, "logp_gap_max": math.nan}, math.inf)

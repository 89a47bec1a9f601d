"""Fit a reward model to comparisons or ratings of answers.

A language model with a fresh scalar head (or a reward model, to go on from) is trained for an epoch, then its scores are
centred and judged on held-out prompts. Each answer goes through the model once a step, however many pairs it is in; dropout
is off, so the score that is learned is the score that is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch
from torch import Tensor, nn

from rewards.contract import RewardError
from rewards.learned.losses import answer_nll, bradley_terry, centring, ranked_pairs, squared_error
from rewards.learned.preferences import Comparison, Rated
from rewards.learned.report import Pair, Report
from rewards.learned.reward_model import CENTER, SCALE
from rewards.learned.scalar import ScalarModel, Text, batch_by_tokens, default_device, describe, quiet, reading
from rewards.pretrained import read_pretrained

Data = Sequence[Comparison] | Sequence[Rated]

WARMUP = 0.05
"""Share of the steps over which the learning rate rises; then it falls, to 0 at the end."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How a reward model is fitted. Defaults are those of InstructGPT (arXiv:2203.02155), whose batch is 64 prompts.

    Raises:
        ValueError: a value out of its range.
    """

    epochs: int = 1
    """Passes over the data; a second one overfits at once."""
    learning_rate: float = 1e-5
    """Of Adam, at its highest."""
    prompts_per_step: int = 64
    """Comparisons, or rated answers, a step."""
    margin_weight: float = 0.0
    """By how much the better score should win for each unit of a comparison's margin."""
    label_smoothing: float = 0.0
    """Share of the comparisons that are taken to be the wrong way round."""
    centring: float = 0.0
    """Weight of (better + worse)², which keeps scores around 0; usual is 0.01."""
    lm_weight: float = 0.0
    """Weight of the language model's loss on the best answer, which keeps the trunk's features; usual are 0.01 to 1."""
    max_grad_norm: float = 1.0
    """Longer gradients are scaled down to this."""
    max_tokens: int | None = None
    """Most tokens of a prompt with its answer; default the model's context."""
    tokens_per_microbatch: int = 16_384
    """Most tokens, padding included, that go through the model at once. Changes memory, not results."""
    seed: int = 0
    """Of the new head and the order of the data."""
    device: str | None = None
    """Where the model is fitted; default a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("epochs", "prompts_per_step", "tokens_per_microbatch"):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("margin_weight", "centring", "lm_weight", "seed"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        for name in ("learning_rate", "max_grad_norm"):
            _require(getattr(self, name) > 0, name, "more than 0", getattr(self, name))
        _require(0 <= self.label_smoothing < 0.5, "label_smoothing", "from 0 to below 0.5", self.label_smoothing)


@dataclass(frozen=True, slots=True)
class Item:
    """What is learned from as a whole: all answers to a prompt, best first, or one rated answer.

    Args:
        texts: the answers with their prompt.
        target: the margin of a comparison, or the rating, in the units of the score.
        answer_start: where the first text's answer starts among its ids; given if the language model learns too.
    """

    texts: tuple[Text, ...]
    target: float
    answer_start: int = 0


def fit(train: Data, held_out: Data, *, model: str | Path, out: str | Path, config: FitConfig | None = None) -> Report:
    """Fit a reward model, save it, and tell how it does on data that it has not seen.

    The loss is, by the kind of data, the mean over prompts of :func:`~rewards.learned.losses.bradley_terry` over all pairs of
    a prompt, or the mean of :func:`~rewards.learned.losses.squared_error` over ratings brought to mean 0 and deviation 1.

    The folder loads with ``AutoModelForSequenceClassification``. Its config's ``reward_center`` is the mean head over the
    held-out answers, and ``reward_scale`` the deviation of the ratings (1 for comparisons):
    :class:`~rewards.learned.reward_model.RewardModel` scores 0 for the average answer, in log odds or in the ratings' unit.

    Args:
        train: comparisons, or ratings.
        held_out: the same kind, of other prompts.
        model: a causal language model, which gets a new head, or a reward model: a folder or a name on the hub.
        out: a folder that is new or empty.
        config: see :class:`FitConfig`.

    Returns:
        accuracy and calibration on ``held_out``.

    Raises:
        ValueError: data that cannot be learned from, an ``out`` in use, an answer longer than the context.
        RewardError: there is no suitable model at ``model``.
    """
    config = config or FitConfig()
    _check(train, held_out, config)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"a fitted model needs a folder that is new or empty, got {str(out)!r}")
    scalar = begin(model, config)
    mean, scale = _rating_units(train)
    items = [_item(scalar, row, mean, scale, config) for row in train]
    tests = [_item(scalar, row, mean, scale, config) for row in held_out]
    _train(scalar, items, model, config)

    heads = scalar.score([text.ids for item in tests for text in item.texts])
    save(scalar, out, center=fmean(heads), scale=scale)
    cut = sum(text.cut > 0 for item in (*items, *tests) for text in item.texts)
    return _report(held_out, tests, heads, cut)


def begin(source: str | Path, config: FitConfig) -> ScalarModel:
    """The model to be fitted, in float32: a reward model as it is, a language model with a new head.

    The head is drawn from a normal distribution of deviation 1 / sqrt(H + 1) (Stiennon et al., arXiv:2009.01325).

    Raises:
        RewardError: there is no such model, or it has several labels.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind, labels = describe(source)
    fresh = not kind.endswith("ForSequenceClassification")
    if not fresh and labels != 1:
        raise RewardError(f"a reward model has one label, but {str(source)!r} is a {kind} with {labels}")
    with reading(source):
        model = read_pretrained(AutoModelForSequenceClassification, source, num_labels=1, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    scalar = ScalarModel(model.to(config.device or default_device()), tokenizer, config.max_tokens)
    if fresh:
        weight = model.score.weight
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(config.seed))
        weight.data.copy_(drawn / math.sqrt(weight.shape[1] + 1))
    return scalar


def save(scalar: ScalarModel, folder: Path, *, center: float, scale: float) -> None:
    """Save a fitted model with its tokenizer the transformers way."""
    config, tokenizer = scalar.model.config, scalar.tokenizer
    setattr(config, CENTER, center)
    setattr(config, SCALE, scale)
    # transformers' own batched forward reads at the last token that is not padding: it must not take an end token for that.
    config.pad_token_id = None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id
    with quiet():
        scalar.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _train(scalar: ScalarModel, items: list[Item], source: str | Path, config: FitConfig) -> None:
    from rich.console import Console
    from rich.progress import track

    console = Console()
    lm_head = _language_head(scalar, source) if config.lm_weight else None
    optimizer = torch.optim.AdamW(scalar.model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    batches = list(_batches(len(items), config))
    for step, batch in enumerate(
        track(batches, "fitting", console=console, transient=True, disable=not console.is_terminal)
    ):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, len(batches))
        optimizer.zero_grad()
        _add_gradients(scalar, [items[i] for i in batch], lm_head, config)
        nn.utils.clip_grad_norm_(scalar.model.parameters(), config.max_grad_norm, error_if_nonfinite=True)
        optimizer.step()


def _add_gradients(scalar: ScalarModel, items: list[Item], lm_head: nn.Module | None, config: FitConfig) -> None:
    """The gradients of the items' mean loss, a micro-batch at a time."""
    longest = [max(len(text.ids) for text in item.texts) for item in items]
    for part in batch_by_tokens(longest, config.tokens_per_microbatch, [len(item.texts) for item in items]):
        (_loss(scalar, [items[i] for i in part], lm_head, config) / len(items)).backward()


def _batches(items: int, config: FitConfig) -> Iterator[list[int]]:
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        order = torch.randperm(items, generator=generator).tolist()
        for start in range(0, items, config.prompts_per_step):
            yield order[start : start + config.prompts_per_step]


def _schedule(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / (WARMUP * steps + 1)) * (1 - step / steps)


def _loss(scalar: ScalarModel, items: list[Item], lm_head: nn.Module | None, config: FitConfig) -> Tensor:
    """The sum of the items' losses."""
    rows = [text.ids for item in items for text in item.texts]
    tokens_NT, states_NTH = scalar.states(rows)
    score_N = scalar.head(states_NTH, rows)
    target_I = torch.tensor([float(item.target) for item in items], device=scalar.device)
    sizes = [len(item.texts) for item in items]
    if sizes[0] == 1:
        return squared_error(score_N, target_I).sum()
    better_P, worse_P, weight_P = (each.to(scalar.device) for each in ranked_pairs(sizes))
    pairs = torch.tensor([size * (size - 1) // 2 for size in sizes], device=scalar.device)
    margin_P = target_I.repeat_interleave(pairs)
    loss_P = bradley_terry(score_N[better_P], score_N[worse_P], margin_P, config.label_smoothing)
    if config.centring:
        loss_P = loss_P + config.centring * centring(score_N[better_P], score_N[worse_P])
    loss = (weight_P * loss_P).sum()
    if lm_head is None:
        return loss
    first = 0
    for item in items:
        start, end = item.answer_start, len(item.texts[0].ids)
        logits_TV = lm_head(states_NTH[first, start - 1 : end - 1])
        loss = loss + config.lm_weight * answer_nll(logits_TV, tokens_NT[first, start:end])
        first += len(item.texts)
    return loss


def _language_head(scalar: ScalarModel, source: str | Path) -> nn.Module:
    """The language model's own head on the trunk being fitted: frozen, unless it is the embedding, a part of the trunk."""
    from transformers import AutoModelForCausalLM

    with reading(source):
        model, loading = read_pretrained(AutoModelForCausalLM, source, dtype=torch.float32, output_loading_info=True)
    if loading["missing_keys"]:
        raise RewardError(f"{str(source)!r} has no language head to go with lm_weight; fit from a language model")
    head = model.get_output_embeddings().to(scalar.device).requires_grad_(False)
    if scalar.model.config.get_text_config().tie_word_embeddings:
        head.weight = scalar.model.get_input_embeddings().weight
    return head


def _item(scalar: ScalarModel, row: Comparison | Rated, mean: float, scale: float, config: FitConfig) -> Item:
    answers = row.answers if isinstance(row, Comparison) else (row.answer,)
    texts = tuple(scalar.encode([(row.prompt, answer) for answer in answers]))
    for text, answer in zip(texts, answers, strict=True):
        if text.answer_cut:
            raise ValueError(
                f"an answer has {len(text.ids) + text.answer_cut} tokens, and at most {len(text.ids)} can be read; shorten "
                f"or leave out {answer[:60]!r}"
            )
    if isinstance(row, Rated):
        return Item(texts, (row.rating - mean) / scale)
    start = scalar.answer_start(row.prompt, answers[0]) - texts[0].cut if config.lm_weight else 0
    # Nothing foretells the first token of all, and the end token is always the answer's.
    return Item(texts, config.margin_weight * row.margin, min(max(start, 1), len(texts[0].ids) - 1))


def _rating_units(rows: Data) -> tuple[float, float]:
    """Mean and deviation of the ratings; 0 and 1 for comparisons."""
    ratings = [row.rating for row in rows if isinstance(row, Rated)]
    return (fmean(ratings), pstdev(ratings)) if ratings else (0.0, 1.0)


def _report(rows: Data, items: Sequence[Item], heads: Sequence[float], cut: int) -> Report:
    """The report on held-out rows, their texts' heads in order."""
    rated = [row for row in rows if isinstance(row, Rated)]
    found = iter(heads)
    scored = [[(next(found), len(text.ids) + text.cut) for text in item.texts] for item in items]
    if not rated:
        pairs = [_pair(better, worse) for each in scored for better, worse in combinations(each, 2)]
        return Report(pairs, cut=cut)
    from scipy import stats

    by_prompt: dict[str, list[tuple[Rated, tuple[float, int]]]] = {}
    for row, [answer] in zip(rated, scored, strict=True):
        by_prompt.setdefault(row.prompt, []).append((row, answer))
    pairs = []
    for answers in by_prompt.values():
        ranked = sorted(answers, key=lambda pair: -pair[0].rating)
        # Of equal ratings neither is better.
        pairs += [_pair(a, b) for (high, a), (low, b) in combinations(ranked, 2) if high.rating > low.rating]
    spearman = stats.spearmanr(heads, [row.rating for row in rated]).statistic
    return Report(pairs, float(spearman), cut)


def _pair(better: tuple[float, int], worse: tuple[float, int]) -> Pair:
    return Pair(better[0] - worse[0], better[1] - worse[1])


def _check(train: Data, held_out: Data, config: FitConfig) -> None:
    """Refuse data that cannot be learned from, before a model is read.

    Raises:
        ValueError: what is wrong, with the row.
    """
    kinds = {type(row) for row in (*train, *held_out)}
    if not train or not held_out or len(kinds) != 1 or not kinds <= {Comparison, Rated}:
        raise ValueError(
            "a reward model is fitted to comparisons or to ratings, some of them held out; got "
            f"{len(train)} and {len(held_out)} held out, of {', '.join(kind.__name__ for kind in kinds) or 'no kind'}"
        )
    for row in (*train, *held_out):
        if isinstance(row, Comparison) and len(set(row.answers)) < len(row.answers):
            raise ValueError(
                f"a comparison has the same answer twice, of which neither is better: {row.answers[0][:60]!r}"
            )
    if Rated in kinds:
        if _rating_units(train)[1] == 0:
            raise ValueError("the ratings to be fitted to are all the same; there is nothing to learn from")
        for name in ("margin_weight", "label_smoothing", "centring", "lm_weight"):
            _require(
                getattr(config, name) == 0, name, "0 for ratings, which have no better answer", getattr(config, name)
            )


def _require(condition: bool, name: str, wanted: str, got: Any) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {got}")

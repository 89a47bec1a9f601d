"""The checks: one for each silent fault of TRAPS.md that a trainer can have and that shows without a GPU.

A check trains on a few cases and holds what it sees against what must be, computed anew where it is a number. It returns
when all is well and raises :class:`Fault` with what was seen when it is not; :class:`~benchmarks.conform.cases.Lacks` says
that there is nothing to check. Its docstring names the evidence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.conform.cases import (
    BOS,
    END,
    EOS,
    VOCAB,
    Aggregation,
    Case,
    Completions,
    Lacks,
    Model,
    Refused,
    Row,
    Step,
    Trainer,
    ids,
    load,
    log_probabilities,
)

NEAR = 1e-4
"""Nats within which two float32 computations of one log-probability agree."""
SAME = 1e-3
"""Relative difference within which two float32 gradients are the same."""
DIGITS = "3141592653589793238462643383279502884197169399375105"
PROMPTS = ("1+1=", "12+3=", "7=", "0+10=")
MIXED = (1.0, 0.0) * 4
"""Rewards of four pairs, one right and one wrong in each."""

ELSEWHERE: Mapping[int, str] = {
    8: "the bf16 part needs a GPU; here float32 and the shape of the batch",
    11: "no prefix cache here: belongs to the vLLM engine, on a GPU",
    13: "the number of ranks: belongs to the distributed learner",
    28: "belongs to the reward models",
    31: "nothing here packs sequences",
}
"""Rows of TRAPS.md, or parts of them, that are tested elsewhere."""


class Fault(AssertionError):  # noqa: N818 - a finding, not a failure of the check
    """What a trainer does wrong, in a line."""


@dataclass(frozen=True)
class Check:
    """A check of one row of TRAPS.md."""

    number: int
    name: str
    promise: str
    run: Callable[[Trainer], None]


CHECKS: list[Check] = []


def trap(number: int, promise: str) -> Callable[[Callable[[Trainer], None]], Callable[[Trainer], None]]:
    """Add a check to the suite."""

    def add(function: Callable[[Trainer], None]) -> Callable[[Trainer], None]:
        CHECKS.append(Check(number, function.__name__, promise, function))
        return function

    return add


def hold(condition: bool | np.bool_ | Tensor, what: str) -> None:
    """Raises :class:`Fault` if ``condition`` is false."""
    if not condition:
        raise Fault(what)


def written(*lengths: int) -> Completions:
    """Completions of these many tokens, the end token included; different digits in each."""
    return tuple((ids((DIGITS * 3)[i : i + n - 1], EOS),) for i, n in enumerate(lengths))


RAGGED = written(2, 5, 8, 3, 4, 6, 2, 7)
CASE = Case(prompts=PROMPTS, rewards=(MIXED,), completions=RAGGED)
"""Four prompts of different lengths, two scripted completions each."""
SAMPLED = replace(CASE, completions=None, temperature=1.4)
INNER_ENDS = replace(CASE, prompts=("1<eos>2<eos>+<eos>3=", "7=", "<eos>5=", "1+1<eos>"))
TWO_TURNS = replace(
    CASE, completions=tuple(((*turns[0],), ids("42", EOS)) for turns in RAGGED), reply="?7=", max_new_tokens=10
)


def first(trainer: Trainer, case: Case) -> Step:
    return trainer.train(case).steps[0]


def expected(case: Case, step: Step, top_k: int = 0) -> list[np.ndarray]:
    """Log-probabilities of every row's tokens, each row scored alone, by the weights before the step."""
    return scores(case, step.weights, step.rows, top_k)


@torch.no_grad()
def scores(case: Case, weights: Mapping[str, Tensor], rows: Sequence[Row], top_k: int = 0) -> list[np.ndarray]:
    """Log-probabilities of the rows' tokens under some weights; rows with the same tokens are scored once."""
    model = load(case.model, weights)
    different = {row.tokens_T.tobytes(): row.tokens_T for row in rows}
    logp = {key: log_probabilities(model, tokens_T, case.temperature, top_k) for key, tokens_T in different.items()}
    return [logp[row.tokens_T.tobytes()].numpy() for row in rows]


def gap(row: Row, expected_T: np.ndarray, got_T: np.ndarray | None = None) -> float:
    """Largest difference of the log-probabilities at the tokens that the policy wrote; 0 where none were taken."""
    logp_T = row.logp_T if got_T is None else got_T
    return float(np.nan_to_num(np.abs(logp_T - expected_T)[row.own_T], nan=0.0).max())


def hold_scores(case: Case, step: Step, what: str) -> None:
    """The learner's log-probabilities are those of each row alone; some were taken."""
    hold(any(np.isfinite(row.logp_T).any() for row in step.rows), f"{what}: nothing was scored")
    for row in step.rows:
        scored_T = np.isfinite(row.logp_T[row.own_T])
        hold(scored_T.all() or not scored_T.any(), f"{what}: part of a completion is not scored")
    worst = max(gap(row, e_T) for row, e_T in zip(step.rows, expected(case, step), strict=True))
    hold(worst < NEAR, f"{what}: log-probabilities differ by up to {worst:.2g} nats from each row scored alone")


def credits(step: Step) -> np.ndarray:
    """The credit of all tokens, row after row."""
    return np.concatenate([row.credit_T for row in step.rows])


def flat(gradient: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten().double() for name in sorted(gradient)])


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Relative difference of two gradients."""
    a, b = flat(one), flat(other)
    return float((a - b).norm() / a.norm().clamp(min=1e-12))


def same_weights(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def likelihood(case: Case, weights: Mapping[str, Tensor], rows: Sequence[Row]) -> np.ndarray:
    """Log-probability of what was written in each row, ``(B,)``."""
    logp = scores(case, weights, rows)
    return np.array([logp_T[row.own_T].sum() for row, logp_T in zip(rows, logp, strict=True)])


def needs_report(step: Step) -> None:
    if step.rows[0].behaviour_T is None:
        raise Lacks("log-probabilities from its sampler")


def needs_groups(trainer: Trainer) -> None:
    if trainer.baseline != "group":
        raise Lacks("a comparison within groups")


def needs_critic(trainer: Trainer) -> None:
    if trainer.baseline != "critic":
        raise Lacks("a critic")


# Tokens and masks ---------------------------------------------------------------------------------------------------


@trap(1, "a prompt has one beginning-of-sequence token, and its ids are sent, recorded and trained on unchanged")
def single_bos(trainer: Trainer) -> None:
    """Ids sent to the sampler and trained on, for tokenizers and chat templates with and without the token."""
    spoken = "{{% for m in messages %}}{0}{{{{ m['content'] }}}}{{% endfor %}}="
    for model in (
        Model(bos=True),
        Model(bos=True, template=spoken.format("<bos>")),
        Model(bos=True, template=spoken.format("")),
        Model(template=spoken.format("<end>")),
    ):
        for row in first(trainer, replace(SAMPLED, model=model)).rows:
            hold(row.sent.count(BOS) <= 1, f"a prompt was sent with {row.sent.count(BOS)} beginning-of-sequence tokens")
            hold(BOS not in row.sent[1:], "the beginning-of-sequence token is not the first")
            hold(
                row.tokens_T.tolist() == row.sent + row.written[0],
                "other ids are trained on than were sent and sampled",
            )


@trap(2, "the end token is trained on, whatever the padding token and however many end tokens there are")
def end_token(trainer: Trainer) -> None:
    """The mask and the derivative of the loss at the last token."""
    two_ends: Completions = tuple(((*turns[0][:-1], END if i % 2 else EOS),) for i, turns in enumerate(RAGGED))
    for model, completions in (
        (Model(), RAGGED),
        (Model(pad="own"), RAGGED),
        (Model(eos_ids=(EOS, END)), two_ends),
    ):
        step = first(trainer, replace(CASE, model=model, completions=completions))
        what = f"with the padding token {model.pad} and end tokens {model.eos_ids}"
        hold(credits(step).any(), f"{what}: nothing was trained on")
        for row in step.rows:
            hold(row.sampled_T[-1], f"{what}: the end token is masked")
            hold(row.credit_T[-1] != 0 or not row.credit_T.any(), f"{what}: the end token has no gradient")


@trap(3, "masks come from lengths: an end token inside a prompt hides nothing")
def inner_end_tokens(trainer: Trainer) -> None:
    """Log-probabilities of a ragged batch against each row scored alone."""
    for case in (INNER_ENDS, replace(INNER_ENDS, model=Model(pad="own"))):
        hold_scores(case, first(trainer, case), f"end tokens in prompts, padding token {case.model.pad}")


@trap(22, "a token's log-probability, mask and credit stand where the token stands")
def shift(trainer: Trainer) -> None:
    """First, last and end token of completions of one token up to the whole budget."""
    case = replace(CASE, completions=(*written(1, 2, 8, 3, 4, 6, 2), (ids("98765432"),)))
    step = first(trainer, case)
    for row, expected_T in zip(step.rows, expected(case, step), strict=True):
        hold(np.array_equal(row.sampled_T, row.own_T), "the mask is not where the completion is")
        hold(not row.credit_T[~row.own_T].any(), "credit outside the completion")
        for where, t in (("first", len(row.sent)), ("last", len(row.tokens_T) - 1)):
            off = abs(row.logp_T[t] - expected_T[t])
            hold(not off > NEAR, f"the log-probability of the {where} token is off by {off:.2g} nats")
    hold_scores(case, step, "all tokens")


@trap(23, "what the environment says has no gradient, no loss and no part in the metrics")
def reply_tokens(trainer: Trainer) -> None:
    """The derivative of the loss at prompt and reply; the logged length; the log-probabilities after the reply."""
    step = first(trainer, TWO_TURNS)
    hold(credits(step).any(), "nothing was trained on")
    for row in step.rows:
        hold(not row.credit_T[~row.own_T].any(), "a token of prompt or reply has a gradient")
        hold(not row.sampled_T[~row.own_T].any(), "a token of prompt or reply counts as sampled")
        hold(row.credit_T[row.own_T].all() or not row.credit_T.any(), "a sampled token has no gradient")
    tokens = np.mean([row.own_T.sum() for row in step.rows])
    hold(math.isclose(step.logged["new_tokens"], tokens, rel_tol=1e-5), "the logged length counts the reply")
    hold_scores(TWO_TURNS, step, "two turns")


@trap(25, "ids are never decoded and encoded again; a template that rewrites earlier turns is refused")
def retokenising(trainer: Trainer) -> None:
    """Ids of a completion whose text has a shorter encoding."""
    case = replace(CASE, completions=tuple((ids("12" * (1 + i % 3), EOS),) for i in range(8)))
    for row in first(trainer, case).rows:
        hold(row.tokens_T.tolist() == row.sent + row.written[0], "a completion was encoded again from its text")
    turns = replace(TWO_TURNS, completions=tuple((ids("12", EOS), ids("4", EOS)) for _ in range(8)))
    rewriting = Model(template="{{ messages[-1]['content'] }}=")
    for model in (Model(), rewriting):
        try:
            step = first(trainer, replace(turns, model=model))
        except Refused:
            hold(model == rewriting, "several turns are refused without a reason")
            continue
        except Lacks:
            return
        for row in step.rows:
            opening = row.sent + row.written[0]
            hold(row.tokens_T[: len(opening)].tolist() == opening, "the second turn rewrites the first")
            hold(row.tokens_T[-len(row.written[1]) :].tolist() == row.written[1], "the second turn was encoded again")


@trap(34, "ids beyond the tokenizer's have no probability, neither when sampling nor when learning")
def spare_logits(trainer: Trainer) -> None:
    """Sampled ids and log-probabilities of a model whose logits are twice as wide as its vocabulary."""
    case = replace(SAMPLED, model=Model(spare_logits=VOCAB), max_new_tokens=12)
    step = first(trainer, case)
    outside = sum(token >= VOCAB for row in step.rows for token in row.written[0])
    total = sum(len(row.written[0]) for row in step.rows)
    hold(outside == 0, f"{outside} of {total} sampled ids are none of the tokenizer's")
    hold_scores(case, step, "wide logits")


# Sampling and scoring -----------------------------------------------------------------------------------------------


@trap(4, "the learner scores tokens at the temperature that they were sampled at")
def temperature(trainer: Trainer) -> None:
    """Log-probabilities against log softmax(logits / T), and the gradient against that of their credit-weighted sum."""
    for T in (0.6, 1.0, 1.4):
        case = replace(CASE, temperature=T)
        step = first(trainer, case)
        hold_scores(case, step, f"T = {T}")
        model = load(case.model, step.weights)
        weighted = [torch.as_tensor(row.credit_T) * log_probabilities(model, row.tokens_T, T) for row in step.rows]
        (-torch.cat(weighted).sum()).backward()
        wanted = {name: parameter.grad for name, parameter in model.named_parameters() if name in step.gradient}
        hold(bool(wanted), "there is no gradient")
        off = distance(wanted, step.gradient)
        hold(off < SAME, f"T = {T}: the gradient differs by {off:.2g} of its length from that at the temperature")


@trap(5, "the sampler reports log-probabilities of the distribution that it samples from")
def behaviour(trainer: Trainer) -> None:
    """Reported log-probabilities against log softmax(logits / T), and the mean of exp(learner - sampler)."""
    for T in (0.6, 1.4):
        case = replace(SAMPLED, temperature=T)
        step = first(trainer, case)
        needs_report(step)
        worst = max(gap(row, e_T, row.behaviour_T) for row, e_T in zip(step.rows, expected(case, step), strict=True))
        hold(worst < NEAR, f"T = {T}: reported log-probabilities are off by up to {worst:.2g} nats")
        ratios = np.concatenate([np.exp(row.logp_T - row.behaviour_T)[row.own_T] for row in step.rows])
        mean = float(np.nanmean(ratios))
        hold(abs(mean - 1) < NEAR, f"T = {T}: the mean ratio of learner to sampler is {mean:.3f}")


@trap(6, "a cut distribution (top-k) is refused, or scored as cut")
def truncation(trainer: Trainer) -> None:
    """The refusal, or log-probabilities against those of the two likeliest tokens."""
    case = replace(SAMPLED, top_k=2)
    try:
        step = first(trainer, case)
    except Refused:
        return
    cut = expected(case, step, top_k=2)
    worst = max(gap(row, e_T) for row, e_T in zip(step.rows, cut, strict=True))
    hold(worst < NEAR, f"top_k=2 is sampled but not scored: log-probabilities are off by up to {worst:.2g} nats")


HOSTILE_SAMPLING: tuple[tuple[str, object], ...] = (
    ("temperature", 0.1),
    ("top_k", 1),
    ("top_p", 0.2),
    ("repetition_penalty", 3.0),
    ("no_repeat_ngram_size", 1),
    ("suppress_tokens", ids("01234")),
    ("max_new_tokens", 1),
)
"""What a generation config can recommend, none of which is the temperature or budget of a case."""


@trap(7, "a model's generation config has no say in the sampling")
def generation_config(trainer: Trainer) -> None:
    """Samples of one seed with and without a hostile config, and 256 tokens against the model's own distribution."""
    clean = [row.written for row in first(trainer, SAMPLED).rows]

    def changes(settings: tuple[tuple[str, object], ...]) -> bool:
        case = replace(SAMPLED, model=Model(generation=(("do_sample", True), *settings)))
        return [row.written for row in first(trainer, case).rows] != clean

    if changes(HOSTILE_SAMPLING):
        names = [setting[0] for setting in HOSTILE_SAMPLING if changes((setting,))]
        raise Fault(f"the model's {', '.join(names)} changed what is sampled")
    many = replace(SAMPLED, group=64, max_new_tokens=1, rewards=(MIXED * 32,), temperature=0.6)
    step = first(trainer, many)
    z = surprise(many, step)
    hold(abs(z) < 4, f"the likelihood of 256 samples is {z:.1f} standard deviations from what it should be")


def surprise(case: Case, step: Step) -> float:
    """How far the log-likelihood of one-token samples is from its mean under the model, in standard deviations."""
    model = load(case.model, step.weights)
    observed = mean = variance = 0.0
    for row in step.rows:
        with torch.no_grad():
            logits_V = model(input_ids=torch.tensor([row.sent])).logits[0, -1, :VOCAB]
        logp_V = (logits_V / case.temperature).log_softmax(dim=0).numpy()
        entropy = -(np.exp(logp_V) @ logp_V)
        observed += logp_V[row.written[0][0]]
        mean -= entropy
        variance += np.exp(logp_V) @ logp_V**2 - entropy**2
    return float((observed - mean) / math.sqrt(variance))


@trap(8, "a row's log-probabilities do not depend on its batch, and the gap between sampler and learner is shown")
def batch_shape(trainer: Trainer) -> None:
    """Log-probabilities of ragged batches of several sizes against each row alone; the logged mean and largest gap."""
    for rows_at_once in (1, None):
        for model, positions in ((Model(), "rotary"), (Model(family="gpt2"), "learned")):
            case = replace(CASE, model=model, rows_at_once=rows_at_once)
            hold_scores(case, first(trainer, case), f"{positions} positions, {rows_at_once or 8} rows at once")
    step = first(trainer, SAMPLED)
    needs_report(step)
    for name in ("logp_gap", "logp_gap_max"):
        hold(step.logged.get(name, math.inf) < NEAR, f"no small {name} is logged")


@trap(9, "noise between sampler and learner gives no weight that depends on length")
def length_of_ratio(trainer: Trainer) -> None:
    """The credit of completions of 4 to 48 tokens with and without normal noise of 0.1 on the sampler's report."""
    case = replace(CASE, completions=written(48, 4, 36, 12, 24, 40, 4, 44), max_new_tokens=52)
    clean, noisy = first(trainer, case), first(trainer, replace(case, sampler_noise=0.1))
    for before, after in zip(clean.rows, noisy.rows, strict=True):
        trained_T = before.credit_T != 0
        if trained_T.any():
            ratio = np.abs(after.credit_T[trained_T] / before.credit_T[trained_T]).mean()
            hold(0.7 < ratio < 1.4, f"{len(before.written[0])} tokens are weighted by {ratio:.2g}")


@trap(21, "the first update's ratio is 1: no dropout, no other mode")
def first_ratio(trainer: Trainer) -> None:
    """A model with dropout: log-probabilities against those without, and the ratio to the old policy in two updates."""
    model = Model(family="gpt2", dropout=0.1)
    for case in (replace(CASE, model=model), replace(CASE, model=model, updates=2)):
        step = first(trainer, case)
        worst = max(float(np.nan_to_num(np.abs(row.ratio_T - 1), nan=0.0).max()) for row in step.rows)
        hold(worst < NEAR, f"a ratio on a fresh batch is off by {worst:.2g}")
        hold_scores(case, step, "with dropout in the model's config")


# Credit -------------------------------------------------------------------------------------------------------------


@trap(13, "the gradient is that of the whole batch, however it is split and ordered")
def accumulation(trainer: Trainer) -> None:
    """Gradients of one batch in parts of 1, 4 and 8 rows and with its prompts in another order, for every average."""
    order = (2, 0, 3, 1)
    rows = [2 * prompt + k for prompt in order for k in range(2)]
    for aggregation in trainer.aggregations or (None,):
        case = replace(CASE, aggregation=aggregation)
        whole = first(trainer, case).gradient
        hold(bool(whole), f"{aggregation}: there is no gradient")
        for rows_at_once in (1, 4):
            off = distance(whole, first(trainer, replace(case, rows_at_once=rows_at_once)).gradient)
            hold(
                off < SAME,
                f"{aggregation}, {rows_at_once} rows at once: the gradient differs by {off:.2g} of its length",
            )
        other = replace(
            case,
            prompts=tuple(PROMPTS[prompt] for prompt in order),
            completions=tuple(RAGGED[row] for row in rows),
            rewards=(tuple(MIXED[row] for row in rows),),
        )
        off = distance(whole, first(trainer, other).gradient)
        hold(off < SAME, f"{aggregation}, prompts in another order: the gradient differs by {off:.2g} of its length")


@trap(14, "each average weighs long and short completions as its formula says")
def length_bias(trainer: Trainer) -> None:
    """Credit of a right answer of 2 tokens against one of 6, each in a group with a wrong one of 3."""
    if not trainer.aggregations:
        raise Lacks("an average that it names")
    formula: dict[Aggregation, float] = {
        "token_mean": 1.0,
        "sequence_mean": 3.0,
        "sequence_sum": 1.0,
        "constant": 1.0,
    }
    for aggregation in trainer.aggregations:
        case = replace(
            CASE,
            prompts=PROMPTS[:2],
            rewards=((1.0, 0.0, 1.0, 0.0),),
            completions=written(2, 3, 6, 3),
            aggregation=aggregation,
        )
        short, _, long, _ = (row.credit_T[row.own_T] for row in first(trainer, case).rows)
        for credit in (short, long):
            hold(
                np.ptp(credit) <= 1e-5 * abs(credit[0]), f"{aggregation}: the tokens of a completion weigh differently"
            )
        ratio = short[0] / long[0]
        hold(
            math.isclose(ratio, formula[aggregation], rel_tol=1e-4),
            f"{aggregation}: a short completion's token weighs {ratio:.3g} times a long one's, not {formula[aggregation]:g}",
        )


HOSTILE_GROUPS: tuple[tuple[float | None, ...], ...] = (
    (0.95,) * 7 + (0.0,),
    (0.95,) * 8,
    (1e6,) * 7 + (0.0,),
    (0.3,) * 7 + (0.1 + 0.2,),
    (0.0,) * 7 + (1e-9,),
    (1.0, *(None,) * 7),
    (None,) * 8,
    (-1e6, 1e6, 0.0, None, 1.0, 2.0, 3.0, 4.0),
)
"""Groups of eight rewards that a standard deviation can go wrong on."""


@trap(15, "advantages are bounded for any finite rewards")
def bounded_advantages(trainer: Trainer) -> None:
    """Advantages in groups with an outlier, with tiny differences, with one graded completion."""
    case = replace(
        CASE,
        prompts=PROMPTS * 2,
        group=8,
        rewards=(sum(HOSTILE_GROUPS, ()),),
        completions=RAGGED * 8,
    )
    step = first(trainer, case)
    compared = {"group": 8, "none": 2, "critic": sum(int(row.own_T.sum()) for row in step.rows)}[trainer.baseline]
    for i, group in enumerate(HOSTILE_GROUPS):
        graded = [reward for reward in group if reward is not None]
        spread = max(graded, default=0.0) - min(graded, default=0.0)
        advantage = np.concatenate([row.advantage_T for row in step.rows[8 * i : 8 * i + 8]])
        hold(np.isfinite(advantage).all(), f"rewards {group}: an advantage is not finite")
        most = float(np.abs(advantage).max())
        hold(most <= 1.0001 * max(math.sqrt(compared), spread), f"rewards {group}: an advantage is {most:.3g}")


@trap(16, "a completion that has none to be compared with has no advantage")
def singleton(trainer: Trainer) -> None:
    """Credit in a group of four of which one is graded."""
    needs_groups(trainer)
    case = replace(
        CASE, prompts=PROMPTS[:2], group=4, rewards=((5.0, None, None, None, 1.0, 0.0, 1.0, 0.0),), completions=RAGGED
    )
    step = first(trainer, case)
    alone = max(float(np.abs(row.credit_T).max()) for row in step.rows[:4])
    hold(alone == 0, f"it has a credit of {alone:.2g}")
    hold(credits(step).any(), "nothing was trained on")


@trap(17, "a group without spread teaches nothing, is counted, and its share in the denominators is plain")
def flat_groups(trainer: Trainer) -> None:
    """Credit and the logged share of a group of equal rewards, and what it does to the group beside it."""
    needs_groups(trainer)
    case = replace(CASE, prompts=PROMPTS[:2], rewards=((0.7, 0.1, 0.7, 0.1),), completions=written(4, 4, 4, 4))
    beside, alone = first(trainer, case), first(trainer, replace(case, rewards=((0.7, 0.1, 0.7, 0.7),)))
    worst = max(float(np.abs(row.credit_T).max()) for row in alone.rows[2:])
    hold(worst == 0, f"a group of equal rewards has a credit of {worst:.2g}")
    hold(alone.logged.get("flat_groups") == 0.5, f"their logged share is {alone.logged.get('flat_groups')}, not 0.5")
    ratio = alone.rows[0].credit_T[-1] / beside.rows[0].credit_T[-1]
    counted, left_out = math.isclose(ratio, 1, rel_tol=1e-4), math.isclose(ratio, 2, rel_tol=1e-4)
    hold(counted or left_out, f"beside it another group's credit is {ratio:.3g} times what it was")


@trap(18, "a completion that could not be graded is in neither baseline nor gradient: it is no 0")
def ungraded(trainer: Trainer) -> None:
    """Credit of the ungraded row, and advantages of those beside it."""
    if trainer.baseline == "critic":
        case = replace(CASE, group=1, rewards=((1.0, 0.0, None, 0.5),), completions=RAGGED[:4])
        with_none = first(trainer, case).rows
        case = replace(
            CASE,
            group=1,
            prompts=(*PROMPTS[:2], PROMPTS[3]),
            rewards=((1.0, 0.0, 0.5),),
            completions=(*RAGGED[:2], RAGGED[3]),
        )
        without = first(trainer, case).rows
        pairs = zip((with_none[0], with_none[1], with_none[3]), without, strict=True)
        worst = max(float(np.abs(one.credit_T - other.credit_T).max()) for one, other in pairs)
        hold(worst < NEAR, f"the ungraded row changes the credit of others by {worst:.2g}")
        hold(not with_none[2].credit_T.any(), "the ungraded row has a gradient")
        return
    rewards = (1.0, 0.0, None, 1.0, 1.0, 0.0, 0.0, 1.0)
    rows = first(trainer, replace(CASE, prompts=PROMPTS[:2], group=4, rewards=(rewards,))).rows
    hold(not rows[2].credit_T.any(), "the ungraded row has a gradient")
    hold(rows[0].credit_T.any(), "its group is not trained on at all")
    if trainer.baseline == "group":
        total = sum(float(rows[i].advantage_T[-1]) for i in (0, 1, 3))
        hold(
            abs(total) < 1e-3,
            f"the advantages of the graded rows sum to {total:.3g}: the ungraded one moved their mean",
        )


@trap(20, "rewards move the policy, the right way, with adapters too")
def gradient_by_default(trainer: Trainer) -> None:
    """Sign of the credit, and likelihood of right and wrong completions before and after a step."""
    for lora in (False, True):
        case = replace(CASE, learning_rate=3e-2 if lora else 1e-3, lora=lora)
        run = trainer.train(case)
        step = run.steps[0]
        what = "with adapters: " if lora else ""
        hold(any(p.any() for p in step.gradient.values()), f"{what}the gradient is 0")
        right = step.rows[::2], 1.0
        wrong = step.rows[1::2], -1.0
        for rows, sign in (right, wrong):
            total = sum(float(row.credit_T.sum()) for row in rows)
            hold(total * sign >= 0, f"{what}completions of reward {(sign + 1) / 2:g} have credit {total:.2g}")
        moved_B = likelihood(case, run.weights, step.rows) - likelihood(case, step.weights, step.rows)
        hold(moved_B[::2].sum() > moved_B[1::2].sum(), f"{what}right completions gain no more than wrong ones")


@trap(19, "a KL coefficient acts, and its gradient is that of the KL to the start")
def kl(trainer: Trainer) -> None:
    """The gradient of a second step plus that with all rewards turned round, which leaves what the coefficient adds, against
    the exact KL of a one-token completion."""
    case = replace(
        CASE,
        prompts=("1+1=",) * 512,
        rewards=((1.0, 0.0) * 256, (1.0, 0.0) * 256),
        completions=None,
        max_new_tokens=1,
        learning_rate=1e-2,
        kl=10.0,
    )
    start, one = trainer.train(case).steps
    other = trainer.train(replace(case, rewards=((1.0, 0.0) * 256, (0.0, 1.0) * 256))).steps[1]
    hold(same_weights(one.weights, other.weights), "two runs of one seed differ before their rewards do")
    added = flat(one.gradient) + flat(other.gradient)
    hold(bool(added.norm() > 1e-3 * flat(one.gradient).norm()), "the coefficient changes nothing")
    reverse, forward = (
        float(torch.nn.functional.cosine_similarity(added, flat(exact), dim=0))
        for exact in kl_gradients(case, one, start.weights)
    )
    hold(
        max(reverse, forward) > 0.8,
        f"what it adds has a cosine of {reverse:.2f} with the gradient of the reverse KL, {forward:.2f} of the forward",
    )


def kl_gradients(case: Case, step: Step, reference: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Exact gradients of KL(policy || reference) and KL(reference || policy) after the first prompt."""
    prompt_1T = torch.tensor([step.rows[0].sent])
    with torch.no_grad():
        ref_V = load(case.model, reference)(input_ids=prompt_1T).logits[0, -1].log_softmax(dim=0)
    for reverse in (True, False):
        model = load(case.model, step.weights)
        logp_V = model(input_ids=prompt_1T).logits[0, -1].log_softmax(dim=0)
        divergence = logp_V.exp() @ (logp_V - ref_V) if reverse else ref_V.exp() @ (ref_V - logp_V)
        divergence.backward()
        yield {name: p.grad for name, p in model.named_parameters() if name in step.gradient}


# Critics ------------------------------------------------------------------------------------------------------------


@trap(24, "a reply between two turns costs no credit, however long")
def gap_in_credit(trainer: Trainer) -> None:
    """Advantages with lambda 0.95 and a critic that says 0.5, with replies of 1 and of 20 tokens."""
    needs_critic(trainer)
    case = replace(TWO_TURNS, lam=0.95, value=0.5)
    short, long = (first(trainer, replace(case, reply="?" * n)).rows for n in (1, 20))
    worst = max(
        float(np.abs(a.advantage_T[a.own_T] - b.advantage_T[b.own_T]).max()) for a, b in zip(short, long, strict=True)
    )
    hold(worst < NEAR, f"advantages differ by {worst:.2g}")


@trap(26, "an answer that was cut is told from one that ended, and trained on whole or not at all")
def cut_answers(trainer: Trainer) -> None:
    """The logged share of cut answers, beside one that ends on the last token of its budget; and their credit."""
    completions = (*written(2, 8, 5, 3, 4, 8, 2), (ids("98765432"),))
    for pad in ("eos", "own"):
        step = first(trainer, replace(CASE, model=Model(pad=pad), completions=completions))
        share = step.logged["cut_share"]
        hold(math.isclose(share, 1 / 8), f"{share:.1%} of the answers count as cut, not 12.5 %")
        for row in step.rows:
            trained_T = row.credit_T[row.own_T] != 0
            hold(trained_T.all() or not trained_T.any(), "part of an answer is trained on")


@trap(27, "a reward stands on the last token that was written, that of a full answer too")
def place_of_reward(trainer: Trainer) -> None:
    """Rewards by token; and with a critic, advantages with lambda 0, which differ at the last token alone."""
    completions = (*written(1, 2, 3, 4, 5, 6, 7), (ids("98765432"),))
    step = first(trainer, replace(CASE, completions=completions, value=0.5, lam=0.0))
    for row, reward in zip(step.rows, MIXED, strict=True):
        if row.reward_T is None:
            raise Lacks("rewards for single tokens")
        paid = np.flatnonzero(row.reward_T).tolist()
        hold(set(paid) <= {len(row.tokens_T) - 1}, f"tokens {paid} of {len(row.tokens_T)} are paid")
        hold(bool(paid) or reward == 0, "a reward is lost")
        if trainer.baseline == "critic":
            before, last = row.advantage_T[row.own_T][:-1], row.advantage_T[-1]
            hold(np.ptp(before) < NEAR if len(before) else True, "the reward is credited before the last token")
            hold(((last - before) * (reward - 0.5) > 0).all(), "the last token has not the reward's credit")


@trap(29, "advantages are whitened over the tokens that were sampled, and no others")
def whitening(trainer: Trainer) -> None:
    """Mean and unbiased variance of the sampled tokens' advantages in ragged batches of one and two turns."""
    needs_critic(trainer)
    for case in (replace(CASE, lam=0.95, value=0.3), replace(TWO_TURNS, lam=0.95, value=0.3)):
        rows = first(trainer, case).rows
        sampled = np.concatenate([row.advantage_T[row.own_T] for row in rows])
        hold(abs(sampled.mean()) < NEAR, f"their mean is {sampled.mean():.2g}")
        hold(abs(sampled.var(ddof=1) - 1) < 1e-3, f"their variance is {sampled.var(ddof=1):.4g}")


@trap(30, "the critic can learn first: the policy stands still meanwhile, and its error is shown to fall")
def critic_first(trainer: Trainer) -> None:
    """Weights and the critic's logged error over two steps of warm-up and one after."""
    needs_critic(trainer)
    run = trainer.train(
        replace(CASE, prompts=PROMPTS * 3, rewards=((1.0, 0.9) * 4,) * 3, critic_warmup=2, learning_rate=1e-2)
    )
    hold(same_weights(run.steps[0].weights, run.steps[2].weights), "the policy moves while the critic warms up")
    hold(not same_weights(run.steps[2].weights, run.weights), "the policy does not move after the warm-up")
    errors = [step.logged["value_loss"] for step in run.steps]
    hold(errors[0] > errors[1] > errors[2], f"the critic's error is {errors}")
    hold(all("explained_variance" in step.logged for step in run.steps), "the explained variance is not logged")


# Runs ---------------------------------------------------------------------------------------------------------------


@trap(10, "with a learning rate of 0 nothing drifts")
def drift(trainer: Trainer) -> None:
    """Weights, and the gap between sampler and learner, over five steps."""
    case = replace(SAMPLED, prompts=PROMPTS * 5, rewards=(MIXED,) * 5)
    run = trainer.train(case)
    for step in run.steps:
        hold(same_weights(step.weights, run.weights), "the weights move")
        hold_scores(case, step, "a later step")
        if step.rows[0].behaviour_T is not None:
            worst = max(
                float(np.nan_to_num(np.abs(row.logp_T - row.behaviour_T)[row.own_T]).max()) for row in step.rows
            )
            hold(worst < NEAR, f"sampler and learner differ by {worst:.2g} nats")


@trap(12, "after a step the sampler has all of the new weights, adapters too")
def sync(trainer: Trainer) -> None:
    """Whether 256 tokens of the second step fit the new weights better than the old, and their reported likelihood."""
    for lora in (False, True):
        case = replace(
            SAMPLED,
            prompts=PROMPTS * 2,
            group=64,
            rewards=(MIXED * 32,) * 2,
            max_new_tokens=1,
            learning_rate=0.3 if lora else 3e-2,
            lora=lora,
        )
        run = trainer.train(case)
        old, new = run.steps
        what = "with adapters: " if lora else ""
        hold(not same_weights(old.weights, new.weights), f"{what}the weights did not move")
        gain = (likelihood(case, new.weights, new.rows) - likelihood(case, old.weights, new.rows)).sum()
        hold(gain > 0, f"{what}samples of the second step fit the old weights better, by {-gain:.1f} nats")
        if new.rows[0].behaviour_T is not None:
            worst = max(gap(row, e_T, row.behaviour_T) for row, e_T in zip(new.rows, expected(case, new), strict=True))
            hold(worst < NEAR, f"{what}the sampler's report is off by {worst:.2g} nats from the new weights")


@trap(32, "the logged reward is the one that is trained on")
def logged_reward(trainer: Trainer) -> None:
    """The logged mean against that of the rewards given, with and without an ungraded one."""
    for rewards in ((1.0, 0.0, 0.5, 0.25, 1.0, 0.0, 0.0, 1.0), (1.0, 0.0, None, 0.25, 1.0, 0.0, 0.0, 1.0)):
        logged = first(trainer, replace(CASE, rewards=(rewards,))).logged["reward"]
        mean = float(np.mean([reward for reward in rewards if reward is not None]))
        hold(math.isclose(logged, mean, rel_tol=1e-5), f"{logged:.4f} is logged for a mean of {mean:.4f}")


@trap(33, "a run that was killed and resumed ends as one that never was")
def resume(trainer: Trainer) -> None:
    """Ids sampled and the last weights of four steps, bit by bit, one of the two runs killed after the second."""
    prompts = tuple(f"{a}+{b}=" for a in range(4) for b in range(4))
    case = replace(SAMPLED, prompts=prompts, rewards=(MIXED,) * 4, learning_rate=1e-2)
    whole, resumed = trainer.train(case), trainer.train(replace(case, killed_after=2))
    hold(len(whole.steps) == len(resumed.steps), f"it takes {len(resumed.steps)} steps, not {len(whole.steps)}")
    for number, (one, other) in enumerate(zip(whole.steps, resumed.steps, strict=True), start=1):
        hold(asked(one) == asked(other), f"step {number} has other prompts")
        for a, b in zip(one.rows, other.rows, strict=True):
            hold(a.written == b.written, f"step {number} has other completions")
    hold(same_weights(whole.weights, resumed.weights), "the last weights differ")


def asked(step: Step) -> list[list[int]]:
    return [row.sent for row in step.rows]


CHECKS.sort(key=lambda check: check.number)

"""The doctor: looks at every step of a training, and says in plain language what is wrong with it.

A rule measures one number a step. Past its threshold in three steps in a row it starts an alarm, and as many steps within it
end the alarm. Both are said once, with two completions of the step, and kept in the run's ``alarms.jsonl``.

============  =========  =================================================================================================
rule          threshold  starts an alarm when
============  =========  =================================================================================================
not_finite    > 0        so many weights, gradients and metrics are NaN or infinite, in any step
cut_answers   > 0.4      this share of the answers is cut at its budget and not right
no_spread     > 0.9      this share of the groups has equal rewards, those that are all right left out
repeated      > 0.4      one completion's share of the batch is larger by this than that of any reference
length        > 3        completions are so many times as long as in the first steps
no_end        < 0.1      completions that end by themselves are this share of what they were, over 0.2, in the first steps
ungraded      > 0.1      this share of the episodes could not be graded
judge_budget  > 0.9      this share of a judge's calls or tokens is spent, in any step
entropy       < 0.1      it is this share of what it was in the first steps, and over a tenth of the answers is wrong
ratio         > 0.3      log-probabilities of tokens moved by this on average, in nats, since they were sampled
kl            > 0.5      the KL to the start is this much, in nats a token
grad_norm     > 10       the gradient is so many times as long as usual, in any step
held_out      > 4        a held-out figure fell by so many times its noise and the reward rose since, in any step
============  =========  =================================================================================================

Another threshold is a setting: ``alarms={"length": 5.0}``; ``inf``, or 0 where an alarm is below it, turns a rule off. Of
supervised fine-tuning, where the policy writes nothing, only ``not_finite``, ``ungraded``, ``judge_budget`` and ``grad_norm``
are told. All that spans steps is in the agent's state, and so in every checkpoint.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from agents.core.trajectories import Trajectories
from rewards.terminal import visible
from textenv.task import Finish

if TYPE_CHECKING:
    from agents.core.agent import Agent
    from agents.core.training import Training

ALARMS_FILE = "alarms.jsonl"
FIRST_STEPS = 10
"""Steps whose mean the later ones are held against."""
SOLVED = 0.9
"""Accuracy from which on there is little left to try, so that a low entropy is no loss."""
WEIGHTS_EVERY = 10
"""Steps from one look at all weights to the next."""
LONGEST_SAMPLE = 200
MAY_BE_NAN = ("reward", "return", "accuracy", "explained_variance", "monitor/", "tripwire/", "held_out")
"""Beginnings of the names of metrics that are NaN where there is nothing to tell them by."""


class Doctor:
    """Holds the steps of one training against the rules.

    Args:
        training: whose run keeps the alarms.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self._completions: list[list[str]] = []

    def look(self, batch: Trajectories) -> None:
        """Tell what is wrong with the step that is being logged; with ``on_alarm`` "stop", end the training with it."""
        agent = self.training.agent
        seen = Seen(self.training, batch)
        self._completions = batch.completions
        for name, rule in RULES.items():
            if rule.sampled and not {"reward", "logp_gap"} <= seen.metrics.keys():
                continue
            found, threshold = rule.measure(seen), self._threshold(name)
            past = found.value < threshold if rule.below else found.value > threshold
            if math.isnan(found.value) or not self._turned(name, past):
                continue
            sentence = (
                rule.sentence.format(value=found.value, **found.words) if past else f"{name} is no longer alarming"
            )
            self._tell(self.training.step, name, found, sentence, over=not past)
            if past and agent.config.on_alarm == "stop":
                self.training.stop(f"{sentence} (alarm {name!r})")

    def look_at_error(self) -> None:
        """Tell which weight, or else which gradient, is the first that is not finite, where a step broke for that."""
        if broken := list(not_finite_tensors(self.training.agent)):
            sentence = RULES["not_finite"].sentence.format(first=broken[0]) + "; the samples are of the step before"
            self._tell(self.training.step + 1, "not_finite", Found(len(broken)), sentence)

    def _threshold(self, name: str) -> float:
        return self.training.agent.config.alarms.get(name, RULES[name].threshold)

    def _turned(self, name: str, past: bool) -> bool:
        """Whether with this step an alarm starts or is over."""
        state, key = self.training.agent.state, f"doctor/{name}"
        on, against = state.get(f"{key}/on", 0), state.get(f"{key}/against", 0)
        against = against + 1 if past != on else 0
        turned = against == RULES[name].steps
        state |= {f"{key}/on": int(past if turned else on), f"{key}/against": 0 if turned else against}
        return turned

    def _tell(self, step: int, name: str, found: Found, sentence: str, *, over: bool = False) -> None:
        rows = list(range(len(self._completions)))
        if found.shown is not None:
            rows = found.shown().double().argsort(descending=True, stable=True).tolist()
        samples = [one_line(" | ".join(self._completions[row])) for row in rows[:2]]
        alarm = {"step": step, "rule": name, "over": over, "value": found.value, "threshold": self._threshold(name)}
        self.training.run.append(ALARMS_FILE, alarm | {"sentence": sentence, "samples": samples})
        what = "all clear" if over else "ALARM"
        measured = f"{name} {found.value:.3g}, threshold {self._threshold(name):g}"
        print(f"{what} in step {step}: {sentence} ({measured})", *samples, sep="\n    ", flush=True)


def one_line(text: str) -> str:
    """``text`` in one line with nothing in it that acts, its middle left out where it is long.

    Example:
        >>> one_line("one\\n\\x1b[31mtwo")
        'one ␛[31mtwo'
    """
    half = LONGEST_SAMPLE // 2
    if len(text) > LONGEST_SAMPLE:
        text = f"{text[:half]} … {text[-half:]}"
    return " ".join(visible(text).split())


def check_alarms(thresholds: Mapping[str, float]) -> None:
    """Refuse thresholds that no rule has.

    Raises:
        ValueError: an unknown rule, or NaN.
    """
    for name, threshold in thresholds.items():
        if name not in RULES:
            nearest = difflib.get_close_matches(name, RULES, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise ValueError(f"alarms names {name!r}, which is no rule; {hint}there are {', '.join(RULES)}")
        if math.isnan(threshold):
            raise ValueError(f"the threshold of the alarm {name!r} must be a number, got nan; inf turns a rule off")


# --- The rules ---


@dataclass
class Seen:
    """A step as the rules see it. What they put in the agent's state they find again in the next step."""

    training: Training
    batch: Trajectories

    @property
    def agent(self) -> Agent:
        return self.training.agent

    @property
    def metrics(self) -> dict[str, float]:
        return self.training.metrics

    @cached_property
    def right_B(self) -> Tensor:
        """Bool: the episodes whose answer is right."""
        return self.batch.outcome_B >= 1

    def over_first(self, name: str, value: float, least: float = 0.0) -> float:
        """``value`` over its mean in the first steps; NaN before they are over, or where that mean is not above ``least``."""
        state, key = self.agent.state, f"doctor/{name}/first"
        steps, mean = state.get(f"{key}/steps", 0), state.get(key, 0.0)
        if steps == FIRST_STEPS:
            return value / mean if mean > least else math.nan
        if not math.isnan(value):
            state |= {f"{key}/steps": steps + 1, key: mean + (value - mean) / (steps + 1)}
        return math.nan


@dataclass(frozen=True)
class Found:
    """What a rule measured.

    Attributes:
        value: to be held against the threshold; NaN where there is nothing to tell.
        words: more for the sentence.
        shown: gives a number of each episode ``(B,)``; those with the largest are shown, by default the first.
    """

    value: float
    words: Mapping[str, Any] = field(default_factory=dict)
    shown: Callable[[], Tensor] | None = None


Measure = Callable[[Seen], Found]


@dataclass(frozen=True)
class Rule:
    """When an alarm is due.

    Attributes:
        threshold: the default.
        sentence: what is wrong and what to do, formatted with ``value`` and the words that were found.
        measure: what is held against the threshold.
        below: an alarm is due below the threshold, not above it.
        steps: in a row that start an alarm, or end it.
        sampled: only told of what the policy sampled.
    """

    threshold: float
    sentence: str
    measure: Measure
    below: bool = False
    steps: int = 3
    sampled: bool = True


RULES: dict[str, Rule] = {}
"""By name, in the order in which they are told."""


def rule(threshold: float, sentence: str, **options: Any) -> Callable[[Measure], Measure]:
    """Makes a function that measures into the rule of its name."""

    def add(measure: Measure) -> Measure:
        RULES[measure.__name__] = Rule(threshold, sentence, measure, **options)
        return measure

    return add


@rule(
    0,
    "{first} is NaN or infinite; go on from an older checkpoint, with a lower learning rate or in float32",
    steps=1,
    sampled=False,
)
def not_finite(seen: Seen) -> Found:
    training = seen.training
    broken = [
        f"the metric {name}"
        for name, value in seen.metrics.items()
        if not math.isfinite(value) and (math.isinf(value) or not name.startswith(MAY_BE_NAN))
    ]
    # What is wrong with the weights shows in the metrics of the next step, if there is one.
    if broken or training.step % WEIGHTS_EVERY == 0 or training.episodes >= training.total_episodes:
        weights = [weight for group in seen.agent.learner.optimizer.param_groups for weight in group["params"]]
        if not math.isfinite(get_total_norm(weights)):
            broken = [*not_finite_tensors(seen.agent), *broken]
    return Found(len(broken), {"first": broken[0]} if broken else {})


def not_finite_tensors(agent: Agent) -> Iterator[str]:
    """The weights, then the gradients, of policy and critic that are not finite."""
    critic = agent.learner.critic
    named = [*agent.policy.named_parameters(), *([] if critic is None else critic.named_parameters("critic"))]
    yield from (f"the weight {name}" for name, weight in named if not weight.isfinite().all())
    for name, weight in named:
        if weight.grad is not None and not weight.grad.isfinite().all():
            yield f"the gradient of {name}"


@rule(
    0.4,
    "{value:.0%} of the answers are cut at their budget and not right; raise max_new_tokens, or pay for short answers",
)
def cut_answers(seen: Seen) -> Found:
    if not seen.metrics["cut_share"]:
        return Found(0.0)
    cut_B = seen.batch.cut_B & ~seen.right_B
    return Found(float(cut_B.double().mean()), shown=lambda: cut_B)


@rule(
    0.9,
    "in {value:.0%} of the groups all rewards are equal, though not all right, so that nothing is learned from them; take "
    "easier problems, a larger group_size or a finer reward",
)
def no_spread(seen: Seen) -> Found:
    flat = seen.metrics.get("groups_without_spread", math.nan)  # absent where there are no groups
    return Found(flat - seen.metrics.get("groups_all_right", 0.0), shown=lambda: ~seen.right_B)


@rule(
    0.4,
    "{share:.0%} of the completions are the same text, though {due:.0%} at most should be; the policy no longer reads its "
    "prompts",
)
def repeated(seen: Seen) -> Found:
    batch = seen.batch
    # Where there is no reference, different prompts want different completions.
    wanted = [prompt if ref is None else str(ref) for prompt, ref in zip(batch.prompts, batch.references, strict=True)]
    texts = list(map(tuple, batch.completions))
    ((text, times),) = Counter(texts).most_common(1)
    share, due = times / len(batch), max(Counter(wanted).values()) / len(batch)
    words = {"share": share, "due": due}
    return Found(share - due, words, lambda: torch.tensor([each == text for each in texts]))


@rule(
    3,
    "completions are {value:.1f} times as long as in the first steps, {mean:.0f} tokens; does the reward pay for that?",
)
def length(seen: Seen) -> Found:
    mean = seen.metrics["new_tokens_mean"]
    return Found(seen.over_first("length", mean), {"mean": mean}, lambda: seen.batch.sampled_BT.sum(dim=1))


@rule(
    0.1,
    "only {share:.1%} of the completions end by themselves, {value:.0%} of what it was in the first steps; the "
    "end-of-sequence token is being unlearned",
    below=True,
)
def no_end(seen: Seen) -> Found:
    finish_B = seen.batch.finish_B
    ended_B = (finish_B == Finish.EOS) | (finish_B == Finish.STOP)
    share = float(ended_B.mean())
    return Found(seen.over_first("no_end", share, least=0.2), {"share": share}, lambda: torch.from_numpy(~ended_B))


@rule(0.1, "{value:.0%} of the episodes could not be graded; their error in the rollouts says why", sampled=False)
def ungraded(seen: Seen) -> Found:
    ungraded = [score.value is None for score in seen.batch.scores]
    return Found(sum(ungraded) / len(ungraded), shown=lambda: torch.tensor(ungraded))


@rule(
    0.9,
    "{value:.0%} of the judge's budget is spent, and what comes after it is ungraded; raise max_calls or max_tokens",
    steps=1,
    sampled=False,
)
def judge_budget(seen: Seen) -> Found:
    from rewards.judge.chat import BaseChat

    # A judge has a chat, a reward that has a judge compare has the judge.
    chats = [getattr(getattr(part, "judge", part), "chat", None) for part in seen.agent.reward.walk()]
    spent = [
        used / budget
        for chat in chats
        if isinstance(chat, BaseChat)
        for used, budget in ((chat.calls, chat.max_calls), (chat.tokens, chat.max_tokens))
        if budget
    ]
    return Found(max(spent, default=math.nan))


@rule(
    0.1,
    "the entropy fell to {mean:.3g} nats a token, {value:.0%} of what it was in the first steps, though answers are still "
    "wrong: nothing new is tried; lower the learning rate, or raise clip_high or the temperature",
    below=True,
)
def entropy(seen: Seen) -> Found:
    mean = seen.metrics.get("entropy", math.nan)  # absent where nothing was learned
    left = seen.over_first("entropy", mean)
    value = max(left, 1.0) if seen.metrics["accuracy"] >= SOLVED else left
    return Found(value, {"mean": mean}, lambda: ~seen.right_B)


@rule(
    0.3,
    "the log-probabilities of tokens moved by {value:.2f} nats on average since they were sampled; lower the learning rate, "
    "or updates_per_batch and epochs_per_batch",
)
def ratio(seen: Seen) -> Found:
    ratio_BT = seen.batch.noted.get("ratio")
    if ratio_BT is None:
        return Found(math.nan)
    moved_BT = torch.where(seen.batch.sampled_BT, ratio_BT.log().abs().clamp(max=20), torch.nan)
    return Found(float(moved_BT.nanmean()), shown=lambda: moved_BT.nansum(dim=1))


@rule(0.5, "the policy is {value:.2f} nats a token away from its start; raise the KL coefficients, or set kl_target")
def kl(seen: Seen) -> Found:
    if seen.batch.kl_B is None:
        return Found(math.nan)
    kl_B = seen.batch.kl_B
    return Found(float(kl_B.mean()) / seen.metrics["new_tokens_mean"], shown=lambda: kl_B)


@rule(
    10,
    "the gradient's norm jumped to {norm:.3g}, {value:.0f} times the usual {usual:.3g}; look at the rewards and lengths of "
    "this step",
    steps=1,
    sampled=False,
)
def grad_norm(seen: Seen) -> Found:
    """Over a running median, which each norm moves by a twentieth of itself."""
    norm, state, key = seen.metrics.get("grad_norm", 0.0), seen.agent.state, "doctor/grad_norm"
    if not norm > 0:  # nothing was learned, or by the critic alone
        return Found(math.nan)
    steps, usual = state.get(f"{key}/steps", 0), state.get(f"{key}/usual", norm)
    state |= {f"{key}/steps": steps + 1, f"{key}/usual": usual * (1.05 if norm > usual else 1 / 1.05)}
    return Found(norm / usual if steps >= FIRST_STEPS else math.nan, {"norm": norm, "usual": usual})


@rule(
    4,
    "{name} fell from {best:.3g} to {held:.3g}, {value:.1f} times its noise, while the reward rose from {best_paid:.3g} to "
    "{paid:.3g}: the reward is being gamed, or the training problems are learned by heart",
    steps=1,
)
def held_out(seen: Seen) -> Found:
    reward = seen.metrics["reward"]
    names = [
        name for name, value in seen.metrics.items() if name.startswith("held_out") and not math.isnan(value + reward)
    ]
    falls = [fall_from_best(seen.agent.state, name, seen.metrics[name], reward) for name in names]
    return max(falls, key=lambda found: found.value, default=Found(math.nan))


def fall_from_best(state: dict[str, float], name: str, value: float, reward: float) -> Found:
    """How far a figure is below its best, in deviations of its noise, if the reward rose since; all smoothed exponentially.

    The deviation of the noise is told by the mean absolute difference of neighbours, of which it is √π/2 where it is normal,
    and taken for a hundredth of the best at least. (By the mean square one sudden fall would hide itself.)
    """
    keys = ("count", "last", "apart", "held", "paid", "best", "best_paid")
    start = (0, value, 0.0, value, reward, value, reward)
    now = {key: state.get(f"doctor/{name}/{key}", first) for key, first in zip(keys, start, strict=True)}
    now["apart"] += abs(value - now["last"])
    now["held"] += (value - now["held"]) / 3
    now["paid"] += (reward - now["paid"]) / 3
    if now["held"] >= now["best"]:
        now |= {"best": now["held"], "best_paid": now["paid"]}
    now |= {"count": now["count"] + 1, "last": value}
    state |= {f"doctor/{name}/{key}": number for key, number in now.items()}
    if now["count"] < FIRST_STEPS // 2:
        return Found(math.nan)
    noise = max(math.sqrt(math.pi) / 2 * now["apart"] / (now["count"] - 1), abs(now["best"]) / 100)
    rose = now["paid"] > now["best_paid"]
    return Found((now["best"] - now["held"]) / noise if rose and noise else 0.0, {"name": name, **now})
